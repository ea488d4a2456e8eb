"""What `make record` and `make restore` share: the lines of DVC and Snakemake, and what was recorded, by content."""

import hashlib
import json
import os
import subprocess
import sys
from base64 import urlsafe_b64decode
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import yaml
from dvc.schema import COMPILED_LOCKFILE_SCHEMA
from voluptuous import Invalid

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "scripts"))

from left_behind import drop_dead_list  # noqa: E402 (scripts/ is no package)
from qlora.errors import UserError  # noqa: E402
from qlora.files import read_json  # noqa: E402
from qlora.locks import HELD, RESULTS_LOCK, locked  # noqa: E402
from results_lock import dvc_stages  # noqa: E402

CACHE = Path(".dvc/cache/files/md5")
METADATA = Path(".snakemake/metadata")
CUT_OFF = Path(".snakemake/restoring")  # there until `make restore` is through; the Snakefile refuses to run then
NO_SPACE = "no space left on the disk: free some and start again"


class Out(NamedTuple):
    """An output that dvc.lock holds: its MD5, `.dir` behind that of a folder, and whether its bytes are DVC's."""

    md5: str
    cached: bool


class Planned(NamedTuple):
    """What a dry run says: how many jobs, and the first of them with its reason; None where there is none."""

    jobs: int
    first: str | None


