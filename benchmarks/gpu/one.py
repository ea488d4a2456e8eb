"""Measure one way to train on one GPU, in this process alone, and print a line of JSON.

    python benchmarks/gpu/one.py FOLDER WAY --rows mixed --batch 4 [--checkpointing]

FOLDER is what shapes.py wrote. Steps before `--warm-up` are not counted. Tokens are those that are no padding.
"""

import argparse
import json
import logging
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "scripts")]
WAYS = ("ours", "ours-peft", "ours-eager", "ours-fp8", "trl-packed", "trl", "notebook", "unsloth")
LORA = {"r": 8, "alpha": 16}
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Clock:
    """Tokens and seconds between the end of the warm-up and the last step; a trainer's callback."""

    def __init__(self, warm_up: int, steps: int) -> None:
        self.warm_up, self.steps, self.marks = warm_up, steps, [0.0, 0.0]
        self.started = time.monotonic()

    def at(self, step: int) -> None:
        import torch

        if step in (self.warm_up, self.steps):
            torch.cuda.synchronize()
            self.marks[step == self.steps] = time.monotonic()

    def result(self, tokens: int) -> dict[str, float]:
        import torch

        seconds = self.marks[1] - self.marks[0]
        return {
            "tokens per second": round(tokens / seconds, 1),
            "seconds a step": round(seconds / (self.steps - self.warm_up), 5),
            "start-up seconds": round(self.marks[0] - self.started, 1),
            "allocated GiB": round(torch.cuda.max_memory_allocated() / 2**30, 2),
            "reserved GiB": round(torch.cuda.max_memory_reserved() / 2**30, 2),
        }


