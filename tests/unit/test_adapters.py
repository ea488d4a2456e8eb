"""The variants of LoRA: each does what it is named for."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraModel, get_peft_model
from tiny_models import QUANTIZATION, SETTINGS, make_base
from transformers import AutoModelForCausalLM

from qlora.adapters import lora_config, loraplus_optimizer, lorentzian_penalty, start_from_rounding
from qlora.models import load_quantized

IDS = torch.arange(3, 40)[None]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("adapters") / "base")


def adapted(base: Path, **changes: Any) -> Any:
    """A quantised model with an untrained adapter."""
    torch.manual_seed(0)
    return get_peft_model(
        load_quantized(base, QUANTIZATION, "cpu", "sdpa"), lora_config({**SETTINGS["lora"], **changes})
    )


def first_layer(network: Any) -> Any:
    return next(module for module in network.modules() if hasattr(module, "lora_A"))


def test_rslora_scales_by_the_root_of_the_rank(base: Path) -> None:
    assert first_layer(adapted(base)).scaling["default"] == 8 / 4
    assert first_layer(adapted(base, rslora=True)).scaling["default"] == 8 / math.sqrt(4)


def test_dora_trains_magnitudes_too_and_starts_as_the_base(base: Path) -> None:
    network = adapted(base, dora=True)
    assert any("magnitude" in name for name, weight in network.named_parameters() if weight.requires_grad)
    with network.disable_adapter():
        expected = network(input_ids=IDS).logits
    torch.testing.assert_close(network(input_ids=IDS).logits, expected, atol=1e-4, rtol=1e-4)


def test_gaussian_start_differs_from_the_default_and_changes_nothing_yet(base: Path) -> None:
    plain, gaussian = adapted(base), adapted(base, init="gaussian")
    assert not torch.equal(first_layer(plain).lora_A["default"].weight, first_layer(gaussian).lora_A["default"].weight)
    assert not first_layer(gaussian).lora_B["default"].weight.any()


@pytest.mark.parametrize("alpha", [16, 64])
def test_loftq_brings_the_quantised_model_nearer_to_the_unquantised_one(base: Path, alpha: int) -> None:
    exact = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)(input_ids=IDS).logits
    plain, corrected = adapted(base, r=16, alpha=alpha), adapted(base, r=16, alpha=alpha, init="loftq")
    start_from_rounding(corrected, base)
    before = (plain(input_ids=IDS).logits - exact).norm()
    after = (corrected(input_ids=IDS).logits - exact).norm()
    assert after < 0.9 * before


def test_loraplus_gives_b_a_higher_rate(base: Path) -> None:
    network = adapted(base)
    optimizer = loraplus_optimizer(network, torch.optim.AdamW, {"lr": 1e-3}, 16.0, 0.0)
    rates = {id(weight): group["lr"] for group in optimizer.param_groups for weight in group["params"]}
    for name, weight in network.named_parameters():
        if weight.requires_grad:
            assert rates[id(weight)] == pytest.approx(16e-3 if "lora_B" in name else 1e-3), name


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=6), st.floats(0.1, 3))
@settings(deadline=None, max_examples=50)
def test_the_lorentzian_penalty_is_its_formula(values: list[float], gamma: float) -> None:
    weights = [torch.tensor(values, dtype=torch.float64), torch.tensor([[2.0]], dtype=torch.float64)]
    expected = sum(math.log(1 + (value / gamma) ** 2) for value in [*values, 2.0])
    assert float(lorentzian_penalty(weights, gamma)) == pytest.approx(expected)


def test_the_lorentzian_penalty_pulls_most_at_gamma() -> None:
    weight = torch.linspace(0, 4, 401, requires_grad=True)
    lorentzian_penalty([weight], 1.5).backward()
    assert weight.grad is not None
    assert float(weight[weight.grad.argmax()]) == pytest.approx(1.5, abs=0.02)
    assert float(weight.grad[0]) == 0.0


def test_just_the_named_modules_get_an_adapter(base: Path) -> None:
    network = adapted(base, target_modules=["q_proj", "down_proj"])
    assert isinstance(network.base_model, LoraModel)
    assert sum(hasattr(module, "lora_A") for module in network.modules()) == 2 * 2
