"""What the results are made of, and what they are, by hash: results/lock.json joins data, models and environment.

A file counts by its SHA-256. What differs from one making to the next is left out: seconds, memory, the machine's name
and the commit in run.json, and the report, which shows them. docs/reproduce.md describes each part.
"""

import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from snakemake.utils import update_config

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "scripts"))

from qlora.code_hash import code_hash  # noqa: E402 (scripts/ is no package)
from qlora.config import checked_config  # noqa: E402
from qlora.errors import UserError  # noqa: E402
from qlora.files import files_below, read_json, sha256_of, sha256_of_file  # noqa: E402
from qlora.locks import HELD  # noqa: E402

LOCK = Path("results/lock.json")
CONFIGS = ("config/models.yaml", "config/datasets.yaml", "config/config.yaml")  # each laid over the one before
OUTWARD = ("publish_to", "publish_private", "publish_dry_run", "to", "merged")  # of `publish` and `export`
DECIDES_NOTHING = ("title", "finished_runs", *OUTWARD)  # of the config: none changes a file that the lock holds
# In run.json, from one making to the next.
DIFFERS = {"seconds", "tokens per second", "peak memory in bytes", "hardware", "commit", "resumed from"}
LEFT_OUT = "results/report"
Files = dict[str, dict[str, str]]  # stage → file → SHA-256


