"""Make .venv from the lock: checked first, whole or not at all, silent but for a line of what happens.

Run by `make` with whatever Python it found, so this file must parse on Python 3.6 and use the standard library only.
"""

import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TextIO, Tuple

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
LOG = ROOT / ".venv-install.log"
LOCK = ROOT / "requirements.lock"
CONSTRAINTS = ROOT / "constraints-cuda.lock"
STAMP = VENV / "installed.lock"  # written last, so that it stands in a whole environment only

SUPPORTED = "Linux x86-64 (glibc) with CPython 3.11 or 3.12 is needed"
LIGER = "liger-kernel==0.8.5"  # norms and rotary positions on a GPU, where the build of torch brings Triton
IS_CUDA_BUILD = "import sys, torch; sys.exit(torch.version.cuda is None)"
FREE_GB = 4  # the CPU build's environment and its downloads
NO_NETWORK = "The package index cannot be reached: check the network, and pip's index and proxy settings."
CAUSES = (  # what the log says, what to do; the first that fits
    ("No space left on device", "The disk is full: 4 GB are needed, 14 GB with the CUDA build of torch."),
    ("ensurepip", "This Python cannot make environments: on Debian and Ubuntu, install its python3-venv package."),
    ("Failed to establish a new connection", NO_NETWORK),
    ("Max retries exceeded", NO_NETWORK),
    ("Cannot connect to proxy", NO_NETWORK),
    ("Read timed out", "The package index answers too slowly: run the same command again."),
    ("No matching distribution found", "The package index lacks a package of the lock: choose another index."),
)


def unsupported(system: str, machine: str, libc: str, implementation: str, version: Tuple[int, int]) -> str:
    """Return why this machine or Python is not supported, or an empty string.

    The arguments are those of `platform.system()`, `platform.machine()`, `platform.libc_ver()[0]`,
    `platform.python_implementation()` and `sys.version_info[:2]`.
    """
    if system != "Linux" or machine not in ("x86_64", "AMD64"):
        return f"{system} {machine}"
    if libc != "glibc":
        return "Linux with another C library than glibc"
    if implementation != "CPython" or version not in ((3, 11), (3, 12)):
        return f"{implementation} {version[0]}.{version[1]} ({sys.executable})"
    return ""


def wanted_stamp() -> str:
    """Return what the stamp of an environment that is up to date says: its place (it cannot move) and both locks."""
    return f"# {VENV}\n{LOCK.read_text()}{CONSTRAINTS.read_text()}"


def is_whole() -> bool:
    """Tell whether .venv was installed to its end, here, from the locks as they are now."""
    python = VENV / "bin" / "python"
    return python.exists() and STAMP.exists() and STAMP.read_text() == wanted_stamp()


def install(log: TextIO) -> int:
    """Make the environment, with the output of venv and pip in the open file `log`; return the exit status."""
    python = str(VENV / "bin" / "python")
    pip = [python, "-m", "pip", "--disable-pip-version-check", "--no-input"]
    steps = (
        [sys.executable, "-m", "venv", str(VENV)],
        [*pip, "install", "--progress-bar", "off", "-r", str(LOCK), "-c", str(CONSTRAINTS)],
        [*pip, "check"],
    )
    for step in steps:
        log.write(f"$ {' '.join(step)}\n")
        log.flush()
        status = subprocess.call(step, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        if status != 0:
            return status
    if subprocess.call([python, "-c", IS_CUDA_BUILD], stderr=log) == 0:  # its Triton is what Liger needs
        log.write(f"$ pip install --no-deps {LIGER}\n")
        log.flush()
        return subprocess.call([*pip, "install", "--no-deps", LIGER], stdout=log, stderr=subprocess.STDOUT)
    return 0


def explain(text: str) -> str:
    """Return what to do about a failed installation, from its log's `text`."""
    for sign, remedy in CAUSES:
        if sign in text:
            return remedy
    return "Run the same command again; where it fails again, the log says why."


def main() -> int:
    """Make or remake .venv where that is needed; return the exit status."""
    refusal = unsupported(
        platform.system(),
        platform.machine(),
        platform.libc_ver()[0],
        platform.python_implementation(),
        sys.version_info[:2],
    )
    if refusal:
        print(f"{SUPPORTED}; this is {refusal}. PYTHON=path chooses another Python.", file=sys.stderr)
        return 2
    if is_whole():
        return 0
    import fcntl  # not on every platform that is refused above

    with LOG.open("a") as log:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)  # pip inherits it, so that it outlives a killed `make`
        except BlockingIOError:
            print(f"Another installation into {VENV} is running: wait for its end.", file=sys.stderr)
            return 2
        log.truncate(0)
        return make_environment(log)


def make_environment(log: TextIO) -> int:
    """Remove what there is of .venv and install it anew, logging into the open file; return the exit status."""
    if VENV.is_symlink():
        print(
            f"{VENV} is a link to {VENV.resolve()}, which does not fit this folder: remove the link.", file=sys.stderr
        )
        return 2
    if STAMP.exists():
        STAMP.unlink()  # first, so that a half-removed environment is not taken for whole
    shutil.rmtree(str(VENV), ignore_errors=True)
    free = shutil.disk_usage(str(ROOT)).free / 1e9
    if free < FREE_GB:
        print(f"{ROOT} has {free:.1f} GB free; the installation needs {FREE_GB} GB.", file=sys.stderr)
        return 2
    print(
        f"Installing the {LOCK.read_text().count('==')} packages of {LOCK.name} into .venv, Python "
        f"{platform.python_version()}: about 2.5 minutes and 2 GB, more with the CUDA build of torch (log: {LOG.name})",
        flush=True,
    )
    started = time.time()
    status = install(log)
    if status != 0:
        text = LOG.read_text(errors="replace")
        print("\n".join(text.splitlines()[-6:]), file=sys.stderr)
        print(f"The installation failed (the whole log: {LOG.name}). {explain(text)}", file=sys.stderr)
        return 1
    STAMP.write_text(wanted_stamp())
    print(f"Installed in {time.time() - started:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("Interrupted; the next start begins the installation anew.", file=sys.stderr)
        sys.exit(130)
