"""Talk to a run: one prompt, a file of prompts, or line by line; with --compare its base answers too.

    python scripts/chat.py results/runs/llama --prompt "What is the colour of the river?"
    python scripts/chat.py results/runs/llama --file prompts.jsonl > answers.jsonl
    python scripts/chat.py results/runs/llama

Prompts are rendered as the run was trained and answered greedily, as in evaluation. A file holds a prompt a line; or
it is of a kind that datasets are read from (.jsonl, .json, .csv, …), with a column `prompt`, or with `messages`, whose
last answer is left out. An object a line comes out.
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

from qlora.config import checked_config, laid_over, resolved_device
from qlora.conversations import Message, conversation, message, placed_system, unusable
from qlora.errors import UserError
from qlora.files import read_json, sha256_of
from qlora.generation import greedy, named_stops
from qlora.models import load_quantized, set_threads
from qlora.pretrained import loaded, runs_own_code
from qlora.readers import COMPRESSED, READERS, read_rows
from qlora.render import Format, load_tokenizer, padding_id, prompt_ids, rows_of, stop_ids, tokenized

SOURCES = Path("results/sources/models")
CONFIGS = ("config/models.yaml", "config/datasets.yaml", "config/config.yaml")


class FullContextError(UserError):
    """A prompt leaves the model no room for an answer."""


@dataclass
class Partner:
    """A loaded run, which answers as in evaluation."""

    network: Any
    tokenizer: Any
    form: Format | None
    system: str
    limit: int  # tokens of an answer

    @property
    def context(self) -> int:
        """Tokens that a prompt and its answer may have."""
        return int(getattr(self.network.config.get_text_config(), "max_position_embeddings", sys.maxsize))

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """The ids with which a conversation is asked. Raises FullContextError where no token of an answer fits."""
        row = placed_system([*messages, message("assistant", "answer")], self.system)
        ids = prompt_ids(tokenized(rows_of(row, self.tokenizer, self.form)[-1], self.tokenizer, self.form))
        if len(ids) >= self.context:
            raise FullContextError(
                f"the prompt has {len(ids)} tokens and fills the model's context of {self.context}; shorten it"
            )
        return ids

    def answer(self, prompt: list[int], base: bool = False, stream: bool = False) -> str:
        """The greedy answer to a prompt; of the base alone, or printed while it grows."""
        limit = min(self.limit, self.context - len(prompt))
        stops = stop_ids(self.tokenizer, self.form) | named_stops(self.network)
        streamer = TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None
        with self.network.disable_adapter() if base else contextlib.nullcontext():
            [written] = greedy(self.network, [prompt], limit, stops, padding_id(self.tokenizer), streamer)
        stopped = bool(written) and written[-1] in stops
        return str(self.tokenizer.decode(written[:-1] if stopped else written, skip_special_tokens=True))


def main() -> None:
    """Read the command line, load the run, and answer."""
    options = _options()
    rows = list(conversations(options.file, options.system)) if options.file is not None else []
    partner = load(options)
    if options.prompt is not None:
        show(partner, _conversation(options.system, options.prompt), options.compare)
    elif options.file is not None:
        for row in rows:
            prompt = partner.prompt(row)
            base = {"base": partner.answer(prompt, base=True)} if options.compare else {}
            told = {"prompt": row[-1]["content"], "answer": partner.answer(prompt), **base}
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
    parser.add_argument("--system", help="a system message, in the place of those in a file")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--compare", action="store_true", help="let the base answer too")
    how.add_argument("--merged", action="store_true", help="use the merged model instead of 4 bits and the adapter")
    parser.add_argument("--base", type=Path, help=f"the base's folder (default: {SOURCES}/MODEL)")
    parser.add_argument(
        "--configfile", type=Path, nargs="+", default=[], help="overlays that allow the base its own code"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="tokens of an answer, 256 where not given")
    return parser.parse_args()


def load(options: argparse.Namespace) -> Partner:
    """The run of the command line, on its base in 4 bits or merged."""
    if not (options.run / "run.json").is_file():
        raise UserError(f"{options.run}: no run.json there; give the folder of a trained run, as results/runs/RUN")
    run = read_json(options.run / "run.json")
    if not run.keys() >= {"prompt", "attention"}:
        raise UserError(f"{options.run}/run.json does not say how the run's prompts are rendered; train the run anew")
    folder = options.run / "merged" if options.merged else options.base or SOURCES / run["model"]
    if options.merged:
        check_merged(folder, options.run / "adapter", options.configfile)
    else:
        check_base(folder, run, options.configfile)
    if runs_own_code(folder):
        check_code(folder, {} if options.merged else configured_source(run["model"], options.configfile))
    device = resolved_device(options.device)
    set_threads(run["hardware"]["threads"], device)
    if options.merged:
        network: Any = loaded(
            AutoModelForCausalLM.from_pretrained,
            folder,
            dtype=torch.bfloat16,
            attn_implementation=run["attention"],
            device_map={"": device},
        )
    else:
        base = load_quantized(folder, run["settings"]["quantization"], device, run["attention"])
        network = PeftModel.from_pretrained(base, options.run / "adapter")
    rendered = run["prompt"]
    return Partner(
        network.eval(), load_tokenizer(folder), rendered["format"], rendered["system"], options.max_new_tokens
    )


def configured_source(model: str, overlays: Sequence[Path]) -> Mapping[str, Any]:
    """Where the config has a model from, nothing where it has none: what alone may allow a model its code."""
    config: dict[str, Any] = {}
    for path in [*map(Path, CONFIGS), *overlays]:
        if not path.is_file():
            raise UserError(f"{path} is not there; start this from the repository's folder")
        config = laid_over(config, yaml.safe_load(path.read_text(encoding="utf-8")))
    source: Mapping[str, Any] = checked_config(config)["models"].get(model, {}).get("source", {})
    return source


def check_code(folder: Path, source: Mapping[str, Any]) -> None:
    """Raise UserError where the code in a model's folder is not of the `source` that the config allows it from."""
    if read_json(folder / "source.json")["source"] != source:
        raise UserError(
            f"{folder}: brings code that the config does not allow; see remote_code in docs/hub.md, and name an overlay"
            " that allows it with --configfile"
        )


