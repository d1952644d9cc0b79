"""How a step's seconds grow as the links get slower, and the estimate of lesson 06 beside it.

Run as: python benchmarks/slow_links.py --folder runs/weights --out benchmarks/results --commit SHA

One launch a configuration: some steps as the machine is, then as many at each speed (`nbutils.launching.slow_links`).
"""

import argparse
import itertools
import json
import os
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nbutils.common.paths import ROOT, go_to_root
from nbutils.common.provenance import provenance
from nbutils.launching.dry_run import dry_run
from nbutils.launching.dry_run_record import describe
from nbutils.launching.dry_run_settings import DryRun
from nbutils.launching.random_weights import prepare
from nbutils.planning.shapes import shape_of

FSDP1 = "configs/accelerate/config_fsdp.yaml"
FSDP2, OFFLOADED = "configs/accelerate/config_fsdp2.yaml", "configs/accelerate/config_fsdp2_offload.yaml"
CASES = {  # accelerate config, rows a rank, goal file of the script's settings
    "recipe_of_2024": (FSDP1, 2, None),
    "fastest": (OFFLOADED, 4, "fastest_2x24gb"),
    "resident": (FSDP2, 2, "resident_2x24gb"),
}
WHAT = (
    "seconds of a step as the links get slower: incoming bytes wait as long as they would take at `link_gbs`"
)
COMMAND = "python benchmarks/slow_links.py --layers 12 --steps 5 --cap 21.3"
WARM_UP = 3  # steps before the first that counts: compiled layers, first gathers


def settings(goal: str | None) -> tuple[str, ...]:
    """The settings of a file in configs/goals, as a dry run takes them."""
    if goal is None:
        return ()
    found = yaml.safe_load((ROOT / f"configs/goals/{goal}.yaml").read_text(encoding="utf-8"))
    return tuple(f"{key}={json.dumps(value)}" for key, value in found.items())


def by_speed(run_dir: Path, speeds: list[float], steps: int) -> list[dict]:
    """Seconds and incoming bytes of a step at each speed: the median of its steps without the first.

    Args:
        run_dir: with `ranks/`.
        speeds: GB/s, 0 as the machine is.
        steps: optimizer steps at each speed.
    """
    lines = [json.loads(line) for line in (run_dir / "ranks/rank0.jsonl").read_text().splitlines()]
    marks = [line for line in lines if line["phase"] == "step"]
    rows = []
    for place, speed in enumerate(speeds):
        first = place * steps + (WARM_UP if place == 0 else 1)
        of_speed = list(itertools.pairwise(marks))[first : (place + 1) * steps - 1]
        rows.append(
            {
                "link_gbs": speed,
                "step_seconds": statistics.median(b["time"] - a["time"] for a, b in of_speed),
                "incoming_bytes": statistics.median(b["incoming"] - a["incoming"] for a, b in of_speed),
                "steps": len(of_speed),
            }
        )
    return rows


def measure(name: str, options: argparse.Namespace, speeds: list[float]) -> dict:
    """One configuration at each speed; the record of its dry run, with `by_speed`."""
    config, batch, goal = CASES[name]
    shape = replace(shape_of("llama31_70b"), layers=options.layers)
    run_dir = Path("runs/slow_links") / name
    asked = DryRun(
        shape, config, batch=batch, length=2048, steps=options.steps * len(speeds), cap_gib=options.cap,
        extra=settings(goal), folder=options.folder, run_dir=run_dir, commit=options.commit, timeout=400,
    )  # fmt: skip
    result = dry_run(asked)
    print(describe(result), flush=True)
    if result["outcome"] != "ok":
        print((run_dir / "train.log").read_text()[-3000:], flush=True)
        return {"outcome": result["outcome"]}
    return {
        "command": result["command"],
        "config": result["config"],
        "layers": options.layers,
        "by_speed": by_speed(run_dir, speeds, options.steps),
    }


def main() -> int:
    """Run the cases and print the table last."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument(
        "--speeds", default="0,25,12,6", help="GB/s, one after the other; 0 is the machine as it is"
    )
    parser.add_argument("--steps", type=int, default=6, help="at each speed")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--cap", type=float, default=21.3)
    parser.add_argument("--folder", type=Path, help="where the random weights are kept")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--commit", default="", help="left out: as git says")
    options = parser.parse_args()
    go_to_root()
    os.environ |= {"NBUTILS_LINK_GBS": options.speeds, "NBUTILS_LINK_STEPS": str(options.steps)}
    prepare(replace(shape_of("llama31_70b"), layers=options.layers), options.folder)
    speeds, results = [float(speed) for speed in options.speeds.split(",")], {}
    for name in options.cases.split(","):
        results[name] = measure(name, options, speeds)
        options.out.mkdir(parents=True, exist_ok=True)
        whole = {"what": WHAT, **provenance(COMMAND, options.commit), "cases": results}
        (options.out / "slow_links.json").write_text(json.dumps(whole, indent=1) + "\n")
    for name, result in results.items():
        for row in result.get("by_speed", []):
            print(f"{name:16}{row['link_gbs']:6.0f} GB/s{row['step_seconds']:8.2f} s a step"
                  f"{row['incoming_bytes'] / 1e9:8.2f} GB in")  # fmt: skip
    return int(any("by_speed" not in result for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
