"""A configuration is checked and completed before anything runs; what is wrong with it is said in one line."""

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from snakemake.utils import update_config

from qlora.config import check_pinned, checked_config, laid_over, results_folder
from qlora.errors import UserError
from qlora.files import sha256_of

ROOT = Path(__file__).parents[2]
OVERLAYS = sorted((ROOT / "config" / "experiments").glob("*.yaml"))
COMMIT = "0123456789abcdef0123456789abcdef01234567"
SMALL: dict[str, Any] = {
    "formats": {"plain": {"user": "{content}\nAnswer:", "assistant": " {content}"}},
    "models": {
        "tiny": {"source": {"build": {"architecture": "llama"}}, "format": "plain"},
        "big": {"source": {"hub": "owner/big", "revision": COMMIT}},
    },
    "datasets": {"notes": {"source": {"path": "notes.jsonl"}, "prompt": "{text}", "completion": "{label}"}},
    "mixtures": {"all": {"datasets": {"notes": {}}}},
    "recipes": {"short": {"max_steps": 5, "lora": {"r": 4}}},
    "runs": [{"name": "one", "model": "tiny", "mixture": "all", "recipe": "short"}],
    "suites": {"held-out": {"datasets": ["notes"]}},
}


def with_change(path: str, value: Any) -> dict[str, Any]:
    """The small configuration with one value put in at a dotted path."""
    config = copy.deepcopy(SMALL)
    *parents, last = path.split(".")
    place: Any = config
    for key in parents:
        place = place[int(key)] if isinstance(place, list) else place.setdefault(key, {})
    place[last] = value
    return config


def message_of(config: Any) -> str:
    with pytest.raises(UserError) as caught:
        checked_config(config)
    message = str(caught.value)
    assert "\n" not in message
    return message


