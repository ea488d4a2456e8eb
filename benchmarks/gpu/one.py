"""Measure one way to train on one GPU, in this process alone, and print a line of JSON.

    python benchmarks/gpu/one.py FOLDER WAY --rows mixed --batch 4 [--checkpointing]

FOLDER is what shapes.py wrote. Steps before `--warm-up` are not counted. Tokens are those that are no padding.
"""

import argparse
import json
import logging
import sys
from pathlib import Path

WAYS = (
    "ours", "ours-peft", "ours-eager", "ours-kept", "ours-fp8", "ours-loop", "trl-packed", "trl", "notebook", "unsloth"
)  # fmt: skip
REPEATS = 3  # of a process
SEVEN = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"


def figures(given: argparse.Namespace) -> dict[str, float | list[float]]:
    """Measure a way."""
    from clock import Clock

    clock = Clock(given.warm_up, given.steps, REPEATS)
    if given.way.startswith("ours"):
        sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
        from ours import ours

        return ours(given, clock)
    import peers

    return getattr(peers, given.way.replace("-", "_"))(given, clock)


def main() -> None:
    """Measure, and print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("way", choices=WAYS)
    parser.add_argument("--rows", choices=("full", "mixed"), default="mixed")
    parser.add_argument("--batching", choices=("packed", "grouped", "padded"), default="packed", help="of ours")
    parser.add_argument("--batch", type=int, default=4, help="rows, or packed rows of 2,048 tokens, a step")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--optimizer", default="adamw_torch_fused")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--alpha", type=int, default=16)
    parser.add_argument("--targets", default=SEVEN)
    parser.add_argument("--warm-up", type=int, default=6, help="steps")
    parser.add_argument("--steps", type=int, default=24, help="in all; those after the warm-up are three repeats")
    given = parser.parse_args()
    if given.way == "ours-loop" and given.checkpointing:
        parser.error("ours-loop: it does not know --checkpointing; leave that out, or measure ours")
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    asked = {name: str(value) for name, value in vars(given).items() if name != "folder"}
    print(json.dumps({**asked, **figures(given)}))


if __name__ == "__main__":
    main()
