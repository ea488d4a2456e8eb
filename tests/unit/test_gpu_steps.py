"""What a GPU alone does: attention over packed rows, and micro-steps recorded as graphs. Skipped where there is none."""

import gc
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from test_fused_lora import distance
from test_training import Bench
from tiny_models import QUANTIZATION, SETTINGS, make_base, make_rows, make_tokens
from torch.utils.checkpoint import checkpoint

from qlora import training
from qlora.batches import PackedBatch
from qlora.loss import add_supervised_loss
from qlora.models import load_quantized
from qlora.packed_attention import NAME, use_packed_attention
from qlora.render import IGNORED
from qlora.training import Trainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
HALF = {**QUANTIZATION, "compute_dtype": "bfloat16"}
EXACT = {**QUANTIZATION, "compute_dtype": "float32"}
LENGTHS = (17, 30, 9)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma", "qwen2.5", "qwen3", "phi-2", "phi3"])
def test_packed_rows_have_the_loss_of_each_row_alone(family: str, tmp_path: Path) -> None:
    network = load_quantized(make_base(tmp_path / "base", family), HALF, "cuda", "sdpa").eval()
    assert use_packed_attention(network) is None
    add_supervised_loss(network)
    generator = torch.Generator().manual_seed(1)
    documents = [torch.randint(6, 300, (length,), generator=generator).tolist() for length in LENGTHS]
    rows = Dataset.from_list([{"input_ids": ids, "labels": ids} for ids in documents])

    def loss(packs: list[list[int]], room: int) -> float:
        batch = PackedBatch(rows, room, 0, documents=3)([{"rows": pack} for pack in packs])
        batch.pop("tokens")
        moved = {name: value.cuda() if torch.is_tensor(value) else value for name, value in batch.items()}
        with torch.no_grad():
            return float(network(**moved, loss_items=1))

    together, apart = loss([[0, 1, 2]], 64), sum(loss([[place]], 64) for place in range(3))
    two_packs = loss([[0, 1], [2]], 48)
    with torch.no_grad():
        plain = 0.0
        for ids in documents:
            logits = network(input_ids=torch.tensor([ids]).cuda()).logits[0, :-1].float()
            labels = torch.tensor(ids[1:]).cuda()
            plain += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
    assert together == pytest.approx(apart, rel=2e-3)
    assert two_packs == pytest.approx(together, rel=2e-3)
    assert plain == pytest.approx(together, rel=5e-3)


def test_other_batches_go_through_masks(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    ids = torch.arange(6, 46).view(2, 20).cuda()
    mask = torch.ones_like(ids)
    mask[0, 12:] = 0
    plain = load_quantized(base, HALF, "cuda", "sdpa").eval()
    expected = plain(input_ids=ids, attention_mask=mask).logits
    assert use_packed_attention(plain) is None
    assert plain.config._attn_implementation == NAME
    assert torch.equal(plain(input_ids=ids, attention_mask=mask).logits, expected)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    made = Bench.__new__(Bench)
    made.root, made.base = tmp_path, make_base(tmp_path / "base")
    made.tokens = make_tokens(tmp_path, made.base, make_rows(tmp_path, train=64))
    return made


def make_ready(trainer: Trainer) -> None:
    """What the trainer does before its first step."""
    trainer.create_optimizer_and_scheduler(1)
    trainer.model_wrapped = trainer.accelerator.prepare_model(trainer.model.train())
    if trainer.settings["checkpointing"]:
        recomputed = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
        network = trainer.model.get_base_model()
        network._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=recomputed)


def gradients_of_steps(trainer: Trainer, steps: int) -> list[list[torch.Tensor]]:
    """Run micro-steps over the same batches as in training, without an optimiser, and keep each one's gradients."""
    make_ready(trainer)
    kept = []
    for number, batch in enumerate(trainer.get_train_dataloader()):
        if number == steps:
            break
        trainer.model.zero_grad()
        items = (batch["labels"] != IGNORED).sum()
        trainer.training_step(trainer.model_wrapped, batch, items)
        kept.append([weight.grad.clone() for weight in trainer.trainable() if weight.grad is not None])
    return kept


@pytest.mark.parametrize("family", ["llama", "phi-2", "qwen3"])
def test_other_families_record_steps_too(family: str, tmp_path: Path) -> None:
    """Under autocast a LayerNorm gives float32, which FlashAttention does not take."""
    made = Bench.__new__(Bench)
    made.root, made.base = tmp_path, make_base(tmp_path / "base", family)
    made.tokens = make_tokens(tmp_path, made.base, make_rows(tmp_path, train=64), family)
    settings = {"quantization": HALF, "batching": "packed", "batch_size": 1, "max_steps": 8, "eval_steps": 4}
    trainer = made.trainer(**settings, log_steps=1)
    trainer.train()
    assert trainer.graph is not None
    assert trainer.graph.captured
    assert all(entry["loss"] < 8 for entry in trainer.state.log_history if "loss" in entry)


SIZES = (500, 1000, 1500, 2000)  # packs, whose widest tensors are of 16 to 65 MB


