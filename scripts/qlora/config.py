"""The configuration: closed schema, defaults filled in, cross-references checked, errors of one line."""

import difflib
import re
import reprlib
import string
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jsonschema
import yaml

from qlora.errors import UserError
from qlora.files import sha256_of
from qlora.pins import read_lock, with_locked_commits

CHANGE_THE_BASE = ("pissa", "pissa_niter_4", "olora", "corda")  # starts of LoRA that subtract from the base
CONFIG = Path(__file__).parents[2] / "config"
SCHEMA = CONFIG / "schema.yaml"
LOCK = CONFIG / "sources.lock.yaml"


def checked_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with all defaults filled in, and the commits that `make pin` found.

    Raises UserError with one line that names the key and says what to do.
    """
    schema = yaml.safe_load(SCHEMA.read_text(encoding="utf-8"))
    _check_against(schema, schema, config, "")
    full: dict[str, Any] = _with_defaults(schema, schema, config)
    _check_sources(full)
    _check_references(full)
    _check_suites(full)
    full = with_locked_commits(full, read_lock(LOCK))
    full["runs"] = [_run_with_its_recipe(schema, full, run) for run in full["runs"]]
    for name, recipe in full["recipes"].items():
        _check_recipe(f"recipes.{name}", recipe)
    for run in full["runs"]:
        _check_recipe(f"run '{run['name']}'", run["settings"])
    return full


def resolved_device(wanted: str) -> str:
    """What trains and predicts: cpu or cuda; `auto` is cuda where NVIDIA's driver is loaded on this machine."""
    if wanted != "auto":
        return wanted
    return "cuda" if Path("/dev/nvidiactl").exists() else "cpu"


def results_folder(config: Mapping[str, Any]) -> str:
    """Where the results of this configuration lie, relative to the working folder."""
    return f"results/experiments/{config['name']}" if config["name"] else "results"


def _resolved(root: Mapping[str, Any], schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema that a `$ref` stands for."""
    return root["$defs"][schema["$ref"].rsplit("/", 1)[1]] if "$ref" in schema else schema


def _check_against(root: Mapping[str, Any], schema: Mapping[str, Any], value: Any, where: str) -> None:
    """Raise UserError for the first, outermost place where `value` breaks the schema."""
    validator = jsonschema.Draft202012Validator({**schema, "$defs": root["$defs"]})
    errors = sorted(validator.iter_errors(value), key=lambda error: (len(error.path), list(map(str, error.path))))
    if errors:
        raise UserError(_in_one_line(errors[0], where))


def _in_one_line(error: jsonschema.ValidationError, where: str) -> str:
    """A schema error as a sentence that names the key and says what would be right."""
    key = ".".join([*([where] if where else []), *map(str, error.absolute_path)])
    place = f"config: {key}" if key else "config"
    value: Any = error.instance
    rule: Any = error.validator_value
    schema: Any = error.schema
    if error.validator == "additionalProperties":
        known = sorted(schema["properties"])
        unknown = min(str(name) for name in value if name not in known)
        return f"{place}: unknown key '{unknown}'{_nearest(unknown, known)}"
    if error.validator == "required":
        missing = next(name for name in rule if name not in value)
        return f"{place}: the key '{missing}' is missing; add it"
    if error.validator == "enum":
        choices = [str(choice) for choice in rule]
        near = difflib.get_close_matches(str(value), choices, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        return f"{place}: '{value}' is not one of {', '.join(choices)}{hint}"
    if error.validator == "type":
        wanted = rule if isinstance(rule, str) else " or ".join(rule)
        return f"{place}: {reprlib.repr(value)} is of the wrong type; it must be {wanted}{_hint(value, wanted)}"
    if error.validator == "pattern":
        return f"{place}: {reprlib.repr(value)} is not {schema['title']}"
    return f"{place}: {error.message}"


def _hint(value: Any, wanted: str) -> str:
    """A hint where YAML's own rules made `value` another type than its look promises."""
    if isinstance(value, str) and "number" in wanted and re.fullmatch(r"[\d.]+[eE][+-]?\d+", value):
        return "; in YAML a number with an exponent has a point and a sign, as in 5.0e-3"
    if wanted == "boolean" and str(value).lower() in ("true", "false"):
        return f"; on Snakemake's command line it is {str(value).capitalize()}"
    if isinstance(value, bool | int | float) and wanted == "string":
        return "; put it in quotes"
    return ""


def _nearest(name: str, known: Iterable[str]) -> str:
    """A hint that names the nearest known name, or all of them when none is near."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1)
    if near:
        return f"; did you mean '{near[0]}'?"
    return f"; known: {', '.join(sorted(known))}"


def _with_defaults(root: Mapping[str, Any], schema: Mapping[str, Any], value: Any) -> Any:
    """`value` with the schema's defaults filled in, at every level."""
    schema = _resolved(root, schema)
    if isinstance(value, Mapping):
        properties = schema.get("properties", {})
        defaults = {
            key: _resolved(root, item)["default"]
            for key, item in properties.items()
            if "default" in _resolved(root, item)
        }
        others = schema.get("additionalProperties") or {}
        return {
            key: _with_defaults(root, properties.get(key, others), item) for key, item in {**defaults, **value}.items()
        }
    if isinstance(value, list):
        return [_with_defaults(root, schema.get("items", {}), item) for item in value]
    return value


def _check_references(config: Mapping[str, Any]) -> None:
    """Raise UserError where one part of the configuration names another that is not there."""
    for kind, name, what, wanted in _references(config):
        if wanted not in config[what]:
            raise UserError(
                f"config: {kind} '{name}' names the unknown {what[:-1]} '{wanted}'{_nearest(wanted, config[what])}"
            )
    names = [run["name"] for run in config["runs"]]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"config: runs: the name '{twice[0]}' stands twice; every run needs a name of its own")


