"""Random 4-bit models of real shapes, and rows of random tokens: speed does not depend on what the weights know."""

import argparse
import hashlib
import json
import random
import shutil
from pathlib import Path

import pyarrow
import torch
import transformers
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.falcon import modeling_falcon
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

ROOM = 2048  # tokens of a packed row
SHARD = 2 * 10**9  # bytes of a file of weights
SHAPES = {
    "llama-2-7b": transformers.LlamaConfig(max_position_embeddings=4096),
    "mistral-7b": transformers.MistralConfig(sliding_window=None, max_position_embeddings=32768),
    "mistral-7b-v0.1": transformers.MistralConfig(sliding_window=4096, max_position_embeddings=32768),
    "gemma-2b": transformers.GemmaConfig(
        hidden_size=2048, num_hidden_layers=18, num_attention_heads=8, num_key_value_heads=1, intermediate_size=16384
    ),
    "gemma-7b": transformers.GemmaConfig(),
    "falcon-7b": transformers.FalconConfig(
        vocab_size=65024, hidden_size=4544, num_hidden_layers=32, num_attention_heads=71, multi_query=True,
        parallel_attn=True, bias=False, alibi=False, new_decoder_architecture=False,
    ),
    "phi-2": transformers.PhiConfig(
        vocab_size=51200, hidden_size=2560, intermediate_size=10240, num_hidden_layers=32, num_attention_heads=32,
        partial_rotary_factor=0.4, hidden_act="gelu_new", max_position_embeddings=2048,
    ),
    "tiny": transformers.LlamaConfig(
        hidden_size=256, intermediate_size=704, num_hidden_layers=2, num_attention_heads=4, vocab_size=512
    ),
}  # fmt: skip


def let_falcon_be_quantised() -> None:
    """Transformers quantises layers whose type is exactly nn.Linear, and Falcon's is a subclass that adds nothing."""
    modeling_falcon.FalconLinear = torch.nn.Linear


def save_random(shape: str, folder: Path, device: str) -> None:
    """Write random weights of `shape` in bfloat16, as its family begins, in files of SHARD, one of which is held."""
    torch.manual_seed(0)
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(SHAPES[shape], dtype=torch.bfloat16)
    tied = network.all_tied_weights_keys
    weights = {name: weight for name, weight in network.state_dict().items() if name not in tied}
    files = split_torch_state_dict_into_shards(weights, max_shard_size=SHARD)
    folder.mkdir(parents=True, exist_ok=True)
    for file, names in files.filename_to_tensors.items():
        save_file({name: drawn(network, name, device) for name in names}, folder / file, metadata={"format": "pt"})
    if files.is_sharded:
        index = {"metadata": files.metadata, "weight_map": files.tensor_to_filename}
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2))
    network.config.architectures = [type(network).__name__]
    network.config.save_pretrained(folder)
    network.generation_config.save_pretrained(folder)


def drawn(network: PreTrainedModel, name: str, device: str) -> torch.Tensor:
    """A weight of a network without any, drawn on `device` as its family draws it."""
    path, _, leaf = name.rpartition(".")
    layer = network.get_submodule(path).to_empty(device=device, recurse=False)
    network._init_weights(layer)
    weight = layer.get_parameter(leaf).data.cpu()
    layer.to_empty(device="meta", recurse=False)
    return weight


def make_model(shape: str, folder: Path, device: str) -> None:
    """Write a random model of `shape`, quantised as the workflow does it, and a tokenizer of as many ids."""
    config, whole = SHAPES[shape], folder.with_name(folder.name + "-bf16")
    let_falcon_be_quantised()
    save_random(shape, whole, device)
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    network = AutoModelForCausalLM.from_pretrained(whole, quantization_config=nf4, device_map={"": device})
    network.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(config.vocab_size)}, unk_token="w0"))
    PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="w1", eos_token="w2", unk_token="w0", pad_token="w0"
    ).save_pretrained(folder)
    shutil.rmtree(whole)


def make_rows(mix: str, vocabulary: int, tokens: int, folder: Path) -> None:
    """Write about `tokens` tokens of random rows, in the workflow's form and for peers.

    `full`: every row has ROOM tokens. `mixed`: lengths are lognormal, median 300, sigma 0.9, at most ROOM.
    """
    draw = random.Random(0)
    rows, written = [], 0
    while written < tokens:
        length = ROOM if mix == "full" else max(16, min(ROOM, round(draw.lognormvariate(5.7, 0.9))))
        rows.append([draw.randrange(3, vocabulary) for _ in range(length)])
        written += length
    write_rows(rows, rows, ROOM, folder)


def write_rows(rows: list[list[int]], labels: list[list[int]], room: int, folder: Path) -> None:
    """Write rows of at most `room` ids as the workflow's tokenised rows, for training alone."""
    folder.mkdir(parents=True)
    table = pyarrow.table({"input_ids": rows, "labels": labels, "length": [len(row) for row in rows]})
    hashes = {}
    for split in ("train", "validation"):
        part, path = table if split == "train" else table.slice(0, 2), folder / f"{split}.arrow"
        with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, part.schema) as out:
            out.write_table(part)
        with path.open("rb") as file:
            hashes[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    counts = {"validation": {"kept": 0}, "train": {"kept": len(rows)}}
    card = {"max_length": room, **counts, "stop ids": [2], "sha256": hashes}
    (folder / "card.json").write_text(json.dumps(card))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("folder", type=Path, help="for the model, and rows-full and rows-mixed beside it")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tokens", type=int, default=1_500_000)
    given = parser.parse_args()
    make_model(given.shape, given.folder / "model", given.device)
    for mix in ("full", "mixed"):
        make_rows(mix, SHAPES[given.shape].vocab_size, given.tokens, given.folder / f"rows-{mix}")
    print(json.dumps({"made": given.shape}))
