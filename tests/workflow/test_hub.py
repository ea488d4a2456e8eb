"""From a hub on the loopback device to the report: pinned, gated, Parquet, JSONL and CSV, by Snakemake itself."""

import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Thread

import pyarrow
import pyarrow.parquet
import pytest
import yaml
from hub_server import TOKEN, HubServer
from psutil import NoSuchProcess, Process
from tiny_models import make_base
from workspaces import ROOT, Workspace

SPLITS = {"train": 24, "validation": 4, "test": 6}
FACTS = {"prompt": "{ask}", "completion": "{reply}"}
CONFIG = {
    "models": {"hub-mistral": {"source": {"hub": "owner/mistral", "revision": "v1"}, "system": "user"}},
    "datasets": {
        "hub-parquet": {
            "source": {"hub": "owner/facts"},
            "files": {split: f"main/{split}-*.parquet" for split in SPLITS},
            **FACTS,
        },
        "hub-lines": {
            "source": {"hub": "owner/lines"},
            "files": {"train": "train.jsonl", "validation": "validation.csv", "test": "test.csv"},
            **FACTS,
        },
    },
    "mixtures": {"hub": {"datasets": {"hub-parquet": {}, "hub-lines": {}}, "max_length": 192}},
    "recipes": {"few": {"lora": {"r": 4}, "batch_size": 4, "max_steps": 3, "samples": 1}},
    "runs": [{"name": "hub-run", "model": "hub-mistral", "mixture": "hub", "recipe": "few"}],
    "suites": {
        "held-out": {
            "datasets": ["hub-parquet", "hub-lines"],
            **{"baselines": ["trivial"], "max_new_tokens": 8, "bootstrap": {"samples": 100}},
        }
    },
}
OVERLAY = "config/experiments/hub.yaml"


def rows(split: str, which: str) -> list[dict[str, str]]:
    return [
        {"ask": f"What is {which} {split} {number}?", "reply": f"stone {number}"} for number in range(SPLITS[split])
    ]


def parquet(lines: list[dict[str, str]]) -> bytes:
    """Rows with a column more than is used."""
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{**line, "unused": "x"} for line in lines]), buffer)
    return buffer.getvalue()


def csv_text(lines: list[dict[str, str]]) -> bytes:
    return "".join(["ask,reply\n", *(f"{line['ask']},{line['reply']}\n" for line in lines)]).encode()


def fill(hub: HubServer, folder: Path) -> None:
    """A gated model at a tag, and two datasets, each with files beside those that are used."""
    base = make_base(folder, "mistral-instruct")
    weights = {path.name: path.read_bytes() for path in base.iterdir()}
    commit = hub.add("owner/mistral", {**weights, "pytorch_model.bin": b"pickled"}, gated=True, licence="apache-2.0")
    hub.repositories["owner/mistral"].tags["v1"] = commit
    main = {f"main/{split}-0.parquet": parquet(rows(split, "parquet")) for split in SPLITS}
    hub.add("owner/facts", {**main, "other/train-0.parquet": b"of another configuration"}, kind="dataset")
    texts = {f"{split}.csv": csv_text(rows(split, "lines")) for split in ("validation", "test")}
    lines = "".join(json.dumps(line) + "\n" for line in rows("train", "lines")).encode()
    hub.add("owner/lines", {**texts, "train.jsonl": lines, "README.md": b"about"}, kind="dataset")


def pin(workspace: Workspace, *names: str) -> str:
    """What `make pin NAME="…"` says last."""
    command = [sys.executable, "tools/pin.py", *names]
    done = subprocess.run(command, cwd=workspace.folder, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


@contextmanager
def command_lines() -> Iterator[set[str]]:
    """The command lines, as a process list shows them, of all that runs below this process meanwhile."""
    seen: set[str] = set()
    over = Event()

    def look() -> None:
        while not over.wait(0.05):
            for process in Process().children(recursive=True):
                with suppress(NoSuchProcess):
                    seen.add(" ".join(process.cmdline()))

    looking = Thread(target=look)
    looking.start()
    try:
        yield seen
    finally:
        over.set()
        looking.join()


@pytest.mark.slow
def test_runs_whole_from_the_hub(workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(ROOT / "tools", workspace.folder / "tools")
    workspace.write(OVERLAY, yaml.safe_dump(CONFIG))
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_CACHE", "HF_HUB_DISABLE_XET"):
        monkeypatch.delenv(name, raising=False)
    with HubServer() as hub:
        fill(hub, tmp_path / "upload")
        values = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1,localhost"}
        for name, value in values.items():
            monkeypatch.setenv(name, value)

        refused = workspace.snakemake("--cores", "2", configs=(OVERLAY,), expect=1).stdout
        # whichever download Snakemake starts first
        assert re.search(r"config: \w+\.(hub-\w+)\.source: not pinned; run `make pin NAME=\1`", refused), refused
        assert not hub.requests
        assert pin(workspace, "hub-mistral").startswith("Pinned 1 of 1 sources")
        assert pin(workspace, "hub-parquet", "hub-lines").startswith("Pinned 2 of 2 sources")

        refused = workspace.snakemake("--cores", "2", configs=(OVERLAY,), expect=1).stdout
        assert f"owner/mistral is gated: accept its terms at {hub.url}/owner/mistral, then set HF_TOKEN" in refused
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        hub.accepted[TOKEN].add("owner/mistral")
        with command_lines() as seen_lines:  # what docs/hub.md says for nodes without a network
            fetching = ("--cores", "2", "--until", "download_model", "download_dataset")
            first = workspace.snakemake(*fetching, configs=(OVERLAY,)).stdout
            asked = len(hub.requests)
            monkeypatch.setenv("HF_HUB_OFFLINE", "1")
            whole = first + workspace.snakemake("--cores", "2", configs=(OVERLAY,)).stdout
        assert len(hub.requests) == asked, "offline, the hub was asked"
        for script in ("download_source.py", "train_run.py"):
            assert any(script in line for line in seen_lines), "no look was taken while it ran"
        assert not [line for line in seen_lines if TOKEN in line]

        fetched = {seen.query.removeprefix("name=") for seen in hub.asked("/objects/")}
        assert "pytorch_model.bin" not in fetched
        assert "other/train-0.parquet" not in fetched
    run = json.loads(workspace.read("results/runs/hub-run/run.json"))
    assert run["pins"]["model"]["source"] == {
        "hub": "owner/mistral",
        "revision": hub.repositories["owner/mistral"].tags["v1"],
    }
    for dataset in ("hub-parquet", "hub-lines"):
        assert len(workspace.read(f"results/datasets/{dataset}/test.jsonl").splitlines()) == SPLITS["test"]
    assert "hub-run" in workspace.read("results/report/index.html")
    weights = workspace.folder / "results/sources/models/hub-mistral/model.safetensors"
    assert weights.stat().st_nlink == 2, "a second copy beside the cache's"
    made = [path for path in workspace.folder.rglob("*") if path.is_file()]
    assert len(made) > 100
    assert not [path for path in made if TOKEN.encode() in path.read_bytes()]
    assert TOKEN not in whole
    # The hub is gone now, and nothing is asked of it. Another pin of one source leaves the others.
    assert workspace.planned(configs=(OVERLAY,)) == {}
    lock = yaml.safe_load(workspace.read("config/sources.lock.yaml"))
    lock["datasets"]["hub-lines"]["commit"] = "0" * 40
    workspace.write("config/sources.lock.yaml", yaml.safe_dump(lock))
    planned = workspace.planned(configs=(OVERLAY,))
    assert (planned.get("download_dataset"), planned.get("download_model")) == (1, None)
