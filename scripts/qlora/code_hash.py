"""A hash over the code that a stage runs, so that an edit re-runs just what uses it, and a comment nothing.

Snakemake itself sees neither an edit to an imported module nor that an edit only touched a comment.
"""

import ast
import hashlib
from functools import cache
from pathlib import Path
from typing import Any


@cache
def code_hash(script: Path) -> str:
    """SHA-256 (16 hex digits) over the syntax trees of `script` and of the modules below its folder that it imports."""
    digest = hashlib.sha256()
    for path in sorted(code_files(script), key=lambda path: path.relative_to(script.parent).as_posix()):
        digest.update(path.relative_to(script.parent).as_posix().encode())
        digest.update(_text_of(_tree(path)).encode())
    return digest.hexdigest()[:16]


@cache
def _tree(path: Path) -> ast.Module:
    """The syntax tree of a file without its docstrings; comments and layout are not part of a syntax tree."""
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(
            node
        ):
            node.body = node.body[1:]
        if isinstance(node, ast.JoinedStr):  # Python 3.12 puts an empty text at the end of a format in an f-string
            node.values = [part for part in node.values if not (isinstance(part, ast.Constant) and part.value == "")]
    return tree


def _text_of(part: Any) -> str:
    """A syntax tree as text, the same on every Python: what a newer one adds to a node is empty in code for an older.

    Hence not `ast.dump`, which shows such fields, and from 3.13 on leaves out others.
    """
    if isinstance(part, ast.AST):
        fields = {name: value for name, value in ast.iter_fields(part) if value is not None and value != []}
        return f"{type(part).__name__}({', '.join(f'{name}={_text_of(fields[name])}' for name in sorted(fields))})"
    if isinstance(part, list):
        return f"[{', '.join(map(_text_of, part))}]"
    return ascii(part)  # not `repr`, which asks the Unicode version what can be printed


def code_files(script: Path) -> set[Path]:
    """`script` and all modules below its folder that it imports, directly or not."""
    found: set[Path] = set()
    waiting = [script]
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.add(path)
            waiting += _imported(path, script.parent)
    return found


def _imported(path: Path, folder: Path) -> list[Path]:
    """The files below `folder` that the module at `path` imports, wherever in it the import stands."""
    names: list[str] = []
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    candidates = (folder.joinpath(*name.split(".")).with_suffix(".py") for name in names)
    return [candidate for candidate in candidates if candidate.is_file()]