GOLDEN = {
    "unknown key, near": ("suite", {}, "config: unknown key 'suite'; did you mean 'suites'?"),
    "unknown key, deep": (
        "recipes.short.lora.rank_",
        8,
        "config: recipes.short.lora: unknown key 'rank_'; "
        "known: alpha, bias, dora, dropout, init, plus_ratio, r, rslora, target_modules",
    ),
    "unknown key, number": (
        "mixtures.all.datasets.notes",
        {1: 2},
        "config: mixtures.all.datasets.notes: unknown key '1'; known: cap, weight",
    ),
    "missing key": (
        "runs",
        [{"name": "one", "mixture": "all", "recipe": "short"}],
        "config: runs.0: the key 'model' is missing; add it",
    ),
    "not a choice": ("device", "gpu", "config: device: 'gpu' is not one of auto, cpu, cuda; did you mean 'cpu'?"),
    "a name that no folder has": (
        "name",
        "my data",
        "config: name: 'my data' is not a name of letters, digits, '_', '.' and '-' that begins with a letter or a digit",
    ),
    "a database by another name": (
        "datasets.notes.database",
        {"file": "shop.db3"},
        "config: datasets.notes.database.file: 'shop.db3' is not a file that ends in .db, .sqlite or .sqlite3",
    ),
    "a suite without test rows": (
        "datasets.notes.holdout",
        {"test": 0},
        "config: suites.held-out: dataset 'notes' has no test rows; give it files.test, or a holdout.test above 0,"
        " or take it out of the suite",
    ),
    "a suite without test rows or training rows": (
        "datasets.notes.files",
        {"validation": "notes.jsonl"},
        "config: suites.held-out: dataset 'notes' has no test rows; give it files.test, or a holdout.test above 0,"
        " or take it out of the suite",
    ),
    "baselines without training rows": (
        "datasets.notes.files",
        {"test": "notes.jsonl"},
        "config: suites.held-out: the baselines need training rows of dataset 'notes', which has none;"
        " set baselines: [] for its suite",
    ),
    "wrong type": (
        "recipes.short.batch_size",
        "eight",
        "config: recipes.short.batch_size: 'eight' is of the wrong type; it must be integer",
    ),
    "truth from Snakemake's command line": (
        "merged",
        "true",
        "config: merged: 'true' is of the wrong type; it must be boolean; on Snakemake's command line it is True",
    ),
    "wrong type, one of two": (
        "recipes.short.max_steps",
        "many",
        "config: recipes.short.max_steps: 'many' is of the wrong type; it must be integer or null",
    ),
    "number that YAML reads as text": (
        "recipes.short.learning_rate",
        "5e-3",
        "config: recipes.short.learning_rate: '5e-3' is of the wrong type; it must be number; "
        "in YAML a number with an exponent has a point and a sign, as in 5.0e-3",
    ),
    "text that YAML reads as a number": (
        "datasets.notes.source.sha256",
        0,
        "config: datasets.notes.source.sha256: 0 is of the wrong type; it must be string; put it in quotes",
    ),
    "true is no number": (
        "threads",
        True,
        "config: threads: True is of the wrong type; it must be integer",
    ),
    "nothing below a key": ("suites", None, "config: suites: None is of the wrong type; it must be object"),
    "out of range": ("mixtures.all.max_length", 4, "config: mixtures.all.max_length: 4 is less than the minimum of 8"),
    "run of an unknown model": (
        "runs.0.model",
        "tini",
        "config: run 'one' names the unknown model 'tini'; did you mean 'tiny'?",
    ),
    "run of an unknown recipe": (
        "runs.0.recipe",
        "x",
        "config: run 'one' names the unknown recipe 'x'; known: short",
    ),
    "mixture of an unknown dataset": (
        "mixtures.all.datasets.note",
        {},
        "config: mixture 'all' names the unknown dataset 'note'; did you mean 'notes'?",
    ),
    "suite of an unknown dataset": (
        "suites.held-out.datasets",
        ["x"],
        "config: suite 'held-out' names the unknown dataset 'x'; known: notes",
    ),
    "model of an unknown format": (
        "models.tiny.format",
        "plane",
        "config: model 'tiny' names the unknown format 'plane'; did you mean 'plain'?",
    ),
    "name twice": (
        "runs",
        [*SMALL["runs"], {**SMALL["runs"][0], "seed": 1}],
        "config: runs: the name 'one' stands twice; every run needs a name of its own",
    ),
    "sql without a database": (
        "datasets.notes.task",
        "sql",
        "config: datasets.notes: task sql runs answers, so it needs 'database'; or choose task text",
    ),
    "no source": ("models.tiny.source", {}, "config: models.tiny.source: give exactly one of hub, path, build"),
    "two sources": (
        "datasets.notes.source",
        {"hub": "owner/notes", "path": "notes.jsonl"},
        "config: datasets.notes.source: give exactly one of hub, path",
    ),
    "prompt without completion": (
        "datasets.notes",
        {"source": {"path": "x"}, "prompt": "{text}"},
        "config: datasets.notes: give prompt and completion (and system), or alpaca (and system), or messages, or llama2_text",
    ),
    "two ways": (
        "datasets.notes.messages",
        "turns",
        "config: datasets.notes: give prompt and completion (and system), or alpaca (and system), or messages, or llama2_text",
    ),
    "system with messages": (
        "datasets.notes",
        {"source": {"path": "x"}, "messages": "turns", "system": "Be brief."},
        "config: datasets.notes: give prompt and completion (and system), or alpaca (and system), or messages, or llama2_text",
    ),
    "open brace": (
        "datasets.notes.prompt",
        "{text",
        "config: datasets.notes.prompt: expected '}' before end of string; write a brace that stands for itself twice",
    ),
    "template without a column": (
        "datasets.notes.prompt",
        "What is it?",
        "config: datasets.notes.prompt: names no column, so all rows would have the same; put one in braces",
    ),
    "template with more than a column": (
        "datasets.notes.completion",
        "{label!r}",
        "config: datasets.notes.completion: in braces stands the name of a column alone, as in {question}",
    ),
    "template with a place without a name": (
        "datasets.notes.prompt",
        "{}",
        "config: datasets.notes.prompt: in braces stands the name of a column alone, as in {question}",
    ),
    "labels of another task": (
        "datasets.notes.labels",
        ["a", "b"],
        "config: datasets.notes: 'labels' declares the answers of task label; choose that task, or leave it out",
    ),
    "a label with spaces": (
        "datasets.notes",
        {"source": {"path": "x"}, "prompt": "{a}", "completion": "{b}", "task": "label", "labels": ["a "]},
        "config: datasets.notes.labels: 'a ' has spaces around it or is empty, as no answer is",
    ),
    "a start that changes the base": (
        "recipes.short.lora",
        {"init": "pissa"},
        "config: recipes.short: lora.init pissa changes the base's weights, and 4 bits would round that away; "
        "choose default, gaussian or loftq",
    ),
    "loftq of another type": (
        "recipes.short",
        {"lora": {"init": "loftq"}, "quantization": {"type": "fp4"}},
        "config: recipes.short: lora.init loftq corrects what nf4 loses; set quantization.type to nf4",
    ),
    "fp8 with dropout": (
        "recipes.short",
        {"fp8": True, "lora": {"dropout": 0.1}},
        "config: recipes.short: fp8 stands in for bfloat16 products of nf4 weights, without dropout, DoRA or learned "
        "biases; set these so, or fp8: false",
    ),
    "fp8 with learned biases": (
        "runs.0.overrides",
        {"fp8": True, "lora": {"bias": "all"}},
        "config: run 'one': fp8 stands in for bfloat16 products of nf4 weights, without dropout, DoRA or learned "
        "biases; set these so, or fp8: false",
    ),
    "offload to the processor": (
        "recipes.short.cpu_offload",
        True,
        "config: recipes.short: cpu_offload is not supported: bitsandbytes trains 4-bit layers only where their "
        "weights are; save memory with checkpointing, a smaller batch_size or a shorter max_length",
    ),
    "patience without evaluations": (
        "recipes.short.patience",
        2,
        "config: recipes.short: patience compares evaluations; set eval_steps",
    ),
    "the best of what is not evaluated": (
        "recipes.short",
        {"best_checkpoint": True, "eval_steps": 20, "save_steps": 30},
        "config: recipes.short: best_checkpoint keeps what was evaluated; "
        "make save_steps (30) a multiple of eval_steps (20)",
    ),
    "settings of a run that do not go together": (
        "runs.0.overrides",
        {"best_checkpoint": True},
        "config: run 'one': best_checkpoint compares evaluations; set eval_steps",
    ),
    "unknown key in overrides": (
        "runs.0.overrides",
        {"lora": {"rr": 2}},
        "config: runs: one.overrides.lora: unknown key 'rr'; did you mean 'r'?",
    ),
    "bad value in overrides": (
        "runs.0.overrides",
        {"learning_rate": 0},
        "config: runs: one.overrides.learning_rate: 0 is less than or equal to the minimum of 0",
    ),
}


