"""Each experiment's overlay: what it asks for, that it is planned without a network, and its own words about itself."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from snakemake.common.configfile import load_configfile
from snakemake.utils import update_config
from workspaces import ROOT, Workspace

from qlora.config import checked_config
from qlora.metrics import score_answer

EXPERIMENTS = sorted((ROOT / "config/experiments").glob("*.yaml"))
SEEDS = ("mistral-text-label", "mistral-law", "llama2-custom", "open-models", "llama2-sql-mix")
# Imported by every Python process of the planning, before anything else.
NO_NETWORK = """
import socket
def refused(*_arguments, **_names):
    raise SystemExit("planning asked for the network")
socket.getaddrinfo = socket.create_connection = socket.socket.connect = refused
"""


def merged_config(name: str) -> dict[str, Any]:
    """The configuration of an experiment as Snakemake merges it, without defaults or commits that were pinned."""
    merged: dict[str, Any] = {}
    for path in ("models", "datasets", "config", f"experiments/{name}"):
        update_config(merged, load_configfile(ROOT / f"config/{path}.yaml"))
    return merged


def whole_config(name: str) -> dict[str, Any]:
    """The configuration that an experiment runs with."""
    return checked_config(merged_config(name))


def settings_of(name: str, recipe: str) -> dict[str, Any]:
    settings: dict[str, Any] = whole_config(name)["recipes"][recipe]
    return settings


def sources_of(config: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    """Kind, name and entry of the models and datasets that the runs and suites of a configuration use."""
    mixtures = [config["mixtures"][run["mixture"]]["datasets"] for run in config["runs"]]
    datasets = [*mixtures, *(suite["datasets"] for suite in config["suites"].values())]
    names = {
        "models": dict.fromkeys(run["model"] for run in config["runs"]),
        "datasets": dict.fromkeys(name for some in datasets for name in some),
    }
    return [(kind, name, config[kind][name]) for kind in names for name in names[kind]]


def head_of(name: str) -> str:
    """The comment that an experiment's overlay opens with."""
    text = (ROOT / f"config/experiments/{name}.yaml").read_text(encoding="utf-8")
    return re.sub(r"^# ?", "", text.partition("\nname:")[0], flags=re.M)


def is_pinned(entry: dict[str, Any]) -> bool:
    """Whether a hub source has a commit of its own."""
    return bool(re.fullmatch("[0-9a-f]{40}", entry["source"].get("revision", "")))


def holds(settings: dict[str, Any], **wanted: Any) -> None:
    """Fail where a setting is another."""
    assert {key: settings[key] for key in wanted} == wanted


def test_the_five_experiments_are_there() -> None:
    assert set(SEEDS) <= {path.stem for path in EXPERIMENTS}


