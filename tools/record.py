"""Record the results as they are: into DVC's cache, dvc.lock and results/lock.json. `make record`.

Refused where that would bless something stale, or a file that changed after its job wrote it.
"""

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "scripts"))

from qlora.errors import UserError  # noqa: E402
from qlora.files import read_json, sha256_of_file, write_json  # noqa: E402
from recorded import (  # noqa: E402 (scripts/ is no package)
    CUT_OFF,
    NO_SPACE,
    Out,
    alone,
    drop_damaged,
    finish,
    job_hash,
    job_records,
    not_in_cache,
    planned,
    ran,
    recorded_outs,
    remote_name,
)
from results_lock import (  # noqa: E402
    LOCK,
    counted,
    declared_outputs,
    first_difference,
    made_lock,
    read_lock,
    stage_outputs,
)
from strangers import leave_alone, strangers  # noqa: E402

WHAT = "make record"


def record(root: Path) -> str:
    """Record the results below `root`, and say what was recorded. Raises UserError with the reason to refuse."""
    if not (root / "results/metrics.csv").exists():
        raise UserError("there are no results: make them with `make demo` or snakemake, then record")
    if (root / CUT_OFF).exists():
        raise UserError("make restore was cut off here: run it again, then record")
    declared = declared_outputs(root)
    records = {path: noted for path, noted in job_records(root).items() if path in declared}
    refuse(changed_files(root, declared, records))
    plan = planned(root)
    if plan.first:
        raise UserError(f"the results are stale, {plan.jobs} jobs are due, first: {plan.first}; run snakemake first")
    lock, before = made_lock(root), read_lock(root)
    refuse(changed_since(before, lock))
    leave_alone(root, strangers(root, [path for paths in stage_outputs(root).values() for path in paths], declared))
    with anew(root / "dvc.lock"):
        outs = into_cache(root)
    jobs = {path: job_hash(noted) for path, noted in records.items()}
    made = {**lock, "outs": {path: out.md5 for path, out in outs.items()}, "jobs": jobs}
    unchanged = {**made, "commit": before.get("commit")} == before  # recorded again: not a file differs then
    write_json(root / LOCK, before if unchanged else made)
    kept = push(root)
    return f"Recorded {counted(lock['files'])}, {kept}; next: git add config dvc.lock results && git commit"


def into_cache(root: Path) -> dict[str, Out]:
    """Have DVC keep the outputs; raises UserError where its cache is not whole then, which DVC says nothing of.

    Twice, since what a full disk or a bad one left in the cache must go first.
    """
    for _ in range(2):
        ran(root, "dvc", "commit", "--force", "--no-relink")
        outs = recorded_outs(root)
        bulk = {path: out for path, out in outs.items() if out.cached}
        absent = not_in_cache(root, bulk)
        if not absent:
            return outs
        drop_damaged(root, bulk)
    raise UserError(f"DVC's cache did not take {next(iter(absent))}: {NO_SPACE}")


def push(root: Path) -> str:
    """Send what was recorded to the remote, if there is one; says where it is kept now."""
    remote = remote_name(root)
    if not remote:
        return "in the cache of this folder alone (no DVC remote)"
    try:
        ran(root, "dvc", "push")
    except UserError as error:
        raise UserError(
            f"recorded here, but not in the remote '{remote}' ({error}); mend that, then make record"
        ) from None
    return f"in the cache and the remote '{remote}'"


def refuse(file: str | None) -> None:
    """Raise UserError about a file that is not what its job wrote."""
    if file:
        raise UserError(f"{file}; delete it and run snakemake, which makes it anew, then record")


def changed_files(root: Path, declared: Iterable[str], records: Mapping[str, Mapping[str, Any]]) -> str | None:
    """The first output that is not what its job wrote, in words; None for none.

    Told by its time, by what the jobs after it noted as its SHA-256, by source.json, card.json and run.json.
    """
    for path, noted in sorted(records.items()):
        if "endtime" not in noted:
            return f"what Snakemake noted about {path} is half-written"
        for file in sorted((root / path).rglob("*")) if (root / path).is_dir() else [root / path]:
            if file.is_file() and file.lstat().st_mtime > noted["endtime"]:
                return f"{file.relative_to(root)} was modified after its job wrote it"
        for name, checksum in sorted((noted["input_checksums"] or {}).items()):
            if (root / name).is_file() and name in records and sha256_of_file(root / name) != checksum.split(":")[-1]:
                return f"{name} is not what it was when {path} was made of it"
    for file, digest in sorted(noted_hashes(root, declared).items()):
        if not file.is_file() or sha256_of_file(file) != digest:
            return f"{file.relative_to(root)} is not what its job wrote"
    return None


def noted_hashes(root: Path, declared: Iterable[str]) -> dict[Path, str]:
    """File → SHA-256 that the results themselves note: of the sources' files, the tokenised rows' and the adapters'."""
    noted: dict[Path, str] = {}
    for path in (root / name for name in declared):
        if (path / "source.json").is_file():
            files = read_json(path / "source.json")["files"]
            noted |= {path / name: file["sha256"] for name, file in files.items()}
        elif (path / "card.json").is_file():
            noted |= {path / name: digest for name, digest in read_json(path / "card.json").get("sha256", {}).items()}
        elif path.name == "run.json" and path.is_file():
            noted |= {path.parent / "adapter" / name: digest for name, digest in read_json(path)["adapter"].items()}
    return noted


def changed_since(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """The first file that differs from what the same config, code and machine recorded before, in words."""
    if any(before.get(key) != now[key] for key in ("decided by", "hardware")):
        return None
    difference = first_difference(before["files"], now["files"])
    return f"{difference} from what the same configuration and code recorded before" if difference else None


@contextmanager
def anew(path: Path) -> Iterator[None]:
    """Have a file written without a look at what it was, which a kill may have cut off.

    It is beside, as .NAME.before, until the new one is whole; it comes back at a failure, after a kill at the next one.
    """
    aside = path.with_name(f".{path.name}.before")
    try:
        if path.exists() and not aside.exists():  # where a kill left one, that is the last whole file
            path.rename(aside)
        path.unlink(missing_ok=True)
        yield
        aside.unlink(missing_ok=True)
    finally:
        if aside.exists():
            aside.replace(path)


def main() -> int:
    """Record, and print in one line what was recorded or why not; returns the exit status."""
    try:
        with alone(ROOT):
            print(record(ROOT))
    except UserError as error:
        return finish(WHAT, error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
