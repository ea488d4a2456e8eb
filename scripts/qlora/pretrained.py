"""A model's files as transformers' own classes read them: code that comes with a model is never run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from transformers import AutoConfig, PreTrainedConfig

from qlora.errors import UserError

Loaded = TypeVar("Loaded")


def without_remote_code(load: Callable[..., Loaded], source: Path | PreTrainedConfig, **options: Any) -> Loaded:
    """What `load`, a from_pretrained or from_config of an Auto class, makes of a model's folder or of its config.

    Left to itself, transformers would ask on the terminal whether to fetch and run what the files name. Raises
    UserError where it cannot do without.
    """
    try:
        return load(source, trust_remote_code=False, **options)
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        folder = source if isinstance(source, Path) else Path(str(source.name_or_path))
        raise UserError(
            f"{folder}: its architecture needs code from the hub, which this workflow never runs;"
            f" name a model of a family that transformers knows in models.{folder.name}.source"
        ) from error


def model_config(folder: Path) -> PreTrainedConfig:
    """The config of a downloaded or built model. Raises UserError where it is of no family that transformers knows."""
    try:
        return without_remote_code(AutoConfig.from_pretrained, folder)
    except (ValueError, OSError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise UserError(
            f"{folder}: no config of a family that transformers knows ({first_line});"
            f" name another model in models.{folder.name}.source"
        ) from error
