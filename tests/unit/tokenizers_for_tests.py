"""Small tokenizers that are made on the spot, one in the manner of each family, and real ones where they are at hand."""

import json
import os
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

BOS, EOS = "<s>", "</s>"
TEXT = "The quick brown fox says: unhappy people ask unhappy questions.\nAnswer: 42 boxes of paint\nunhappy\n" * 8
# Writes its own BOS, puts something between the turns, and ends an answer with the stop token and a line end.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'assistant' %}[assistant]\n{{ message.content }}{{ eos_token }}\n"
    "{% else %}[{{ message.role }}] {{ message.content }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)
REAL = ("llama2", "mistral-v1", "falcon", "gpt2")
REAL_WITH_BOS = ("llama2", "mistral-v1")

# Templates written from what is known of how the models' prompts render.
ALTERNATE = "{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
SYSTEM_APART = (
    "{% if messages[0].role == 'system' %}{% set turns = messages[1:] %}{% set system = messages[0].content %}"
    "{% else %}{% set turns = messages %}{% set system = '' %}{% endif %}"
)
LLAMA2_CHAT = (
    SYSTEM_APART + "{% for message in turns %}" + ALTERNATE + "{% if message.role == 'user' %}"
    "{{ bos_token + '[INST] ' }}{% if loop.first and system %}{{ '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' }}{% endif %}"
    "{{ message.content + ' [/INST]' }}{% else %}{{ ' ' + message.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL_INSTRUCT = (
    SYSTEM_APART + "{{ bos_token }}{% for message in turns %}" + ALTERNATE + "{% if message.role == 'user' %}"
    "{{ ' [INST] ' }}{% if loop.first and system %}{{ system + '\\n\\n' }}{% endif %}{{ message.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + message.content + eos_token }}{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{% for message in messages %}{{ '<|' + message.role + '|>\\n' + message.content + eos_token + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
GEMMA_IT = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system message') }}{% endif %}"
    "{% for message in messages %}" + ALTERNATE + "{{ '<start_of_turn>' }}"
    "{{ 'model' if message.role == 'assistant' else message.role }}{{ '\\n' + message.content + '<end_of_turn>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
BYTES = [f"<0x{number:02X}>" for number in range(256)]
CHARACTERS = ["▁", "\n", *map(chr, range(33, 127))]
LLAMA3 = {
    "style": "bytes",
    "specials": [
        *("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|finetune_right_pad_id|>",
    ],
    "opens": True,
    "bos": "<|begin_of_text|>",
}
LLAMA2 = {"style": "metaspace", "specials": ["<unk>", BOS, EOS], "opens": True, "bos": BOS, "eos": EOS, "unk": "<unk>"}
GEMMA = {
    "style": "gemma",
    "specials": ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"],
    **{"opens": True, "bos": "<bos>", "eos": "<eos>", "unk": "<unk>", "pad": "<pad>"},
}
QWEN = {
    "style": "bytes",
    "specials": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "eos": "<|im_end|>",
    "pad": "<|endoftext|>",
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama2": LLAMA2,
    "llama2-chat": {**LLAMA2, "template": LLAMA2_CHAT},
    "mistral": LLAMA2,
    "mistral-instruct": {**LLAMA2, "template": MISTRAL_INSTRUCT},
    "zephyr": {**LLAMA2, "pad": EOS, "template": ZEPHYR},
    "gemma": GEMMA,
    "gemma-it": {**GEMMA, "template": GEMMA_IT},
    "gemma2": {**GEMMA, "reference": "gemma"},
    "gemma3": {**GEMMA, "reference": "gemma3"},
    "falcon": {
        "style": "bytes",
        "specials": [">>TITLE<<", ">>ABSTRACT<<", ">>QUESTION<<", "<|endoftext|>"],
        "eos": "<|endoftext|>",
    },
    "phi-2": {
        "style": "bytes",
        "specials": ["<|endoftext|>"],
        **{"bos": "<|endoftext|>", "eos": "<|endoftext|>", "unk": "<|endoftext|>"},
    },
    "llama3": {**LLAMA3, "eos": "<|end_of_text|>", "reference": "llama3"},
    "llama3.2": {**LLAMA3, "eos": "<|eot_id|>", "pad": "<|finetune_right_pad_id|>", "reference": "llama3_2"},
    "qwen2.5": {**QWEN, "reference": "qwen2_5"},
    "qwen3": {**QWEN, "words": ["<think>", "</think>"], "reference": "qwen3"},
    "phi3": {
        "style": "metaspace",
        "specials": ["<unk>", BOS, EOS, "<|endoftext|>"],
        "swallowing": ["<|assistant|>", "<|system|>", "<|end|>", "<|user|>"],  # they take the white space behind them
        **{"bos": BOS, "eos": "<|endoftext|>", "unk": "<unk>", "pad": "<|endoftext|>", "reference": "phi3"},
    },
    "smollm": {
        "style": "bytes",
        "specials": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        **{"bos": "<|im_start|>", "eos": "<|im_end|>", "unk": "<|endoftext|>", "pad": "<|im_end|>"},
        "template": CHATML,
    },
}


def reference_template(name: str) -> str:
    """A chat template inside the installed trl package, read without importing it."""
    spec = find_spec("trl")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0], "chat_templates", f"{name}.jinja").read_text(encoding="utf-8")


