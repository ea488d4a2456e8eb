"""The training step against a plain fp32 reference, and the recipe's settings: each does what it says.

On a GPU: QLORA_TEST_DEVICE=cuda .venv/bin/pytest tests/unit/test_training.py
"""

import json
import os
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from tiny_models import QUANTIZATION, SETTINGS, make_base, make_rows, make_tokens
from transformers import TrainerCallback

from qlora import training
from qlora.batches import EndToEnd, PaddedBatch
from qlora.errors import UserError
from qlora.files import read_json, read_jsonl
from qlora.loss import summed_nll
from qlora.render import IGNORED
from qlora.training import Job, Trainer, make_trainer

torch.set_num_threads(1)
DEVICE = os.environ.get("QLORA_TEST_DEVICE", "cpu")
EXACT = {**QUANTIZATION, "compute_dtype": "float32"}


class Bench:
    """A base and ragged rows of several lengths."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.base = make_base(root / "base")
        self.tokens = make_tokens(root, self.base, make_rows(root, train=24))

    def trainer(self, **settings: Any) -> Trainer:
        """A trainer with the given settings laid over the tests' own."""
        wanted = {**SETTINGS, "quantization": EXACT, **settings}
        return make_trainer(
            Job(
                self.base,
                self.tokens,
                wanted,
                1,
                "sdpa",
                DEVICE,
                wanted["batching"],
                self.root / f"run-{len(list(self.root.iterdir()))}",
                str(self.root / "tensorboard"),
            )
        )


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("training"))


def reference(trainer: Trainer, rows: list[dict[str, Any]]) -> tuple[float, list[torch.Tensor]]:
    """Mean loss over the learned tokens of all rows, one at a time without any padding, and its gradients."""
    model, weights = trainer.model.eval(), trainer.trainable()
    items = sum(sum(label != IGNORED for label in row["labels"][1:]) for row in rows)
    total = torch.zeros((), device=DEVICE)
    for row in rows:
        logits = model(input_ids=torch.tensor([row["input_ids"]], device=DEVICE)).logits[0, :-1].float()
        labels = torch.tensor(row["labels"][1:], device=DEVICE)
        total = total + torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    loss = total / items
    return float(loss), list(torch.autograd.grad(loss, weights))


class Gradients(TrainerCallback):
    """Keeps the gradients of the first optimiser step, and stops."""

    def __init__(self) -> None:
        self.found: list[torch.Tensor] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        self.found = [weight.grad.clone() for weight in rest["model"].parameters() if weight.grad is not None]
        control.should_training_stop = True


def first_step(trainer: Trainer) -> tuple[float, list[torch.Tensor]]:
    """Loss and gradients of the trainer's first optimiser step."""
    keeper = Gradients()
    trainer.add_callback(keeper)
    trainer.train()
    return trainer.state.log_history[0]["loss"], keeper.found


def close(one: list[torch.Tensor], other: list[torch.Tensor]) -> None:
    for left, right in zip(one, other, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-6)


ALL = {"eval_steps": None, "max_grad_norm": 1e9, "max_steps": 1, "log_steps": 1}  # one step over all eight rows


@pytest.fixture(scope="module")
def eight(bench: Bench) -> Bench:
    """Eight ragged rows; with one that has nothing to learn."""
    small = Bench.__new__(Bench)
    small.root, small.base = bench.root / "eight", bench.base
    small.tokens = small.root / "tokens"
    small.tokens.mkdir(parents=True)
    rows = list(Dataset.from_file(str(bench.tokens / "train.arrow")).take(8))
    for place, row in enumerate(rows):  # ragged on purpose
        keep = len(row["input_ids"]) - place % 4
        row.update(input_ids=row["input_ids"][:keep], labels=row["labels"][:keep], length=keep)
    rows[3]["labels"] = [IGNORED] * len(rows[3]["labels"])
    for split in ("train", "validation"):
        write_stream(small.tokens / f"{split}.arrow", rows)
    (small.tokens / "card.json").write_text(json.dumps({"max_length": 64, "validation": {"kept": 8}, "stop ids": [2]}))
    return small


