"""What leaves with a run: its files, and a card that tells where it comes from and how good it is."""

import runpy
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from outgoing import COMMANDS, DRIFT, MODEL, RUN, SOURCES, make_run
from peft import LoraConfig, get_peft_model
from tiny_models import FAMILIES, layers_in_4_bits, make_base

from qlora.bundle import bundle, card, size_of, subject_of
from qlora.files import read_json, write_json
from qlora.licences import objections, source_of
from qlora.models import compute_dtype

CARD = """\
---
base_model: owner/base
base_model_relation: adapter
library_name: peft
pipeline_tag: text-generation
tags: [qlora]
datasets: [owner/notes]
---

# llama

A QLoRA adapter for `owner/base`.

## Sources and licences

| | name | from | pin | licence | publishing what is made of it |
|---|---|---|---|---|---|
| model | base | owner/base | `aaaaaaaaaaaa` | MIT | allowed |
| dataset | notes | owner/notes | `bbbbbbbbbbbb` | not stated | unclear |

**Licence:** dataset notes (not stated): the registry does not say whether publishing is allowed; ask who holds the rights.

## Recipe

Mixture all, recipe tiny, seed 1: 900 steps of 8 × 2 rows, 5,000 learned tokens of 90,000.
Base in nf4 with double quantisation; LoRA of rank 4, alpha 8, dropout 0, on all-linear; adamw_torch at 0.005, cosine.
All of it is in `run.json`.

## Results

Held-out rows, greedy answers; intervals by bootstrap over the rows.

| test set | slice | metric | value | interval | n |
|---|---|---|---|---|---|
| notes | all | accuracy | 0.812 | 0.750 to 0.874 | 200 |
| notes | hard | loss | 1.500 | 1.000 to 2.000 | 50 |

## Load

```python
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

dtype = torch.float32
in_4_bits = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype,
)
tokenizer = AutoTokenizer.from_pretrained("owner/llama")
base = AutoModelForCausalLM.from_pretrained(
    "owner/base", revision="aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", dtype=dtype, quantization_config=in_4_bits
)
model = PeftModel.from_pretrained(base, "owner/llama")
```

Prompts are rendered as "{content}\\nAnswer:", the answer follows. If the tokenizer has a chat template, do not use it.

## Reproduce

Trained at commit `cccccccccccccccccccccccccccccccccccccccc` of the workflow, on a processor:

```sh
snakemake runs/llama
```
"""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path)


def subject(run: Path, **changes):
    given = {
        "base": "owner/base",
        "sources": SOURCES,
        "commands": COMMANDS,
    }
    return subject_of(run / "run.json", run / "metrics.csv", **{"model": run / MODEL, **given, **changes})


def loading_code(text: str) -> str:
    """What a card says under Load."""
    return text.split("```python\n")[1].partition("```")[0]


def test_the_card_tells_base_data_recipe_results_of_this_run_alone_and_how_to_go_on(run):
    assert card(subject(run), "owner/llama", drift=None) == CARD
    assert yaml.safe_load(CARD.split("---")[1])["datasets"] == ["owner/notes"]


def test_the_card_of_a_merged_model_loads_without_peft(run):
    write_json(run / "run.json", {**RUN, "prompt": {"format": None, "system": "template"}})
    text = card(subject(run), "owner/llama-merged", drift=DRIFT)
    assert "library_name: transformers" in text
    assert "base_model_relation: merge" in text
    assert "peft" not in text
    assert 'model = AutoModelForCausalLM.from_pretrained("owner/llama-merged", dtype="auto")' in text
    assert "rendered by the tokenizer's chat template" in text


def test_the_card_of_a_merged_model_says_that_other_weights_were_scored_and_how_far_it_is_from_them(run):
    told = bundle(run / "merged", run / MODEL, subject(run), "owner/llama")["README.md"].decode()
    assert (
        "Scored was the base in 4 bits with the adapter, not this merged model: on a text of 122 tokens their logits"
        " differ by 1.7% (root mean square, of that of the logits), and 98.4% of the most likely next tokens are the"
        " same.\n\n| test set |"
    ) in told
    assert "Scored was" not in CARD


@pytest.mark.parametrize("family", FAMILIES)
def test_the_card_s_code_puts_a_base_of_each_family_into_4_bits(run, tmp_path, monkeypatch, family):
    base, adapter = make_base(tmp_path / "base", family), tmp_path / "adapter"
    network = transformers.AutoModelForCausalLM.from_pretrained(base)
    get_peft_model(network, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")).save_pretrained(
        adapter
    )
    transformers.AutoTokenizer.from_pretrained(base).save_pretrained(adapter)
    # As in a fresh process, whatever was loaded in this one before.
    own_class = type("FalconLinear", (torch.nn.Linear,), {})
    monkeypatch.setattr("transformers.models.falcon.modeling_falcon.FalconLinear", own_class)
    told = subject(run, model=base, base=str(base))
    told.run["pins"] = {"model": {"source": {"build": {}}}}
    (tmp_path / "load.py").write_text(loading_code(card(told, str(adapter), drift=None)))
    loaded = runpy.run_path(str(tmp_path / "load.py"))
    layers = layers_in_4_bits(loaded["model"])
    assert len(layers) >= 2 * 4
    assert {layer.compute_dtype for layer in layers} == {torch.float32}
    with torch.no_grad():
        logits = loaded["model"](**loaded["tokenizer"]("Hello", return_tensors="pt")).logits
    assert logits.isfinite().all()


BY_THE_CARD = "torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16"


