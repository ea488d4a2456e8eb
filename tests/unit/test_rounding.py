"""The benchmark of rounding computes LoRA in the four ways that it names, and leaves the workflow's own as it was."""

from pathlib import Path

import pytest
from rounding import WAYS, validation_loss
from tiny_models import SETTINGS, make_base, make_rows, make_tokens

from qlora import fused_lora, nf4, training
from qlora.training import Job


def test_the_ways_differ_by_rounding_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place, name in ((fused_lora, "can_add"), (fused_lora, "dequantized"), (training, "fuse")):
        monkeypatch.setattr(place, name, getattr(place, name))  # and back afterwards
    base = make_base(tmp_path / "base")
    tokens = make_tokens(tmp_path, base, make_rows(tmp_path))
    losses = {}
    for way in WAYS:
        folder = tmp_path / way
        job = Job(base, tokens, {**SETTINGS, "max_steps": 3}, 1, "sdpa", "cpu", "padded", folder, str(folder))
        losses[way] = validation_loss(job, way)
        assert (fused_lora.can_add is nf4.can_add) == (way != "added")
    assert len(set(losses.values())) == len(WAYS)
    for loss in losses.values():
        assert loss == pytest.approx(losses["float32"], rel=0.03)
