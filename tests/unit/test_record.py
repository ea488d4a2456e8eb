"""What a run leaves about itself."""

import importlib.metadata
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from qlora.record import KERNELS, PACKAGES, capability, commit, digest, hardware, peak_memory, versions


def test_versions_are_those_installed():
    found = versions()
    assert found.pop("python") == ".".join(map(str, sys.version_info[:3]))
    kernels = {name: found.pop(name) for name in KERNELS}
    assert found == {name: importlib.metadata.version(name) for name in PACKAGES}
    there = {name for name in KERNELS if importlib.util.find_spec(name.replace("-", "_"))}
    assert {name for name, version in kernels.items() if version} == there


def test_kernels_have_a_version_where_they_are_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    original = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "3.7.1" if name == "triton" else original(name))
    assert versions()["triton"] == "3.7.1"


def test_the_capability_is_the_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda *_: (9, 0))
    assert capability("cuda") == (9, 0)
    assert capability("cpu") is None


def test_hardware_names_the_processor_and_the_threads():
    found = hardware("cpu", 2)
    assert found.keys() == {"device", "threads", "cpu", "cores"}
    assert (found["device"], found["threads"]) == ("cpu", 2)
    assert found["cpu"]


def test_peak_memory_is_in_bytes_as_the_kernel_counts_it():
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    kibibytes = int(status["VmHWM"].split()[0])
    assert peak_memory("cpu") == {"resident": pytest.approx(kibibytes * 1024, rel=0.02)}


def test_digest_depends_on_values_not_on_the_order_of_keys():
    assert digest({"a": 1, "b": [2.5, None]}, "x") == digest({"b": [2.5, None], "a": 1}, "x")
    assert len({digest("a", "b"), digest("ab"), digest("a", "c"), digest(["a", "b"])}) == 4
    assert len(digest()) == 16


def test_the_commit_says_whether_tracked_files_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert commit() is None
    identity = ["-c", "user.name=tester", "-c", "user.email=tester@example.org"]
    (tmp_path / "file").write_text("one")
    for command in (["init", "-q"], ["add", "file"], [*identity, "commit", "-qm", "one"], [*identity, "tag", "v1"]):
        subprocess.run(["git", *command], check=True)
    clean = commit()
    assert clean is not None
    assert re.fullmatch("[0-9a-f]{40}", clean)
    (tmp_path / "file").write_text("two")
    assert commit() == f"{clean}-dirty"
