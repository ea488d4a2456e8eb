"""Bring back the results that dvc.lock holds, and make Snakemake agree with them: `make restore`.

Nothing is put into results/ before all of it is here and has the recorded bytes; while it is put there, and if that is
cut off, Snakemake refuses to run. What decides a job (its params, its inputs) is compared with what was recorded: a job
that is another one now stays due.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "scripts"))

from qlora.errors import UserError  # noqa: E402
from qlora.files import files_below, read_json  # noqa: E402
from qlora.finished import keep  # noqa: E402
from recorded import (  # noqa: E402 (scripts/ is no package)
    CUT_OFF,
    NO_SPACE,
    Out,
    alone,
    cached,
    drop_damaged,
    files_of_outs,
    finish,
    job_hash,
    job_records,
    md5_of,
    not_in_cache,
    planned,
    ran,
    recorded_outs,
    remote_name,
)
from results_lock import LOCK, declared_outputs, git, read_lock  # noqa: E402
from strangers import leave_alone, lies_in, strangers  # noqa: E402

WHAT = "make restore"
RUN_OUTPUTS = {  # of rule train
    "adapter": "adapter",
    "record": "run.json",
    "training_log": "training_log.csv",
    "samples": "samples.jsonl",
}
RECOMPUTE = "make reproduce computes the results anew"


def restore(root: Path, discard: bool = False) -> str:
    """Bring back the recorded results below `root`, and say so. Raises UserError with the reason to refuse."""
    refuse(dirty(git(root, "--no-optional-locks", "status", "--porcelain", "--untracked-files=no")))
    outs, lock = recorded_outs(root), read_lock(root)
    refuse(not_recorded(outs, lock))
    refuse(other_bytes(root, {path: out.md5 for path, out in outs.items() if not out.cached}))
    bulk = {path: out for path, out in outs.items() if out.cached}
    fetch(root, bulk)
    files = files_of_outs(root, bulk)
    others = strangers(root, bulk, {*declared_outputs(root), *files})
    if not discard:
        refuse(lost(root, bulk, files, others))
    refuse(too_little_space(root, files))
    (root / CUT_OFF).parent.mkdir(exist_ok=True)
    (root / CUT_OFF).touch()
    leave_alone(root, others)
    ran(root, "dvc", "checkout", "--force")
    refuse(other_bytes(root, files))
    for path in [*files, *from_the_future(root)]:
        os.utime(root / path)  # Snakemake touches no input, and of a folder not what is in it
    keep_finished(root)
    left = agree(root, lock["jobs"])
    (root / CUT_OFF).unlink()
    here = f"Restored {len(files)} files as dvc.lock has them"
    if not left:
        return f"{here}; snakemake -n has nothing to do; next: open results/report/index.html"
    return f"{here}, but not all of them are what this commit asks for: {left}; next: snakemake --cores all"


def refuse(reason: str | None) -> None:
    """Raise UserError where there is a reason."""
    if reason:
        raise UserError(reason)


def not_recorded(outs: Mapping[str, Out], lock: Mapping[str, Any]) -> str | None:
    """Why there is nothing to restore, or None: dvc.lock and results/lock.json must be of one record."""
    if not outs or "outs" not in lock:
        return f"nothing is recorded in this commit (dvc.lock, {LOCK}): {RECOMPUTE}"
    if lock["outs"] != {path: out.md5 for path, out in outs.items()}:
        return f"dvc.lock and {LOCK} are not of one record: make record, or check out a commit with both"
    return None


def dirty(status: str) -> str | None:
    """Why a restore would mix commits, from `git status --porcelain`; None for a clean tree."""
    if not status:
        return None
    file = status.splitlines()[0].split(maxsplit=1)[1]
    return f"{file} differs from the commit: commit it (results: make record), or take it back with git, then restore"


def other_bytes(root: Path, files: Mapping[str, str]) -> str | None:
    """The first file that has not the MD5 that was recorded, in words; None for none."""
    for path, md5 in sorted(files.items()):
        if not (root / path).is_file():
            return f"{path} is missing, though dvc.lock has it"
        if md5_of(root / path) != md5:
            return f"{path} is not the file that dvc.lock has: restore again, or {RECOMPUTE}"
    return None


def fetch(root: Path, outs: Mapping[str, Out]) -> None:
    """Have all bytes of the outputs in DVC's cache, whole; raises UserError that names a file where that fails."""
    if not (absent := not_in_cache(root, outs)):
        return
    path, how = next(iter(absent.items()))
    what = f"{path} is {how} in DVC's cache ({len(absent)} such)"
    remote = remote_name(root)
    if not remote:
        raise UserError(f"{what}, and no DVC remote is configured: {RECOMPUTE}")
    drop_damaged(root, outs)
    try:
        ran(root, "dvc", "fetch")
    except UserError as error:
        refuse(str(error) if str(error) == NO_SPACE else None)
        raise UserError(f"{what}, and the remote '{remote}' does not give it ({error}); {RECOMPUTE}") from None
    if absent := not_in_cache(root, outs):
        path, how = next(iter(absent.items()))
        beside = "or it cannot be reached" if how == "missing" else "whose file is damaged too"
        raise UserError(
            f"{path} is {how}: DVC got it neither from its cache nor from '{remote}', {beside}; {RECOMPUTE}"
        )


