"""Stage `train`: LoRA adapters on a frozen 4-bit base, through TRL's SFTTrainer on rows tokenised beforehand."""

from qlora.stage import Progress, log, run_stage

import csv
import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from torch.utils.tensorboard import SummaryWriter
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from qlora.files import read_json, replacing, sha256_of_file, write_json
from qlora.loss import add_supervised_loss
from qlora.models import compute_dtype, load_quantized, set_threads
from qlora.record import digest, hardware, peak_memory, versions
from qlora.render import IGNORED, load_tokenizer, padding_id

LOG_COLUMNS = ("step", "epoch", "loss", "eval_loss", "learning_rate", "grad_norm", "tokens")


def train_run(
    model: Path,
    tokens: Path,
    adapter: Path,
    record: Path,
    training_log: Path,
    run: Mapping[str, Any],
    attention: str,
    device: str,
    threads: int,
    code: str,
    checkpoints: str,
    tensorboard: str,
) -> None:
    """Train one run and write its adapter (PEFT form, safetensors), run.json and training_log.csv.

    `run` holds name, model, mixture, recipe, seed and settings (the recipe with the run's overrides). Checkpoints lie
    in a folder below `checkpoints` named by a hash of all that decides the result, so a run goes on from its own alone.
    """
    started = time.monotonic()
    set_threads(threads, device)
    settings, pins = run["settings"], _pins(model, tokens)
    key = digest(settings, run["seed"], pins, versions(), device, threads, attention, code)
    folder = Path(checkpoints) / f"{run['name']}-{key}"
    trainer = make_trainer(model, tokens, settings, run["seed"], attention, device, folder, tensorboard)
    trainer.add_callback(ShowProgress(f"train {run['name']}"))
    last = last_whole_checkpoint(folder)
    log.info("checkpoints in %s; %s", folder, f"going on from {last}" if last else "starting at step 0")
    trainer.train(resume_from_checkpoint=last)
    if not any(
        "eval_loss" in entry and entry["step"] == trainer.state.global_step for entry in trainer.state.log_history
    ):
        trainer.evaluate()
    write_adapter(trainer, adapter)
    write_log(trainer.state.log_history, training_log)
    counter = trainer.counter()
    seconds = time.monotonic() - started
    write_json(
        record,
        {
            **{name: run[name] for name in ("name", "model", "mixture", "recipe", "seed", "settings")},
            "key": key,
            "pins": pins,
            "versions": versions(),
            "hardware": hardware(device, threads),
            "attention": attention,
            "steps": trainer.state.global_step,
            "tokens": counter.tokens,
            "supervised tokens": counter.supervised,
            "rows": read_json(tokens / "card.json")["train"],
            "trainable parameters": sum(parameter.numel() for parameter in trainer.trainable()),
            "resumed from": Path(last).name if last else None,
            "seconds": round(seconds, 2),
            "tokens per second": round(counter.tokens / trainer.seconds, 1) if not last else None,
            "peak memory in bytes": peak_memory(device),
        },
    )
    shutil.rmtree(folder, ignore_errors=True)


def last_whole_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that was written to its end, or None; what a kill left half-written is removed."""
    while folder.is_dir() and (last := get_last_checkpoint(str(folder))):
        try:
            read_json(Path(last) / "trainer_state.json")  # written last
        except (FileNotFoundError, json.JSONDecodeError):
            log.info("%s is not whole, and is removed", last)
            shutil.rmtree(last)
        else:
            return last
    return None


def _pins(model: Path, tokens: Path) -> dict[str, Any]:
    """What was trained on: the base's files by SHA-256, and the tokenised rows."""
    source = read_json(model / "source.json")
    return {
        "model": {
            "source": source["source"],
            "files": {name: file["sha256"] for name, file in source["files"].items()},
        },
        "tokens": {name: sha256_of_file(tokens / name) for name in ("train.arrow", "validation.arrow")},
    }


class TokenCounter(TrainerCallback, ExportableState):
    """Tokens seen, without padding, and how many of them were learned; saved with each checkpoint."""

    def __init__(self) -> None:
        self.tokens = 0
        self.supervised = 0

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"args": {}, "attributes": {"tokens": self.tokens, "supervised": self.supervised}}


