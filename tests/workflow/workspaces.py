"""A copy of the repository in a temporary folder, and Snakemake run in it on a reduced configuration."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
COPIED = ("Snakefile", "rules", "scripts", "config", "envs", "profiles", "report", "data")
# Small enough to end in a minute; every stage, rule and script is the default's own.
REDUCED = """
models:
  tiny-llama: {source: {build: {steps: 30, copies: 0}}}
  tiny-mistral: {source: {build: {steps: 30, copies: 0}}}
datasets:
  sql: {limit: {train: 120, validation: 12, test: 12}}
  label: {limit: {train: 120, validation: 12, test: 12}}
  title: {limit: {train: 120, validation: 12, test: 12}}
recipes:
  tiny: {max_steps: 12, log_steps: 4, eval_steps: 6, save_steps: 4}
suites:
  held-out: {bootstrap: {samples: 100}}
"""


class Workspace:
    """A folder with the repository's files, in which Snakemake is run as a user would."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, folder / name)
        self.write("reduced.yaml", REDUCED)

    def write(self, name: str, text: str) -> Path:
        """Write a file of the folder."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    def read(self, name: str) -> str:
        """The text of a file of the folder."""
        return (self.folder / name).read_text(encoding="utf-8")

    def command(self, *arguments: str, configs: tuple[str, ...] = ("reduced.yaml",)) -> list[str]:
        """The command line of Snakemake in this folder."""
        overlays = ["--configfile", *configs] if configs else []
        return [sys.executable, "-m", "snakemake", *overlays, *arguments]

    def snakemake(
        self, *arguments: str, configs: tuple[str, ...] = ("reduced.yaml",), expect: int = 0
    ) -> subprocess.CompletedProcess[str]:
        """Run Snakemake; its output, both streams together, stands in `stdout`."""
        done = subprocess.run(
            self.command(*arguments, configs=configs),
            cwd=self.folder,
            env={**os.environ, "NO_COLOR": "1"},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=900,
            check=False,
        )
        assert done.returncode == expect, done.stdout[-6000:]
        return done

    def planned(self, *arguments: str, configs: tuple[str, ...] = ("reduced.yaml",)) -> dict[str, int]:
        """Rule → number of jobs of a dry run."""
        lines = self.snakemake("-n", *arguments, configs=configs).stdout.splitlines()
        if "Job stats:" not in lines:
            assert any("Nothing to be done" in line for line in lines), "\n".join(lines)
            return {}
        table = lines[lines.index("Job stats:") + 3 :]
        rows = [line.split() for line in table[: table.index("")]]
        return {rule: int(count) for rule, count in rows if rule != "total"}