@pytest.mark.parametrize(
    ("wanted", "device", "code"),
    [
        ("bfloat16", "cpu", "torch.bfloat16"),
        ("float16", "cuda", "torch.float16"),
        ("auto", "cpu", "torch.float32"),
        ("auto", "cuda", BY_THE_CARD),
    ],
)
def test_the_card_computes_in_what_the_run_computed_in(run, wanted, device, code):
    told = subject(run)
    told.run["settings"]["quantization"]["compute_dtype"] = wanted
    told.run["hardware"]["device"] = device
    made = loading_code(card(told, "owner/llama", drift=None))
    assert f"\ndtype = {code}\n" in made
    assert device == "cuda" or code == str(compute_dtype(wanted, device))


def test_a_base_that_was_allowed_its_own_code_is_loaded_with_it(run):
    told = subject(run)
    told.run["pins"]["model"]["source"]["remote_code"] = "a" * 40
    made = loading_code(card(told, "owner/llama", drift=None))
    assert f'"owner/base", revision="{"a" * 40}", trust_remote_code=True, dtype=dtype' in made
    assert f'AutoTokenizer.from_pretrained("owner/base", revision="{"a" * 40}", trust_remote_code=True)' in made
    compile(made, "card", "exec")


def local(run: Path, source: dict[str, object]):
    """A run whose base is not from the hub."""
    told = subject(run, base="results/sources/models/base", sources=[{**SOURCES[1], "hub": ""}])
    told.run["pins"] = {"model": {"source": source}}
    return told


def test_a_base_that_is_not_from_the_hub_is_no_metadata_of_its(run):
    text = card(local(run, {"build": {}}), "there", drift=None)
    assert yaml.safe_load(text.split("---")[1]).keys() == {"library_name", "pipeline_tag", "tags"}
    assert '\n    "results/sources/models/base", dtype=dtype, quant' in text


def test_the_card_of_an_adapter_says_how_a_stranger_makes_a_base_that_is_not_from_the_hub(run):
    loading = card(local(run, {"build": {}}), "there", drift=None).partition("## Load")[2]
    assert loading.startswith(
        "\n\nThe base is not on the hub. Make it in a clone of the workflow at the commit below, where the code then"
        " finds it.\n\n```sh\nsnakemake sources/models/base\n```\n\n```python\n"
    )
    assert "The base is not on the hub" not in card(local(run, {"build": {}}), "there", drift=DRIFT) + CARD


def test_the_card_of_an_adapter_says_of_a_base_in_a_folder_that_it_must_be_asked_for(run):
    loading = card(local(run, {"path": "data/base"}), "there", drift=None).partition("## Load")[2]
    assert loading.startswith(
        "\n\nThe base is not on the hub. Make it in a clone of the workflow at the commit below, where the code then"
        " finds it. Ask whoever trained this for the folder `data/base`, and put it there in the clone.\n\n```sh"
    )


def test_a_commit_that_was_changed_is_told(run):
    changed = subject(run)
    changed.run["commit"] = "c" * 40 + "-dirty"
    text = card(changed, "owner/llama", drift=None)
    assert f"commit `{'c' * 40}` of the workflow and then with changes that were not committed" in text


def test_an_adapter_goes_with_its_tokenizer_and_points_at_its_base_on_the_hub(run):
    files = bundle(run / "adapter", run / MODEL, subject(run), "owner/llama")
    assert sorted(files) == [
        *("README.md", "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "run.json"),
        *("tokenizer.json", "tokenizer_config.json"),
    ]
    assert yaml.safe_load(files["adapter_config.json"]) == {
        "base_model_name_or_path": "owner/base",
        "revision": "a" * 40,
    }
    assert files["README.md"] == CARD.encode()
    assert yaml.safe_load(files["run.json"]) == read_json(run / "run.json")
    assert size_of(files["adapter_model.safetensors"]) == len(b"weights")


def test_a_merged_model_goes_as_it_is_with_its_card(run):
    files = bundle(run / "merged", run / MODEL, subject(run), "owner/llama")
    assert sorted(files) == [
        *("README.md", "config.json", "merge.json", "model.safetensors", "run.json", "tokenizer.json")
    ]


def test_the_card_of_a_library_does_not_take_the_place_of_ours(run):
    (run / "adapter" / "README.md").write_text("what a library wrote")
    assert bundle(run / "adapter", run / MODEL, subject(run), "owner/llama")["README.md"] == CARD.encode()


def test_what_stands_against_publishing_is_named_from_the_registries_alone():
    entries = [
        {"source": {"hub": "a/b", "revision": "1" * 40}, "licence": "MIT", "publishing": "allowed"},
        {"source": {"path": "data/mine.csv", "sha256": "2" * 64}, "licence": "in house", "publishing": "forbidden"},
        {"source": {"build": {}}, "licence": "Terms", "publishing": "conditions"},
        {"source": {"hub": "c/d"}, "licence": "not stated", "publishing": "unclear"},
    ]
    sources = [source_of("dataset", name, entry) for name, entry in zip("wxyz", entries, strict=True)]
    assert [source["address"] for source in sources] == ["a/b", "data/mine.csv", "made by this workflow", "c/d"]
    assert [source["pin"] for source in sources] == ["1" * 40, "2" * 64, "", ""]
    assert list(objections(sources)) == [
        "dataset x (in house) forbids publishing what is made of it",
        "dataset y (Terms) allows publishing on conditions: read them first",
        "dataset z (not stated): the registry does not say whether publishing is allowed; ask who holds the rights",
    ]
