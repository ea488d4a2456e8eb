"""How others train the same: TRL, TRL packed, a notebook's way, Unsloth."""

import argparse
import importlib
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import torch

from clock import Clock, callback

Figures = dict[str, float | list[float]]
Build = Callable[[dict[str, Any]], Any]  # a trainer, of the arguments that all have in common


def trained(given: argparse.Namespace, clock: Clock, build: Build) -> Figures:
    """Train, and count the tokens that are no padding."""
    counts: list[Any] = []
    with tempfile.TemporaryDirectory() as scratch:
        trainer = build(
            {
                "output_dir": scratch,
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
            }
        )
        count_tokens(trainer, counts)
        trainer.add_callback(callback(clock))
        trainer.train()
    return clock.result(counts)


def count_tokens(trainer: Any, counts: list[Any]) -> None:
    """Add the tokens of each micro-step to `counts`."""
    original = trainer.training_step

    def step(model: Any, inputs: Any, *args: Any, **rest: Any) -> Any:
        counts.append(tokens_of(inputs))
        return original(model, inputs, *args, **rest)

    trainer.training_step = step


def tokens_of(inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The tokens of a batch that are no padding: its mask's; without one, all of rows that TRL laid end to end.

    Its labels would be fewer: TRL leaves out the first of each document.
    """
    mask = inputs.get("attention_mask")
    if mask is not None and mask.dim() == 2:
        return mask.sum()
    if "position_ids" not in inputs:
        raise ValueError(f"the padding of a batch of {', '.join(inputs)} cannot be told")
    return torch.tensor(inputs["input_ids"].numel())


def need_flash_attention(way: str) -> None:
    """End in one line where there is no FlashAttention, with which these ways are measured: they go on without it."""
    try:
        importlib.import_module("flash_attn")
    except ImportError as missing:
        raise SystemExit(f"{way}: it is measured with FlashAttention, which cannot be imported: {missing}") from None


def trl(given: argparse.Namespace, clock: Clock) -> Figures:
    """TRL, rows padded to the longest of their batch. Checkpointing, TRL's default, is as the plan says."""
    network, tokenizer = _loaded(given)

    def build(common: dict[str, Any]) -> Any:
        from trl import SFTConfig, SFTTrainer

        return SFTTrainer(
            model=network,
            args=SFTConfig(**common, max_length=2048),
            train_dataset=_rows(given),
            processing_class=tokenizer,
            peft_config=_lora(given),
        )

    return trained(given, clock, build)


def trl_packed(given: argparse.Namespace, clock: Clock) -> Figures:
    """TRL with packed rows, FlashAttention over them, and Liger's norm, RoPE and MLP; its loss is in tiles already."""
    need_flash_attention("trl-packed")
    from liger_kernel.transformers.monkey_patch import _apply_liger_kernel_to_instance

    network, tokenizer = _loaded(given, attn_implementation="flash_attention_2")
    _apply_liger_kernel_to_instance(network, cross_entropy=False, fused_linear_cross_entropy=False)

    def build(common: dict[str, Any]) -> Any:
        from trl import SFTConfig, SFTTrainer

        return SFTTrainer(
            model=network,
            args=SFTConfig(**common, max_length=2048, packing=True, packing_strategy="bfd"),
            train_dataset=_rows(given),
            processing_class=tokenizer,
            peft_config=_lora(given),
        )

    return trained(given, clock, build)


def notebook(given: argparse.Namespace, clock: Clock) -> Figures:
    """A notebook's way."""
    return trained(given, clock, lambda common: notebook_trainer(given, common))


def notebook_trainer(given: argparse.Namespace, common: dict[str, Any], **options: Any) -> Any:
    """As notebooks do: fp32 norms, embeddings and head, the plain Trainer, rows padded to 512, every token learned.

    Longer rows are padded to the next multiple of 512 rather than cut, so that the work is the others'. `options` are
    those of loading the base.
    """
    from peft import get_peft_model, prepare_model_for_kbit_training
    from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

    network, tokenizer = _loaded(given, **options)
    network = prepare_model_for_kbit_training(network, use_gradient_checkpointing=given.checkpointing)
    return Trainer(
        model=get_peft_model(network, _lora(given)),
        args=TrainingArguments(**common),
        train_dataset=_rows(given),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False, pad_to_multiple_of=512),
    )


def unsloth(given: argparse.Namespace, clock: Clock) -> Figures:
    """Unsloth, packed by TRL."""
    need_flash_attention("unsloth")
    from unsloth import FastLanguageModel  # isort: skip (it changes what is imported after it)
    from trl import SFTConfig, SFTTrainer

    checkpointing = "unsloth" if given.checkpointing else False
    network, tokenizer = FastLanguageModel.from_pretrained(
        str(given.folder / "model"),
        load_in_4bit=True,
        max_seq_length=2048,
        use_exact_model_name=True,
        use_gradient_checkpointing=checkpointing,
    )
    network = FastLanguageModel.get_peft_model(
        network,
        r=given.rank,
        lora_alpha=given.alpha,
        lora_dropout=given.dropout,
        bias="none",
        target_modules=given.targets.split(","),
        use_gradient_checkpointing=checkpointing,
        max_seq_length=2048,
    )

    def build(common: dict[str, Any]) -> Any:
        return SFTTrainer(
            model=network,
            args=SFTConfig(**common, max_length=2048, packing=True),
            train_dataset=_rows(given),
            processing_class=tokenizer,
        )

    return trained(given, clock, build)


def _loaded(given: argparse.Namespace, **options: Any) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from shapes import let_falcon_be_quantised

    let_falcon_be_quantised()
    folder = given.folder / "model"
    options = {"dtype": torch.bfloat16, "device_map": {"": 0}, **options}
    network = AutoModelForCausalLM.from_pretrained(folder, **options)
    return network, AutoTokenizer.from_pretrained(folder)


def _lora(given: argparse.Namespace) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=given.rank,
        lora_alpha=given.alpha,
        lora_dropout=given.dropout,
        bias="none",
        target_modules=given.targets.split(","),
        task_type="CAUSAL_LM",
    )


def _rows(given: argparse.Namespace) -> Any:
    from datasets import Dataset

    return Dataset.from_file(str(given.folder / f"rows-{given.rows}" / "train.arrow")).select_columns(["input_ids"])
