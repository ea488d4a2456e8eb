"""Write results/seeds.csv, by which a published difference is judged, from the experiment `seeds`: `make seeds`."""

import sys

from results_lock import ROOT  # makes the modules below importable

# isort: split
from claims import SPREAD_COLUMNS, spread_over_seeds
from qlora.results import read_table, write_table

COMPARISON = ROOT / "results/experiments/seeds/comparison.csv"
SPREAD = ROOT / "results/seeds.csv"


def main() -> int:
    """Write the table; 1 where the experiment has no results."""
    if not COMPARISON.exists():
        print("seeds: error: no results of the experiment; `make seeds` computes them", file=sys.stderr)
        return 1
    rows = list(spread_over_seeds(read_table(COMPARISON)))
    write_table(SPREAD, SPREAD_COLUMNS, rows)
    print(f"Written: {len(rows)} differences to {SPREAD.relative_to(ROOT)}; next: git add {SPREAD.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
