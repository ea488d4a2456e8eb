"""What lies among the results and is not the default's: DVC neither records it nor takes it away.

An experiment shares the folders of sources and datasets with the default; `merge` and `publish` add to a run's.
"""

import re
import sys
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "scripts"))

from qlora.files import replacing  # noqa: E402 (scripts/ is no package)

IGNORED = Path("results/.dvcignore")


def strangers(root: Path, outs: Iterable[str], ours: Collection[str]) -> list[str]:
    """The files and folders below `outs` that are none of ours, nor in or above one of them."""
    wanted = {Path(path) for path in ours}
    above = {parent for path in wanted for parent in path.parents}

    def found(path: Path) -> Iterator[str]:
        if path in above and (root / path).is_dir():
            for name in sorted(entry.name for entry in (root / path).iterdir()):
                yield from found(path / name)
        elif path not in wanted:
            yield path.as_posix()

    return [name for out in outs if (root / out).exists() for name in found(Path(out))]


def lies_in(path: str, places: Iterable[str]) -> bool:
    """Whether a path is one of the places (files or folders), or below one."""
    return any(Path(path).is_relative_to(place) for place in places)


def leave_alone(root: Path, names: Iterable[str]) -> None:
    """Have DVC look past the files and folders of these names, and past no others."""
    with replacing(root / IGNORED) as temporary:
        lines = ["# Made by make record and make restore: what is not the default's.", *map(_pattern, names)]
        temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _pattern(name: str) -> str:
    """The pattern of .dvcignore that means one path, given from the repository's root."""
    return "/" + re.sub(r"([\\*?\[\] ])", r"\\\1", Path(name).relative_to(IGNORED.parent).as_posix())
