"""dvc.yaml describes what the rules do, stage by stage: when a rule changes, these tests say what to change in it."""

import re
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
DVC = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))
STAGES = DVC["stages"]
CONFIGS = ["config/config.yaml", "config/models.yaml", "config/datasets.yaml"]
HOME = {"build": "download"}  # rules file → stage, where they are not of one name: both fill results/sources
REPORT_ALONE = {"title"}  # keys that decide nothing before the report, which depends on all of the configuration
Edges = set[tuple[str, str]]


def paths(stage: str, *kinds: str) -> list[str]:
    """What a stage lists under some of deps, outs and metrics, without the flags."""
    entries = chain.from_iterable(STAGES[stage].get(kind, []) for kind in kinds)
    return [next(iter(entry)) if isinstance(entry, dict) else entry for entry in entries]


def outs(stage: str) -> list[str]:
    return paths(stage, "outs", "metrics")


def stage_of_out(path: str) -> list[str]:
    """The stages that have a path, or a folder that it lies in, among their outs."""
    return [stage for stage in STAGES for out in outs(stage) if Path(path).is_relative_to(out)]


def snakemake(*arguments: str) -> str:
    command = [sys.executable, "-m", "snakemake", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def rule_edges() -> Edges:
    """(rule, rule that takes its output) of all that the default target needs."""
    graph = snakemake("--rulegraph", "dot")
    names = dict(re.findall(r'(\d+)\[label = "(\w+)"', graph))
    edges = {(names[a], names[b]) for a, b in re.findall(r"(\d+) -> (\d+)", graph)}
    assert len(edges) > 10, graph
    return edges


@pytest.fixture(scope="module")
def rules_by_stage(rule_edges: Edges) -> dict[str, set[str]]:
    """Stage → its rules: those of a rules file of which the default target needs one; others run on request."""
    needed = set(chain.from_iterable(rule_edges))
    stages: dict[str, set[str]] = {}
    for path in (ROOT / "rules").glob("*.smk"):
        rules = set(re.findall(r"^rule (\w+):", path.read_text(encoding="utf-8"), re.MULTILINE))
        if rules & needed:
            stages.setdefault(HOME.get(path.stem, path.stem), set()).update(rules)
    return stages


def test_the_stages_are_those_of_the_rules(rules_by_stage):
    missing, unknown = sorted(rules_by_stage.keys() - STAGES.keys()), sorted(STAGES.keys() - rules_by_stage.keys())
    assert not missing, f"dvc.yaml: add a stage for the rules of rules/{missing[0]}.smk"
    assert not unknown, (
        f"dvc.yaml: remove the stage '{unknown[0]}': the default target needs no rule of rules/{unknown[0]}.smk"
    )


def test_a_stage_runs_its_last_rules(rules_by_stage, rule_edges):
    for stage, rules in rules_by_stage.items():
        last = {rule for rule in rules if not any((rule, other) in rule_edges for other in rules)}
        assert set(STAGES[stage]["cmd"].split()[1:]) == {"--until", *last}, (
            f"dvc.yaml: stages.{stage}.cmd: write `${{snakemake}} --until {' '.join(sorted(last))}`"
        )


def test_the_order_is_that_of_the_rules(rules_by_stage, rule_edges):
    home = {rule: stage for stage, rules in rules_by_stage.items() for rule in rules}
    ruled = {(home[a], home[b]) for a, b in rule_edges if b != "all" and home[a] != home[b]}
    described = {(first, stage) for stage in STAGES for dep in paths(stage, "deps") for first in stage_of_out(dep)}
    for a, b in sorted(ruled - described):
        pytest.fail(
            f"dvc.yaml: stages.{b}.deps: add an out of '{a}', whose results its rules take: {', '.join(outs(a))}"
        )
    for a, b in sorted(described - ruled):
        pytest.fail(f"dvc.yaml: stages.{b}.deps: remove the outs of '{a}', which its rules do not take")


def test_each_output_of_a_rule_is_an_out_of_its_stage(rules_by_stage):
    home = {rule: stage for stage, rules in rules_by_stage.items() for rule in rules}
    lines = [line.split("\t") for line in snakemake("--summary").splitlines()[1:]]
    assert len(lines) > 10
    for output, _, rule, *_ in lines:
        assert stage_of_out(output) == [home[rule]], (
            f"dvc.yaml: stages.{home[rule]}.outs: {output} must lie in exactly one"
        )


def test_what_rules_write_on_request_among_the_outs_is_left_alone_and_nothing_else(rules_by_stage):
    described = set(chain.from_iterable(rules_by_stage.values()))
    written = set()
    for switches in ([], ["merged=True"], ["publish_dry_run=True"]):
        summary = snakemake("--summary", "merge", "gguf", "export", "publish", "--config", "to=x", *switches)
        rows = [line.split("\t") for line in summary.splitlines()[1:]]
        written |= {output for output, _, rule, *_ in rows if rule not in described}
    assert len({Path(output).name for output in written}) > 5
    inside = {f"{output}/file" if Path(output).suffix == "" else output: output for output in written}
    command = [sys.executable, "-m", "dvc", "check-ignore", "--details", "--all", *inside]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout  # ends with 1 where none is ignored
    lines = re.findall(r"^\.dvcignore:\d+:(\S+)\t(\S+)$", told, re.MULTILINE)
    listed = [line for line in (ROOT / ".dvcignore").read_text(encoding="utf-8").split() if line.startswith("/results")]
    for path in sorted(inside.keys() - {path for _, path in lines}):
        pytest.fail(f".dvcignore: add a line for {inside[path]}, which a rule writes on request")
    assert set(listed) == {pattern for pattern, _ in lines}, ".dvcignore: remove what no rule writes on request"


@pytest.mark.parametrize("stage", STAGES)
def test_no_out_is_deleted_before_a_stage_and_small_tables_are_left_to_git(stage):
    for out in STAGES[stage]["outs"] + STAGES[stage].get("metrics", []):
        path, flags = next(iter(out.items())) if isinstance(out, dict) else (out, {})
        table = Path(path).suffix != ""
        assert flags == ({"persist": True, "cache": False} if table else {"persist": True}), (
            f"dvc.yaml: {path}: write {{persist: true{', cache: false' if table else ''}}}"
        )


def test_a_stage_depends_on_its_code():
    for stage in STAGES:
        files = [
            ROOT / f"rules/{name}.smk" for name in (stage, *(file for file, home in HOME.items() if home == stage))
        ]
        text = "".join(path.read_text(encoding="utf-8") for path in files)
        code = {"rules", "scripts/qlora", *re.findall(r'"\.\./(scripts/\w+\.py)"', text)}
        found = {dep for dep in paths(stage, "deps") if dep.startswith(("rules", "scripts"))}
        assert found == code, (
            f"dvc.yaml: stages.{stage}.deps: add {code - found or 'nothing'}, remove {found - code or 'nothing'}"
        )


@pytest.mark.parametrize("config", CONFIGS)
def test_each_part_of_the_configuration_is_a_param_and_there(config):
    keys = yaml.safe_load((ROOT / config).read_text(encoding="utf-8")).keys()
    params = [next(iter(entry.items())) for stage in STAGES.values() for entry in stage.get("params", [])]
    named = set(chain.from_iterable(names or [] for path, names in params if path == config))
    unseen, absent = sorted(keys - named - REPORT_ALONE), sorted(named - keys)
    assert not unseen, f"dvc.yaml: add the key '{unseen[0]}' to the params of the stages whose rules read it"
    assert not absent, f"{config}: write the key '{absent[0]}', were it empty: DVC stops where a param is missing"


def test_the_report_follows_all_of_the_configuration():
    assert STAGES["report"]["params"] == [{config: None} for config in CONFIGS]
    assert DVC["params"] == CONFIGS
