"""Is a quantised checkpoint one that the recipe loads: NF4 of bitsandbytes in all linear layers, and nowhere else?"""

from pathlib import Path

from nbutils.models.safetensors_reader import BadCheckpoint, Checkpoint

CURE = "Take the model's bf16 checkpoint, and quantise it once: python -m nbutils quantise MODEL OUT"


def refuse_other_quantisations(found, folder: Path) -> None:
    """Refuse a checkpoint that is quantised, and not as NF4 of bitsandbytes; the storage dtype may be any.

    Args:
        found: `quantization_config` of the model's config.
        folder: of the checkpoint.

    Raises:
        BadCheckpoint: with how it is quantised.
    """
    settings = found.to_dict() if hasattr(found, "to_dict") else found
    if not isinstance(settings, dict):
        raise BadCheckpoint(
            f"{folder} has a quantization_config of {settings!r}; wanted the object that transformers writes, or none. "
            "Download the model's config.json again."
        )
    if settings.get("load_in_8bit"):
        kind = "8-bit of bitsandbytes"
    elif settings.get("load_in_4bit"):
        kind = settings.get("bnb_4bit_quant_type")
    else:
        kind = settings.get("quant_method")
    if kind != "nf4":
        raise BadCheckpoint(f"{folder} is quantised as {kind}; wanted NF4 of bitsandbytes. {CURE}")
    skipped = [
        name for name in settings.get("llm_int8_skip_modules") or [] if "layers." in name or "proj" in name
    ]
    skipped = [name for name in skipped if "vision" not in name and "multi_modal" not in name]
    if skipped:
        raise BadCheckpoint(
            f"{folder} keeps {skipped[0]} unquantised ({len(skipped)} such in llm_int8_skip_modules), as dynamic 4-bit "
            f"checkpoints do; wanted NF4 in all linear layers. {CURE}"
        )


def refuse_mixed(checkpoint: Checkpoint) -> None:
    """Refuse an NF4 checkpoint of which a layer is not quantised, or the head is; names alone are looked at.

    Args:
        checkpoint: whose config says NF4.

    Raises:
        BadCheckpoint: with the first such tensor.
    """
    for name in checkpoint.names():
        if not name.endswith(".weight"):
            continue
        quantised = f"{name}.absmax" in checkpoint
        in_layer = ".layers." in name and "norm" not in name
        if in_layer and not quantised:
            raise BadCheckpoint(
                f"{name} is not quantised in {checkpoint.folder}; wanted NF4 in all linear layers, with the state "
                f"({name}.absmax and so on) beside each. {CURE}"
            )
        if quantised and not in_layer:
            raise BadCheckpoint(
                f"{name} is quantised in {checkpoint.folder}; wanted NF4 in the decoder layers alone, and head and "
                f"embedding in bf16. {CURE}"
            )
