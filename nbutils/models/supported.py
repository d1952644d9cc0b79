"""Is this a model that the recipe supports? Said from its config and the headers of its files."""

import json
from pathlib import Path

from nbutils.common.refused import Refused
from nbutils.models.hub import local_folder
from nbutils.models.quantised_checkpoint import refuse_mixed, refuse_other_quantisations
from nbutils.models.safetensors_reader import Checkpoint

# The prep, the memory plan and the units were made for it and tested with it.
SUPPORTED = ("llama",)


def look_at_model(model: str) -> tuple[Path, dict]:
    """Find a model's config and refuse another architecture or quantisation; of local weights, read the headers.

    Args:
        model: a local folder, or a hub id, of which config and tokenizer are fetched.

    Returns:
        The folder, and what its config.json holds.

    Raises:
        Refused, BadCheckpoint, CannotDownload: with what was found.
    """
    folder = local_folder(model, weights=False)
    file = folder / "config.json"
    if not file.is_file():
        raise Refused(
            f"{model} holds no config.json; wanted a model as the hub keeps them. Look at the path."
        )
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        kind = config.get("model_type")
    except (ValueError, AttributeError) as problem:
        raise Refused(f"{file} is no JSON object ({problem}). Download it again.") from None
    if kind not in SUPPORTED:
        raise Refused(
            f"{model} is a {kind}; wanted a model of the architecture {' or '.join(SUPPORTED)}. Prep, memory plan and "
            "units were made for it and tested with it; see nbutils.models.supported.SUPPORTED."
        )
    if config.get("quantization_config"):
        refuse_other_quantisations(config["quantization_config"], folder)
    if Path(model).is_dir():
        weights = Checkpoint(folder)  # the hub's weights are looked at when they have come
        if config.get("quantization_config"):
            refuse_mixed(weights)
    return folder, config
