"""A stage script run as users run it: by hand from a command line, and by Snakemake with a log."""

import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"

COPY = '''
"""Stage `copy`."""

from qlora.stage import log, run_stage

import os
import time
from collections.abc import Mapping
from pathlib import Path

from qlora.errors import UserError
from qlora.files import replacing

os.system("echo a library prints this")
print("and this")


def copy(source: list[Path], target: Path, times: int = 1, options: Mapping[str, str] | None = None, wait: float = 0):
    """Write the texts of the sources into `target`.

    A second paragraph, 100% of it.
    """
    log.info("copying")
    if times < 1:
        raise UserError(f"copy: times is {times}; it must be at least 1")
    if times > 9:
        raise ValueError("too many\\nsecond line")
    with replacing(target) as scratch:
        scratch.write_text(repr(options or {}) + times * "".join(path.read_text() for path in source))
        deadline = time.monotonic() + wait
        while time.monotonic() < deadline:
            time.sleep(0.05)  # a signal just before one long sleep would be seen after it


if __name__ == "__main__":
    run_stage(copy)
'''
RULES = """
rule all:
    input: "good.txt", "bad.txt", "worse.txt"
rule good:
    input: source=["a.txt", "b.txt"]
    output: target="good.txt"
    params: options={"x": "y"}, times=2, code="not an argument"
    log: "logs/good.log"
    script: "scripts/copy.py"
rule bad:
    input: source="a.txt"
    output: target="bad.txt"
    params: times=0
    log: "logs/bad.log"
    script: "scripts/copy.py"
rule worse:
    input: source="a.txt"
    output: target="worse.txt"
    params: times=10
    log: "logs/worse.log"
    script: "scripts/copy.py"
rule slow:
    input: source="a.txt"
    output: target="slow.txt"
    params: wait=60
    log: "logs/slow.log"
    script: "scripts/copy.py"
"""


