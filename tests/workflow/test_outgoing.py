"""What is asked for beside the default: merge, GGUF, export and publish, through Snakemake as a user would."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import TOKEN, USER, HubServer
from workspaces import Workspace

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("finished")]


def test_merge_gguf_export_and_chat(finished_copy: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finished_copy.snakemake("--cores", "2", "results/runs/llama/merged")
    merged = finished_copy.folder / "results/runs/llama/merged"
    assert 0 < json.loads((merged / "merge.json").read_text())["drift"]["rms"] < 0.1
    assert finished_copy.planned() == {}

    refused = finished_copy.snakemake("--cores", "2", "results/runs/llama/merged.gguf", expect=1).stdout
    assert "no convert_hf_to_gguf.py on the PATH: clone llama.cpp" in refused
    program = tmp_path / "bin/convert_hf_to_gguf.py"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\ncat "$1/config.json" > "$3"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    finished_copy.snakemake("--cores", "2", "results/runs/llama/merged.gguf")
    assert (merged.parent / "merged.gguf").read_text() == (merged / "config.json").read_text()

    to = tmp_path / "copies"
    for _ in range(2):  # the second one replaces the first
        finished_copy.snakemake("--config", f"to={to}", "--cores", "2", "export")
        assert (to / "llama/merged/model.safetensors").read_bytes() == (merged / "model.safetensors").read_bytes()
        assert not (to / "mistral/merged").exists()
        assert "# mistral" in (to / "mistral/README.md").read_text()
    assert "Scored was the base in 4 bits" in (to / "llama/merged/README.md").read_text()
    for card in (to / "mistral/README.md", to / "llama/merged/README.md"):  # the code that loads it is true
        code = card.read_text().split("```python\n")[1].split("```")[0]
        load = f"{code}\nprint(model(**tokenizer('Hello', return_tensors='pt')).logits.shape)"
        done = subprocess.run([sys.executable, "-c", load], cwd=finished_copy.folder, capture_output=True, text=True)
        assert "torch.Size" in done.stdout, done.stderr
    (to / "llama/README.md").write_text("mine")
    refused = finished_copy.snakemake("--config", f"to={to}", "--cores", "2", "export", expect=1).stdout
    assert f"{to}/llama/README.md was changed or added since the export; move it away" in refused
    assert (to / "llama/README.md").read_text() == "mine"

    command = [sys.executable, "scripts/chat.py", "results/runs/llama", "--prompt", "Post: a\nTitle?"]
    told = subprocess.run(command, cwd=finished_copy.folder, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr


def test_publish_and_its_dry_run(finished_copy: Workspace, hub: HubServer) -> None:
    where = ("--config", f"publish_to={USER}/demo")
    for _ in range(2):  # shown each time
        shown = finished_copy.snakemake(*where, "publish_dry_run=True", "--cores", "2", "publish").stdout
        assert f"To {USER}/demo-llama (private; refused if it is there and public), in one commit:" in shown
        assert "adapter_model.safetensors" in shown
    assert not hub.requests
    finished_copy.snakemake(*where, "--cores", "2", "publish")
    card = hub.repositories[f"{USER}/demo-llama"].commits[hub.repositories[f"{USER}/demo-llama"].branches["main"]]
    assert "results/runs/llama/adapter --configfile reduced.yaml" in card["README.md"].decode()
    again = finished_copy.snakemake(*where, "--cores", "2", "publish").stdout
    assert "Nothing to be done" in again
    for path in (finished_copy.folder / "results").rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path
