"""The record of a dry run: what was predicted, what it ran with, and both beside what was measured."""

from nbutils.launching.dry_run_settings import DryRun
from nbutils.launching.launch import LaunchFailed
from nbutils.planning.memory_items import GIB
from nbutils.planning.memory_plan import Plan
from nbutils.planning.run_setup import Setup


def predicted(expected: Plan, setup: Setup, cap_gib: float | None) -> dict:
    """The plan as a record keeps it; `outcome` is `ok` or `oom`, against the cap alone."""
    outcome = "ok"
    if cap_gib and expected.gpu_peak_bytes > cap_gib * GIB:
        outcome = "oom"
    return {
        "gpu_peak_bytes": expected.gpu_peak_bytes,
        "host_bytes": expected.host_bytes * setup.world_size,
        "outcome": outcome,
        "peak_moment": expected.peak_moment,
        "moments": expected.moments,
        "host": expected.host,
    }


def configuration(run: DryRun, setup: Setup, config: str) -> dict:
    """What was run, as a record keeps it."""
    return {
        "model": run.shape.name,
        "num_layers": run.shape.layers,
        "fsdp_version": setup.fsdp_version,
        "offload": setup.offload,
        "cap_gib": run.cap_gib,
        "world_size": setup.world_size,
        "seq_len": run.length,
        "batch_size": run.batch,
        "gradient_accumulation_steps": run.accumulation,
        "lora_r": run.lora_r,
        "accelerate_config": config,
        "changes": list(run.changes),
        "settings": list(run.extra),
        "spare_host_memory": True,  # see nbutils.patches.fsdp1_pinned_memory
    }


def outcome_of(problem: LaunchFailed) -> str:
    """`oom` or `failed`."""
    text = f"{problem.error} {problem}"
    return "oom" if "OutOfMemoryError" in text or "CUDA out of memory" in text else "failed"


def describe(result: dict) -> str:
    """Predicted beside measured, for a reader.

    Args:
        result: from `dry_run`.
    """
    predicted, measured = result["predicted"], result["measured"]
    rows = [f"{'':34}{'predicted':>12}{'measured':>12}"]

    def row(label: str, left: float | None, right: float | None) -> None:
        cells = [f"{value / GIB:9.2f} GiB" if value else f"{'-':>12}" for value in (left, right)]
        rows.append(f"{label:34}{cells[0]:>12}{cells[1]:>12}")

    row("GPU peak allocated, a rank", predicted["gpu_peak_bytes"], measured["gpu_peak_bytes"])
    row("GPU peak reserved, a rank", None, measured["gpu_reserved_bytes"])
    row("GPU outside the allocator", None, measured["gpu_outside_allocator_bytes"])
    for name, values in measured["phases"].items():
        row(f"  peak until {name}", None, max((value or 0 for value in values), default=0))
    row("host memory held, all ranks", predicted["host_bytes"], measured["host_bytes"])
    row("  of it pinned, as PyTorch counts", None, measured["host_pinned_bytes"])
    row("  mapped files beside it", None, measured["host_file_bytes"])
    rows.append("seconds: " + ", ".join(f"{name} {value}" for name, value in measured["seconds"].items()))
    rows.append(
        f"steps {measured['all_step_seconds']}; {measured['step_seconds']} s a step, "
        f"{measured['tokens_per_second']} tokens/s over all ranks"
    )
    rows.append(f"losses {measured['losses']}")
    rows += _own_rows(result)
    rows.append(
        f"outcome: {result['outcome']} (predicted: {predicted['outcome']}) {result.get('error', '')[:300]}"
    )
    return "\n".join(rows)


def _own_rows(result: dict) -> list[str]:
    """What an epoch of somebody's own rows takes, at the speed that was measured on them."""
    own, epoch = result["config"].get("rows"), result["measured"].get("epoch")
    if not own or not epoch:
        return []
    speed = result["measured"]["tokens_per_second"]
    pieces = "packs" if own["taken"] == "packed" else "rows"
    return [
        f"{own['file']}, {own['taken']}: {own['rows']:,} {pieces} of {own['tokens']:,} tokens to train on, "
        f"the longest of {own['longest']:,}",
        f"an epoch: {epoch['steps']:,} steps of about {epoch['tokens_a_step']:,.0f} tokens, {epoch['hours']:.2f} hours "
        f"at {speed:,.0f} tokens of text a second, evaluations and checkpoints apart",
    ]
