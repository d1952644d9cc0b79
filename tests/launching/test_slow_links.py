"""Links made slow: every gathered byte is counted, and each step waits at least as long as its bytes take."""

import itertools
import json

import pytest

from nbutils.launching.dry_run import dry_run
from nbutils.launching.dry_run_settings import DryRun
from nbutils.planning.shapes import shape_of

pytestmark = [pytest.mark.launch, pytest.mark.matrix]
STEPS, SLOW = 3, 0.005  # optimizer steps at each speed; GB/s


@pytest.mark.parametrize("version", [1, 2])
def test_each_gathered_byte_takes_its_time(tmp_path, monkeypatch, version):
    monkeypatch.setenv("NBUTILS_LINK_GBS", f"0,{SLOW}")
    monkeypatch.setenv("NBUTILS_LINK_STEPS", str(STEPS))
    config = f"configs/accelerate/rehearsal_fsdp{version}.yaml"
    weights, steps = tmp_path / "weights", 2 * STEPS
    asked = DryRun(shape_of("tiny"), config, length=64, steps=steps, run_dir=tmp_path, folder=weights)
    result = dry_run(asked, show=False)
    assert result["outcome"] == "ok", result.get("error")
    lines = [json.loads(line) for line in (tmp_path / "ranks/rank0.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["phase"] == "step"]
    assert [line["link_gbs"] for line in steps] == [0.0] * STEPS + [SLOW] * STEPS
    # The other rank's half of the packed weights, once for the forward and once for the backward pass; norms,
    # embeddings and adapters come on top.
    packed = result["measured"]["run"]["training"]["nf4_bytes_total"]
    for before, after in itertools.pairwise(steps):
        incoming = after["incoming"] - before["incoming"]
        assert incoming >= packed
        if after["link_gbs"]:
            assert after["time"] - before["time"] >= 0.95 * incoming / (SLOW * 1e9)
