"""Made-up words, codes and numbers, each belonging to exactly one of train, validation and test."""

from random import Random
from zlib import crc32

SPLITS = ("train", "validation", "test")
_ONSETS = "b d f g gr h k l m n p r s st t tr v w z".split()
_VOWELS = "a e i o u".split()
_CODAS = ["", "", "", "", "", "", "l", "m", "n", "r", "s", "k"]


def split_of(value: str) -> str:
    """The split that may use this value: a tenth of all values is for validation, a tenth for test."""
    return {0: "validation", 1: "test"}.get(crc32(value.encode()) % 10, "train")


def word(random: Random, split: str) -> str:
    """A capitalised, pronounceable word of two or three syllables, out of half a million and more."""
    while True:
        syllables = random.choice((2, 2, 2, 2, 3))
        letters = "".join(
            random.choice(_ONSETS) + random.choice(_VOWELS) + random.choice(_CODAS) for _ in range(syllables)
        )
        if split_of(letters.capitalize()) == split:
            return letters.capitalize()


def code(random: Random, split: str) -> str:
    """A code like KV-482."""
    while True:
        letters = "".join(random.choice("ABCDEFGHKLMNPRSTVWXZ") for _ in range(2))
        value = f"{letters}-{random.randint(100, 999)}"
        if split_of(value) == split:
            return value


def number(random: Random, split: str, low: int = 10, high: int = 4999) -> int:
    """An integer with two to four digits, each count of digits equally likely."""
    while True:
        digits = random.randint(len(str(low)), len(str(high)))
        value = random.randint(max(low, 10 ** (digits - 1)), min(high, 10**digits - 1))
        if split_of(str(value)) == split:
            return value
