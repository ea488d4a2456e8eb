"""Small tokenizers that are made on the spot, and the real ones where they are at hand."""

import os
from functools import cache
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
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
