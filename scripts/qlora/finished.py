"""Finished runs, kept by the hash of all that decides them, so that a value changed and changed back trains nothing."""

import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from qlora.files import read_json, replacing, sha256_of, write_json

HASHES = "sha256.json"
log = logging.getLogger("qlora")


def keep(entry: Path, outputs: Mapping[str, Path]) -> None:
    """Copy a run's outputs, files or folders by name, into the folder `entry`, with the SHA-256 of each."""
    with replacing(entry) as folder:
        folder.mkdir()
        for name, path in outputs.items():
            _copy(path, folder / name)
        write_json(folder / HASHES, {name: sha256_of(folder / name) for name in outputs})


def take(entry: Path, outputs: Mapping[str, Path]) -> bool:
    """Put what `entry` keeps in the places of `outputs`, and say whether it was there and whole.

    An entry whose bytes are not those that were kept is removed, and named in the log.
    """
    if not entry.is_dir():
        return False
    if {name: sha256_of(entry / name) for name in outputs if (entry / name).exists()} != read_json(entry / HASHES):
        log.warning("%s is damaged: its files are not those that were kept; it is removed", entry)
        shutil.rmtree(entry)
        return False
    for name, path in outputs.items():
        with replacing(path) as temporary:
            _copy(entry / name, temporary)
    os.utime(entry)  # `trim` removes those that were not used for longest
    return True


def trim(folder: Path, most: int) -> list[Path]:
    """Remove all but the `most` entries of a folder that were used last; returns what was removed."""
    entries = sorted(folder.glob("[!.]*"), key=lambda entry: (-entry.stat().st_mtime_ns, entry.name))
    for entry in entries[most:]:
        shutil.rmtree(entry)
    return entries[most:]


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target)
    else:
        shutil.copyfile(source, target)
