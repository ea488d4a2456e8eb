"""How a stage script runs: under Snakemake, with the rule's log, or by hand from a command line.

Importing this module under Snakemake sends all that libraries print to the rule's log, so a script imports it first.
"""

import argparse
import errno
import inspect
import logging
import os
import re
import shutil
import signal
import sys
import time
import traceback
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from qlora.errors import UserError

PROGRESS_SECONDS = 10.0  # between two lines of progress on a terminal
STOP_REQUESTS = (signal.SIGINT, signal.SIGTERM)

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # forking after its threads exist prints a warning a call
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_DISABLE_XET", "1")  # plain HTTP is what the tests cover; docs/hub.md turns Xet on

log = logging.getLogger("qlora")


def _job() -> Any:
    """The object that Snakemake puts into the script that it runs, or None when run by hand."""
    return getattr(sys.modules["__main__"], "snakemake", None)


def _open_console() -> TextIO:
    """Keep the terminal's stderr, and send file descriptors 1 and 2 to the rule's log when there is one."""
    job = _job()
    if job is None or not job.log:
        return sys.stderr
    console = os.fdopen(os.dup(2), "w", buffering=1)
    log_path = Path(str(job.log[0]))
    log_path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    return console


def _without_queries(text: str) -> str:
    """`text` with addresses cut at their `?`: what follows opens the storage of private files."""
    return re.sub(r"(https?://[^\s?]+\?)\S+", r"\1...", text)


class _Record(logging.LogRecord):
    """What any library logs, and the trace with it, without the queries of addresses."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        if self.exc_info:
            self.exc_text = _without_queries("".join(traceback.format_exception(*self.exc_info)).rstrip())

    def getMessage(self) -> str:  # noqa: N802 the name that the handlers call
        return _without_queries(super().getMessage())


def _fail(kind: type[BaseException], error: BaseException, trace: types.TracebackType | None) -> None:
    """Say in one line on the terminal what went wrong; the whole trace goes to the log."""
    job = _job()
    what = job.rule if job else Path(sys.argv[0]).stem
    if isinstance(error, UserError):
        line = str(error)
    elif isinstance(error, KeyboardInterrupt):
        line = "interrupted; start again to go on"
    elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        line = f"no space left on the disk that holds {error.filename or 'the outputs'}; free some and start again"
    else:
        line = f"{kind.__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        line += f" (all of it in {job.log[0]})" if job and job.log else ""
    if job or not isinstance(error, UserError | KeyboardInterrupt):
        sys.stderr.write(_without_queries("".join(traceback.format_exception(kind, error, trace))))
    # Ctrl-C shows as ^C, and Snakemake then writes a line and its end apart: without a break ours could join either.
    start = "\n" if isinstance(error, KeyboardInterrupt) else ""
    console.write(f"{start}{what}: error: {_without_queries(line)}\n")
    console.flush()


def _interrupt(_number: int, _frame: types.FrameType | None) -> None:
    """Turn the first request to stop, Ctrl-C or Snakemake's, into an exception, so that half-written files go.

    Both arrive on a Ctrl-C under Snakemake: the second must not cut off the removal, or the line that says so.
    """
    for request in STOP_REQUESTS:
        signal.signal(request, _already_stopping)
    raise KeyboardInterrupt


def _already_stopping(_number: int, _frame: types.FrameType | None) -> None:
    """Nothing more to do; a Python function, since Python complains of a pending signal that is now ignored."""


console = _open_console()
sys.excepthook = _fail
for _request in STOP_REQUESTS:
    signal.signal(_request, _interrupt)
logging.setLogRecordFactory(_Record)
logging.captureWarnings(True)
logging.getLogger("httpx2").setLevel(logging.WARNING)  # it logs a line for each request
logging.basicConfig(
    level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S", stream=sys.stderr
)


class Progress:
    """A line on the terminal every ten seconds of long work; nothing where there is no terminal."""

    def __init__(self, total: int, what: str, unit: str) -> None:
        self.total, self.what, self.unit = total, what, unit
        self.started = self.printed = time.monotonic()

    def update(self, done: int, note: str = "") -> None:
        """Tell that `done` of the units are finished."""
        now = time.monotonic()
        if not console.isatty() or now - self.printed < PROGRESS_SECONDS or not done:
            return
        self.printed = now
        left = (now - self.started) / done * (self.total - done)
        print(
            f"  {self.what}: {done:,} of {self.total:,} {self.unit}, {left:.0f} s left{note}", file=console, flush=True
        )


def run_stage(function: Callable[..., object]) -> None:
    """Call a stage's function with the job's inputs, outputs, params and threads, or with command line options."""
    job = _job()
    arguments = _arguments_of_job(function, job) if job else _arguments_of_command_line(function)
    function(**arguments)


def _parameters(function: Callable[..., object]) -> dict[str, tuple[Any, Any]]:
    """Name → (type, default) of a function's parameters; the default is `inspect.Parameter.empty` where required."""
    hints = typing.get_type_hints(function)
    return {name: (hints[name], item.default) for name, item in inspect.signature(function).parameters.items()}


def _arguments_of_job(function: Callable[..., object], job: Any) -> dict[str, Any]:
    """The job's named inputs, outputs and params that the function takes, paths as Path."""
    given = {**dict(job.input.items()), **dict(job.output.items()), **dict(job.params.items())}
    return {
        name: _as_paths(given[name], hint)
        for name, (hint, default) in _parameters(function).items()
        if name in given or default is inspect.Parameter.empty
    }


def _as_paths(value: Any, hint: Any) -> Any:
    """`value` as the annotation says: Path, or a list of Path (Snakemake gives a plain string for one file)."""
    if hint == list[Path]:
        return [Path(str(item)) for item in ([value] if isinstance(value, str) else value)]
    if hint in (Path, Path | None):
        return Path(str(value)) if value else None
    return value


def _arguments_of_command_line(function: Callable[..., object]) -> dict[str, Any]:
    """Parse `--name value` options made from the function's signature; mappings and lists are given as YAML."""
    import yaml  # not needed under Snakemake

    summary = inspect.getdoc(function) or ""
    parser = argparse.ArgumentParser(
        description=summary, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    width = shutil.get_terminal_size().columns
    for name, (hint, default) in _parameters(function).items():
        required = default is inspect.Parameter.empty
        shown = getattr(hint, "__name__", str(hint)) if not typing.get_args(hint) else str(hint)
        note = shown if required else f"{shown}, default {default}"
        parser.add_argument(f"--{name.replace('_', '-')}", required=required, default=default, help=note[:width])
    given = vars(parser.parse_args())
    parsed = {}
    for name, (hint, default) in _parameters(function).items():
        value = given[name]
        if isinstance(value, str) and value is not default and hint is not str:
            value = value if hint in (Path, Path | None) else yaml.safe_load(value)
        parsed[name] = _as_paths(value, hint)
    return parsed
