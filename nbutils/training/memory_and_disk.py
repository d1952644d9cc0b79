"""Whether host memory and disk are enough for a run, before its model is loaded."""

import shutil
from pathlib import Path

import torch
from trl import SFTConfig

from nbutils.common import host_memory
from nbutils.common.disk import nearest_folder
from nbutils.common.launched import ranks_here
from nbutils.common.paths import ROOT
from nbutils.common.ranks import world_size
from nbutils.common.refused import Refused
from nbutils.planning.memory_items import BF16, GIB, packed_bytes, quantisation_state_bytes
from nbutils.planning.memory_plan import plan
from nbutils.planning.run_setup import Choices, Setup
from nbutils.planning.shapes import Shape


def refuse_little_memory(shape: Shape, recipe, training: SFTConfig, copied: bool) -> None:
    """Refuse a run whose ranks on this machine need more host memory than is free.

    The libraries are in memory already and are not counted.

    Args:
        shape: of the model.
        recipe: the script's `RecipeArguments`.
        training: the script's `TrainingArguments`.
        copied: each rank quantises a copy of its own.

    Raises:
        Refused: with what is needed (planned) and what is free, in GiB.
    """
    here = ranks_here()
    choices, setup = Choices.of_script(recipe, training), Setup.of_launch(world_size())
    rows, length = training.per_device_train_batch_size, training.max_length or 1024
    planned = plan(shape, setup, rows, length, recipe.lora_r, choices=choices)
    needed = planned.host_bytes - planned.host["Python and libraries"]
    if copied:  # each rank quantises a copy of its own; a larger checkpoint is mapped, once for all
        needed += nf4_copy_bytes(shape)
    if not torch.cuda.is_available():
        needed += planned.gpu_peak_bytes  # in a rehearsal, this is host memory too
    free = host_memory.available()
    if here * needed > free:
        raise Refused(
            f"{here} processes need about {here * needed / GIB:.1f} GiB of host memory on this machine (planned), and "
            f"{free / GIB:.1f} GiB are free. Close other programs, add swap, or take a smaller model; a checkpoint "
            "that is NF4 already is mapped and not copied: python -m nbutils quantise MODEL OUT"
        )


def nf4_copy_bytes(shape: Shape) -> int:
    """A whole model in NF4: packed linear layers with their scales, the rest in bf16."""
    linear = shape.layers * shape.linear_parameters
    return packed_bytes(linear) + quantisation_state_bytes(linear) + BF16 * (shape.parameters - linear)


def checkpoints_bytes(shape: Shape, lora_r: int, training: SFTConfig) -> int:
    """What the run will write, at most: its checkpoints, and the adapter with the one it replaces.

    A checkpoint holds the adapter and AdamW's two moments, in bf16 each.
    """
    adapter = BF16 * shape.adapter_parameters(lora_r)
    count = 0
    if training.save_strategy != "no":
        steps, every = training.max_steps, training.save_steps
        every = every * steps if every < 1 else every
        # Without a number of steps one cannot know; two is what any run that saves needs.
        count = max(1, int(steps // every)) if training.save_strategy == "steps" and steps > 0 else 2
        if training.save_total_limit:
            count = min(count, training.save_total_limit + 1)  # the oldest goes when the newest is there
    return 3 * adapter * count + 2 * adapter


def refuse_small_disk(shape: Shape, recipe, training: SFTConfig, quantised_to_disk: bool) -> None:
    """Refuse a run that would fill the disk.

    Args:
        shape: of the model.
        recipe: the script's `RecipeArguments`.
        training: the script's `TrainingArguments`.
        quantised_to_disk: the NF4 copy of the model is written to `runs/cache` first.

    Raises:
        Refused: with what is needed and what is free, in GB.
    """
    wanted = {nearest_folder(Path(training.output_dir)): checkpoints_bytes(shape, recipe.lora_r, training)}
    what = "the checkpoints and the adapter need"
    advice = "Set save_total_limit, save less often, or name an output_dir on a larger disk."
    for place, needed in wanted.items():
        free = shutil.disk_usage(place).free
        if needed > free:
            raise Refused(
                f"On the disk of {place}, {what} {needed / 1e9:,.1f} GB and {free / 1e9:,.1f} GB are free. {advice}"
            )
    cache = nearest_folder(ROOT / "runs" / "cache")
    free, needed = shutil.disk_usage(cache).free, nf4_copy_bytes(shape)
    if quantised_to_disk and needed > free:
        raise Refused(
            f"On the disk of {cache}, the NF4 copy of {recipe.model} needs {needed / 1e9:,.1f} GB and "
            f"{free / 1e9:,.1f} GB are free. Free some, or quantise elsewhere: python -m nbutils quantise MODEL OUT"
        )
