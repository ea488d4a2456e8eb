"""Recompute the published results of HEAD in a fresh clone, and compare with results/lock.json: `make reproduce`."""

import argparse
import csv
import hashlib
import io
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from results_lock import (  # makes the modules below importable
    LOCK,
    ROOT,
    Files,
    code,
    counted,
    deciding_config,
    declared_outputs,
    differences,
    environment,
    first_difference,
    git,
    hashes_of,
    stage_outputs,
)

# isort: split
from claims import checked_claims, claim_lines
from qlora.errors import UserError
from qlora.files import read_json, replacing
from qlora.findings import flattened
from qlora.locks import locked
from qlora.results import Record, read_table

COMPARISON, SPREAD = "results/comparison.csv", "results/seeds.csv"
MACHINE = ("device", "threads", "cpu", "gpu", "cuda")  # of a run's hardware: what decides its bytes
TEXT_ALONE = ("results/sources/datasets/", "results/datasets/", "results/mixtures/")  # no rounding: equal everywhere


@dataclass(frozen=True)
class Recomputed:
    """What came out of the recomputation, to be judged."""

    files: Files
    hardware: dict[str, Any]  # by run
    comparison: list[Record]
    decides: dict[str, Any]  # code and environment, as in the lock


def judged(
    lock: Mapping[str, Any], found: Recomputed, published: Sequence[Record], spread: Sequence[Record]
) -> tuple[bool, list[str]]:
    """Whether the published results were reproduced, and the lines that say so, the verdict last.

    Equal bytes are. Other bytes are not where the machine is the recorded one, nor in files that no rounding touches
    (data); on another machine the claims decide, within the tolerance of `claims.tolerance`.
    """
    lines = [*stage_lines(lock["files"], found.files)]
    first = first_difference(lock["files"], found.files)
    if first is None:
        return True, [*lines, f"reproduced: {counted(found.files)} are byte-identical to {LOCK}"]
    recorded = {part: lock[part] for part in found.decides}
    lines += [f"since the recording {text}" for text in changes(recorded, found.decides)]
    data = first_difference(*(exact(lock, files) for files in (lock["files"], found.files)))
    if data:
        return False, [*lines, f"not reproduced: data must be equal on every machine; {data}"]
    if machine(lock["hardware"], lock["environment"]) == machine(found.hardware, found.decides["environment"]):
        return False, [*lines, f"not reproduced: the same kind of machine must give the same bytes; {first}"]
    claims = checked_claims(published, found.comparison, spread)
    wrong = [claim for claim in claims if not claim.agrees]
    lines += ["", *claim_lines(claims), ""]
    told = f"{len(claims) - len(wrong)} of {len(claims)} claims agree; bytes differ, as on another machine: {first}"
    if wrong or not claims:
        where = f" (run {wrong[0].run}, dataset {wrong[0].dataset}, slice {wrong[0].part} does not)" if wrong else ""
        return False, [*lines, f"not reproduced: {told}{where}"]
    return True, [*lines, f"reproduced: {told}"]


def stage_lines(wanted: Files, found: Files) -> Iterator[str]:
    """A line a stage that has files: how many, and the first that is not as wanted."""
    for stage, texts in differences(wanted, found).items():
        count = len(wanted.get(stage, {}).keys() | found.get(stage, {}).keys())
        if count:
            state = f"{len(texts)} not as recorded: {texts[0]}" if texts else "identical"
            yield f"{stage:<12} {count:>4} files  {state}"


def exact(lock: Mapping[str, Any], files: Files) -> Files:
    """Those of the files that are equal on every machine: data, and models that were downloaded, not built."""
    models = [name for name, source in lock["sources"].items() if "build" not in source["source"]]
    folders = (*TEXT_ALONE, *(f"results/sources/{name}/" for name in models))
    return {
        stage: {name: hashed for name, hashed in names.items() if name.startswith(folders)}
        for stage, names in files.items()
    }


def machine(hardware: Mapping[str, Mapping[str, Any]], environment: Mapping[str, Any]) -> tuple[Any, ...]:
    """What of a machine and its packages decides bytes, the hardware by run: not how many cores were free."""
    facts = {run: [item.get(key) for key in MACHINE] for run, item in hardware.items()}
    return facts, environment["python"], environment["packages"]


