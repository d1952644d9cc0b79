"""A dry run of PEFT's own example of FSDP + QLoRA, on the same weights, rows and adapter as ours.

The script is not part of this repository: https://github.com/huggingface/peft/tree/main/examples/sft. `matrix.py --peer
FOLDER` names a folder with its `train.py`, `utils.py` and `configs/fsdp_config_qlora.yaml`.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from unittest.mock import patch

from nbutils.common.devices import no_accelerator
from nbutils.common.provenance import provenance
from nbutils.launching.dry_run import MEASURED_RUN
from nbutils.launching.dry_run_settings import DryRun, claim, write_settings
from nbutils.launching.launch import LaunchFailed, launch
from nbutils.launching.launch_command import launch_command
from nbutils.launching.measurements import HostMemory, measured
from nbutils.launching.random_weights import prepare

CONFIG = "configs/fsdp_config_qlora.yaml"
NEEDED = ("train.py", "utils.py", CONFIG)


def peer_run(folder: Path, run: DryRun) -> dict:
    """Train the peer's script for a few steps, watched as a dry run is.

    Args:
        folder: of the script.
        run: as for a dry run; its config is the peer's unless one is given.

    Returns:
        A record like a dry run's, without a prediction; `adapter` says how many bytes and tensors were saved.

    Raises:
        FileNotFoundError: the folder lacks one of the script's files.
    """
    missing = [name for name in NEEDED if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder} has no {', '.join(missing)}; wanted PEFT's examples/sft. Name its folder with --peer."
        )
    run_dir, config = Path(run.run_dir), Path(run.config or folder / CONFIG)
    claim(run_dir)
    weights = prepare(run.shape, run.folder)
    ranks = run.world_size or 2
    write_settings(run, run_dir, weights, ranks)
    arguments = peer_arguments(run, weights, _rows(run_dir), run_dir / "train")
    variables = {"NBUTILS_MEASURE_DIR": str(run_dir / "ranks"), "HF_DATASETS_CACHE": str(run_dir / "cache")}
    if run.cap_gib:
        variables["NBUTILS_CAP_GIB"] = str(run.cap_gib)
    script = folder / "train.py"
    words = launch_command(script.name, arguments, config.name, MEASURED_RUN, run.world_size)
    said = " ".join(words).replace(str(weights), weights.name)
    record = {
        **provenance(said, run.commit),
        "what": "PEFT examples/sft/train.py",
        "sha256": {name: hashlib.sha256((folder / name).read_bytes()).hexdigest()[:16] for name in NEEDED},
        "config": {"layers": run.shape.layers, "batch": run.batch, "length": run.length, "ranks": ranks},
        "outcome": "ok",
    }
    try:
        with patch.dict(os.environ, variables), HostMemory(run_dir / "ranks") as host:
            launch(
                *(script, arguments, config), module=MEASURED_RUN, num_processes=run.world_size,
                log=run_dir / "train.log", timeout=run.timeout,
            )  # fmt: skip
    except LaunchFailed as problem:
        record |= {"outcome": "failed", "error": problem.error or str(problem)}
    record["measured"] = measured(run_dir, host, run.tokens_a_step(ranks))
    return record | {"adapter": saved(run_dir / "train")}


def peer_arguments(run: DryRun, weights: Path, rows: Path, output: Path) -> list[str]:
    """As its `run_peft_qlora_fsdp.sh` has them, but for what a dry run decides and for the adapter, which is ours.

    Args:
        run: what is asked for.
        weights: folder of the model.
        rows: folder with `train.jsonl` and `test.jsonl`.
        output: where the script saves.
    """
    settings = {
        "seed": 42, "model_name_or_path": weights, "dataset_name": rows, "splits": "train,test",
        "dataset_text_field": "text", "max_length": run.length, "max_steps": run.steps, "output_dir": output,
        "per_device_train_batch_size": run.batch, "gradient_accumulation_steps": run.accumulation,
        "gradient_checkpointing": True, "use_reentrant": True, "packing": False, "bf16": not no_accelerator(),
        "learning_rate": 1e-4, "lr_scheduler_type": "cosine", "max_grad_norm": 1.0, "logging_steps": 1,
        "eval_strategy": "no", "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
        "use_peft_lora": True, "lora_r": run.lora_r, "lora_alpha": 2 * run.lora_r, "lora_dropout": 0.0,
        "lora_target_modules": "all-linear", "use_4bit_quantization": True, "use_nested_quant": True,
        "bnb_4bit_compute_dtype": "bfloat16", "bnb_4bit_quant_storage_dtype": "bfloat16",
    }  # fmt: skip
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def saved(folder: Path) -> dict | None:
    """Bytes and tensors of the adapter in a folder; None if there is no file."""
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        return None
    header = json.loads(file.read_bytes()[8 : 8 + int.from_bytes(file.read_bytes()[:8], "little")])
    return {"bytes": file.stat().st_size, "tensors": len(header.keys() - {"__metadata__"})}


def describe_peer(record: dict) -> str:
    """A line: speed, and what was saved."""
    seen, adapter = record["measured"], record["adapter"]
    kept = (
        "no adapter"
        if adapter is None
        else f"an adapter of {adapter['bytes']:,} bytes, {adapter['tensors']} tensors"
    )
    return (
        f"{record['outcome']}: {seen['step_seconds']} s a step, {seen['tokens_per_second']} tokens/s, {kept}"
    )


def _rows(run_dir: Path) -> Path:
    """The dry run's rows under the names that the script looks for."""
    rows = run_dir / "rows"
    rows.mkdir(exist_ok=True)
    shutil.copy(run_dir / "train.jsonl", rows / "train.jsonl")
    shutil.copy(run_dir / "heldout.jsonl", rows / "test.jsonl")
    return rows
