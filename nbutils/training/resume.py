"""Which checkpoint a run goes on from, what it must share with the run that wrote it, and what may change."""

from collections.abc import Callable
from pathlib import Path

from datasets import Dataset

from nbutils.adapters.checkpoint_folder import CheckpointError, checkpoints_in, newest_complete, read_manifest
from nbutils.common.ranks import in_step, on_every_rank, rank
from nbutils.training.run_facts import SCHEDULE, facts_before_loading, keeps_its_schedule, rows_digest


def refuse_what_checkpoints_do_not_serve(args) -> None:
    """Refuse settings of the Trainer that want checkpoints of another kind.

    Raises:
        ValueError: naming them.
    """
    names = ("load_best_model_at_end", "save_only_model", "push_to_hub", "enable_jit_checkpoint")
    if found := [name for name in names if getattr(args, name)]:
        raise ValueError(
            f"Found {', '.join(found)}; these checkpoints are made to resume from and do not serve that. Leave it "
            "off, and export the adapter of any checkpoint afterwards. On SIGTERM the script saves by itself."
        )


def refuse_what_cannot_be_resumed(recipe, training) -> None:
    """Refuse before a large model is loaded what `checkpoint_to_resume` would refuse after it, as far as one can see.

    Every rank must call it, with the process group there (`PartialState()` makes it).

    Args:
        recipe: the script's `RecipeArguments`.
        training: the script's `TrainingArguments`.

    Raises:
        CheckpointError: as `checkpoint_to_resume`; rows (see `refuse_other_rows`) and target modules are not known yet.
    """
    choose_checkpoint(
        training.output_dir,
        recipe.resume,
        lambda: facts_before_loading(recipe, training),
        say=lambda *words, **_: None,
    )


def refuse_other_rows(recipe, training, train: Dataset, heldout: Dataset) -> None:
    """Refuse, before the model is loaded, to go on with other rows than the checkpoint's. Every rank must call it.

    Args:
        recipe: the script's `RecipeArguments`.
        training: the script's `TrainingArguments`.
        train: the rows as the trainer will get them.
        heldout: the held-out rows likewise.

    Raises:
        CheckpointError: `rows` or `heldout_rows` differ.
    """
    facts = {"rows": train, "heldout_rows": heldout}
    choose_checkpoint(
        training.output_dir,
        recipe.resume,
        lambda: {name: rows_digest(rows) for name, rows in facts.items()},
        say=lambda *words, **_: None,
    )


def choose_checkpoint(
    output_dir: str | Path, resume: bool, facts: Callable[[], dict], say: Callable
) -> str | None:
    """Rank 0 looks for a checkpoint that fits this run, and every rank gets its name or its error.

    Args:
        output_dir: the folder of the run.
        resume: go on from the newest complete checkpoint in it, if there is one.
        facts: called where there is a checkpoint to compare with; see `nbutils.training.run_facts`.
        say: told what is chosen.

    Returns:
        The checkpoint's folder, or None to begin at step 0.

    Raises:
        CheckpointError: on every rank; as `nbutils.training.trainer.ResumableTrainer.checkpoint_to_resume`.
    """
    output, chosen = Path(output_dir), []

    def choose():
        if not resume and (old := checkpoints_in(output)):
            raise CheckpointError(
                f"{output} holds {old[-1].name} of an earlier run. Go on from it with --resume true, or name "
                "another output_dir: a new run would mix its checkpoints with those."
            )
        folder = newest_complete(output, say) if resume else None
        if folder is not None:
            written, now = read_manifest(folder)["facts"], facts()
            refuse_another_run(written, now, folder)
            # One string: each argument would be a write of its own, and the launcher marks lines write by write.
            say(f"Resuming from {folder}.{_changes(written, now)}\n", end="", flush=True)
        chosen.append(folder and str(folder))

    on_every_rank(lambda: rank() == 0 and choose(), CheckpointError)
    return in_step(chosen[0] if chosen else None)


def refuse_another_run(written: dict, now: dict, folder: Path) -> None:
    """Compare the facts of the run that wrote a checkpoint with those of this run.

    Args:
        written: from the checkpoint's manifest.
        now: of this run, as far as they are known.
        folder: the checkpoint.

    Raises:
        CheckpointError: naming each fact that differs.
    """
    different = [
        f"{name} was {_short(written[name])} and is {_short(value)}"
        if name in written
        else f"{name} is not noted in it"
        for name, value in now.items()
        if name != "may_change" and (name not in written or written[name] != value)
    ]
    if keeps_its_schedule(written) or keeps_its_schedule(now):
        changed = _changed(written, now)
        different += [
            f"{name} was {changed[name][0]} and is {changed[name][1]}" for name in SCHEDULE if name in changed
        ]
    if different:
        raise CheckpointError(
            f"{folder} cannot be resumed from: {'; '.join(different)}. Each rank puts back exactly what it wrote, and "
            "the rows go on where they stopped, so launch as the run was launched, with its settings; learning rate, "
            "schedule, number of steps, and when to log, evaluate and save may change. To begin anew, name another "
            f"output_dir. The adapter alone can be had on any machine: python -m nbutils export {folder} FOLDER"
        )
    steps, taken = now.get("may_change", {}).get("max_steps", -1), int(folder.name.rpartition("-")[2])
    if 0 < steps < taken:
        raise CheckpointError(
            f"{folder} has {taken} steps behind it, and max_steps is {steps}; wanted at least {taken}. Raise it, or "
            f"take the adapter as it was then out of an older checkpoint: python -m nbutils export CHECKPOINT FOLDER"
        )


def _changes(written: dict, now: dict) -> str:
    changed = _changed(written, now)
    said = "; ".join(f"{name} was {old} and is {new}" for name, (old, new) in changed.items())
    return f" From here on {said}." if said else ""


def _changed(written: dict, now: dict) -> dict[str, tuple]:
    before = written.get("may_change", {})
    return {
        name: (before[name], value)
        for name, value in now.get("may_change", {}).items()
        if name in before and before[name] != value
    }


def _short(value: object) -> object:
    """A digest by its first digits."""
    return f"{value[:12]}..." if isinstance(value, str) and len(value) == 64 else value
