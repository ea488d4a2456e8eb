"""When published results count as reproduced: bytes first, then data, then the claim."""

import copy
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import reproduce
from claims import PLACE, STUDENT_95, checked_claims, claim_lines, claimed, spread_over_seeds, tolerance
from qlora.errors import UserError
from qlora.results import Record, read_table
from reproduce import Recomputed, changes, check_committed, clone, held, judged

HARDWARE = {"llama": {"device": "cpu", "threads": 1, "cpu": "A processor", "cores": 2}}
OTHER = {"llama": HARDWARE["llama"] | {"cpu": "Another processor"}}
DECIDES: dict[str, Any] = {
    "code": {"scripts/train_run.py": "c0de"},
    "environment": {"python": "3.11.7", "requirements.lock": "10c", "packages": {"torch": "2.13.0"}},
}
FILES = {
    "download": {
        "results/sources/datasets/sql/train.jsonl": "d1",
        "results/sources/models/tiny/model.safetensors": "m",
    },
    "concatenate": {"results/mixtures/all/train.jsonl": "d2"},
    "train": {"results/runs/llama/adapter/adapter_model.safetensors": "a1"},
    "evaluate": {"results/comparison.csv": "c1", "results/metrics.csv": "e1"},
}
SOURCES = {"models/tiny": {"source": {"build": {"seed": 1}}}, "datasets/sql": {"source": {"path": "data"}}}
LOCK = {"files": FILES, "hardware": HARDWARE, "sources": SOURCES, **DECIDES}
ADAPTER = "results/runs/llama/adapter/adapter_model.safetensors"


def record(part: str, difference: float, metric: str = "accuracy", **more: str) -> Record:
    row = {
        **{"run": "llama", "model": "tiny", "mixture": "all", "recipe": "demo", "seed": "1", "baseline": "base"},
        **{"suite": "held-out", "dataset": "label", "slice": part, "metric": metric},
        **{"difference": str(difference), "ci_low": str(difference - 0.03), "ci_high": str(difference + 0.02)},
        **{"n": "200", "disjoint": "true"},
    }
    return row | more


PUBLISHED = [
    *(record("all", 0.9), record("all", -2.0, metric="loss"), record("all", 0.7, baseline="trivial")),
    record("hard", 0.5),
]
SEEDS = [record(part, value, seed=str(i)) for part in ("all", "hard") for i, value in enumerate((0.88, 0.9, 0.92))]


def found(
    files: Any = FILES, hardware: Any = HARDWARE, comparison: Any = PUBLISHED, decides: Any = DECIDES
) -> Recomputed:
    return Recomputed(files, hardware, comparison, decides)


def planted(stage: str, name: str, value: str = "planted") -> dict[str, Any]:
    """The lock with another hash in it: what a file that was swapped before it was recorded leaves."""
    lock = copy.deepcopy(LOCK)
    lock["files"][stage][name] = value  # type: ignore[index]
    return lock


def test_equal_bytes_are_reproduced_wherever() -> None:
    for hardware in (HARDWARE, OTHER):
        good, lines = judged(LOCK, found(hardware=hardware), PUBLISHED, SEEDS)
        assert good
        assert lines[-1] == "reproduced: 6 files of 4 stages are byte-identical to results/lock.json"
        assert lines[0].split() == ["download", "2", "files", "identical"]


@pytest.mark.parametrize(
    ("stage", "name"),
    [
        ("train", ADAPTER),
        ("evaluate", "results/metrics.csv"),
        ("download", "results/sources/datasets/sql/train.jsonl"),
    ],
)
def test_a_planted_fault_fails_on_the_same_machine_and_is_named(stage: str, name: str) -> None:
    good, lines = judged(planted(stage, name), found(), PUBLISHED, SEEDS)
    assert not good
    assert lines[-1].startswith("not reproduced: ")
    assert lines[-1].endswith(f"stage {stage}: {name} differs")


@pytest.mark.parametrize("name", ["results/sources/datasets/sql/train.jsonl", "results/mixtures/all/train.jsonl"])
def test_a_swapped_dataset_fails_on_every_machine(name: str) -> None:
    stage = "download" if "sources" in name else "concatenate"
    good, lines = judged(planted(stage, name), found(hardware=OTHER), PUBLISHED, SEEDS)
    assert not good
    assert lines[-1] == f"not reproduced: data must be equal on every machine; stage {stage}: {name} differs"


def test_a_downloaded_model_is_equal_everywhere_and_a_built_one_is_not() -> None:
    name = "results/sources/models/tiny/model.safetensors"
    built = planted("download", name)
    assert judged(built, found(hardware=OTHER), PUBLISHED, SEEDS)[0]
    hub = built | {"sources": {"models/tiny": {"source": {"hub": "someone/tiny", "revision": "f" * 40}}}}
    assert not judged(hub, found(hardware=OTHER), PUBLISHED, SEEDS)[0]


