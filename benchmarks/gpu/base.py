"""Make a base of random weights as a download leaves it: bfloat16, with a tokenizer and a record of its files.

python benchmarks/gpu/base.py llama-2-7b FOLDER
"""

import argparse
import json
import sys
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

sys.path.append(str(Path(__file__).parents[2] / "scripts"))
from qlora.files import write_source_record
from shapes import SHAPES, save_random

SPECIAL = ("<pad>", "<s>", "</s>")
CHAT = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'assistant' %}"
    "{{ message.content + eos_token + '\n' }}{% else %}{{ '[' + message.role + '] ' + message.content + '\n' }}"
    "{% endif %}{% endfor %}"
)


def make_base(shape: str, folder: Path, device: str) -> None:
    """Write the model folder; weights are drawn on `device`."""
    save_random(shape, folder, device)
    byte_tokenizer(SHAPES[shape].vocab_size).save_pretrained(folder)
    write_source_record(folder, {"shape": shape})


def byte_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """A token a byte, and names for all other ids up to `vocabulary`, which no text has."""
    tokens = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens += [f"w{number} " for number in range(len(tokens), vocabulary)]
    raw = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>", chat_template=CHAT
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="cuda")
    given = parser.parse_args()
    make_base(given.shape, given.folder, given.device)
    print(json.dumps({"made": given.shape}))
