"""What checkpointing computes again is what it was: with a base that drops, and a head that learns."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from test_training import ALL, Bench, close, first_step
from tiny_models import FAMILIES, FORM, SETTINGS, Family, make_base, make_rows, make_tokens

from qlora.loss import summed_nll
from qlora.training import drops

BIASES = {"lora": {**SETTINGS["lora"], "bias": "all"}}
OPT = Family(transformers.OPTConfig, {"ffn_dim": 128, "word_embed_proj_dim": 64, "init_std": 0.2}, form=FORM)


@pytest.mark.parametrize(
    ("family", "base", "change"),
    [
        ("phi-2", {"resid_pdrop": 0.1}, {}),
        ("phi-2", {"resid_pdrop": 0.1}, BIASES),
        ("falcon", {"hidden_dropout": 0.1}, {}),
        ("opt", {"dropout": 0.1}, {}),
    ],
    ids=["modules", "biases", "falcon", "opt"],
)
def test_a_base_that_drops_or_learns_biases_is_recomputed_as_it_was(
    family: str, base: dict[str, Any], change: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Phi-2 drops in modules, and has biases, the head's too; Falcon and OPT call functions."""
    if family == "opt":
        family = "falcon"  # whose tokenizer serves
        monkeypatch.setitem(FAMILIES, family, OPT)
    bench = Bench.__new__(Bench)
    bench.root, bench.base = tmp_path, make_base(tmp_path / "base", family, **base)
    bench.tokens = make_tokens(tmp_path, bench.base, make_rows(tmp_path, train=8), family)
    found = []
    for checkpointing in (False, True):
        trainer = bench.trainer(**ALL, batch_size=8, checkpointing=checkpointing, **change)
        torch.manual_seed(5)
        _, gradients = first_step(trainer)
        found.append(gradients)
        assert len(gradients) == len(trainer.trainable())
        names = [name for name, weight in trainer.model.named_parameters() if weight.requires_grad]
        biases = [gradient for name, gradient in zip(names, gradients, strict=True) if name.endswith("bias")]
        assert len(biases) == (16 if change else 0)
        assert all(float(gradient.abs().max()) > 0 for gradient in biases)
    close(*found)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (transformers.LlamaConfig(), False),
        (transformers.PhiConfig(), False),
        (transformers.LlamaConfig(attention_dropout=0.1), True),
        (transformers.Starcoder2Config(residual_dropout=0.1), True),
        (transformers.Gemma3Config(text_config={"attention_dropout": 0.1}), True),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_dropout_that_a_config_asks_for_is_found_by_any_name(
    config: transformers.PreTrainedConfig, expected: bool
) -> None:
    assert drops(config.to_dict()) is expected


class Head(torch.nn.Linear):
    """A head that learns, and drops as much as is asked."""

    def __init__(self, rate: float) -> None:
        super().__init__(8, 20)
        self.dropout = torch.nn.Dropout(rate)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().forward(self.dropout(hidden))


def gradients_of(head: Head, monkeypatch: pytest.MonkeyPatch, checkpointed: bool) -> list[torch.Tensor]:
    with monkeypatch.context() as patched:
        if not checkpointed:
            patched.setattr("qlora.loss.checkpoint", lambda call, *values, **_: call(*values))
        torch.manual_seed(1)
        hidden = torch.randn(6, 8, requires_grad=True)
        loss = summed_nll(hidden, torch.arange(6), head, None, 6)
        return list(torch.autograd.grad(loss, [hidden, *head.parameters()]))


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_a_head_that_learns_is_recomputed_as_it_was(rate: float, monkeypatch: pytest.MonkeyPatch) -> None:
    head = Head(rate)
    close(*(gradients_of(head, monkeypatch, checkpointed) for checkpointed in (True, False)))


def test_random_numbers_are_left_alone_where_the_head_does_not_drop(monkeypatch: pytest.MonkeyPatch) -> None:
    """A recorded step may not restore their state."""
    states: list[str] = []
    original = torch.get_rng_state
    monkeypatch.setattr(torch, "get_rng_state", lambda: [states.append("read"), original()][1])
    for rate, read in ((0.0, False), (0.5, True)):
        states.clear()
        gradients_of(Head(rate), monkeypatch, checkpointed=True)
        assert bool(states) is read