@pytest.mark.parametrize(
    ("order", "recorded"),
    [
        ([2000] * 4 + [1500] * 4, 2),
        ([size for size in SIZES for _ in range(4)], 1),
        ([1000, 2000] * 4, 2),
    ],
)
def test_shapes_share_their_memory(order: list[int], recorded: int, bench: Bench) -> None:
    """Steps of several shapes leave little more reserved than those of the largest alone."""

    def reserved_after(order: list[int]) -> tuple[int, int]:
        trainer = bench.trainer(quantization=HALF, batching="packed", batch_size=max(order))
        make_ready(trainer)
        assert trainer.graph is not None
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        rows = trainer.train_dataset
        for packs in order:
            part = trainer.data_collator([rows[number % len(rows)] for number in range(packs)])
            moved = {name: value.cuda() if torch.is_tensor(value) else value for name, value in part.items()}
            trainer.training_step(trainer.model_wrapped, moved, torch.tensor(100, device="cuda"))
        torch.cuda.synchronize()
        return torch.cuda.memory_reserved() - before, len(trainer.graph.captured)

    alone, _ = reserved_after([max(order)] * 4)
    reserved, found = reserved_after(order)
    assert found == recorded
    assert reserved < 1.3 * alone


@pytest.mark.parametrize("change", [{}, {"checkpointing": True}, {"lora": {**SETTINGS["lora"], "rslora": True}}])
def test_a_recorded_step_has_the_gradients_of_an_eager_one(bench: Bench, change: dict[str, Any]) -> None:
    settings = {"quantization": HALF, "batching": "packed", "batch_size": 1, **change}
    recorded, eager = bench.trainer(**settings), bench.trainer(**settings)
    assert recorded.graph is not None
    eager.graph = None
    steps = zip(gradients_of_steps(recorded, 6), gradients_of_steps(eager, 6), strict=True)
    for number, (found, expected) in enumerate(steps):
        assert distance(found, expected) < 0.01, number
    assert recorded.graph.captured


def sums_of_gradients(trainer: Trainer, packs: Sequence[int]) -> list[list[torch.Tensor]]:
    """Gradients added up, after each of the micro-steps of so many packs; evaluations come between."""
    make_ready(trainer)
    kept = []
    for number, count in enumerate(packs):
        batch = trainer.data_collator([trainer.train_dataset[place] for place in range(count)])
        trainer.training_step(trainer.model_wrapped, batch, torch.tensor(100 + 50 * number, device="cuda"))
        kept.append([weight.grad.clone() for weight in trainer.trainable() if weight.grad is not None])
        if number % 4 == 1:
            trainer.evaluate()
    return kept


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_recorded_steps_add_up_as_those_of_eager_ones(bench: Bench, checkpointing: bool) -> None:
    settings = {"quantization": HALF, "batching": "packed", "batch_size": 2, "checkpointing": checkpointing}
    recorded, eager = bench.trainer(**settings), bench.trainer(**settings)
    assert recorded.graph is not None
    eager.graph = None
    packs = [2, 2, 2, 1, 1, 1, 2, 1]  # two shapes by turns, each recorded when it comes the third time
    steps = zip(sums_of_gradients(recorded, packs), sums_of_gradients(eager, packs), strict=True)
    for number, (found, expected) in enumerate(steps):
        assert distance(found, expected) < 0.01, number
    assert len(recorded.graph.captured) == 2


def pair(bench: Bench, monkeypatch: pytest.MonkeyPatch, eagerly: bool) -> tuple[Trainer, Trainer]:
    """Two that checkpoint: one keeps hidden states on the host, the other one on the GPU."""
    settings = {"quantization": HALF, "batching": "packed", "batch_size": 4, "checkpointing": True}
    on_host = bench.trainer(**settings)
    assert "checkpointed hidden states in host memory" in on_host.chosen
    monkeypatch.setattr(training, "keep_on_host", lambda *_: "none")
    on_gpu = bench.trainer(**settings)
    for trainer in (on_host, on_gpu):
        assert trainer.graph is not None
        if eagerly:
            trainer.graph = None
    return on_host, on_gpu


@pytest.mark.parametrize("eagerly", [True, False])
def test_hidden_states_on_the_host_change_no_bit_of_a_gradient(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, eagerly: bool
) -> None:
    bench.base = make_base(bench.root / "deep", num_hidden_layers=6)
    trainers = pair(bench, monkeypatch, eagerly)
    packs = [4, 4, 4, 4, 3, 3, 3, 3, 4, 3, 4]  # two shapes: eager steps of one after recorded ones of the other
    steps = zip(*(sums_of_gradients(trainer, packs) for trainer in trainers), strict=True)
    for number, (found, expected) in enumerate(steps):
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True)), number
    assert all(len(trainer.graph.captured) == 2 for trainer in trainers if trainer.graph)


