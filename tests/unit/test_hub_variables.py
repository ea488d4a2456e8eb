"""What the environment of a process says to the hub's client: where the hub is, who asks, and whether to ask at all."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hub_server import TOKEN, HubServer
from hub_sources import MODEL, NAME, OF_MODEL, WEIGHTS, files_in, pinned

SCRIPT = Path(__file__).parents[2] / "scripts/download_source.py"
HF = Path(sys.executable).with_name("hf")


@pytest.fixture
def surroundings(tmp_path: Path, hub: HubServer) -> dict[str, str]:
    """The variables of a process that talks to the loopback hub, with an empty home of the client."""
    given = {name: value for name, value in os.environ.items() if name != "HF_HUB_DISABLE_XET"}  # the stage sets it
    return {**given, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}


def finished(command: list[str], folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """A command that ran in a folder; its output, both streams together, stands in `stdout`."""
    return subprocess.run(
        command,
        cwd=folder,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )


def download(source: dict[str, str], folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """The stage, run by hand: it writes `out` in the folder."""
    values: dict[str, Any] = {"folder": "out", "kind": "models", "name": "mine", "source": source, "patterns": MODEL}
    options = [
        part
        for name, value in values.items()
        for part in (f"--{name}", json.dumps(value) if name in ("source", "patterns") else value)
    ]
    return finished([sys.executable, str(SCRIPT), *options], folder, environment)


def test_the_variables_of_the_hub_are_honoured_and_the_token_is_seen_nowhere(tmp_path, hub, surroundings):
    source = pinned(hub, private=True)
    (tmp_path / "token").write_text(TOKEN)
    for place in ({"HF_TOKEN": "hf_wrong"}, {"HF_TOKEN_PATH": str(tmp_path / "token")}):
        done = download(source, tmp_path, {**surroundings, **place})
        assert (done.returncode == 0) == ("HF_TOKEN_PATH" in place), done.stdout
        assert TOKEN not in done.stdout
        assert "hf_wrong" not in done.stdout
        assert "HTTP Request" not in done.stdout, "addresses of gated files open them"
    assert files_in(tmp_path / "out") == OF_MODEL | {"source.json"}
    assert list((tmp_path / "home/hub").rglob(hashlib.sha256(WEIGHTS).hexdigest()))


FAULTS = {"refused": {"status": 403, "times": 100}, "cut": {"cut": 0, "method": "GET"}}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
@pytest.mark.parametrize("weights", [WEIGHTS, WEIGHTS * 2], ids=["small", "large"])
def test_addresses_that_open_storage_are_in_no_output(tmp_path, hub, surroundings, fault, weights):
    hub.fail("/objects/", **fault)
    done = download(pinned(hub, files={"model.safetensors": weights}), tmp_path, surroundings)
    assert (done.returncode == 1) == ("status" in fault), done.stdout
    assert "name=model.safetensors" not in done.stdout


def test_a_login_that_the_hub_s_own_command_stored_opens_a_gated_model(tmp_path, hub, surroundings):
    source = pinned(hub, gated=True)
    hub.accepted[TOKEN].add(NAME)
    refused = download(source, tmp_path, surroundings)
    assert f"{NAME} is gated: accept its terms at {hub.url}/{NAME}, then set HF_TOKEN" in refused.stdout
    login = finished([str(HF), "auth", "login", "--token", TOKEN], tmp_path, surroundings)
    assert login.returncode == 0, login.stdout
    done = download(source, tmp_path, surroundings)
    assert done.returncode == 0, done.stdout
    assert files_in(tmp_path / "out") == OF_MODEL | {"source.json"}
    assert TOKEN not in done.stdout


def test_what_was_fetched_first_needs_no_hub_offline(tmp_path, hub, surroundings):
    source, other = pinned(hub), pinned(hub, "owner/other")
    fetched = download(source, tmp_path, surroundings)
    assert fetched.returncode == 0, fetched.stdout
    (tmp_path / "out").rename(tmp_path / "first")
    hub.requests.clear()
    offline = {**surroundings, "HF_HUB_OFFLINE": "1"}
    done = download(source, tmp_path, offline)
    assert done.returncode == 0, done.stdout
    assert files_in(tmp_path / "out") == OF_MODEL | {"source.json"}
    refused = download(other, tmp_path, offline)
    assert "is not known to be whole in the hub's cache" in refused.stdout
    assert "HF_HUB_OFFLINE is set; unset it once" in refused.stdout
    assert refused.returncode == 1
    assert not hub.requests
