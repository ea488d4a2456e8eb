"""Stage `preflight`: a model's family and tokenizer are checked on a small random copy, before a GPU hour is spent."""

from qlora.stage import log, run_stage

import re
import tempfile
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path

import bitsandbytes
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qlora.conversations import Message, message, placed_system
from qlora.errors import UserError
from qlora.files import write_json
from qlora.loss import add_supervised_loss
from qlora.models import load_quantized, set_threads
from qlora.pretrained import model_config
from qlora.render import IGNORED, Format, Tokens, load_tokenizer, padding_id, rows_of, stop_ids, tokenized
from qlora.shrunken import shrunken_model

QUANTIZATION = {"type": "nf4", "double": True, "compute_dtype": "float32"}  # float32: rounding hides no fault
SAME = 1e-3  # logits of around 10 differ by 1e-5 where nothing is wrong, and by 5 where documents see each other
MIXED = 0.1
LENGTHS = (13, 7, 18)  # tokens of the documents that are packed into one row
SYSTEM = "Keep it short."
TURNS = (("What colour is grass?", "It is green."), ("And the sea at noon?", "That is blue."))
Targets = str | Sequence[str]


def preflight_model(
    model: Path,
    report: Path,
    form: Format | None,
    system: str,
    with_system: bool,
    attention: str,
    targets: list[Targets],
) -> None:
    """Check the family and the tokenizer of the model in the folder `model`, and write what was found as JSON.

    Its config and its tokenizer are read, not its weights. `system`: where a system message goes; `with_system`: a
    dataset of its runs has some. `targets`: what its runs give adapters to. Raises UserError that names model, check
    and what to change. Documents that mix when packed are no error: `packs` says so, and training heeds it.
    """
    set_threads(1, "cpu")
    name = model.name
    config = model_config(model).get_text_config()
    tokenizer = load_tokenizer(model)
    for turns in (1, 2):
        check_labels(name, _probe(turns), tokenizer, form)
    system_message = _system_message(name, tokenizer, form, system, with_system)
    network = shrunken_network(model, attention)
    check_experts(name, network)
    check_ids(name, tokenizer, stop_ids(tokenizer, form), network)
    layers = [path for path, module in network.named_modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    modules = all_modules(network, config.num_hidden_layers)
    found = {_shown(wanted): targets_found(name, wanted, modules) for wanted in targets}
    difference, control = packing_difference(network), packing_difference(network, positions=False)
    packs = difference < SAME and control > MIXED
    check_loss(name, network)
    if not packs:
        log.info("%s: packed documents see each other (logits differ by %.2g): none are packed", name, difference)
    write_json(
        report,
        {
            "model": name,
            "family": network.config.model_type,
            "class": type(network).__name__,
            "attention": attention,
            "quantised modules": len(layers),
            "quantised names": sorted({_last(path) for path in layers}),
            "targets": found,
            "packs": packs,
            "packing difference": float(f"{difference:.1g}"),
            "packing difference without positions": float(f"{control:.1g}"),
            "system message": system_message,
            "stop tokens": sorted(map(str, tokenizer.convert_ids_to_tokens(sorted(stop_ids(tokenizer, form))))),
        },
    )


def _refused(name: str, check: str, what: str, change: str) -> UserError:
    return UserError(f"models.{name}: {check}: {what}; {change}")


def _last(path: str) -> str:
    return path.rpartition(".")[2]


def _shown(wanted: Targets) -> str:
    return wanted if isinstance(wanted, str) else ", ".join(wanted)


def shrunken_network(model: Path, attention: str) -> PreTrainedModel:
    """The small copy of the model in `model`, in 4 bits on the CPU, as training loads the whole one."""
    name = model.name
    with tempfile.TemporaryDirectory() as scratch:
        small = shrunken_model(model, Path(scratch))
        try:
            return load_quantized(small, QUANTIZATION, "cpu", attention).eval()
        except UserError as error:
            text = str(error).replace(scratch, "its small copy")
            raise _refused(name, "quantisation", text, f"name another model in models.{name}.source") from error
        except ValueError as error:
            if "attention implementation" not in str(error):
                raise
            what = f"its family has no '{attention}'"
            raise _refused(name, "attention", what, f"set models.{name}.attention to eager") from error


def check_experts(name: str, network: PreTrainedModel) -> None:
    """Raise UserError where a parameter joins several matrices, as experts do: bitsandbytes leaves it unquantised."""
    joined = [path for path, weight in network.named_parameters() if weight.ndim == 3 and 1 not in weight.shape]
    if joined:
        what = f"its experts ({joined[0]}) would stay out of 4 bits"
        raise _refused(name, "quantisation", what, f"name a model without experts in models.{name}.source")


def _probe(turns: int) -> list[Message]:
    """A conversation of a few turns."""
    return [turn for ask, answer in TURNS[:turns] for turn in (message("user", ask), message("assistant", answer))]


def check_labels(
    name: str, messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, form: Format | None
) -> None:
    """Raise UserError unless each answer, and nothing else but the stop token after it, is learned.

    No text of the conversation may be missing, and there may be one BOS at most.
    """
    change = f"set models.{name}.format to a named format"
    try:
        rendered = rows_of(messages, tokenizer, form)
        rows = [tokenized(parts, tokenizer, form) for parts in rendered]
    except UserError as error:
        what = str(error).removeprefix(f"{tokenizer.name_or_path}: ")
        raise _refused(name, "template", what.rpartition("; ")[0] or what, change) from error  # its own advice left out
    given = "".join(str(tokenizer.decode(row.input_ids)) for row in rows)
    for turn in messages:
        if turn["content"] not in given:
            raise _refused(name, "template", f"drops the {turn['role']} message '{turn['content']}'", change)
    learned = [stretch for row in rows for stretch in _learned(row)]
    answers = [turn["content"] for turn in messages if turn["role"] == "assistant"]
    texts = [_plain(stretch, tokenizer) for stretch in learned]
    if texts != answers:
        raise _refused(name, "labels", f"of the answers {answers} the learned text is {texts}", change)
    stops = stop_ids(tokenizer, form)
    for stretch in learned:
        if stretch[-1] not in stops:
            last = tokenizer.convert_ids_to_tokens(stretch[-1])
            raise _refused(name, "stop token", f"an answer ends in {last!r}, at which generation does not stop", change)
    opening = tokenizer.bos_token
    for parts, row in zip(rendered, rows, strict=True):
        written = "".join(part.text for part in parts).count(opening) if opening else 0  # some write one a turn
        if opening and row.input_ids.count(tokenizer.bos_token_id) > max(written, 1):
            raise _refused(name, "BOS", f"'{opening}' stands in a row more often than its template writes it", change)


def _learned(row: Tokens) -> list[list[int]]:
    """The stretches of a row that are learned, as ids."""
    grouped = groupby(row.labels, key=lambda label: label != IGNORED)
    return [list(stretch) for learned, stretch in grouped if learned]


def _plain(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of ids without added tokens (the stop token; the marks of an empty thought) and space around it."""
    added = tokenizer.get_added_vocab().values()
    return str(tokenizer.decode([token for token in ids if token not in added], skip_special_tokens=True)).strip()


def _system_message(
    name: str, tokenizer: PreTrainedTokenizerBase, form: Format | None, system: str, needed: bool
) -> str:
    """Where a system message stands: template, user, or refused; the last is an error where one is needed."""
    try:
        check_labels(name, placed_system([message("system", SYSTEM), *_probe(1)], system), tokenizer, form)
    except UserError as error:
        if not needed or system == "user":
            log.info("a system message is refused, and no dataset of its runs declares one: %s", error)
            return "refused"
        what = str(error).removeprefix(f"models.{name}: ").removeprefix("template: ").rpartition("; ")[0]
        raise _refused(name, "system message", what, f"set models.{name}.system to user") from error
    return system


def check_ids(name: str, tokenizer: PreTrainedTokenizerBase, stops: set[int], network: PreTrainedModel) -> None:
    """Raise UserError where ordinary text, a BOS, a stop token or padding has an id without a row in the embedding.

    Other added tokens may lie beyond it: nothing writes them (Gemma 3's for images); `tokenize` looks at each row.
    """
    rows = network.config.get_text_config().vocab_size
    needed = {padding_id(tokenizer), tokenizer.bos_token_id, *stops}
    others = set(tokenizer.added_tokens_decoder) - needed
    vocabulary = {token: number for token, number in tokenizer.get_vocab().items() if number not in others}
    token, largest = max(vocabulary.items(), key=lambda item: item[1])
    if largest >= rows:
        what = f"'{token}' has the id {largest}, and the embedding {rows} rows"
        raise _refused(name, "tokenizer", what, f"name a source in models.{name}.source whose files belong together")


def targets_found(name: str, wanted: Targets, modules: Mapping[str, bool]) -> list[str]:
    """The names of the layers that get an adapter: each of `wanted` finds some, and all that it finds are in 4 bits.

    PEFT passes over a name that finds nothing where another does. `wanted` is all-linear, a list of ends of module
    paths, or a regular expression over whole paths. `modules`: path → whether it is in 4 bits. Raises UserError.
    """
    known = sorted({_last(path) for path, quantised in modules.items() if quantised})
    if wanted == "all-linear":
        return known
    change = f"set lora.target_modules of the recipe to all-linear or to some of {', '.join(known)}"
    if not wanted:
        raise _refused(name, "LoRA targets", "target_modules of a recipe names no module", change)
    patterns = {wanted: wanted} if isinstance(wanted, str) else {end: rf"(.*\.)?{re.escape(end)}" for end in wanted}
    found: set[str] = set()
    for target, pattern in patterns.items():
        try:
            matched = [path for path in modules if re.fullmatch(pattern, path)]
        except re.error as error:
            raise _refused(name, "LoRA targets", f"'{target}': {error}", change) from error
        others = [path for path in matched if not modules[path]]
        if others or not matched:
            what = f"{others[0] or 'the whole model'}, which is not in 4 bits" if others else "no layer"
            raise _refused(name, "LoRA targets", f"'{target}' finds {what}", change)
        found.update(map(_last, matched))
    return sorted(found)


def all_modules(network: PreTrainedModel, layers: int) -> dict[str, bool]:
    """Path → whether it is in 4 bits, of the modules that the whole model with so many layers has."""
    found = {path: isinstance(module, bitsandbytes.nn.Linear4bit) for path, module in network.named_modules()}
    return {
        re.sub(r"\.0\.", f".{layer}.", path, count=1): quantised
        for path, quantised in found.items()
        for layer in range(layers if ".0." in path else 1)
    } | found


@torch.no_grad()
def packing_difference(network: PreTrainedModel, positions: bool = True) -> float:
    """Largest difference between the logits of documents packed into one row and of each document alone.

    Training gives positions that begin anew with each document, and no mask. Without positions, which is the control,
    documents see each other.
    """
    generator = torch.Generator().manual_seed(0)
    known = network.config.get_text_config().vocab_size
    documents = [torch.randint(known, (1, length), generator=generator) for length in LENGTHS]
    alone = [network(input_ids=document, use_cache=False).logits for document in documents]
    given = {"input_ids": torch.cat(documents, 1)}
    if positions:
        given["position_ids"] = torch.cat([torch.arange(length)[None] for length in LENGTHS], 1)
    packed = network(**given, use_cache=False).logits
    return float((packed - torch.cat(alone, 1)).abs().max())


@torch.no_grad()
def check_loss(name: str, network: PreTrainedModel) -> None:
    """Raise UserError where the loss in training, which sees no logits, is not the cross-entropy of the model's logits.

    Afterwards `network` computes the loss when it is asked to.
    """
    change = f"name another model in models.{name}.source"
    ids = torch.arange(LENGTHS[0])[None]
    expected = torch.nn.functional.cross_entropy(network(input_ids=ids, use_cache=False).logits[0, :-1], ids[0, 1:])
    try:
        add_supervised_loss(network)
    except UserError as error:
        raise _refused(name, "loss", str(error), change) from error
    loss = network(input_ids=ids, labels=ids, loss_items=LENGTHS[0] - 1)
    if not torch.allclose(loss, expected, atol=SAME):
        raise _refused(name, "loss", f"is {float(loss):.4f}, and {float(expected):.4f} by the model's logits", change)


if __name__ == "__main__":
    run_stage(preflight_model)
