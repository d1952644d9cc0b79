"""What cannot be shown without GPUs: how a launch over NCCL ends when something breaks, and with which words.

Run as: python benchmarks/gpu_faults.py --model FOLDER --big FOLDER --commit SHA --out FILE

A case is kept with the commit that it ran at; cases of FILE that do not run now stay in it.

Each case is a real launch of the real script. Three cases are of mistakes that the script does not make or refuses
before it loads; for them a copy of it is changed, so that the library itself is heard, or our check of it.
"""

import argparse
import json
import os
import re
import sys
import tempfile
import time
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nbutils.adapters.checkpoint_folder import newest_complete
from nbutils.common.paths import ROOT, go_to_root
from nbutils.common.provenance import provenance
from nbutils.launching.launch import LaunchFailed, launch
from nbutils.launching.script_file import write_script

FSDP1, FSDP2 = "configs/accelerate/config_fsdp.yaml", "configs/accelerate/config_fsdp2.yaml"
OFFLOADED = "configs/accelerate/config_fsdp2_offload.yaml"
SETTINGS = {
    "dataset": "data/instructions/train.jsonl", "heldout_dataset": "data/instructions/heldout.jsonl", "max_steps": 6,
    "max_length": 64, "max_cut_share": 1, "per_device_train_batch_size": 2, "logging_steps": 1, "save_steps": 2,
    "eval_strategy": "no", "eval_on_start": "false", "disable_tqdm": "true",
}  # fmt: skip
ENDED_WELL = "(it ended well)"
NO_CHECKS = ("    refuse_before_loading(recipe, training)", "    pass")
NUMBERS = ("    gather_as_bytes()", "    pass")
LOADED_EARLY = [
    (
        "from transformers import set_seed",
        "from transformers import AutoModelForCausalLM, BitsAndBytesConfig, set_seed",
    ),
    (
        "    recipe, training = TrlParser(",
        "    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='nf4', "
        "bnb_4bit_compute_dtype=torch.bfloat16, bnb_4bit_quant_storage=torch.bfloat16)\n"
        "    early = AutoModelForCausalLM.from_pretrained('{model}', dtype=torch.bfloat16, quantization_config=nf4)\n"
        "    recipe, training = TrlParser(",
    ),
    ("    model = load_nf4(recipe.model)", "    model = early"),
]

CASES = {
    "a rank is killed in a step": {
        "config": FSDP1,
        "variables": {"FAULT": json.dumps({"stage": "step", "rank": 1, "what": "kill", "count": 4})},
        "module": "faults",
    },
    "a rank hangs in a step": {
        "config": FSDP1,
        "variables": {"FAULT": json.dumps({"stage": "step", "rank": 1, "what": "freeze", "count": 4})},
        "module": "faults",
        "settings": {"ddp_timeout": 20},
    },
    "a rank is killed while a checkpoint is written": {
        "config": FSDP1,
        "variables": {"FAULT": json.dumps({"stage": "checkpoint", "rank": 0, "what": "kill", "count": 2})},
        "module": "faults",
    },
    "out of GPU memory": {
        "config": FSDP1,
        "variables": {"NBUTILS_CAP_GIB": "10"},
        "module": "nbutils.launching.measured_run",
        "big": True,
        "settings": {"max_length": 4096, "per_device_train_batch_size": 4, "completion_only_loss": "false"},
        "rows": "a b c d e f g h " * 520,
    },
    "FSDP 2 with offload and the head on the CPU": {"config": OFFLOADED, "edits": [NO_CHECKS]},
    "the model is loaded before the device is chosen": {"config": FSDP1, "edits": LOADED_EARLY},
    "FSDP 2 gathers numbers and not bytes": {"config": FSDP2, "edits": [NUMBERS]},
}


def run_case(case: dict, model: str, big: str, folder: Path) -> dict:
    """Launch it, and say how it ended: words, seconds, processes left, and the checkpoint that is left."""
    script = write_script(folder)
    for old, new in case.get("edits", []):
        text = script.read_text()
        if text.count(old) != 1:
            raise ValueError(f"The script has {text.count(old)} lines {old!r}; one was wanted.")
        script.write_text(text.replace(old, new.replace("{model}", model)))
    told = SETTINGS | {"model": big if case.get("big") else model, "output_dir": str(folder / "out")}
    told |= case.get("settings", {})
    if "rows" in case:
        for name, file, first in (("dataset", "rows.jsonl", 0), ("heldout_dataset", "heldout.jsonl", 64)):
            told[name] = str(folder / file)
            numbers = range(first, first + 64)
            (folder / file).write_text(
                "".join(json.dumps({"text": f"{n} {case['rows']}"}) + "\n" for n in numbers)
            )
    arguments = [word for name, value in told.items() for word in (f"--{name}", str(value))]
    variables = case.get("variables", {}) | {"NBUTILS_MEASURE_DIR": str(folder / "ranks")}
    before = {name: os.environ.pop(name, None) for name in variables}
    os.environ |= variables
    started, words, rank = time.monotonic(), ENDED_WELL, None
    try:
        launch(
            script, arguments, case["config"], module=case.get("module"), log=folder / "launch.log",
            output_dir=folder / "out", timeout=150, show=False,
        )  # fmt: skip
    except LaunchFailed as failed:
        words, rank = str(failed), failed.rank
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    newest = newest_complete(folder / "out")
    log = (folder / "launch.log").read_text()
    return {
        "said": without_paths(words, folder),
        "rank": rank,
        "seconds": round(time.monotonic() - started, 1),
        "processes_left": sum(
            str(script) in (p.info["cmdline"] or []) for p in psutil.process_iter(["cmdline"])
        ),
        "newest_complete_checkpoint": newest.name if newest else None,
        "other_lines_of_the_log": [
            without_paths(line, folder)[:400]
            for line in dict.fromkeys(log.splitlines())
            if re.search(
                r"[Ww]atchdog caught|Tensors must be|Inconsistent compute|CUDA out of memory|packed bytes",
                line,
            )
        ][:6],
    }


def without_paths(text: str, folder: Path) -> str:
    """The same words without what is this machine's own."""
    text = text.replace(str(folder), "FOLDER").replace(str(ROOT) + "/", "")
    return re.sub(r"/[\w/.+-]*?/(?=(torch|transformers|accelerate|trl|peft)/)", "", text)


def main() -> int:
    """Run all cases; a case that ends well is no fault, and makes this fail."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="the tiny base")
    parser.add_argument("--big", default="", help="a few layers of 70B's width, for running out of memory")
    parser.add_argument(
        "--only", default="", help="cases whose name has one of these words, separated by commas"
    )
    parser.add_argument("--commit", required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    go_to_root()
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT / "tests/ranks"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    )
    result = {
        "what": "real launches of the real script over NCCL that break",
        **provenance(
            "python benchmarks/gpu_faults.py --model FOLDER --big FOLDER --commit COMMIT --out FILE",
            options.commit,
        ),
        "cases": json.loads(options.out.read_text())["cases"] if options.out.exists() else {},
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    failed = 0
    for name, case in CASES.items():
        if not any(word in name for word in options.only.split(",")):
            continue
        with tempfile.TemporaryDirectory() as folder:
            seen = run_case(case, options.model, options.big, Path(folder))
        result["cases"][name] = {"commit": result["commit"], **seen}
        failed += seen["said"] == ENDED_WELL
        options.out.write_text(json.dumps(result, indent=1) + "\n")
        print(f"---- {name}\n{json.dumps(result['cases'][name], indent=1)}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
