"""`make record` and `make restore` between real git clones: nothing is lost, blessed wrongly, or computed twice."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from repositories import PLAIN, SOMEBODY, Repository

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("dvc")]
ADAPTER = "results/runs/llama/adapter/adapter_model.safetensors"
BASE = "results/sources/models/tiny-llama/model.safetensors"
JOINT = {"collect all metrics, and compare each run with its base", "write the report"}
# A disk that others do not see, and that needs no root; the small results that git has are brought back onto it.
SMALL_DISK = "mount -t tmpfs -o size={size}k tmpfs {place} && {first} && exec {python} tools/{tool}.py"


def jobs_of(run: str) -> set[str]:
    return {f"train {run}", f"predict held-out with the run {run}", f"evaluate held-out of the run {run}"}


def remote_of(repository: Repository) -> Path:
    return repository.folder.parent / "remote"


def flip(path: Path) -> None:
    """Change a bit of the last byte, and no time: as a bad disk does."""
    times, mode = (path.stat().st_atime_ns, path.stat().st_mtime_ns), path.stat().st_mode
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.chmod(0o644)
    path.write_bytes(bytes(content))
    path.chmod(mode)
    os.utime(path, ns=times)


def in_cache(repository: Repository, out: str) -> Path:
    """Where DVC keeps an adapter's weights or another file of a folder that dvc.lock holds."""
    md5 = json.loads(repository.read("results/lock.json"))["outs"]["results/" + out.split("/")[1]]
    cache = repository.folder / ".dvc/cache/files/md5"
    listed = json.loads((cache / md5[:2] / md5[2:]).read_text())
    name = out.split("/", 2)[2]
    found = next(entry["md5"] for entry in listed if entry["relpath"] == name)
    return cache / found[:2] / found[2:]


@pytest.fixture(scope="module")
def restored(published: Repository, tmp_path_factory: pytest.TempPathFactory) -> Repository:
    """A clone that was restored from the remote; tests copy it."""
    clone = published.clone(tmp_path_factory.mktemp("restored") / "clone", remote_of(published))
    assert clone.tool("restore").endswith(
        "as dvc.lock has them; snakemake -n has nothing to do; next: open results/report/index.html"
    )
    return clone


@pytest.fixture(scope="module")
def overridden(restored: Repository, tmp_path_factory: pytest.TempPathFactory) -> Repository:
    """The restored clone in which one run has another learning rate, computed, recorded and committed."""
    copy = restored.copy(tmp_path_factory.mktemp("overridden") / "copy")
    config = copy.config()
    config["runs"][0]["overrides"] = {"learning_rate": 0.002}
    copy.write_config(config)
    assert copy.jobs() == jobs_of("llama") | JOINT
    copy.snakemake("--cores", "2", configs=())
    assert copy.tool("record").startswith("Recorded ")
    copy.commit("another learning rate")
    return copy


def test_a_clone_restores_to_nothing_to_do_and_the_same_bytes(published: Repository, restored: Repository) -> None:
    assert restored.jobs() == set()
    assert restored.bytes_of() == published.bytes_of()
    assert restored.run("git", "status", "--short") == ""
    assert "up to date" in restored.dvc("status")


def test_a_recipe_changed_is_the_runs_that_use_it(restored: Repository, tmp_path: Path) -> None:
    copy = restored.copy(tmp_path / "copy")
    for recipe, run in (("tiny", "llama"), ("brief", "brief")):
        config = restored.config()
        config["recipes"][recipe]["learning_rate"] = 0.003
        copy.write_config(config)
        assert copy.jobs() == jobs_of(run) | JOINT


