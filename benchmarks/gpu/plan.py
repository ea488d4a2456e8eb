"""What is measured on a GPU, in this order: groups of ways to train that do the same work, and are compared."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

PHI = "q_proj,k_proj,v_proj,dense,fc1,fc2"
FALCON = "query_key_value,dense,dense_h_to_4h,dense_4h_to_h"


@dataclass(frozen=True)
class Way:
    """A way to train, as one.py knows it, and its batch: rows, or packed rows of 2,048 tokens, a step."""

    name: str
    batch: int
    checkpointing: bool = False
    batching: str = "packed"  # of ours


@dataclass(frozen=True)
class Group:
    """Ways that are compared with the first of them. `targets`: the layers that get adapters, where not Llama's."""

    title: str
    shape: str
    rows: str  # full or mixed, as shapes.py writes them
    ways: tuple[Way, ...]
    targets: str | None = None
    steps: int = 24  # of which the first 6 are not counted


def _alike(names: str, batch: int, checkpointing: bool = False) -> tuple[Way, ...]:
    return tuple(Way(name, batch, checkpointing) for name in names.split())


def _packed(name: str, shape: str) -> tuple[Group, ...]:
    return (
        Group(f"{name}, 4 × 2,048", shape, "full", _alike("ours unsloth ours-fp8 ours-loop trl-packed", 4)),
        Group(f"{name}, 1 × 2,048", shape, "full", _alike("ours unsloth", 1), steps=66),
        Group(f"{name}, 4 × 2,048, checkpointing", shape, "full", _alike("ours unsloth", 4, True)),
    )


_PADDED = (Way("trl", 8), Way("notebook", 2, checkpointing=True))  # TRL without the checkpointing that is its default

PLAN = (
    *_packed("Llama-2-7B", "llama-2-7b"),
    Group(
        "Llama-2-7B, mixed lengths",
        "llama-2-7b",
        "mixed",
        (*_alike("ours unsloth trl-packed", 4), *_PADDED),
    ),
    Group(
        "Llama-2-7B, mixed lengths, checkpointing",
        "llama-2-7b",
        "mixed",
        (*_alike("ours unsloth", 4, True), Way("trl", 8, checkpointing=True)),
    ),
    Group("Llama-2-7B, 1 × 2,048, checkpointing", "llama-2-7b", "full", _alike("ours", 1, True), steps=66),
    Group("Llama-2-7B, 1 × 2,048, FP8", "llama-2-7b", "full", _alike("ours-fp8 ours", 1), steps=66),
    Group("Llama-2-7B, 1 × 2,048, plain loop", "llama-2-7b", "full", _alike("ours ours-loop", 1), steps=66),
    *_packed("Mistral-7B", "mistral-7b"),
    Group("Mistral-7B, 1 × 2,048, checkpointing", "mistral-7b", "full", _alike("ours", 1, True), steps=66),
    Group("Mistral-7B, mixed lengths", "mistral-7b", "mixed", _alike("ours unsloth trl-packed", 4)),
    Group("Mistral-7B, mixed lengths, padded peers", "mistral-7b", "mixed", (*_alike("ours", 4), *_PADDED)),
    Group("Gemma-7B, 4 × 2,048", "gemma-7b", "full", _alike("ours trl-packed", 4)),
    Group(
        "Falcon-7B, mixed lengths, checkpointing",  # packing would mix its documents; its attention keeps all scores
        "falcon-7b",
        "mixed",
        (Way("ours", 4, checkpointing=True, batching="grouped"), Way("trl", 4, checkpointing=True)),
        targets=FALCON,
    ),
    Group("Phi-2, 4 × 2,048", "phi-2", "full", _alike("ours trl-packed", 4), targets=PHI),
)


@dataclass(frozen=True)
class Case:
    """A run of the default, whose rows and settings are taken, and what of its settings and its model is changed."""

    run: str
    changes: Mapping[str, Any]
    shape: Mapping[str, int] | None = None  # of a Llama with random weights in place of the run's model


# Packed for the step graph: four packs hold about as many rows as the recipe's 16 padded ones. Evaluated at the end.
_PACKED = {"batching": "packed", "batch_size": 4, "eval_steps": None, "samples": 0, "log_steps": 10**6}
_WIDE = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 8, "num_attention_heads": 16}
PARITY = {  # what is trained in each of these ways, to see what it costs in loss
    "tiny-llama": Case("llama", _PACKED),
    "tiny-mistral": Case("mistral", _PACKED),
    "wide": Case("llama", {**_PACKED, "batch_size": 16, "max_steps": 120, "learning_rate": 1e-3}, _WIDE),
}
BF16, BF16_PEFT = "bf16", "bf16-peft"
PARITY_WAYS = (BF16, BF16_PEFT, "fp8")  # bf16 rounds W + s B A once, bf16-peft x W and s x A B each: both are bfloat16
