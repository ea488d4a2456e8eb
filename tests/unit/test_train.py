"""Training: what is learned, in which precision, and that an interruption or an evaluation changes nothing."""

import csv
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from tiny_models import FORM, QUANTIZATION, SETTINGS, make_base, make_rows, make_tokens
from transformers import TrainerCallback
from transformers.models.falcon import modeling_falcon

import train_run as stage
from qlora.batches import with_places
from qlora.errors import UserError
from qlora.files import read_json, read_jsonl, write_json
from qlora.loss import TILE, add_supervised_loss
from qlora.models import load_quantized
from qlora.record import versions
from qlora.render import IGNORED
from qlora.training import Job, Trainer, make_trainer

torch.set_num_threads(1)


class Case:
    """A base, its tokens, and a training that writes into a folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.base = make_base(root / "base")
        self.tokens = make_tokens(root, self.base, make_rows(root))
        self.preflight = root / "preflight.json"
        write_json(self.preflight, {"model": "base", "packs": True})

    def train(
        self,
        name: str,
        seed: int = 1,
        checkpoints: str = "checkpoints",
        finished: str = "",
        system: str = "template",
        **settings: Any,
    ) -> Path:
        """Train, and return the run's folder."""
        run = {"name": name, "model": "base", "mixture": "mixture", "recipe": "test", "seed": seed}
        folder = self.root / name
        stage.train_run(
            model=self.base,
            tokens=self.tokens,
            preflight=self.preflight,
            adapter=folder / "adapter",
            record=folder / "run.json",
            training_log=folder / "training_log.csv",
            samples=folder / "samples.jsonl",
            run={**run, "settings": {**SETTINGS, **settings}},
            form=FORM,
            system=system,
            attention="sdpa",
            device="cpu",
            threads=1,
            code="0",
            checkpoints=str(self.root / checkpoints),
            finished=str(self.root / "finished" / (finished or name)),
            tensorboard=str(folder / "tensorboard"),
        )
        return folder

    def trainer(self, **settings: Any) -> Trainer:
        """A trainer that has not run."""
        wanted = {**SETTINGS, **settings}
        folder = self.root / "unused"
        batching = wanted["batching"]
        return make_trainer(
            Job(self.base, self.tokens, wanted, 1, "sdpa", "cpu", batching, folder, str(self.root / "tb"))
        )


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("train"))


def adapter_bytes(folder: Path) -> bytes:
    return (folder / "adapter/adapter_model.safetensors").read_bytes() + (
        folder / "adapter/adapter_config.json"
    ).read_bytes()


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(case: Case) -> None:
    first, again, other = case.train("first"), case.train("again"), case.train("other", seed=2)
    assert adapter_bytes(first) == adapter_bytes(again)
    assert adapter_bytes(first) != adapter_bytes(other)
    assert (first / "training_log.csv").read_bytes() == (again / "training_log.csv").read_bytes()


