"""What a run leaves about itself."""

import importlib.metadata
import sys
from pathlib import Path

import pytest

from qlora.record import PACKAGES, digest, hardware, peak_memory, versions


def test_versions_are_those_installed():
    found = versions()
    assert found.pop("python") == ".".join(map(str, sys.version_info[:3]))
    assert found == {name: importlib.metadata.version(name) for name in PACKAGES}


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