def write_stream(path: Path, rows: list[dict[str, Any]]) -> None:
    table = Dataset.from_list(rows).data.table
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)


@pytest.mark.parametrize(
    "settings",
    [
        {"batch_size": 8, "accumulation": 1},
        {"batch_size": 4, "accumulation": 2},
        {"batch_size": 1, "accumulation": 8},
        {"batch_size": 8, "accumulation": 1, "checkpointing": True},
        {"batch_size": 8, "accumulation": 1, "batching": "grouped"},
        {"batch_size": 8, "accumulation": 1, "batching": "packed"},
        {"batch_size": 1, "accumulation": 8, "batching": "packed", "checkpointing": True},
    ],
    ids=lambda settings: "-".join(f"{key}={value}" for key, value in settings.items()),
)
def test_the_step_equals_a_plain_reference(eight: Bench, settings: dict[str, Any]) -> None:
    trainer = eight.trainer(**ALL, **settings)
    rows = list(Dataset.from_file(str(eight.tokens / "train.arrow")))
    expected, wanted = reference(trainer, rows)
    loss, found = first_step(trainer)
    assert loss == pytest.approx(expected, rel=1e-4)
    close(found, wanted)


def test_on_a_cpu_beside_a_gpu_rows_lie_side_by_side(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda *_: (9, 0))
    trainer = bench.trainer(quantization={**QUANTIZATION, "compute_dtype": "bfloat16"}, max_steps=1)
    assert isinstance(trainer.data_collator, PaddedBatch)
    trainer.train()
    assert trainer.state.global_step == 1


def test_rows_end_to_end_are_learned_as_rows_side_by_side(eight: Bench) -> None:
    trainer = eight.trainer(**ALL, batch_size=8, accumulation=1)
    expected, wanted = reference(trainer, list(Dataset.from_file(str(eight.tokens / "train.arrow"))))
    trainer.data_collator = EndToEnd(0, None)
    loss, found = first_step(trainer)
    assert loss == pytest.approx(expected, rel=1e-4)
    close(found, wanted)


@pytest.mark.parametrize("batching", ["padded", "grouped", "packed"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_validation_loss_does_not_depend_on_batches(eight: Bench, batching: str, batch_size: int) -> None:
    trainer = eight.trainer(batching=batching, batch_size=batch_size)
    rows = list(Dataset.from_file(str(eight.tokens / "validation.arrow")))
    expected, _ = reference(trainer, rows)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_evaluations_between_steps_do_not_change_what_is_learned(bench: Bench) -> None:
    plain = bench.trainer(eval_steps=None, samples=0)
    watched = bench.trainer(eval_steps=1, samples=2)
    watched.evaluate()
    for trainer in (plain, watched):
        trainer.train()
    for one, other in zip(plain.trainable(), watched.trainable(), strict=True):
        assert torch.equal(one, other)


def test_a_model_taught_twenty_facts_answers_them_and_stops(tmp_path: Path) -> None:
    bench = Bench.__new__(Bench)
    bench.root, bench.base = tmp_path, make_base(tmp_path / "base")
    bench.tokens = make_tokens(tmp_path, bench.base, make_rows(tmp_path, train=20))
    for batching in ("padded", "packed"):
        size = {"padded": 10, "packed": 2}[batching]
        trainer = bench.trainer(
            max_steps=150, learning_rate=1e-2, schedule="cosine", eval_steps=None, batch_size=size, batching=batching
        )
        trainer.train()
        rows = list(Dataset.from_file(str(bench.tokens / "train.arrow")))
        trainer.samples.rows = rows
        trainer.samples.answer(trainer.model.eval(), 1)
        together = list(read_jsonl(trainer.samples.path))
        assert [row["generated"] for row in together] == [row["true"] for row in together]
        trainer.samples.rows = rows[:3]
        for place, row in enumerate(rows[:3]):
            trainer.samples.rows = [row]
            trainer.samples.answer(trainer.model, 2)
            alone = [item for item in read_jsonl(trainer.samples.path) if item["step"] == 2]
            assert [item["generated"] for item in alone] == [together[place]["generated"]]


@pytest.mark.parametrize(
    "optimizer",
    [
        "adamw_torch",
        "adamw_torch_fused",
        "adamw_8bit",
        "paged_adamw_8bit",
        "paged_adamw_32bit",
        "lion_8bit",
        "adafactor",
    ],
)
def test_each_optimiser_lowers_the_loss(bench: Bench, optimizer: str) -> None:
    rate = 5e-4 if optimizer == "lion_8bit" else 5e-3
    trainer = bench.trainer(optimizer=optimizer, learning_rate=rate, eval_steps=None, max_steps=12, log_steps=1)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-3:]) < sum(losses[:3])


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("constant", [1, 1, 1, 1, 1, 1]),
        ("constant_with_warmup", [0, 0.5, 1, 1, 1, 1]),
        ("linear", [0, 0.5, 1, 0.75, 0.5, 0.25]),
        ("cosine", [0, 0.5, 1, 0.8536, 0.5, 0.1464]),
    ],
)
def test_schedules(bench: Bench, schedule: str, rates: list[float]) -> None:
    trainer = bench.trainer(schedule=schedule, warmup=1 / 3, learning_rate=1.0, eval_steps=None, log_steps=1)
    trainer.create_optimizer_and_scheduler(6)
    found = []
    for _ in range(6):
        found.append(trainer.lr_scheduler.get_last_lr()[0])
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    assert found == pytest.approx(rates, abs=1e-3)