def making(target: Path, overlays: Sequence[Path]) -> str:
    """The command that makes an output of the workflow."""
    command = f".venv/bin/snakemake --cores all {target}"
    if not overlays:
        return f"{command} (with --configfile where the run is of an overlay)"
    return f"{command} --configfile {' '.join(map(str, overlays))}"


def check_merged(folder: Path, adapter: Path, overlays: Sequence[Path]) -> None:
    """Raise UserError where the merged model is not there, or another adapter than the run's is in it."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not there; make it: {making(folder, overlays)}")
    if read_json(folder / "merge.json")["adapter"] != sha256_of(adapter):
        raise UserError(
            f"{folder}: of another adapter than the run has now; delete it and make it anew: {making(folder, overlays)}"
        )


def check_base(folder: Path, run: Mapping[str, Any], overlays: Sequence[Path]) -> None:
    """Raise UserError where the base is not there, or its files are not those that the run was trained on."""
    if not (folder / "source.json").is_file():
        command = making(SOURCES / run["model"], overlays)
        raise UserError(f"{folder}: the base '{run['model']}' is not there; make it: {command}")
    files = {name: file["sha256"] for name, file in read_json(folder / "source.json")["files"].items()}
    if files != run["pins"]["model"]["files"]:
        raise UserError(f"{folder}: not the base that the run was trained on (other files); see its run.json, pins")


def conversations(path: Path, system: str | None) -> Iterator[list[Message]]:
    """What a file asks, each up to its last question. Raises UserError that names the row that cannot be asked."""
    if not path.is_file():
        raise UserError(f"{path}: no such file of prompts")
    if path.suffix.lower() not in {*READERS, *COMPRESSED}:
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8; convert the file, e.g. with iconv") from error
        yield from (_conversation(system, line) for line in lines if line.strip())
        return
    for number, row in read_rows(path):
        place = f"{path}, row {number}"
        given = {name for name in ("messages", "prompt") if row.get(name) is not None}  # Parquet has all columns
        if not given:
            raise UserError(f"{place}: neither 'prompt' nor 'messages' in it; add one")
        turns = conversation(row, {"messages": "messages"} if "messages" in given else {"prompt": "{prompt}"}, place)
        if turns and turns[-1]["role"] == "assistant":
            turns.pop()
        if reason := unusable([*turns, message("assistant", "answer")]):
            raise UserError(f"{place}: {reason}; mend it")
        yield [*opening(system), *(turn for turn in turns if not system or turn["role"] != "system")]


def opening(system: str | None) -> list[Message]:
    """The beginning of a conversation: the system message, where there is one."""
    return [message("system", system)] if system else []


def _conversation(system: str | None, prompt: str) -> list[Message]:
    return [*opening(system), message("user", prompt)]


def show(partner: Partner, messages: Sequence[Message], compare: bool) -> str:
    """Print the answer while it grows, and the base's before it where they are compared."""
    prompt = partner.prompt(messages)
    if compare:
        print("base:  ", end="", flush=True)
        partner.answer(prompt, base=True, stream=True)
        print("tuned: ", end="", flush=True)
    return partner.answer(prompt, stream=True)


def talk(partner: Partner, system: str | None, compare: bool) -> None:
    """Answer line by line, with what was said before; an empty line or a full context begins anew, no input ends."""
    said = opening(system)
    while True:
        try:
            prompt = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if not prompt.strip():
            said = opening(system)
            continue
        said.append(message("user", prompt))
        try:
            said.append(message("assistant", show(partner, said, compare).strip()))
        except FullContextError as error:
            print(f"{error} (what was said before is forgotten)", file=sys.stderr, flush=True)
            said = opening(system)


def be_quiet() -> None:
    """Let nothing but errors stand between the answers."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    log.setLevel("ERROR")


if __name__ == "__main__":
    be_quiet()
    main()