@pytest.fixture
def folder(tmp_path):
    """A working folder with a script, the package that it needs, and two inputs."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "copy.py").write_text(COPY.lstrip())
    shutil.copytree(SCRIPTS / "qlora", tmp_path / "scripts" / "qlora")
    (tmp_path / "a.txt").write_text("A")
    (tmp_path / "b.txt").write_text("B")
    (tmp_path / "Snakefile").write_text(RULES)
    return tmp_path


def by_hand(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "scripts/copy.py", *options], cwd=folder, capture_output=True, text=True, timeout=60
    )


def test_by_hand_with_options(folder):
    done = by_hand(folder, "--source", "[a.txt, b.txt]", "--target", "out.txt", "--times", "2", "--options", "{x: y}")
    assert done.returncode == 0, done.stderr
    assert (folder / "out.txt").read_text() == "{'x': 'y'}ABAB"
    assert "copying" in done.stderr


def test_by_hand_with_one_file_and_defaults(folder):
    assert by_hand(folder, "--source", "a.txt", "--target", "out.txt").returncode == 0
    assert (folder / "out.txt").read_text() == "{}A"


def test_help_shows_the_docstring_and_every_option(folder):
    done = by_hand(folder, "--help")
    assert done.returncode == 0
    assert "Write the texts of the sources into `target`.\n\nA second paragraph, 100% of it." in done.stdout
    for option in ("--source", "--target", "--times", "--options", "--wait"):
        assert option in done.stdout
    assert "int, default 1" in done.stdout


def test_missing_option_is_named(folder):
    done = by_hand(folder, "--source", "a.txt")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith("the following arguments are required: --target")


def test_mistake_of_the_user_is_one_line_without_a_trace(folder):
    done = by_hand(folder, "--source", "a.txt", "--target", "out.txt", "--times", "0")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "copy: error: copy: times is 0; it must be at least 1"
    assert "Traceback" not in done.stderr
    assert not (folder / "out.txt").exists()


def test_mistake_of_ours_shows_the_trace_and_a_line(folder):
    done = by_hand(folder, "--source", "a.txt", "--target", "out.txt", "--times", "10")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert done.stderr.splitlines()[-1] == "copy: error: ValueError: too many"


def wait_for(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_by_hand_is_one_line_and_leaves_no_litter(folder, number):
    command = [sys.executable, "scripts/copy.py", "--source", "a.txt", "--target", "out.txt", "--wait", "60"]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: list(folder.glob(".out.txt.*/out.txt")))
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == -signal.SIGINT
    assert errors.splitlines()[-1] == "copy: error: interrupted; start again to go on"
    assert "Traceback" not in errors
    assert not list(folder.glob("*out.txt*")) + list(folder.glob(".out.txt*"))


def test_a_second_request_to_stop_cuts_off_neither_the_removal_nor_the_line(folder):
    script = folder / "scripts" / "copy.py"
    script.write_text(
        textwrap.dedent("""
        import os, signal, sys
        from qlora import stage
        from pathlib import Path

        class AskedAgain:
            def write(self, text: str) -> int:
                os.kill(os.getpid(), signal.SIGINT)
                return sys.stderr.write(text)

            def flush(self) -> None:
                sys.stderr.flush()

        def stop(target: Path) -> None:
            target.touch()
            try:
                os.kill(os.getpid(), signal.SIGINT)
            finally:
                os.kill(os.getpid(), signal.SIGTERM)
                target.unlink()

        stage.console = AskedAgain()
        stage.run_stage(stop)
        """)
    )
    done = by_hand(folder, "--target", "out.txt")
    assert done.returncode == -signal.SIGINT
    assert done.stderr.split("\n") == ["", "copy: error: interrupted; start again to go on", ""]
    assert not (folder / "out.txt").exists()


def test_the_line_of_an_interrupt_joins_no_line_that_snakemake_has_not_ended(folder):
    """Snakemake writes a message and its end apart, at the same moment."""
    script = folder / "scripts" / "copy.py"
    script.write_text(
        textwrap.dedent("""
        import os, signal, sys
        from qlora import stage

        class Together:
            def write(self, text: str) -> int:
                return sys.stderr.write("Terminating processes" + text + "\\n")

            def flush(self) -> None:
                sys.stderr.flush()

        def stop(target: str) -> None:
            os.kill(os.getpid(), signal.SIGINT)

        stage.console = Together()
        stage.run_stage(stop)
        """)
    )
    done = by_hand(folder, "--target", "out.txt")
    assert done.stderr.splitlines().count("copy: error: interrupted; start again to go on") == 1


def test_full_disk_is_told_by_name(folder):
    script = folder / "scripts" / "copy.py"
    script.write_text(
        textwrap.dedent("""
        from qlora.stage import run_stage
        from pathlib import Path

        def fill(target: Path) -> None:
            with target.open("w") as file:
                file.write("x" * 100_000)

        run_stage(fill)
        """)
    )
    done = by_hand(folder, "--target", "/dev/full")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "copy: error: no space left on the disk that holds the outputs; free some and start again"
    )


def test_what_opens_an_address_is_printed_nowhere(folder):
    script = folder / "scripts" / "copy.py"
    script.write_text(
        textwrap.dedent("""
        from qlora.stage import log, run_stage
        import logging
        import warnings

        ADDRESS = "https://storage.example/object?signature=secret&more=secret"

        def fetch(target: str) -> None:
            logging.getLogger("httpx2").info("HTTP Request: GET %s", ADDRESS)
            log.info("tried %s in vain", ADDRESS)
            warnings.warn(f"{ADDRESS} is slow", stacklevel=1)
            try:
                raise ValueError(f"for url '{ADDRESS}'")
            except ValueError as error:
                logging.getLogger("library").exception("no more")
                raise RuntimeError(f"refused by {ADDRESS} today") from error

        run_stage(fetch)
        """)
    )
    done = by_hand(folder, "--target", "out.txt")
    assert "secret" not in done.stderr
    assert "HTTP Request" not in done.stderr
    assert "tried https://storage.example/object?... in vain" in done.stderr
    assert "UserWarning: https://storage.example/object?... is slow" in done.stderr
    assert re.search(r"library: no more\nTraceback .*\n(?:  .*\n)*ValueError: for url", done.stderr)
    assert "ValueError: for url 'https://storage.example/object?...\n" in done.stderr
    assert done.stderr.endswith("copy: error: RuntimeError: refused by https://storage.example/object?... today\n")


def snakemake(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """Snakemake in a process group of its own, its terminal's output in one pipe."""
    command = [sys.executable, "-m", "snakemake", "--cores", "1", *arguments]
    environment = {**os.environ, "HOME": str(folder), "XDG_CACHE_HOME": str(folder / ".cache")}
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def test_under_snakemake_the_log_takes_what_is_printed_and_the_screen_a_line(folder):
    process = snakemake(folder, "--keep-going", "--quiet", "host")
    screen, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert (folder / "good.txt").read_text() == "{'x': 'y'}ABAB"
    log = (folder / "logs" / "good.log").read_text()
    assert "a library prints this" in log
    assert "and this" in log
    assert "copying" in log
    assert "a library prints this" not in screen
    assert "bad: error: copy: times is 0; it must be at least 1" in screen.splitlines()
    assert "worse: error: ValueError: too many (all of it in logs/worse.log)" in screen.splitlines()
    for rule in ("bad", "worse"):
        assert "Traceback" in (folder / "logs" / f"{rule}.log").read_text()
        assert not (folder / f"{rule}.txt").exists()


def test_interrupt_under_snakemake_is_one_line_and_leaves_no_litter(folder):
    process = snakemake(folder, "slow.txt")
    wait_for(lambda: list(folder.glob(".slow.txt.*/slow.txt")))
    os.killpg(process.pid, signal.SIGINT)
    screen, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert screen.splitlines().count("slow: error: interrupted; start again to go on") == 1
    assert not list(folder.glob("slow.txt*")) + list(folder.glob(".slow.txt*"))
