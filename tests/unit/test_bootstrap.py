"""`make` on a machine or Python that is not supported, and an installation that is whole or not at all."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import bootstrap

ROOT = Path(__file__).resolve().parents[2]
HERE = ("Linux", "x86_64", "glibc", "CPython", (3, 11))


def run_with(version: str) -> tuple[int, str]:
    """Run the script with another Python; return its exit status and what it said."""
    environment = {**os.environ, "PYENV_VERSION": version}  # pyenv's launchers ask for it
    python = shutil.which(f"python{version}")
    if not python or subprocess.run([python, "-c", ""], env=environment, capture_output=True).returncode:
        pytest.skip(f"no Python {version} here")
    script = ROOT / "tools" / "bootstrap.py"
    done = subprocess.run([python, script], env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("version", ["3.6", "3.7", "3.8", "3.9", "3.10", "3.13"])
def test_another_python_gets_one_clear_line(version):
    status, said = run_with(version)
    assert status == 2
    assert said.startswith(f"{bootstrap.SUPPORTED}; this is CPython {version} (")
    assert said.count("\n") == 1


@pytest.mark.parametrize("version", [(3, 11), (3, 12)])
def test_supported_pythons(version):
    assert not bootstrap.unsupported(*HERE[:4], version)


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (0, "Darwin", "Darwin x86_64"),
        (0, "Windows", "Windows x86_64"),
        (1, "aarch64", "Linux aarch64"),
        (2, "", "another C library"),
        (3, "PyPy", "PyPy 3.11"),
        (4, (3, 10), "CPython 3.10"),
        (4, (3, 13), "CPython 3.13"),
    ],
)
def test_anything_else_is_refused_by_its_name(place, value, words):
    machine = [*HERE]
    machine[place] = value
    assert words in bootstrap.unsupported(*machine)


@pytest.mark.parametrize(
    ("log", "words"),
    [
        ("OSError: [Errno 28] No space left on device", "disk is full"),
        (
            "NewConnectionError: Failed to establish a new connection\nNo matching distribution found",
            "the network",
        ),
        ("ERROR: No matching distribution found for torch==2.13.0", "choose another index"),
        ("The virtual environment was not created because ensurepip is not available", "python3-venv"),
        ("something new", "the log says why"),
    ],
)
def test_a_failure_says_what_to_do(log, words):
    assert words in bootstrap.explain(log)


def make(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run make in the repository."""
    return subprocess.run(
        ["make", "-C", ROOT, "--no-print-directory", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def test_make_alone_lists_its_targets():
    said = make().stdout
    assert all(f"make {target} " in said for target in ("help", "demo", "test", "lint", "lock", "clean"))


@pytest.mark.parametrize(("python", "words"), [("", "No python3 found"), ("/nowhere/python", "does not run")])
def test_make_without_a_python_says_what_is_needed(python, words):
    done = make("venv", f"PYTHON={python}")
    assert done.returncode != 0
    assert words in done.stderr
    assert bootstrap.SUPPORTED in done.stderr


def install(folder: Path, requirements: str) -> subprocess.CompletedProcess[str]:
    """Run the script in `folder` with a lock of one requirement, from no index."""
    (folder / "requirements.lock").write_text(requirements)
    return subprocess.run(
        [sys.executable, folder / "tools" / "bootstrap.py"],
        env={**os.environ, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": ""},
        capture_output=True,
        text=True,
    )


def test_an_environment_of_another_folder_is_left_alone(tmp_path):
    (tmp_path / "tools").mkdir()
    shutil.copy(ROOT / "tools" / "bootstrap.py", tmp_path / "tools")
    (tmp_path / "constraints-cuda.lock").touch()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "installed.lock").write_text("another lock")
    (tmp_path / ".venv").symlink_to("other")
    done = install(tmp_path, "# first\n")
    assert done.returncode == 2
    assert "remove the link" in done.stderr
    assert (tmp_path / "other" / "installed.lock").read_text() == "another lock"


@pytest.mark.slow
def test_an_environment_is_remade_when_it_is_not_whole_or_not_this_lock(tmp_path):
    (tmp_path / "tools").mkdir()
    shutil.copy(ROOT / "tools" / "bootstrap.py", tmp_path / "tools")
    (tmp_path / "constraints-cuda.lock").touch()
    stamp = tmp_path / ".venv" / "installed.lock"

    assert "Installed in" in install(tmp_path, "# first\n").stdout
    assert install(tmp_path, "# first\n").stdout == ""
    stamp.unlink()
    assert "Installed in" in install(tmp_path, "# first\n").stdout

    failed = install(tmp_path, "nothing-of-this-name==1\n")
    assert failed.returncode == 1
    assert "choose another index" in failed.stderr
    assert not stamp.exists()
    assert "Installed in" in install(tmp_path, "# first\n").stdout