def lost(root: Path, outs: Iterable[str], files: Mapping[str, str], others: Collection[str]) -> str | None:
    """Which file a restore would lose, since it is not recorded and DVC's cache has not its bytes; None for none.

    What lies in `others` is not the default's, and stays.
    """
    for out in outs:
        for file in files_below(root / out) if (root / out).exists() else []:
            name = file.relative_to(root).as_posix()
            if lies_in(name, others) or (name in files and md5_of(file) == files[name]):
                continue
            if not cached(root, md5_of(file)).exists():
                return (
                    f"{name} would be lost, it is not recorded: make record first, move it away, or restore DISCARD=1"
                )
    return None


def too_little_space(root: Path, files: Mapping[str, str]) -> str | None:
    """Why the files do not fit beside their copies in the cache; None where they do."""
    absent = [md5 for path, md5 in files.items() if not (root / path).is_file()]
    needed = sum(cached(root, md5).stat().st_size for md5 in absent)
    free = shutil.disk_usage(root / "results").free
    return NO_SPACE if needed > free else None


def from_the_future(root: Path) -> list[str]:
    """The files of the commit whose time is still to come: Snakemake takes what is made of them for older."""
    names = git(root, "ls-files", "-z").split("\0")
    return [name for name in names if name and (root / name).lstat().st_mtime > time.time()]


def keep_finished(root: Path) -> None:
    """Keep the restored runs as their jobs would have, so that a value changed and changed back trains nothing."""
    for record in sorted((root / "results/runs").glob("*/run.json")):
        entry = root / "results/finished" / read_json(record)["key"]
        if not entry.exists():
            keep(entry, {name: record.parent / file for name, file in RUN_OUTPUTS.items()})


def agree(root: Path, jobs: Mapping[str, str]) -> str | None:
    """Let Snakemake take the files for its own, but not those whose job is another now; says what is due, or None.

    Which environment Snakemake will use, `.venv` or conda's, is left open: it is none that made the files.
    """
    ran(root, "snakemake", "--touch", "--forceall", "--keep-going", "--nolock", "--cores", "1", check=False)
    for path, noted in job_records(root).items():
        if "endtime" in noted and path in jobs and (root / path).exists():
            changed = {key: value for key, value in noted.items() if key != "noted in"} | {"software_stack_hash": None}
            if jobs[path] != job_hash(noted):
                changed["params"] = ["recorded with others"]
            Path(noted["noted in"]).write_text(json.dumps(changed))
    plan = planned(root)
    return f"{plan.jobs} jobs are due, first: {plan.first}" if plan.first else None


def main() -> int:
    """Restore, and print in one line what was restored or why not; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--discard", action="store_true", help="let go of results that are not recorded")
    given = parser.parse_args()
    try:
        with alone(ROOT):
            print(restore(ROOT, given.discard))
    except UserError as error:
        return finish(WHAT, error)
    except subprocess.CalledProcessError as error:
        return finish(WHAT, UserError(f"git: {error.stderr.strip()}"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
