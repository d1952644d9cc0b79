"""Run dry runs of several configurations one after the other, and keep one JSON a run.

Run as: python benchmarks/matrix.py --cases fit,full --folder runs/weights --out benchmarks/results --commit SHA
Cases that would not end before the deadline are left out, and named.
"""

import argparse
import json
import math
import random
import shutil
import sys
import tarfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from peer import describe_peer, peer_run

from nbutils.common.paths import ROOT, go_to_root
from nbutils.launching.dry_run import dry_run
from nbutils.launching.dry_run_params import of_goal
from nbutils.launching.dry_run_record import describe
from nbutils.launching.dry_run_settings import DryRun
from nbutils.launching.random_weights import prepare
from nbutils.planning.memory_plan import CARDS, left_gib
from nbutils.planning.shapes import shape_of

FSDP1, FSDP2 = "configs/accelerate/config_fsdp.yaml", "configs/accelerate/config_fsdp2.yaml"
ON_GPU = ("fsdp_offload_params=false",)

OFFLOADED = "configs/accelerate/config_fsdp2_offload.yaml"
HOST = ("embeddings_on_host=true",)
FAST = (*HOST, "compile_layers=true")
TO_HOST = "activation_checkpointing_kwargs={use_reentrant: false, offload: true}"
KEEP_ALL = "activation_checkpointing=false"


def goal(name: str) -> tuple[str, ...]:
    """The settings of a file in configs/goals, as `dry_run` takes them."""
    return tuple(of_goal(ROOT / "configs" / "goals" / f"{name}.yaml"))


@dataclass(frozen=True)
class Case:
    """One dry run: layers, accelerate config, batch a rank, length, and what differs from the defaults."""

    layers: int
    config: str
    batch: int
    length: int
    changes: tuple[str, ...] = ()  # keys of the config's fsdp_config
    settings: tuple[str, ...] = ()  # of the script
    cap: float | None = None  # GiB
    lora_r: int = 16
    ranks: int | None = None  # None: as the config says
    seconds: float = 150  # that it may take
    chats: bool = False  # rows of all lengths, from `write_chats`; else each has exactly `length` tokens
    peer: bool = (
        False  # PEFT's example, from the folder that --peer names; its config file is the script's own
    )


