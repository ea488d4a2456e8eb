"""Stage `merge`, on request: a run's adapter is folded into the dequantised base that it was trained on."""

from qlora.stage import log, run_stage

import ctypes
import gc
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase
from transformers.utils import GENERATION_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME

from qlora.errors import UserError
from qlora.files import read_json, replacing, sha256_of, write_json
from qlora.pretrained import model_config, runs_own_code
from qlora.render import load_tokenizer
from qlora.streamed import Weights, empty_network, mapped_network, merged_weights, tuned_network

SHARD = 2 * 10**9  # bytes of a file of the merged model
M_MMAP_THRESHOLD, MAPPED_FROM = (
    -3,
    128 * 1024,
)  # of glibc's mallopt: its first value, which glibc raises unless it is set
PROBE = """\
A base is dequantised before an adapter is added: it learned to correct the weights in 4 bits, not the original ones.
SELECT name, price FROM paints WHERE colour = 'green' AND litres > 2.5 ORDER BY price DESC;
Which of these 37 messages is about a refund, and which about a delivery?
"""


def merge_adapter(
    model: Path,
    adapter: Path,
    merged: Path,
    quantization: Mapping[str, Any],
    attention: str,
    device: str,
    shard_bytes: int = SHARD,
) -> None:
    """Write a model folder in bfloat16, with its tokenizer, that transformers loads without PEFT or bitsandbytes.

    Weights are read, merged and written one at a time, so that memory holds about a shard. merge.json in the folder
    says what was merged, and how far the logits are from those of the base with its adapter.
    """
    # Else glibc keeps the holes that ever new weights leave in its heap, and memory grows with the model.
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, MAPPED_FROM)
    if runs_own_code(model):
        raise UserError(f"{model}: a merged model would need the code that comes with it; use base and adapter instead")
    tokenizer = load_tokenizer(model)
    with replacing(merged) as folder:
        folder.mkdir()
        write_shards(merged_weights(model, adapter, quantization, device), folder, shard_bytes)
        write_settings(model, folder)
        tokenizer.save_pretrained(folder)
        difference = drift(model, adapter, folder, quantization, attention, device, tokenizer)
        source = {"base": read_json(model / "source.json")["source"], "adapter": sha256_of(adapter)}
        write_json(folder / "merge.json", {**source, "quantization": dict(quantization), "drift": difference})
    log.info("merged %s into %s; logits against base and adapter: %s", adapter, merged, difference)


def write_shards(weights: Weights, folder: Path, shard_bytes: int) -> None:
    """Write weights in bfloat16 as safetensors files of at most `shard_bytes`, or of one weight, and their index."""
    shards: list[list[str]] = []
    held: dict[str, torch.Tensor] = {}
    total = size = 0

    def write() -> None:
        file = folder / f"shard-{len(shards)}"
        save_file(held, file, metadata={"format": "pt"})
        file.chmod(0o644)  # written for its owner alone
        shards.append(list(held))
        held.clear()

    for name, weight in weights:
        rounded = weight.to("cpu", torch.bfloat16 if weight.is_floating_point() else weight.dtype).contiguous()
        if held and size + rounded.nbytes > shard_bytes:
            write()
            size = 0
        held[name] = rounded
        size += rounded.nbytes
        total += rounded.nbytes
    write()
    if len(shards) == 1:
        (folder / "shard-0").rename(folder / "model.safetensors")
        return
    files = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    for number, file in enumerate(files):
        (folder / f"shard-{number}").rename(folder / file)
    places = {name: file for file, names in zip(files, shards, strict=True) for name in names}
    write_json(folder / SAFE_WEIGHTS_INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": places})


def write_settings(model: Path, folder: Path) -> None:
    """Write the base's config, in bfloat16, and its generation config where it has one."""
    config = model_config(model)
    config.dtype = torch.bfloat16
    config.architectures = [type(empty_network(model, torch.bfloat16)).__name__]
    config.save_pretrained(folder)
    if (model / GENERATION_CONFIG_NAME).exists():
        shutil.copyfile(model / GENERATION_CONFIG_NAME, folder / GENERATION_CONFIG_NAME)


def drift(
    model: Path,
    adapter: Path,
    merged: Path,
    quantization: Mapping[str, Any],
    attention: str,
    device: str,
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, Any]:
    """How far the merged model's logits are from those of the 4-bit base with its adapter, over a short text.

    `rms`: root mean square of the difference over that of the logits; `largest`: the largest difference over the same;
    `same next token`: share of positions where both find the same token most likely; `tokens`: how many positions.
    """
    ids = torch.tensor([tokenizer(PROBE)["input_ids"]])
    wanted = logits(tuned_network(model, adapter, quantization, device, attention), ids)
    gc.collect()  # that network, whose modules refer to each other
    whole: Any = mapped_network(merged, attention)
    found = logits(whole.to(device), ids)
    scale = wanted.square().mean().sqrt()
    return {
        "rms": round(float((found - wanted).square().mean().sqrt() / scale), 6),
        "largest": round(float((found - wanted).abs().max() / scale), 6),
        "same next token": round(float((found.argmax(-1) == wanted.argmax(-1)).float().mean()), 4),
        "tokens": ids.shape[1],
    }


@torch.inference_mode()
def logits(network: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits in fp32 on the CPU, [positions, vocabulary]."""
    return network.eval()(input_ids=ids.to(network.device), use_cache=False).logits[0].float().cpu()


if __name__ == "__main__":
    run_stage(merge_adapter)
