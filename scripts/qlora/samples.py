"""What the model answers to a few validation prompts while it learns."""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from qlora.files import read_jsonl, write_jsonl
from qlora.generation import SLACK, greedy
from qlora.render import last_answer, padding_id

MOST_TOKENS = 64  # of a sampled answer


@dataclass
class Samples:
    """Rows of validation whose last answer is asked for at each evaluation, and the file that collects the answers."""

    rows: Sequence[Mapping[str, Any]]  # input_ids, labels
    path: Path
    tokenizer: Any
    writer: SummaryWriter
    stops: Set[int]  # tokens at which an answer ends

    def answer(self, network: Any, step: int) -> None:
        """Add the greedy answers at `step` to the file and to TensorBoard; those of later steps are forgotten."""
        earlier = [row for row in read_jsonl(self.path) if row["step"] < step] if self.path.exists() else []
        places = [last_answer(row["labels"]) for row in self.rows]
        asked = [
            (row["input_ids"][: place.start], row["input_ids"][place])
            for row, place in zip(self.rows, places, strict=True)
        ]
        written: list[list[int]] = []
        if asked:
            limit = min(MOST_TOKENS, max(len(true) for _, true in asked) + SLACK)
            prompts = [prompt for prompt, _ in asked]
            written = greedy(network, prompts, limit, self.stops, padding_id(self.tokenizer))
        now = [
            {"step": step, "prompt": self._text(prompt), "true": self._text(true), "generated": self._text(answer)}
            for (prompt, true), answer in zip(asked, written, strict=True)
        ]
        write_jsonl(self.path, earlier + now)
        for number, row in enumerate(now):
            text = "\n\n".join(f"**{key}**\n\n```\n{row[key]}\n```" for key in ("prompt", "true", "generated"))
            self.writer.add_text(f"sample {number}", text, step)

    def _text(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))
