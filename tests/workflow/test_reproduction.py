"""`make reproduce`, with real git clones and the real workflow: what was published is found again, what was not is not."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from repositories import PLAIN, Repository

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("dvc")]
RELOCK = """
import json, sys
from pathlib import Path
sys.path.insert(0, "tools")
from results_lock import LOCK, made_lock
from qlora.files import write_json
write_json(LOCK, made_lock(Path()))
"""
ADAPTER = "results/runs/llama/adapter/adapter_model.safetensors"
SQL = "data/examples/sql/train.jsonl"


def reproduce(repository: Repository, folder: Path, expect: int, cores: str = "2") -> list[str]:
    """The lines that the tool itself prints at its end."""
    shown = repository.run(
        sys.executable, "tools/reproduce.py", "--cores", cores, "--folder", str(folder), expect=expect
    )
    return shown.splitlines()


def begun(repository: Repository, folder: Path, moment: str) -> subprocess.Popen[bytes]:
    """`make reproduce` at work in a process group of its own, when a file is there that `moment` means beside `folder`."""
    running = subprocess.Popen(
        [sys.executable, "tools/reproduce.py", "--cores", "2", "--folder", str(folder)],
        cwd=repository.folder,
        env={**os.environ, **PLAIN},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    until = time.monotonic() + 300
    while not any(folder.parent.glob(moment)):
        assert time.monotonic() < until
        assert running.poll() is None
        time.sleep(0.01)
    return running


@pytest.fixture(scope="module")
def computed(published: Repository, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which all was recomputed on one core (the results were made on all), after a kill in the middle."""
    folder = tmp_path_factory.mktemp("reproduced") / "clone"
    running = begun(published, folder, "clone/results/tokens/*/*/card.json")
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    assert not (folder / "results/metrics.csv").exists()
    lines = reproduce(published, folder, expect=0, cores="1")
    assert lines[-1].startswith("reproduced: ")
    assert f"byte-identical to results/lock.json; they lie in {folder}" in lines[-1]
    assert sum(line.endswith("identical") for line in lines) == 8
    return folder


def test_killed_alone_while_it_clones_it_clones_anew(published: Repository, tmp_path: Path) -> None:
    folder = tmp_path / "clone"
    running = begun(published, folder, ".clone.*")
    running.kill()
    running.wait()
    assert not folder.exists()
    running = begun(published, folder, "clone/.snakemake/locks/*")
    os.killpg(running.pid, signal.SIGKILL)


