"""Merge the adapter of a finished job onto its base, measure time and memory, and ask the run and the merged model.

    python benchmarks/gpu/merge.py /dev/shm/qlora-jobs/llama2-sql-mix-ours --base /dev/shm/qlora-bases/llama-2-7b/model

The job is one of experiments.py, or what drawn.py makes. Merging and chat are the workflow's own scripts, each in a
process of its own; memory is looked at 100 times a second. `anonymous`: what the process itself holds; the rest of
`resident` are pages of files, which can be given up at any time, and with a CUDA device those of its libraries.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from experiments_table import EXPERIMENTS_RESULTS
from run import HERE, Line, gpu, software

SCRIPTS = Path(__file__).parents[2] / "scripts"
KINDS = {"anonymous GiB": "RssAnon", "resident GiB": "VmRSS"}
CHATS = ("chat in 4 bits", "chat merged")
PROMPT = "How many customers are there in each city?"


def watched(arguments: Sequence[str], log: Path) -> Line:
    """Seconds of a process, and the most of each kind of memory that it held; {"failed": why} where it fails."""
    started, peaks = time.monotonic(), dict.fromkeys(KINDS, 0.0)
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(arguments, stdout=file, stderr=subprocess.STDOUT)
        while process.poll() is None:
            status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
            for kind, field in KINDS.items():
                found = re.search(rf"^{field}:\s+(\d+) kB", status, re.MULTILINE)  # none once it has ended
                peaks[kind] = max(peaks[kind], int(found[1]) / 2**20 if found else 0.0)
            time.sleep(0.01)
    figures: Line = {"seconds": round(time.monotonic() - started, 1)}
    if process.returncode:
        last = log.read_text(encoding="utf-8").splitlines()[-1:]
        return {"failed": f"status {process.returncode}: {''.join(last)[:300]}", **figures}
    return {**figures, **{kind: round(peak, 2) for kind, peak in peaks.items()}}


def merge(job: Path, base: Path, device: str) -> Line:
    """Merge as the rule `merge_run` does, into the job's folder `merged`."""
    settings = json.loads((job / "run.json").read_text(encoding="utf-8"))["settings"]
    paths = {"model": base, "adapter": job / "adapter", "merged": job / "merged"}
    options = {**paths, "quantization": json.dumps(settings["quantization"]), "attention": "sdpa", "device": device}
    given = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    found = watched([sys.executable, str(SCRIPTS / "merge_adapter.py"), *given], job / "merge.log")
    if "failed" in found:
        return found
    size = sum(file.stat().st_size for file in (job / "merged").glob("*.safetensors"))
    drift = json.loads((job / "merged/merge.json").read_text(encoding="utf-8"))["drift"]
    return {**found, "merged GiB": round(size / 2**30, 2), "drift": drift}


def chat(job: Path, base: Path, device: str, merged: bool) -> Line:
    """The answer to one prompt, and how long it took from the start of the process."""
    started = time.monotonic()
    answered = subprocess.run(
        [
            *(sys.executable, str(SCRIPTS / "chat.py"), str(job), "--prompt", PROMPT, "--max-new-tokens", "32"),
            *("--device", device, *(["--merged"] if merged else ["--base", str(base)])),
        ],
        cwd=SCRIPTS.parent,
        capture_output=True,
        text=True,
    )
    found = {"failed": answered.stderr[-300:]} if answered.returncode else {"answer": answered.stdout[:200]}
    return {**found, "seconds": round(time.monotonic() - started, 1)}


def main() -> None:
    """Merge and chat, and add a line of JSON to the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", type=Path)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--experiment", default="llama2-sql-mix", help="the experiment that the job belongs to")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--chats", nargs="*", choices=CHATS, default=CHATS, help="that are asked, both where not given")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", HERE)) / EXPERIMENTS_RESULTS.name)
    given = parser.parse_args()
    job, base = given.job.resolve(), given.base.resolve()
    record = json.loads((job / "run.json").read_text(encoding="utf-8"))
    found = merge(job, base, given.device)
    print(json.dumps(found), flush=True)
    for kind in () if "failed" in found else given.chats:
        found[kind] = chat(job, base, given.device, kind == "chat merged")
        print(json.dumps({kind: found[kind]}), flush=True)
    run = {"run": record["name"], "steps": record["steps"]}
    about = {"table": "merge", "experiment": given.experiment, **run, "way": given.device}
    with given.out.open("a", encoding="utf-8") as file:
        file.write(json.dumps({**about, **found, **software(), "gpu after": gpu()}) + "\n")


if __name__ == "__main__":
    main()
