"""Which checkpoint a run goes on from, and what it must share with the run that wrote it."""

from collections.abc import Callable
from pathlib import Path

from nbutils.adapters.checkpoint_folder import CheckpointError, checkpoints_in, newest_complete, read_manifest
from nbutils.adapters.pieces import peft_model
from nbutils.common.launched import fsdp_version
from nbutils.common.ranks import in_step, on_every_rank, rank, world_size


def refuse_what_checkpoints_do_not_serve(args) -> None:
    """Refuse settings of the Trainer that want checkpoints of another kind.

    Raises:
        ValueError: naming them.
    """
    names = ("load_best_model_at_end", "save_only_model", "push_to_hub")
    if found := [name for name in names if getattr(args, name)]:
        raise ValueError(
            f"Found {', '.join(found)}; these checkpoints are made to resume from and do not serve that. Leave it "
            "off, and export the adapter of any checkpoint afterwards."
        )


def refuse_what_cannot_be_resumed(output_dir: str | Path, resume: bool) -> None:
    """Refuse before a large model is loaded what `checkpoint_to_resume` would refuse after it, as far as one can see.

    Every rank must call it, with the process group there (`PartialState()` makes it).

    Args:
        output_dir: the folder of the run.
        resume: as for `checkpoint_to_resume`.

    Raises:
        CheckpointError: as `checkpoint_to_resume`; of the run's settings the number of processes and the FSDP version.
    """
    launched = {"world_size": world_size(), "fsdp_version": fsdp_version() or None}
    choose_checkpoint(output_dir, resume, launched, say=lambda *words, **_: None)


def choose_checkpoint(output_dir: str | Path, resume: bool, facts: dict, say: Callable) -> str | None:
    """Rank 0 looks for a checkpoint that fits these facts, and every rank gets its name or its error."""
    output, chosen = Path(output_dir), []

    def choose():
        if not resume and (old := checkpoints_in(output)):
            raise CheckpointError(
                f"{output} holds {old[-1].name} of an earlier run. Go on from it with --resume true, or name "
                "another output_dir: a new run would mix its checkpoints with those."
            )
        folder = newest_complete(output, say) if resume else None
        if folder is not None:
            refuse_another_run(read_manifest(folder)["facts"], facts, folder)
            say(f"Resuming from {folder}.", flush=True)
        elif resume:
            say(f"{output} holds no checkpoint; beginning at step 0.", flush=True)
        chosen.append(folder and str(folder))

    on_every_rank(lambda: rank() == 0 and choose(), CheckpointError)
    return in_step(chosen[0] if chosen else None)


def run_facts(trainer) -> dict:
    """What a resumed run must share with the run that wrote the checkpoint, as JSON can hold it."""
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    config = peft_model(trainer.model).peft_config["default"]
    return {
        "world_size": trainer.accelerator.num_processes,
        "fsdp_version": plugin.fsdp_version if plugin else None,
        "seed": trainer.args.seed,
        "data_seed": trainer.args.data_seed,
        "per_device_train_batch_size": trainer.args.per_device_train_batch_size,
        "gradient_accumulation_steps": trainer.args.gradient_accumulation_steps,
        "training_rows": len(trainer.train_dataset),
        "optim": str(trainer.args.optim.value),
        "lora_r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "use_dora": config.use_dora,
        "use_rslora": config.use_rslora,
    }


def refuse_another_run(written: dict, now: dict, folder: Path) -> None:
    """Compare the facts of the run that wrote a checkpoint with those of this run.

    Raises:
        CheckpointError: naming each fact that differs.
    """
    different = [
        f"{name} was {written.get(name)} and is {now[name]}" for name in now if written.get(name) != now[name]
    ]
    if different:
        raise CheckpointError(
            f"{folder} cannot be resumed from: {'; '.join(different)}. Each rank puts back exactly what it wrote, so "
            "launch as the run was launched, with its settings. The adapter alone can be had on any machine: "
            f"python -m nbutils export {folder} FOLDER"
        )
