"""The links of a machine: measured by real ranks with gloo; a hang is found, ended, and answered with its cure."""

import json
import sys
import time

import psutil
import pytest

from nbutils.planning import links
from nbutils.planning.links import LinksFailed, look, main, measure
from nbutils.planning.step_estimate import Links, moving_seconds
from nbutils.planning.step_time import measured_links

# A rank of a machine with two GPUs whose peer access is broken: its gather hangs, or brings wrong bytes.
BROKEN = """
import json, os, sys, time
folder, rank, how = sys.argv[2], int(sys.argv[3]), sys.argv[1]
cured = os.environ.get("NCCL_P2P_DISABLE") == "1" and how != "for good"
def say(file, **found):
    print(json.dumps(found), file=file, flush=True)
with open(f"{folder}/rank{rank}.jsonl", "w") as file:
    say(file, phase="start", device="RTX", peers=[1 - rank])
    say(file, phase="host links", host_to_device_gbs=12.0 + rank, device_to_host_gbs=12.0, both_at_once_gbs=9.0)
    say(file, phase="matrix rate", tflops=70.0 - rank)
    if not cured and how != "wrong bytes":
        time.sleep(60)
    say(file, phase="gather", between_gbs=6.0, whole=cured, piece_bytes=1)
"""
QUICK = {"start": 20.0, "host links": 10.0, "matrix rate": 10.0, "gather": 1.5}


def broken(how: str) -> dict:
    return {"limits": QUICK, "program": (sys.executable, "-c", BROKEN, how)}


@pytest.mark.launch
def test_two_ranks_measure_each_other(tmp_path, capsys):
    assert main(["--processes", "2", "--out", str(tmp_path / "new/links.json")]) == 0
    record = json.loads((tmp_path / "new/links.json").read_text())
    assert [rank["device"] for rank in record["ranks"]] == ["cpu", "cpu"]
    assert all(rank["between_gbs"] > 0 and rank["tflops"] > 0 and rank["whole"] for rank in record["ranks"])
    assert record["ranks"][0]["piece_bytes"] == 8 * 2**20
    assert {"machine", "versions", "commit", "date", "command"} <= record.keys()
    assert "received in a gather, GB/s" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["links.json"]
    with pytest.raises(ValueError, match=r"was measured on 2 x cpu; wanted two GPUs"):
        measured_links(tmp_path / "new/links.json")


@pytest.mark.launch
def test_a_real_gather_that_waits_for_ever_is_found_and_no_rank_is_left():
    late = (
        "import sys, time; from nbutils.planning import link_measurements as m\n"
        "if sys.argv[2] == '1': m.PHASES['gather'] = lambda device: time.sleep(300)\n"
        "m.main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))"
    )
    limits = links.LIMITS | {"gather": 2.0}
    with pytest.raises(LinksFailed, match=r"No answer from rank 0, 1 within 2 seconds of `gather`: it hangs"):
        measure(2, limits=limits, program=(sys.executable, "-c", late))
    assert [
        child for child in psutil.Process().children() if "link_measurements" in " ".join(child.cmdline())
    ] == []


@pytest.mark.parametrize("how", ["hangs", "wrong bytes"])
def test_gpus_with_broken_peer_access_are_measured_without_it_and_the_cure_is_said(monkeypatch, how):
    monkeypatch.setattr(links, "gpus_shown", lambda: 2)
    begin = time.monotonic()
    record = look(2, **broken(how))
    assert time.monotonic() - begin < 20
    assert record["settings"] == {"NCCL_P2P_DISABLE": "1"}
    assert ("it hangs" if how == "hangs" else "gathered other bytes") in record["failed"]
    assert "NCCL_P2P_DISABLE=1" in record["advice"] and "IOMMU" in record["advice"]
    assert record["failed"] in links.as_text(record)


def test_what_hangs_without_peer_access_too_is_said(monkeypatch):
    monkeypatch.setattr(links, "gpus_shown", lambda: 2)
    with pytest.raises(
        LinksFailed, match=r"it hangs\. With NCCL_P2P_DISABLE=1: No answer .* Look at /dev/shm"
    ):
        look(2, **broken("for good"))


def test_a_rank_that_ends_early_is_quoted():
    with pytest.raises(LinksFailed, match=r"Rank \d ended before `start`: no such driver"):
        measure(2, limits=QUICK, program=(sys.executable, "-c", "import sys; sys.exit('no such driver')"))


def test_the_estimate_takes_what_was_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(links, "gpus_shown", lambda: 2)
    (tmp_path / "links.json").write_text(json.dumps(look(2, **broken("hangs"))))
    found = measured_links(tmp_path / "links.json")
    assert found == {"host_gbs": 12.0, "between_gbs": 6.0, "tflops": 69.0}  # of the slower rank
    assert moving_seconds(35e9, 35e9, Links(**found)) == pytest.approx(35 / 12 + 35 / 6)
    with pytest.raises(FileNotFoundError, match="type `python -m nbutils links` first"):
        measured_links(tmp_path / "none.json")
