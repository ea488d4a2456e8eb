"""Resolve pyproject.toml into the locks, and write each stage's conda environment from them.

Needs Python 3.11 or newer and the package index; uv is installed into a temporary folder. Pins that still fit are kept,
unless `--upgrade` asks for the newest versions.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

UV = "uv==0.13.8"
CONDA_PIP = "25.3"  # from conda-forge, before pip itself can install anything
TESTED, ALSO = "3.11", "3.12"  # the lock is resolved for the first, and must fit the second unchanged
ACCELERATOR = re.compile(r"(nvidia|cuda)-|triton$")  # what only the CUDA build of torch needs
LOCK, CONSTRAINTS = Path("requirements.lock"), Path("constraints-cuda.lock")
LOCK_HEADER = """\
# Made by `make lock` from pyproject.toml: edit that, not this.
# torch has no local version, so that pip takes a CPU build where one is offered and the index's CUDA build elsewhere.
"""
CONSTRAINTS_HEADER = """\
# Made by `make lock` from pyproject.toml: edit that, not this.
# What the CUDA build of torch needs, as constraints: pip ignores those of packages that nothing asks for, so the same
# command installs the CPU build without them.
"""
ENVIRONMENT_HEADER = "# Made by `make lock` from pyproject.toml, [tool.environments]: edit that, not this.\n"

Pins = dict[str, str]


def normalised(name: str) -> str:
    """Return a distribution's name in its one canonical spelling (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def parse_pins(text: str) -> tuple[Pins, dict[str, set[str]]]:
    """Return each package's version, and which packages ask for it, from uv's one-line annotations.

    Raises:
        ValueError: a package is pinned to a local version (`+cpu`), which no other index offers.
    """
    pins, parents = {}, {}
    for line in text.splitlines():
        pin, _, via = line.partition("# via ")
        name, _, version = pin.strip().partition("==")
        if "+" in version:
            raise ValueError(f"{name}=={version} is a local version; resolve from an index without it")
        pins[name] = version
        parents[name] = {parent.split()[0] for parent in via.split(", ")}
    return pins, parents


def split(pins: Pins, parents: dict[str, set[str]]) -> tuple[Pins, Pins]:
    """Return the pins that every machine needs, and those that only the CUDA build of torch needs.

    Raises:
        ValueError: something other than torch asks for an accelerator package, or nothing does.
    """
    accelerator = {name for name in pins if ACCELERATOR.match(name)}
    for name in accelerator:
        others = parents[name] - accelerator - {"torch"}
        if others:
            raise ValueError(f"{name} is asked for by {', '.join(sorted(others))}, not by torch alone")
    if not accelerator:
        raise ValueError("torch resolved to a CPU build; resolve from an index that offers the CUDA build")
    return (
        {name: version for name, version in pins.items() if name not in accelerator},
        {name: version for name, version in pins.items() if name in accelerator},
    )


def lines(pins: Pins) -> str:
    """Return pins as requirement lines, sorted."""
    return "".join(f"{name}=={version}\n" for name, version in sorted(pins.items()))


def environment(packages: list[str], pins: Pins) -> str:
    """Return a conda environment file that holds `packages`, by pip, at their pinned versions."""
    pip = "".join(f"      - {name}=={pins[name]}\n" for name in sorted(map(normalised, packages)))
    return (
        f"{ENVIRONMENT_HEADER}channels:\n  - conda-forge\n  - nodefaults\n"
        f"dependencies:\n  - python={TESTED}.*\n  - pip={CONDA_PIP}\n  - pip:\n{pip}"
    )


def resolve(uv: list[str], python: str, *options: str) -> str:
    """Return uv's resolution of pyproject.toml for Linux x86-64 and a Python version, a line a package."""
    command = [*uv, "pip", "compile", "--quiet", "--no-header", "--annotation-style", "line", "--group", "dev"]
    command += ["--python-version", python, "--python-platform", "x86_64-manylinux_2_28", *options, "pyproject.toml"]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def main() -> None:
    """Write the locks and envs/*.yaml."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--upgrade", action="store_true", help="take the newest versions that pyproject.toml allows")
    upgrade = parser.parse_args().upgrade
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([f"{folder}/bin/pip", "install", "--quiet", UV], check=True)
        uv = [f"{folder}/bin/uv"]
        known = Path(folder, "known.txt")  # uv keeps the versions that it finds in its output file
        known.write_text("" if upgrade else LOCK.read_text() + CONSTRAINTS.read_text())
        resolve(uv, TESTED, "--output-file", str(known))
        pins, parents = parse_pins(known.read_text())
        known.write_text(lines(pins))
        also, _ = parse_pins(resolve(uv, ALSO, "--constraints", str(known)))
    missing = also.keys() - pins.keys()
    if missing:
        raise ValueError(f"Python {ALSO} also needs {', '.join(sorted(missing))}")
    everywhere, accelerator = split(pins, parents)
    LOCK.write_text(LOCK_HEADER + lines(everywhere))
    CONSTRAINTS.write_text(CONSTRAINTS_HEADER + lines(accelerator))
    stages = tomllib.loads(Path("pyproject.toml").read_text())["tool"]["environments"]
    for stage, packages in stages.items():
        text = environment(packages["imports"] + packages.get("runtime", []), everywhere)
        Path("envs", f"{stage}.yaml").write_text(text)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"lock: {error}")
