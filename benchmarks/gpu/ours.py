"""The workflow's own trainer, as its train job makes it."""

import argparse
import tempfile
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from clock import Clock, callback
from qlora import training
from qlora.training import Job, Trainer, learned, make_trainer


def ours(given: argparse.Namespace, clock: Clock) -> dict[str, float | list[float]]:
    """Train as it comes (`ours`), with FP8 products, with PEFT's computation, without the step graph, or in a loop.

    `ours-kept` keeps checkpointed hidden states on the GPU.
    """
    if given.way == "ours-peft":
        training.fuse = lambda *_: "PEFT's own computation, asked for"
    if given.way in ("ours-peft", "ours-eager"):
        training.why_no_graph = lambda *_: "none, asked for"
    if given.way == "ours-kept":
        training.keep_on_host = lambda *_: "checkpointed hidden states on the GPU, asked for"
    counts: list[torch.Tensor] = []
    with tempfile.TemporaryDirectory() as scratch:
        trainer = make_trainer(
            Job(
                model=given.folder / "model",
                tokens=given.folder / f"rows-{given.rows}",
                settings=recipe(given, clock.steps),
                seed=1,
                attention="sdpa",
                device="cuda",
                batching=given.batching,
                folder=Path(scratch) / "run",
                tensorboard=scratch,
            )
        )
        if given.way == "ours-loop":
            return clock.result(loop(trainer, clock))
        trainer.add_callback(callback(clock))
        counter = trainer.counter()
        add = counter.add

        def count(tokens: torch.Tensor, labels: torch.Tensor) -> None:
            counts.append(tokens)
            add(tokens, labels)

        counter.add = count
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {**clock.result(counts), "last loss": losses[-1]}


def loop(trainer: Trainer, clock: Clock) -> list[torch.Tensor]:
    """The same recorded steps, clipping, optimiser and schedule in a plain loop; gives each step's tokens."""
    trainer.create_optimizer_and_scheduler(clock.steps)
    trainer.model_wrapped = trainer.accelerator.prepare_model(trainer.model.train())  # as the trainer does it
    weights, counts = trainer.trainable(), []
    for number, batch in enumerate(islice(trainer.get_train_dataloader(), clock.steps), start=1):
        counts.append(batch.pop("tokens"))
        trainer.graph(batch, learned(batch))
        torch.nn.utils.clip_grad_norm_(weights, trainer.args.max_grad_norm)
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
        trainer.optimizer.zero_grad()
        clock.at(number)
    return counts


def recipe(given: argparse.Namespace, steps: int) -> dict[str, Any]:
    """The recipe of config.yaml's form that does the same work as the peers."""
    return {
        "quantization": {"type": "nf4", "double": True, "compute_dtype": "bfloat16"},
        "lora": {
            "r": given.rank,
            "alpha": given.alpha,
            "dropout": given.dropout,
            "target_modules": given.targets.split(","),
            "bias": "none",
            "rslora": False,
            "dora": False,
            "init": "default",
            "plus_ratio": None,
        },
        "optimizer": given.optimizer,
        "learning_rate": 1e-4,
        "schedule": "constant",
        "warmup": 0.0,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "batch_size": given.batch,
        "accumulation": 1,
        "epochs": 1,
        "max_steps": steps,
        "checkpointing": given.checkpointing,
        "log_steps": 10,
        "eval_steps": None,
        "save_steps": 10**6,
        "best_checkpoint": False,
        "patience": None,
        "samples": 0,
        "lorentzian": {"weight": 0.0, "gamma": 1.0},
        "fp8": given.way == "ours-fp8",
    }