def test_a_value_changed_back_trains_nothing_and_gives_the_first_bytes(
    published: Repository, overridden: Repository, tmp_path: Path
) -> None:
    copy = overridden.copy(tmp_path / "copy")
    assert copy.bytes_of("runs/llama/adapter") != published.bytes_of("runs/llama/adapter")
    copy.write_config(published.config())
    assert copy.jobs() == jobs_of("llama") | JOINT
    copy.snakemake("--cores", "2", configs=())
    log = copy.read("results/logs/train/llama.log")
    assert "finished before: taken from" in log
    assert "starting at step" not in log
    assert copy.bytes_of() == published.bytes_of()


def test_each_commit_gets_its_own_results_back(published: Repository, overridden: Repository, tmp_path: Path) -> None:
    copy = overridden.copy(tmp_path / "copy")
    new, old = (copy.run("git", "rev-parse", name).strip() for name in ("HEAD", "HEAD~1"))
    for commit, whose in ((old, published), (new, overridden)):
        copy.run("git", "checkout", "--quiet", commit)
        copy.tool("restore")
        assert copy.jobs() == set()
        assert copy.bytes_of() == whose.bytes_of()


def test_the_difference_between_two_commits_is_a_number(overridden: Repository) -> None:
    shown = json.loads(overridden.dvc("metrics", "diff", "--json", "HEAD~1", "HEAD"))["results/metrics.json"]
    difference = shown["llama.held-out.label.all.loss"]
    assert difference["diff"] == pytest.approx(difference["new"] - difference["old"])
    assert abs(difference["diff"]) > 1e-6
    assert not [name for name in shown if not name.startswith("llama.")]


CONDA = """#!/bin/sh
# Answers what Snakemake asks of conda, and makes environments that hold nothing.
case "$*" in
  --version) echo "conda 24.9.2" ;;
  *"info --json"*) echo '{"conda_version": "24.9.2", "conda_prefix": "HERE", "root_prefix": "HERE", "platform": "linux-64", "envs": []}' ;;
  *"config --get channel_priority --json"*) echo '{"get": {"channel_priority": "strict"}}' ;;
  *"env create"*) while [ $# -gt 0 ]; do [ "$1" = --prefix ] && mkdir -p "$2/conda-meta"; shift; done ;;
  *) echo "what is: $*" >&2; exit 1 ;;
esac
"""