def test_elsewhere_the_claims_decide() -> None:
    lock = planted("train", ADAPTER)
    near = [record("all", 0.93), record("hard", 0.52)]
    good, lines = judged(lock, found(hardware=OTHER, comparison=near), PUBLISHED, SEEDS)
    assert good
    assert lines[-1].startswith("reproduced: 2 of 2 claims agree")
    assert ADAPTER in lines[-1]
    wrong = [record("all", 0.9), record("hard", 0.1)]  # what honest computing gives where 0.5 was made up
    good, lines = judged(lock, found(hardware=OTHER, comparison=wrong), PUBLISHED, SEEDS)
    assert not good
    assert "1 of 2 claims agree" in lines[-1]
    assert "run llama, dataset label, slice hard" in lines[-1]
    assert sum("DISAGREES" in line for line in lines) == 1


def test_a_claim_that_was_not_recomputed_fails() -> None:
    good, lines = judged(planted("train", ADAPTER), found(hardware=OTHER, comparison=PUBLISHED[:1]), PUBLISHED, SEEDS)
    assert not good
    assert any("missing" in line for line in lines)
    assert not judged(planted("train", ADAPTER), found(hardware=OTHER), [], SEEDS)[0], "nothing is claimed"


def test_other_packages_excuse_other_bytes_and_other_code_does_not() -> None:
    lock = planted("train", ADAPTER)
    newer = copy.deepcopy(DECIDES)
    newer["environment"]["packages"]["torch"] = "2.14.0"
    good, lines = judged(lock, found(decides=newer), PUBLISHED, SEEDS)
    assert good
    assert "since the recording environment.packages.torch changed from 2.13.0 to 2.14.0" in lines
    edited = DECIDES | {"code": {"scripts/train_run.py": "0ther"}}
    assert not judged(lock, found(decides=edited), PUBLISHED, SEEDS)[0]


def test_the_number_of_cores_makes_no_other_machine() -> None:
    more = {"llama": HARDWARE["llama"] | {"cores": 64}}
    assert not judged(planted("train", ADAPTER), found(hardware=more), PUBLISHED, SEEDS)[0]


def test_changes_name_each_key() -> None:
    assert changes({"a": {"b": 1, "c": [1]}, "d": 2}, {"a": {"b": 1, "c": [2]}}) == [
        "a.c changed from [1] to [2]",
        "d changed from 2 to nothing",
    ]


def test_tolerance_is_the_formula() -> None:
    assert tolerance(0.03, []) == pytest.approx(2**0.5 * 0.03)
    assert tolerance(0.0, [0.1, 0.2, 0.3]) == pytest.approx(2**0.5 * 4.303 * 0.1)
    assert tolerance(0.03, [0.1, 0.2, 0.3]) == pytest.approx((2 * ((4.303 * 0.1) ** 2 + 0.03**2)) ** 0.5)


@pytest.mark.parametrize("freedom", range(1, len(STUDENT_95) + 1))
def test_the_points_of_students_distribution(freedom: int) -> None:
    """Its density integrated over ±t is 0.95."""
    t = STUDENT_95[freedom - 1]
    x = np.linspace(-t, t, 200_001)
    density = (1 + x**2 / freedom) ** (-(freedom + 1) / 2)
    everything = np.tan(np.linspace(-np.pi / 2, np.pi / 2, 2_000_003)[1:-1])
    whole = np.trapezoid((1 + everything**2 / freedom) ** (-(freedom + 1) / 2), everything)
    assert np.trapezoid(density, x) / whole == pytest.approx(0.95, abs=2e-4)


def test_two_honest_computations_nearly_always_agree() -> None:
    """Differences drawn with a seed's and the rows' errors: at least 95% lie within the tolerance."""
    generator = np.random.default_rng(0)
    spread, rows, trials = 0.04, 0.03, 4000
    agreed = 0
    for _ in range(trials):
        seeds = generator.normal(0.5, spread, 3)
        pair = generator.normal(0.5, spread, 2) + generator.normal(0, rows / 1.96, 2)
        agreed += abs(pair[0] - pair[1]) <= tolerance(rows, list(seeds))
    assert agreed / trials >= 0.95


def test_claims_are_the_primary_metric_against_the_base_with_the_longer_arm() -> None:
    assert [(row["slice"], row["difference"]) for row in claimed(PUBLISHED)] == [("all", "0.9"), ("hard", "0.5")]
    whole, hard = checked_claims(PUBLISHED, PUBLISHED, SEEDS)
    assert whole.tolerance == pytest.approx(tolerance(0.03, [0.88, 0.9, 0.92]))
    assert (whole.seeds, whole.n, hard.recomputed) == (3, 200, 0.5)
    assert len({line.index("published") for line in claim_lines([whole])[:1]}) == 1
    without = checked_claims(PUBLISHED, PUBLISHED, [])
    assert without[0].tolerance < whole.tolerance, "without seeds it is stricter, not looser"


def test_the_spread_holds_each_seed_of_each_claim() -> None:
    rows = list(spread_over_seeds(SEEDS + PUBLISHED[1:3]))
    assert [(row["slice"], row["seed"], row["difference"]) for row in rows][:2] == [
        ("all", "0", "0.88"),
        ("all", "1", "0.9"),
    ]
    assert len(rows) == 6
    assert checked_claims(PUBLISHED, PUBLISHED, rows) == checked_claims(PUBLISHED, PUBLISHED, SEEDS)


