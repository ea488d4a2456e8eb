"""Ways to train are measured by turns, in stints that end in time and go on."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gpu_lines import FIGURES, PAIR, THREE, line
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

import clock
import one
import peers
import run
from clock import Clock
from ours import loop
from plan import PLAN, Group, Way
from run import Line, measure_all
from table import conditions, lines_of


class Machine:
    """A clock of its own, on which each measurement takes `seconds`, and ways that fail."""

    def __init__(self, seconds: float = 50.0, fails: Sequence[str] = ()) -> None:
        self.seconds, self.fails, self.now = seconds, fails, 0.0

    def measure(self, group: Group, way: Way, seconds: float) -> Line:
        self.now += self.seconds
        found = {"failed": "out of memory"} if way.name in self.fails else FIGURES
        return {**found, "wall seconds": self.seconds}

    def stint(
        self, plan: Sequence[Group], before: Sequence[Line] = (), seconds: float = 1e9, enough: int = 3
    ) -> list[Line]:
        self.now = 0.0
        return list(measure_all(plan, before, self.measure, lambda: seconds - self.now, enough))


def ways(lines: Sequence[Line]) -> list[str]:
    return [f"{line['group']} {line['round']} {line['way']}" for line in lines]


def test_the_plan_begins_with_what_matters_most() -> None:
    first = PLAN[0]
    assert (first.shape, first.rows, [way.name for way in first.ways]) == (
        "llama-2-7b",
        "full",
        ["ours", "unsloth", "ours-fp8", "ours-loop", "trl-packed"],
    )
    assert all(way.batch == 4 and not way.checkpointing for way in first.ways)
    assert list(dict.fromkeys(group.shape for group in PLAN)) == [
        "llama-2-7b",
        "mistral-7b",
        "gemma-7b",
        "falcon-7b",
        "phi-2",
    ]


def test_groups_and_their_ways_are_told_apart_by_name() -> None:
    assert len({group.title for group in PLAN}) == len(PLAN)
    for group in PLAN:
        assert len({way.name for way in group.ways}) == len(group.ways)


def test_each_round_begins_with_another_way_and_a_group_is_finished_before_the_next() -> None:
    assert ways(Machine().stint([THREE, PAIR])) == [
        *("three 0 ours", "three 0 unsloth", "three 0 notebook"),
        *("three 1 unsloth", "three 1 notebook", "three 1 ours"),
        *("three 2 notebook", "three 2 ours", "three 2 unsloth"),
        *("pair 0 ours", "pair 0 trl", "pair 1 trl", "pair 1 ours", "pair 2 ours", "pair 2 trl"),
    ]


def test_fewer_rounds_may_be_enough_and_count_towards_more() -> None:
    once = Machine().stint([PAIR, THREE], enough=1)
    assert [(line["group"], line["round"]) for line in once] == [("pair", 0)] * 2 + [("three", 0)] * 3
    assert [line["round"] for line in Machine().stint([PAIR], once)] == [1, 1, 2, 2]


def test_a_stint_stops_before_its_time_is_up_and_the_next_goes_on() -> None:
    machine = Machine(seconds=100.0)
    first = machine.stint([PAIR], seconds=340)
    assert machine.now == 300
    assert ways(first) == ["pair 0 ours", "pair 0 trl", "pair 1 trl"]
    second = machine.stint([PAIR], first)
    assert ways(second) == ["pair 2 ours", "pair 2 trl", "pair 3 trl", "pair 3 ours"]  # round 1 was not whole
    assert {line["stint"] for line in first} == {1}
    assert {line["stint"] for line in second} == {2}
    assert machine.stint([PAIR], first + second) == []


def test_nothing_is_begun_that_would_not_end_in_time() -> None:
    assert Machine().stint([PAIR], seconds=run.GUESS - 1) == []
    assert len(Machine().stint([PAIR], seconds=run.GUESS)) == 1
    failed = {"group": "pair", "way": "trl", "stint": 1, "round": 0, "failed": "cut off", "wall seconds": 500.0}
    assert run.expected(PAIR, PAIR.ways[1], [failed]) == run.GUESS
    assert run.expected(PAIR, PAIR.ways[1], [failed, line("ours", 1, 0, 9, **{"wall seconds": 70.0})]) == 70


def test_what_failed_is_tried_once_a_stint_and_first_in_the_next() -> None:
    broken, mended = Machine(fails=["unsloth"]), Machine()
    first = broken.stint([THREE])
    assert [line["way"] for line in first if "failed" in line] == ["unsloth"]
    assert [line["way"] for line in first].count("ours") == 3
    assert ways(broken.stint([THREE], first)) == ["three 3 unsloth"]
    again = [line["way"] for line in mended.stint([THREE], first)]
    assert again[0] == "unsloth"
    assert again.count("unsloth") == again.count("ours") == 3


def test_groups_and_ways_may_be_chosen() -> None:
    [group] = run.chosen([PAIR, THREE], ["air", "nothing"], None)
    assert group == PAIR
    found = run.chosen([PAIR, THREE], [""], ["notebook", "ours"])
    assert [[way.name for way in group.ways] for group in found] == [["ours"], ["ours", "notebook"]]
    assert run.chosen([PAIR], [""], ["unsloth"]) == []


def test_the_commit_is_what_a_copy_is_told_or_the_repositorys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "HERE", tmp_path)
    monkeypatch.delenv("COMMIT", raising=False)
    assert run.commit() is None
    monkeypatch.setenv("COMMIT", "told")
    assert run.commit() == "told"
    for arguments in (["init"], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "--allow-empty", "-m", "one"]):
        subprocess.run(["git", "-C", str(tmp_path), *arguments], check=True, capture_output=True)
    assert run.commit() == "told"
    monkeypatch.delenv("COMMIT")
    found = run.commit()
    assert found
    assert len(found) == 40
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run.commit() is None


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder where a model lies, and a GPU that says its clock."""
    (tmp_path / "models/tiny/rows-mixed").mkdir(parents=True)
    (tmp_path / "models/tiny/rows-mixed/card.json").touch()
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'A card, 1980 MHz, 300.12 W, 700.00 W, 40, 570.1'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    return tmp_path


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_a_clock_gives_each_repeat_and_leaves_the_warm_up_out(monkeypatch: pytest.MonkeyPatch) -> None:
    now, unix = iter([0.0, 10.0, 12.0, 16.0, 17.0]), iter([5010.0, 5012.0, 5016.0, 5017.0])
    monkeypatch.setattr(clock, "time", SimpleNamespace(monotonic=lambda: next(now), time=lambda: next(unix)))
    found = Clock(2, 8, 3)
    for step in range(1, 9):
        found.at(step)
    figures = found.result([torch.tensor([count]) for count in (99, 99, 10, 10, 10, 30, 5, 5)])
    assert figures["repeats"] == [10.0, 10.0, 10.0]
    assert (figures["tokens per second"], figures["seconds a step"], figures["start-up seconds"]) == (10.0, 1.0, 10.0)
    assert figures["timed"] == [5010.0, 5017.0]
    with pytest.raises(ValueError, match="7 steps after the warm-up are not 3 times as many"):
        Clock(1, 8, 3)


