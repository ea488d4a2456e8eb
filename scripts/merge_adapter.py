"""Stage `merge`, on request: a run's adapter is folded into the dequantised base that it was trained on."""

from qlora.stage import log, run_stage

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from qlora.files import replacing
from qlora.models import load_quantized
from qlora.render import load_tokenizer


def merge_adapter(
    model: Path, adapter: Path, merged: Path, quantization: Mapping[str, Any], attention: str, device: str
) -> None:
    """Write a model folder in bfloat16, with its tokenizer, that transformers loads without PEFT or bitsandbytes."""
    whole = merged_network(model, adapter, quantization, attention, device).bfloat16()
    with replacing(merged) as folder:
        whole.save_pretrained(folder)
        load_tokenizer(model).save_pretrained(folder)
    log.info("merged %s into %s", adapter, merged)


def merged_network(
    model: Path, adapter: Path, quantization: Mapping[str, Any], attention: str, device: str
) -> PreTrainedModel:
    """The dequantised base with the adapter added to its weights, in the precision of the products.

    The base is dequantised first: the adapter was trained to correct the 4-bit weights, not the original ones.
    """
    base = load_quantized(model, quantization, device, attention).dequantize()
    return PeftModel.from_pretrained(base, adapter).merge_and_unload(safe_merge=True)


if __name__ == "__main__":
    run_stage(merge_adapter)