@pytest.mark.parametrize(("path", "value", "message"), GOLDEN.values(), ids=GOLDEN.keys())
def test_message_of_a_bad_configuration(path, value, message):
    assert message_of(with_change(path, value)) == message


def test_long_value_is_shortened_in_a_message():
    assert len(message_of(with_change("runs", {str(number): "x" * 100 for number in range(100)}))) < 300


def test_outermost_mistake_is_told_first():
    config = with_change("recipes.short.lora.rr", 1)
    del config["suites"]
    assert message_of(config) == "config: the key 'suites' is missing; add it"


def test_small_configuration_is_complete_at_every_level():
    full = checked_config(SMALL)
    assert (full["name"], full["device"], full["threads"]) == ("", "auto", 1)
    assert full["models"]["tiny"]["source"]["build"].items() > {"architecture": "llama", "seed": 0}.items()
    assert full["models"]["big"]["format"] is None
    assert full["formats"]["plain"]["between"] == "\n"
    assert full["datasets"]["notes"]["holdout"] == {"validation": 0.05, "test": 0.1}
    assert full["mixtures"]["all"]["datasets"]["notes"] == {"weight": 1.0, "cap": None}
    assert full["recipes"]["short"]["quantization"] == {"type": "nf4", "double": True, "compute_dtype": "auto"}
    assert full["recipes"]["short"]["lora"]["alpha"] == 32
    assert full["suites"]["held-out"]["bootstrap"] == {"samples": 1000, "seed": 0, "level": 0.95}
    assert full["runs"][0]["seed"] == 0
    assert "messages" not in full["datasets"]["notes"]


