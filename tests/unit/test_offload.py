"""Checkpointed hidden states on the host, without a GPU: the same gradients, and memory that is let go and used again."""

import contextlib
import types
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import make_base
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from qlora.offload import HostStates, Kept, keep_on_host

LAYERS = 4


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_base(tmp_path / "base", num_hidden_layers=LAYERS)


def network_of(base: Path) -> PreTrainedModel:
    network: PreTrainedModel = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).train()
    network.get_input_embeddings().weight.requires_grad_(False)
    network.enable_input_require_grads()
    return network


def switch_on(network: PreTrainedModel) -> None:
    """As transformers does it."""

    def checkpointed(*args: Any) -> Any:
        return checkpoint(*args, use_reentrant=False)

    network._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=checkpointed)


def gradients(network: PreTrainedModel, tokens: int, seed: int) -> list[torch.Tensor]:
    """Those of one micro-step; they add up from call to call."""
    ids = torch.randint(6, 200, (2, tokens), generator=torch.Generator().manual_seed(seed))
    network(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return [weight.grad.clone() for weight in network.parameters() if weight.grad is not None]


def test_gradients_are_the_same_to_the_bit_over_steps_of_several_lengths(base: Path) -> None:
    plain, kept = network_of(base), network_of(base)
    states = HostStates("cpu", print)
    keep_on_host(kept, states)
    switch_on(kept)
    switch_on(plain)
    for seed, tokens in enumerate((16, 9, 16, 30, 9)):
        found, expected = gradients(kept, tokens, seed), gradients(plain, tokens, seed)
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
        with torch.no_grad():
            ids = torch.arange(6, 20)[None]
            assert torch.equal(kept.eval()(ids).logits, plain.eval()(ids).logits)
            kept.train()
            plain.train()
    between = LAYERS - 2  # the embeddings stay, and the last layer is not checkpointed
    assert sorted(room.nbytes for room in states.free) == [2**13] * between + [2**14] * between
    states.free = [room for room in states.free if room.nbytes == 2**14]
    assert gradients(kept, 9, 5)  # larger memory that is free serves too
    assert len(states.free) == between


def test_one_hidden_state_at_a_time_is_on_the_device(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the way forward the last alone; on the way back the one that is used and the next."""
    made: list[weakref.ref[Kept]] = []
    seen: dict[str, list[int]] = {"pack": [], "unpack": []}
    for name, counts in seen.items():
        original = getattr(HostStates, name)

        def watched(self: HostStates, packed: Any, original: Any = original, counts: Any = counts) -> Any:
            result = original(self, packed)
            made.extend(weakref.ref(packed) for packed in (result,) if isinstance(packed, Kept))
            there = [kept for kept in (one() for one in made) if kept is not None]
            if isinstance(packed, Kept) or isinstance(result, Kept):  # neither embeddings nor masks
                counts.append(sum(kept.here is not None for kept in there))
            return result

        monkeypatch.setattr(HostStates, name, watched)
    network = network_of(base)
    states = HostStates("cpu", print)
    keep_on_host(network, states)
    switch_on(network)
    gradients(network, 16, 0)
    assert seen == {"pack": [1, 1], "unpack": [1, 0]}
    assert states.last is None
    assert not any(one() for one in made)


def test_without_more_host_memory_states_stay_where_they_are(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, kept, said = network_of(base), network_of(base), []
    keep_on_host(kept, HostStates("cpu", said.append))
    switch_on(plain)
    switch_on(kept)
    original, asked = torch.empty, []

    def empty(*args: Any, **rest: Any) -> torch.Tensor:
        if rest.get("dtype") == torch.uint8:
            asked.append(args)
            if len(asked) > 1:
                raise RuntimeError("CUDA error: out of memory\nmore")
        return original(*args, **rest)

    monkeypatch.setattr("qlora.offload.torch.empty", empty)
    for seed in range(2):
        found, expected = gradients(kept, 16, seed), gradients(plain, 16, seed)
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert len(asked) == 2
    assert said == ["hidden states on the GPU where no more pinned memory was to be had (CUDA error: out of memory)"]


class Stream:
    """Stands for a CUDA stream, and notes what it is asked for."""

    def __init__(self, name: str, notes: list[str]) -> None:
        self.name, self.notes, self.copies = name, notes, 0

    def wait_stream(self, other: "Stream") -> None:
        self.notes.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event: str) -> None:
        self.notes.append(f"{self.name} waits for {event}")

    def record_event(self) -> str:
        self.copies += 1
        return f"copy {self.copies}"

    @contextlib.contextmanager
    def within(self) -> Iterator[None]:
        self.notes.append(f"{self.name} copies")
        yield


def test_copies_wait_for_the_compute_and_it_waits_for_them_before_it_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    compute, side = Stream("compute", notes), Stream("side", notes)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: compute)
    monkeypatch.setattr(torch.cuda, "stream", Stream.within)
    states = HostStates("cpu", print)
    states.side = side  # type: ignore[assignment]
    states.free = [torch.empty(64, dtype=torch.uint8) for _ in range(2)]  # none is pinned without a GPU
    first, second = (torch.full((4,), float(value), requires_grad=True) * 1 for value in (1, 2))
    copied = ["side waits for compute", "side copies"]
    kept = [states.pack(first)]
    assert notes == copied
    notes.clear()
    kept.append(states.pack(second))
    assert notes == ["compute waits for copy 1", *copied]  # whose source is let go of then
    notes.clear()
    assert torch.equal(states.unpack(kept[1]), second)
    assert notes == ["compute waits for copy 2", *copied]  # which brings the one below back
    notes.clear()
    assert torch.equal(states.unpack(kept[0]), first)
    assert notes == ["compute waits for copy 3"]


class Older(PreTrainedModel):
    """A model's own code from before transformers had layers that checkpoint."""

    config_class = LlamaConfig
    supports_gradient_checkpointing = True

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.layer = torch.nn.Linear(2, 2)
        self.gradient_checkpointing = False
        self.post_init()


def test_code_that_checkpoints_in_an_older_way_is_left_as_it_is(base: Path) -> None:
    def oldest(self: PreTrainedModel, module: torch.nn.Module, value: bool = False) -> None:
        module.gradient_checkpointing = value

    whole = network_of(base)
    whole._set_gradient_checkpointing = types.MethodType(oldest, whole)  # type: ignore[method-assign, assignment]
    for network in (whole, Older(LlamaConfig())):
        said = keep_on_host(network, HostStates("cpu", print))
        assert said == "checkpointed hidden states on the GPU: the model's code checkpoints in an older way"
        network.gradient_checkpointing_enable()
        assert network.is_gradient_checkpointing


def test_layers_may_be_given_words(base: Path) -> None:
    network, seen = network_of(base), []
    keep_on_host(network, HostStates("cpu", print))
    network._set_gradient_checkpointing(
        enable=True, gradient_checkpointing_func=lambda *args, **options: seen.append((args, options))
    )
    network.get_decoder().layers[0]._gradient_checkpointing_func(1, scale=2)
    assert seen == [((1,), {"scale": 2})]
