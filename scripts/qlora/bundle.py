"""What leaves with a run, for the hub or for a folder: weights, tokenizer, its record, and a card of its results."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora.files import files_below, read_json
from qlora.licences import TOLD, Source, objections
from qlora.results import Record, read_table

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template.jinja"),
)
FALCON = (  # as models.load_quantized does
    *("from transformers.models.falcon import modeling_falcon", ""),
    "modeling_falcon.FalconLinear = torch.nn.Linear  # else no layer is put into 4 bits",
)
Files = dict[str, Path | bytes]  # name → the file that is there, or what is written into it


@dataclass(frozen=True)
class Subject:
    """A run as its card tells of it."""

    run: Mapping[str, Any]  # run.json
    metrics: Sequence[Record]  # of this run alone
    base: str  # what the base is called on the hub, or its folder here
    family: str  # model_type of the base's config
    sources: Sequence[Source]  # of the base and of the datasets
    commands: Mapping[str, str]  # that make `base` and `adapter` in a clone of the workflow

    @property
    def form(self) -> Mapping[str, str] | None:
        """The named prompt format, None where the tokenizer's chat template renders."""
        named: Mapping[str, str] | None = self.run["prompt"]["format"]
        return named

    @property
    def on_hub(self) -> bool:
        """Whether the base is from the hub."""
        return "hub" in self.run["pins"]["model"]["source"]

    @property
    def revision(self) -> str | None:
        """The commit of the base on the hub, where it is from there."""
        return self.run["pins"]["model"]["source"].get("revision")


def subject_of(
    record: Path,
    metrics: Path,
    model: Path,
    base: str,
    sources: Sequence[Source],
    commands: Mapping[str, str],
) -> Subject:
    """A run from its record, the joint table of metrics, and the folder of its base."""
    run = read_json(record)
    rows = [row for row in read_table(metrics) if row["run"] == run["name"]]
    family = read_json(model / "config.json")["model_type"]
    return Subject(run, rows, base, family, sources, commands)


def bundle(weights: Path, model: Path, subject: Subject, address: str) -> Files:
    """The files of an adapter or a merged model, as they are at `address`, a repository or a folder.

    `model` is the base's folder, whose tokenizer goes along with an adapter.
    """
    found: Files = {file.relative_to(weights).as_posix(): file for file in files_below(weights)}
    drift = None if "adapter_config.json" in found else read_json(weights / "merge.json")["drift"]
    made: Files = {"README.md": card(subject, address, drift).encode(), "run.json": _json(subject.run)}
    if drift:
        return {**found, **made}
    pointing = {"base_model_name_or_path": subject.base, "revision": subject.revision}
    made["adapter_config.json"] = _json({**read_json(weights / "adapter_config.json"), **pointing})
    tokenizer: Files = {name: model / name for name in TOKENIZER_FILES if (model / name).exists()}
    return {**tokenizer, **found, **made}


def size_of(content: Path | bytes) -> int:
    """Bytes of a file of a bundle."""
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def card(subject: Subject, address: str, drift: Mapping[str, Any] | None) -> str:
    """The model card: base, data with licences, recipe, results with intervals, how to load, how to reproduce.

    `drift` is what merge.json says of a merged model's logits, None where the card is an adapter's.
    """
    merged = drift is not None
    parts = [
        *(_metadata(subject, merged), _summary(subject, merged), _sources(subject), _recipe(subject)),
        *(_results(subject, drift), _loading(subject, address, merged), _reproducing(subject)),
    ]
    return "\n\n".join(parts) + "\n"


def _metadata(subject: Subject, merged: bool) -> str:
    """The hub's metadata, as YAML in front of the card."""
    hub = [source["hub"] for source in subject.sources if source["kind"] == "dataset" and source["hub"]]
    relation = "merge" if merged else "adapter"
    lines = [
        "---",
        *([f"base_model: {subject.base}", f"base_model_relation: {relation}"] if subject.on_hub else []),
        *(f"library_name: {'transformers' if merged else 'peft'}", "pipeline_tag: text-generation", "tags: [qlora]"),
        *([f"datasets: [{', '.join(hub)}]"] if hub else []),
        "---",
    ]
    return "\n".join(lines)


def _summary(subject: Subject, merged: bool) -> str:
    what = f"A QLoRA adapter for `{subject.base}`."
    if merged:
        what = f"`{subject.base}`, dequantised, with a QLoRA adapter merged into it, in bfloat16."
    return f"# {subject.run['name']}\n\n{what}"


def _sources(subject: Subject) -> str:
    rows = [
        f"| {source['kind']} | {source['name']} | {source['address']} | `{source['pin'][:12] or '–'}` |"
        f" {source['licence']} | {TOLD[source['publishing']]} |"
        for source in subject.sources
    ]
    warnings = [f"\n**Licence:** {line}." for line in objections(subject.sources)]
    head = "| | name | from | pin | licence | publishing what is made of it |\n|---|---|---|---|---|---|"
    return "\n".join(["## Sources and licences\n", head, *rows, *warnings])


