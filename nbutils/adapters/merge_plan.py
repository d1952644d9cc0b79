"""Which tensors of an adapter go into which tensor of the base, found from names and shapes alone."""

from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from peft import LoraConfig
from safetensors import SafetensorError

from nbutils.adapters.lora_config import is_targeted, rank_of
from nbutils.models.safetensors_writer import Entry, layout_of

PREFIX = "base_model.model."  # what PEFT puts before the base's names
# What PEFT puts behind them, and which part that is of which tensor of the base.
ENDINGS = {
    "lora_A.weight": ("weight", "A"), "lora_B.weight": ("weight", "B"),
    "lora_magnitude_vector": ("weight", "magnitude"),
    "lora_embedding_A": ("weight", "embedding_A"), "lora_embedding_B": ("weight", "embedding_B"),
    "base_layer.weight": ("weight", "base"), "base_layer.bias": ("bias", "whole"),
}  # fmt: skip
SHARED = ("model.embed_tokens.weight", "lm_head.weight")  # one tensor, where a model ties them


class MergeError(RuntimeError):
    """The adapter cannot be merged into this base. The base and the adapter are as they were."""


@dataclass
class Parts:
    """What an adapter has for one tensor of the base: the keys in the adapter's file, and their shapes, by part.

    Parts: `A`, `B` (or `embedding_A`, `embedding_B`) and with DoRA `magnitude`; `whole`, which replaces the tensor;
    `base`, PEFT's own copy of it, which it saves beside LoRA on a head or an embedding and loads again.
    """

    keys: dict[str, str] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def replaced(self) -> bool:
        """Whether the tensor is taken from the adapter as a whole, without any product."""
        return "whole" in self.keys or set(self.keys) == {"base"}


def layout(file: Path) -> dict[str, Entry]:
    """Names, dtypes and shapes of a file's tensors.

    Raises:
        MergeError: it is cut short or damaged.
    """
    try:
        return layout_of(file)
    except SafetensorError as problem:
        raise MergeError(
            f"{file} is cut short or damaged ({problem}). Download or copy this file again."
        ) from None


def plan_merge(
    adapter: dict[str, Entry], config: LoraConfig, base: dict[str, Entry], tied: bool
) -> dict[str, Parts]:
    """Say for each tensor of the base that changes what goes into it.

    Args:
        adapter: what the adapter's file holds.
        config: the adapter's.
        base: what the base holds.
        tied: whether its head shares the embedding's tensor.

    Raises:
        MergeError: something of the adapter has no place in this base, or is not what the configuration says.
    """
    plan = defaultdict(Parts)
    for key, entry in adapter.items():
        name, part = _place(key)
        if tied and name in SHARED:
            raise MergeError(
                f"{key} changes one of embedding and head, and this base ties them: one tensor serves as both. PEFT "
                "applies the change in one place only, which no merged checkpoint of a tied model can hold."
            )
        if name not in base:
            raise MergeError(
                f"{key} of the adapter belongs to {name}, and the base has no such tensor. Merge into the base "
                "that the adapter was trained on, unquantised."
            )
        plan[name].keys[part] = key
        plan[name].shapes[part] = entry.shape
    for name, parts in plan.items():
        _check(name, parts, config, base[name].shape)
    _reject_what_is_missing(plan, config, base)
    return dict(plan)


def _place(key: str) -> tuple[str, str]:
    """The base's tensor that an adapter's key belongs to, and which part of the change it is."""
    name = key.removeprefix(PREFIX)
    for ending, (leaf, part) in ENDINGS.items():
        if name.endswith("." + ending):
            return name.removesuffix(ending) + leaf, part
    return name, "whole"


def _check(name: str, parts: Parts, config: LoraConfig, wanted: tuple[int, ...]) -> None:
    if parts.replaced:
        found = parts.shapes.get("whole") or parts.shapes["base"]
    else:
        found = _shape_of_product(name, parts, config)
    if list(found) != list(wanted):
        raise MergeError(f"{name} is {list(wanted)} in the base, and the adapter was made for {list(found)}.")


def _shape_of_product(name: str, parts: Parts, config: LoraConfig) -> list[int]:
    module, shapes = name.removesuffix(".weight"), parts.shapes
    kind = "embedding_" if "embedding_A" in shapes else ""
    wanted = {f"{kind}A", f"{kind}B"} | ({"magnitude"} if config.use_dora else set())
    if shapes.keys() - {"base"} != wanted:
        raise MergeError(
            f"{name} has {sorted(shapes)} in the adapter; {', '.join(sorted(wanted))} were wanted."
        )
    rank = shapes[f"{kind}A"][0]
    if rank != rank_of(config, module):
        raise MergeError(
            f"{name} has rank {rank} in the adapter, and its configuration says {rank_of(config, module)}; the scaling "
            "follows from the rank. File and configuration do not belong together: copy the adapter again."
        )
    if not is_targeted(config, module):
        raise MergeError(
            f"{name} has a LoRA in the adapter, and the configuration's target_modules leave it out: PEFT would drop "
            "it without a word. File and configuration do not belong together: copy the adapter again."
        )
    if kind:  # an embedding is (vocabulary, hidden), and its A is (r, vocabulary)
        return [shapes["embedding_A"][1], shapes["embedding_B"][0]]
    return [shapes["B"][0], shapes["A"][1]]


def _reject_what_is_missing(plan: dict[str, Parts], config: LoraConfig, base: dict[str, Entry]) -> None:
    for name, entry in base.items():
        module = name.removesuffix(".weight")
        if len(entry.shape) == 2 and name not in plan and is_targeted(config, module):
            raise MergeError(
                f"The configuration targets {module}, and the adapter's file holds nothing for it. Part of the adapter "
                "is missing: copy it again."
            )
