"""Who may work on a folder's results: several Snakemakes, or one of the tools that record and restore them."""

import errno
import fcntl
import os
from pathlib import Path
from typing import TextIO

import psutil

from qlora.errors import UserError

RESULTS_LOCK = Path(".snakemake/results.lock")
HELD = "RESULTS_ARE_HELD"  # in the environment of what a tool starts while it holds the lock
WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # what the file systems of some clusters answer


def locked(path: Path, shared: bool = False) -> TextIO:
    """Take the lock that a file stands for; it ends when the last process that has the file open closes it or ends.

    That is this process and those that inherit the file. Raises UserError that names who has the lock; a file system
    that knows no locks holds nobody back.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    how = os.O_RDONLY if shared else os.O_RDWR  # who may only read a folder may still ask what there is to do
    file = os.fdopen(os.open(path, os.O_CREAT | how, 0o666), encoding="utf-8")
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise UserError(f"{_holder(path)} is at work here and holds {path}: wait for its end") from None
    except OSError as error:
        if error.errno not in WITHOUT_LOCKS:
            raise
    os.set_inheritable(file.fileno(), True)
    return file


def _holder(path: Path) -> str:
    """The first process that has a file open, in words."""
    for process in psutil.process_iter():
        try:
            if any(Path(file.path) == path.resolve() for file in process.open_files()):
                return f"process {process.pid} ({' '.join(process.cmdline()[1:])})"
        except psutil.Error:  # it ended just now, or is another user's
            continue
    return "a process of another user or machine"