def test_a_run_leaves_a_record_and_a_log(case: Case) -> None:
    folder = case.train("recorded")
    record = read_json(folder / "run.json")
    assert record["steps"] == SETTINGS["max_steps"]
    assert 0 < record["supervised tokens"] < record["tokens"]
    assert record["peak memory in bytes"]["resident"] > 2**20
    assert set(record["pins"]["tokens"]) == {"train.arrow", "validation.arrow"}
    assert record["prompt"] == {"format": FORM, "system": "template"}
    assert record["attention"] == "sdpa"
    with (folder / "training_log.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows if row["loss"]] == ["2", "4", "6"]
    assert [row["step"] for row in rows if row["eval_loss"]] == ["3", "6"]
    assert list((folder / "tensorboard").glob("events.*"))


def test_a_run_that_finished_before_is_taken_without_a_step(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    first = adapter_bytes(case.train("kept", learning_rate=1e-3))
    assert adapter_bytes(case.train("kept", learning_rate=2e-3)) != first
    monkeypatch.delattr(stage, "make_trainer")
    back = case.train("kept", learning_rate=1e-3)
    assert adapter_bytes(back) == first
    assert read_json(back / "run.json")["settings"]["learning_rate"] == 1e-3
    renamed = case.train("renamed", finished="kept", learning_rate=1e-3)
    assert adapter_bytes(renamed) == adapter_bytes(back)
    assert {**read_json(back / "run.json"), "name": "renamed"} == read_json(renamed / "run.json")
    placed = read_json(case.train("kept", system="user", learning_rate=1e-3) / "run.json")
    # Of the same rows, in which none has a system message.
    assert placed["prompt"] == {"format": FORM, "system": "user"}


def test_a_model_that_mixes_packed_rows_gets_batches_of_like_length(case: Case) -> None:
    assert read_json(case.train("packed", batching="packed") / "run.json")["batching"] == "packed"
    write_json(case.preflight, {"model": "base", "packs": False})
    try:
        assert read_json(case.train("mixing", batching="packed") / "run.json")["batching"] == "grouped"
    finally:
        write_json(case.preflight, {"model": "base", "packs": True})


def test_another_width_of_packed_rows_is_another_run(case: Case) -> None:
    card = read_json(case.tokens / "card.json")
    narrow = adapter_bytes(case.train("narrow", finished="widths", batching="packed"))
    write_json(case.tokens / "card.json", {**card, "max_length": 64})
    try:
        assert adapter_bytes(case.train("wide", finished="widths", batching="packed")) != narrow
    finally:
        write_json(case.tokens / "card.json", card)


@pytest.mark.parametrize(
    ("what", "other"),
    [
        ("compute_dtype", lambda *_: torch.float16),
        ("capability", lambda _: (7, 5)),
        ("versions", lambda: {**versions(), "triton": "3.7.1"}),
    ],
)
def test_another_card_or_other_kernels_make_another_run(
    case: Case, monkeypatch: pytest.MonkeyPatch, what: str, other: Any
) -> None:
    def key() -> str:
        found: str = read_json(case.train("moved", max_steps=1) / "run.json")["key"]
        return found

    here = key()
    assert key() == here
    monkeypatch.setattr(stage, what, other)
    assert key() != here


def test_a_run_that_diverged_is_refused(case: Case) -> None:
    with pytest.raises(UserError, match="training diverged, the adapter holds numbers that are not finite"):
        case.train("diverged", learning_rate=1e30, eval_steps=None, max_grad_norm=1e30, max_steps=4)
    assert not (case.root / "diverged/adapter").exists()
    assert not (case.root / "finished/diverged").exists()


@pytest.mark.parametrize("where", ["train", "evaluate"])
def test_out_of_memory_is_told_with_the_way_out(case: Case, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    def full(*arguments: Any, **rest: Any) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Trainer, where, full)
    with pytest.raises(UserError, match=r"run 'full': out of GPU memory .* lower batch_size or max_length"):
        case.train("full", eval_steps=None)
    assert not (case.root / "full/adapter").exists()


def test_a_run_leaves_its_samples(case: Case) -> None:
    folder = case.train("sampled", samples=2)
    rows = list(read_jsonl(folder / "samples.jsonl"))
    assert [row["step"] for row in rows] == [3, 3, 6, 6]


class Interrupt(TrainerCallback):
    """Stops a training with a Ctrl-C when its fifth step begins."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        if state.global_step == 5:
            raise KeyboardInterrupt


@pytest.mark.parametrize(("batching", "dropout"), [("padded", 0.0), ("grouped", 0.2), ("packed", 0.0)])
def test_an_interrupted_run_goes_on_and_ends_in_the_same_adapter(
    case: Case, monkeypatch: pytest.MonkeyPatch, batching: str, dropout: float
) -> None:
    # Five steps are in the second epoch, or later: 20 rows in batches of four or eight.
    settings: dict[str, Any] = {"batching": batching, "samples": 2, "max_steps": 8}
    settings |= {"batch_size": 8 if batching != "packed" else 2}
    settings["lora"] = {**SETTINGS["lora"], "dropout": dropout}
    whole = case.train(f"whole-{batching}", checkpoints="elsewhere", **settings)
    made = stage.make_trainer

    def interrupted(*job: Any) -> Trainer:
        trainer = made(*job)
        trainer.add_callback(Interrupt())
        return trainer

    monkeypatch.setattr(stage, "make_trainer", interrupted)
    name = f"resumed-{batching}"
    with pytest.raises(KeyboardInterrupt):
        case.train(name, **settings)
    assert not (case.root / name / "adapter").exists()
    monkeypatch.setattr(stage, "make_trainer", made)
    resumed = case.train(name, **settings)
    assert adapter_bytes(resumed) == adapter_bytes(whole)
    record = read_json(resumed / "run.json")
    assert record["resumed from"] == "checkpoint-4"
    for file in ("training_log.csv", "samples.jsonl"):
        assert (resumed / file).read_bytes() == (whole / file).read_bytes()
    assert record["tokens"] == read_json(whole / "run.json")["tokens"]


def test_a_half_written_checkpoint_is_removed_and_the_one_before_it_taken(tmp_path: Path) -> None:
    assert stage.last_whole_checkpoint(tmp_path / "none") is None
    for step, state in ((2, "{}"), (4, '{"global_st'), (6, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if state is not None:
            (folder / "trainer_state.json").write_text(state)
    assert stage.last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]


def test_adapters_are_fp32_and_move_at_a_small_learning_rate_while_the_base_stays(case: Case) -> None:
    trainer = case.trainer(learning_rate=1e-5, max_steps=3)
    layers = [module for module in trainer.model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    base = [layer.weight.detach().clone() for layer in layers]
    before = [parameter.detach().clone() for parameter in trainer.trainable()]
    assert len(layers) == 2 * 7
    assert {parameter.dtype for parameter in before} == {torch.float32}
    trainer.train()
    moved = sum(int((new != old).sum()) for new, old in zip(trainer.trainable(), before, strict=True))
    assert moved > 0.99 * sum(parameter.numel() for parameter in before)
    assert all(torch.equal(layer.weight, old) for layer, old in zip(layers, base, strict=True))


def first_rows(trainer: Trainer) -> dict[str, torch.Tensor]:
    """The first four training rows as a batch."""
    rows = [trainer.train_dataset[place] for place in range(4)]
    batch = dict(trainer.data_collator(rows))
    del batch["tokens"]
    return batch


def gradients(trainer: Trainer) -> list[torch.Tensor]:
    """Gradients of the first rows, in training mode."""
    trainer.model.train()
    trainer.model.zero_grad()
    trainer.compute_loss(trainer.model, first_rows(trainer)).backward()
    return [parameter.grad.clone() for parameter in trainer.trainable() if parameter.grad is not None]


def test_an_evaluation_before_training_does_not_change_gradients(case: Case) -> None:
    plain, evaluated = case.trainer(), case.trainer()
    evaluated.evaluate()
    for one, other in zip(gradients(plain), gradients(evaluated), strict=True):
        assert torch.equal(one, other)


def test_the_loss_is_the_mean_cross_entropy_of_learned_positions(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = case.trainer()
    batch = first_rows(trainer)
    labels = batch["labels"].clone()
    labels[0] = IGNORED  # a row with nothing to learn
    batch = with_places({**batch, "labels": labels})
    logits = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
    wanted = torch.autograd.grad(expected, trainer.trainable())
    for tile in (TILE, 3):
        monkeypatch.setattr("qlora.loss.TILE", tile)
        loss = trainer.compute_loss(trainer.model, dict(batch))
        torch.testing.assert_close(loss, expected)
        for one, other in zip(torch.autograd.grad(loss, trainer.trainable()), wanted, strict=True):
            torch.testing.assert_close(one, other)


def test_a_batch_with_nothing_to_learn_has_a_zero_loss_with_a_gradient(case: Case) -> None:
    trainer = case.trainer()
    batch = first_rows(trainer)
    batch = with_places({**batch, "labels": torch.full_like(batch["labels"], IGNORED)})
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    assert float(loss) == 0.0
    assert float(trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=torch.tensor(0))) == 0.0


def test_falcon_is_quantised_too(tmp_path: Path) -> None:
    network = load_quantized(make_base(tmp_path, "falcon"), QUANTIZATION, "cpu", "sdpa")
    assert sum(isinstance(module, bitsandbytes.nn.Linear4bit) for module in network.modules()) == 2 * 4


@pytest.mark.parametrize(
    ("file", "record"), [("base/model.safetensors", "source.json"), ("tokens/train.arrow", "card.json")]
)
def test_a_flipped_byte_of_what_is_trained_on_is_named_and_not_used(case: Case, file: str, record: str) -> None:
    path = case.root / file
    right = path.read_bytes()
    path.write_bytes(right[:-1] + bytes([right[-1] ^ 1]))
    try:
        with pytest.raises(UserError) as error:
            case.train("flipped")
    finally:
        path.write_bytes(right)
    wanted = (
        f"{path} is not the file that {record} names; delete {path.parent} and run snakemake again, which makes it anew"
    )
    assert str(error.value) == wanted
    assert not (case.root / "flipped").exists()


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "config.json"])
@pytest.mark.parametrize("gone", [True, False])
def test_a_base_that_cannot_even_be_loaded_is_named(case: Case, name: str, gone: bool) -> None:
    path = case.root / "base" / name
    right = path.read_bytes()
    path.unlink()
    if not gone:
        path.write_bytes(right[: len(right) // 2])
    try:
        with pytest.raises(UserError, match=f"{path} is not the file that source.json names"):
            case.train("damaged")
    finally:
        path.write_bytes(right)
    assert not (case.root / "damaged").exists()


def test_a_model_of_which_nothing_is_quantised_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_base(tmp_path, "falcon")
    monkeypatch.setattr("qlora.models.use_plain_linear_in_falcon", lambda: None)
    monkeypatch.setattr(modeling_falcon, "FalconLinear", type("FalconLinear", (torch.nn.Linear,), {}))
    with pytest.raises(UserError, match="no layer was quantised"):
        load_quantized(base, QUANTIZATION, "cpu", "sdpa")


def test_a_forward_without_loss_items_is_the_models_own(case: Case) -> None:
    network = load_quantized(case.base, QUANTIZATION, "cpu", "sdpa").eval()
    ids = torch.arange(3, 20)[None]
    expected = network(input_ids=ids).logits
    add_supervised_loss(network)
    assert torch.equal(network(input_ids=ids).logits, expected)
