"""Talk to a run: one prompt, a file of prompts, or line by line; with --compare its base answers too.

    python scripts/chat.py results/runs/llama --prompt "What is the colour of the river?"
    python scripts/chat.py results/runs/llama --file prompts.jsonl > answers.jsonl
    python scripts/chat.py results/runs/llama

Prompts are rendered and answered (greedily) as in evaluation. A file holds a prompt a line, or, as .jsonl, an object a
line with `prompt`, or with `messages` whose last answer is left out; an object a line comes out.
"""

from qlora.stage import log

import argparse
import contextlib
import json
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, TextStreamer
from transformers.utils import logging as transformers_logging

from predict_rows import named_stops
from qlora.config import checked_config, laid_over, resolved_device
from qlora.conversations import Message, message, placed_system
from qlora.errors import UserError
from qlora.files import read_json, read_jsonl
from qlora.generation import greedy
from qlora.models import load_quantized, set_threads
from qlora.pretrained import loaded, runs_own_code
from qlora.render import Format, load_tokenizer, padding_id, prompt_ids, rows_of, stop_ids, tokenized

SOURCES = Path("results/sources/models")
CONFIGS = ("config/models.yaml", "config/datasets.yaml", "config/config.yaml")


@dataclass
class Partner:
    """A loaded run, which answers as in evaluation."""

    network: Any
    tokenizer: Any
    form: Format | None
    system: str
    limit: int  # tokens of an answer

    def answer(self, messages: Sequence[Message], base: bool = False, stream: bool = False) -> str:
        """The greedy answer to a conversation; of the base alone, or printed while it grows."""
        row = placed_system([*messages, message("assistant", "answer")], self.system)
        asked = prompt_ids(tokenized(rows_of(row, self.tokenizer, self.form)[-1], self.tokenizer, self.form))
        room = getattr(self.network.config.get_text_config(), "max_position_embeddings", sys.maxsize) - len(asked)
        if room < 1:
            raise UserError(f"the prompt has {len(asked)} tokens and fills the model's context; shorten it")
        stops = stop_ids(self.tokenizer, self.form) | named_stops(self.network)
        streamer = TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None
        with self.network.disable_adapter() if base else contextlib.nullcontext():
            [written] = greedy(
                self.network, [asked], min(self.limit, room), stops, padding_id(self.tokenizer), streamer
            )
        stopped = bool(written) and written[-1] in stops
        return str(self.tokenizer.decode(written[:-1] if stopped else written, skip_special_tokens=True))


def main() -> None:
    """Read the command line, load the run, and answer."""
    options = _options()
    partner = load(options)
    if options.prompt is not None:
        show(partner, _conversation(options.system, options.prompt), options.compare)
    elif options.file is not None:
        for row in conversations(options.file, options.system):
            base = {"base": partner.answer(row, base=True)} if options.compare else {}
            told = {"prompt": row[-1]["content"], "answer": partner.answer(row), **base}
            print(json.dumps(told, ensure_ascii=False), flush=True)
    else:
        talk(partner, options.system, options.compare)


def _options() -> argparse.Namespace:
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of a run, results/runs/RUN")
    asked = parser.add_mutually_exclusive_group()
    asked.add_argument("--prompt", help="one prompt")
    asked.add_argument("--file", type=Path, help="a file of prompts")
    parser.add_argument("--system", help="a system message")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--compare", action="store_true", help="let the base answer too")
    how.add_argument("--merged", action="store_true", help="use the merged model instead of 4 bits and the adapter")
    parser.add_argument("--base", type=Path, help=f"the base's folder (default: {SOURCES}/MODEL)")
    parser.add_argument("--configfile", type=Path, nargs="+", default=[], help="overlays that the run was made with")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="tokens of an answer, 256 where not given")
    return parser.parse_args()