@pytest.mark.parametrize("eagerly", [True, False])
def test_hidden_states_on_the_host_leave_the_gpu(bench: Bench, monkeypatch: pytest.MonkeyPatch, eagerly: bool) -> None:
    layers, width = 48, 256
    bench.base = make_base(bench.root / "deep", num_hidden_layers=layers, hidden_size=width)
    peaks = []
    for trainer in pair(bench, monkeypatch, eagerly):
        trainer.graph, graph = None, trainer.graph
        sums_of_gradients(trainer, [4])  # libraries take memory once
        trainer.model.zero_grad()
        trainer.graph = graph
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        sums_of_gradients(trainer, [4, 4, 4, 4])
        torch.cuda.synchronize()
        peaks.append(torch.cuda.max_memory_allocated() - before)
    packs = 4 * trainer.data_collator.room
    # A few are there at a time, and beside them what the last layer saves, as wide as some ten of them.
    assert peaks[1] - peaks[0] > 0.6 * layers * packs * width * 2


@pytest.mark.parametrize("checkpointing", [False, True])
def test_each_replay_has_masks_of_its_own(bench: Bench, checkpointing: bool) -> None:
    """The same batch again and again: the same gradients without dropout, others with each mask."""
    lora = {**SETTINGS["lora"], "dropout": 0.5}
    settings = {"quantization": HALF, "batching": "packed", "batch_size": 1, "checkpointing": checkpointing}
    trainer = bench.trainer(**settings, lora=lora)
    assert trainer.graph is not None
    make_ready(trainer)
    (batch, *_) = list(trainer.get_train_dataloader())
    items, found = (batch["labels"] != IGNORED).sum(), []
    for _ in range(6):
        trainer.model.zero_grad()
        trainer.training_step(trainer.model_wrapped, dict(batch), items)
        found.append([weight.grad.clone() for weight in trainer.trainable() if weight.grad is not None])
    assert trainer.graph.captured
    assert all(distance(one, other) > 0.05 for place, one in enumerate(found) for other in found[:place])
    assert all(distance(one, found[0]) < 3 for one in found)


@pytest.mark.parametrize("batching", ["grouped", "padded"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_rows_end_to_end_are_learned_as_padded_ones(
    batching: str, checkpointing: bool, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qlora.batches.size_for", lambda tokens: -(-tokens // 4) * 4)  # several, for rows as short
    monkeypatch.setattr("qlora.step_graph.EAGER", 1)  # so that sizes that come twice are recorded
    settings = {"quantization": HALF, "batching": batching, "batch_size": 4, "max_steps": 16, "samples": 2}
    settings["checkpointing"] = checkpointing
    end_to_end = bench.trainer(**settings)
    assert "attention: FlashAttention over each row" in end_to_end.chosen
    monkeypatch.setattr(training, "use_packed_attention", lambda _: "asked for")
    side_by_side = bench.trainer(**settings)
    found, expected = (gradients_of_steps(trainer, 16) for trainer in (end_to_end, side_by_side))
    assert end_to_end.graph is not None
    assert len(end_to_end.graph.captured) > 1
    assert side_by_side.graph is None
    for one, other in zip(found, expected, strict=True):
        assert distance(one, [gradient.float() for gradient in other]) < 0.05
    losses = [trainer.evaluate()["eval_loss"] for trainer in (end_to_end, side_by_side)]
    assert losses[0] == pytest.approx(losses[1], rel=5e-3)


def test_recorded_steps_learn_as_eager_ones_do(bench: Bench) -> None:
    settings = {
        "quantization": HALF, "batching": "packed", "batch_size": 1, "accumulation": 2, "max_steps": 30,
        "eval_steps": 10, "log_steps": 1, "learning_rate": 5e-3, "save_steps": 100,
    }  # fmt: skip
    losses = []
    for eagerly in (False, True):
        trainer = bench.trainer(**settings)
        if eagerly:
            trainer.graph = None
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0][-1] < 0.5 * losses[0][0]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


def test_a_recipe_in_fp8_learns_as_one_in_bfloat16(bench: Bench) -> None:
    settings = {"quantization": HALF, "batching": "packed", "max_steps": 30, "eval_steps": None, "learning_rate": 5e-3}
    losses = []
    for in_fp8 in (False, True):
        trainer = bench.trainer(**settings, fp8=in_fp8)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[1] != losses[0]
    assert losses[1][-1] == pytest.approx(losses[0][-1], rel=0.2)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"quantization": EXACT}, "batches have no fixed shape (it takes bfloat16 and float16, not float32)"),
        ({"lorentzian": {"weight": 0.1, "gamma": 1.0}}, "the penalty depends on"),
        (
            {"lora": {**SETTINGS["lora"], "dropout": 0.1, "dora": True}, "checkpointing": True},
            "dropout of PEFT or the base",
        ),
    ],
)
def test_what_cannot_be_recorded_says_why(bench: Bench, change: dict[str, Any], reason: str) -> None:
    trainer = bench.trainer(**{"quantization": HALF, "batching": "packed", **change})
    assert trainer.graph is None
    assert reason in trainer.chosen[-1]


def test_batches_have_one_shape(bench: Bench) -> None:
    trainer = bench.trainer(quantization=HALF, batching="packed", batch_size=2)
    shapes = {
        tuple((name, tuple(getattr(value, "shape", (value,)))) for name, value in sorted(batch.items()))
        for batch in trainer.get_train_dataloader()
    }
    assert len(shapes) <= 2  # the last may have fewer packs
