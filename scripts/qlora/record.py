"""What a run leaves about itself: versions, hardware, memory."""

import hashlib
import importlib.metadata
import json
import os
import platform
import resource
import subprocess
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    "torch",
    "transformers",
    "trl",
    "peft",
    "bitsandbytes",
    "accelerate",
    "datasets",
    "tokenizers",
    "safetensors",
    "numpy",
)
KERNELS = ("triton", "liger-kernel")  # with a CUDA build of torch alone


def versions() -> dict[str, str | None]:
    """Installed version of each package that takes part in training, and of Python; None where kernels are absent."""
    installed = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"python": platform.python_version(), **installed, **{name: _version(name) for name in KERNELS}}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def hardware(device: str, threads: int) -> dict[str, Any]:
    """The processor, and the card where there is one, that a result was made on."""
    found: dict[str, Any] = {"device": device, "threads": threads, "cpu": _cpu_name(), "cores": os.cpu_count()}
    if device == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
        found["cuda"] = torch.version.cuda
    return found


def capability(device: str) -> tuple[int, int] | None:
    """The card's compute capability, by which attention, kernels and recorded steps are chosen; None on a CPU."""
    return torch.cuda.get_device_capability() if device == "cuda" else None


def _cpu_name() -> str:
    """The processor's name as the kernel gives it."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def commit() -> str | None:
    """The commit of the working folder, with `-dirty` where a tracked file differs from it; None outside of git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, check=True, text=True, capture_output=True).stdout.strip()
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None


def peak_memory(device: str) -> dict[str, int]:
    """Highest memory of this process so far, in bytes: resident, and on the card where there is one."""
    peak = {"resident": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    if device == "cuda":
        peak["gpu"] = torch.cuda.max_memory_allocated()
    return peak


def digest(*parts: Any) -> str:
    """SHA-256 (16 hex digits) over values that JSON can hold."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
