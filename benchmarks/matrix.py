"""Run dry runs of several configurations one after the other, and keep one JSON a run.

Run as: python benchmarks/matrix.py --cases fit,full --folder /tmp/weights --out benchmarks/results --commit SHA
Cases that would not end before the deadline are left out, and named.
"""

import argparse
import json
import shutil
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nbutils.course import go_to_root
from nbutils.dryrun import describe, dry_run, prepare
from nbutils.memory import shape_of

FSDP1, FSDP2 = "configs/accelerate/config_fsdp.yaml", "configs/accelerate/config_fsdp2.yaml"
ON_GPU = ["fsdp_offload_params=false"]

# name: (layers, config, changes, cap in GiB, batch, length, rank of the adapter, seconds it may take)
CASES = {
    # Few layers, with a record of what is in memory at the peak: the plan is fitted on these.
    "fit": {
        "fit_fsdp1_offload_b1_l1024": (8, FSDP1, [], None, 1, 1024, 16, 60),
        "fit_fsdp1_offload_b2_l2048": (8, FSDP1, [], None, 2, 2048, 16, 60),
        "fit_fsdp2_b1_l1024": (8, FSDP2, [], None, 1, 1024, 16, 60),
        "fit_fsdp1_b1_l1024": (8, FSDP1, ON_GPU, None, 1, 1024, 16, 60),
    },
    # The recipe under the cap of a 24 GB card.
    "full": {
        "70b_fsdp1_offload_cap_b1_l1024": (80, FSDP1, [], 22.5, 1, 1024, 16, 150),
        "70b_fsdp1_offload_cap_b2_l2048": (80, FSDP1, [], 22.5, 2, 2048, 16, 150),
        "70b_fsdp2_b4_l2048": (80, FSDP2, [], None, 4, 2048, 16, 150),
        "70b_fsdp1_offload_cap_b1_l2048": (80, FSDP1, [], 22.5, 1, 2048, 16, 150),
        "70b_fsdp1_cap_b1_l1024": (80, FSDP1, ON_GPU, 22.5, 1, 1024, 16, 110),
    },
    # What no fit has seen: the plan is tested on these.
    "held_out": {
        "70b_fsdp1_offload_cap_b1_l2048": (80, FSDP1, [], 22.5, 1, 2048, 16, 150),
        "70b_fsdp2_b4_l2048": (80, FSDP2, [], None, 4, 2048, 16, 130),
        "70b_fsdp1_cap_b1_l1024": (80, FSDP1, ON_GPU, 22.5, 1, 1024, 16, 90),
        "held_out_8_layers_fsdp2_b2_l2048_r64": (8, FSDP2, [], None, 2, 2048, 64, 45),
        "held_out_8_layers_fsdp1_b4_l2048": (8, FSDP1, ON_GPU, None, 4, 2048, 16, 45),
    },
    "more": {
        "70b_fsdp2_b1_l1024": (80, FSDP2, [], None, 1, 1024, 16, 120),
        "70b_fsdp2_b2_l2048_r64": (80, FSDP2, [], None, 2, 2048, 64, 120),
        "70b_fsdp1_offload_cap_b1_l512": (80, FSDP1, [], 22.5, 1, 512, 16, 130),
        "70b_fsdp1_offload_cap_b1_l4096": (80, FSDP1, [], 22.5, 1, 4096, 16, 150),
        "70b_fsdp1_offload_cap_b4_l2048": (80, FSDP1, [], 22.5, 4, 2048, 16, 150),
        "70b_fsdp1_offload_cap_b1_l1024_r64": (80, FSDP1, [], 22.5, 1, 1024, 64, 140),
        "70b_fsdp1_b1_l2048": (80, FSDP1, ON_GPU, None, 1, 2048, 16, 120),
    },
}


def main() -> int:
    """Run the chosen cases."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", default="full", help="groups or single cases, separated by commas")
    parser.add_argument("--model", default="llama31_70b")
    parser.add_argument("--folder", type=Path, help="where the random weights are kept")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument(
        "--tar", type=Path, help="also keep everything in one archive, renewed after each run"
    )
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument(
        "--deadline", type=float, default=1e9, help="seconds from now; no run begins that could not end"
    )
    parser.add_argument("--commit", default="")
    options = parser.parse_args()
    go_to_root()
    started = time.monotonic()
    cases = {}
    for name in options.cases.split(","):
        cases |= CASES.get(name) or {name: next(group[name] for group in CASES.values() if name in group)}

    failed = 0
    for name, (layers, config, changes, cap, batch, length, lora_r, seconds) in cases.items():
        left = options.deadline - (time.monotonic() - started)
        if left < seconds:
            print(f"==== {name}: left out, {left:.0f} s left and up to {seconds} needed", flush=True)
            continue
        shape = replace(shape_of(options.model), layers=layers)
        prepare(shape, options.folder)
        print(f"==== {name}: {time.monotonic() - started:.0f} s since the start", flush=True)
        run_dir = Path("runs/matrix") / name
        result = dry_run(
            shape,
            config,
            batch=batch,
            length=length,
            steps=options.steps,
            lora_r=lora_r,
            cap_gib=cap,
            folder=options.folder,
            run_dir=run_dir,
            commit=options.commit,
            changes=changes,
            trace=name.startswith("fit"),
            timeout=max(60.0, min(left - 5, 2 * seconds)),
        )
        print(describe(result), flush=True)
        if result["outcome"] == "failed":
            failed += 1
            print((run_dir / "train.log").read_text()[-3000:], flush=True)
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
        for peak in (run_dir / "ranks").glob("peak_rank0.json"):
            (options.out / "peaks").mkdir(exist_ok=True)
            shutil.copy(peak, options.out / "peaks" / f"{name}.json")
        shutil.copy(run_dir / "train.log", options.out / f"{name}.log")
        if options.tar:
            with tarfile.open(options.tar, "w:gz") as archive:
                archive.add(options.out, arcname=options.out.name)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
