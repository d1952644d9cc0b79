"""What is left of a real adapter after merging: as trained, in bf16, in NF4 again, in the NF4 base, on other bases.

Run as: python benchmarks/smollm2_merging.py    (after smollm2_learning_rates.py; minutes)

Writes benchmarks/results/smollm2_merging.json. Two adapters: one trained with the learning rate of large models, 2e-4,
whose change of the weights is small as theirs is, and one trained with 3e-3.
"""

import argparse
import json
import tempfile
import warnings
from pathlib import Path

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from gguf import GGMLQuantizationType
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from smollm2_learning_rates import run_folder
from smollm2_losses import begin, in_bf16, write
from smollm2_losses import loss as loss_of

from nbutils.adapters.merge import merge
from nbutils.models.gguf_grid import round_as_gguf
from nbutils.models.loading import load_nf4

RATES = ("2.0e-4", "3.0e-3")


def loss(model, held_out) -> float:
    """Held-out loss, twelve rows at a time: a 4-bit layer is unpacked once for all of them."""
    return loss_of(model, held_out, at_once=12)


def relative_changes(tuned: PeftModel) -> list[float]:
    """Norm of the adapter's change over the norm of the weight, for each adapted layer of a bf16 base."""
    layers = [module for module in tuned.modules() if isinstance(module, LoraLayer)]
    return [
        (
            layer.get_delta_weight("default").float().norm() / layer.get_base_layer().weight.float().norm()
        ).item()
        for layer in layers
    ]


def weights(model) -> dict[str, torch.Tensor]:
    """Every 4-bit weight of a model, unpacked, fp32."""
    return {
        name: dequantize_4bit(module.weight.data, module.weight.quant_state).float()
        for name, module in model.named_modules()
        if isinstance(module, Linear4bit)
    }


def share_kept(before: dict, after: dict, change: dict) -> float:
    """How much of the change is in the difference: its length along the change, over all layers."""
    along = sum(((after[name] - before[name]) * change[name]).sum().item() for name in change)
    return along / sum(change[name].square().sum().item() for name in change)


def merged_in_bf16(base: Path, adapter: str, held_out) -> tuple[dict, bool, dict]:
    """Losses of the merged model in bf16 and in NF4; whether PEFT's merge has the same bits; the NF4 weights."""
    with tempfile.TemporaryDirectory() as folder:
        merge(base, Path(adapter), Path(folder) / "merged", progress=False)
        ours = in_bf16(Path(folder) / "merged")
        theirs = PeftModel.from_pretrained(in_bf16(base), adapter).merge_and_unload()
        state = ours.state_dict()
        same = all(torch.equal(tensor, state[name]) for name, tensor in theirs.state_dict().items())
        again = load_nf4(str(Path(folder) / "merged"))
        losses = {
            "merged into bf16": loss(ours, held_out),
            "merged into bf16 by PEFT": loss(theirs, held_out),
            "merged into bf16, then NF4": loss(again, held_out),
        }
    return losses, same, weights(again)


def one_adapter(base: Path, adapter: str, held_out) -> dict:
    """All ways of using one adapter, losses in nats a token."""
    before = weights(load_nf4(str(base)))
    tuned = PeftModel.from_pretrained(load_nf4(str(base)), adapter)
    losses = {"4-bit base and adapter, as trained": loss(tuned, held_out)}
    in_the_base = weights(tuned.merge_and_unload())
    losses["merged into the NF4 base"] = loss(tuned.base_model.model, held_out)
    full = PeftModel.from_pretrained(in_bf16(base), adapter)
    changes = sorted(relative_changes(full))
    change = {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").float()
        for name, module in full.named_modules()
        if isinstance(module, LoraLayer)
    }
    losses["bf16 base and adapter"] = loss(full, held_out)
    more, same, again = merged_in_bf16(base, adapter, held_out)
    losses |= more
    for kind in (GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q4_0):
        other = PeftModel.from_pretrained(round_as_gguf(in_bf16(base), kind.name), adapter)
        losses[f"{kind.name} base and adapter"] = loss(other, held_out)
    return {
        "relative_change_of_the_weights": {
            "median": changes[len(changes) // 2],
            "least": changes[0],
            "most": changes[-1],
            "layers": len(changes),
        },
        "share_of_the_change_kept": {
            "merged into the NF4 base": share_kept(before, in_the_base, change),
            "merged into bf16, then NF4": share_kept(before, again, change),
        },
        "held_out_loss": {name: round(value, 4) for name, value in losses.items()},
        "our_merge_has_the_bits_of_peft": same,
    }


def measured(rate: str, base: Path, held_out) -> dict:
    """One adapter's losses; kept beside its run, so that they are measured once."""
    kept = run_folder(rate) / "merging.json"
    if not kept.is_file():
        found = one_adapter(base, str(run_folder(rate) / "train" / "adapter"), held_out)
        kept.write_text(json.dumps({"learning_rate": float(rate), **found}), encoding="utf-8")
    return json.loads(kept.read_text(encoding="utf-8"))


def without_adapter(base: Path, held_out) -> dict:
    """The base alone; kept as well."""
    kept = run_folder(RATES[0]).with_name("without_adapter.json")
    if not kept.is_file():
        found = {"NF4 base": load_nf4(str(base)), "bf16 base": in_bf16(base)}
        losses = {name: round(loss(model, held_out), 4) for name, model in found.items()}
        kept.write_text(json.dumps(losses), encoding="utf-8")
    return json.loads(kept.read_text(encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=RATES, help="measure this adapter, and record nothing yet")
    options = parser.parse_args()
    warnings.filterwarnings(
        "ignore", message="Merge lora module to 4-bit"
    )  # it warns of what is measured here
    base, _, held_out = begin()
    found = [measured(rate, base, held_out) for rate in ([options.only] if options.only else RATES)]
    if options.only:
        return
    write(
        "smollm2_merging",
        "python benchmarks/smollm2_learning_rates.py; python benchmarks/smollm2_merging.py",
        "SmolLM2-135M-Instruct: held-out loss of two adapters used and merged in each way; nats a token",
        held_out_loss_without_adapter=without_adapter(base, held_out),
        adapters=found,
    )


if __name__ == "__main__":
    main()
