"""Check a run's adapter, and what made it, against its record and results/lock.json: `make verify RUN=name`."""

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from results_lock import LOCK, ROOT, content_hash, read_lock  # makes the modules below importable

# isort: split
from qlora.errors import UserError
from qlora.files import files_below, read_json

Hashes = dict[Path, dict[str, str]]  # file → who says what its hash is → that hash
RECORDED = LOCK.as_posix()


def verify(root: Path, run: str, lock: Mapping[str, Any]) -> Iterator[tuple[str, str | None]]:
    """What was checked, a pin or a file each, and what is wrong with it: None where nothing is.

    `lock` may be empty: then the files are checked against run.json and source.json alone.
    Raises UserError where there is no such run.
    """
    folder = root / "results/runs" / run
    if not (folder / "run.json").is_file():
        known = ", ".join(sorted(path.parent.name for path in folder.parent.glob("*/run.json")))
        raise UserError(f"no run '{run}' in results/runs; there: {known or 'none'}")
    record = read_json(folder / "run.json")
    sources = [f"models/{record['model']}", *(f"datasets/{name}" for name in _datasets(root, record))]
    for source in sources:
        yield f"the pin of {source}", moved(root, source, lock)
    for path, hashes in expected(root, folder, record, sources, lock).items():
        yield path.relative_to(root).as_posix(), problem(path, hashes)


def _datasets(root: Path, record: Mapping[str, Any]) -> list[str]:
    """The datasets of a run's mixture."""
    return list(read_json(root / "results/mixtures" / record["mixture"] / "card.json")["datasets"])


def expected(
    root: Path, folder: Path, record: Mapping[str, Any], sources: list[str], lock: Mapping[str, Any]
) -> Hashes:
    """The files of a run, of its tokens, its base model and its data, each with the hashes that are known of it."""
    model, tokens = (root / "results" / name / record["model"] for name in ("sources/models", "tokens"))
    pins = record["pins"]
    found: Hashes = {file: {} for file in [folder / "run.json", *files_below(folder / "adapter")]}
    told = [
        *((folder / "adapter" / name, "run.json", hashed) for name, hashed in record["adapter"].items()),
        *((tokens / record["mixture"] / name, "run.json", hashed) for name, hashed in pins["tokens"].items()),
        *((model / name, "run.json", hashed) for name, hashed in pins["model"]["files"].items()),
    ]
    for place in (root / "results/sources" / source for source in sources):
        files = read_json(place / "source.json")["files"]
        told += [(place / name, "source.json", facts["sha256"]) for name, facts in files.items()]
    for path, who, hashed in told:
        found.setdefault(path, {})[who] = hashed
    for name, hashed in ((name, hashed) for names in lock.get("files", {}).values() for name, hashed in names.items()):
        if root / name in found:
            found[root / name][RECORDED] = hashed
    return found


def problem(path: Path, hashes: Mapping[str, str]) -> str | None:
    """What is wrong with a file, given who says what its hash is; None where nothing is."""
    if not path.is_file():
        return f"is missing (named by {' and '.join(hashes)})"
    actual = content_hash(path)
    wrong = [who for who, hashed in hashes.items() if hashed != actual]
    if wrong:
        return f"is not the file named by {' and '.join(wrong)}"
    return None if hashes or path.name == "run.json" else "is in no record"


def moved(root: Path, source: str, lock: Mapping[str, Any]) -> str | None:
    """What is wrong with where a source came from, beside the lock: another commit, path, hash or seed."""
    here = read_json(root / "results/sources" / source / "source.json")["source"]
    recorded = lock.get("sources", {}).get(source, {"source": here})["source"]
    return None if recorded == here else f"is {here}, and {RECORDED} names {recorded}"


def main(arguments: list[str]) -> int:
    """A line for each thing checked; 0 where all are as recorded."""
    if len(arguments) != 1 or not arguments[0]:
        print("verify: error: name a run, as in `make verify RUN=llama`", file=sys.stderr)
        return 1
    try:
        lock = read_lock(ROOT)
        checked = list(verify(ROOT, arguments[0], lock))
    except (UserError, OSError) as error:
        print(f"verify: error: {error}", file=sys.stderr)
        return 1
    for what, wrong in checked:
        print(f"WRONG  {what} {wrong}" if wrong else f"ok     {what}")
    wrongs = sum(wrong is not None for _, wrong in checked)
    print(
        f"verify: {len(checked) - wrongs} of {len(checked)} are as recorded"
        + ("" if lock else f"; {RECORDED} is missing: `make record` writes it")
    )
    return 1 if wrongs else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
