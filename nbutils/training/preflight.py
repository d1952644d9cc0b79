"""The preflight: which units FSDP will make of a model, and which of them it will refuse, before anything is wrapped.

It reads names, shapes and dtypes only, so it costs milliseconds on a 70B model and works on meta tensors too.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
from peft.utils.other import fsdp_auto_wrap_policy
from torch import nn
from torch.distributed.fsdp.wrap import _Policy, _post_order_apply, _recursive_wrap
from transformers import Trainer

# What FSDP 1 says, word for word, so that a reader who saw the error finds it here; the test compares.
INTEGER = "Cannot flatten integer dtype tensors"
DTYPE = "Must flatten tensors with uniform dtype but got {} and {}"
GRAD = "Must flatten tensors with uniform `requires_grad` when `use_orig_params=False`"
FROZEN = "{} has both parameters with requires_grad=True and False."  # from policies given as objects
GROUP_DTYPE = "FSDP expects uniform original parameter dtype but got {}"  # FSDP 2, in the first forward
CAST = "(nothing at all: the loss is wrong)"  # the two dtypes have as many bytes
CAST_SIZE = "shape '...' is invalid for input of size ..."  # from a kernel, in the first forward
SCALAR = "fully_shard doesn't support scalar parameters."

FIXES = {
    "integer dtype": "Load with BitsAndBytesConfig(bnb_4bit_quant_storage=torch.bfloat16). The packed bytes stay the "
    "same; only the dtype that they claim to have changes.",
    "mixed dtypes": "Give all parameters of the unit one dtype. For a 4-bit base: use prepare_for_fsdp_qlora, not "
    "prepare_model_for_kbit_training; load with dtype equal to bnb_4bit_quant_storage; cast the adapter to it, or wrap "
    "the adapter as units of its own with peft.utils.other.fsdp_auto_wrap_policy.",
    "mixed requires_grad": "Wrap what is trained as units of its own: peft.utils.other.fsdp_auto_wrap_policy(model) "
    "does it for LoRA layers. Or set fsdp_use_orig_params: true, which keeps gradients of the frozen part as well.",
    "mixed trainable dtypes": "Cast everything that is trained to one dtype before training starts.",
    "cast of packed bytes": "Make the two equal: load with bnb_4bit_quant_storage equal to the dtype that FSDP gathers "
    "in (param_dtype of its mixed-precision policy, which the Trainer sets from bf16/fp16), or switch that off.",
    "scalar parameter": "Make it a tensor of shape (1,), or leave it out of the wrapped module.",
}


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
        return _count(p.dtype for p in self.parameters.values())

    @property
    def trainable(self) -> int:
        """Number of parameter tensors that ask for a gradient."""
        return sum(p.requires_grad for p in self.parameters.values())


@dataclass
class Problem:
    """One reason for which FSDP refuses a unit, or will train it wrongly.

    Args:
        unit: name of the unit's module; "" is the root.
        cause: one of the keys of `FIXES`.
        parameter: full name of the first parameter that does not fit.
        message: the words that FSDP itself will use.
        fix: what to do.
    """

    unit: str
    cause: str
    parameter: str
    message: str
    fix: str

    def __str__(self) -> str:
        return (
            f"Unit {self.unit or '(root)'}, {self.cause}: {self.parameter} does not fit.\n"
            f"  FSDP would say: {self.message}\n  What to do: {self.fix}"
        )


class PreflightError(ValueError):
    """FSDP would refuse the model; the message lists each cause, one parameter at fault, and the fix."""


@dataclass
class Report:
    """What the preflight found.

    Args:
        fsdp_version: 1 or 2.
        units: the units in the order in which FSDP makes them; the root comes last.
        problems: what FSDP would refuse, in the order in which it would; empty if it wraps.
        warnings: sentences on what FSDP does without a word and the reader should know.
    """

    fsdp_version: int
    units: list[Unit]
    problems: list[Problem] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """True if FSDP will accept every unit."""
        return not self.problems

    def raise_if_bad(self) -> None:
        """Raise `PreflightError` if FSDP would refuse a unit; one paragraph for each distinct cause."""
        if self.ok:
            return
        first = {problem.cause: problem for problem in reversed(self.problems)}
        refused = {problem.unit for problem in self.problems}
        raise PreflightError(
            f"FSDP {self.fsdp_version} will refuse {len(refused)} of {len(self.units)} units. Nothing was wrapped.\n"
            + "\n".join(str(problem) for problem in self.problems if first[problem.cause] is problem)
        )

    def table(self) -> str:
        """The units as text, equal ones in one line: how many, kind, parameters, dtypes, trained, MB, verdict."""
        causes = {}
        for problem in self.problems:
            causes.setdefault(problem.unit, problem.cause)
        rows = []
        for unit in self.units:
            dtypes = ", ".join(f"{count} {_short(dtype)}" for dtype, count in unit.dtypes.items())
            trained = f"{unit.trainable} of {len(unit.parameters)}"
            kind = unit.kind if unit.name else f"{unit.kind} (root)"
            rows.append((kind, dtypes, trained, f"{unit.bytes / 1e6:.3f}", causes.get(unit.name, "ok")))
        head = ("units", "wrapped module", "parameters", "trained", "MB each", f"FSDP {self.fsdp_version}")
        body = [(str(count), *row) for row, count in _count(rows).items()]
        widths = [max(len(row[i]) for row in [head, *body]) for i in range(len(head))]
        return "\n".join(
            "  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in [head, *body]
        )


def preflight(
    model: nn.Module,
    policy: Callable | _Policy | None,
    fsdp_version: int = 1,
    use_orig_params: bool = False,
    compute_dtype: torch.dtype | None = None,
) -> Report:
    """List the units FSDP would make, and say which it would refuse, without wrapping anything.

    Args:
        model: the model as it will be handed to the trainer, adapter included; on the CPU, a GPU or meta.
        policy: the auto-wrap policy. Under the Trainer and FSDP 1 a PEFT model gets
            `peft.utils.other.fsdp_auto_wrap_policy(model)`, whatever the YAML says. None: one unit, the root.
        fsdp_version: 1 or 2. For 2 the units are those that Accelerate makes.
        use_orig_params: as in the YAML; FSDP 1 only.
        compute_dtype: `param_dtype` of the mixed-precision policy; None if there is none. It must equal the storage
            dtype of the 4-bit weights: FSDP casts what it gathers, and packed bytes are no numbers.

    Returns:
        A `Report`; call its `raise_if_bad()`.

    Raises:
        ValueError: `fsdp_version` is neither 1 nor 2.
    """
    if fsdp_version not in (1, 2):
        raise ValueError(f"There is FSDP 1 and FSDP 2; found fsdp_version={fsdp_version!r}.")
    groups = _wrapped_by_fsdp1(model, policy) if fsdp_version == 1 else _wrapped_by_fsdp2(model, policy)
    units = _units(model, groups, shared_once=fsdp_version == 2 or use_orig_params)
    report = Report(fsdp_version, units)
    if fsdp_version == 1:
        if isinstance(policy, _Policy) and not use_orig_params:
            report.problems += _frozen_mixes(units[:-1])
        for unit in units:
            report.problems += _refused_by_fsdp1(unit, use_orig_params)
    else:
        for unit in units:
            report.problems += _refused_by_fsdp2(unit)
    report.problems += _cast_of_packed_bytes(units, compute_dtype)
    report.warnings += _copies_of_one_parameter(units)
    if fsdp_version == 1:
        report.warnings += _rounded_buffers(model, compute_dtype)
    return report


def _wrapped_by_fsdp1(model: nn.Module, policy: Callable | _Policy | None) -> list[list[nn.Module]]:
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


def _wrapped_by_fsdp2(model: nn.Module, policy: Callable | None) -> list[list[nn.Module]]:
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


def _units(model: nn.Module, groups: list[list[nn.Module]], shared_once: bool) -> list[Unit]:
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


def _problem(unit: Unit, cause: str, parameter: str, message: str) -> Problem:
    return Problem(unit.name, cause, parameter, message, FIXES[cause])


def _refused_by_fsdp1(unit: Unit, use_orig_params: bool) -> list[Problem]:
    """The checks of `FlatParamHandle._validate_tensors_to_flatten`, in its order: it stops at the first."""
    dtype, requires_grad = None, None
    for name, parameter in unit.parameters.items():
        if dtype is None and not parameter.is_floating_point():
            return [_problem(unit, "integer dtype", name, INTEGER)]
        if dtype is not None and parameter.dtype != dtype:
            floating = parameter.is_floating_point()
            cause = "mixed dtypes" if floating else "integer dtype"
            return [_problem(unit, cause, name, DTYPE.format(dtype, parameter.dtype))]
        if not use_orig_params and requires_grad is not None and parameter.requires_grad != requires_grad:
            return [_problem(unit, "mixed requires_grad", name, GRAD)]
        dtype, requires_grad = parameter.dtype, bool(requires_grad) or parameter.requires_grad
    return []


def _frozen_mixes(units: list[Unit]) -> list[Problem]:
    """Policies given as objects are checked for mixed `requires_grad` before the first unit is built."""
    mixed = [unit for unit in units if 0 < unit.trainable < len(unit.parameters)]
    return [
        _problem(
            unit,
            "mixed requires_grad",
            next(name for name, parameter in unit.parameters.items() if parameter.requires_grad),
            FROZEN.format(unit.name),
        )
        for unit in mixed
    ]


def _refused_by_fsdp2(unit: Unit) -> list[Problem]:
    problems = [
        _problem(unit, "scalar parameter", name, SCALAR)
        for name, parameter in unit.parameters.items()
        if parameter.ndim == 0
    ]
    trained = {name: parameter for name, parameter in unit.parameters.items() if parameter.requires_grad}
    dtypes = _count(parameter.dtype for parameter in trained.values())
    if len(dtypes) > 1:
        odd = list(dtypes)[1]
        name = next(name for name, parameter in trained.items() if parameter.dtype == odd)
        problems.append(_problem(unit, "mixed trainable dtypes", name, GROUP_DTYPE.format(set(dtypes))))
    return problems


def _copies_of_one_parameter(units: list[Unit]) -> list[str]:
    owner, sentences = {}, []
    for unit in units:
        for name, parameter in unit.parameters.items():
            if id(parameter) in owner and owner[id(parameter)][0] is not unit:
                other_name = owner[id(parameter)][1]
                sentences.append(
                    f"{name} and {other_name} are one parameter (tied weights), but lie in two units. FSDP 1 copies "
                    "it into both, and from then on the copies are trained apart. Keep the two modules in one unit."
                )
            owner.setdefault(id(parameter), (unit, name))
    return sentences


def _cast_of_packed_bytes(units: list[Unit], compute_dtype: torch.dtype | None) -> list[Problem]:
    """FSDP casts what it gathers; packed 4-bit values cast as if they were numbers are other weights."""
    for unit in units:
        for name, parameter in unit.parameters.items():
            packed = hasattr(parameter, "quant_state") and parameter.is_floating_point()
            if packed and compute_dtype not in (None, parameter.dtype):
                same_size = compute_dtype.itemsize == parameter.dtype.itemsize
                return [_problem(unit, "cast of packed bytes", name, CAST if same_size else CAST_SIZE)]
    return []


def _rounded_buffers(model: nn.Module, compute_dtype: torch.dtype | None) -> list[str]:
    exact = [
        name
        for name, buffer in model.named_buffers()
        if buffer.dtype == torch.float32 and name.rsplit(".", 1)[-1] in ("inv_freq", "original_inv_freq")
    ]
    if not exact or compute_dtype in (None, torch.float32):
        return []
    return [
        f"FSDP 1 would round the rotary frequencies ({', '.join(exact)}) from torch.float32 to {compute_dtype}. "
        "prepare_for_fsdp_qlora takes them out of its reach."
    ]


def _count(items) -> dict:
    counts = {}
    for item in items:
        counts[item] = counts.get(item, 0) + 1
    return counts


def _short(dtype: torch.dtype) -> str:
    names = {"bfloat16": "bf16", "float32": "fp32", "float16": "fp16"}
    name = str(dtype).removeprefix("torch.")
    return names.get(name, name)


def preflight_trainer(trainer: Trainer) -> Report | None:
    """Run the preflight on a trainer that has not wrapped its model yet, and stop if FSDP would refuse it.

    Args:
        trainer: a constructed trainer; by then TRL has cast the adapter to the dtype it will train in.

    Returns:
        The report, or None if the run is not under FSDP.

    Raises:
        PreflightError: FSDP would refuse the model, or spoil it; the message names the parameter and the fix.
    """
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if plugin is None:
        return None
    compute_dtype = getattr(plugin.mixed_precision_policy, "param_dtype", None)
    if plugin.fsdp_version == 1:
        # For a PEFT model the Trainer sets this policy, and lets FSDP 1 gather in the storage dtype: transformers'
        # update_fsdp_plugin_peft. It does neither for FSDP 2.
        policy = fsdp_auto_wrap_policy(trainer.model)
        storage = trainer.model.config.quantization_config.bnb_4bit_quant_storage
        compute_dtype = storage if storage.is_floating_point else compute_dtype
    else:
        plugin.set_auto_wrap_policy(trainer.model)
        policy = plugin.auto_wrap_policy
    report = preflight(
        trainer.model, policy, plugin.fsdp_version, bool(plugin.use_orig_params), compute_dtype=compute_dtype
    )
    report.raise_if_bad()
    return report