def test_killed_alone_while_snakemake_works_it_waits_for_that_and_goes_on(
    published: Repository, computed: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "clone"
    shutil.copytree(computed, folder, symlinks=True)
    (folder / "results/metrics.csv").unlink()
    running = begun(published, folder, "clone/.snakemake/locks/*")
    running.kill()
    running.wait()
    told = reproduce(published, folder, expect=1)[-1]
    left = re.match(r"reproduce: error: process (\d+) \(-m snakemake --cores 2 .*\) is at work here and holds ", told)
    assert left, told
    while Path("/proc", left[1]).exists():
        time.sleep(0.1)
    assert reproduce(published, folder, expect=0)[-1].startswith("reproduced: ")


def planted(published: Repository, computed: Path, place: Path, fault: Callable[[Repository], object]) -> Path:
    """The published repository with a fault in it, recorded and committed, in `place`/origin.

    Returns a copy of what was computed that is a clone of that commit: only what its inputs change runs again.
    """
    repository = published.copy(place / "origin")
    fault(repository)
    commit = repository.commit("a fault")
    folder = place / "clone"
    shutil.copytree(computed, folder, symlinks=True)
    clone = Repository.at(folder)
    clone.run("git", "fetch", "--quiet", str(repository.folder), commit)
    clone.run("git", "checkout", "--quiet", commit, "--", "data", "config")
    clone.run("git", "update-ref", "--no-deref", "HEAD", commit)
    return folder


def relock(repository: Repository, **changed: object) -> None:
    """Write the lock of the results as they are, as one who wants them believed would."""
    repository.run(sys.executable, "-c", RELOCK)
    lock = json.loads(repository.read("results/lock.json"))
    repository.write("results/lock.json", json.dumps(lock | changed))


def wrong_adapter(repository: Repository) -> None:
    path = repository.folder / ADAPTER
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    relock(repository)


def better_claim(repository: Repository) -> None:
    """Say of one run that it is far better than its base on one slice."""
    path = repository.folder / "results/comparison.csv"
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    row = next(row for row in rows if (row["baseline"], row["metric"]) == ("base", "execution_accuracy"))
    row |= {"difference": "0.95", "ci_low": "0.9", "ci_high": "0.99"}
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def swapped_dataset(repository: Repository) -> None:
    """Publish results of other rows than those that the commit has: the first training row goes, and the pin follows."""
    old = json.loads(repository.read("results/sources/datasets/sql/source.json"))["source"]["sha256"]
    repository.write(SQL, repository.read(SQL).partition("\n")[2])
    new = repository.run(
        sys.executable,
        "-c",
        "import sys; sys.path.append('scripts'); from pathlib import Path; from qlora.files import sha256_of;"
        "print(sha256_of(Path('data/examples/sql')))",
    ).strip()
    registry = repository.read("config/datasets.yaml")
    assert old in registry
    repository.write("config/datasets.yaml", registry.replace(old, new))


def test_a_wrong_adapter_fails_and_is_named(published: Repository, computed: Path, tmp_path: Path) -> None:
    folder = planted(published, computed, tmp_path, wrong_adapter)
    lines = reproduce(Repository.at(tmp_path / "origin"), folder, expect=1)
    assert (
        f"not reproduced: the same kind of machine must give the same bytes; stage train: {ADAPTER} differs"
        in lines[-1]
    )


def test_a_wrong_metric_fails_and_is_named(published: Repository, computed: Path, tmp_path: Path) -> None:
    folder = planted(published, computed, tmp_path, lambda repository: (better_claim(repository), relock(repository)))
    lines = reproduce(Repository.at(tmp_path / "origin"), folder, expect=1)
    assert "stage evaluate: results/comparison.csv differs" in lines[-1]


def test_a_metric_changed_after_its_record_is_named_before_anything_runs(published: Repository, tmp_path: Path) -> None:
    repository = published.copy(tmp_path / "origin")
    better_claim(repository)
    repository.commit("a fault")
    assert reproduce(repository, tmp_path / "clone", expect=1) == [
        "reproduce: error: results/comparison.csv of HEAD is not the one that results/lock.json names; "
        "`make record` records both together"
    ]
    assert not (tmp_path / "clone").exists()


def test_a_swapped_dataset_fails_and_is_named(published: Repository, computed: Path, tmp_path: Path) -> None:
    folder = planted(published, computed, tmp_path, swapped_dataset)
    repository = Repository.at(tmp_path / "origin")
    assert (
        "recorded with another configuration: config.datasets.sql.source.sha256" in reproduce(repository, folder, 1)[-1]
    )
    relock(repository)  # the pin is recorded too, but not what it leads to
    commit = repository.commit("more of the fault")
    clone = Repository.at(folder)
    clone.run("git", "fetch", "--quiet", str(repository.folder), commit)
    clone.run("git", "update-ref", "--no-deref", "HEAD", commit)
    lines = reproduce(repository, folder, expect=1)
    assert "not reproduced: data must be equal on every machine; stage download: " in lines[-1]
    assert "results/sources/datasets/sql/" in lines[-1]


def test_on_another_machine_the_claims_decide(published: Repository, computed: Path, tmp_path: Path) -> None:
    def elsewhere(repository: Repository) -> None:
        hardware = json.loads(repository.read("results/lock.json"))["hardware"]
        wrong_adapter(repository)  # stands for what another processor's rounding makes of it
        relock(repository, hardware={run: facts | {"cpu": "Another"} for run, facts in hardware.items()})

    folder = planted(published, computed, tmp_path, elsewhere)
    repository = Repository.at(tmp_path / "origin")
    lines = reproduce(repository, folder, expect=0)
    assert lines[-1].startswith("reproduced: ")
    assert "claims agree; bytes differ, as on another machine" in lines[-1]
    folder = planted(repository, computed, tmp_path / "more", lambda made: (better_claim(made), elsewhere(made)))
    lines = reproduce(Repository.at(tmp_path / "more/origin"), folder, expect=1)
    row = next(line for line in lines if line.startswith("llama") and " execution_accuracy " in line)
    assert row.endswith("DISAGREES")
    assert "(run llama, dataset sql, slice all does not)" in lines[-1]
