"""Which steps are recorded and which recordings are let go, without a GPU: a recording calls its step again."""

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from qlora.step_graph import EAGER, StepGraph


class Graph:
    """Stands for a CUDA graph: what was computed while it was recorded is computed again when it is replayed."""

    def __init__(self) -> None:
        self.replay = lambda: None


class Stream:
    """Stands for a CUDA stream: says for what it waits."""

    def __init__(self, name: str, order: list[str]) -> None:
        self.name, self.order = name, order

    def wait_stream(self, other: "Stream") -> None:
        self.order.append(f"{self.name} waits for {other.name}")


class Recorder:
    """Steps that add their inputs' sum to a parameter's gradient, and a note of how each was computed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.notes: list[str] = []
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.loss = torch.zeros(())
        self.pools = 0
        self.order: list[str] = []  # of what is computed and waited for, by stream
        self.current = Stream("the trainer's", self.order)
        stand_ins = {
            "MemPool": self.pool, "CUDAGraph": Graph, "Stream": lambda: Stream("its own", self.order),
            "current_stream": lambda: self.current, "stream": self.within,
            "use_mem_pool": contextlib.nullcontext, "graph": self.recording,
            "empty_cache": lambda: None, "synchronize": lambda: self.notes.append("waited"),
        }  # fmt: skip
        for name, stand_in in stand_ins.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)
        self.graph = StepGraph(self.step, [self.weight])

    def pool(self) -> SimpleNamespace:
        self.pools += 1
        return SimpleNamespace(id=self.pools)

    @contextlib.contextmanager
    def within(self, stream: "Stream") -> Iterator[None]:
        outer, self.current = self.current, stream
        yield
        self.current = outer

    def step(self, inputs: dict[str, torch.Tensor], items: torch.Tensor) -> torch.Tensor:
        assert self.weight.grad is not None
        self.notes.append(f"computed {inputs['input_ids'].numel()}")
        self.order.append(f"{self.current.name} computes")
        loss = inputs["input_ids"].sum() / items
        self.weight.grad.add_(loss)
        self.again, self.loss = (inputs, items), loss
        return loss

    @contextlib.contextmanager
    def recording(self, graph: Graph, pool: int, stream: object) -> Iterator[None]:
        assert pool == self.pools
        assert self.weight.grad is not None
        gradient = self.weight.grad.clone()
        yield
        self.notes[-1] = self.notes[-1].replace("computed", "recorded")
        self.weight.grad.copy_(gradient)  # a recording computes nothing yet
        inputs, items = self.again
        weight, loss = self.weight, self.loss

        def replay() -> None:
            assert weight.grad is not None
            weight.grad.add_(loss.copy_(inputs["input_ids"].sum() / items))
            self.notes.append(f"replayed {inputs['input_ids'].numel()}")

        graph.replay = replay

    def run(self, sizes: list[int]) -> list[str]:
        """The notes of steps of so many tokens; the tokens are 1 in the first step, 2 in the second, and so on."""
        self.notes.clear()
        self.losses = [self.one(size, number + 1) for number, size in enumerate(sizes)]
        return self.notes

    def one(self, size: int, number: int) -> torch.Tensor:
        """The loss of a step of `size` tokens, each `number`, over `number` + 1 items."""
        ids = torch.full((1, size), float(number))
        return self.graph({"input_ids": ids, "learned": torch.arange(size)}, torch.tensor(number + 1.0))


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    return Recorder(monkeypatch)


def test_a_shape_is_recorded_when_it_comes_the_third_time(recorder: Recorder) -> None:
    assert recorder.run([4] * 4) == ["computed 4", "computed 4", "recorded 4", "replayed 4", "replayed 4"]
    assert recorder.weight.grad is not None
    of_each = [4 * number / (number + 1) for number in (1, 2, 3, 4)]  # with its own inputs and items
    assert recorder.losses == pytest.approx(of_each)  # what was given stays as it is
    assert float(recorder.weight.grad) == pytest.approx(sum(of_each))


def test_eager_steps_wait_for_what_was_computed_and_are_waited_for(recorder: Recorder) -> None:
    recorder.run([4, 4])
    one = ["its own waits for the trainer's", "its own computes", "the trainer's waits for its own"]
    assert recorder.order == one * 2


def test_smaller_steps_are_recorded_beside_larger_ones(recorder: Recorder) -> None:
    recorder.run([8] * 3 + [4] * 3)
    assert len(recorder.graph.captured) == 2
    assert recorder.pools == 1
    assert "waited" not in recorder.notes


def test_recordings_are_let_go_before_a_larger_step_and_made_again_after_it_is_recorded(recorder: Recorder) -> None:
    assert recorder.run([4] * 3 + [8] * 3 + [4] * 2) == [
        *("computed 4", "computed 4", "recorded 4", "replayed 4"),
        *("waited", "computed 8", "computed 8", "recorded 8", "replayed 8"),
        *("recorded 4", "replayed 4", "replayed 4"),
    ]  # fmt: skip
    assert len(recorder.graph.captured) == 2
    assert recorder.pools == 2


def test_no_smaller_recording_lies_beneath_the_largest_whatever_the_order(recorder: Recorder) -> None:
    """The smaller one is recorded between the larger one's eager steps, and gives way to its recording."""
    notes = recorder.run([4, 8] * 4)
    assert notes.index("recorded 8") == notes.index("waited") + 1
    assert notes[-3:] == ["recorded 4", "replayed 4", "replayed 8"]
    assert list(recorder.graph.captured) == sorted(recorder.graph.captured, key=lambda shape: -shape[0][1][1])


def test_a_larger_size_lets_recordings_go_at_most_before_each_of_its_first_steps(recorder: Recorder) -> None:
    notes = recorder.run([2] * 3 + [4] * 3 + [6] * 3 + [8, 2, 4, 6] * 4)
    assert notes.count("waited") <= 3 * (EAGER + 1)
    assert len(recorder.graph.captured) == 4


def test_gradients_that_were_dropped_begin_at_zero(recorder: Recorder) -> None:
    recorder.run([4] * 3)
    recorder.weight.grad = None
    recorder.run([4])
    assert float(recorder.weight.grad) == 4 * 1 / 2  # type: ignore[arg-type]
