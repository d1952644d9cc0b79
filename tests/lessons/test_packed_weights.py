"""What lessons 02, 02b and 03 count and copy: sums that agree, a copy as recorded, one damaged run of three."""

import pytest
import torch
from peft import prepare_model_for_kbit_training

from nbutils.launching.rehearsal import keep_four_bit_weights_in_order
from nbutils.lessons import records
from nbutils.lessons.corruption_figures import cost_of_copy
from nbutils.lessons.cuda_copy import copy_as_numbers
from nbutils.lessons.dtype_tables import by_kind
from nbutils.lessons.old_run import short_run, three_old_runs
from nbutils.lessons.one_process import loss_of, sentence, tiny_in_nf4, with_adapter
from nbutils.lessons.packed_bits import packed_weights, print_readings
from nbutils.lessons.step_counts import counted_step, gradients_apart, kept_for_backward

pytestmark = pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable")  # PEFT's prep calls it


@pytest.fixture(autouse=True, scope="module")
def packed_as_they_are():
    keep_four_bit_weights_in_order()


def fresh():
    return with_adapter(tiny_in_nf4().requires_grad_(False), 0)


def spoil(model):
    for values in packed_weights(model):
        copy_as_numbers([values], [values.clone()])


def test_kinds_hold_all_parameters_and_the_cast_makes_numbers_fp32():
    model = tiny_in_nf4()
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    loaded = by_kind(model)
    assert sum(size for _, size in loaded.values()) == size
    cast = by_kind(prepare_model_for_kbit_training(model))
    assert cast["norm"] == ("float32", 2 * loaded["norm"][1])
    assert cast["4-bit linear layers"] == loaded["4-bit linear layers"]


def test_the_copy_leaves_numbers_and_other_dtypes_alone(capsys):
    source = torch.tensor([1.5, -2.0, torch.inf], dtype=torch.bfloat16)
    nan = torch.tensor([0x7FAC], dtype=torch.int16)
    targets = [torch.empty_like(source), torch.empty_like(nan), torch.empty_like(nan).view(torch.bfloat16)]
    copy_as_numbers(targets, [source, nan, nan.view(torch.bfloat16)])
    assert torch.equal(targets[0], source) and torch.equal(targets[1], nan)
    assert targets[2].view(torch.int16).item() == 0x7FFF
    print_readings({"as packed": nan.view(torch.bfloat16)})
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.endswith("as packed 01111111 10101100 bfloat16 nan 10 12 7 15")


def test_the_cost_of_the_copy_is_a_share_of_what_nf4_costs():
    rows = [("bf16 storage, as it is", 2.0), ("bf16 storage, copied as on CUDA", 2.5)]
    record = {"bf16": {"held_out_answers": 1.0}}
    record["nf4"] = [{"case": case, "held_out_answers": loss} for case, loss in rows]
    assert cost_of_copy(record, "bf16") == 0.5
    assert records.load("smollm2_quantisation")["nf4"][0]["case"] == rows[0][0]


def test_one_of_three_old_runs_has_the_loss_of_another_base():
    off = {
        name: abs(loss_of(fresh(), rows) - logged)
        for name, (rows, logged) in three_old_runs(fresh, spoil).items()
    }
    assert [name for name, gap in off.items() if gap > 1e-4] == ["tuesday"]
    assert off["monday"] == off["wednesday"] == 0.0


def test_a_short_run_learns_and_leaves_what_it_trained():
    rows = sentence()[:, :32].repeat(2, 1)
    model = fresh()
    log, adapter = short_run(model, rows, rows, steps=3)
    assert log["after"] < log["before"] and log["after"] == loss_of(model, rows)
    assert any(value.abs().sum() > 0 for name, value in adapter.items() if "lora_B" in name)


def test_a_step_is_counted():
    model = with_adapter(tiny_in_nf4().requires_grad_(False), 0, past_first_step=True)
    step = counted_step(model, sentence())
    assert (step.forward, step.again) == (28, 0) and step.kept > 1e6
    weight = torch.ones(4, requires_grad=True)
    assert kept_for_backward(lambda: (weight * torch.ones(4)).sum(), {weight.data_ptr()})[1] == 16
    a, b = {"x": torch.tensor([3.0, 4.0])}, {"x": torch.tensor([3.0, 3.0])}
    apart, cosine = gradients_apart(a, b)
    assert apart == pytest.approx(0.2) and cosine == pytest.approx(21 / (5 * 18**0.5))
