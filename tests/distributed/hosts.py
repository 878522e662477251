"""Two hosts on one machine, without privileges: network namespaces joined by a cable, and an sshd in each.

Everything lives in namespaces of the first process, the process and mount namespaces among them, and goes with it:
whatever happens to a test, no process, interface or mount outlives it. The only files are in the folder it gives.
"""

import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

from tests.distributed.ranks import ROOT, environment, stop

SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
PROGRAMS = {"ip": "iproute2", "unshare": "util-linux", "ssh": "openssh-client", "pdsh": "pdsh", "hostname": "hostname"}
# A user who is root inside only. Each of the chain is killed with its parent.
NAMESPACES = "setpriv --pdeathsig KILL unshare --map-root-user --net --uts --mount --pid --fork --kill-child".split()
# sshd wants neither privileges nor the users' own, so it and all that it starts run as somebody who is not root.
SOMEBODY = "unshare --user --map-user=1000 --map-group=1000"
PORT = 2222

# As on many systems, a host's own name stands for an address that nobody else reaches.
_HOST = """
set -eu
hostname {name}
ip link set lo up
{cable}
until ip link show eth0 >/dev/null 2>&1; do sleep 0.05; done
ip address add {address}/24 dev eth0
ip link set eth0 up
ip route add default via {other_address}
for file in passwd hosts; do mount --bind {folder}/{name}/$file /etc/$file; done
{start}
"""
# The first script makes the namespaces of the second host, which lays the cable to process 1, on the first host.
_CABLES = {
    "first": "mount -t proc proc /proc; unshare --net --uts --mount sh {folder}/second/host.sh &",
    "second": "ip link add eth0 type veth peer name eth0 netns 1",
}
_STARTS = {
    "first": f"""{SOMEBODY} {SSHD} -D -f {{folder}}/sshd_config &
until ssh-keyscan -p {PORT} second 2>/dev/null | grep -q ed25519; do sleep 0.1; done
{SOMEBODY} "$@"
""",
    "second": f"exec {SOMEBODY} {SSHD} -D -f {{folder}}/sshd_config",
}
_ADDRESSES = {"first": "10.77.0.1", "second": "10.77.0.2"}
_FILES = {
    "hosts": "127.0.0.1 localhost\n127.0.1.1 {name}\n{other_address} {other}\n",
    "passwd": "somebody:*:1000:1000::{folder}/home:/bin/sh\n",
}
_SSHD_CONFIG = """
Port {port}
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
PidFile none
UsePAM no
StrictModes no
"""
_SSH_CONFIG = """
Host *
Port {port}
IdentityFile {folder}/key
UserKnownHostsFile {folder}/known_hosts
BatchMode yes
"""


@cache
def missing() -> str:
    """Why there can be no two hosts here, and what to do about it; empty where there can."""
    packages = [package for program, package in PROGRAMS.items() if shutil.which(program) is None]
    if SSHD is None:
        packages.append("openssh-server")
    if packages:
        return f"needs the packages {' '.join(packages)}; install them (no sshd has to run)"
    trial = "mount -t proc proc /proc && mount --bind /etc/hosts /etc/hosts && ip link add eth0 type veth"
    tried = subprocess.run([*NAMESPACES, "sh", "-ec", f"{trial} && {SOMEBODY} true"], capture_output=True, text=True)
    if tried.returncode:
        why = (tried.stderr.strip().splitlines() or ["no reason given"])[-1]
        return f"needs user, network and mount namespaces ({why}); allow user namespaces, or run it outside a container"
    return ""


def _write_settings(folder: Path, hidden: Path | None) -> None:
    """Keys, settings of ssh and sshd, and a folder with a script and some of /etc for each host."""
    (folder / "home" / ".ssh").mkdir(parents=True, exist_ok=True)
    for key in ("key", "host_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / key], check=True)
    public = (folder / "host_key.pub").read_text()
    (folder / "known_hosts").write_text("".join(f"[{name}]:{PORT} {public}" for name in _ADDRESSES))
    (folder / "sshd_config").write_text(_SSHD_CONFIG.format(port=PORT, folder=folder))
    (folder / "home" / ".ssh" / "config").write_text(_SSH_CONFIG.format(port=PORT, folder=folder))
    for name, other in (("first", "second"), ("second", "first")):
        values = {"name": name, "other": other, "other_address": _ADDRESSES[other], "folder": folder}
        (folder / name).mkdir()
        for file, text in _FILES.items():
            (folder / name / file).write_text(text.format(**values))
        cable, start = _CABLES[name].format(**values), _STARTS[name].format(**values)
        if hidden and name == "second":
            start = f"mount -t tmpfs none {hidden}\n{start}"
        script = _HOST.format(**values, address=_ADDRESSES[name], cable=cable, start=start)
        (folder / name / "host.sh").write_text(script)


def run_on_first(folder: Path, command: list[str], timeout: float, hidden: Path | None = None) -> tuple[int, str]:
    """Exit code and output of a command on the host ``first``, from which ssh leads to ``first`` and ``second``.

    Both see the files of this machine, but the folder ``hidden`` is empty on the second. ``folder`` is for keys and
    settings; its ``home`` is the home on both.
    """
    _write_settings(folder, hidden)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin"
    process = subprocess.Popen(
        [*NAMESPACES, "sh", f"{folder}/first/host.sh", *command],
        cwd=ROOT,
        env=environment(HOME=f"{folder}/home", PATH=path),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        stop(process)
        output, _ = process.communicate()
    finally:
        stop(process)
    return process.returncode, output