def dvc_stages(root: Path) -> dict[str, Any]:
    """The stages of dvc.yaml, in the order in which they run."""
    stages: dict[str, Any] = yaml.safe_load((root / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    return stages


def stage_outputs(root: Path) -> dict[str, list[str]]:
    """Stage → the files and folders that dvc.yaml names as its outputs, in the order of the stages."""
    return {
        name: [
            path
            for output in [*stage.get("outs", []), *stage.get("metrics", [])]
            for path in (output if isinstance(output, Mapping) else [output])
        ]
        for name, stage in dvc_stages(root).items()
    }


def declared_outputs(root: Path) -> list[str]:
    """The files and folders that the default's jobs make: not what an experiment or an earlier config left beside.

    Raises UserError where Snakemake cannot plan the jobs.
    """
    command = [sys.executable, "-m", "snakemake", "--summary"]
    done = subprocess.run(command, cwd=root, env={**os.environ, HELD: "1"}, text=True, capture_output=True)
    if done.returncode:
        raise UserError("the default cannot be planned; `.venv/bin/snakemake -n` says why")
    return [line.split("\t")[0] for line in done.stdout.splitlines()[1:]]


def content_hash(path: Path) -> str:
    """SHA-256 of a file; of run.json, of what does not differ between two makings of the same run."""
    if path.name != "run.json":
        return sha256_of_file(path)
    return _hash({key: value for key, value in read_json(path).items() if key not in DIFFERS})


def hashes_of(root: Path, stages: Mapping[str, Sequence[str]], declared: Iterable[str]) -> Files:
    """Stage → file → hash, of the `declared` outputs that are there, each in the stage that has it as its output."""
    found: Files = {stage: {} for stage in stages}
    for path in map(Path, declared):
        stage = next(name for name, outs in stages.items() if any(path.is_relative_to(out) for out in outs))
        if not path.is_relative_to(LEFT_OUT):
            for file in files_below(root / path):
                found[stage][file.relative_to(root).as_posix()] = content_hash(file)
    return found


def differences(wanted: Files, found: Files) -> dict[str, list[str]]:
    """Stage → what is missing, more than wanted, or another, a file each; in the order of the stages of `found`."""
    told: dict[str, list[str]] = {}
    for stage in [*found, *(stage for stage in wanted if stage not in found)]:
        there, here = wanted.get(stage, {}), found.get(stage, {})
        told[stage] = [f"{name} is missing" for name in sorted(there.keys() - here.keys())]
        told[stage] += [f"{name} is not in the lock" for name in sorted(here.keys() - there.keys())]
        told[stage] += [f"{name} differs" for name in sorted(there.keys() & here.keys()) if there[name] != here[name]]
    return told


def first_difference(wanted: Files, found: Files) -> str | None:
    """The first of the differences, with its stage; None where there is none."""
    told = differences(wanted, found)
    return next((f"stage {stage}: {texts[0]}" for stage, texts in told.items() if texts), None)


def counted(files: Files) -> str:
    """How many files of how many stages, in words."""
    return f"{sum(map(len, files.values()))} files of {sum(map(bool, files.values()))} stages"


def read_lock(root: Path) -> dict[str, Any]:
    """The lock that was recorded below `root`; empty where none was. Raises UserError where it is not JSON."""
    try:
        return read_json(root / LOCK) if (root / LOCK).exists() else {}
    except json.JSONDecodeError as error:
        raise UserError(f"{LOCK}, line {error.lineno}: not JSON; take the file back with git") from None


def made_lock(root: Path) -> dict[str, Any]:
    """The lock of the results below `root` as they are now; equal results and repositories give equal locks."""
    declared = declared_outputs(root)
    decides = {
        "config": deciding_config(root),
        "code": code(root),
        "environment": environment(root),
        "sources": {
            Path(path).relative_to("results/sources").as_posix(): read_json(root / path / "source.json")
            for path in declared
            if Path(path).is_relative_to("results/sources")
        },
    }
    runs = [root / path for path in declared if Path(path).name == "run.json"]
    return {
        **decides,
        "decided by": _hash(decides),
        "hardware": {path.parent.name: read_json(path)["hardware"] for path in runs},
        "commit": git(root, "rev-parse", "HEAD"),
        "files": hashes_of(root, stage_outputs(root), declared),
    }


def deciding_config(root: Path) -> dict[str, Any]:
    """The default's configuration, defaults filled in, without the entries that no run and no suite needs."""
    merged: dict[str, Any] = {}
    for name in CONFIGS:
        update_config(merged, yaml.safe_load((root / name).read_text(encoding="utf-8")))
    full = {key: value for key, value in checked_config(merged).items() if key not in DECIDES_NOTHING}
    for kind in ("models", "mixtures", "recipes"):
        full[kind] = {run[kind[:-1]]: full[kind][run[kind[:-1]]] for run in full["runs"]}
    users = [*full["mixtures"].values(), *full["suites"].values()]
    full["datasets"] = {name: full["datasets"][name] for user in users for name in user["datasets"]}
    forms = [model["format"] for model in full["models"].values() if model["format"]]
    full["formats"] = {name: full["formats"][name] for name in forms}
    return full


def code(root: Path) -> dict[str, str]:
    """The hash of each stage's script with the modules that it imports, and of the rules as they are written."""
    deps = [dep for stage in dvc_stages(root).values() for dep in stage["deps"]]
    scripts = sorted({dep for dep in deps if dep.startswith("scripts/") and dep.endswith(".py")})
    return {**{name: code_hash(root / name) for name in scripts}, "rules": sha256_of(root / "rules")}


def environment(root: Path) -> dict[str, Any]:
    """Python, the whole lock by its hash, and the version of each package that a stage's code imports or loads.

    What those packages need in turn is decided by requirements.lock, and not named again.
    """
    table = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["environments"]
    needed = [table[name] for name in [*dvc_stages(root), "build"] if name in table]
    names = sorted({name for entry in needed for name in [*entry["imports"], *entry.get("runtime", [])]})
    return {
        "python": sys.version.split()[0],
        "requirements.lock": sha256_of_file(root / "requirements.lock"),
        "packages": {name: importlib.metadata.version(name) for name in names},
    }


def git(root: Path, *arguments: str) -> str:
    """What git prints, without the line end. Raises CalledProcessError where it fails."""
    return subprocess.run(["git", *arguments], cwd=root, check=True, text=True, capture_output=True).stdout.strip()


def _hash(value: Any) -> str:
    """SHA-256 of a value that JSON can hold, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
