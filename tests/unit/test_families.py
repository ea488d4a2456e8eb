"""Every family through tokenize, preflight, train and merge, on a tiny random model of its own classes.

`PYTHONPATH=scripts:tools python tests/unit/test_families.py` writes family_goldens.json anew.
"""

import json
import math
import re
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset
from tiny_models import (
    FAMILIES,
    QUANTIZATION,
    WithMask,
    layers_in_4_bits,
    make_base,
    make_preflight,
    make_rows,
    make_tokens,
    train,
)
from tokenizers_for_tests import family_tokenizer
from transformers import AutoModelForCausalLM

from merge_adapter import merge_adapter
from preflight_model import LENGTHS, MIXED, packing_difference
from qlora.batches import PackedBatch
from qlora.conversations import message, placed_system
from qlora.files import read_json
from qlora.loss import add_supervised_loss
from qlora.models import load_quantized
from qlora.render import IGNORED, rows_of, tokenized

torch.set_num_threads(1)

ROOT = Path(__file__).parents[2]
GOLDENS = Path(__file__).parent / "family_goldens.json"
NAMES = [name for name in FAMILIES if name != "llama"]
BASES = "Bases, with `plain`"
SAME = 1e-4  # logits are around 10


def documented(heading: str) -> dict[str, dict[str, str]]:
    """The table of docs/models.md that begins with a column, as first cell → column → cell."""
    lines = iter((ROOT / "docs/models.md").read_text(encoding="utf-8").splitlines())
    columns = next([cell.strip() for cell in line.split(" | ")] for line in lines if line.startswith(f"| {heading} "))
    next(lines)
    rows = {}
    for line in takewhile(str.strip, lines):
        cells = [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        rows[cells[0]] = dict(zip((column.strip("| ") for column in columns), cells, strict=True))
    return rows


FAMILY_TABLE, LAYER_TABLE = documented("Family"), documented("Class")


def as_documented(found: dict[str, Any], family: str) -> None:
    """Hold a row of the table to what the preflight found."""
    row = FAMILY_TABLE[family]
    form = FAMILIES[family].form
    layers = LAYER_TABLE.get(found["class"], LAYER_TABLE["all others"])["Layers"]
    assert found["quantised names"] == layers.split()
    assert {key: row[key] for key in ("Class", "Prompt", "Ends in", "System message", "Attention", "Packed")} == {
        "Class": found["class"],
        "Prompt": "template" if form is None else "instruct" if form["user"].startswith("Instruct") else "plain",
        "Ends in": " ".join(f"`{stop}`" for stop in found["stop tokens"]),
        "System message": found["system message"],
        "Attention": found["attention"],
        "Packed": "yes" if found["packs"] else "no",
    }


def test_each_model_of_the_registry_stands_with_its_family_as_its_entry_says() -> None:
    models = yaml.safe_load((ROOT / "config/models.yaml").read_text(encoding="utf-8"))["models"]
    placed = []
    for name, row in FAMILY_TABLE.items():
        for column, form in (("Models", {"template": None}.get(row["Prompt"], row["Prompt"])), (BASES, "plain")):
            for model in row[column].split():
                entry = models[model]
                assert entry.get("format") == form, model
                assert entry.get("attention", "sdpa") == row["Attention"], model
                assert form or entry.get("system", "template") == row["System message"], model
                placed.append(model)
        assert name in FAMILIES
    assert sorted(placed) == sorted(name for name, entry in models.items() if "build" not in entry["source"])


def golden(family: str) -> list[dict[str, Any]]:
    """The rows that one conversation of two turns and a system message becomes."""
    messages = placed_system(
        [
            message("system", "Be short."),
            *(message("user", "What is 6 x 7?"), message("assistant", "42 boxes\n\nof paint")),
            *(message("user", "unhappy fox?"), message("assistant", "It asks: why?")),
        ],
        FAMILIES[family].system,
    )
    tokenizer, form = family_tokenizer(family), FAMILIES[family].form
    rows = []
    for parts in rows_of(messages, tokenizer, form):
        made = tokenized(parts, tokenizer, form)
        text = "".join(f"⟦{part.text}⟧" if part.supervised else part.text for part in parts)
        rows.append({"text": text, "input_ids": made.input_ids, "labels": made.labels})
    return rows


@pytest.mark.parametrize("family", NAMES)
def test_a_conversation_becomes_the_same_text_ids_and_labels_as_before(family: str) -> None:
    assert golden(family) == read_json(GOLDENS)[family]


@pytest.mark.parametrize("family", NAMES)
def test_what_is_learned_is_the_answers_and_their_stop_tokens(family: str) -> None:
    tokenizer = family_tokenizer(family)
    rows = golden(family)
    ids = [label for row in rows for label in row["labels"] if label != IGNORED]
    text = str(tokenizer.decode(ids)).replace("<think>\n\n</think>\n\n", "")
    stop = tokenizer.convert_ids_to_tokens(ids[-1])
    answers = [answer.strip() for answer in text.split(stop)]
    assert answers == ["42 boxes\n\nof paint", "It asks: why?", ""]
    for row in rows:
        assert all(label in (IGNORED, token) for token, label in zip(row["input_ids"], row["labels"], strict=True))


@pytest.mark.parametrize("family", NAMES)
def test_a_family_is_tokenised_checked_trained_and_merged(family: str, tmp_path: Path) -> None:
    made = FAMILIES[family]
    base = make_base(tmp_path / "base", family)
    found = read_json(make_preflight(base, family))
    kind = made.config.model_type
    as_documented(found, family)
    tokens = make_tokens(tmp_path, base, make_rows(tmp_path, train=12), family)
    settings = {"learning_rate": 1e-5, "max_steps": 3, "batching": "packed", "batch_size": 2}
    run = train(base, tokens, tmp_path / "preflight.json", tmp_path / "run", family, **settings)
    record = read_json(run.folder / "run.json")
    assert record["batching"] == ("packed" if found["packs"] else "grouped")
    assert record["steps"] == 3
    layers = layers_in_4_bits(run.trainer.model)
    assert len(layers) == 2 * len(found["quantised names"]) == found["quantised modules"]
    assert all(torch.equal(layer.weight, old) for layer, old in zip(layers, run.base, strict=True))
    moved = [int((new != old).sum()) for new, old in zip(run.trainer.trainable(), run.adapter, strict=True)]
    assert sum(moved) > 0.99 * sum(weight.numel() for weight in run.adapter)
    assert len(moved) == 2 * len(layers)
    assert all(math.isfinite(entry["loss"]) for entry in run.trainer.state.log_history if "loss" in entry)
    merge_adapter(base, run.folder / "adapter", tmp_path / "merged", QUANTIZATION, made.attention, "cpu")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation=made.attention)
    assert merged.config.model_type == kind


