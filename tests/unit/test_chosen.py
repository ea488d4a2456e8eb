"""How training is computed is said, and where a faster path does not apply, why: each reason, without a GPU."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_models import FAMILIES, QUANTIZATION, SETTINGS, SIZES, make_base, make_rows, make_tokens

from qlora import fp8
from qlora.errors import UserError
from qlora.packed_attention import why_not_packed
from qlora.training import Job, make_trainer, why_no_graph

GPU = torch.device("cuda")
HALF = {**QUANTIZATION, "compute_dtype": "bfloat16"}


def config_of(family: str = "llama", attention: str = "sdpa", **changes: Any) -> transformers.PreTrainedConfig:
    """A family's config, as a network loaded with this attention has it."""
    made = FAMILIES[family]
    return made.config(**{**SIZES, **made.sizes, **changes}, attn_implementation=attention)


def job_of(
    base: Path = Path(), tokens: Path = Path(), folder: Path = Path(), device: str = "cuda", **changes: Any
) -> Job:
    """A job with the tests' recipe, changed so."""
    settings = {**SETTINGS, "quantization": HALF, **changes}
    return Job(base, tokens, settings, 1, "sdpa", device, "packed", folder / "run", str(folder / "tensorboard"))


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A card of compute capability 9.0, as far as is asked."""
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda *_: (9, 0))
    return monkeypatch


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize(
    ("config", "dtype", "reason"),
    [
        (config_of("falcon"), torch.bfloat16, "falcon is not among its families"),
        (config_of("gemma2", "eager"), torch.bfloat16, "gemma2 is not among its families"),
        (config_of(attention="eager"), torch.bfloat16, "it stands in for sdpa, not for eager"),
        (config_of(attention_dropout=0.1), torch.bfloat16, "it has no dropout, and the base asks for 0.1"),
        (config_of(hidden_size=48), torch.bfloat16, "it takes heads of 8, 16, … 256, not of 12"),
        (config_of("gemma", head_dim=512), torch.bfloat16, "it takes heads of 8, 16, … 256, not of 512"),
        (config_of(), torch.float32, "it takes bfloat16 and float16, not float32"),
        (config_of(), torch.bfloat16, None),
        (config_of("gemma", head_dim=256), torch.float16, None),
    ],
)
def test_where_rows_are_not_taken_apart_there_is_a_reason(
    config: transformers.PreTrainedConfig, dtype: torch.dtype, reason: str | None
) -> None:
    assert why_not_packed(config, dtype, GPU) == reason


def test_an_old_card_or_none_is_a_reason_too(card: pytest.MonkeyPatch) -> None:
    assert why_not_packed(config_of(), torch.bfloat16, torch.device("cpu")) == "there is no GPU"
    card.setattr("torch.cuda.get_device_capability", lambda *_: (7, 5))
    reason = "it needs compute capability 8.0, and the card has 7.5"
    assert why_not_packed(config_of(), torch.float16, GPU) == reason
    card.setattr("torch.cuda.get_device_capability", lambda *_: (8, 0))
    assert why_not_packed(config_of(), torch.float16, GPU) is None


@pytest.mark.parametrize(
    ("job", "config", "why_masks", "random", "reason"),
    [
        (job_of(device="cpu"), config_of(), "there is no GPU", False, "there is no GPU"),
        (
            *(job_of(), config_of("falcon"), "falcon is not among its families", False),
            "without FlashAttention batches have no fixed shape (falcon is not among its families)",
        ),
        (
            *(job_of(), config_of(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})),
            *(None, False, "its rotary positions depend on lengths, for which it waits"),
        ),
        (
            *(job_of(quantization={**QUANTIZATION, "compute_dtype": "float16"}), config_of(), None, False),
            "float16 needs its loss scaled step by step",
        ),
        (
            *(job_of(lorentzian={"weight": 0.1, "gamma": 1.0}), config_of(), None, False),
            "the penalty depends on the micro-steps of a step",
        ),
        (
            *(job_of(checkpointing=True), config_of(), None, True),
            "dropout of PEFT or the base, with checkpointing, restores random numbers",
        ),
        (job_of(checkpointing=True), config_of(), None, False, None),
        (job_of(), config_of("llama3"), None, True, None),
    ],
)
def test_where_steps_are_not_recorded_there_is_a_reason(
    job: Job, config: transformers.PreTrainedConfig, why_masks: str | None, random: bool, reason: str | None
) -> None:
    assert why_no_graph(job, config, why_masks, random) == reason


@pytest.mark.parametrize(
    ("family", "lora", "fused"),
    [
        ("llama", {}, "fused LoRA: 14 layers, 2 gated MLPs whole"),
        ("falcon", {}, "fused LoRA: 8 layers, no MLP whole (of a kind that is not covered)"),
        ("llama", {"dora": True}, "fused LoRA: none, PEFT's own computation (a variant of LoRA)"),
    ],
)
def test_on_a_cpu_each_choice_has_its_reason(family: str, lora: dict[str, Any], fused: str, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", family)
    tokens = make_tokens(tmp_path, base, make_rows(tmp_path), family)
    trainer = make_trainer(job_of(base, tokens, tmp_path, "cpu", lora={**SETTINGS["lora"], **lora}))
    assert trainer.chosen == [
        "attention: sdpa, no FlashAttention (there is no GPU)",
        "no Liger kernels, there is no GPU",
        fused,
        "no CUDA graphs: there is no GPU",
    ]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "whole, adapters added to the weights"),
        ({"learning_rate": 4e-5}, "whole, adapters beside the weights (a learning rate below 5e-05)"),
        ({"learning_rate": 4e-5, "lora": {**SETTINGS["lora"], "dropout": 0.1}}, "whole, dropout 0.1 with one mask"),
    ],
)
def test_small_steps_are_not_rounded_away_with_a_weight(
    changes: dict[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qlora.fused_lora.can_add", lambda weight: True)
    base = make_base(tmp_path / "base")
    tokens = make_tokens(tmp_path, base, make_rows(tmp_path))
    job = job_of(base, tokens, tmp_path, "cpu", **{"learning_rate": 5e-5, **changes})
    assert said in make_trainer(job).chosen[2]


@pytest.mark.parametrize(
    ("device", "capability", "triton"), [("cpu", (9, 0), True), ("cuda", (8, 0), True), ("cuda", (9, 0), False)]
)
def test_fp8_is_refused_without_a_card_that_has_it(
    device: str, capability: tuple[int, int], triton: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda *_: capability)
    monkeypatch.setattr(fp8, "fp8_triton", object() if triton else None)
    with pytest.raises(UserError) as error:
        fp8.check_card(device)
    assert str(error.value) == ("recipe: fp8 needs an NVIDIA card of compute capability 9.0 or newer; set fp8: false")


@pytest.mark.usefixtures("card")
def test_fp8_is_taken_where_the_card_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8, "fp8_triton", object())
    fp8.check_card("cuda")


def test_a_recipe_in_fp8_is_refused_before_anything_is_loaded() -> None:
    with pytest.raises(UserError, match="fp8 needs an NVIDIA card"):
        make_trainer(job_of(device="cpu", fp8=True))
