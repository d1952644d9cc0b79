"""How much of an adapter's change is left after a merge and NF4, over the size of the change: lesson 05's figure.

Run as: python benchmarks/change_kept.py --out benchmarks/results/change_kept.json   (a CPU; two minutes)

Gaussian weights and a random change of rank 16, each point three times with other random numbers.
"""

import argparse
import json
from pathlib import Path

from nbutils.adapters.change_kept import INTO_BF16, INTO_NF4, SIZES, change_kept
from nbutils.common.provenance import provenance

RANK, WIDTH, SEEDS = 16, 1024, (0, 1, 2)


def point(size: float) -> dict:
    """Mean and extremes of the share that is left at one size."""
    tries = [change_kept(size, RANK, WIDTH, seed) for seed in SEEDS]
    row = {"size": size}
    for way in (INTO_BF16, INTO_NF4):
        kept = [found[way] for found in tries]
        row[way] = {"mean": sum(kept) / len(kept), "least": min(kept), "most": max(kept)}
    return row


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = []
    for size in SIZES:
        rows.append(point(size))
        print(rows[-1], flush=True)
    result = {
        "what": "Share of a rank-16 change of Gaussian weights that is left after merging and NF4",
        **provenance("python benchmarks/change_kept.py --out FILE"),
        "rank": RANK,
        "width": WIDTH,
        "seeds": SEEDS,
        "rows": rows,
    }
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
