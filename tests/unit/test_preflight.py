"""The preflight: what it finds of a family, and that each fault is one line that names model, check and change."""

import ast
import io
import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hub_server import HubServer
from tiny_models import FAMILIES, WithMask, make_base
from tokenizers_for_tests import real_tokenizer_folder

import preflight_model as stage
from qlora.errors import UserError
from qlora.files import read_json, write_json
from qlora.models import load_quantized
from qlora.render import IGNORED, Tokens, tokenized
from qlora.shrunken import shrunken_config, shrunken_model
from qlora.templates import Segment

torch.set_num_threads(1)
SCRIPTS = Path(__file__).parents[2] / "scripts"
# Which file names code on the hub, of a family that transformers knows for images alone or not at all.
NEEDING_CODE = {
    "config": ("config.json", "unheard-of", {"auto_map": {"AutoConfig": "owner/code--own.It"}}),
    "tokenizer": (
        "tokenizer_config.json",
        "vit",
        {"tokenizer_class": "It", "auto_map": {"AutoTokenizer": [None, "owner/code--own.It"]}},
    ),
    "network": ("config.json", "vit", {"auto_map": {"AutoModelForCausalLM": "owner/code--own.It"}}),
}


def preflight(folder: Path, family: str = "llama", **changed: Any) -> dict[str, Any]:
    """The report of a base in `folder`, or the error."""
    made = FAMILIES[family]
    given = {
        **{"form": made.form, "system": made.system, "with_system": False, "attention": made.attention},
        "targets": ["all-linear"],
    }
    report = folder.parent / "report.json"
    stage.preflight_model(model=folder, report=report, **{**given, **changed})
    return dict(read_json(report))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_base(tmp_path / "base")


def change_json(path: Path, **changed: Any) -> None:
    """Write keys of a JSON file anew."""
    write_json(path, {**read_json(path), **changed})


