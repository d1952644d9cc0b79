"""A step's seconds by what the GPU did: spans that overlap count once, and moving counts where nothing computes."""

import json
import time
from types import SimpleNamespace

import pytest
from transformers import TrainerControl, TrainerState
from transformers.trainer_callback import CallbackHandler

from nbutils.launching.step_profile import StepProfile, kind_of, seconds_by_kind


def test_overlapping_kernels_count_once_and_hidden_moves_not_at_all():
    ran = [
        ("nvjet_tst_128x256", 0.0, 2.0),
        ("void kDequantizeBlockwise<bf16>", 1.5, 2.5),  # on another stream, half of it beside the product
        ("ncclDevKernel_AllGather_RING_LL", 1.0, 4.0),  # 1.5 of it alone
        ("Memcpy HtoD (Pinned -> Device)", 3.5, 4.5),
        ("triton_poi_fused_add_mul_0", 6.0, 6.5),
    ]
    found = seconds_by_kind(ran, 10.0)
    assert found["computing"] == 3.0  # 0 to 2.5, 6 to 6.5
    assert found["moving_alone"] == 2.0  # 2.5 to 4.5
    assert found["idle"] == 5.0
    (gap,) = found["gaps"]
    assert gap == {
        "seconds": 3.5,
        "after": "void kDequantizeBlockwise<bf16>",
        "before": "triton_poi_fused_add_mul_0",
    }
    assert found["by_kind"]["gather"] == 3.0 and found["by_kind"]["dequantise"] == 1.0


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16", "attention"),
        ("void pytorch_flash::flash_fwd_kernel", "attention"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n", "multiply"),
        ("void at::native::elementwise_kernel<128, 4>", "other"),
        ("Memcpy DtoH (Device -> Pinned)", "to host"),
    ],
)
def test_a_kernels_name_tells_what_it_does(name, kind):
    assert kind_of(name) == kind


def test_the_watched_step_alone_is_written(tmp_path):
    profile = StepProfile(2, tmp_path / "profile.json")
    trainer = CallbackHandler([profile.callback()], None, None, None, None)
    arguments, state = SimpleNamespace(), TrainerState()
    for done in (1, 2, 3):
        trainer.on_pre_optimizer_step(arguments, state, TrainerControl())
        time.sleep(0.002)
        trainer.on_optimizer_step(arguments, state, TrainerControl())
        state.global_step = done
        trainer.on_step_end(arguments, state, TrainerControl())
        assert (tmp_path / "profile.json").exists() == (done >= 2)
    found = json.loads((tmp_path / "profile.json").read_text())
    assert 0 < found["optimizer"] <= found["step"] == found["idle"]  # a CPU runs no kernels
