"""What an adapter's configuration asks for: each field is implemented, says nothing of the result, or is refused.

An adapter's tensors mean nothing without its `adapter_config.json`: the same A and B are another model under another
scaling, or on a base that the initialisation has changed. So nothing is passed over: a field that is not known here may
only have the value that switches it off.
"""

import json
from pathlib import Path

from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from nbutils.common.refused import Refused

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

# What the course's commands take into account.
IMPLEMENTED = {
    "peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "use_dora", "bias",
    "modules_to_save", "init_lora_weights", "target_modules", "exclude_modules", "layers_to_transform",
    "layers_pattern",
}  # fmt: skip
# What no longer matters once the adapter is trained: names, and settings of training and of initialisations.
WITHOUT_EFFECT = {
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "lora_dropout", "runtime_config", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "megatron_core",
    "qalora_group_size",
}  # fmt: skip
# Initialisations that leave the base as it is. All others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) move a part of the
# base's weights into A and B, so that A and B on the base itself are another model; MiCA keeps part of itself there.
BASE_UNTOUCHED = (True, False, "gaussian", "orthogonal", "eva")


class UnsupportedAdapter(Refused):
    """The adapter asks for something that is not implemented here; the field is named. Nothing was written."""


def read_lora_config(adapter: str | Path) -> LoraConfig:
    """Read an adapter's configuration, and refuse what would be lost.

    Args:
        adapter: its folder.

    Returns:
        The configuration as PEFT reads it: LoRA or DoRA, every field in `IMPLEMENTED` or without effect.

    Raises:
        UnsupportedAdapter: there is none, it is not LoRA's, or a field asks for more than is implemented.
    """
    file = Path(adapter) / CONFIG
    if not file.is_file():
        raise UnsupportedAdapter(
            f"{adapter} holds no {CONFIG}; wanted the folder of an adapter, as PEFT saves it."
        )
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
        kind = fields.get("peft_type")
    except (ValueError, AttributeError) as problem:
        raise UnsupportedAdapter(f"{file} is not what PEFT writes for LoRA ({problem}).") from None
    if kind != "LORA":
        raise UnsupportedAdapter(
            f"{file} has peft_type {kind}; LORA was wanted: LoRA or DoRA on linear layers."
        )
    refuse_foreign_fields(fields, file)
    try:
        return LoraConfig.from_pretrained(str(adapter))
    except (ValueError, TypeError, AttributeError) as problem:
        raise UnsupportedAdapter(f"{file} is not what PEFT writes for LoRA ({problem}).") from None


def refuse_foreign_fields(fields: dict, file: Path) -> None:
    """Refuse each field that is switched on and not implemented.

    Args:
        fields: of `adapter_config.json`.
        file: named in the sentence.

    Raises:
        UnsupportedAdapter: with the field, its value, and what to do.
    """
    for name, value in fields.items():
        if name not in IMPLEMENTED | WITHOUT_EFFECT and value not in (None, False, {}, []):
            raise UnsupportedAdapter(
                f"{file} has {name}: {json.dumps(value)}, which is not implemented here: without it the result would "
                "be another model than the one that was trained. Use this adapter with PEFT, on its own base."
            )
    start = fields.get("init_lora_weights", True)
    if start not in BASE_UNTOUCHED:
        raise UnsupportedAdapter(
            f"{file} has init_lora_weights: {json.dumps(start)}, which changed the base's weights before training, so "
            "the adapter does not belong to the base as it is on the hub. Save it from PEFT as ordinary LoRA: "
            "save_pretrained(FOLDER, path_initial_model_for_weight_conversion=...)."
        )


def rank_of(config: LoraConfig, module: str) -> int:
    """The rank that the configuration gives to a module.

    Args:
        config: the adapter's.
        module: its name in the base, such as `model.layers.0.self_attn.q_proj`.
    """
    return config.rank_pattern.get(get_pattern_key(config.rank_pattern.keys(), module), config.r)


def alpha_of(config: LoraConfig, module: str) -> float:
    """The alpha that the configuration gives to a module, as `rank_of`."""
    return config.alpha_pattern.get(get_pattern_key(config.alpha_pattern.keys(), module), config.lora_alpha)


def is_targeted(config: LoraConfig, module: str) -> bool:
    """Whether PEFT puts an adapter on this module of the base; what the file holds for others it drops."""
    if config.target_modules == "all-linear":
        return not module.endswith(("lm_head", "embed_tokens"))
    return bool(check_target_module_exists(config, module))
