"""What the doctor says of measured links: a setting that is needed, no peer access, a host link that decides."""

import json

import pytest

from nbutils.planning import links
from nbutils.planning.check import FAIL, OK, WARN
from nbutils.planning.link_checks import check_links
from nbutils.planning.model_needs import MODELS

BIG = MODELS["llama31_70b"]
CARD = "NVIDIA GeForce RTX 4090"
GPUS = [{"index": index, "name": CARD, "gib": 24.0, "capability": 8.9} for index in range(2)]


def record(host: float = 25.0, between: float = 20.0, peers: bool = False, **more) -> dict:
    ranks = [
        {"device": CARD, "peers": [1 - rank] if peers else [], "host_to_device_gbs": host + rank, "tflops": 150.0,
         "between_gbs": between + rank}
        for rank in range(2)
    ]  # fmt: skip
    return {"ranks": ranks, "settings": {}, "failed": None, "advice": ""} | more


def said(tmp_path, content, gpus=GPUS, model=BIG) -> dict:
    file = tmp_path / "links.json"
    if content is not None:
        file.write_text(content if isinstance(content, str) else json.dumps(content))
    return {check.what: check for check in check_links(model, gpus, file)}


def test_links_that_were_not_measured_are_asked_for(tmp_path):
    (check,) = said(tmp_path, None).values()
    assert check.verdict == WARN and "python -m nbutils links" in check.fix
    assert said(tmp_path, None, GPUS[:1]) == said(tmp_path, None, model=MODELS["tiny"]) == {}


@pytest.mark.parametrize("content", ["{", "{}", "[]", '{"ranks": []}'])
def test_a_damaged_record_is_measured_again(tmp_path, content):
    (check,) = said(tmp_path, content).values()
    assert (check.verdict, check.found) == (WARN, "links.json cannot be read")


def test_a_record_of_other_gpus_does_not_count(tmp_path):
    (check,) = said(tmp_path, record(), [gpu | {"name": "NVIDIA GeForce RTX 3090"} for gpu in GPUS]).values()
    assert check.verdict == WARN and f"measured on 2 x {CARD}" in check.found


def test_a_hang_fails_with_its_cure_until_the_setting_is_there(tmp_path):
    hung = record(settings=links.WITHOUT_PEERS, failed="It hangs.", advice=links.CURE)
    check = said(tmp_path, hung)["GPU to GPU"]
    assert check.verdict == FAIL and "NCCL_P2P_DISABLE=1" in check.found and check.fix == links.CURE


def test_no_peer_access_is_said_and_is_no_fault(tmp_path):
    with_peers, without = (said(tmp_path, record(peers=peers))["GPU to GPU"] for peers in (True, False))
    assert with_peers.verdict == without.verdict == OK
    assert "20.0 GB/s" in without.found and "no peer access" in without.found
    assert with_peers.found.endswith("with peer access")


def test_a_slow_host_link_is_told_with_what_to_do(tmp_path):
    wide, narrow = (said(tmp_path, record(host=host, between=host))["host to GPU"] for host in (25.0, 1.0))
    assert wide.verdict == OK and "25.0 GB/s" in wide.found
    assert narrow.verdict == WARN and "rows a step" in narrow.fix


def test_a_measurement_with_peer_access_switched_off_says_so(tmp_path, monkeypatch):
    check = said(tmp_path, record(peers=True, without_peers=True))["GPU to GPU"]
    assert check.verdict == OK and "through host memory, as NCCL_P2P_DISABLE=1 was set" in check.found
    two = [{"device": CARD, "peers": [1 - rank]} for rank in range(2)]
    assert "needs no setting" in links.advice(two)
    monkeypatch.setenv("NCCL_P2P_DISABLE", "1")
    assert "went through host memory" in links.advice(two)
