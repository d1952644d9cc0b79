"""The preflight: which units FSDP will make of a model, and which of them it will refuse, before anything is wrapped.

It reads names, shapes and dtypes only, so it costs milliseconds on a 70B model and works on meta tensors too.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from peft.utils.other import fsdp_auto_wrap_policy
from torch import nn
from torch.distributed.fsdp.wrap import _Policy
from transformers import Trainer

from nbutils.training.fsdp_refusals import (
    Problem,
    cast_of_packed_bytes,
    copies_of_one_parameter,
    frozen_mixes,
    refused_by_fsdp1,
    refused_by_fsdp2,
    rounded_buffers,
)
from nbutils.training.fsdp_units import Unit, units_of, wrapped_by_fsdp1, wrapped_by_fsdp2


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
        body = [(str(count), *row) for row, count in Counter(rows).items()]
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
    groups = wrapped_by_fsdp1(model, policy) if fsdp_version == 1 else wrapped_by_fsdp2(model, policy)
    units = units_of(model, groups, shared_once=fsdp_version == 2 or use_orig_params)
    report = Report(fsdp_version, units)
    if fsdp_version == 1:
        if isinstance(policy, _Policy) and not use_orig_params:
            report.problems += frozen_mixes(units[:-1])
        for unit in units:
            report.problems += refused_by_fsdp1(unit, use_orig_params)
    else:
        for unit in units:
            report.problems += refused_by_fsdp2(unit)
    report.problems += cast_of_packed_bytes(units, compute_dtype)
    report.warnings += copies_of_one_parameter(units)
    if fsdp_version == 1:
        report.warnings += rounded_buffers(model, compute_dtype)
    return report


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


def _short(dtype: torch.dtype) -> str:
    names = {"bfloat16": "bf16", "float32": "fp32", "float16": "fp16"}
    name = str(dtype).removeprefix("torch.")
    return names.get(name, name)
