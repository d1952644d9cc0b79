"""The units that FSDP makes of a model: which modules are gathered and freed together, before anything is wrapped."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import nn
from torch.distributed.fsdp.wrap import _Policy, _post_order_apply, _recursive_wrap


@dataclass
class Unit:
    """One FSDP unit: the parameters that are gathered and freed together.

    Args:
        name: name of the module that is wrapped; "" is the root.
        kind: class name of that module.
        parameters: name → parameter, in the order in which FSDP reads them.
    """

    name: str
    kind: str
    parameters: dict[str, nn.Parameter]

    @property
    def bytes(self) -> int:
        """Bytes of the unit once it is gathered on a rank."""
        return sum(p.numel() * p.element_size() for p in self.parameters.values())

    @property
    def dtypes(self) -> dict[torch.dtype, int]:
        """Number of parameters of each dtype, in order of appearance."""
        return dict(Counter(p.dtype for p in self.parameters.values()))

    @property
    def trainable(self) -> int:
        """Number of parameter tensors that ask for a gradient."""
        return sum(p.requires_grad for p in self.parameters.values())


def wrapped_by_fsdp1(model: nn.Module, policy: Callable | _Policy | None) -> list[list[nn.Module]]:
    """The modules FSDP 1 wraps, in its order: torch's own walk, with a wrapper that only takes notes."""
    wrapped = []

    def take_note(module, **_):
        wrapped.append([module])
        return module

    if isinstance(policy, _Policy):
        chosen = policy._run_policy(model, set(), {})
        _post_order_apply(
            model, lambda module: take_note(module) if module in chosen and module is not model else None
        )
    elif policy is not None:
        _recursive_wrap(model, policy, take_note, set(), set(), only_wrap_children=True)
    return [*wrapped, [model]]


def wrapped_by_fsdp2(model: nn.Module, policy: Callable | None) -> list[list[nn.Module]]:
    """The groups `accelerate.utils.fsdp_utils.fsdp2_prepare_model` makes: layers, embedding, [norm, head], root."""
    from accelerate.utils.fsdp_utils import _find_final_norm, fsdp2_prepare_auto_wrap_policy
    from accelerate.utils.other import get_module_children_bottom_up

    settings = getattr(policy, "keywords", {})
    classes = [cls.__name__ for cls in settings.get("transformer_layer_cls", ())] or None
    plugin = SimpleNamespace(
        auto_wrap_policy=policy,
        transformer_cls_names_to_wrap=classes,
        min_num_params=settings.get("min_num_params", int(1e8)),
    )
    chosen = fsdp2_prepare_auto_wrap_policy(plugin, model)
    groups = [[m] for m in get_module_children_bottom_up(model)[:-1] if chosen is not None and chosen(m)]
    taken = {id(m) for group in groups for m in group}
    embed = getattr(model, "get_input_embeddings", lambda: None)()
    head = getattr(model, "get_output_embeddings", lambda: None)()
    tied = (
        embed is not None and head is not None and getattr(embed, "weight", 0) is getattr(head, "weight", 1)
    )
    if embed is not None and not tied and id(embed) not in taken:
        groups.append([embed])
        taken.add(id(embed))
    tail = [_find_final_norm(model), *([embed] if tied else []), head]
    tail = [m for m in tail if m is not None and id(m) not in taken]
    return [*groups, tail, [model]] if tail else [*groups, [model]]


def units_of(model: nn.Module, groups: list[list[nn.Module]], shared_once: bool) -> list[Unit]:
    """Share the parameters out among the groups; a parameter shared by modules of one unit counts once there.

    A parameter shared by two units counts in both under FSDP 1, which makes two copies of it, or in the first only
    (`shared_once`: FSDP 2, and FSDP 1 with use_orig_params).
    """
    names = {id(module): name for name, module in model.named_modules()}
    roots = {id(module) for group in groups for module in group}
    units, seen = [], set()
    for group in groups:
        parameters, unique = {}, {}
        for module in group:
            _collect(module, names[id(module)], roots - {id(module)}, parameters)
        if not shared_once:
            seen = set()
        for name, parameter in parameters.items():
            if id(parameter) not in seen:
                seen.add(id(parameter))
                unique[name] = parameter
        units.append(Unit(names[id(group[0])], "+".join(type(m).__name__ for m in group), unique))
    return [unit for unit in units if unit.parameters or not unit.name]


def _collect(module: nn.Module, prefix: str, others: set[int], found: dict[str, nn.Parameter]) -> None:
    """Parameters below a module, in the order of `module.parameters()`, leaving out other units."""
    for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
        found[f"{prefix}.{name}" if prefix else name] = parameter
    for name, child in module.named_children():
        if id(child) not in others:
            _collect(child, f"{prefix}.{name}" if prefix else name, others, found)