def _recipe(subject: Subject) -> str:
    run, settings = subject.run, subject.run["settings"]
    quantization, lora = settings["quantization"], settings["lora"]
    targets = lora["target_modules"]
    double = " with double quantisation" if quantization["double"] else ""
    return (
        f"## Recipe\n\nMixture {run['mixture']}, recipe {run['recipe']}, seed {run['seed']}: {run['steps']:,} steps of"
        f" {settings['batch_size']} × {settings['accumulation']} rows, {run['supervised tokens']:,} learned tokens of"
        f" {run['tokens']:,}.\nBase in {quantization['type']}{double}; LoRA of rank {lora['r']}, alpha {lora['alpha']},"
        f" dropout {lora['dropout']:g}, on {targets if isinstance(targets, str) else ', '.join(targets)};"
        f" {settings['optimizer']} at {settings['learning_rate']:g}, {settings['schedule']}."
        "\nAll of it is in `run.json`."
    )


def _results(subject: Subject, drift: Mapping[str, Any] | None) -> str:
    rows = [
        f"| {row['dataset']} | {row['slice']} | {row['metric']} | {float(row['value']):.3f}"
        f" | {float(row['ci_low']):.3f} to {float(row['ci_high']):.3f} | {row['n']} |"
        for row in subject.metrics
    ]
    head = "| test set | slice | metric | value | interval | n |\n|---|---|---|---|---|---|"
    note = "Held-out rows, greedy answers; intervals by bootstrap over the rows."
    if drift:
        note += (
            "\nScored was the base in 4 bits with the adapter, not this merged model: on a text of"
            f" {drift['tokens']} tokens their logits differ by {drift['rms']:.1%} (root mean square, of that of the"
            f" logits), and {drift['same next token']:.1%} of the most likely next tokens are the same."
        )
    return "\n".join(["## Results\n", f"{note}\n", head, *rows])


def _loading(subject: Subject, address: str, merged: bool) -> str:
    rendered = "Prompts are rendered by the tokenizer's chat template."
    if subject.form is not None:
        user = json.dumps(subject.form["user"])
        rendered = (
            f"Prompts are rendered as {user}, the answer follows. If the tokenizer has a chat template, do not use it."
        )
    code = ", trust_remote_code=True" if subject.run["pins"]["model"]["source"].get("remote_code") else ""
    pin = f', revision="{subject.revision}"{code}' if subject.revision else ""
    load = [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'tokenizer = AutoTokenizer.from_pretrained("{subject.base}"{pin})'
        if code
        else f'tokenizer = AutoTokenizer.from_pretrained("{address}")',
        f'model = AutoModelForCausalLM.from_pretrained("{address}", dtype="auto")',
    ]
    if not merged:
        quantization = subject.run["settings"]["quantization"]
        load = [
            *("import torch", "from peft import PeftModel"),
            load[0].replace("AutoTokenizer", "AutoTokenizer, BitsAndBytesConfig"),
            *(FALCON if subject.family == "falcon" else [""]),
            f"dtype = {_dtype(subject.run)}",
            "in_4_bits = BitsAndBytesConfig(",
            f'    load_in_4bit=True, bnb_4bit_quant_type="{quantization["type"]}",',
            f"    bnb_4bit_use_double_quant={quantization['double']}, bnb_4bit_compute_dtype=dtype,",
            ")",
            load[2],
            "base = AutoModelForCausalLM.from_pretrained(",
            f'    "{subject.base}"{pin}, dtype=dtype, quantization_config=in_4_bits',
            ")",
            f'model = PeftModel.from_pretrained(base, "{address}")',
        ]
    made = [] if merged or subject.on_hub else [_making_base(subject)]
    return "\n".join(["## Load\n", *made, "```python", *load, "```", "", rendered])


def _making_base(subject: Subject) -> str:
    """How a stranger comes to a base that is not from the hub, in a paragraph and a block of code."""
    folder = subject.run["pins"]["model"]["source"].get("path")
    ask = f" Ask whoever trained this for the folder `{folder}`, and put it there in the clone." if folder else ""
    return (
        f"The base is not on the hub. Make it in a clone of the workflow at the commit below, where the code then finds"
        f" it.{ask}\n\n```sh\n{subject.commands['base']}\n```\n"
    )


def _dtype(run: Mapping[str, Any]) -> str:
    """What a run computed in, as code; `auto` on a GPU by the rule that the run went by (models.compute_dtype)."""
    wanted = run["settings"]["quantization"]["compute_dtype"]
    if wanted != "auto":
        return f"torch.{wanted}"
    if run["hardware"]["device"] == "cpu":
        return "torch.float32"
    return "torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16"


def _reproducing(subject: Subject) -> str:
    commit = subject.run["commit"] or "unknown"
    changed = " and then with changes that were not committed" if commit.endswith("-dirty") else ""
    hardware = subject.run["hardware"]
    return (
        f"## Reproduce\n\nTrained at commit `{commit.removesuffix('-dirty')}` of the workflow{changed}, on"
        f" {hardware.get('gpu') or hardware['cpu']}:\n\n```sh\n{subject.commands['adapter']}\n```"
    )