def changes(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two nested mappings, a line a leaf."""
    before, after = (dict(flattened(value)) for value in (recorded, now))
    return [
        f"{'.'.join(path)} changed from {before.get(path, 'nothing')} to {after.get(path, 'nothing')}"
        for path in dict.fromkeys([*before, *after])
        if before.get(path) != after.get(path)
    ]


def committed(root: Path, name: str | Path) -> bytes | None:
    """A file as HEAD has it; None where it has none."""
    done = subprocess.run(["git", "show", f"HEAD:{name}"], cwd=root, capture_output=True)
    return done.stdout if done.returncode == 0 else None


def committed_table(root: Path, name: str) -> list[Record]:
    """A CSV file as HEAD has it; no rows where it has none."""
    return list(csv.DictReader(io.StringIO((committed(root, name) or b"").decode())))


def check_committed(root: Path, files: Files) -> None:
    """Raise UserError where a table that HEAD holds is not the one that its lock names."""
    tracked = git(root, "ls-tree", "-r", "--name-only", "HEAD", "results").splitlines()
    hashes = {name: hashed for names in files.values() for name, hashed in names.items()}
    for name in tracked:
        if name in hashes and hashlib.sha256(committed(root, name) or b"").hexdigest() != hashes[name]:
            raise UserError(f"{name} of HEAD is not the one that {LOCK} names; `make record` records both together")


def clone(root: Path, folder: Path) -> None:
    """A clone of HEAD without its results, whole or not at all; one that is there already is used on if it is clean."""
    commit = git(root, "rev-parse", "HEAD")
    if not folder.exists() or not any(folder.iterdir()):
        with replacing(folder) as temporary:
            git(root, "clone", "--quiet", "--no-checkout", str(root), str(temporary))
            git(temporary, "sparse-checkout", "set", "--no-cone", "/*", "!/results/")
            git(temporary, "checkout", "--quiet", commit)
        return
    without_results = (folder / ".git/info/sparse-checkout").is_file()  # unlike a clone that may hold published ones
    is_clone = without_results and git(folder, "rev-parse", "HEAD") == commit
    if not is_clone or git(folder, "status", "--porcelain", "--untracked-files=no", "--", ":!results"):
        raise UserError(f"{folder} is not an unchanged clone of {commit[:10]}; remove it, or name another REPRODUCE_IN")


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Have a folder, which may not be there yet, to oneself and to the processes that are started meanwhile."""
    path = folder.with_name(f"{folder.name}.lock")
    with locked(path):
        try:
            yield
        finally:
            path.unlink()


def compute(folder: Path, device: str | None, cores: str) -> None:
    """Run the default in the folder; Snakemake has the lock of `held` too, should this process be killed alone."""
    snakemake = [sys.executable, "-m", "snakemake"]
    if any((folder / ".snakemake/locks").glob("*")):  # of a killed one: a living one has the lock of `held`
        subprocess.run([*snakemake, "--unlock"], cwd=folder, check=True, capture_output=True)
    command = [*snakemake, "--cores", cores, "--quiet", "host", "reason"]
    command += ["--config", f"device={device}"] if device else []
    before = signal.signal(signal.SIGINT, lambda *_: None)  # Ctrl-C reaches Snakemake too, which stops in order
    try:
        stopped = subprocess.run(command, cwd=folder, close_fds=False).returncode != 0
    finally:
        signal.signal(signal.SIGINT, before)
    if stopped:
        raise UserError(f"the workflow stopped in {folder}; what it says above is why; again: it goes on from there")


def recomputed(folder: Path) -> Recomputed:
    """What the workflow left in the folder."""
    declared = declared_outputs(folder)
    records = [folder / path for path in declared if Path(path).name == "run.json"]
    return Recomputed(
        files=hashes_of(folder, stage_outputs(folder), declared),
        hardware={path.parent.name: read_json(path)["hardware"] for path in records},
        comparison=read_table(folder / COMPARISON),
        decides={"code": code(folder), "environment": environment(folder)},
    )


def reproduce(root: Path, folder: Path | None, cores: str) -> bool:
    """Recompute HEAD's results, say how they compare, and whether they were reproduced."""
    text = committed(root, LOCK)
    if text is None:
        raise UserError(f"HEAD has no {LOCK}; `make record` writes it, then commit it")
    lock = json.loads(text)
    check_committed(root, lock["files"])
    commit = git(root, "rev-parse", "HEAD")[:10]
    place = folder or root.with_name(f"{root.name}-reproduced-{commit}")
    with held(place):
        clone(root, place)
        changed = changes({"config": lock["config"]}, {"config": deciding_config(place)})
        if changed:
            raise UserError(f"{LOCK} was recorded with another configuration: {changed[0]}; `make record` anew")
        device = next((facts["device"] for facts in lock["hardware"].values()), None)
        print(f"reproduce: commit {commit}, on {device or 'any device'}, in {place}", flush=True)
        compute(place, device, cores)
        good, lines = judged(lock, recomputed(place), *(committed_table(root, n) for n in (COMPARISON, SPREAD)))
    if good and folder is None:
        shutil.rmtree(place)
    kept = "" if good and folder is None else f"; they lie in {place}"
    print("\n".join([*lines[:-1], lines[-1] + kept]))
    return good


def main() -> int:
    """0 where the results were reproduced, 1 where not, or where it could not be found out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="where to compute; default: beside this one, removed at success")
    parser.add_argument("--cores", default="all")
    given = parser.parse_args()
    try:
        return 0 if reproduce(ROOT, given.folder and given.folder.resolve(), given.cores) else 1
    except (UserError, OSError) as error:
        print(f"reproduce: error: {error}", file=sys.stderr)
    except subprocess.CalledProcessError as error:
        print(f"reproduce: error: {' '.join(error.cmd[:2])}: {error.stderr.strip().splitlines()[-1]}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
