"""Small random base models and rows, for tests that train and predict in a second."""

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from concatenate_mixture import concatenate_mixture
from format_dataset import format_dataset
from qlora.files import write_jsonl, write_source_record
from tokenize_mixture import tokenize_mixture

FORM = {"system": "{content}\n", "user": "{content}\nAnswer:", "assistant": " {content}", "between": "\n\n"}
QUANTIZATION = {"type": "nf4", "double": True, "compute_dtype": "auto"}
SETTINGS: dict[str, Any] = {
    "quantization": QUANTIZATION,
    "lora": {"r": 4, "alpha": 8, "dropout": 0.0, "target_modules": "all-linear", "bias": "none"},
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
    "group_by_length": False,
    "checkpointing": False,
    "log_steps": 2,
    "eval_steps": 3,
    "save_steps": 2,
}
SIZES = {
    "vocab_size": 384,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
WIDE = {"initializer_range": 0.2, "tie_word_embeddings": True}  # else a frozen random head hardly tells tokens apart
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SIZES, **WIDE, intermediate_size=128, num_key_value_heads=2),
    "falcon": lambda: transformers.FalconConfig(**SIZES),
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


def make_base(folder: Path, architecture: str = "llama") -> Path:
    """A folder like a downloaded model's, with random weights from seed 0."""
    torch.manual_seed(0)
    network = transformers.AutoModelForCausalLM.from_config(CONFIGS[architecture](), dtype=torch.float32)
    network.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
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


def make_tokens(folder: Path, base: Path, dataset: Path) -> Path:
    """The tokenised rows of a mixture of one dataset."""
    concatenate_mixture([dataset], folder / "mixture", "mixture", {dataset.name: {"weight": 1.0, "cap": None}}, 0)
    tokenize_mixture(folder / "mixture", base, folder / "tokens", FORM, 128, "drop")
    return folder / "tokens"