def with_template(folder: Path, template: str) -> Path:
    """Give the tokenizer of a base a chat template."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


def test_a_report_says_what_was_found(base: Path) -> None:
    found = preflight(base, targets=["all-linear", ["q_proj", "mlp.down_proj"]])
    assert 0 <= found.pop("packing difference") < stage.SAME
    assert found.pop("packing difference without positions") > stage.MIXED
    linear = "down_proj gate_proj k_proj o_proj q_proj up_proj v_proj".split()
    assert found == {
        **{"model": "base", "family": "llama", "class": "LlamaForCausalLM", "attention": "sdpa", "packs": True},
        **{"quantised modules": 14, "quantised names": linear, "system message": "template", "stop tokens": ["</s>"]},
        "targets": {"all-linear": linear, "q_proj, mlp.down_proj": ["down_proj", "q_proj"]},
    }


def test_the_weights_are_not_read_and_nothing_is_left_behind(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = base.parent / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    (base / "model.safetensors").unlink()
    assert preflight(base)["quantised modules"] == 14
    assert list(scratch.iterdir()) == []


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (["q_proj", "query"], "LoRA targets: 'query' finds no layer; set lora.target_modules of the recipe to all-linear or to some of down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"),
        (["lm_head"], "'lm_head' finds lm_head, which is not in 4 bits"),
        (["proj"], "'proj' finds no layer"),
        ("q_proj", "'q_proj' finds no layer"),
        (".*_projection", "'.*_projection' finds no layer"),
        (".*", "'.*' finds the whole model, which is not in 4 bits"),
        ([], "target_modules of a recipe names no module"),
        ("q_proj(", "'q_proj(': missing ), unterminated subpattern"),
    ],
)  # fmt: skip
def test_a_target_that_finds_nothing_or_what_is_not_in_4_bits_is_refused(base: Path, wanted: Any, message: str) -> None:
    with pytest.raises(
        UserError, match="^models.base: LoRA targets: .*" + re.escape(message).removeprefix("LoRA\\ targets:\\ ")
    ):
        preflight(base, targets=[wanted])
    assert not (base.parent / "report.json").exists()


def test_targets_are_looked_for_among_all_layers_of_the_whole_model() -> None:
    config = transformers.LlamaConfig(num_hidden_layers=32)
    network = torch.nn.Module()
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        network = load_quantized(
            shrunken_model(Path(folder), Path(folder) / "small"), stage.QUANTIZATION, "cpu", "sdpa"
        )
    modules = stage.all_modules(network, 32)
    assert stage.targets_found("m", r"model\.layers\.(30|31)\.self_attn\.[qv]_proj", modules) == [
        "q_proj",
        "v_proj",
    ]
    assert stage.targets_found("m", ["layers.17.mlp.up_proj"], modules) == ["up_proj"]
    with pytest.raises(UserError, match="finds no layer"):
        stage.targets_found("m", ["layers.32.mlp.up_proj"], modules)


def test_a_family_that_mixes_packed_documents_is_no_failure(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "qlora")
    found = preflight(make_base(tmp_path / "falcon", "falcon"), "falcon")
    assert not found["packs"]
    assert found["packing difference"] > stage.MIXED
    assert "falcon: packed documents see each other" in caplog.text


def test_a_mask_of_ones_lets_packed_documents_see_each_other(base: Path) -> None:
    network = stage.shrunken_network(base, "sdpa")
    assert stage.packing_difference(network) < stage.SAME
    assert stage.packing_difference(WithMask(network)) > stage.MIXED
    assert stage.packing_difference(network, positions=False) > stage.MIXED


def test_documents_count_as_apart_only_where_the_check_could_have_seen_them_mix(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "packing_difference", lambda network, positions=True: 0.0)
    assert not preflight(base)["packs"]


TURN = "{% for message in messages %}{{ '[' + message.role + ']' + message.content }}"
STOPS = "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
ASKS = "{% if add_generation_prompt %}[assistant]{% endif %}"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "template: .*has no chat template"),
        ("{{ raise_exception('never') }}", "template: .*refuses the roles user.*never"),
        ("{{ messages[-1].content + eos_token }}", "template: .*"),
        (TURN + "{% endfor %}" + ASKS, "template: .*writes no stop token after an answer"),
        (TURN + "{% if message.role == 'assistant' %} Amen.{{ eos_token }}{% endif %}{% endfor %}" + ASKS, "labels: of the answers"),
    ],
)  # fmt: skip
def test_a_template_that_teaches_the_wrong_text_is_refused(base: Path, template: str | None, message: str) -> None:
    if template:
        with_template(base, template)
    with pytest.raises(UserError, match=f"^models.base: ({message}).*; set models.base.format to a named format$"):
        preflight(base, form=None)


@pytest.mark.parametrize(
    ("faulty", "message"),
    [
        ({"stop_ids": lambda *_: {5}}, "stop token: an answer ends in '</s>', at which generation does not stop"),
        ({"rows_of": lambda *_: [[Segment("What colour is grass?", False), Segment(" It is</s>", True)]]}, "template: drops the assistant message 'It is green.'"),
        ({"rows_of": lambda *_: [[Segment("What colour is grass? It is green.</s>", True)]]}, r"labels: of the answers \['It is green.'\] the learned text is \['What"),
        ({"tokenized": lambda *given: doubled(tokenized(*given))}, "BOS: '<s>' stands in a row more often than its template writes it"),
    ],
)  # fmt: skip
def test_rows_that_teach_the_wrong_tokens_are_refused(
    base: Path, faulty: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in faulty.items():
        monkeypatch.setattr(stage, name, value)
    with pytest.raises(UserError, match=f"^models.base: {message}"):
        preflight(base)


def doubled(row: Tokens) -> Tokens:
    """The row with its BOS twice."""
    return Tokens([row.input_ids[0], *row.input_ids], [IGNORED, *row.labels], row.apart)


def test_a_template_may_refuse_a_system_message_unless_a_dataset_has_one(tmp_path: Path) -> None:
    base = make_base(tmp_path / "gemma", "gemma-it")
    assert preflight(base, "gemma-it")["system message"] == "user"
    assert preflight(base, "gemma-it", system="template")["system message"] == "refused"
    with pytest.raises(UserError, match=r"^models\.gemma: system message: .*set models\.gemma\.system to user$"):
        preflight(base, "gemma-it", system="template", with_system=True)


def test_a_template_that_drops_the_system_message_is_refused(base: Path) -> None:
    with_template(
        base, "{% for message in messages if message.role != 'system' %}" + TURN.partition("%}")[2] + STOPS + ASKS
    )
    assert preflight(base, form=None)["system message"] == "refused"
    assert preflight(base, form=None, system="user", with_system=True)["system message"] == "user"
    wanted = r"^models\.base: system message: its chat template drops the system message '.*'; set models\.base\.system to user$"
    with pytest.raises(UserError, match=wanted):
        preflight(base, form=None, with_system=True)


def test_a_token_beyond_the_embedding_is_refused(base: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens([f"<image{number}>" for number in range(100)])
    tokenizer.save_pretrained(base)
    preflight(base)  # which nothing writes
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "vocab_size": 256}))
    wanted = r"^models\.base: tokenizer: '.+' has the id \d+, and the embedding 256 rows; name a source"
    with pytest.raises(UserError, match=wanted):
        preflight(base)


def test_an_attention_that_the_family_lacks_is_refused(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "gemma2")
    with pytest.raises(
        UserError, match=r"^models\.base: attention: its family has no 'sdpa'; set models\.base\.attention to eager$"
    ):
        preflight(base, "gemma2", attention="sdpa")


def test_a_family_whose_experts_stay_unquantised_is_refused(base: Path) -> None:
    sizes = transformers.AutoConfig.from_pretrained(base).to_dict()
    transformers.MixtralConfig(**{**sizes, "head_dim": None}).save_pretrained(base)
    wanted = r"^models\.base: quantisation: its experts \(model\.layers\.0\..+\) would stay out of 4 bits; name a model without"
    with pytest.raises(UserError, match=wanted):
        preflight(base)


def test_a_family_that_scales_its_logits_is_refused(base: Path) -> None:
    config = transformers.GraniteConfig(**transformers.AutoConfig.from_pretrained(base).to_dict(), logits_scaling=4.0)
    config.save_pretrained(base)
    with pytest.raises(UserError, match=r"^models\.base: loss: granite: this family scales its logits"):
        preflight(base)


def test_a_loss_that_is_not_of_the_models_logits_is_refused(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qlora.loss._tile_nll", lambda hidden, wanted, head, softcap: head(hidden).sum())
    with pytest.raises(UserError, match=r"^models\.base: loss: is .*by the model's logits"):
        preflight(base)


def test_a_family_of_which_nothing_is_quantised_is_refused(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(folder: Path, *_: Any) -> None:
        raise UserError(f"{folder}: no layer was quantised to 4 bits")

    monkeypatch.setattr(stage, "load_quantized", refuse)
    wanted = r"^models\.base: quantisation: its small copy: no layer was quantised to 4 bits; name another model"
    with pytest.raises(UserError, match=wanted):
        preflight(base)


def test_an_unknown_family_is_refused(base: Path) -> None:
    (base / "config.json").write_text('{"model_type": "unheard-of"}')
    wanted = r"base: no config of a family that transformers knows \(.*unheard-of.*\); name another model in models\.base\.source$"
    with pytest.raises(UserError, match=wanted):
        preflight(base)


@pytest.mark.parametrize(("file", "family", "changed"), NEEDING_CODE.values(), ids=NEEDING_CODE.keys())
def test_code_that_comes_with_a_model_is_neither_asked_about_nor_fetched(
    base: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch, file: str, family: str, changed: dict[str, Any]
) -> None:
    hub.add("owner/code", {"own.py": b"raise SystemExit('this ran')"})
    change_json(base / "config.json", model_type=family)
    change_json(base / file, **changed)
    answers = io.StringIO("y\ny\n")
    monkeypatch.setattr("sys.stdin", answers)
    with pytest.raises(UserError) as caught:
        preflight(base)
    assert str(caught.value) == (
        f"{base}: its architecture needs code that comes with it; name a model of a family that transformers knows in"
        " models.base.source, or read that code and, if you trust it, add its commit as `remote_code`"
    )
    assert answers.tell() == 0, "asked on the terminal"
    assert not hub.requests


def test_a_family_that_transformers_knows_needs_no_code_that_its_files_name(base: Path, hub: HubServer) -> None:
    change_json(
        base / "config.json", auto_map=dict.fromkeys(("AutoConfig", "AutoModelForCausalLM"), "owner/code--own.It")
    )
    change_json(base / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "owner/code--own.It"]})
    assert preflight(base)["class"] == "LlamaForCausalLM"
    assert not hub.requests


def test_everything_is_loaded_with_the_rule_about_code() -> None:
    direct = [
        f"{path.name}:{node.lineno}"
        for path in SCRIPTS.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and re.match(r"Auto(Config|Tokenizer|Model\w*)\.from_\w+$", ast.unparse(node.func))
    ]
    assert not direct, "these calls go past qlora.pretrained.loaded"


@pytest.mark.parametrize(
    ("tokenizer", "family"), [("llama2", "llama2"), ("mistral-v1", "mistral"), ("falcon", "falcon"), ("gpt2", "phi-2")]
)
def test_real_tokenizers_with_the_real_sizes_of_their_models_pass(tokenizer: str, family: str, tmp_path: Path) -> None:
    folder = tmp_path / tokenizer
    shutil.copytree(real_tokenizer_folder(tokenizer), folder)
    REAL_SIZES[family].save_pretrained(folder)
    found = preflight(folder, family, with_system=True)
    assert found["packs"] == (family != "falcon")
    assert found["stop tokens"] == ["<|endoftext|>" if tokenizer in ("falcon", "gpt2") else "</s>"]


REAL_SIZES = {
    "llama2": transformers.LlamaConfig(),
    "llama3": transformers.LlamaConfig(
        vocab_size=128256, num_key_value_heads=8, max_position_embeddings=131072,
        rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
                         "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
    ),
    "mistral": transformers.MistralConfig(),
    "gemma": transformers.GemmaConfig(hidden_size=2048, num_attention_heads=8, num_key_value_heads=1, head_dim=256),
    "gemma2": transformers.Gemma2Config(),
    "gemma3": transformers.Gemma3TextConfig(hidden_size=1152, num_attention_heads=4, num_key_value_heads=1),
    "falcon": transformers.FalconConfig(),
    "phi-2": transformers.PhiConfig(hidden_size=2560, intermediate_size=10240, num_hidden_layers=32, partial_rotary_factor=0.4),
    "phi3": transformers.Phi3Config(),
    "phi3-longrope": transformers.Phi3Config(
        rope_parameters={"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 48, "long_factor": [2.0] * 48,
                         "original_max_position_embeddings": 4096},
    ),
    "qwen2.5": transformers.Qwen2Config(vocab_size=152064),
    "qwen3": transformers.Qwen3Config(),
}  # fmt: skip


@pytest.mark.parametrize("family", REAL_SIZES)
def test_a_config_is_shrunken_with_all_that_makes_the_family(family: str) -> None:
    whole = REAL_SIZES[family]
    small = shrunken_config(whole)
    assert type(small) is type(whole)
    assert small.num_hidden_layers == 2
    assert small.hidden_size <= 320
    width = getattr(whole, "head_dim", None) or whole.hidden_size // whole.num_attention_heads
    assert (getattr(small, "head_dim", None) or small.hidden_size // small.num_attention_heads) == width
    assert small.hidden_size % 64 == small.num_attention_heads * width % 64 == 0
    changed = {key for key, value in small.to_dict().items() if value != whole.to_dict()[key]}
    assert changed <= {
        *("hidden_size", "intermediate_size", "ffn_hidden_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "num_kv_heads", "initializer_range", "layer_types"),
    }
    if getattr(whole, "num_key_value_heads", None):
        grouped = whole.num_key_value_heads < whole.num_attention_heads
        assert (small.num_key_value_heads < small.num_attention_heads) == grouped
    assert len(set(getattr(small, "layer_types", None) or [])) == len(set(getattr(whole, "layer_types", None) or []))
    with torch.device("meta"):
        network = transformers.AutoModelForCausalLM.from_config(small)
    assert network.num_parameters() < 90e6


def test_configs_inside_a_config_are_shrunken_too(tmp_path: Path) -> None:
    small = shrunken_config(transformers.Gemma3Config())
    assert small.text_config.num_hidden_layers == small.vision_config.num_hidden_layers == 2
    assert small.text_config.vocab_size == transformers.Gemma3Config().text_config.vocab_size
    assert small.text_config.layer_types == ["sliding_attention", "full_attention"]


def test_a_model_that_stays_large_is_refused(tmp_path: Path) -> None:
    transformers.LlamaConfig(vocab_size=600_000, head_dim=128).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"a 'llama' of 2 narrow layers still has \d\d\d,\d+,\d+ weights"):
        shrunken_model(tmp_path, tmp_path / "small")


def test_a_shrunken_copy_is_the_same_each_time_and_leaves_the_random_state_alone(base: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    shrunken_model(base, tmp_path / "one")
    assert torch.equal(torch.rand(3), expected)
    shrunken_model(base, tmp_path / "two")
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two