CARD = {"cap": round(left_gib(CARDS[24]), 1)}  # GiB: 21.3
SMALL = {"seconds": 60}
CHATS, CHATS_80 = CARD | {"seconds": 90}, CARD | {"seconds": 190}
GROUPED = (*goal("fastest_2x24gb"), "train_sampling_strategy=group_by_length")
CASES = {
    # Few layers, with a record of what is in memory at the peak: the plan is fitted on these.
    "fit": {
        "fit_fsdp1_offload_b1_l1024": Case(8, FSDP1, 1, 1024, **SMALL),
        "fit_fsdp1_offload_b2_l2048": Case(8, FSDP1, 2, 2048, **SMALL),
        "fit_fsdp2_b1_l1024": Case(8, FSDP2, 1, 1024, **SMALL),
        "fit_fsdp1_b1_l1024": Case(8, FSDP1, 1, 1024, ON_GPU, **SMALL),
    },
    # The recipe under the cap of a 24 GB card.
    "full": {
        "70b_fsdp1_offload_cap_b1_l1024": Case(80, FSDP1, 1, 1024, **CARD),
        "70b_fsdp1_offload_cap_b2_l2048": Case(80, FSDP1, 2, 2048, **CARD, seconds=118),
    },
    # What no fit has seen: the plan is tested on these.
    "held_out": {
        "70b_fsdp1_offload_cap_b1_l2048": Case(80, FSDP1, 1, 2048, **CARD),
        "70b_fsdp2_b4_l2048": Case(80, FSDP2, 4, 2048, seconds=130),
        "70b_fsdp1_cap_b1_l1024": Case(80, FSDP1, 1, 1024, ON_GPU, **CARD),
        "held_out_8_layers_fsdp2_b2_l2048_r64": Case(8, FSDP2, 2, 2048, lora_r=64, **SMALL),
        "held_out_8_layers_fsdp1_b4_l2048": Case(8, FSDP1, 4, 2048, ON_GPU, **SMALL),
    },
    "more": {
        "70b_fsdp2_b1_l1024": Case(80, FSDP2, 1, 1024, seconds=90),
        "70b_fsdp2_b2_l2048_r64": Case(80, FSDP2, 2, 2048, lora_r=64, seconds=90),
        "70b_fsdp1_offload_cap_b1_l512": Case(80, FSDP1, 1, 512, **CARD),
        "70b_fsdp1_offload_cap_b1_l4096": Case(80, FSDP1, 1, 4096, **CARD),
        "70b_fsdp1_offload_cap_b4_l2048": Case(80, FSDP1, 4, 2048, **CARD),
    },
    # Settings beyond the recipe of 2024, few layers. One GPU will do: shards apart, the same is in memory.
    "fit_fast": {
        "fit_fsdp2_b2_l2048": Case(8, FSDP2, 2, 2048, **SMALL),
        "fit_one_gpu_fast_b2_l2048": Case(8, FSDP2, 2, 2048, (), FAST, ranks=1, **SMALL),
        "fit_one_gpu_fast_offload_b1_l32768": Case(
            8, OFFLOADED, 1, 32768, (), (*FAST, TO_HOST), 22.5, ranks=1, seconds=80
        ),
        "fit_one_gpu_fast_keep_b2_l2048": Case(8, FSDP2, 2, 2048, (), (*FAST, KEEP_ALL), ranks=1, **SMALL),
    },
    # From the recipe of 2024 to the fastest settings, one change at a time: under the cap, and without it.
    "each_change": {
        "70b_fsdp1_offload_cap_b2_l2048": Case(80, FSDP1, 2, 2048, **CARD, seconds=118),
        "70b_fsdp2_offload_host_cap_b2_l2048": Case(80, OFFLOADED, 2, 2048, (), HOST, **CARD, seconds=130),
        "70b_fast_cap_b2_l2048": Case(
            80, OFFLOADED, 2, 2048, (), goal("fastest_2x24gb"), **CARD, seconds=130
        ),
        "70b_fast_cap_b4_l2048": Case(
            80, OFFLOADED, 4, 2048, (), goal("fastest_2x24gb"), **CARD, seconds=130
        ),
    },
    "each_change_no_cap": {
        "70b_fsdp2_b2_l2048": Case(80, FSDP2, 2, 2048, seconds=90),
        "70b_fsdp2_fast_b2_l2048": Case(80, FSDP2, 2, 2048, (), FAST, seconds=100),
        "70b_big_cards_b2_l2048": Case(80, FSDP2, 2, 2048, (), goal("fastest_big_cards"), seconds=100),
    },
    # PEFT's example and the recipe of 2024 beside the best of each goal; ends with a table of ratios.
    "compare": {
        "peer_b2_l2048": Case(80, "", 2, 2048, peer=True, seconds=200),  # all NF4 on each GPU first: no cap
        "70b_fsdp1_offload_cap_b2_l2048": Case(80, FSDP1, 2, 2048, **CARD, seconds=118),
        "70b_fast_cap_b4_l2048": Case(80, OFFLOADED, 4, 2048, (), goal("fastest_2x24gb"), **CARD),
        "70b_resident_cap_b1_l2048": Case(80, FSDP2, 1, 2048, (), goal("resident_2x24gb"), **CARD),
        "70b_resident_cap_b2_l2048": Case(80, FSDP2, 2, 2048, (), goal("resident_2x24gb"), **CARD),
        "70b_big_cards_b2_l2048": Case(80, FSDP2, 2, 2048, (), goal("fastest_big_cards"), seconds=100),
        "70b_fewest_bytes_cap_b1_l1024": Case(80, OFFLOADED, 1, 1024, (), goal("fewest_bytes"), **CARD),
        "70b_long_cap_b1_l32768": Case(
            80, OFFLOADED, 1, 32768, (), goal("longest_context"), **CARD, seconds=500
        ),
    },
}


def chats(layers: int, limits: dict) -> dict[str, Case]:
    """Short rows in four ways: packed, as they come, grouped by length, and beside them full rows."""
    short = limits | {"chats": True}
    return {
        f"chats_{layers}_full_rows": Case(layers, OFFLOADED, 4, 2048, (), goal("fastest_2x24gb"), **limits),
        f"chats_{layers}_packed": Case(layers, OFFLOADED, 4, 2048, (), goal("packed_2x24gb"), **short),
        f"chats_{layers}_as_they_come": Case(layers, OFFLOADED, 4, 2048, (), goal("fastest_2x24gb"), **short),
        f"chats_{layers}_grouped": Case(layers, OFFLOADED, 16, 2048, (), GROUPED, **short),
    }


# Long rows with a tiled MLP. On one GPU: --ranks 1, and fewer layers, as host memory allows.
TILED = (*goal("longest_context"), "mlp_tiles=8")
CASES["tiled"] = {
    "70b_tiled_cap_b1_l32768": Case(80, OFFLOADED, 1, 32768, (), TILED, **CARD, seconds=500),
    "70b_tiled_cap_b1_l65536": Case(80, OFFLOADED, 1, 65536, (), TILED, **CARD, seconds=900),
}

