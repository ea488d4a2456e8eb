"""A model's files as transformers' classes read them; code among them runs only where the config says so by name."""

from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, TypeVar

from transformers import AutoConfig, PreTrainedConfig

from qlora.errors import UserError
from qlora.files import check_files, read_json

Loaded = TypeVar("Loaded")
NAMING_CODE = "*config*.json"  # whose `auto_map` says which class is in which file


def loaded(load: Callable[..., Loaded], source: Path | PreTrainedConfig, **options: Any) -> Loaded:
    """What `load`, a from_pretrained or from_config of an Auto class, makes of a model's folder or of its config.

    Left to itself, transformers would ask on the terminal whether to fetch and run what the files name. Raises
    UserError where it cannot do without code that is not allowed, and as `runs_own_code` does.
    """
    folder = source if isinstance(source, Path) else Path(str(source.name_or_path))
    try:
        return load(source, trust_remote_code=runs_own_code(folder), **options)
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise UserError(
            f"{folder}: its architecture needs code that comes with it; name a model of a family that transformers"
            f" knows in models.{folder.name}.source, or read that code and, if you trust it, add its commit as"
            " `remote_code`"
        ) from error


def runs_own_code(folder: Path) -> bool:
    """Whether code among a model's files may run: its source in the config names the commit for that, `remote_code`.

    Raises UserError where that code, or what names it, is not what was downloaded, or lies in another repository.
    """
    record = folder / "source.json"
    if not record.is_file() or not (found := read_json(record))["source"].get("remote_code"):
        return False
    files = {name: file["sha256"] for name, file in found["files"].items()}
    check_files(
        folder, {name: digest for name, digest in files.items() if name.endswith((".py", ".json"))}, record.name
    )
    added = {path.relative_to(folder).as_posix() for path in folder.rglob("*.py")} - files.keys()
    if added:
        raise UserError(f"{folder / min(added)}: this code was not downloaded with the model; take it away")
    for name in sorted(files):
        for reference in _references(folder / name) if fnmatch(name, NAMING_CODE) else ():
            if "--" in reference:
                raise UserError(
                    f"{folder / name}: names code of another repository, {reference}, of which no commit is pinned;"
                    f" name another model in models.{folder.name}.source"
                )
    return True


def _references(file: Path) -> Iterator[str]:
    """The classes in files of code that a config names, as module.Class, or repository--module.Class."""
    named = read_json(file).get("auto_map") or {}
    for classes in named.values() if isinstance(named, dict) else [named]:
        yield from (classes,) if isinstance(classes, str) else filter(None, classes)


def model_config(folder: Path) -> PreTrainedConfig:
    """The config of a downloaded or built model. Raises UserError where it is of no family that transformers knows."""
    try:
        return loaded(AutoConfig.from_pretrained, folder)
    except (ValueError, OSError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise UserError(
            f"{folder}: no config of a family that transformers knows ({first_line});"
            f" name another model in models.{folder.name}.source"
        ) from error
