"""What Snakemake reads from the profiles."""

import argparse
from pathlib import Path

import pytest
from snakemake.cli import parse_args

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def parsed(monkeypatch):
    """Parse a command line as Snakemake does in the repository."""
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("SNAKEMAKE_PROFILE", raising=False)

    def parse(*arguments: str) -> argparse.Namespace:
        return parse_args([*arguments, "--snakefile", "Snakefile"])[1]

    return parse


def test_the_workstation_profile_loads_by_itself(parsed):
    args = parsed("--cores", "2")
    assert {trigger.name.lower() for trigger in args.rerun_triggers} == {"input", "mtime", "params", "software_env"}
    assert args.resources["gpu"].value == 1
    assert not args.show_failed_logs
    assert not args.printshellcmds
    assert args.executor is None


def test_the_command_line_overrides_the_workstation_profile(parsed):
    assert parsed("--cores", "2", "--resources", "gpu=2").resources["gpu"].value == 2


def test_the_cluster_profile_keeps_the_triggers_and_lifts_the_limit_on_gpu_jobs(parsed):
    args = parsed("--profile", "profiles/slurm")
    assert args.executor == "slurm"
    assert "code" not in {trigger.name.lower() for trigger in args.rerun_triggers}
    assert args.set_resource_scopes == {"gpu": "local"}
    assert {"mem_mb", "runtime"} <= set(args.default_resources.keys())
