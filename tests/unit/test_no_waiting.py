"""A micro-step asks a device for no value: on a CPU, over batches and attention as on a GPU, what asks is refused."""

from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from test_gpu_steps import make_ready
from test_training import Bench
from tiny_models import QUANTIZATION, make_base, make_rows, make_tokens
from torch.nn.attention import varlen
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from varlen_for_tests import attention_of_rows, attention_of_rows_that_asks

from qlora import packed_attention
from qlora.batches import EndToEnd, PackedBatch
from qlora.packed_attention import NAME, use_packed_attention
from qlora.render import IGNORED
from qlora.training import Trainer

HALF = {**QUANTIZATION, "compute_dtype": "bfloat16"}
aten = torch.ops.aten
# Their result, or its shape, is known on a GPU when the GPU has done all that was asked before.
ASK = {
    aten._local_scalar_dense.default,  # item(), int(), float(), bool(), and `if tensor`
    aten.equal.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.unique_consecutive.default,
    aten.repeat_interleave.Tensor,
}
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}
# No operations where a tensor is on a CPU; the last two copy a Python value to the device, and wait for that.
MOVED = {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu, torch.tensor, torch.as_tensor}


class WaitedError(Exception):
    """Something waited for a value."""


class NoWaiting(TorchDispatchMode):
    """Refuses operations that ask a device for a value."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        masked = func in INDEXED and any(place is not None and place.dtype == torch.bool for place in args[1])
        if func in ASK or masked:
            self.asked(str(func))
        return func(*args, **(kwargs or {}))

    def asked(self, operation: str) -> None:
        """Refuse."""
        raise WaitedError(operation)


class Counted(NoWaiting):
    """Counts them."""

    def __init__(self) -> None:
        super().__init__()
        self.count = Counter[str]()

    def asked(self, operation: str) -> None:
        """Count."""
        self.count[operation] += 1


class NoMoving(TorchFunctionMode):
    """Refuses what takes a tensor to the host, or a number to the device; not `to` and `copy_`, which serve both ways."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in MOVED:
            raise WaitedError(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "asks",
    [
        lambda x: x.sum().item(),
        lambda x: int(x.sum()),
        lambda x: 1 if x.any() else 0,
        torch.is_nonzero,
        lambda x: torch.equal(x, x),
        lambda x: x.nonzero(),
        lambda x: x[x > 1],
        lambda x: torch.where(x > 1),
        lambda x: x.masked_select(x > 1),
        lambda x: x.index_put((x > 1,), torch.zeros(())),
        lambda x: x.unique(),
        lambda x: x.unique_consecutive(),
        lambda x: x.repeat_interleave(x.long()),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x + torch.tensor(3),
        lambda x: x.numpy(),
    ],
)
def test_what_asks_is_refused(asks: Any) -> None:
    ones = torch.ones(() if asks is torch.is_nonzero else 3)
    with pytest.raises(WaitedError), NoMoving(), NoWaiting():
        asks(ones)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("waiting")


@pytest.fixture(params=["llama", "mistral", "phi-2", "qwen3"])
def bench(root: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Bench:
    family = str(request.param)
    made = Bench.__new__(Bench)
    made.root = root / family
    made.base = made.root / "base"
    if not made.base.is_dir():
        make_base(made.base, family)
        make_tokens(made.root, made.base, make_rows(made.root, train=24), family)
    made.tokens = made.root / "tokens"
    kernel = attention_of_rows_that_asks if packed_attention.ASKS else attention_of_rows
    monkeypatch.setattr(varlen, "varlen_attn", Mock(wraps=kernel))
    monkeypatch.setattr(packed_attention, "why_not_packed", lambda *_: None)
    return made


def as_on_a_gpu(trainer: Trainer, batching: str) -> Trainer:
    """Let it take rows apart in attention, in batches of fixed places."""
    network = trainer.model.get_base_model()
    network.config._attn_implementation = "sdpa"
    assert use_packed_attention(network) is None
    assert network.config._attn_implementation == NAME
    if batching == "packed":
        most = max(len(pack) for pack in trainer.train_dataset["rows"])
        collator = trainer.data_collator
        trainer.data_collator = PackedBatch(collator.rows, collator.room, collator.padding, most)
    else:
        trainer.data_collator = EndToEnd(0, trainer.settings["batch_size"])
    return trainer


@pytest.mark.parametrize("batching", ["packed", "grouped"])
@pytest.mark.parametrize(
    "change", [{}, {"checkpointing": True}, {"lorentzian": {"weight": 0.1, "gamma": 1.0}}], ids=str
)
def test_a_micro_step_waits_for_no_value(bench: Bench, batching: str, change: dict[str, Any]) -> None:
    settings = {"quantization": HALF, "batching": batching, "batch_size": 2, "max_steps": 2, **change}
    trainer = as_on_a_gpu(bench.trainer(**settings), batching)
    make_ready(trainer)
    trainer.current_gradient_accumulation_steps = 1
    for batch in list(trainer.get_train_dataloader())[:2]:
        items, tokens = (batch["labels"] != IGNORED).sum(), batch["tokens"].sum()
        before = trainer.counter().tokens
        with NoMoving(), NoWaiting():
            loss = trainer.training_step(trainer.model_wrapped, batch, items)
        assert varlen.varlen_attn.called
        assert loss.isfinite()
        assert trainer.counter().tokens == before + tokens
        assert all(float(weight.grad.abs().sum()) > 0 for weight in trainer.trainable()[1::2])  # B; A's is 0 at first


@pytest.mark.parametrize("bench", ["llama"], indirect=True)
def test_a_whole_training_waits_no_more_often_for_more_micro_steps(bench: Bench) -> None:
    """But where it logs: for the loss, the gradients' norm and the tokens. (An optimiser on a CPU asks in each step.)"""
    settings = {"quantization": HALF, "batching": "grouped", "batch_size": 2, "max_steps": 4, "eval_steps": None}
    found = {}
    for accumulation in (1, 3):
        for log_steps in (1, 4):
            trainer = as_on_a_gpu(
                bench.trainer(**settings, accumulation=accumulation, log_steps=log_steps, save_steps=100), "grouped"
            )
            with Counted() as seen:
                trainer.train()
            assert trainer.state.global_step == 4
            # Batches are made on the host: one of these each, and one that is made ahead.
            assert seen.count.pop("aten.nonzero.default") <= 4 * accumulation + 1
            found[accumulation, log_steps] = seen.count.total()
    assert found[1, 1] == found[3, 1]
    assert found[1, 4] == found[3, 4]
    assert found[1, 1] - found[1, 4] == 3 * 3
