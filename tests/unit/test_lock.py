"""The locks fit pyproject.toml and this environment; each stage's conda environment holds what its scripts import."""

import ast
import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml

import lock
from qlora.code_hash import code_files

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
ENVIRONMENTS = PROJECT["tool"]["environments"]
DIRECT = [*PROJECT["project"]["dependencies"], *PROJECT["dependency-groups"]["dev"]]
MEND = "edit pyproject.toml and run `make lock`"


def pins_in(text: str) -> dict[str, str]:
    """Name → version of requirement lines, which must all be exact."""
    found = [re.fullmatch(r"([a-z0-9-]+)==([0-9][a-z0-9.]*)", line) for line in text.splitlines() if line[0] != "#"]
    assert all(found), "a line that is no exact pin of a public version"
    return {match[1]: match[2] for match in found if match}


LOCK = pins_in((ROOT / lock.LOCK).read_text())
CONSTRAINTS = pins_in((ROOT / lock.CONSTRAINTS).read_text())


def scripts_by_environment() -> dict[str, set[Path]]:
    """Environment → the scripts of the rules that name it."""
    found: dict[str, set[Path]] = {}
    for path in (ROOT / "rules").glob("*.smk"):
        for rule in re.split(r"^rule ", path.read_text(), flags=re.MULTILINE)[1:]:
            environment = re.search(r"\.\./envs/(\w+)\.yaml", rule)
            script = re.search(r"\.\./scripts/(\w+\.py)", rule)
            assert bool(environment) == bool(script), f"a rule in {path.name} has a script or an environment alone"
            if environment and script:
                found.setdefault(environment[1], set()).add(ROOT / "scripts" / script[1])
    return found


def imported_packages(scripts: set[Path]) -> set[str]:
    """Distributions that scripts import, directly or through modules of ours, wherever in a file the import stands."""
    names = set()
    for path in set().union(*(code_files(script) for script in scripts)):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names.add(node.module.split(".")[0])
    ours = {path.stem for path in (ROOT / "scripts").iterdir()}
    distributions = metadata.packages_distributions()
    # Triton comes with the CUDA build of torch, and Liger with Triton (tools/bootstrap.py): without them there is torch.
    names -= {"triton", "liger_kernel"}
    return {lock.normalised(distributions[name][0]) for name in names - sys.stdlib_module_names - ours}


def test_locks_say_how_they_were_made_and_do_not_overlap():
    for path in (lock.LOCK, lock.CONSTRAINTS):
        assert (ROOT / path).read_text().startswith("# Made by `make lock` from pyproject.toml")
    assert not LOCK.keys() & CONSTRAINTS.keys()
    assert CONSTRAINTS
    assert all(lock.ACCELERATOR.match(name) for name in CONSTRAINTS)
    assert not any(lock.ACCELERATOR.match(name) for name in LOCK)


def test_torch_is_pinned_to_its_public_version():
    assert LOCK["torch"] == "2.13.0"


@pytest.mark.parametrize("requirement", DIRECT)
def test_each_direct_dependency_is_exact_and_locked(requirement):
    name, _, version = requirement.partition("==")
    assert LOCK.get(lock.normalised(name)) == version, f"{requirement}: {MEND}"


def test_this_environment_is_what_the_lock_says():
    installed = {name: metadata.version(name).partition("+")[0] for name in LOCK}
    assert installed == LOCK


def test_each_environment_belongs_to_rules_and_each_rule_has_one():
    assert scripts_by_environment().keys() == ENVIRONMENTS.keys()
    assert {path.stem for path in (ROOT / "envs").glob("*.yaml")} == ENVIRONMENTS.keys()


@pytest.mark.parametrize("stage", ENVIRONMENTS)
def test_environment_file_has_the_pins_of_the_lock(stage):
    python, pip, packages = yaml.safe_load((ROOT / "envs" / f"{stage}.yaml").read_text())["dependencies"]
    assert python == "python=3.11.*"
    assert re.fullmatch(r"pip=\d+\.\d+(\.\d+)?", pip)
    wanted = map(lock.normalised, [*ENVIRONMENTS[stage]["imports"], *ENVIRONMENTS[stage].get("runtime", [])])
    assert packages["pip"] == [f"{name}=={LOCK[name]}" for name in sorted(wanted)], f"envs/{stage}.yaml: {MEND}"


@pytest.mark.parametrize("stage", ENVIRONMENTS)
def test_environment_holds_just_what_its_scripts_import(stage):
    imported = imported_packages(scripts_by_environment()[stage])
    assert set(ENVIRONMENTS[stage]["imports"]) == imported, f"[tool.environments] {stage}: {MEND}"
    assert not imported & set(ENVIRONMENTS[stage].get("runtime", [])), "a package is listed twice"


def test_all_that_scripts_import_is_a_direct_dependency():
    direct = {lock.normalised(requirement.partition("==")[0]) for requirement in PROJECT["project"]["dependencies"]}
    assert imported_packages(set((ROOT / "scripts").glob("*.py"))) <= direct


UV_OUTPUT = """\
numpy==2.4.6              # via torch, qlora-workflow (pyproject.toml)
nvidia-cublas==13.1.1.3   # via nvidia-cudnn-cu13, torch
nvidia-cudnn-cu13==9.20.0.48  # via torch
torch==2.13.0             # via qlora-workflow (pyproject.toml)
"""


def test_what_only_the_cuda_build_needs_becomes_a_constraint():
    everywhere, accelerator = lock.split(*lock.parse_pins(UV_OUTPUT))
    assert everywhere == {"numpy": "2.4.6", "torch": "2.13.0"}
    assert accelerator == {"nvidia-cublas": "13.1.1.3", "nvidia-cudnn-cu13": "9.20.0.48"}


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (UV_OUTPUT.replace("torch==2.13.0", "torch==2.13.0+cpu"), r"torch==2\.13\.0\+cpu is a local version"),
        (UV_OUTPUT.replace("# via torch\n", "# via cupy, torch\n"), "nvidia-cudnn-cu13 is asked for by cupy"),
        ("torch==2.13.0  # via qlora-workflow (pyproject.toml)\n", "torch resolved to a CPU build"),
    ],
)
def test_a_resolution_that_fits_one_machine_only_is_refused(output, message):
    with pytest.raises(ValueError, match=message):
        lock.split(*lock.parse_pins(output))


def test_an_environment_is_written_with_normalised_names():
    text = lock.environment(["ruamel.yaml", "jinja2"], {"jinja2": "3.1.6", "ruamel-yaml": "0.19.1"})
    parsed = yaml.safe_load(text)
    assert parsed["channels"] == ["conda-forge", "nodefaults"]
    assert parsed["dependencies"][2] == {"pip": ["jinja2==3.1.6", "ruamel-yaml==0.19.1"]}