def test_with_conda_environments_nothing_is_to_be_done_either(
    published: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conda = tmp_path / "bin/conda"
    conda.parent.mkdir()
    conda.write_text(CONDA.replace("HERE", str(tmp_path)))
    conda.chmod(0o755)
    (conda.parent / "activate").write_text("")
    monkeypatch.setenv("PATH", f"{conda.parent}:{os.environ['PATH']}")
    clone = published.clone(tmp_path / "clone", remote_of(published))
    assert "nothing to do" in clone.tool("restore", "--sdm", "conda")
    assert clone.jobs("--sdm", "conda") == set()


def test_a_commit_that_asks_for_more_leaves_just_that_to_do(restored: Repository, tmp_path: Path) -> None:
    copy = restored.copy(tmp_path / "copy")
    config = copy.config()
    config["recipes"]["brief"]["learning_rate"] = 0.003
    copy.write_config(config)
    copy.commit("a change without its results")
    shutil.rmtree(copy.folder / ".snakemake")
    shown = copy.tool("restore")
    assert "5 jobs are due, first: train brief (Params have changed" in shown
    assert shown.endswith("next: snakemake --cores all")
    assert copy.jobs() == jobs_of("brief") | JOINT


def test_a_comment_and_a_docstring_leave_nothing_to_do(restored: Repository, tmp_path: Path) -> None:
    copy = restored.copy(tmp_path / "copy")
    for name in ("scripts/qlora/files.py", "scripts/train_run.py", "rules/train.smk"):
        copy.write(name, f"{copy.read(name)}\n# A remark.\n")
    copy.commit("a remark")
    shutil.rmtree(copy.folder / ".snakemake")
    assert "nothing to do" in copy.tool("restore")


def test_another_place_umask_and_time_zone_change_nothing_and_scrambled_times_are_restored(
    restored: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = restored.copy(tmp_path / "elsewhere/moved here")
    monkeypatch.setenv("TZ", "Pacific/Kiritimati")
    before = os.umask(0o077)
    try:
        assert copy.jobs() == set()
        drawn = random.Random(0)
        for path in [path for name in ("results", "data", "report") for path in (copy.folder / name).rglob("*")]:
            os.utime(path, times=(1, drawn.randrange(1, 2_000_000_000)))
        assert "nothing to do" in copy.tool("restore")
        assert copy.jobs() == set()
    finally:
        os.umask(before)


@pytest.mark.parametrize("file", [ADAPTER, BASE])
def test_a_flipped_byte_of_an_output_is_named_not_recorded_and_mended_on_request(
    restored: Repository, tmp_path: Path, file: str
) -> None:
    copy = restored.copy(tmp_path / "copy")
    right = (copy.folder / file).read_bytes()
    flip(copy.folder / file)
    assert copy.tool("record", expect=1).startswith(f"make record: error: {file} is not what ")
    assert copy.tool("restore", expect=1).startswith(f"make restore: error: {file} would be lost, it is not recorded")
    assert copy.run("git", "status", "--short") == ""
    copy.tool("restore", "--discard")
    assert (copy.folder / file).read_bytes() == right
    assert copy.jobs() == set()


def test_an_edited_output_is_named_and_not_recorded(restored: Repository, tmp_path: Path) -> None:
    copy = restored.copy(tmp_path / "copy")
    copy.write("results/metrics.csv", copy.read("results/metrics.csv").replace("0.", "0.9", 1))
    modified = "results/metrics.csv was modified after its job wrote it"
    assert copy.tool("record", expect=1).startswith(f"make record: error: {modified}; delete it and run snakemake")
    assert "results/metrics.csv differs from the commit" in copy.tool("restore", expect=1)


def test_a_flipped_byte_in_the_cache_is_named_or_fetched_anew_and_never_used(
    published: Repository, restored: Repository, tmp_path: Path
) -> None:
    copy = restored.copy(tmp_path / "copy")
    flip(in_cache(copy, ADAPTER))
    shutil.rmtree(copy.folder / "results/runs")
    (copy.folder / ".dvc/config.local").unlink()
    shown = copy.tool("restore", expect=1)
    assert f"{ADAPTER} is damaged in DVC's cache (1 such), and no DVC remote is configured: make reproduce" in shown
    assert not (copy.folder / "results/runs").exists()
    copy.set_remote(str(remote_of(published)))
    assert "nothing to do" in copy.tool("restore")
    assert copy.bytes_of() == published.bytes_of()


def test_a_flipped_byte_in_the_remote_is_named_and_never_used(published: Repository, tmp_path: Path) -> None:
    remote = shutil.copytree(remote_of(published), tmp_path / "remote")
    place = in_cache(published, ADAPTER)
    flip(remote / "files/md5" / place.parent.name / place.name)
    clone = published.clone(tmp_path / "clone", remote)
    shown = clone.tool("restore", expect=1)
    assert f"{ADAPTER} is damaged: DVC got it neither from its cache nor from 'far', whose file is damaged too" in shown
    assert not (clone.folder / "results/runs").exists()


def test_a_flipped_byte_of_pinned_data_is_named_and_never_used(restored: Repository, tmp_path: Path) -> None:
    copy = restored.copy(tmp_path / "copy")
    flip(copy.folder / "data/examples/sql/train.jsonl")
    os.utime(copy.folder / "data/examples/sql/train.jsonl")
    stale = "the results are stale, 14 jobs are due, first: download dataset sql"
    assert stale in copy.tool("record", expect=1)
    assert "data/examples/sql/train.jsonl differs from the commit" in copy.tool("restore", expect=1)
    shown = copy.snakemake("--cores", "1", configs=(), expect=1).stdout
    assert "datasets.sql: the SHA-256 of data/examples/sql is" in shown


def test_stale_results_are_not_recorded(restored: Repository, tmp_path: Path) -> None:
    copy = restored.copy(tmp_path / "copy")
    lock, config = copy.read("dvc.lock"), copy.config()
    config["runs"][0]["overrides"] = {"learning_rate": 0.002}
    copy.write_config(config)
    shown = copy.tool("record", expect=1)
    assert shown.startswith("make record: error: the results are stale, 5 jobs are due, first: train llama (Params")
    assert copy.read("dvc.lock") == lock


def started(repository: Repository, tool: str) -> subprocess.Popen[str]:
    """`make record` or `make restore`, at work in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, f"tools/{tool}.py"],
        cwd=repository.folder,
        env={**os.environ, **SOMEBODY, **PLAIN},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def wait_until(there: Callable[[], bool], running: subprocess.Popen[str]) -> None:
    while not there():
        assert running.poll() is None, running.communicate()[0]
        time.sleep(0.002)


def test_the_second_of_two_says_who_is_at_work(published: Repository, tmp_path: Path) -> None:
    clone = published.clone(tmp_path / "clone", remote_of(published))
    running = started(clone, "restore")
    wait_until((clone.folder / ".snakemake/restoring").exists, running)
    shown = clone.tool("restore", expect=1)
    assert shown == f"make restore: error: make restore (process {running.pid}) is at work here: wait for its end"
    assert "make restore is at work here, or was cut off" in clone.snakemake("-n", configs=(), expect=1).stdout
    assert "nothing to do" in running.communicate(timeout=120)[0]
    clone.write(".snakemake/locks/0.output.lock", "results/metrics.csv\n")
    assert "snakemake is at work here" in clone.tool("record", expect=1)
    (clone.folder / ".snakemake/locks/0.output.lock").unlink()
    assert clone.jobs() == set()
    assert clone.bytes_of() == published.bytes_of()


MOMENTS: dict[str, str] = {  # a file that is there at the moment
    "while it fetches": ".dvc/cache/files/md5/*/*",
    "before it checks out": ".snakemake/restoring",
    "while it checks out": "results/*/*",
    "while it lets Snakemake agree": ".snakemake/metadata/*",
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_restore_is_not_used_and_completes_when_run_again(
    published: Repository, tmp_path: Path, moment: str
) -> None:
    clone = published.clone(tmp_path / "clone", remote_of(published))
    tracked = {path for path in clone.folder.glob("results/*") if path.is_file()}
    running = started(clone, "restore")
    wait_until(lambda: bool(set(clone.folder.glob(MOMENTS[moment])) - tracked), running)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    if (clone.folder / ".snakemake/restoring").exists():
        assert "run it again" in clone.snakemake("-n", configs=(), expect=1).stdout
    else:
        assert not list(clone.folder.glob("results/*/*"))
    assert "nothing to do" in clone.tool("restore")
    assert clone.bytes_of() == published.bytes_of()


@pytest.mark.parametrize("moment", [".dvc/cache/files/md5/*/*", ".dvc/tmp/rwlock", "dvc.lock"])
def test_a_killed_record_loses_nothing_and_completes_when_run_again(
    published: Repository, tmp_path: Path, moment: str
) -> None:
    copy = published.copy(tmp_path / "copy")
    shutil.rmtree(copy.folder / ".dvc/cache")
    shutil.rmtree(copy.folder / ".dvc/tmp")
    locks = [copy.read(name) for name in ("dvc.lock", "results/lock.json")]
    (copy.folder / "dvc.lock").unlink()
    running = started(copy, "record")
    wait_until(lambda: bool(list(copy.folder.glob(moment))), running)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    assert copy.tool("record").startswith("Recorded ")
    assert [copy.read(name) for name in ("dvc.lock", "results/lock.json")] == locks
    assert copy.bytes_of() == published.bytes_of()
    assert copy.jobs() == set()
    assert copy.run("git", "status", "--short") == ""


def test_without_a_remote_the_way_is_make_reproduce(published: Repository, tmp_path: Path) -> None:
    clone = published.clone(tmp_path / "clone")
    shown = clone.tool("restore", expect=1)
    assert "no DVC remote is configured: make reproduce computes the results anew" in shown


def test_an_unreachable_remote_is_one_line(published: Repository, tmp_path: Path) -> None:
    clone = published.clone(tmp_path / "clone")
    clone.set_remote("http://127.0.0.1:9/nothing")
    shown = clone.tool("restore", expect=1)
    assert (
        "results/sources is missing: DVC got it neither from its cache nor from 'far', or it cannot be reached" in shown
    )
    copy = published.copy(tmp_path / "copy")
    copy.set_remote(str(tmp_path / "a file"))
    copy.write("../a file", "")
    assert "recorded here, but not in the remote 'far'" in copy.tool("record", expect=1)


def on_small_disk(repository: Repository, place: str, tool: str) -> str:
    """The line of a tool that fails since the folder `place` is a disk too small, which others do not see."""
    (repository.folder / place).mkdir(parents=True, exist_ok=True)
    first = "git checkout --quiet -- results" if place == "results" else "true"
    size = 250 if place == "results" else 100
    command = SMALL_DISK.format(place=place, first=first, size=size, python=sys.executable, tool=tool)
    shown = repository.run("unshare", "--user", "--map-root-user", "--mount", "sh", "-c", command, expect=1)
    return shown.strip()


@pytest.mark.skipif(
    subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode != 0,
    reason="no file system of one's own can be mounted here",
)
def test_a_full_disk_is_one_line_and_nothing_is_used(published: Repository, tmp_path: Path) -> None:
    full = "no space left on the disk"
    clone = published.clone(tmp_path / "clone", remote_of(published))
    assert full in on_small_disk(clone, ".dvc/cache", "restore")
    assert full in on_small_disk(clone, "results", "restore")
    assert "nothing to do" in clone.tool("restore")
    shutil.rmtree(clone.folder / ".dvc/cache")
    lock = clone.read("dvc.lock")
    assert full in on_small_disk(clone, ".dvc/cache", "record")
    assert clone.read("dvc.lock") == lock
    assert clone.jobs() == set()


EXPERIMENT = """
name: mine
datasets:
  mine:
    source: {{path: {folder}, sha256: {sha256}}}
    files: {{train: train.jsonl, validation: validation.jsonl, test: test.jsonl}}
    prompt: "{{question}}"
    completion: "{{label}}"
    task: label
    licence: CC0-1.0
mixtures: {{examples: {{datasets: {{mine: {{}}}}}}}}
runs:
  - {{name: mine, model: tiny-llama, mixture: examples, recipe: brief, seed: 1}}
suites: {{held-out: {{datasets: [mine]}}}}
"""


def test_an_experiment_with_data_of_ones_own_leaves_the_published_results_alone(
    restored: Repository, tmp_path: Path
) -> None:
    from qlora.files import sha256_of

    copy, own = restored.copy(tmp_path / "copy"), tmp_path / "own"
    own.mkdir()
    for name, rows in (("train", range(60)), ("validation", range(60, 66)), ("test", range(66, 72))):
        lines = [json.dumps({"question": f"Is {row} even?", "label": "odd" if row % 2 else "even"}) for row in rows]
        (own / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    overlay = tmp_path / "mine.yaml"
    overlay.write_text(EXPERIMENT.format(folder=own, sha256=sha256_of(own)))
    before, lock = copy.bytes_of(), copy.read("dvc.lock")
    copy.snakemake("--cores", "2", configs=(str(overlay),))
    assert (copy.folder / "results/experiments/mine/runs/mine/adapter").is_dir()
    after = copy.bytes_of()
    assert {name: after[name] for name in before} == before
    assert copy.read("dvc.lock") == lock
    assert copy.run("git", "status", "--short") == ""
    assert copy.jobs() == set()
