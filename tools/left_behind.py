"""What a killed DVC leaves in the way of the next one: its list of who is at work on which output."""

import json
import sys
from pathlib import Path

import psutil
from dvc.config import Config, ConfigError
from dvc.lock import LockError, make_lock
from dvc.rwlock import SCHEMA
from voluptuous import Invalid

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "scripts"))

from qlora.errors import UserError  # noqa: E402 (scripts/ is no package)
from qlora.files import read_json  # noqa: E402

AT_WORK = Path(".dvc/tmp/rwlock")  # DVC writes it in place, and removes from it only processes whose number is free
GUARD = Path(".dvc/tmp/rwlock.lock")  # who has its lock may change the list, in DVC's own code too


def drop_dead_list(root: Path) -> None:
    """Remove DVC's list where it is not whole, or none of the processes that it names is one of DVC any more.

    Raises UserError where a DVC is writing the list just now, or cannot read its own config.
    """
    if not dead(root / AT_WORK):
        return
    try:
        hardlink = Config(str(root / ".dvc"))["core"]["hardlink_lock"]
        with make_lock(str(root / GUARD), tmp_dir=str((root / GUARD).parent), hardlink_lock=hardlink):
            if dead(root / AT_WORK):
                (root / AT_WORK).unlink()
    except LockError:
        told = f"a DVC is at work here and holds {root / GUARD}: wait for its end, or remove the file where none runs"
        raise UserError(told) from None
    except ConfigError as error:
        raise UserError(f"dvc: {error}") from None


def dead(path: Path) -> bool:
    """Whether a list is there that no living DVC has written, or is named in."""
    if not path.exists():
        return False
    try:
        noted = SCHEMA(read_json(path))
    except (json.JSONDecodeError, UnicodeDecodeError, Invalid):
        return True
    readers = [info for infos in noted["read"].values() for info in infos]
    infos = [*readers, *noted["write"].values()]
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
    return last == "-c" or " ".join(words).endswith(last)  # the code that Python was given behind `-c` is not noted
