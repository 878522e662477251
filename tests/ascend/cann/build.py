"""Make the libraries of CANN that torch_npu asks for, from its own list of missing symbols: ``python build.py FOLDER``.

``runtime.c`` says what the few that work do. All others return an error, because a stub that reports success would
leave memory as it was, and garbage would pass for a result. Put FOLDER into ``LD_LIBRARY_PATH``, as CANN's own
set_env.sh does with its libraries. Needs gcc and nm. Nothing here imports torch: without these it may not import.
"""

import importlib.util
import subprocess
import sys
from pathlib import Path

RUNTIME = Path(__file__).with_name("runtime.c")
HOLDER = "libascendcl.so"  # has all symbols; the others only have their names


def build(folder: Path) -> None:
    """Write the libraries into ``folder``."""
    for part in ("opp", "runtime", "compiler"):  # torch_npu looks whether they are there
        (folder / part).mkdir(parents=True, exist_ok=True)
    package = Path(importlib.util.find_spec("torch_npu").submodule_search_locations[0])
    torch = Path(importlib.util.find_spec("torch").submodule_search_locations[0])
    ours = [package / "lib" / f"lib{name}.so" for name in ("torch_npu", "tensorpipe", "npu_profiler")]
    ours += package.glob("_C.*.so")
    with_runtime = folder / "runtime.o"
    _run("gcc", "-O1", "-Wall", "-Werror", "-Wno-unused-parameter", "-fPIC", "-c", str(RUNTIME), "-o", with_runtime)
    there = _symbols("--defined-only", *ours, *torch.glob("lib/*.so")) | _symbols("--defined-only", with_runtime)
    missing = {name for name in _symbols("--undefined-only", *ours) - there if name.startswith(("acl", "rt", "Msprof"))}
    stubs = folder / "stubs.c"
    stubs.write_text("".join(f"int {name}(void) {{ return 207000; }}\n" for name in sorted(missing)))
    _run("gcc", "-shared", "-fPIC", f"-Wl,-soname,{HOLDER}", with_runtime, stubs, "-o", folder / HOLDER)
    needed = {name for library in ours for name in _needed(library)}
    known = {path.name for path in (*ours, *torch.glob("lib/*.so"))}
    for name in needed - known - {HOLDER}:
        if not _system_has(name):
            _run("gcc", "-shared", f"-Wl,-soname,{name}", "-Wl,--no-as-needed", folder / HOLDER, "-o", folder / name)


def _symbols(which: str, *libraries: Path) -> set[str]:
    found = set()
    for library in libraries:
        dynamic = [] if library.suffix == ".o" else ["-D"]
        lines = _run("nm", *dynamic, which, library).splitlines()
        found |= {line.split()[-1].partition("@")[0] for line in lines if line.split()}
    return found


def _needed(library: Path) -> list[str]:
    lines = _run("readelf", "-d", library).splitlines()
    return [line.partition("[")[2].rstrip("]") for line in lines if "(NEEDED)" in line]


def _system_has(name: str) -> bool:
    if name.startswith("ld-linux"):
        return True
    probe = f"import ctypes; ctypes.CDLL({name!r})"
    return subprocess.run([sys.executable, "-c", probe], capture_output=True).returncode == 0


def _run(*command: object) -> str:
    return subprocess.run([str(part) for part in command], check=True, text=True, stdout=subprocess.PIPE).stdout


if __name__ == "__main__":
    build(Path(sys.argv[1]))
