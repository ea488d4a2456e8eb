"""Who may work on a folder's results: several Snakemakes, or one of the tools that record and restore them."""

import errno
import fcntl
import os
from pathlib import Path
from typing import TextIO

import psutil

from qlora.errors import UserError

RESULTS_LOCK = Path(".snakemake/results.lock")
ATTEMPTS = 5  # to take a lock whose holder ends while it is looked for
HELD = "RESULTS_ARE_HELD"  # in the environment of what a tool starts while it holds the lock
WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # what the file systems of some clusters answer


def locked(path: Path, shared: bool = False) -> TextIO:
    """Take the lock that a file stands for; it ends when the last process that has the file open closes it or ends.

    That is this process and those that inherit the file. Raises UserError that names who has the lock; a file system
    that knows no locks holds nobody back.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    how = os.O_RDONLY if shared else os.O_RDWR  # who may only read a folder may still ask what there is to do
    for _ in range(ATTEMPTS):
        file = os.fdopen(os.open(path, os.O_CREAT | how, 0o666), encoding="utf-8")
        if _taken(file, shared):
            os.set_inheritable(file.fileno(), True)
            return file
        file.close()
        holder = _holder(path)
        if holder:  # else it has ended since, or cannot be seen
            break
    holder = holder or "a process of another user or machine"
    raise UserError(f"{holder} is at work here and holds {path}: wait for its end")


def _taken(file: TextIO, shared: bool) -> bool:
    """Whether this process has the lock now, or there is none to have."""
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in WITHOUT_LOCKS:
            raise
    return True


def _holder(path: Path) -> str | None:
    """The first process that has a file open, in words; None where none is seen."""
    for process in psutil.process_iter():
        try:
            held = any(Path(file.path) == path.resolve() for file in process.open_files())
            words = process.cmdline()  # none of a process that is ending just now
            if held and words:
                return f"process {process.pid} ({' '.join(words[1:])})"
        except psutil.Error:  # it ended just now, or is another user's
            continue
    return None
