"""What FSDP refuses in a unit, or does to it without a word, and what helps; in FSDP's own order and words."""

from collections import Counter
from dataclasses import dataclass

import torch
from torch import nn

from nbutils.training.fsdp_units import Unit

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


def _problem(unit: Unit, cause: str, parameter: str, message: str) -> Problem:
    return Problem(unit.name, cause, parameter, message, FIXES[cause])


def refused_by_fsdp1(unit: Unit, use_orig_params: bool) -> list[Problem]:
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


def frozen_mixes(units: list[Unit]) -> list[Problem]:
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


def refused_by_fsdp2(unit: Unit) -> list[Problem]:
    """What `fully_shard` refuses while it wraps, and what FSDP 2 refuses in the first forward."""
    problems = [
        _problem(unit, "scalar parameter", name, SCALAR)
        for name, parameter in unit.parameters.items()
        if parameter.ndim == 0
    ]
    trained = {name: parameter for name, parameter in unit.parameters.items() if parameter.requires_grad}
    dtypes = Counter(parameter.dtype for parameter in trained.values())
    if len(dtypes) > 1:
        odd = list(dtypes)[1]
        name = next(name for name, parameter in trained.items() if parameter.dtype == odd)
        problems.append(_problem(unit, "mixed trainable dtypes", name, GROUP_DTYPE.format(set(dtypes))))
    return problems


def copies_of_one_parameter(units: list[Unit]) -> list[str]:
    """Sentences on tied weights that lie in two units."""
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


def cast_of_packed_bytes(units: list[Unit], compute_dtype: torch.dtype | None) -> list[Problem]:
    """FSDP casts what it gathers; packed 4-bit values cast as if they were numbers are other weights."""
    for unit in units:
        for name, parameter in unit.parameters.items():
            packed = hasattr(parameter, "quant_state") and parameter.is_floating_point()
            if packed and compute_dtype not in (None, parameter.dtype):
                same_size = compute_dtype.itemsize == parameter.dtype.itemsize
                return [_problem(unit, "cast of packed bytes", name, CAST if same_size else CAST_SIZE)]
    return []


def rounded_buffers(model: nn.Module, compute_dtype: torch.dtype | None) -> list[str]:
    """A sentence on the rotary frequencies, if FSDP 1 would round them."""
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
