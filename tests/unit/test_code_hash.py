"""An edit re-runs just what uses it, and a comment nothing."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qlora.code_hash import code_files, code_hash

SCRIPTS = Path(__file__).parents[2] / "scripts"
HASHES = """
import json, sys
from pathlib import Path
sys.path.append(sys.argv[1])
from qlora.code_hash import code_hash
print(json.dumps({path: code_hash(Path(path)) for path in sys.argv[2:]}))
"""
# What the versions show in other words: nodes that got fields, empty lists, f-strings, letters that are new in Unicode.
SYNTAX = r"""
class A(B, key=None):
    x: int = 0

    async def f(self, a, /, *b: "s", c=None, **d) -> None:
        match a:
            case {"k": [1, *_], **rest}:
                return f"{a!r:>{b}} {c=}" "joined" f"{{}}"
        return lambda: {**d, None: ..., "\U0001fae8": b"\xff", "s": 1e-5j}
"""
FILES = {
    "train.py": "import parts.loss\n\n\ndef train(steps):\n    return parts.loss.loss(steps)\n",
    "report.py": "def report():\n    from parts.text import title\n\n    return title()\n",
    "parts/__init__.py": "",
    "parts/loss.py": "from parts import maths\n\n\ndef loss(x):\n    return maths.square(x)\n",
    "parts/maths.py": "import math\n\n\ndef square(x):\n    return math.pow(x, 2)\n",
    "parts/text.py": 'def title():\n    return "T"\n',
}


@pytest.fixture
def scripts(tmp_path):
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return tmp_path


def hash_of(script: Path) -> str:
    code_hash.cache_clear()
    from qlora import code_hash as module

    module._tree.cache_clear()
    return code_hash(script)


def hash_after(scripts: Path, name: str, old: str, new: str, script: str = "train.py") -> tuple[str, str]:
    """The hash of a script before and after an edit."""
    before = hash_of(scripts / script)
    text = (scripts / name).read_text()
    assert old in text
    (scripts / name).write_text(text.replace(old, new, 1))
    return before, hash_of(scripts / script)


UNSEEN = {
    "comment": ("return math.pow(x, 2)", "return math.pow(x, 2)  # two is enough"),
    "docstring of a function": ("def square(x):\n", 'def square(x):\n    """The square of x."""\n'),
    "docstring of a module": ("import math\n", '"""Arithmetic."""\n\nimport math\n'),
    "layout": ("return math.pow(x, 2)", "return (\n        math.pow(\n            x, 2,\n        )\n    )"),
}


@pytest.mark.parametrize(("old", "new"), UNSEEN.values(), ids=UNSEEN.keys())
def test_what_does_not_run_changes_nothing(scripts, old, new):
    before, after = hash_after(scripts, "parts/maths.py", old, new)
    assert before == after
    assert len(after) == 16


def test_changed_docstring_changes_nothing(scripts):
    hash_after(scripts, "train.py", "def train(steps):\n", 'def train(steps):\n    """Train."""\n')
    before, after = hash_after(scripts, "train.py", "Train.", "Train for some steps.")
    assert before == after


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("train.py", "loss(steps)", "loss(steps + 1)"),
        ("parts/loss.py", "square(x)", "square(x + 1)"),
        ("parts/maths.py", "x, 2", "x, 3"),
    ],
)
def test_edit_of_the_script_or_of_what_it_imports_changes_the_hash(scripts, name, old, new):
    before, after = hash_after(scripts, name, old, new)
    assert before != after


def test_string_that_is_no_docstring_counts(scripts):
    before, after = hash_after(scripts, "parts/text.py", '"T"', '"Title"', script="report.py")
    assert before != after


@pytest.mark.parametrize("name", ["parts/text.py", "report.py"])
def test_edit_elsewhere_changes_nothing(scripts, name):
    (scripts / "parts" / "text.py").read_text()
    before, after = hash_after(scripts, name, "return", "return 1,")
    assert before == after


def test_imports_are_found_wherever_they_stand(scripts):
    def names(script: str) -> set[str]:
        return {path.relative_to(scripts).as_posix() for path in code_files(scripts / script)}

    assert names("train.py") == {"train.py", "parts/loss.py", "parts/maths.py"}
    assert names("report.py") == {"report.py", "parts/text.py"}


def test_modules_that_import_each_other_are_read_once(scripts):
    (scripts / "parts" / "maths.py").write_text("import parts.loss\n")
    assert len(code_files(scripts / "train.py")) == 3


def test_renamed_module_changes_the_hash(scripts):
    before = hash_of(scripts / "train.py")
    (scripts / "parts" / "maths.py").rename(scripts / "parts" / "sums.py")
    loss = scripts / "parts" / "loss.py"
    loss.write_text(loss.read_text().replace("maths", "sums"))
    assert hash_of(scripts / "train.py") != before


def test_place_of_the_scripts_does_not_count(scripts, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "scripts"
    before = hash_of(scripts / "train.py")
    scripts.rename(elsewhere)
    assert hash_of(elsewhere / "train.py") == before


@pytest.mark.parametrize("version", ["3.12", "3.13"])
def test_each_version_of_python_gives_the_same_hashes(version, tmp_path):
    (tmp_path / "syntax.py").write_text(SYNTAX, encoding="utf-8")
    paths = [str(path) for path in [tmp_path / "syntax.py", *sorted(SCRIPTS.glob("*.py"))]]
    other, environment = f"python{version}", {**os.environ, "PYENV_VERSION": version}  # of pyenv, where that has it
    command = ["-c", HASHES, str(SCRIPTS), *paths]
    if not shutil.which(other) or subprocess.run([other, "-c", ""], env=environment, capture_output=True).returncode:
        pytest.skip(f"no {other} here")
    here, there = (
        json.loads(subprocess.run([python, *command], env=environment, check=True, stdout=subprocess.PIPE).stdout)
        for python in (sys.executable, other)
    )
    assert len(here) > 10
    assert there == here
