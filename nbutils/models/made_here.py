"""The models that a name stands for: the course makes or fetches them on this machine, and keeps them in runs/cache."""

from nbutils.common.paths import ROOT

NAMES = ("tiny", "tiny-plain", "smollm2")


def model_path(model: str) -> str:
    """The folder of a model that is made here, made first if need be; any other model stays as it was typed.

    Args:
        model: one of `NAMES`, a local folder, or a hub id.

    Returns:
        What `from_pretrained` takes; a folder made here is relative to the root of the repository.

    Raises:
        Refused, BadCheckpoint: as `smollm2_base`.
    """
    if model not in NAMES:
        return model
    from nbutils.models.smollm2 import (
        smollm2_base,
    )  # torch and transformers, where only the names are asked for
    from nbutils.models.tiny import tiny_base
    from nbutils.models.tiny_plain import tiny_plain

    made = {"tiny": tiny_base, "tiny-plain": tiny_plain, "smollm2": smollm2_base}[model]()
    return str(made.relative_to(ROOT))