def callback(clock: Clock) -> Any:
    from transformers import TrainerCallback

    class Mark(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            clock.at(state.global_step)

    return Mark()


def ours(given: argparse.Namespace, clock: Clock) -> dict[str, float]:
    """The workflow's own trainer, as its train job makes it."""
    from qlora import training
    from qlora.training import Job, make_trainer

    if given.way == "ours-peft":
        training.fuse = lambda network: "PEFT's own computation, asked for"  # type: ignore[assignment]
    if given.way in ("ours-peft", "ours-eager"):
        training.why_no_graph = lambda *_: "none, asked for"  # type: ignore[assignment]
    settings = {
        "quantization": {"type": "nf4", "double": True, "compute_dtype": "bfloat16"},
        "lora": {
            **LORA, "dropout": given.dropout, "target_modules": given.targets.split(","), "bias": "none",
            "rslora": False, "dora": False, "init": "default", "plus_ratio": None,
        },
        "optimizer": given.optimizer, "learning_rate": 1e-4, "schedule": "constant", "warmup": 0.0, "weight_decay": 0.0,
        "max_grad_norm": 1.0, "batch_size": given.batch, "accumulation": 1, "epochs": 1, "max_steps": clock.steps,
        "checkpointing": given.checkpointing, "log_steps": 10, "eval_steps": None, "save_steps": 10**6,
        "best_checkpoint": False, "patience": None, "samples": 0, "lorentzian": {"weight": 0.0, "gamma": 1.0},
        "fp8": given.way == "ours-fp8",
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        trainer = make_trainer(
            Job(
                given.folder / "model",
                given.folder / f"rows-{given.rows}",
                settings,
                1,
                "sdpa",
                "cuda",
                given.batching,
                Path(scratch) / "run",
                scratch,
            )  # fmt: skip
        )
        counts: list[int] = []
        trainer.add_callback(callback(clock))
        add = trainer.counter().add
        trainer.counter().add = lambda tokens, labels: (counts.append(tokens), add(tokens, labels))  # type: ignore[method-assign]
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    tokens = sum(int(count.sum()) for count in counts[clock.warm_up :])
    return {**clock.result(tokens), "last loss": losses[-1]}


def rows_of(given: argparse.Namespace) -> Any:
    from datasets import Dataset

    return Dataset.from_file(str(given.folder / f"rows-{given.rows}" / "train.arrow")).select_columns(["input_ids"])


def arguments(given: argparse.Namespace, clock: Clock, scratch: str, **more: Any) -> Any:
    from trl import SFTConfig

    return SFTConfig(
        **{
            "output_dir": scratch,
            "max_length": 2048,
            "per_device_train_batch_size": given.batch,
            "gradient_accumulation_steps": 1,
            "max_steps": clock.steps,
            "learning_rate": 1e-4,
            "gradient_checkpointing": given.checkpointing,
            "bf16": True,
            "optim": given.optimizer,
            "logging_steps": 10,
            "report_to": [],
            "save_strategy": "no",
            "seed": 1,
            **more,
        }  # fmt: skip
    )


def counted(trainer: Any, clock: Clock) -> list[Any]:
    """Let a peer's trainer count its tokens: labels that are looked at, where it has no attention mask."""
    counts: list[Any] = []
    original = trainer.training_step

    def step(model: Any, inputs: Any, *args: Any, **rest: Any) -> Any:
        mask = inputs.get("attention_mask")
        counts.append(mask.sum() if mask is not None and mask.dim() == 2 else (inputs["labels"] != -100).sum())
        return original(model, inputs, *args, **rest)

    trainer.training_step = step
    trainer.add_callback(callback(clock))
    return counts


def trl(given: argparse.Namespace, clock: Clock) -> dict[str, float]:
    """TRL as it comes (`trl`), packed with FlashAttention over rows and Liger (`trl-packed`), or as the notebooks do."""
    import torch
    from peft import LoraConfig, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTTrainer

    packed, notebook = given.way == "trl-packed", given.way == "notebook"
    more: dict[str, Any] = {}
    options: dict[str, Any] = {}
    if packed:
        more = {"packing": True, "packing_strategy": "bfd"}
        options = {"attn_implementation": "flash_attention_2"}
    network = AutoModelForCausalLM.from_pretrained(
        given.folder / "model", dtype=torch.bfloat16, device_map={"": 0}, **options
    )
    if packed:
        from liger_kernel.transformers.monkey_patch import _apply_liger_kernel_to_instance

        _apply_liger_kernel_to_instance(network, cross_entropy=False, fused_linear_cross_entropy=False)
    if notebook:
        network = prepare_model_for_kbit_training(network, use_gradient_checkpointing=given.checkpointing)
        more = {"pad_to_multiple_of": 512}
    lora = LoraConfig(r=LORA["r"], lora_alpha=LORA["alpha"], lora_dropout=given.dropout, bias="none",
                      target_modules=given.targets.split(","), task_type="CAUSAL_LM")  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        trainer = SFTTrainer(
            model=network, args=arguments(given, clock, scratch, **more), train_dataset=rows_of(given),
            processing_class=AutoTokenizer.from_pretrained(given.folder / "model"), peft_config=lora,
        )  # fmt: skip
        counts = counted(trainer, clock)
        trainer.train()
    return clock.result(sum(int(count) for count in counts[clock.warm_up :]))


def unsloth(given: argparse.Namespace, clock: Clock) -> dict[str, float]:
    """Unsloth, packed by TRL."""
    from unsloth import FastLanguageModel  # isort: skip (it changes what is imported after it)
    from trl import SFTTrainer

    checkpointing = "unsloth" if given.checkpointing else False
    network, tokenizer = FastLanguageModel.from_pretrained(
        str(given.folder / "model"), load_in_4bit=True, max_seq_length=2048, use_exact_model_name=True,
        use_gradient_checkpointing=checkpointing,
    )  # fmt: skip
    network = FastLanguageModel.get_peft_model(
        network, r=LORA["r"], lora_alpha=LORA["alpha"], lora_dropout=given.dropout, bias="none",
        target_modules=given.targets.split(","), use_gradient_checkpointing=checkpointing, max_seq_length=2048,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        trainer = SFTTrainer(
            model=network, args=arguments(given, clock, scratch, packing=True), train_dataset=rows_of(given),
            processing_class=tokenizer,
        )  # fmt: skip
        counts = counted(trainer, clock)
        trainer.train()
    return clock.result(sum(int(count) for count in counts[clock.warm_up :]))


def main() -> None:
    """Measure, and print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("way", choices=WAYS)
    parser.add_argument("--rows", choices=("full", "mixed"), default="mixed")
    parser.add_argument("--batching", choices=("packed", "grouped", "padded"), default="packed", help="of ours")
    parser.add_argument("--batch", type=int, default=4, help="rows, or packed rows of 2,048 tokens, a step")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--optimizer", default="adamw_torch_fused")
    parser.add_argument("--targets", default=",".join(SEVEN))
    parser.add_argument("--warm-up", type=int, default=8, help="steps")
    parser.add_argument("--steps", type=int, default=24, help="in all")
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    clock = Clock(given.warm_up, given.steps)
    measure = {"unsloth": unsloth}.get(given.way, ours if given.way.startswith("ours") else trl)
    figures = measure(given, clock)
    print(json.dumps({**{name: str(value) for name, value in vars(given).items() if name != "folder"}, **figures}))


if __name__ == "__main__":
    main()
