"""A merged model answers as the dequantised base with its adapter does, for every family."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny_models import FAMILIES, QUANTIZATION, SETTINGS, make_base
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from merge_adapter import merge_adapter, merged_network
from qlora.adapters import lora_config
from qlora.models import load_quantized

torch.set_num_threads(1)

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


@torch.no_grad()
def logits(network: PreTrainedModel | PeftModel) -> torch.Tensor:
    ids = torch.arange(3, 40)[None]
    return network.eval()(input_ids=ids, use_cache=False).logits.float()


def share(difference: torch.Tensor, of: torch.Tensor) -> float:
    """Root mean square of a difference over that of the logits."""
    return float(difference.square().mean().sqrt() / of.square().mean().sqrt())


def check(base: Path, adapter: Path, folder: Path, attention: str) -> None:
    tuned = PeftModel.from_pretrained(load_quantized(base, QUANTIZATION, "cpu", attention), adapter)
    wanted = logits(tuned)
    plain = logits(load_quantized(base, QUANTIZATION, "cpu", attention))
    assert share(wanted - plain, wanted) > 4 * BF16  # the adapter changes more than rounding does
    inside = merged_network(base, adapter, QUANTIZATION, attention, "cpu")
    assert share(logits(inside) - wanted, wanted) < FP32
    merge_adapter(base, adapter, folder, QUANTIZATION, attention, "cpu")
    whole = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention)
    assert whole.dtype == torch.bfloat16
    assert not hasattr(whole.config, "quantization_config")
    assert share(logits(whole) - wanted, wanted) < BF16
    for name, weight in inside.state_dict().items():
        assert torch.equal(whole.state_dict()[name], weight.to(torch.bfloat16)), name
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == AutoTokenizer.from_pretrained(base).get_vocab()


@pytest.mark.parametrize("family", ONE_A_CLASS)
def test_merged_logits_are_those_of_the_dequantised_base_with_its_adapter(family: str, tmp_path: Path) -> None:
    base, attention = make_base(tmp_path / "base", family), FAMILIES[family].attention
    check(base, make_adapter(base, tmp_path / "adapter", attention), tmp_path / "merged", attention)


@pytest.mark.parametrize("variant", [{"rslora": True}, {"dora": True}, {"target_modules": ["q_proj", "down_proj"]}])
def test_variants_of_lora_merge_too(variant: dict[str, Any], tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    check(base, make_adapter(base, tmp_path / "adapter", "sdpa", **variant), tmp_path / "merged", "sdpa")