def test_gradients_are_clipped_and_epochs_counted(bench: Bench) -> None:
    trainer = bench.trainer(max_steps=None, epochs=2, batch_size=8, eval_steps=None, log_steps=1, max_grad_norm=1e-3)
    seen: list[float] = []

    class Norm(TrainerCallback):
        def on_optimizer_step(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            del args, state, control
            grads = [weight.grad for weight in rest["model"].parameters() if weight.grad is not None]
            seen.append(float(torch.nn.utils.get_total_norm(grads)))

    trainer.add_callback(Norm())
    trainer.train()
    assert trainer.state.global_step == 6  # two passes over 24 rows
    assert all(norm <= 1.0e-3 * 1.001 for norm in seen)


def test_half_precision_keeps_small_gradients_of_the_loss() -> None:
    """As under a gradient scaler: the factor comes after the loss was divided by the step's many tokens."""
    generator = torch.Generator().manual_seed(0)
    head = torch.nn.Linear(64, 3000, bias=False).half().requires_grad_(False)
    hidden = torch.randn(256, 64, generator=generator).half().requires_grad_()
    wanted = torch.randint(3000, (256,), generator=generator)
    exact = hidden.detach().float().requires_grad_()
    loss = torch.nn.functional.cross_entropy(exact @ head.weight.float().t(), wanted, reduction="sum") / 65536
    (truth,) = torch.autograd.grad(loss, exact)
    (found,) = torch.autograd.grad(summed_nll(hidden, wanted, head, None, 65536) * 65536, hidden)
    assert float((found.float() / 65536 - truth).norm() / truth.norm()) < 0.002


def test_the_penalty_adds_its_gradient_once_a_step(eight: Bench) -> None:
    penalty = {"weight": 0.1, "gamma": 0.5}
    for batch_size, accumulation in ((8, 1), (2, 4), (8, 4)):  # in the last, rows end before the step is whole
        plain = eight.trainer(**ALL, batch_size=batch_size, accumulation=accumulation)
        bound = eight.trainer(**ALL, batch_size=batch_size, accumulation=accumulation, lorentzian=penalty)
        weights = [weight.detach().clone() for weight in bound.trainable()]
        (_, free), (_, held) = first_step(plain), first_step(bound)
        added = [2 * 0.1 * weight / (0.5**2 + weight**2) for weight in weights]
        close(held, [one + other for one, other in zip(free, added, strict=True)])


def test_training_stops_early_and_keeps_the_best(bench: Bench) -> None:
    trainer = bench.trainer(
        learning_rate=0.5, max_steps=12, eval_steps=1, save_steps=1, log_steps=1, patience=2, best_checkpoint=True
    )
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert trainer.state.global_step < 12
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-6)
    assert min(losses) < losses[-1]
    assert {weight.dtype for weight in trainer.trainable()} == {torch.float32}


