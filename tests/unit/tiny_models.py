"""Small random base models and rows, for tests that train and predict in a second."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from bitsandbytes.nn import Linear4bit
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tokenizers_for_tests import family_tokenizer

import train_run
from concatenate_mixture import concatenate_mixture
from format_dataset import format_dataset
from preflight_model import preflight_model
from qlora.files import write_jsonl, write_source_record
from qlora.training import Trainer
from tokenize_mixture import tokenize_mixture

FORM = {"system": "{content}\n", "user": "{content}\nAnswer:", "assistant": " {content}", "between": "\n\n"}
QUANTIZATION = {"type": "nf4", "double": True, "compute_dtype": "auto"}
SETTINGS: dict[str, Any] = {
    "quantization": QUANTIZATION,
    "lora": {
        "r": 4,
        "alpha": 8,
        "dropout": 0.0,
        "target_modules": "all-linear",
        "bias": "none",
        "rslora": False,
        "dora": False,
        "init": "default",
        "plus_ratio": None,
    },
    "optimizer": "adamw_torch",
    "learning_rate": 5e-3,
    "schedule": "constant",
    "warmup": 0.0,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "batch_size": 4,
    "accumulation": 1,
    "epochs": 1,
    "max_steps": 6,
    "batching": "padded",
    "checkpointing": False,
    "log_steps": 2,
    "eval_steps": 3,
    "save_steps": 2,
    "best_checkpoint": False,
    "patience": None,
    "samples": 0,
    "lorentzian": {"weight": 0.0, "gamma": 1.0},
    "fp8": False,
    "cpu_offload": False,
}
INSTRUCT = {"system": "{content}\n", "user": "Instruct: {content}\nOutput:", "assistant": " {content}", "between": "\n"}
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 256}
# With the usual range, or a head of its own, a frozen random head hardly tells tokens apart.
WIDE = {"initializer_range": 0.2, "tie_word_embeddings": True, "intermediate_size": 128}
GROUPED = {**WIDE, "num_key_value_heads": 2}
LLAMA3_ROPE = {
    **{"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "original_max_position_embeddings": 64,
}


@dataclass(frozen=True)
class Family:
    """How the models of a family are made small, and how its registry entry reads."""

    config: type[transformers.PreTrainedConfig]
    sizes: dict[str, Any]
    form: dict[str, str] | None = None  # None: the tokenizer's chat template
    system: str = "template"
    attention: str = "sdpa"


_llama2 = Family(transformers.LlamaConfig, WIDE)
_llama3 = Family(transformers.LlamaConfig, {**GROUPED, "rope_parameters": LLAMA3_ROPE})
_mistral = Family(transformers.MistralConfig, {**GROUPED, "sliding_window": 64})
_gemma = Family(transformers.GemmaConfig, {**WIDE, "num_key_value_heads": 1, "head_dim": 32})
FAMILIES = {  # named like the tokenizers; `llama` alone has the one below
    "llama": Family(transformers.LlamaConfig, GROUPED, form=FORM),
    "llama2": replace(_llama2, form=FORM),
    "llama2-chat": _llama2,
    "mistral": replace(_mistral, form=FORM),
    "mistral-instruct": replace(_mistral, system="user"),
    "zephyr": _mistral,
    "gemma": replace(_gemma, form=FORM),
    "gemma-it": replace(_gemma, system="user"),
    "gemma2": Family(
        transformers.Gemma2Config, {**_gemma.sizes, "sliding_window": 64}, system="user", attention="eager"
    ),
    "gemma3": Family(
        transformers.Gemma3TextConfig,
        {**_gemma.sizes, "sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "falcon": Family(transformers.FalconConfig, {"initializer_range": 0.2}, form=FORM),
    "phi-2": Family(
        transformers.PhiConfig, {**WIDE, "tie_word_embeddings": False, "partial_rotary_factor": 0.5}, form=INSTRUCT
    ),
    "llama3": _llama3,
    "llama3.2": _llama3,
    "qwen2.5": Family(transformers.Qwen2Config, GROUPED),
    "qwen3": Family(transformers.Qwen3Config, {**GROUPED, "head_dim": 32}),
    "phi3": Family(transformers.Phi3Config, {**WIDE, "tie_word_embeddings": False}),
    "smollm": Family(transformers.LlamaConfig, GROUPED),
}
WORDS = "red green blue seven eight nine river stone cloud apple".split()


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE with BOS in front."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=384, special_tokens=["<pad>", "<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator([" ".join(WORDS), "What is the colour of the river?\nAnswer: blue"], trainer)
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def make_base(folder: Path, family: str = "llama", **sizes: Any) -> Path:
    """A folder like a downloaded model's: the family's own classes and tokenizer, random weights from seed 0.

    `sizes`: keys of the config that differ from the family's own here.
    """
    words = tokenizer() if family == "llama" else family_tokenizer(family)
    made = FAMILIES[family]
    config = made.config(
        **{**SIZES, **made.sizes, **sizes},
        vocab_size=64 * (max(words.get_vocab().values()) // 64 + 1),
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    words.save_pretrained(folder)
    write_source_record(folder, {"build": "random"})
    return folder


def make_rows(folder: Path, train: int = 20, test: int = 6) -> Path:
    """A formatted dataset of short questions and answers."""
    source = folder / "source"
    for split, count in (("train", train), ("validation", 4), ("test", test)):
        rows = [
            {"q": f"What is {split} {WORDS[i % 10]} {i}?", "a": f"{WORDS[(3 * i) % 10]} {i % 7}"} for i in range(count)
        ]
        source.mkdir(parents=True, exist_ok=True)
        write_jsonl(source / f"{split}.jsonl", rows)
    settings = {
        "source": {"path": str(source)},
        "files": {split: f"{split}.jsonl" for split in ("train", "validation", "test")},
        "prompt": "{q}",
        "completion": "{a}",
        "task": "text",
        "holdout": {},
        "limit": {},
        "licence": "MIT",
    }
    format_dataset(source, folder / "facts", "facts", settings)
    return folder / "facts"


def make_tokens(folder: Path, base: Path, dataset: Path, family: str = "llama") -> Path:
    """The tokenised rows of a mixture of one dataset."""
    made = FAMILIES[family]
    concatenate_mixture([dataset], [], folder / "mixture", "mixture", {dataset.name: {"weight": 1.0, "cap": None}}, 0)
    tokenize_mixture(folder / "mixture", base, folder / "tokens", made.form, 128, "drop", made.system)
    return folder / "tokens"


def make_preflight(base: Path, family: str = "llama") -> Path:
    """The report of a base's preflight, beside it."""
    made = FAMILIES[family]
    report = base.parent / "preflight.json"
    preflight_model(base, report, made.form, made.system, False, made.attention, ["all-linear"])
    return report