@pytest.mark.skipif(not (reproduce.ROOT / reproduce.SPREAD).exists(), reason="`make seeds` was not run")
def test_the_spread_is_that_of_the_published_results() -> None:
    """The run of the experiment with a published run's seed made the same difference."""
    spread = {key(row): row["difference"] for row in read_table(reproduce.ROOT / reproduce.SPREAD)}
    published = claimed(read_table(reproduce.ROOT / reproduce.COMPARISON))
    assert published
    for row in published:
        assert spread.get(key(row)) == row["difference"], f"run `make seeds`: {key(row)}"


def key(row: Record) -> tuple[str, ...]:
    return (*(row[column] for column in PLACE), row["seed"])


def git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=tester", "-c", "user.email=tester@example.org"]
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A git repository with a file, a table of results and its lock."""
    root = tmp_path / "root"
    (root / "results").mkdir(parents=True)
    (root / "file").write_text("one")
    (root / "results/metrics.csv").write_text("a\n1\n")
    digest = "5ed18c9a1b0bd49b87b2b5b8cf4fd2ddfe2f1f9e76cd6a0c1b3d7b6ac2e0c5ff"
    (root / "results/lock.json").write_text(json.dumps({"files": {"evaluate": {"results/metrics.csv": digest}}}))
    git(root, "init", "-q")
    git(root, "add", ".")
    git(root, "commit", "-qm", "one")
    return root


def test_the_clone_has_all_but_the_results_and_is_used_on(repository: Path, tmp_path: Path) -> None:
    folder = tmp_path / "clone"
    clone(repository, folder)
    assert (folder / "file").read_text() == "one"
    assert not (folder / "results").exists()
    (folder / "results").mkdir()
    (folder / "results/metrics.csv").write_text("another")
    clone(repository, folder)
    assert (folder / "results/metrics.csv").read_text() == "another"
    (folder / "file").write_text("edited")
    with pytest.raises(UserError, match="not an unchanged clone"):
        clone(repository, folder)


def test_results_that_were_not_computed_there_are_not_taken(repository: Path, tmp_path: Path) -> None:
    subprocess.run(["git", "clone", "-q", str(repository), str(tmp_path / "plain")], check=True)
    for folder in (repository, tmp_path / "plain"):
        with pytest.raises(UserError, match="is not an unchanged clone"):
            clone(repository, folder)
    (tmp_path / "empty").mkdir()
    clone(repository, tmp_path / "empty")
    assert not (tmp_path / "empty/results").exists()


def test_a_folder_with_something_else_is_left_alone(repository: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "work").write_text("of years")
    with pytest.raises(UserError, match="is not an unchanged clone"):
        clone(repository, mine)
    git(repository, "commit", "-q", "--allow-empty", "-m", "two")
    clone(repository, tmp_path / "two")
    git(repository, "commit", "-q", "--allow-empty", "-m", "three")
    with pytest.raises(UserError, match="REPRODUCE_IN"):
        clone(repository, tmp_path / "two")
    assert (mine / "work").read_text() == "of years"


def test_a_table_that_was_changed_after_its_lock_is_named_before_anything_runs(repository: Path) -> None:
    right = hashlib.sha256(b"a\n1\n").hexdigest()
    check_committed(repository, {"evaluate": {"results/metrics.csv": right}})
    with pytest.raises(UserError, match=r"results/metrics.csv of HEAD is not the one that results/lock.json names"):
        check_committed(repository, {"evaluate": {"results/metrics.csv": "0" * 64}})


def test_the_second_of_two_says_who_works(tmp_path: Path) -> None:
    folder = tmp_path / "clone"
    with held(folder), pytest.raises(UserError, match=rf"process {os.getpid()} .* holds {folder}.lock"), held(folder):
        pass
    with pytest.raises(UserError, match="something else"), held(folder):
        raise UserError("something else")
    assert list(tmp_path.iterdir()) == []


def test_without_a_lock_it_says_what_to_do(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    git(root, "init", "-q")
    git(root, "commit", "-q", "--allow-empty", "-m", "one")
    with pytest.raises(UserError, match="make record"):
        reproduce.reproduce(root, None, "1")


def test_what_git_or_the_disk_refuse_is_one_line(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(reproduce, "ROOT", repository)
    monkeypatch.setattr(reproduce, "check_committed", lambda *_: None)
    (tmp_path / "file").write_text("")
    (tmp_path / "clone/.git/info").mkdir(parents=True)
    (tmp_path / "clone/.git/info/sparse-checkout").write_text("/*")
    for place in (tmp_path / "file" / "clone", Path("/proc/clone"), tmp_path / "clone"):
        monkeypatch.setattr(sys, "argv", ["reproduce", "--folder", str(place)])
        assert reproduce.main() == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert all(line.startswith("reproduce: error: ") for line in lines)
    assert "git rev-parse: fatal: not a git repository" in lines[2]
