"""Workspaces for the tests of the workflow."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import TOKEN, HubServer
from repositories import Repository, remote_of
from workspaces import Workspace


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """A workspace in which nothing was run."""
    return Workspace(tmp_path)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """A hub on the loopback device, and the environment of a client that is logged in there."""
    with HubServer() as server:
        home = {"HF_HOME": str(tmp_path / "hub-home"), "HF_HUB_DISABLE_XET": "1"}
        for name, value in {"HF_ENDPOINT": server.url, "HF_TOKEN": TOKEN, **home}.items():
            monkeypatch.setenv(name, value)
        yield server


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A workspace in which the reduced workflow ran to its end; tests only look at it, or work on a copy."""
    made = Workspace(tmp_path_factory.mktemp("finished"))
    made.snakemake("--cores", "2")
    return made


@pytest.fixture
def finished_copy(finished: Workspace, tmp_path: Path) -> Workspace:
    """A copy of the finished workspace, times of files kept, that a test may change."""
    folder = tmp_path / "copy"
    shutil.copytree(finished.folder, folder, symlinks=True)
    copy = Workspace.__new__(Workspace)
    copy.folder = folder
    return copy


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    """A repository whose results `dvc repro` made, recorded, committed and pushed to a folder beside it.

    Tests only clone or copy it.
    """
    folder = tmp_path_factory.mktemp("published")
    repository = Repository(folder / "origin")
    repository.set_remote(str(folder / "remote"))
    repository.dvc("repro")
    repository.tool("record")
    repository.commit("the results")
    return repository


@pytest.fixture(scope="session")
def restored(published: Repository, tmp_path_factory: pytest.TempPathFactory) -> Repository:
    """A clone that was restored from the remote; tests copy it."""
    clone = published.clone(tmp_path_factory.mktemp("restored") / "clone", remote_of(published))
    assert clone.tool("restore").endswith(
        "as dvc.lock has them; snakemake -n has nothing to do; next: open results/report/index.html"
    )
    return clone