def test_completing_twice_changes_nothing_and_the_given_mapping_stays_as_it_was():
    given = copy.deepcopy(SMALL)
    full = checked_config(given)
    assert given == SMALL
    again = checked_config({**full, "runs": SMALL["runs"]})
    assert again == full


def test_overrides_are_laid_over_the_recipe_of_that_run_alone():
    second = {**SMALL["runs"][0], "name": "two", "overrides": {"lora": {"dropout": 0.1}, "batch_size": 2}}
    one, two = checked_config(with_change("runs", [SMALL["runs"][0], second]))["runs"]
    assert two["settings"]["lora"] == {**one["settings"]["lora"], "dropout": 0.1}
    assert two["settings"]["lora"]["r"] == 4
    assert two["settings"] == {**one["settings"], "lora": two["settings"]["lora"], "batch_size": 2}


def test_place_of_results_follows_the_name():
    assert results_folder({"name": ""}) == "results"
    assert results_folder({"name": "seeds"}) == "results/experiments/seeds"


def test_missing_local_source_is_named(tmp_path):
    path = tmp_path / "notes.jsonl"
    with pytest.raises(UserError) as caught:
        check_pinned("datasets", "notes", {"path": str(path)})
    assert str(caught.value) == (
        f"config: datasets.notes.source.path: {path} does not exist; mend the path or put the file there"
    )


def test_unpinned_local_source_is_refused_with_the_line_that_pins_it(tmp_path):
    path = tmp_path / "notes.jsonl"
    path.write_text("{}\n")
    with pytest.raises(UserError) as caught:
        check_pinned("datasets", "notes", {"path": str(path)})
    message = str(caught.value)
    assert message == f"config: datasets.notes.source: not pinned; add 'sha256: {sha256_of(path)}'"
    line = message.split("'")[1]
    check_pinned("datasets", "notes", {"path": str(path), **yaml.safe_load(line)})


def as_snakemake_merges(overlay: Path | None) -> dict[str, Any]:
    """The configuration of the Snakefile's own files, with `--configfile overlay` laid over them."""
    merged: dict[str, Any] = {}
    for path in [*(ROOT / "config" / f"{name}.yaml" for name in ("models", "datasets", "config")), overlay]:
        if path:
            update_config(merged, yaml.safe_load(path.read_text(encoding="utf-8")))
    return merged


@pytest.mark.parametrize("overlay", OVERLAYS, ids=[path.stem for path in OVERLAYS])
def test_config_files_are_laid_over_each_other_as_snakemake_does(overlay):
    found: dict[str, Any] = {}
    for path in [*(ROOT / "config" / f"{name}.yaml" for name in ("models", "datasets", "config")), overlay]:
        found = laid_over(found, yaml.safe_load(path.read_text(encoding="utf-8")))
    assert found == as_snakemake_merges(overlay)


@pytest.mark.parametrize("over", [{"a": 1}, {"a": {"b": 2}}, {"a": {"c": {"d": [2]}}}, {"a": None}, {"e": {"f": 1}}])
def test_what_is_no_mapping_is_replaced_as_snakemake_does(over):
    given = {"a": {"b": {"c": 1}, "c": {"d": [1, 2], "e": 3}}, "e": 1}
    wanted = copy.deepcopy(given)
    update_config(wanted, over)
    assert laid_over(given, over) == wanted


def test_shipped_configuration_passes():
    full = checked_config(as_snakemake_merges(None))
    assert results_folder(full) == "results"


@pytest.mark.parametrize("overlay", OVERLAYS, ids=[path.stem for path in OVERLAYS])
def test_overlay_passes_and_names_only_its_own_runs(overlay):
    own = yaml.safe_load(overlay.read_text(encoding="utf-8"))
    full = checked_config(as_snakemake_merges(overlay))
    assert [run["name"] for run in full["runs"]] == [run["name"] for run in own["runs"]]
    assert results_folder(full) == f"results/experiments/{overlay.stem}"