class ShowProgress(TrainerCallback):
    """A line on the terminal now and then."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.progress: Progress | None = None
        self.first = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:  # noqa: ARG002 (the trainer's)
        """Called by the trainer after each optimiser step."""
        if self.progress is None:
            self.first = state.global_step - 1  # above 0 where it went on from a checkpoint
            self.progress = Progress(state.max_steps - self.first, self.what, "steps")
        loss = next((entry["loss"] for entry in reversed(state.log_history) if "loss" in entry), None)
        self.progress.update(state.global_step - self.first, f", loss {loss:.3f}" if loss is not None else "")


class Trainer(SFTTrainer):
    """TRL's trainer, counting what it sees."""

    model: PeftModel
    seconds = 0.0  # spent in training steps

    def trainable(self) -> list[torch.nn.Parameter]:
        """What is learned: the adapter's weights."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def counter(self) -> TokenCounter:
        """The counter; found anew each time, since going on from a checkpoint puts another in its place."""
        return next(item for item in self.callback_handler.callbacks if isinstance(item, TokenCounter))

    def training_step(self, model: Any, inputs: Any, *args: Any, **rest: Any) -> torch.Tensor:
        """One micro-step."""
        started = time.monotonic()
        counter = self.counter()
        counter.tokens += int(inputs["attention_mask"].sum())
        counter.supervised += int((inputs["labels"] != IGNORED).sum())
        loss = super().training_step(model, inputs, *args, **rest)
        self.seconds += time.monotonic() - started
        return loss

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean over the learned tokens of the optimiser step (of the batch, in evaluation), in nats."""
        if return_outputs:
            raise ValueError("logits are not computed in training")
        if num_items_in_batch is None:
            num_items_in_batch = (inputs["labels"][:, 1:] != IGNORED).sum().clamp(min=1)
        return model(**inputs, loss_items=num_items_in_batch)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the tokens seen to what is logged."""
        super().log({**logs, "tokens": self.counter().tokens}, start_time)

    def create_model_card(self, *args: Any, **rest: Any) -> None:
        """A checkpoint to resume from needs no card."""


def make_trainer(
    model: Path,
    tokens: Path,
    settings: Mapping[str, Any],
    seed: int,
    attention: str,
    device: str,
    folder: Path,
    tensorboard: str,
) -> Trainer:
    """A trainer over the quantised base with fp32 adapters. The seed is set before the adapter exists."""
    tokenizer = load_tokenizer(model)
    lora = settings["lora"]
    shutil.rmtree(tensorboard, ignore_errors=True)
    network = load_quantized(model, settings["quantization"], device, attention)
    add_supervised_loss(network)
    trainer = Trainer(
        model=network,
        args=training_arguments(settings, seed, device, folder),
        train_dataset=Dataset.from_file(str(tokens / "train.arrow")),
        eval_dataset=Dataset.from_file(str(tokens / "validation.arrow")),
        processing_class=tokenizer,
        data_collator=DataCollatorForLanguageModeling(pad_token_id=padding_id(tokenizer)),
        peft_config=LoraConfig(
            task_type="CAUSAL_LM",
            r=lora["r"],
            lora_alpha=lora["alpha"],
            lora_dropout=lora["dropout"],
            bias=lora["bias"],
            target_modules=lora["target_modules"],
        ),
        callbacks=[TokenCounter(), TensorBoardCallback(SummaryWriter(tensorboard))],
    )
    for parameter in trainer.trainable():  # TRL casts to bfloat16, where small steps are rounded away
        parameter.data = parameter.data.float()
    return trainer


def training_arguments(settings: Mapping[str, Any], seed: int, device: str, folder: Path) -> SFTConfig:
    """The recipe in the trainer's own terms."""
    dtype = compute_dtype(settings["quantization"]["compute_dtype"], device)
    return SFTConfig(
        output_dir=str(folder),
        seed=seed,
        data_seed=seed,
        use_cpu=device == "cpu",
        bf16=device != "cpu" and dtype == torch.bfloat16,
        fp16=device != "cpu" and dtype == torch.float16,
        optim=settings["optimizer"],
        learning_rate=settings["learning_rate"],
        lr_scheduler_type=settings["schedule"],
        warmup_steps=settings["warmup"],
        weight_decay=settings["weight_decay"],
        max_grad_norm=settings["max_grad_norm"],
        per_device_train_batch_size=settings["batch_size"],
        per_device_eval_batch_size=settings["batch_size"],
        gradient_accumulation_steps=settings["accumulation"],
        num_train_epochs=settings["epochs"],
        max_steps=settings["max_steps"] or -1,
        gradient_checkpointing=settings["checkpointing"],
        logging_steps=settings["log_steps"],
        eval_strategy="steps" if settings["eval_steps"] else "no",
        eval_steps=settings["eval_steps"],
        save_strategy="steps",
        save_steps=settings["save_steps"],
        save_total_limit=2,
        restore_callback_states_from_checkpoint=True,
        report_to=[],
        train_sampling_strategy="group_by_length" if settings["group_by_length"] else "random",
        length_column_name="length",
        prediction_loss_only=True,
        disable_tqdm=True,
        dataloader_pin_memory=device != "cpu",
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
    )


def write_adapter(trainer: Trainer, adapter: Path) -> None:
    """Save the adapter in PEFT form, the same bytes each time."""
    with replacing(adapter) as folder:
        trainer.model.save_pretrained(str(folder))
        (folder / "adapter_model.safetensors").chmod(0o644)  # written for its owner alone
        (folder / "README.md").unlink(missing_ok=True)  # an empty card; `publish` writes one with results
        config = read_json(folder / "adapter_config.json")
        if isinstance(config["target_modules"], list):
            config["target_modules"] = sorted(config["target_modules"])  # PEFT holds a set, whose order changes
        write_json(folder / "adapter_config.json", config)


def write_log(history: list[dict[str, Any]], path: Path) -> None:
    """Write training_log.csv: a row an entry of the trainer's log, with the columns that it has."""
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, LOG_COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(entry for entry in history if "loss" in entry or "eval_loss" in entry)


if __name__ == "__main__":
    run_stage(train_run)
