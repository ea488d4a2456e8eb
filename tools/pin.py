"""Find the commit and the files of each source on the hub, for config/sources.lock.yaml.

A source whose `revision` is a branch or a tag, or that names none (then main), takes its commit from there. A name that
no source has is refused before anything is asked. A source that the hub refuses keeps what the lock holds of it, the
others are written, and the exit status is 1. As make: `make pin`, `make pin NAME=x`, `make pin NAME="x y"`.
"""

import argparse
import difflib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import HfApi, constants
from huggingface_hub.utils import filter_repo_objects

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "scripts"))

from qlora.config import laid_over  # noqa: E402
from qlora.errors import UserError  # noqa: E402
from qlora.files import replacing  # noqa: E402
from qlora.hub import HUB_ERRORS, asked_listing, checked_token, explained  # noqa: E402
from qlora.pins import BRANCH, needed_files, read_lock, unwanted  # noqa: E402 (scripts/ is no package)

LOCK = Path("config/sources.lock.yaml")
REGISTRIES = ("config/models.yaml", "config/datasets.yaml", "config/config.yaml")
EXPERIMENTS = "config/experiments/*.yaml"  # each is laid over the registries
KINDS = ("models", "datasets")
HEADER = """\
# Written by `make pin`: what each source on the hub was when it was asked for. A source of the configuration that names
# no commit takes it from here, and a file that is fetched must have the SHA-256 that stands here.
"""
Items = dict[str, dict[str, Mapping[str, Any]]]


def pin(root: Path, wanted: Sequence[str]) -> tuple[str, bool]:
    """Pin the sources of the configuration below `root`, or those of the names that are `wanted`.

    Returns the line that says what was done, and whether every source could be pinned; one that could not keeps what
    the lock held of it. Raises UserError where nothing can be done.
    """
    if constants.HF_HUB_OFFLINE:
        raise UserError("HF_HUB_OFFLINE is set, and commits can only be asked of the hub; unset it and start again")
    checked_token()
    before, items = read_lock(root / LOCK), hub_items(root)
    after: Items = {kind: dict(before[kind]) if wanted else {} for kind in KINDS}
    asked, refused = 0, 0
    for kind, name in chosen(items, wanted):
        asked += 1
        try:
            after[kind][name] = entry(kind, name, items[kind][name])
            print(f"pin: {kind}.{name}: {after[kind][name]['asked']} is {after[kind][name]['commit']}")
        except UserError as error:
            refused += 1
            print(f"pin: {error}", file=sys.stderr)
            if name in before[kind]:
                after[kind][name] = before[kind][name]
    changed = [name for kind in KINDS for name in after[kind] if after[kind][name] != before[kind].get(name)]
    with replacing(root / LOCK) as temporary:
        temporary.write_text(HEADER + yaml.safe_dump(after, allow_unicode=True, width=120), encoding="utf-8")
    told = f"Pinned {asked - refused} of {asked} sources in {LOCK}, new or moved: {', '.join(changed) or 'none'}"
    mend = "mend what is refused above and run make pin again" if refused else f"git add {LOCK} && git commit"
    return f"{told}; next: {mend}", not refused


def hub_items(root: Path) -> Items:
    """Models and datasets → name → entry of those from the hub, from all configurations of the repository.

    An experiment is laid over the registries: of a source it may name but a part. Raises UserError where a file is no
    YAML, and where two give one name to two sources.
    """
    items: Items = {kind: {} for kind in KINDS}
    registries: dict[str, Any] = {}
    for path in [path for name in REGISTRIES for path in root.glob(name)] + sorted(root.glob(EXPERIMENTS)):
        own = _read_config(path, root)
        full = laid_over(registries, own)
        if path.parent == root / "config":
            registries = full
        for kind, name in ((one, name) for one in KINDS for name in own.get(one) or {}):
            item = full[kind][name] or {}
            source = item.get("source") or {}
            if "hub" not in source:
                continue
            known = items[kind].setdefault(name, item)["source"]
            if {"revision": BRANCH, **known} != {"revision": BRANCH, **source}:
                raise UserError(
                    f"{path.relative_to(root)}: {kind}.{name} stands in another file with another source;"
                    " give one of the two another name"
                )
    return items


def _read_config(path: Path, root: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        try:
            return yaml.safe_load(file) or {}
        except yaml.YAMLError as error:
            why = " ".join(str(error).split())
            raise UserError(f"{path.relative_to(root)}: cannot be read as YAML ({why}); mend it") from error


def chosen(items: Items, wanted: Sequence[str]) -> list[tuple[str, str]]:
    """Kind and name of the sources to pin: all where no name is wanted. Raises UserError at a name that none has."""
    everything = [(kind, name) for kind in KINDS for name in items[kind]]
    names = [name for _, name in everything]
    for name in [name for name in wanted if name not in names]:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean '{near[0]}'?" if near else "config/models.yaml and config/datasets.yaml have the names"
        raise UserError(f"no source on the hub is called '{name}'; {hint}")
    return [(kind, name) for kind, name in everything if not wanted or name in wanted]


def entry(kind: str, name: str, item: Mapping[str, Any]) -> dict[str, Any]:
    """What the lock holds of a source: repository, asked revision, commit, licence as the hub states it, and files.

    A file has its size in bytes, and its SHA-256 where the hub states one. Raises UserError with the reason to refuse.
    """
    repository, asked = item["source"]["hub"], item["source"].get("revision", BRANCH)
    hub = HfApi()
    try:
        info = (hub.model_info if kind == "models" else hub.dataset_info)(repository, revision=asked)
        assert info.sha is not None  # the hub leaves it out only where it is asked to
        listed = asked_listing(repository, kind, info.sha)
    except HUB_ERRORS as error:
        raise UserError(f"{kind}.{name}: {explained(error, kind, repository, asked)}") from error
    if info.id != repository:
        print(f"pin: {kind}.{name}: the hub now calls {repository} {info.id}; write that into its source")
    ignored = unwanted(item["source"])
    needed = list(
        filter_repo_objects(
            listed, allow_patterns=needed_files(kind, item), ignore_patterns=ignored, key=lambda file: file.path
        )
    )
    if not needed:
        raise UserError(
            f"{kind}.{name}: {repository} at {asked} has no file like {', '.join(needed_files(kind, item))};"
            " mend the source or 'files'"
        )
    licence = (info.card_data.get("license") if info.card_data else None) or "not stated"
    return {
        "hub": repository,
        "asked": asked,
        "commit": info.sha,
        "licence": licence if isinstance(licence, str) else ", ".join(licence),
        "files": {
            file.path: {"size": file.size, **({"sha256": file.sha256} if file.sha256 else {})} for file in needed
        },
    }


def main(arguments: list[str]) -> int:
    """Pin, and print in one line what was done or why not; returns the exit status."""
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(prog="tools/pin.py", description=summary, epilog=rest)
    parser.add_argument("name", nargs="*", help="model or dataset of the configuration (default: all from the hub)")
    try:
        line, whole = pin(ROOT, parser.parse_args(arguments).name)
    except (UserError, OSError) as error:
        print(f"pin: error: {error}", file=sys.stderr)
        return 1
    print(line)
    return 0 if whole else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