def load(options: argparse.Namespace) -> Partner:
    """The run of the command line, on its base in 4 bits or merged."""
    if not (options.run / "run.json").is_file():
        raise UserError(f"{options.run}: no run.json there; give the folder of a trained run, as results/runs/RUN")
    run = read_json(options.run / "run.json")
    entry, form = registered(run, options.configfile)
    device = resolved_device(options.device)
    set_threads(run["hardware"]["threads"], device)
    if options.merged:
        folder = options.run / "merged"
        if not folder.is_dir():
            raise UserError(f"{folder} is not there; make it: snakemake --cores all {folder}")
        check_code(folder, {})
        network: Any = loaded(
            AutoModelForCausalLM.from_pretrained,
            folder,
            dtype=torch.bfloat16,
            attn_implementation=entry["attention"],
            device_map={"": device},
        )
    else:
        folder = options.base or SOURCES / run["model"]
        check_base(folder, run)
        check_code(folder, entry["source"])
        base = load_quantized(folder, run["settings"]["quantization"], device, entry["attention"])
        network = PeftModel.from_pretrained(base, options.run / "adapter")
    return Partner(network.eval(), load_tokenizer(folder), form, entry["system"], options.max_new_tokens)


def registered(run: Mapping[str, Any], overlays: Sequence[Path]) -> tuple[Mapping[str, Any], Format | None]:
    """The registry's entry of a run's base, and the named format that renders its prompts, if one does."""
    config: dict[str, Any] = {}
    for path in [*map(Path, CONFIGS), *overlays]:
        if not path.is_file():
            raise UserError(f"{path} is not there; start this from the repository's folder")
        config = laid_over(config, yaml.safe_load(path.read_text(encoding="utf-8")))
    full = checked_config(config)
    if run["model"] not in full["models"]:
        raise UserError(
            f"run '{run['name']}': its model '{run['model']}' is not in the config; name the overlay that has it with"
            " --configfile"
        )
    entry = full["models"][run["model"]]
    return entry, full["formats"][entry["format"]] if entry["format"] else None


def check_code(folder: Path, source: Mapping[str, Any]) -> None:
    """Raise UserError where a model's folder has code that may run, and its `source` in the config allows none."""
    if runs_own_code(folder) and read_json(folder / "source.json")["source"] != source:
        raise UserError(f"{folder}: brings code that the config does not allow; see remote_code in docs/hub.md")


def check_base(folder: Path, run: Mapping[str, Any]) -> None:
    """Raise UserError where the base is not there, or its files are not those that the run was trained on."""
    if not (folder / "source.json").is_file():
        raise UserError(
            f"{folder}: the base '{run['model']}' is not there; make it: snakemake --cores all {SOURCES / run['model']}"
        )
    files = {name: file["sha256"] for name, file in read_json(folder / "source.json")["files"].items()}
    if files != run["pins"]["model"]["files"]:
        raise UserError(f"{folder}: not the base that the run was trained on (other files); see its run.json, pins")


def conversations(path: Path, system: str | None) -> Iterator[list[Message]]:
    """The prompts of a file."""
    if not path.is_file():
        raise UserError(f"{path}: no such file of prompts")
    if path.suffix != ".jsonl":
        lines = path.read_text(encoding="utf-8").splitlines()
        yield from (_conversation(system, line) for line in lines if line.strip())
        return
    for number, row in enumerate(read_jsonl(path), start=1):
        if "messages" in row:
            turns = [message(turn["role"], turn["content"]) for turn in row["messages"]]
            yield turns[:-1] if turns[-1]["role"] == "assistant" else turns
        elif "prompt" in row:
            yield _conversation(system, row["prompt"])
        else:
            raise UserError(f"{path}, line {number}: neither 'prompt' nor 'messages' in it; add one")


def _conversation(system: str | None, prompt: str) -> list[Message]:
    return [*([message("system", system)] if system else []), message("user", prompt)]


def show(partner: Partner, messages: Sequence[Message], compare: bool) -> str:
    """Print the answer while it grows, and the base's before it where they are compared."""
    if compare:
        print("base:  ", end="", flush=True)
        partner.answer(messages, base=True, stream=True)
        print("tuned: ", end="", flush=True)
    return partner.answer(messages, stream=True)


def talk(partner: Partner, system: str | None, compare: bool) -> None:
    """Answer line by line, with what was said before; an empty line begins anew, the end of input ends."""
    messages = _conversation(system, "")[:-1]
    said = list(messages)
    while True:
        try:
            prompt = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if not prompt.strip():
            said = list(messages)
            continue
        said.append(message("user", prompt))
        said.append(message("assistant", show(partner, said, compare).strip()))


def be_quiet() -> None:
    """Let nothing but errors stand between the answers."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    log.setLevel("ERROR")


if __name__ == "__main__":
    be_quiet()
    main()