def test_samples_are_answered_at_each_evaluation(bench: Bench) -> None:
    trainer = bench.trainer(samples=2, eval_steps=3)
    trainer.train()
    rows = list(read_jsonl(trainer.samples.path))
    assert [row["step"] for row in rows] == [3, 3, 6, 6]
    assert all("Answer:" in row["prompt"] and row["true"] for row in rows)


@pytest.mark.parametrize("change", [{"dora": True}, {"rslora": True}, {"init": "loftq"}, {"plus_ratio": 4.0}])
def test_variants_train(bench: Bench, change: dict[str, Any]) -> None:
    trainer = bench.trainer(lora={**SETTINGS["lora"], **change}, eval_steps=None, max_steps=12, log_steps=1)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-3:]) < sum(losses[:3])
    assert {weight.dtype for weight in trainer.trainable()} == {torch.float32}


def test_dropout_and_biases_as_asked(bench: Bench) -> None:
    trainer = bench.trainer(lora={**SETTINGS["lora"], "dropout": 0.25})
    assert {module.p for name, module in trainer.model.named_modules() if "lora_dropout.default" in name} == {0.25}
    assert not any(name.endswith("bias") for name, weight in trainer.model.named_parameters() if weight.requires_grad)


def test_packing_takes_each_row_once_into_few_packs(bench: Bench) -> None:
    card = read_json(bench.tokens / "card.json")
    packs = bench.trainer(batching="packed").train_dataset["rows"]
    assert sorted(row for pack in packs for row in pack) == list(range(card["train"]["kept"]))
    assert len(packs) <= 11 / 9 * card["train"]["tokens"] / card["max_length"] + 1


def test_b_has_a_learning_rate_of_its_own_where_asked(bench: Bench) -> None:
    trainer = bench.trainer(lora={**SETTINGS["lora"], "plus_ratio": 4.0}, learning_rate=1e-3)
    rates = {id(weight): group["lr"] for group in trainer.create_optimizer().param_groups for weight in group["params"]}
    for name, weight in trainer.model.named_parameters():
        if weight.requires_grad:
            assert rates[id(weight)] == pytest.approx(4e-3 if "lora_B" in name else 1e-3), name


def test_without_validation_rows_there_is_no_evaluation(eight: Bench) -> None:
    bare = Bench.__new__(Bench)
    bare.root, bare.base, bare.tokens = eight.root / "bare", eight.base, eight.root / "bare/tokens"
    bare.tokens.mkdir(parents=True)
    rows = list(Dataset.from_file(str(eight.tokens / "train.arrow")))
    write_stream(bare.tokens / "train.arrow", rows)
    write_stream(bare.tokens / "validation.arrow", rows[:1])
    (bare.tokens / "card.json").write_text(json.dumps({"max_length": 64, "validation": {"kept": 0}, "stop ids": [2]}))
    trainer = bare.trainer(eval_steps=1, samples=2)
    trainer.train()
    assert not any("eval_loss" in entry for entry in trainer.state.log_history)


def test_fp8_in_several_processes_is_refused(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "check_card", lambda _: None)
    monkeypatch.setattr(Accelerator, "num_processes", 2)
    with pytest.raises(UserError) as error:
        bench.trainer(fp8=True)
    assert str(error.value) == "recipe: fp8 is for one process, and there are 2; train on one card, or set fp8: false"
