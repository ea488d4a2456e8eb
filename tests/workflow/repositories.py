"""A git repository with DVC on the reduced configuration, and its commands as a user would type them."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import yaml
from snakemake.utils import update_config
from workspaces import REDUCED, ROOT, Workspace

SOMEBODY = {f"GIT_{role}_{key}": "tester" for role in ("AUTHOR", "COMMITTER") for key in ("NAME", "EMAIL")}
PLAIN = {"NO_COLOR": "1", "GIT_CONFIG_GLOBAL": os.devnull, "DVC_NO_ANALYTICS": "1"}
MORE = (".gitignore", ".dvcignore", "dvc.yaml", "requirements.lock", "pyproject.toml")
ADAPTER = "results/runs/llama/adapter/adapter_model.safetensors"
# Two runs of one model, each with a recipe of its own.
RUNS = """
recipes:
  brief: {batch_size: 16, batching: padded, max_steps: 2, log_steps: 1, eval_steps: 1, save_steps: 1}
runs:
  - {name: llama, model: tiny-llama, mixture: examples, recipe: tiny, seed: 1}
  - {name: brief, model: tiny-llama, mixture: examples, recipe: brief, seed: 2}
"""


class Repository(Workspace):
    """A git repository with DVC, in which the reduced configuration is the default."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        super().__init__(folder)
        for name in MORE:
            shutil.copy(ROOT / name, folder / name)
        shutil.copytree(ROOT / "tools", folder / "tools", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copytree(ROOT / ".dvc", folder / ".dvc", ignore=shutil.ignore_patterns("cache", "tmp", "*.local"))
        config = yaml.safe_load(self.read("config/config.yaml"))
        for text in (REDUCED, RUNS):
            update_config(config, yaml.safe_load(text))
        self.write_config(config)
        self.run("git", "init", "--quiet")
        self.prepare()
        self.commit("the configuration")

    @classmethod
    def at(cls, folder: Path) -> "Repository":
        """The repository that is in a folder already."""
        repository = cls.__new__(cls)
        repository.folder = folder
        return repository

    def prepare(self) -> None:
        """Give a fresh folder the environment, which git does not see."""
        (self.folder / ".venv").symlink_to(sys.prefix)
        self.write(".git/info/exclude", ".venv\n")

    def clone(self, folder: Path, remote: Path | None = None) -> "Repository":
        """A clone, as another user makes it, that knows of a DVC remote or of none."""
        self.run("git", "clone", "--quiet", str(self.folder), str(folder))
        clone = self.at(folder)
        clone.prepare()
        if remote:
            clone.set_remote(str(remote))
        return clone

    def copy(self, folder: Path) -> "Repository":
        """The folder moved elsewhere, times of files kept."""
        shutil.copytree(self.folder, folder, symlinks=True)
        return self.at(folder)

    def set_remote(self, url: str) -> None:
        """Make `url` the DVC remote of this folder, not of the commit."""
        self.write(".dvc/config.local", f"[core]\n    remote = far\n['remote \"far\"']\n    url = {url}\n")

    def config(self) -> dict:
        return yaml.safe_load(self.read("config/config.yaml"))

    def write_config(self, config: dict) -> None:
        self.write("config/config.yaml", yaml.safe_dump(config, sort_keys=False))

    def run(self, *command: str, expect: int = 0, **options: object) -> str:
        """What a command prints, on both streams."""
        done = subprocess.run(
            command,
            cwd=self.folder,
            env={**os.environ, **SOMEBODY, **PLAIN},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=900,
            check=False,
            **options,
        )
        assert done.returncode == expect, done.stdout[-6000:]
        return done.stdout

    def dvc(self, *arguments: str) -> str:
        return self.run(sys.executable, "-m", "dvc", *arguments)

    def tool(self, name: str, *arguments: str, expect: int = 0, **options: object) -> str:
        """The one line that `make record` or `make restore` prints."""
        shown = self.run(sys.executable, f"tools/{name}.py", *arguments, expect=expect, **options)
        assert shown.count("\n") == 1, shown
        return shown.strip()

    def commit(self, message: str) -> str:
        """Commit all that git sees; the commit's hash."""
        self.run("git", "add", "--all")
        self.run("git", "commit", "--quiet", "--message", message)
        return self.run("git", "rev-parse", "HEAD").strip()

    def jobs(self, *arguments: str) -> set[str]:
        """What a dry run of the default says it would do, a line a job."""
        shown = self.snakemake("-n", *arguments, configs=()).stdout
        assert "Job " in shown or "Nothing to be done" in shown, shown
        return {line for line in re.findall(r"^Job \d+: (.*)$", shown, re.MULTILINE) if not line.startswith("all done")}

    def bytes_of(self, *names: str) -> dict[str, bytes]:
        """File below `results` → its bytes; of all outputs that are recorded, or those below the names."""
        below = names or ("sources", "preflight", "datasets", "mixtures", "tokens", "runs", "predictions", "metrics")
        folders = [self.folder / "results" / name for name in below]
        files = [file for folder in folders for file in ([folder] if folder.is_file() else folder.rglob("*"))]
        files += self.folder.glob("results/*.csv") if not names else []
        return {file.relative_to(self.folder).as_posix(): file.read_bytes() for file in files if file.is_file()}


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
