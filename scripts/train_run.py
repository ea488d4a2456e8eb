"""Stage `train`: LoRA adapters on a frozen 4-bit base, through TRL's SFTTrainer on rows tokenised beforehand."""

from qlora.stage import log, run_stage

import csv
import json
import shutil
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_utils import get_last_checkpoint

from qlora.errors import UserError
from qlora.files import (
    check_files,
    check_source,
    files_below,
    read_json,
    replacing,
    sha256_of_file,
    write_json,
)
from qlora.finished import keep, take
from qlora.models import compute_dtype, set_threads
from qlora.record import capability, commit, digest, hardware, peak_memory, versions
from qlora.training import Job, ShowProgress, Trainer, make_trainer

LOG_COLUMNS = ("step", "epoch", "loss", "eval_loss", "learning_rate", "grad_norm", "tokens")


def train_run(
    model: Path,
    tokens: Path,
    preflight: Path,
    adapter: Path,
    record: Path,
    training_log: Path,
    samples: Path,
    run: Mapping[str, Any],
    form: Mapping[str, str] | None,
    system: str,
    attention: str,
    device: str,
    threads: int,
    code: str,
    checkpoints: str,
    finished: str,
    tensorboard: str,
) -> None:
    """Train one run and write its adapter (PEFT form, safetensors), run.json, training_log.csv and samples.jsonl.

    `run` holds name, model, mixture, recipe, seed and settings (the recipe with the run's overrides). Checkpoints lie
    in a folder below `checkpoints` named by a hash of all that decides the result, so a run goes on from its own alone.
    A finished run is kept under the same hash below `finished`, and taken from there when it is asked for again.
    `preflight` is the model's report, which says whether its rows may be packed. `form` (a named format, None: the
    chat template) and `system` are what rendered the rows: noted, so that chat and cards render prompts alike.
    """
    started = time.monotonic()
    set_threads(threads, device)
    settings, pins = run["settings"], _pins(model, tokens)
    batching = allowed_batching(settings["batching"], read_json(preflight))
    card = read_json(tokens / "card.json")
    if not card["validation"]["kept"] and (settings["best_checkpoint"] or settings["patience"]):
        raise UserError(
            f"run '{run['name']}': best_checkpoint and patience compare losses on validation rows, and mixture"
            f" '{run['mixture']}' has none; set holdout.validation of a dataset"
        )
    room = card["max_length"]  # of a packed row
    dtype = str(compute_dtype(settings["quantization"]["compute_dtype"], device))
    machine = (versions(), device, capability(device), dtype, threads)
    key = digest(settings, run["seed"], pins, *machine, attention, batching, room, code)
    noted = {name: run[name] for name in ("name", "model", "mixture", "recipe")}
    noted["prompt"] = {"format": form, "system": system}
    outputs = {"adapter": adapter, "record": record, "training_log": training_log, "samples": samples}
    folder, kept = Path(checkpoints) / f"{run['name']}-{key}", Path(finished) / key
    if kept.is_dir():
        check(model, tokens)
        if take(kept, outputs):
            log.info("finished before: taken from %s, no step is needed", kept)
            write_json(record, {**read_json(record), **noted})
            return
    job = Job(model, tokens, settings, run["seed"], attention, device, batching, folder, tensorboard)
    trainer, last = trained(job, run["name"], partial(check, model, tokens))
    write_adapter(trainer, adapter)
    write_log(trainer.state.log_history, training_log)
    write_samples(trainer, samples)
    write_json(
        record,
        {
            **noted,
            "seed": run["seed"],
            "settings": settings,
            "key": key,
            "pins": pins,
            "adapter": {path.name: sha256_of_file(path) for path in files_below(adapter)},
            "versions": versions(),
            "commit": commit(),
            "hardware": hardware(device, threads),
            "attention": attention,
            "batching": batching,
            "rows": card["train"],
            **figures(trainer, last),
            "seconds": round(time.monotonic() - started, 2),
            "peak memory in bytes": peak_memory(device),
        },
    )
    keep(kept, outputs)
    shutil.rmtree(folder, ignore_errors=True)


def trained(job: Job, name: str, check: Callable[[], None]) -> tuple[Trainer, str | None]:
    """The trainer of a run after its last step, and the checkpoint that it went on from, if any.

    Raises UserError where the run does not fit into the card's memory, or diverges.
    """
    trainer = make_trainer(job, check)
    trainer.add_callback(ShowProgress(f"train {name}"))
    last = last_whole_checkpoint(job.folder)
    log.info("checkpoints in %s; %s", job.folder, f"going on from {last}" if last else "starting at step 0")
    try:
        trainer.train(resume_from_checkpoint=last)
        if job.validated and not any(
            "eval_loss" in entry and entry["step"] == trainer.state.global_step for entry in trainer.state.log_history
        ):
            trainer.evaluate()
    except torch.cuda.OutOfMemoryError as error:
        raise UserError(
            f"run '{name}': out of GPU memory ({job.settings['batch_size']} rows a micro-step, checkpointing "
            f"{job.settings['checkpointing']}); set checkpointing, or lower batch_size or max_length"
        ) from error
    if not all(weight.isfinite().all() for weight in trainer.trainable()):
        raise UserError(
            f"run '{name}': training diverged, the adapter holds numbers that are not finite;"
            " lower learning_rate, or use bfloat16 where the card has it"
        )
    return trainer, last


def figures(trainer: Trainer, last: str | None) -> dict[str, Any]:
    """How a run was computed, what it saw, and how fast where it did not go on from a checkpoint."""
    counter = trainer.counter()
    return {
        "computed by": trainer.chosen,
        "steps": trainer.state.global_step,
        "tokens": counter.tokens,
        "supervised tokens": counter.supervised,
        "trainable parameters": sum(parameter.numel() for parameter in trainer.trainable()),
        "resumed from": Path(last).name if last else None,
        "tokens per second": round(counter.tokens / trainer.seconds, 1) if not last else None,
    }


def allowed_batching(wanted: str, preflight: Mapping[str, Any]) -> str:
    """What the recipe asks for, or `grouped` where packed rows of this model would see each other."""
    if wanted == "packed" and not preflight["packs"]:
        log.info("%s mixes packed rows (preflight): batches of like length instead", preflight["model"])
        return "grouped"
    return wanted


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


def check(model: Path, tokens: Path) -> None:
    """Raise UserError that names a file of the base or the rows which is another now than when it was made."""
    check_source(model)
    check_files(tokens, read_json(tokens / "card.json")["sha256"], "card.json")


def _pins(model: Path, tokens: Path) -> dict[str, Any]:
    """What is trained on: the base's files by SHA-256, and the tokenised rows, as they are recorded."""
    source, rows = read_json(model / "source.json"), read_json(tokens / "card.json")["sha256"]
    return {
        "model": {
            "source": source["source"],
            "files": {name: file["sha256"] for name, file in source["files"].items()},
        },
        "tokens": rows,
    }


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


def write_samples(trainer: Trainer, path: Path) -> None:
    """Copy the answers to validation prompts; an empty file where there was no validation row to answer."""
    with replacing(path) as temporary:
        if trainer.samples.path.exists():
            shutil.copyfile(trainer.samples.path, temporary)
        else:
            temporary.touch()


def write_log(history: list[dict[str, Any]], path: Path) -> None:
    """Write training_log.csv: a row an entry of the trainer's log, with the columns that it has."""
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, LOG_COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(entry for entry in history if "loss" in entry or "eval_loss" in entry)


if __name__ == "__main__":
    run_stage(train_run)