def ran(root: Path, tool: str, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run `dvc` or `snakemake` of this environment, both streams into `stdout`. Raises UserError where it fails."""
    done = subprocess.run(
        [sys.executable, "-m", tool, *arguments],
        cwd=root,
        env={**os.environ, "NO_COLOR": "1", "DVC_NO_ANALYTICS": "1", HELD: "1"},
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        close_fds=False,  # so that it has the lock, should this process be killed alone
        check=False,
    )
    if check and done.returncode:
        raise UserError(why_failed(tool, done.stdout))
    return done


def why_failed(tool: str, shown: str) -> str:
    """One line out of what DVC or Snakemake said on failing."""
    if "No space left on device" in shown:
        return NO_SPACE
    lines = [line.strip() for line in shown.splitlines() if line.strip()]
    first = next((place for place, line in enumerate(lines) if line.startswith("ERROR: ")), 0)
    said = lines[first : first + 1] or ["it failed without a word"]
    if said[0].endswith(":"):
        said += lines[first + 1 : first + 2]
    return f"{tool}: {' '.join(said).removeprefix('ERROR: ')}"


def alone(root: Path) -> TextIO:
    """Hold the results of this folder until the file is closed, or raise UserError that names who works on them."""
    lock = locked(root / RESULTS_LOCK)
    if any((root / ".snakemake/locks").glob("*")):
        raise UserError("a snakemake was killed here: see that no job of it still runs, then: snakemake --unlock")
    drop_dead_list(root)
    return lock


def planned(root: Path) -> Planned:
    """What Snakemake would do now; raises UserError where it cannot say."""
    return read_plan(ran(root, "snakemake", "-n").stdout)


def read_plan(shown: str) -> Planned:
    """The number of jobs and the first one in what `snakemake -n` prints; `all` is no job."""
    lines = shown.splitlines()
    if any("Nothing to be done" in line for line in lines):
        return Planned(0, None)
    message = next(place for place, line in enumerate(lines) if line.startswith("Job ") and ": " in line)
    total = next(int(line.split()[1]) for line in lines if line.startswith("total "))
    name = lines[message].split(": ", 1)[1]
    reason = lines[message + 1].removeprefix("Reason: ").strip()
    return Planned(max(total - 1, 1), f"{name} ({reason})")


def md5_of(path: Path) -> str:
    """MD5 of a file's bytes, as DVC names contents."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def recorded_outs(root: Path) -> dict[str, Out]:
    """Path → output, of all that dvc.lock holds; none where there is no dvc.lock. Raises UserError for half a file."""
    if not (root / "dvc.lock").exists():
        return {}
    uncached = {
        path
        for stage in dvc_stages(root).values()
        for output in [*stage.get("outs", []), *stage.get("metrics", [])]
        for path, flags in (output.items() if isinstance(output, Mapping) else [])
        if not flags.get("cache", True)
    }
    try:
        lock = COMPILED_LOCKFILE_SCHEMA(yaml.safe_load((root / "dvc.lock").read_text(encoding="utf-8")))
        return {
            out["path"]: Out(out["md5"], out["path"] not in uncached)
            for stage in lock.get("stages", {}).values()
            for out in stage.get("outs", [])
        }
    except (yaml.YAMLError, Invalid, KeyError):
        raise UserError("dvc.lock is not whole: take it back with git, or make record writes it anew") from None


def cached(root: Path, md5: str) -> Path:
    """Where DVC's cache keeps a content."""
    return root / CACHE / md5[:2] / md5[2:]


def damaged(root: Path, md5: str) -> bool:
    """Whether the cache's file is there with other bytes than its name says."""
    path = cached(root, md5)
    return path.exists() and md5_of(path) != md5.removesuffix(".dir")


def files_of_outs(root: Path, outs: Mapping[str, Out]) -> dict[str, str]:
    """Path → MD5 of each file of the outputs, those of folders from the lists in DVC's cache.

    Of a folder whose list is missing or damaged, the entry is the folder itself.
    """
    files: dict[str, str] = {}
    for path, out in outs.items():
        if out.md5.endswith(".dir") and cached(root, out.md5).exists() and not damaged(root, out.md5):
            files |= {f"{path}/{entry['relpath']}": entry["md5"] for entry in read_json(cached(root, out.md5))}
        else:
            files[path] = out.md5
    return files


def not_in_cache(root: Path, outs: Mapping[str, Out]) -> dict[str, str]:
    """File → `missing` or `damaged`, of those whose recorded bytes DVC's cache has not."""
    lists = {path: out.md5 for path, out in outs.items()}
    absent = {}
    for path, md5 in [*lists.items(), *files_of_outs(root, outs).items()]:
        if damaged(root, md5):
            absent[path] = "damaged"
        elif not cached(root, md5).exists():
            absent.setdefault(path, "missing")
    return absent


def drop_damaged(root: Path, outs: Mapping[str, Out]) -> None:
    """Remove the outputs' damaged contents from DVC's cache: DVC gets what is not there, and trusts what is."""
    for md5 in {*files_of_outs(root, outs).values(), *(out.md5 for out in outs.values())}:
        if damaged(root, md5):
            cached(root, md5).unlink()


def job_records(root: Path) -> dict[str, dict[str, Any]]:
    """Output → what Snakemake noted about the job that made it, of all that it made in this folder.

    Nothing but where it stands, of what a kill left half-written: to Snakemake it is no note.
    """
    folder = root / METADATA
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {_output_of(file.relative_to(folder)): {**_whole_note(file), "noted in": str(file)} for file in files}


def _whole_note(file: Path) -> dict[str, Any]:
    """What a note of Snakemake's says; nothing where half of it is there."""
    try:
        return read_json(file)
    except json.JSONDecodeError:
        return {}


def _output_of(name: Path) -> str:
    """The path that Snakemake's name for a record stands for: base64, cut into folders that begin with @."""
    return urlsafe_b64decode("".join(part.removeprefix("@") for part in name.parts)).decode()


def job_hash(record: Mapping[str, Any]) -> str:
    """A hash (16 hex digits) over what decides whether a job is due: its params, inputs, and the bytes of ours."""
    ours = {path: sums for path, sums in (record["input_checksums"] or {}).items() if not path.startswith("results/")}
    text = json.dumps([record["params"], record["input"], ours], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def remote_name(root: Path) -> str | None:
    """The remote that DVC uses, or None where none is configured."""
    done = ran(root, "dvc", "config", "core.remote", check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def finish(what: str, error: UserError) -> int:
    """Print why `what` stopped, in one line; returns the exit status."""
    print(f"{what}: error: {error}", file=sys.stderr)
    return 1
