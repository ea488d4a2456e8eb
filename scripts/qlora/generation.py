"""Greedy answers of a model to prompts side by side."""

from collections.abc import Sequence, Set
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

SLACK = 8  # tokens that an answer may be longer than the longest one that is known to be true


def named_stops(network: Any) -> set[int]:
    """The tokens at which generation ends by the model's own generation config."""
    named = network.generation_config.eos_token_id
    return set(named) if isinstance(named, list) else set() if named is None else {named}


def greedy(
    network: Any,
    prompts: Sequence[Sequence[int]],
    limit: int,
    stops: Set[int],
    padding: int,
    streamer: BaseStreamer | None = None,
) -> list[list[int]]:
    """The most likely continuation of each prompt, at most `limit` tokens, up to and with its first stop token.

    Prompts are padded on the left to the longest; `padding` may be any id, since the mask decides.
    A `streamer` is told each token of a single prompt's answer as it is found.
    """
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), padding)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    with torch.inference_mode():
        written = network.generate(
            input_ids=ids.to(network.device),
            attention_mask=mask.to(network.device),
            max_new_tokens=limit,
            do_sample=False,
            num_beams=1,
            temperature=None,
            top_p=None,
            top_k=None,
            use_cache=True,
            eos_token_id=sorted(stops),
            pad_token_id=padding,
            streamer=streamer,
        )
    answers = []
    for answer in written[:, width:].tolist():
        end = next((place + 1 for place, token in enumerate(answer) if token in stops), len(answer))
        answers.append(answer[:end])
    return answers
