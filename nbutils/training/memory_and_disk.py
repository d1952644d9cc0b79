"""Whether host memory and disk are enough for a run, before its model is loaded."""

from pathlib import Path

import torch
from trl import SFTConfig

from nbutils.common import host_memory
from nbutils.common.disk import refuse_full_disk
from nbutils.common.launched import ranks_here
from nbutils.common.paths import ROOT, RUNS
from nbutils.common.ranks import world_size
from nbutils.common.refused import Refused
from nbutils.planning.memory_items import BF16, GIB, packed_bytes, quantisation_state_bytes
from nbutils.planning.memory_plan import plan
from nbutils.planning.run_setup import Choices, Setup
from nbutils.planning.shapes import Shape
from nbutils.planning.whole_run import KEPT_ADVICE, KEPT_NEED, kept_bytes


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
    refuse_full_disk(
        Path(training.output_dir),
        kept_bytes(vars(training) | {"lora_r": recipe.lora_r}, training.max_steps, shape),
        KEPT_NEED,
        KEPT_ADVICE,
    )
    if quantised_to_disk:
        refuse_full_disk(
            ROOT / RUNS / "cache",
            nf4_copy_bytes(shape),
            f"the NF4 copy of {recipe.model} needs",
            "Free some, or quantise elsewhere: python -m nbutils quantise MODEL OUT",
        )
