"""What can be known before a weight is read is refused before a weight is read.

A night on rented cards should not end on a full disk, and ten minutes of loading not on a setting that was wrong all
the time. Every refusal is one sentence or two: what was found, what was wanted, what to do. Nothing is written.
"""

import os
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase
from trl import SFTConfig

from nbutils.adapters.pieces import SaveError
from nbutils.adapters.save import reject_foreign_folder
from nbutils.common.disk import refuse_output
from nbutils.common.launched import ranks_here, sharding_strategy
from nbutils.common.ranks import agree, in_step, rank
from nbutils.common.refused import Refused
from nbutils.common.versions import refuse_versions
from nbutils.models.hub import CannotDownload
from nbutils.models.loading import IN_MEMORY_BYTES
from nbutils.models.safetensors_reader import Checkpoint
from nbutils.models.supported import look_at_model
from nbutils.planning.hybrid_shard import hybrid_fault
from nbutils.planning.memory_items import BF16
from nbutils.planning.shapes import shape_of
from nbutils.training.compiled_layers import refuse_fsdp1
from nbutils.training.host_embeddings import refuse_offloaded_head
from nbutils.training.memory_and_disk import refuse_little_memory, refuse_small_disk
from nbutils.training.packed_attention import refuse_packing
from nbutils.training.resume import refuse_what_cannot_be_resumed, refuse_what_checkpoints_do_not_serve
from nbutils.training.shared_output import Token, new_name
from nbutils.training.tiled_mlp import refuse_tiles


def refuse_before_loading(recipe, training: SFTConfig) -> None:
    """Refuse a run that cannot end well, as far as that can be known before its model is loaded.

    Every rank must call it, with the process group there (`PartialState()` makes it). What is looked up on disk or on
    the hub is looked up once a machine.

    Args:
        recipe: the script's `RecipeArguments`.
        training: the script's `TrainingArguments`.

    Raises:
        Refused: on every rank, with what was found, what was wanted and what to do.
        CheckpointError: `output_dir` holds another run, or nothing that can be resumed.
    """
    _together(lambda: _refuse_settings(recipe, training), every_rank=True)
    _together(_refuse_hybrid_of_other_groups, every_rank=True)
    _together(lambda: refuse_versions(say=_say_once))
    _together(lambda: _refuse_output(Path(training.output_dir)))
    if training.save_strategy != "no" or recipe.resume:  # of anything else, rank 0 alone reads and writes
        _refuse_unshared_output(Path(training.output_dir))
    refuse_what_cannot_be_resumed(recipe, training)
    _together(lambda: _refuse_model(recipe, training))


# ---- each of them on its own ----------------------------------------------------------------------------------------


def _together(check: Callable[[], None], every_rank: bool = False) -> None:
    """Run a check once a machine, or on every rank, and raise on all ranks what one found."""
    problem = None
    if every_rank or int(os.environ.get("LOCAL_RANK", "0")) == 0:
        try:
            check()
        except (ValueError, CannotDownload, SaveError) as found:  # sentences: Refused is a ValueError
            problem = " ".join(str(found).split())
        except Exception as found:  # the other ranks wait
            problem = f"{type(found).__name__}: {_first_line(found)}"
    agree(problem, Refused)