def packed_and_alone(base: Path, attention: str) -> tuple[float, float]:
    """The summed loss in nats of documents packed into one row, and of each alone."""
    network = load_quantized(base, QUANTIZATION, "cpu", attention).eval()
    add_supervised_loss(network)
    generator = torch.Generator().manual_seed(1)
    documents = [torch.randint(6, 300, (length,), generator=generator).tolist() for length in LENGTHS]
    rows = Dataset.from_list([{"input_ids": ids, "labels": [*[IGNORED] * 3, *ids[3:]]} for ids in documents])
    batch = PackedBatch(rows, sum(LENGTHS) + 5, 0)([{"rows": [0, 1, 2]}])
    batch.pop("tokens")
    with torch.no_grad():
        packed = float(network(**batch, loss_items=1))
        alone = sum(
            float(
                network(input_ids=torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]]), loss_items=1)
            )
            for row in rows
        )
    return packed, alone


@pytest.mark.parametrize(
    "family", ["llama2", "mistral", "gemma", "gemma2", "gemma3", "phi-2", "phi3", "qwen2.5", "qwen3"]
)
def test_packed_documents_have_the_logits_and_the_loss_of_the_documents_alone(family: str, tmp_path: Path) -> None:
    base, attention = make_base(tmp_path / "base", family), FAMILIES[family].attention
    network = load_quantized(base, QUANTIZATION, "cpu", attention).eval()
    assert packing_difference(network) < SAME
    packed, alone = packed_and_alone(base, attention)
    assert packed == pytest.approx(alone, rel=1e-5)
    # the two traps: no positions, and a mask of ones, with which positions are not looked at
    assert packing_difference(network, positions=False) > MIXED
    assert packing_difference(WithMask(network)) > MIXED


def test_falcon_mixes_packed_documents_whatever_is_done(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "falcon")
    assert packing_difference(load_quantized(base, QUANTIZATION, "cpu", "sdpa").eval()) > MIXED
    packed, alone = packed_and_alone(base, "sdpa")
    assert packed != pytest.approx(alone, rel=1e-3)


if __name__ == "__main__":
    made_anew = {family: golden(family) for family in NAMES}
    lines = (f"{json.dumps(name)}: {json.dumps(rows, ensure_ascii=False)}" for name, rows in made_anew.items())
    GOLDENS.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
