"""What the results are made of, and what they are, by hash: results/lock.json joins data, models and environment.

A file counts by its SHA-256. What differs from one making to the next is left out: seconds, memory and the machine's
name in run.json, and the report, which shows them.
"""

import hashlib
import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "scripts"))

from qlora.code_hash import code_hash  # noqa: E402 (scripts/ is no package)
from qlora.files import files_below, read_json, sha256_of_file  # noqa: E402

LOCK = Path("results/lock.json")
CONFIGS = ("config/config.yaml", "config/models.yaml", "config/datasets.yaml")
DIFFERS = (
    "seconds",
    "tokens per second",
    "peak memory in bytes",
    "hardware",
    "commit",
    "resumed from",
)  # from run to run
LEFT_OUT = ("results/report",)
Files = dict[str, dict[str, str]]  # stage → file → SHA-256


def stage_outputs(root: Path) -> dict[str, list[str]]:
    """Stage → the files and folders that dvc.yaml names as its outputs, in the order of the stages."""
    stages = yaml.safe_load((root / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    return {
        name: [
            path
            for output in [*stage.get("outs", []), *stage.get("metrics", [])]
            for path in (output if isinstance(output, Mapping) else [output])
        ]
        for name, stage in stages.items()
    }


def content_hash(path: Path) -> str:
    """SHA-256 of a file; of run.json, of what does not differ between two makings of the same run."""
    if path.name != "run.json":
        return sha256_of_file(path)
    kept = {key: value for key, value in read_json(path).items() if key not in DIFFERS}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def output_hashes(root: Path) -> Files:
    """The hash of every output file below `root`, stage by stage; made on request (merged, published) left out."""
    found: Files = {}
    for stage, paths in stage_outputs(root).items():
        files = [file for path in paths if path not in LEFT_OUT for file in files_below(root / path)]
        found[stage] = {
            file.relative_to(root).as_posix(): content_hash(file)
            for file in files
            if "merged" not in file.relative_to(root).parts and file.name != "published.json"
        }
    return found


def first_difference(wanted: Files, found: Files) -> str | None:
    """The first file, in the order of the stages, that is missing, more than wanted, or another; None for none."""
    for stage, files in wanted.items():
        here = found.get(stage, {})
        for name in sorted(files.keys() | here.keys()):
            if name not in here:
                return f"stage {stage}: {name} is missing"
            if name not in files:
                return f"stage {stage}: {name} is not in the lock"
            if files[name] != here[name]:
                return f"stage {stage}: {name} differs"
    return None


def counted(files: Files) -> str:
    """How many files of how many stages, in words."""
    return f"{sum(map(len, files.values()))} files of {sum(map(bool, files.values()))} stages"


def made_lock(root: Path) -> dict[str, Any]:
    """The lock of the results below `root` as they are now: see `docs/reproduce.md` for each part."""
    decides = {
        "config": {name: yaml.safe_load((root / name).read_text(encoding="utf-8")) for name in CONFIGS},
        "code": {path.name: code_hash(path) for path in sorted((root / "scripts").glob("*.py"))},
        "environment": {
            "python": sys.version.split()[0],
            "requirements.lock": sha256_of_file(root / "requirements.lock"),
            "packages": installed(),
        },
        "sources": {
            path.parent.relative_to(root / "results/sources").as_posix(): read_json(path)
            for path in sorted((root / "results/sources").glob("*/*/source.json"))
        },
    }
    runs = {path.parent.name: read_json(path) for path in sorted((root / "results/runs").glob("*/run.json"))}
    text = json.dumps(decides, sort_keys=True)
    return {
        **decides,
        "decided by": hashlib.sha256(text.encode()).hexdigest(),
        "hardware": {name: run["hardware"] for name, run in runs.items()},
        "commit": git(root, "rev-parse", "HEAD"),
        "files": output_hashes(root),
    }


def installed() -> dict[str, str]:
    """Version of each installed package."""
    return dict(sorted((item.metadata["Name"].lower(), item.version) for item in importlib.metadata.distributions()))


def git(root: Path, *arguments: str) -> str:
    """What git prints, without the line end. Raises CalledProcessError where it fails."""
    return subprocess.run(["git", *arguments], cwd=root, check=True, text=True, capture_output=True).stdout.strip()