def family_tokenizer(family: str) -> PreTrainedTokenizerFast:
    """A tokenizer of a few hundred tokens in the manner of a family of FAMILIES, a new one each time.

    Its special tokens and ids, BOS in front or not, padding token or none, white space and bytes, and chat template.
    """
    given = FAMILIES[family]
    specials = given["specials"]
    if given["style"] == "bytes":
        backend = _byte_level(specials)
    else:
        backend = _with_byte_fallback(specials, given["unk"])
        if given["style"] == "gemma":
            backend.normalizer = normalizers.Replace(" ", "▁")
            backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        else:
            backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
            spaces = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
            backend.decoder = decoders.Sequence(spaces)
    backend.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in specials])
    swallowing = given.get("swallowing", [])
    backend.add_special_tokens([AddedToken(text, normalized=False, special=True, rstrip=True) for text in swallowing])
    backend.add_tokens([AddedToken(text, normalized=False) for text in given.get("words", [])])
    if given.get("opens"):
        bos = given["bos"]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    reference = given.get("reference")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=reference_template(reference) if reference else given.get("template"),
        clean_up_tokenization_spaces=False,
        **{f"{name}_token": given[name] for name in ("bos", "eos", "unk", "pad") if name in given},
    )


def _byte_level(specials: list[str]) -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([TEXT], trainer)
    return backend


def _with_byte_fallback(specials: list[str], unknown: str) -> Tokenizer:
    """A BPE in the manner of sentencepiece: special tokens, bytes, pieces; a space is `▁`."""
    pieces = Tokenizer(models.BPE())
    pieces.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(vocab_size=220, initial_alphabet=CHARACTERS, show_progress=False)
    pieces.train_from_iterator([TEXT], trainer)
    learned = json.loads(pieces.to_str())["model"]
    tokens = [*specials, *BYTES, *sorted(learned["vocab"], key=learned["vocab"].get)]
    return Tokenizer(
        models.BPE(
            {token: number for number, token in enumerate(tokens)},
            [(left, right) for left, right in learned["merges"]],
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )


@cache
def make_tokenizer(with_bos: bool = True, chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of about 300 tokens, with merges like `unhappy` and ` people`."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<unk>", BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([TEXT], trainer)
    if with_bos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", special_tokens=[(BOS, backend.token_to_id(BOS))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=EOS,
        unk_token="<unk>",
        chat_template=chat_template,
        clean_up_tokenization_spaces=False,
    )


def real_tokenizer_folder(name: str) -> Path:
    """The folder of a real tokenizer; the test is skipped, by name, where there are none."""
    if "QLORA_TEST_DATA" not in os.environ:
        pytest.skip(f"QLORA_TEST_DATA is not set: no tokenizer of {name}")
    return Path(os.environ["QLORA_TEST_DATA"], "tokenizers", name)
