"""What a killed DVC leaves in the way of the next one: its list of who is at work on which output."""

import json
import sys
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "scripts"))

from qlora.files import read_json  # noqa: E402 (scripts/ is no package)
from qlora.locks import locked  # noqa: E402

AT_WORK = Path(".dvc/tmp/rwlock")  # DVC writes it in place, and removes from it only processes whose number is free
GUARD = Path(".dvc/tmp/rwlock.lock")  # who has its lock may change the list, in DVC's own code too


def drop_dead_list(root: Path) -> None:
    """Remove DVC's list where it is half-written, or none of the processes that it names is one of DVC any more.

    Raises UserError that names the DVC that is writing the list just now.
    """
    if dead(root / AT_WORK):
        with locked(root / GUARD):
            if dead(root / AT_WORK):
                (root / AT_WORK).unlink()


def dead(path: Path) -> bool:
    """Whether a list is there that no living DVC has written, or is named in."""
    if not path.exists():
        return False
    try:
        noted = read_json(path)
    except json.JSONDecodeError:
        return True
    readers = [info for infos in noted.get("read", {}).values() for info in infos]
    infos = [*readers, *noted.get("write", {}).values()]
    return bool(infos) and not any(lives(info["pid"], info["cmd"]) for info in infos)


def lives(pid: int, command: str) -> bool:
    """Whether the process that was noted with this command lives: its number may have gone to another one."""
    try:
        words = psutil.Process(pid).cmdline()
    except psutil.AccessDenied:
        return True
    except psutil.NoSuchProcess:
        return False
    last = command.rsplit(" ", maxsplit=1)[-1]  # the first may differ: a file of DVC's where Python was given `-m dvc`
    return " ".join(words).endswith(last)