@pytest.mark.parametrize(
    ("code", "failed"),
    [
        ("import sys; sys.exit('one\\n\\nlast line\\n')", "status 1: last line"),
        ("import time; time.sleep(60)", "cut off after 1 s"),
    ],
)
def test_a_failed_measurement_says_why(machine: Path, monkeypatch: pytest.MonkeyPatch, code: str, failed: str) -> None:
    monkeypatch.setattr(run, "command", lambda *_: python(code))
    found = run.measure_on_gpu(machine / "models", PAIR, PAIR.ways[0], 1.0)
    assert found["failed"] == failed
    assert found["gpu before"]["power.limit"] == "700.00 W"


def test_results_are_written_one_by_one_and_gone_on_from(
    machine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "PLAN", [PAIR])
    monkeypatch.setattr(
        run, "command", lambda *_: python(f"print('noise'); print('''{json.dumps(FIGURES)}'''); print('bye')")
    )
    old, new = machine / "old.jsonl", machine / "new.jsonl"
    about = {"wall seconds": 1, "gpu after": run.gpu(), "versions": run.versions()}
    old.write_text(json.dumps(line("ours", 1, 0, 7, **about)) + "\n")
    options = ["--models", str(machine / "models"), "--out", str(new), "--resume", str(old)]
    monkeypatch.setattr(sys, "argv", ["run.py", *options])
    run.main()
    lines = lines_of(new)
    assert lines[0] == lines_of(old)[0]
    assert len(lines) == 7
    assert lines[1]["gpu after"]["clocks.sm"] == "1980 MHz"
    assert "torch" in lines[1]["versions"]
    assert lines[1]["commit"] == run.commit()
    printed = capsys.readouterr().out
    assert "| pair | trl, batch 8 | 1,000 (1,000–1,000) |" in printed
    assert "Random weights and tokens; 2 stints on" in printed


def test_the_gpu_is_looked_at_while_it_is_measured(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "EVERY", 0.05)
    with (machine / "nvidia-smi").open("a") as script:
        script.write(f"touch {machine}/looked\n")
    until = f"import pathlib, time\nwhile not pathlib.Path('{machine}/looked').exists(): time.sleep(0.01)\n"
    found = run.figures_of(python(until + """print('{"timed": [0, 1e12]}')"""), 60.0)
    assert found["gpu during"] | {"samples": 0} == {"SM clock MHz": 1980.0, "power W": 300.12, "samples": 0}
    assert found["gpu during"]["samples"] >= 1