# Twelve layers: what each change is worth, and more rows with the inputs of the layers on the host.
HOST_INPUTS = (*goal("fastest_2x24gb"), TO_HOST)
CASES["faster_12"] = {
    "faster_12_b4": Case(12, OFFLOADED, 4, 2048, (), goal("fastest_2x24gb"), **CHATS),
    "faster_12_host_inputs_b4": Case(12, OFFLOADED, 4, 2048, (), HOST_INPUTS, **CHATS),
    "faster_12_host_inputs_b8": Case(12, OFFLOADED, 8, 2048, (), HOST_INPUTS, **CHATS),
    "faster_12_host_inputs_b12": Case(12, OFFLOADED, 12, 2048, (), HOST_INPUTS, **CHATS),
}
# The same with all layers: the goal of 2,800 tokens a second.
CASES["faster_80"] = {
    "70b_fast_cap_b4_l2048": Case(80, OFFLOADED, 4, 2048, (), goal("fastest_2x24gb"), **CHATS_80),
    "70b_host_inputs_cap_b8_l2048": Case(80, OFFLOADED, 8, 2048, (), HOST_INPUTS, **CARD, seconds=230),
    "70b_host_inputs_cap_b12_l2048": Case(80, OFFLOADED, 12, 2048, (), HOST_INPUTS, **CARD, seconds=270),
}
# A user's own rows: chats of 182 tokens on average. Few layers, and all of them.
CASES |= {"chats_12": chats(12, CHATS), "chats_80": chats(80, CHATS_80)}


def write_chats(path: Path, count: int = 3000, mean: float = 182, sigma: float = 0.55) -> Path:
    """Rows whose lengths are lognormal, as those of chats are.

    Args:
        path: of a .jsonl file.
        count: rows.
        mean: tokens a row.
        sigma: of the logarithm of the length.

    Returns:
        `path`. A letter is a token of the random weights' tokenizer; how many there were is read from the run.
    """
    lengths = random.Random(0)
    centre = math.log(mean) - sigma**2 / 2  # of a lognormal whose mean is `mean`
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as out:
        for number in range(count):
            letters = max(4, round(lengths.lognormvariate(centre, sigma)))
            text = " ".join("abcdefgh"[(number + place) % 8] for place in range(letters))
            out.write(json.dumps({"text": text}) + "\n")
    return path


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
    parser.add_argument("--peer", type=Path, help="folder of PEFT's examples/sft; left out: without its case")
    parser.add_argument("--layers", type=int, help="of each case; left out: as the case says")
    parser.add_argument("--ranks", type=int, help="of each case; left out: as the case says")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument(
        "--deadline", type=float, default=1e9, help="seconds from now; no run begins that could not end"
    )
    parser.add_argument("--commit", default="", help="left out: as git says")
    options = parser.parse_args()
    go_to_root()
    started = time.monotonic()
    cases = {}
    for name in options.cases.split(","):
        cases |= CASES.get(name) or {name: next(group[name] for group in CASES.values() if name in group)}
    if options.layers:
        cases = {f"{name}_{options.layers}_layers": case for name, case in cases.items()}
    if options.ranks:
        cases = {
            f"{name}_{options.ranks}_ranks": replace(case, ranks=options.ranks)
            for name, case in cases.items()
        }

    failed = 0
    for name, case in cases.items():
        left = options.deadline - (time.monotonic() - started)
        if left < case.seconds:
            print(f"==== {name}: left out, {left:.0f} s left and up to {case.seconds} needed", flush=True)
            continue
        if case.peer and not options.peer:
            print(f"==== {name}: left out, no --peer", flush=True)
            continue
        shape = replace(shape_of(options.model), layers=options.layers or case.layers)
        weights = prepare(shape, options.folder)
        print(f"==== {name}: {time.monotonic() - started:.0f} s since the start", flush=True)
        run_dir = Path("runs/matrix") / name
        asked = DryRun(
            shape,
            case.config or None,
            batch=case.batch,
            length=case.length,
            steps=options.steps,
            lora_r=case.lora_r,
            cap_gib=case.cap,
            world_size=case.ranks,
            extra=case.settings,
            data=write_chats(Path("runs/matrix/chats.jsonl")) if case.chats else None,
            tokenizer=weights,
            folder=options.folder,
            run_dir=run_dir,
            commit=options.commit,
            changes=case.changes,
            trace=name.startswith("fit"),
            timeout=max(60.0, min(left - 5, 2 * case.seconds)),
        )
        result = peer_run(options.peer, asked) if case.peer else dry_run(asked)
        print(describe_peer(result) if case.peer else describe(result), flush=True)
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
    print(ratios(options.out, list(cases)))
    return 1 if failed else 0


def ratios(folder: Path, names: list[str]) -> str:
    """Tokens a second of each case, and how many times that of the first.

    Args:
        folder: of the results.
        names: the cases; those without a result or without speed are left out.
    """
    files = [folder / f"{name}.json" for name in names]
    runs = {file.stem: json.loads(file.read_text()) for file in files if file.exists()}
    speeds = {name: run["measured"]["tokens_per_second"] for name, run in runs.items()}
    speeds = {name: speed for name, speed in speeds.items() if speed}
    first = next(iter(speeds.values()), 0)
    return "\n".join(
        f"{name:40}{speed:10,.0f} tokens/s{speed / first:8.2f} x" for name, speed in speeds.items()
    )


if __name__ == "__main__":
    sys.exit(main())