def _references(config: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    """All references as (kind, its name, registry, name that must be in that registry)."""
    for run in config["runs"]:
        for kind in ("model", "mixture", "recipe"):
            yield "run", run["name"], f"{kind}s", run[kind]
    for name, mixture in config["mixtures"].items():
        yield from (("mixture", name, "datasets", dataset) for dataset in mixture["datasets"])
    for name, suite in config["suites"].items():
        yield from (("suite", name, "datasets", dataset) for dataset in suite["datasets"])
    for name, model in config["models"].items():
        if model["format"]:
            yield "model", name, "formats", model["format"]


def _check_suites(config: Mapping[str, Any]) -> None:
    """Raise UserError where a suite needs rows of a split that its dataset cannot have."""
    for name, suite in config["suites"].items():
        for dataset in suite["datasets"]:
            files, held = config["datasets"][dataset].get("files", {"train"}), config["datasets"][dataset]["holdout"]
            if "test" not in files and not ("train" in files and held["test"]):
                raise UserError(
                    f"config: suites.{name}: dataset '{dataset}' has no test rows; give it files.test, or a"
                    " holdout.test above 0, or take it out of the suite"
                )
            if "train" not in files and suite["baselines"]:
                raise UserError(
                    f"config: suites.{name}: the baselines need training rows of dataset '{dataset}', which has none;"
                    " set baselines: [] for its suite"
                )


def _check_sources(config: Mapping[str, Any]) -> None:
    """Raise UserError where a source is not of exactly one kind, or a dataset's rows have no meaning."""
    for registry, kinds in (("models", ("hub", "path", "build")), ("datasets", ("hub", "path"))):
        for name, item in config[registry].items():
            given = [kind for kind in kinds if kind in item["source"]]
            if len(given) != 1:
                raise UserError(f"config: {registry}.{name}.source: give exactly one of {', '.join(kinds)}")
            allowed = item["source"].get("remote_code")
            if allowed and (given != ["hub"] or allowed != item["source"].get("revision")):
                raise UserError(
                    f"config: {registry}.{name}.source.remote_code: goes with 'hub', and is the commit that 'revision'"
                    " is; read the code of that commit, or leave it out"
                )
    for name, dataset in config["datasets"].items():
        _check_mapping(f"datasets.{name}", dataset)
        if dataset["task"] == "sql" and "database" not in dataset:
            raise UserError(
                f"config: datasets.{name}: task sql runs answers, so it needs 'database'; or choose task text"
            )


def _check_mapping(key: str, dataset: Mapping[str, Any]) -> None:
    """Raise UserError where it is not clear how a dataset's rows become messages."""
    ways = [way for way in ("prompt", "alpaca", "messages", "llama2_text") if dataset.get(way)]
    with_prompt = "prompt" in dataset
    with_system = with_prompt or dataset["alpaca"]
    if len(ways) != 1 or ("completion" in dataset) != with_prompt or ("system" in dataset and not with_system):
        raise UserError(
            f"config: {key}: give prompt and completion (and system), or alpaca (and system), or messages,"
            " or llama2_text"
        )
    for part in ("system", "prompt", "completion"):
        if part in dataset:
            _check_template(f"{key}.{part}", dataset[part], needs_column=part != "system")
    if "labels" in dataset and dataset["task"] != "label":
        raise UserError(
            f"config: {key}: 'labels' declares the answers of task label; choose that task, or leave it out"
        )
    for label in dataset.get("labels", []):
        if label != label.strip() or not label:
            raise UserError(f"config: {key}.labels: {label!r} has spaces around it or is empty, as no answer is")


def _check_template(key: str, template: str, needs_column: bool) -> None:
    """Raise UserError where a template over columns has braces that do not pair, or names columns in another way."""
    try:
        fields = [field for field in string.Formatter().parse(template) if field[1] is not None]
    except ValueError as error:
        raise UserError(f"config: {key}: {error}; write a brace that stands for itself twice") from error
    for _, column, style, conversion in fields:
        if not column or style or conversion:
            raise UserError(f"config: {key}: in braces stands the name of a column alone, as in {{question}}")
    if needs_column and not fields:
        raise UserError(f"config: {key}: names no column, so all rows would have the same; put one in braces")


def check_pinned(kind: str, name: str, source: Mapping[str, Any]) -> None:
    """Raise UserError where a local source that is going to be used is missing or not pinned.

    The message has the line that pins it. A hub source without a commit may be planned; its download refuses it.
    """
    if "path" in source:
        path = Path(source["path"])
        if not path.exists():
            raise UserError(
                f"config: {kind}.{name}.source.path: {path} does not exist; mend the path or put the file there"
            )
        if "sha256" not in source:
            raise UserError(f"config: {kind}.{name}.source: not pinned; add 'sha256: {sha256_of(path)}'")


def _run_with_its_recipe(
    schema: Mapping[str, Any], config: Mapping[str, Any], run: Mapping[str, Any]
) -> dict[str, Any]:
    """The run with its own recipe under `settings`: the named recipe, with the run's overrides laid over it."""
    recipe = schema["$defs"]["recipe"]
    _check_against(schema, recipe, run["overrides"], f"runs: {run['name']}.overrides")
    return {**run, "settings": laid_over(config["recipes"][run["recipe"]], run["overrides"])}


def _check_recipe(where: str, recipe: Mapping[str, Any]) -> None:
    """Raise UserError for settings that cannot work, or not together."""
    start = recipe["lora"]["init"]
    if start in CHANGE_THE_BASE:
        raise UserError(
            f"config: {where}: lora.init {start} changes the base's weights, and 4 bits would round that away;"
            " choose default, gaussian or loftq"
        )
    if start == "loftq" and recipe["quantization"]["type"] != "nf4":
        raise UserError(f"config: {where}: lora.init loftq corrects what nf4 loses; set quantization.type to nf4")
    lora, quantization = recipe["lora"], recipe["quantization"]
    exact = lora["dropout"] or lora["dora"] or lora["bias"] != "none" or quantization["type"] != "nf4"
    if recipe["fp8"] and (exact or quantization["compute_dtype"] not in ("auto", "bfloat16")):
        raise UserError(
            f"config: {where}: fp8 stands in for bfloat16 products of nf4 weights, without dropout, DoRA or"
            " learned biases; set these so, or fp8: false"
        )
    if recipe["cpu_offload"]:
        raise UserError(
            f"config: {where}: cpu_offload is not supported: bitsandbytes trains 4-bit layers only where their weights"
            " are; save memory with checkpointing, a smaller batch_size or a shorter max_length"
        )
    for key in ("best_checkpoint", "patience"):
        if recipe[key] and not recipe["eval_steps"]:
            raise UserError(f"config: {where}: {key} compares evaluations; set eval_steps")
    if recipe["best_checkpoint"] and recipe["save_steps"] % recipe["eval_steps"]:
        raise UserError(
            f"config: {where}: best_checkpoint keeps what was evaluated; make save_steps ({recipe['save_steps']})"
            f" a multiple of eval_steps ({recipe['eval_steps']})"
        )


def laid_over(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` laid over `base`, mappings merged at every level, as Snakemake lays one config file over another."""
    both = [key for key in base if isinstance(base[key], Mapping) and isinstance(over.get(key), Mapping)]
    return {**base, **over, **{key: laid_over(base[key], over[key]) for key in both}}