def _refuse_settings(recipe, training: SFTConfig) -> None:
    if training.mixed_precision != "no":
        raise Refused(
            f"Mixed precision is {training.mixed_precision} and the 4-bit weights are stored as bfloat16; wanted 'no'. "
            "The weights are bf16 already, and a cast of packed bytes makes other weights. Leave bf16 and fp16 off in "
            "the settings, and mixed_precision: 'no' in the config file."
        )
    if torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False):
        name = torch.cuda.get_device_name()
        raise Refused(
            f"{name} cannot compute in bf16, and the recipe does. Take a card of compute capability 8.0 or higher: "
            "RTX 30, A100 or newer."
        )
    if recipe.lora_r < 1 or not training.learning_rate > 0:
        raise Refused(
            f"Found lora_r {recipe.lora_r} and learning_rate {training.learning_rate}; both must be above 0."
        )
    if "use_reentrant" not in (training.activation_checkpointing_kwargs or {}):
        raise Refused(
            f"activation_checkpointing_kwargs is {training.activation_checkpointing_kwargs!r}; wanted a mapping with "
            "use_reentrant, as in {use_reentrant: false}. Leave the setting out to get it."
        )
    if training.logging_strategy == "no":
        raise Refused(
            "logging_strategy is no: no loss would ever be logged. Set it to steps, and logging_steps to 1."
        )
    by_steps = training.logging_strategy == "steps" and not training.logging_first_step
    if by_steps and 0 < training.max_steps < training.logging_steps:
        raise Refused(
            f"logging_steps is {training.logging_steps:g} and max_steps {training.max_steps}: no loss would ever be "
            "logged. Set logging_steps to 1."
        )
    if recipe.compile_layers:
        refuse_fsdp1()
    refuse_tiles(recipe.mlp_tiles, recipe.compile_layers, recipe.lora_dropout)
    if not recipe.embeddings_on_host:
        refuse_offloaded_head()
    refuse_packing(training)
    refuse_what_checkpoints_do_not_serve(training)


def _refuse_hybrid_of_other_groups() -> None:
    devices = (torch.cuda if torch.cuda.is_available() else torch.cpu).device_count()  # what FSDP 1 asks
    if fault := hybrid_fault(sharding_strategy(), ranks_here(), devices):
        raise Refused(fault)


def _say_once(sentence: str) -> None:
    if rank() == 0:
        print(sentence, flush=True)


def _refuse_output(output: Path) -> None:
    refuse_output(output)
    reject_foreign_folder(output / "adapter")  # the adapter's name, taken by something else


def _refuse_unshared_output(output: Path) -> None:
    if ranks_here() == int(os.environ.get("WORLD_SIZE", "1")):
        return  # one machine
    token = Token(output, in_step(new_name()))
    try:
        _together(lambda: rank() == 0 and token.leave(), every_rank=True)
        _together(token.look_for, every_rank=True)
    finally:  # when all have looked
        if rank() == 0:
            token.take_away()


def _refuse_model(recipe, training: SFTConfig) -> None:
    folder, _ = look_at_model(recipe.model)
    config = AutoConfig.from_pretrained(folder)
    tokenizer = _tokenizer(folder, recipe.model)
    if len(tokenizer) > config.vocab_size:
        raise Refused(
            f"The tokenizer of {recipe.model} has {len(tokenizer):,} tokens and the model {config.vocab_size:,}. "
            "They do not belong together: take the tokenizer that came with the model."
        )
    context = getattr(config, "max_position_embeddings", None)
    if training.max_length and context and training.max_length > context:
        raise Refused(
            f"max_length is {training.max_length:,} tokens and the context of {recipe.model} has {context:,}. "
            f"Set max_length to {context:,} or less."
        )
    shape = shape_of(folder)
    unpacked = not getattr(config, "quantization_config", None)
    local = Path(recipe.model).is_dir()
    bytes_on_disk = Checkpoint(folder).bytes_on_disk if local else BF16 * shape.parameters
    refuse_little_memory(shape, recipe, training, unpacked and bytes_on_disk <= IN_MEMORY_BYTES)
    refuse_small_disk(shape, recipe, training, unpacked and bytes_on_disk > IN_MEMORY_BYTES)


def _tokenizer(folder: Path, model: str) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as problem:  # tokenizers raises plain Exceptions
        raise Refused(
            f"The tokenizer of {model} cannot be read ({type(problem).__name__}: {_first_line(problem)}). Wanted: "
            "tokenizer.json and tokenizer_config.json beside config.json. Download them again."
        ) from None


def _first_line(problem: Exception) -> str:
    return next((line.strip() for line in str(problem).splitlines() if line.strip()), "no message")
