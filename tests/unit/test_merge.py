"""A merged model answers as the dequantised base with its adapter does, for every family, in the memory of a shard."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, QUANTIZATION, SETTINGS, make_base
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, MixtralConfig, PreTrainedModel

from merge import watched
from merge_adapter import merge_adapter
from qlora.adapters import lora_config
from qlora.errors import UserError
from qlora.files import read_json
from qlora.models import load_quantized
from qlora.streamed import dequantized_weights, mapped_network, tuned_network

torch.set_num_threads(1)

SCRIPTS = Path(__file__).parents[2] / "scripts"
FP32 = 1e-5  # root mean square of the difference over that of the logits: sums in another order
BF16 = 0.05  # weights and activations are rounded to 8 bits
ONE_A_CLASS = sorted({family.config.model_type: name for name, family in FAMILIES.items()}.values())


def make_adapter(base: Path, folder: Path, attention: str, **variant: Any) -> Path:
    """An adapter whose B is not zero, so that it changes every layer that it is on."""
    plain = load_quantized(base, QUANTIZATION, "cpu", attention)
    torch.manual_seed(1)
    network = get_peft_model(plain, lora_config({**SETTINGS["lora"], **variant}))
    for name, weight in network.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight.data, std=0.1)
    network.save_pretrained(str(folder))
    return folder


def merged_network(base: Path, adapter: Path, quantization: dict[str, Any], attention: str) -> PreTrainedModel:
    """The slow, plain way: the whole base dequantised, and the adapter merged into all of it at once."""
    network = load_quantized(base, quantization, "cpu", attention).dequantize()
    return PeftModel.from_pretrained(network, adapter).merge_and_unload(safe_merge=True)


@torch.no_grad()
def logits(network: PreTrainedModel | PeftModel) -> torch.Tensor:
    ids = torch.arange(3, 40)[None]
    return network.eval()(input_ids=ids, use_cache=False).logits.float()


def share(difference: torch.Tensor, of: torch.Tensor) -> float:
    """Root mean square of a difference over that of the logits."""
    return float(difference.square().mean().sqrt() / of.square().mean().sqrt())


def check(base: Path, adapter: Path, folder: Path, attention: str, shard_bytes: int = 10**9) -> None:
    tuned = PeftModel.from_pretrained(load_quantized(base, QUANTIZATION, "cpu", attention), adapter)
    wanted = logits(tuned)
    assert torch.equal(logits(tuned_network(base, adapter, QUANTIZATION, "cpu", attention)), wanted)
    plain = logits(load_quantized(base, QUANTIZATION, "cpu", attention))
    assert share(wanted - plain, wanted) > 4 * BF16  # the adapter changes more than rounding does
    inside = merged_network(base, adapter, QUANTIZATION, attention)
    assert share(logits(inside) - wanted, wanted) < FP32
    merge_adapter(base, adapter, folder, QUANTIZATION, attention, "cpu", shard_bytes)
    whole = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention)
    assert whole.dtype == torch.bfloat16
    assert not hasattr(whole.config, "quantization_config")
    assert share(logits(whole) - wanted, wanted) < BF16
    for name, weight in inside.state_dict().items():
        assert torch.equal(whole.state_dict()[name], weight.to(torch.bfloat16)), name
    told, found = read_json(folder / "merge.json")["drift"], logits(whole)
    assert 0 < told["rms"] < BF16
    assert told["same next token"] > 0.9
    assert told["tokens"] > 50
    assert share(found - wanted, wanted) < BF16
    assert torch.equal(logits(mapped_network(folder, attention)), found)
    words, merged_words = (AutoTokenizer.from_pretrained(path) for path in (base, folder))
    assert merged_words.get_vocab() == words.get_vocab()
    assert merged_words.chat_template == words.chat_template


@pytest.mark.parametrize("family", ONE_A_CLASS)
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_weights_come_out_one_at_a_time_as_the_whole_base_dequantises(
    family: str, precision: str, tmp_path: Path
) -> None:
    base, quantization = make_base(tmp_path / "base", family), {**QUANTIZATION, "compute_dtype": precision}
    whole = load_quantized(base, quantization, "cpu", FAMILIES[family].attention).dequantize()
    found = dict(dequantized_weights(base, quantization, "cpu"))
    assert whole.state_dict().keys() - found.keys() == whole.all_tied_weights_keys.keys()
    for name, weight in found.items():
        assert weight.dtype == whole.state_dict()[name].dtype
        assert torch.equal(weight, whole.state_dict()[name]), name


@pytest.mark.parametrize("quantization", [{"type": "fp4"}, {"double": False}])
def test_weights_are_rounded_as_the_recipe_says(quantization: dict[str, Any], tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    whole = load_quantized(base, {**QUANTIZATION, **quantization}, "cpu", "sdpa").dequantize().state_dict()
    found = dict(dequantized_weights(base, {**QUANTIZATION, **quantization}, "cpu"))
    assert all(torch.equal(weight, whole[name]) for name, weight in found.items())
    assert any(not torch.equal(weight, found[name]) for name, weight in dequantized_weights(base, QUANTIZATION, "cpu"))


@pytest.mark.parametrize("family", ONE_A_CLASS)
def test_merged_logits_are_those_of_the_dequantised_base_with_its_adapter(family: str, tmp_path: Path) -> None:
    base, attention = make_base(tmp_path / "base", family), FAMILIES[family].attention
    check(base, make_adapter(base, tmp_path / "adapter", attention), tmp_path / "merged", attention)


@pytest.mark.parametrize("variant", [{"rslora": True}, {"dora": True}, {"target_modules": ["q_proj", "down_proj"]}])
def test_variants_of_lora_merge_too(variant: dict[str, Any], tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    check(base, make_adapter(base, tmp_path / "adapter", "sdpa", **variant), tmp_path / "merged", "sdpa")


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_take_the_place_of_the_bases_own(bias: str, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "qwen2.5")
    adapter = make_adapter(base, tmp_path / "adapter", "sdpa", bias=bias)
    weights = load_file(adapter / "adapter_model.safetensors")
    biases = {name: weight + 0.5 for name, weight in weights.items() if name.endswith(".bias")}
    assert biases
    save_file({**weights, **biases}, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    check(base, adapter, tmp_path / "merged", "sdpa")


def test_shards_are_no_larger_than_asked_and_their_index_finds_each_weight(tmp_path: Path) -> None:
    base, limit = make_base(tmp_path / "base"), 60_000
    check(base, make_adapter(base, tmp_path / "adapter", "sdpa"), tmp_path / "merged", "sdpa", limit)
    files = sorted((tmp_path / "merged").glob("*.safetensors"))
    assert [file.name for file in files] == [
        f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)
    ]
    assert len(files) > 3
    held = {file.name: load_file(file) for file in files}
    assert all(sum(weight.nbytes for weight in weights.values()) <= limit for weights in held.values())
    places = read_json(tmp_path / "merged" / "model.safetensors.index.json")["weight_map"]
    assert places == {name: file for file, weights in held.items() for name in weights}


def test_a_base_in_several_files_is_read_from_all_of_them(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    wanted = dict(dequantized_weights(base, QUANTIZATION, "cpu"))
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(tmp_path / "parts", max_shard_size="60KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 3
    found = dict(dequantized_weights(tmp_path / "parts", QUANTIZATION, "cpu"))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(weight, found[name]) for name, weight in wanted.items())


def test_a_family_whose_weights_are_put_together_while_loading_is_refused_by_name(tmp_path: Path) -> None:
    config = MixtralConfig(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1)
    config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="weights of the family mixtral are changed while they are loaded"):
        next(dequantized_weights(tmp_path, QUANTIZATION, "cpu"))


def test_a_weight_that_is_in_no_file_is_named(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"the weight model\.norm\.weight is in none of its files"):
        list(dequantized_weights(base, QUANTIZATION, "cpu"))


def test_an_adapter_without_a_matrix_is_refused(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    file = make_adapter(base, tmp_path / "adapter", "sdpa") / "adapter_model.safetensors"
    weights = {name: weight for name, weight in load_file(file).items() if "layers.1.mlp.up_proj.lora_B" not in name}
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"has no lora_B\.default\.weight for one of its layers"):
        merge_adapter(base, tmp_path / "adapter", tmp_path / "merged", QUANTIZATION, "sdpa", "cpu")
    assert not (tmp_path / "merged").exists()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_gpu_merges_as_the_cpu_does(dtype: str, tmp_path: Path) -> None:
    same = {**QUANTIZATION, "compute_dtype": dtype}
    base = make_base(tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter", "sdpa")
    for device in ("cpu", "cuda"):
        merge_adapter(base, adapter, tmp_path / device, same, "sdpa", device)
    found, expected = (load_file(tmp_path / device / "model.safetensors") for device in ("cuda", "cpu"))
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=2**-7, atol=1e-4)  # a sum in another order, rounded
    assert read_json(tmp_path / "cuda/merge.json")["drift"]["rms"] < BF16


@pytest.mark.slow
def test_memory_grows_by_about_a_shard_however_large_the_model(tmp_path: Path) -> None:
    shard, peaks = 40 * 2**20, {}
    for layers in (1, 20):
        base, adapter, merged = (tmp_path / f"{kind}-{layers}" for kind in ("base", "adapter", "merged"))
        make_base(base)
        sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": layers, "vocab_size": 2048}
        torch.manual_seed(0)
        network = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, num_attention_heads=16), dtype=torch.bfloat16)
        (base / "model.safetensors").unlink()
        network.save_pretrained(base, max_shard_size=shard)
        size = sum(weight.nbytes for weight in network.state_dict().values())
        get_peft_model(network, lora_config(SETTINGS["lora"])).save_pretrained(str(adapter))
        given = {"model": base, "adapter": adapter, "merged": merged, "quantization": json.dumps(QUANTIZATION)}
        given |= {"attention": "sdpa", "device": "cpu", "shard-bytes": shard}
        options = [text for name, value in given.items() for text in (f"--{name}", str(value))]
        peaks[layers] = watched([sys.executable, str(SCRIPTS / "merge_adapter.py"), *options], tmp_path / "log")
    grown = (peaks[20]["anonymous GiB"] - peaks[1]["anonymous GiB"]) * 2**30
    # A shard that is written, and copies of the weight at work; the base in 4 bits would be three shards.
    assert grown < 2 * shard < size / 6, peaks
