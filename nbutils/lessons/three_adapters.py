"""The folders of exercise 05.1: an adapter, and two that look like it on disk and would do nothing."""

import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

FILE = "adapter_model.safetensors"
IN_LAYER = re.compile(r"(\.layers\.\d+)(?=\.)")  # FSDP 1 wraps each decoder layer


def write_three(adapter: str | Path, folder: str | Path) -> dict[str, Path]:
    """Write an adapter as it is, one with the names of a model that FSDP 1 has wrapped, and one before its first step.

    Args:
        adapter: a saved adapter in PEFT's form.
        folder: for the three; replaced.

    Returns:
        Their folders, by the letter that the exercise asks for.
    """
    tensors = load_file(Path(adapter) / FILE)
    shutil.rmtree(folder, ignore_errors=True)
    kinds = {"a": _wrapped(tensors), "b": tensors, "c": _before_training(tensors)}
    found = {}
    for letter, content in kinds.items():
        found[letter] = Path(shutil.copytree(adapter, Path(folder) / letter))
        save_file(content, found[letter] / FILE)
    return found


def _wrapped(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {IN_LAYER.sub(r"\1._fsdp_wrapped_module", name): t for name, t in tensors.items()}


def _before_training(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(t) if "lora_B" in name else t for name, t in tensors.items()}