@pytest.mark.parametrize("overlay", EXPERIMENTS, ids=lambda path: path.stem)
def test_plans_its_own_runs_alone_without_a_network(
    workspace: Workspace, overlay: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace.write("offline/sitecustomize.py", NO_NETWORK)
    monkeypatch.setenv("PYTHONPATH", str(workspace.folder / "offline"))
    runs = {run["name"] for run in yaml.safe_load(overlay.read_text(encoding="utf-8"))["runs"]}
    shown = workspace.snakemake("-n", configs=(f"config/experiments/{overlay.name}",)).stdout
    assert set(re.findall(r"Job \d+: train (\S+)", shown)) == runs
    assert f"results/experiments/{overlay.stem}/report/index.html" in shown


@pytest.mark.parametrize("name", SEEDS)
def test_says_what_the_original_did(name: str) -> None:
    head = head_of(name)
    assert re.search(r"The originals? ", head)
    assert " Here " in head.replace("\n", " ")
    assert f"`{name}`" in (ROOT / "docs/experiments.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", SEEDS)
def test_says_which_commands_a_fresh_clone_needs_and_they_are_three_at_most(name: str) -> None:
    indented = re.findall(r"^  (.*?)(?:  # .*)?$", head_of(name), re.M)
    commands = [shlex.split(command) for line in indented for command in re.split(r"&&|\|\||;|\|", line)]
    assert len(commands) <= 3
    first, login, last = commands
    sources = sources_of(merged_config(name))
    unpinned = [source for _, source, entry in sources if "hub" in entry["source"] and not is_pinned(entry)]
    assert first == (["make", "pin", f"NAME={' '.join(unpinned)}"] if unpinned else ["make", "venv"])
    assert login == [".venv/bin/hf", "auth", "login"]
    about = next(line for line in head_of(name).splitlines() if "hf auth login" in line)
    models = {entry["source"]["hub"]: entry["licence"] for kind, _, entry in sources if kind == "models"}
    named = {hub for hub in models if hub in about}
    assert named >= {hub for hub in models if "gated" in models[hub]}
    assert named
    assert last == [".venv/bin/snakemake", "--cores", "all", "--configfile", f"config/experiments/{name}.yaml"]


def test_the_first_command_makes_the_environment_that_the_others_need() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(r"^pin: venv ", makefile, re.M)
    assert re.search(r"^venv:$", makefile, re.M)


def test_mistral_text_label_as_asked_for() -> None:
    holds(settings_of("mistral-text-label", "text-label"), optimizer="adamw_8bit", learning_rate=1e-5)


def test_mistral_law_as_asked_for() -> None:
    same = {"learning_rate": 2.5e-5, "batch_size": 2, "accumulation": 4}
    holds(settings_of("mistral-law", "law"), **same, epochs=3, max_steps=None)
    every_1000 = dict.fromkeys(("log_steps", "eval_steps", "save_steps"), 1000)
    holds(settings_of("mistral-law", "law-original"), **same, **every_1000, max_steps=70_000)
    mixtures = whole_config("mistral-law")["mixtures"]
    assert [mixtures[name]["max_length"] for name in ("titles", "topics")] == [512, 512]


def test_llama2_custom_as_asked_for() -> None:
    holds(settings_of("llama2-custom", "small-card"), batch_size=4, accumulation=4, checkpointing=True)
    assert settings_of("llama2-custom", "small-card")["quantization"]["compute_dtype"] == "auto"


def test_open_models_as_asked_for() -> None:
    config = whole_config("open-models")
    models = {config["models"][run["model"]]["source"]["hub"] for run in config["runs"]}
    assert {"tiiuae/falcon-7b", "microsoft/phi-2", "HuggingFaceH4/zephyr-7b-beta", "google/gemma-7b"} <= models
    assert len({run["mixture"] for run in config["runs"]}) == 1
    holds(settings_of("open-models", "open"), batching="packed")
    assert config["datasets"]["gsm8k"]["task"] == "number"


def test_llama2_sql_mix_as_asked_for() -> None:
    settings = settings_of("llama2-sql-mix", "sql-mix")
    seven = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    holds(settings["lora"], r=8, alpha=64, dropout=0.05, target_modules=seven)
    holds(settings["quantization"], type="nf4", double=True, compute_dtype="bfloat16")
    holds(settings, optimizer="paged_adamw_8bit", learning_rate=1e-4, batch_size=2, accumulation=2, max_steps=None)
    assert settings_of("llama2-sql-mix", "sql-smoke") == {**settings, "max_steps": 20}
    config = whole_config("llama2-sql-mix")
    for name, parts in {
        "synthetic-text-to-sql": ["{sql_context}", "{sql_prompt}"],
        "bird-sql-with-reasoning": ["{schema}", "{evidence}", "{question}"],
    }.items():
        assert re.findall(r"\{\w+\}", config["datasets"][name]["prompt"]) == parts


@pytest.mark.parametrize(
    ("answer", "right"),
    [("2200", True), ("2,200", True), ("$2,200.00", True), ("#### 2200", True), ("200", False), ("22000", False)],
)
def test_gsm8k_is_scored_by_the_exact_number(answer: str, right: bool) -> None:
    task = whole_config("open-models")["datasets"]["gsm8k"]["task"]
    for reference in ("11 * 200 = <<11*200=2200>>2200\n#### 2200", "#### 2,200"):
        assert score_answer(task, reference, f"It costs {answer}", None, "") == {"number_match": float(right)}


@pytest.mark.parametrize("name", SEEDS)
def test_licences_are_stated_for_all_that_is_used(name: str) -> None:
    config = whole_config(name)
    datasets = [dataset for run in config["runs"] for dataset in config["mixtures"][run["mixture"]]["datasets"]]
    for entry in [*(config["models"][run["model"]] for run in config["runs"]), *map(config["datasets"].get, datasets)]:
        own_file = "hub" not in entry["source"] and name == "llama2-custom"
        assert own_file or entry["licence"] != "not stated"


def test_the_slurm_profile_plans_the_default(workspace: Workspace) -> None:
    shown = workspace.snakemake("-n", "--profile", "profiles/slurm", configs=()).stdout
    assert "train llama" in shown