@pytest.mark.parametrize("fault", ["exit 9", "echo", "exec sleep 60"])
def test_a_look_at_the_gpu_that_fails_leaves_the_measurement_alone(
    fault: str, machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "EVERY", 0.05)
    monkeypatch.setattr(run, "PATIENCE", 0.2)
    (machine / "nvidia-smi").write_text(f"#!/bin/sh\ntouch {machine}/looked\n{fault}\n")
    until = f"import pathlib, time\nwhile not pathlib.Path('{machine}/looked').exists(): time.sleep(0.01)\n"
    found = run.figures_of(python(until + """print('{"timed": [0, 1e12]}')"""), 60.0)
    assert found["gpu during"] == run.gpu() == {}


def test_only_what_the_gpu_told_between_two_times_counts() -> None:
    told = [
        (when, {"clocks.sm": f"{clock} MHz", "power.draw": "[N/A]"}) for when, clock in enumerate((345, 9, 8, 7, 1))
    ]
    assert run.typical([*told, (2.5, {})], 1.0, 3.0) == {"SM clock MHz": 8.0, "samples": 3}
    assert run.typical(told, 10.0, 11.0) == {}


@pytest.mark.parametrize("laid", ["end to end", "padded"])
def test_the_tokens_of_trls_batches_are_counted_without_padding(laid: str) -> None:
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=laid == "end to end")
    batch = collate([{"input_ids": [5, 6, 7, 8, 9], "seq_lengths": [2, 3]}, {"input_ids": [4, 3], "seq_lengths": [2]}])
    counts: list[torch.Tensor] = []
    trainer = SimpleNamespace(training_step=lambda *_: 0)
    peers.count_tokens(trainer, counts)
    trainer.training_step(None, batch)
    assert [int(count) for count in counts] == [7]


def test_padding_that_cannot_be_told_is_no_count() -> None:
    with pytest.raises(ValueError, match="the padding of a batch of input_ids, labels cannot be told"):
        peers.tokens_of({"input_ids": torch.ones(1, 3), "labels": torch.ones(1, 3)})


@pytest.mark.parametrize("way", ["unsloth", "trl_packed"])
def test_peers_are_not_measured_without_flash_attention(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    given: Any = SimpleNamespace(folder=tmp_path, way=way)
    with pytest.raises(SystemExit, match=f"^{way.replace('_', '-')}: it is measured with FlashAttention, which cannot"):
        getattr(peers, way)(given, Clock(1, 2))


def test_a_measurement_that_hangs_leaves_time_for_others(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "LIMIT", 1.0)
    monkeypatch.setattr(run, "command", lambda *_: python("import time; time.sleep(60)"))
    assert run.measure_on_gpu(machine / "models", PAIR, PAIR.ways[0], 500.0)["failed"] == "cut off after 1 s"


def test_a_way_is_called_with_all_that_it_is(tmp_path: Path) -> None:
    group = next(group for group in PLAN if group.shape == "falcon-7b")
    called = " ".join(run.command(group, group.ways[0], tmp_path)[2:])
    assert called.startswith(f"{tmp_path} ours --rows mixed --batch 4 --batching grouped --steps 24 --check")
    assert called.endswith("--targets query_key_value,dense,dense_h_to_4h,dense_4h_to_h")


def test_the_plain_loop_clips_and_schedules_as_the_trainer_does() -> None:
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    steps = [{"tokens": torch.tensor(5), "labels": torch.tensor([[7, 7]])} for _ in range(3)]

    def graph(batch: Any, items: Any) -> None:
        weight.grad = torch.tensor([30.0, 40.0])

    trainer: Any = SimpleNamespace(
        create_optimizer_and_scheduler=lambda _: None,
        accelerator=SimpleNamespace(prepare_model=lambda model: model),
        model=torch.nn.Identity(),
        trainable=lambda: [weight],
        get_train_dataloader=lambda: steps,
        graph=graph,
        optimizer=optimizer,
        lr_scheduler=torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5),
        args=SimpleNamespace(max_grad_norm=0.5),
    )
    assert [int(count) for count in loop(trainer, Clock(1, 2))] == [5, 5]
    assert weight.tolist() == pytest.approx([-0.45, -0.6])  # norm 0.5 at a rate of 1, then of 0.5


def test_the_plain_loop_refuses_checkpointing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["one.py", "folder", "ours-loop", "--checkpointing"])
    with pytest.raises(SystemExit, match="2"):
        one.main()
    assert "ours-loop: it does not know --checkpointing" in capsys.readouterr().err


def test_a_machine_without_a_gpu_is_told_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run.gpu() == {}
    assert (
        conditions([{"stint": 1, "gpu after": run.gpu(), "versions": {"torch": "2"}}])
        == "Random weights and tokens; 1 stint on no GPU; torch 2."
    )
