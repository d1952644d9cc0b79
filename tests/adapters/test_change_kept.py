"""What is left of a change after a merge: nearly all by way of bf16, nothing of a small one in the NF4 base."""

import json

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit, Params4bit
from peft import LoraConfig, inject_adapter_in_model

from nbutils.adapters.change_kept import INTO_BF16, INTO_NF4, along, change_kept, kept_of, through_nf4
from nbutils.common.paths import ROOT


@pytest.mark.parametrize("size, kept", [(0.02, 0.02), (0.05, 0.28), (0.1, 0.84), (0.35, 0.99)])
def test_a_small_change_is_lost_in_the_4_bit_base_alone(size, kept):
    found = change_kept(size, width=512)
    assert found[INTO_NF4] == pytest.approx(kept, abs=0.03)
    assert found[INTO_BF16] > 0.97


def test_it_is_what_peft_does_with_a_4_bit_layer():
    torch.manual_seed(0)
    weight = (0.02 * torch.randn(128, 128)).bfloat16()
    packed = Params4bit(weight.clone(), quant_type="nf4", compress_statistics=True, requires_grad=False)
    linear = Linear4bit(128, 128, bias=False, quant_type="nf4", compute_dtype=torch.bfloat16)
    linear.weight = packed
    linear = linear.to("cpu")
    holder = torch.nn.ModuleDict({"layer": linear})
    holder.is_loaded_in_4bit = True  # what transformers sets; PEFT asks it for its 4-bit layer
    model = inject_adapter_in_model(LoraConfig(r=4, target_modules=["layer"]), holder)
    lora = model["layer"]
    torch.nn.init.normal_(lora.lora_B["default"].weight, std=0.01)
    change = lora.get_delta_weight("default").float()
    before = through_nf4(weight)
    lora.merge()
    state = lora.get_base_layer().weight
    after = dequantize_4bit(state.data, state.quant_state)
    assert along(after.float() - before.float(), change) == pytest.approx(
        kept_of(weight, change)[INTO_NF4], abs=0.02
    )


def test_the_record_says_what_is_computed_now():
    report = json.loads((ROOT / "benchmarks/results/change_kept.json").read_text())
    row = next(row for row in report["rows"] if row["size"] == 0.1)
    found = change_kept(0.1, report["rank"], report["width"], report["seeds"][0])
    for way in (INTO_BF16, INTO_NF4):
        assert row[way]["least"] - 1e-3 <= found[way] <= row[way]["most"] + 1e-3
