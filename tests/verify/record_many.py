"""On every rank: record traces under several overrides and planted faults in turn, in one process group.

Arguments: the config's path, the folder that gets the traces, then one trace an argument:
``name|fault|overrides``, where the fault may be empty. Every rank reports nothing but that it came to the end.
"""

import sys
from contextlib import nullcontext
from pathlib import Path

from tests.distributed.ranks import report
from tests.small import small_config
from tests.verify.faults import FAULTS
from trainer.verify.record import record


def main() -> None:
    path, folder, *lines = sys.argv[1:]
    for line in lines:
        name, fault, overrides = line.split("|")
        words = overrides.split()
        noise = "--noise" in words
        config = small_config(Path(path), *(word for word in words if word != "--noise"))
        with FAULTS[fault].plant() if fault else nullcontext():
            record(config, path, Path(folder) / name, steps=2, noise=noise)
    report("done")


if __name__ == "__main__":
    main()
