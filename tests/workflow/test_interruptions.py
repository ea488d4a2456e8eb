"""Ctrl-C in the middle, a kill, a full disk: nothing half-written, and starting again goes on."""

import os
import shutil
import signal
import subprocess
import time

import pytest
from workspaces import Workspace

pytestmark = pytest.mark.slow
LONG = "recipes: {tiny: {max_steps: 400, save_steps: 5, eval_steps: null}}\n"
OVERLAYS = ("reduced.yaml", "long.yaml")
ADAPTER = "results/runs/llama/adapter"


def interrupted(
    workspace: Workspace, how: signal.Signals, adapter: str = ADAPTER, configs: tuple[str, ...] = OVERLAYS
) -> str:
    """Start training, stop it once a checkpoint is there, and give what was on the screen."""
    running = subprocess.Popen(
        workspace.command("--cores", "2", adapter, configs=configs),
        cwd=workspace.folder,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    until = time.monotonic() + 300
    while not list(workspace.folder.glob("results/checkpoints/*/checkpoint-*/trainer_state.json")):
        assert time.monotonic() < until, "no checkpoint in five minutes"
        assert running.poll() is None, running.communicate()[0]
        time.sleep(0.2)
    os.killpg(running.pid, how)
    shown, _ = running.communicate(timeout=60)
    assert running.returncode != 0
    return shown


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_training_leaves_no_output_and_goes_on_from_its_checkpoint(
    workspace: Workspace, how: signal.Signals
) -> None:
    workspace.write("long.yaml", LONG)
    shown = interrupted(workspace, how)
    if how is signal.SIGINT:
        assert "train: error: interrupted; start again to go on" in shown
        assert "Traceback" not in shown
    assert not (workspace.folder / ADAPTER).exists()
    if how is signal.SIGKILL:
        workspace.snakemake("--unlock", configs=OVERLAYS)  # what Snakemake itself says to do after a kill
    workspace.snakemake("--cores", "2", ADAPTER, configs=OVERLAYS)
    assert "going on from" in workspace.read("results/logs/train/llama.log")
    resumed = (workspace.folder / ADAPTER / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(workspace.folder / "results/finished")  # else it would be taken from there
    workspace.snakemake("--cores", "2", ADAPTER, "--forcerun", "train", configs=OVERLAYS)
    assert "starting at step 0" in workspace.read("results/logs/train/llama.log")
    assert (workspace.folder / ADAPTER / "adapter_model.safetensors").read_bytes() == resumed


@pytest.mark.skipif(os.geteuid() != 0, reason="a small file system can be mounted by root alone")
def test_a_full_disk_is_one_line(workspace: Workspace) -> None:
    results = workspace.folder / "results"
    results.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(results)], check=False).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        shown = workspace.snakemake("--cores", "1", "results/datasets/sql", expect=1).stdout
        assert "error: no space left on the disk" in shown
        assert not (results / "sources/datasets/sql").exists()
    finally:
        subprocess.run(["umount", str(results)], check=True)
    workspace.snakemake("--cores", "1", "results/datasets/sql")
