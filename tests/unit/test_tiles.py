"""Logits exist for a tile of the learned positions at a time: every product that makes some, in a whole run, is seen."""

from typing import Any

import pytest
import torch
from test_training import Bench
from tiny_models import make_base, make_rows, make_tokens
from torch.utils._python_dispatch import TorchDispatchMode

from qlora import batches, loss
from qlora.training import Trainer, learned

TILE = 8
PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default}


class Logits(TorchDispatchMode):
    """Notes the rows of each matrix product that is as wide as the vocabulary."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary, self.rows = vocabulary, list[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func in PRODUCTS and output.shape[-1] == self.vocabulary:
            self.rows.append(output.numel() // self.vocabulary)
        return output


def logits_of(trainer: Trainer, part: str) -> tuple[list[int], list[int]]:
    """Rows of each product with the head in `train` or `evaluate`, and the learned positions of each of its batches."""
    expected, compute = list[int](), trainer.compute_loss

    def noted(model: Any, inputs: Any, *args: Any, **rest: Any) -> Any:
        expected.append(int(learned(inputs)))
        return compute(model, inputs, *args, **rest)

    trainer.compute_loss = noted
    with Logits(trainer.model.get_base_model().get_output_embeddings().out_features) as seen:
        getattr(trainer, part)()
    return seen.rows, expected


def tiles(positions: int) -> list[int]:
    """Rows of each tile."""
    return [min(TILE, positions - start) for start in range(0, positions, TILE)]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    made = Bench.__new__(Bench)
    made.root = tmp_path_factory.mktemp("tiles")
    made.base = make_base(made.root / "base")
    made.tokens = make_tokens(made.root, made.base, make_rows(made.root, train=24))
    return made


@pytest.mark.parametrize("part", ["train", "evaluate"])
@pytest.mark.parametrize(
    "settings", [{"batching": "padded"}, {"batching": "grouped"}, {"batching": "packed"}, {"checkpointing": True}]
)
def test_logits_exist_for_a_tile_of_learned_positions(
    settings: dict[str, Any], part: str, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "TILE", TILE)
    trainer = bench.trainer(eval_steps=None, max_steps=3, **settings)
    rows, positions = logits_of(trainer, part)
    assert rows == [tile for count in positions for tile in tiles(count)]
    assert max(positions) > TILE
    assert part == "evaluate" or sum(rows) == trainer.counter().supervised


def test_places_of_a_fixed_number_are_padded_to_whole_tiles(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """As rows taken apart in attention have them on a GPU."""
    monkeypatch.setattr(loss, "TILE", TILE)
    monkeypatch.setattr(batches, "TILE", TILE)
    trainer = bench.trainer(batching="packed", eval_steps=None, max_steps=3)
    collate = trainer.data_collator

    def padded(rows: Any) -> dict[str, Any]:
        return batches.with_places(collate(rows), TILE)

    trainer.data_collator = padded
    rows, positions = logits_of(trainer, "train")
    assert rows == [TILE for count in positions for _ in tiles(count)]
    assert 0 < sum(rows) - sum(positions) < TILE * len(positions)