@dataclass(frozen=True)
class Trained:
    """What a training left in `folder` (adapter, run.json, …), its trainer, and the weights that it started from."""

    folder: Path
    trainer: Trainer
    adapter: list[torch.Tensor]
    base: list[torch.Tensor]  # the bytes of the 4-bit layers


def layers_in_4_bits(network: torch.nn.Module) -> list[Linear4bit]:
    """The quantised layers of a network."""
    return [module for module in network.modules() if isinstance(module, Linear4bit)]


def train(base: Path, tokens: Path, preflight: Path, folder: Path, family: str = "llama", **settings: Any) -> Trained:
    """Run the stage `train` into `folder`, with SETTINGS changed by `settings`."""
    made = FAMILIES[family]
    seen: list[Trained] = []
    make_trainer = train_run.make_trainer

    def keeping(*job: Any) -> Trainer:
        trainer = make_trainer(*job)
        adapter = [weight.detach().clone() for weight in trainer.trainable()]
        layers = layers_in_4_bits(trainer.model)
        seen.append(Trained(folder, trainer, adapter, [layer.weight.detach().clone() for layer in layers]))
        return trainer

    train_run.make_trainer = keeping
    try:
        train_run.train_run(
            model=base,
            tokens=tokens,
            preflight=preflight,
            adapter=folder / "adapter",
            record=folder / "run.json",
            training_log=folder / "training_log.csv",
            samples=folder / "samples.jsonl",
            run={
                **{"name": folder.name, "model": base.name, "mixture": "mixture", "recipe": "test", "seed": 1},
                "settings": {**SETTINGS, **settings},
            },
            form=made.form,
            system=made.system,
            attention=made.attention,
            device="cpu",
            threads=1,
            code="0",
            checkpoints=str(folder / "checkpoints"),
            finished=str(folder / "finished"),
            tensorboard=str(folder / "tensorboard"),
        )
    finally:
        train_run.make_trainer = make_trainer
    return seen[0]


class WithMask:
    """A network that is given a mask of ones, with which documents of a packed row see each other."""

    def __init__(self, network: Any) -> None:
        self.network, self.config = network, network.config

    def __call__(self, input_ids: torch.Tensor, **given: Any) -> Any:
        return self.network(input_ids, attention_mask=torch.ones_like(input_ids), **given)
