"""What a person sees, in a pipe and on a terminal."""

import codecs
import fcntl
import io
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time

from trainer.metrics.screen import Lines

STEP = {
    "step": 20,
    "loss": 8.31741,
    "grad_norm": 1.234,
    "lr": 6e-5,
    "tokens_per_second": 1023.0,
    "mfu": 0.331,
    "memory_gib": 0.81,
    "seconds_left": 750.0,
}


def test_a_plain_line_holds_the_figures_in_human_units():
    stream = io.StringIO()
    Lines(2000, stream).step(STEP)
    assert stream.getvalue() == (
        "step   20/2000  loss  8.3174  left 12m 30s  1.02k tok/s  MFU 33.1%  grad   1.234  lr 6.00e-05    0.81 GiB\n"
    )


def test_plain_lines_align_from_step_to_step():
    stream = io.StringIO()
    lines = Lines(2000, stream)
    lines.step(STEP)
    lines.step(STEP | {"step": 1500, "loss": 11.5, "grad_norm": 120.0, "tokens_per_second": 998.2, "seconds_left": 9.0})
    first, second = stream.getvalue().splitlines()
    assert len(first) == len(second) and "left    9.0s" in second


def test_the_first_step_has_no_speed_yet():
    stream = io.StringIO()
    Lines(10, stream).step({"step": 1, "loss": 8.0, "lr": 1e-5})
    assert stream.getvalue() == "step  1/10  loss  8.0000  lr 1.00e-05\n"


def test_the_loss_is_what_validation_measures():
    stream = io.StringIO()
    Lines(10, stream).step({"step": 2, "loss": 9.0, "lm_loss": 7.0, "mtp_loss": 6.0})
    assert stream.getvalue() == "step  2/10  loss  7.0000\n"


PROGRAM = f"""
import signal
import time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has its background jobs ignore it
from trainer.metrics.screen import open_screen
screen = open_screen(2000, 0)
print("started")
screen.step({STEP!r})
screen.message("evaluation [1/2]")
time.sleep(60)
"""


ESCAPES = r"\x1b\[[0-9;?]*[A-Za-z]"


class Terminal:
    """A program on a pseudo-terminal of a given width."""

    def __init__(self, columns: int) -> None:
        self.master, slave = pty.openpty()
        self.resize(columns)
        environment = os.environ | {"TERM": "xterm-256color", "PYTHONUNBUFFERED": "1"}
        for name in ("COLUMNS", "LINES", "NO_COLOR"):
            environment.pop(name, None)
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM], stdin=slave, stdout=slave, stderr=slave, env=environment
        )
        os.close(slave)
        self.text, self.decoder = "", codecs.getincrementaldecoder("utf-8")()

    def resize(self, columns: int) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))

    def read_until(self, wanted: str, seconds: float = 30) -> str:
        """What came since the last call, up to where ``wanted`` (a pattern) is found."""
        end, came = time.monotonic() + seconds, ""
        while time.monotonic() < end:
            if select.select([self.master], [], [], 0.1)[0]:
                try:
                    came += self.decoder.decode(os.read(self.master, 65536))
                except OSError:  # the program is gone
                    break
            if re.search(wanted, came):
                break
        self.text += came
        return came

    def read_to_end(self) -> None:
        """Until the program is gone."""
        self.read_until(r"(?!)", seconds=60)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)


def test_on_a_terminal_one_line_rewrites_itself_and_gives_the_cursor_back():
    terminal = Terminal(columns=150)
    try:
        shown = terminal.read_until(r"evaluation \[1/2\][^…]*GiB")
        whole = (
            "step   20/2000  loss  8.3174  left 12m 30s  1.02k tok/s  MFU 33.1%  grad   1.234  lr 6.00e-05    0.81 GiB"
        )
        assert whole in re.sub(ESCAPES, "", shown)
        # A line that no longer fits would wrap and leave its upper half behind at each refresh.
        for columns, last in ((80, "grad   1.234"), (79, "MFU 33.1%"), (40, "loss  8.3174")):
            terminal.resize(columns)
            narrow = terminal.read_until(rf"20/2000[^\r]*{last} *[\r\x1b][^\x00]*20/2000[^\r]*{last} *[\r\x1b]")
            lines = re.sub(ESCAPES, "", narrow).split("\r")
            assert whole[: whole.index(last) + len(last)] in [line.strip() for line in lines]
            assert len(lines[-2].rstrip()) <= columns
        terminal.process.send_signal(signal.SIGINT)
        terminal.read_to_end()  # or it would wait for someone to read
        assert terminal.process.wait(60) != 0 and "KeyboardInterrupt" in terminal.text
        hidden, visible = terminal.text.rfind("\x1b[?25l"), terminal.text.rfind("\x1b[?25h")
        assert hidden < visible
    finally:
        terminal.close()
