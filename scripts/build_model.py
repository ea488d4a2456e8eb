"""Stage `build`: a tiny base model of a real family, pre-trained for a minute on generated plain text."""

from qlora.stage import Progress, log, run_stage

import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GenerationConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from qlora import corpus
from qlora.errors import UserError
from qlora.files import replacing, write_source_record
from qlora.models import set_threads
from qlora.pretrained import loaded
from qlora.pretraining import aim_attention, pretrain, train_tokenizer, windows

VOCABULARY = 1024  # tokens
TOKENIZER_DOCUMENTS = 8000
BATCH_TOKENS = 1024  # a step
ECHO_LENGTH, LENGTH = 64, 128  # tokens of a window, while only copying is taught and after
ECHO_SHARE = 0.35  # of the steps
PASSES = 2  # over the generated text
LEARNING_RATE, MATRIX_LEARNING_RATE = 1e-2, 1.5e-2
ROPE_THETA = 100.0  # base of the rotary angles: rows of the examples are under 200 tokens
# What tells the families apart. Mistral without grouped key-value heads would be Llama, number for number.
FAMILIES: dict[str, tuple[Callable[..., PreTrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, {"num_key_value_heads": 4}),
    "mistral": (MistralConfig, {"num_key_value_heads": 2, "sliding_window": None}),
    "gemma": (GemmaConfig, {"num_key_value_heads": 1, "head_dim": 16}),
}


def build_model(model: Path, build: Mapping[str, Any], threads: int) -> None:
    """Make a tokenizer and a model and pre-train it; writes the folder `model`, laid out like one from the hub.

    `build` holds architecture (llama, mistral or gemma), seed, steps (optimiser steps of 1,024 tokens) and copies (the
    share of an unseen text's tokens that the model must copy right). The bytes are the same for the same values on the
    same processor. Raises UserError where the model did not learn to copy.
    """
    set_threads(threads, "cpu")
    seed, steps = build["seed"], build["steps"]
    started = time.monotonic()
    random = Random(seed)
    tokenizer = train_tokenizer(tokenizer_texts(random), VOCABULARY)
    batches = draw_batches(random, tokenizer, steps)
    log.info("%d tokens in the vocabulary, text drawn after %.0f s", len(tokenizer), time.monotonic() - started)
    torch.manual_seed(seed)
    network = new_model(build["architecture"], tokenizer)
    progress = Progress(steps, f"build {model.name}", "steps")

    def report(step: int, loss: float) -> None:
        progress.update(step + 1, f", loss {loss:.2f}")
        if (step + 1) % 100 == 0:
            log.info("step %d of %d: loss %.3f", step + 1, steps, loss)

    pretrain(network, batches, steps, LEARNING_RATE, MATRIX_LEARNING_RATE, report)
    copied = copying_accuracy(network, tokenizer, Random(f"{seed} gate"))
    log.info("copies %.0f%% of an unseen text after %.0f s", 100 * copied, time.monotonic() - started)
    if copied < build["copies"]:
        raise UserError(
            f"{model.name}: pre-training failed: it copies {copied:.0%} of an unseen text, "
            f"{build['copies']:.0%} are needed; "
            f"raise 'steps' (now {steps}) or change 'seed' (now {seed}) of its 'build'"
        )
    with replacing(model) as folder:
        network.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_source_record(folder, {"build": dict(build)})


def tokenizer_texts(random: Random) -> Iterator[str]:
    """Documents, and after each a list of everyday words, which would else be cut into syllables."""
    for _ in range(TOKENIZER_DOCUMENTS):
        yield corpus.document(random)
        yield corpus.vocabulary(random)


def new_model(architecture: str, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """A model of some 200 thousand parameters with random weights, from torch's generator."""
    family, own = FAMILIES[architecture]
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config = family(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        tie_word_embeddings=True,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        initializer_range=0.1,
        **ids,
        **own,
    )
    network = loaded(AutoModelForCausalLM.from_config, config, dtype=torch.float32)
    network.generation_config = GenerationConfig(**ids)
    aim_attention(network)
    return network


def draw_batches(random: Random, tokenizer: PreTrainedTokenizerFast, steps: int) -> Callable[[int], Tensor]:
    """The token ids of each step, [rows, length]: first echoes alone, in short windows, then all kinds of text."""
    first = round(steps * ECHO_SHARE)
    stages = []
    for source, count, length in ((corpus.echo, first, ECHO_LENGTH), (corpus.document, steps - first, LENGTH)):
        drawn = max(1, -(-count // PASSES))
        rows = BATCH_TOKENS // length
        stages.append(windows(partial(source, random), tokenizer, drawn * rows, length).view(drawn, rows, -1))
    return lambda step: stages[0][step % len(stages[0])] if step < first else stages[1][(step - first) % len(stages[1])]


@torch.no_grad()
def copying_accuracy(
    network: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, random: Random, count: int = 100
) -> float:
    """Share of the tokens of a repeated line, four quoted values, that are predicted right from all before them."""
    network.eval()
    right = total = 0
    for _ in range(count):
        line = " ".join(corpus.quoted(random) for _ in range(4))
        start = len(tokenizer(f"{line}\n")["input_ids"])
        ids = torch.tensor([tokenizer(f"{line}\n{line}")["input_ids"]])
        predicted = network(input_ids=ids).logits[0, start:-1].argmax(-1)
        right += int((predicted == ids[0, start + 1 :]).sum())
        total += len(predicted)
    return right / total


if __name__ == "__main__":
    run_stage(build_model)
