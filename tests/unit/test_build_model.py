"""The built base models: their text, their tokenizer, their bytes, their gate."""

import json
from pathlib import Path
from random import Random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import build_model
from qlora import corpus
from qlora.errors import UserError
from qlora.pretraining import aim_attention, train_tokenizer, windows

EXAMPLES = Path(__file__).parents[2] / "data" / "examples"
PROMPTS = ("Answer:", "Topic?", "Title?", "Message:", "Post:")


@pytest.fixture(scope="module")
def text() -> list[str]:
    random = Random(3)
    return [corpus.document(random) for _ in range(4000)]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    patch = pytest.MonkeyPatch()
    patch.setattr(build_model, "TOKENIZER_DOCUMENTS", 500)
    folder = tmp_path_factory.mktemp("built")
    paths = {}
    for name, architecture in (("first", "llama"), ("second", "llama"), ("mistral", "mistral"), ("gemma", "gemma")):
        paths[name] = folder / name
        build = {"architecture": architecture, "seed": 5, "steps": 4, "copies": 0.0}
        build_model.build_model(paths[name], build, threads=1)
    patch.undo()
    return paths


def rows(dataset: str, split: str) -> list[dict[str, str]]:
    lines = (EXAMPLES / dataset / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_same_seed_gives_the_same_bytes(built: dict[str, Path]) -> None:
    files = sorted(path.name for path in built["first"].iterdir())
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= set(files)
    for name in files:
        assert (built["first"] / name).read_bytes() == (built["second"] / name).read_bytes(), name


@pytest.mark.parametrize(("name", "family"), [("first", "Llama"), ("mistral", "Mistral"), ("gemma", "Gemma")])
def test_loads_as_a_model_of_its_family(built: dict[str, Path], name: str, family: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(built[name])
    assert type(model).__name__ == f"{family}ForCausalLM"
    assert model.generation_config.eos_token_id == model.config.eos_token_id is not None


def test_mistral_groups_its_keys(built: dict[str, Path]) -> None:
    config = AutoModelForCausalLM.from_pretrained(built["mistral"]).config
    assert config.num_key_value_heads < config.num_attention_heads


def test_tokenizer_round_trip(built: dict[str, Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(built["first"])
    question = "Which ferries have seats > 4075, and wären 'Łódź' ok?\n"
    ids = tokenizer(question)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == question
    pieces = tokenizer.convert_ids_to_tokens(tokenizer("4075", add_special_tokens=False)["input_ids"])
    assert pieces == ["4", "0", "7", "5"]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "</s>", "<pad>")


def test_windows_keep_documents_between_bos_and_eos() -> None:
    tokenizer = train_tokenizer(iter(["ab cd"] * 10), 300)
    ids = windows(lambda: "ab cd", tokenizer, count=2, length=10)
    document = [*tokenizer("ab cd")["input_ids"], tokenizer.eos_token_id]
    assert ids.flatten().tolist() == (document * 20)[:20]
    assert document[0] == tokenizer.bos_token_id


def test_text_holds_no_prompt_and_no_answer(text: list[str]) -> None:
    for document in text:
        assert not any(prompt in document for prompt in PROMPTS)
        lines = document.split("\n")
        assert not any("?" in line for line in lines) or not any(line.startswith("SELECT") for line in lines)


def test_text_holds_nothing_that_is_held_out(text: list[str]) -> None:
    words = set("\n".join(text).replace("'", " ").replace(",", " ").replace("(", " ").replace(")", " ").split())
    for split in ("validation", "test"):
        for row in rows("sql", split):
            if row["slice"] == "unseen_tables":
                names = row["schema"].replace("(", " ").replace(")", " ").replace(",", " ").split()
                assert words.isdisjoint(names)
            values = [part for part in row["sql"].split("'")[1::2] if " " not in part]
            assert words.isdisjoint(values)


def test_layer_0_starts_out_looking_one_token_back() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.1,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
    )
    model = LlamaForCausalLM(config)
    model.set_attn_implementation("eager")
    aim_attention(model, shared=5.0)
    attention = model(input_ids=torch.randint(50, (1, 12)), output_attentions=True).attentions[0].mean((0, 1))
    assert (attention[2:].argmax(-1) == torch.arange(1, 11)).all()


def test_failed_pretraining_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_model, "TOKENIZER_DOCUMENTS", 500)
    build = {"architecture": "llama", "seed": 1, "steps": 1, "copies": 0.6}
    with pytest.raises(UserError, match=r"^tiny: pre-training failed: .* raise 'steps' \(now 1\)") as caught:
        build_model.build_model(tmp_path / "tiny", build, threads=1)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "tiny").exists()
