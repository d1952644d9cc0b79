"""Records hold what a lesson reads: the form of `config_keys_*` that is kept, and the size of every record."""

import json
import sys

import pytest

from nbutils.common.paths import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
from slim_config_keys import as_text, slim

RESULTS = ROOT / "benchmarks/results"
UNIT = {"shard": 1, "gathered": 0, "full": 2, "dtype": "bfloat16", "device": "cuda", "trained": False}
VARIANT = {"keys": {}, "units": {"root": UNIT}, "events": [["gather", "root", 2]], "moved": {"gather": 2}}
LONG = {
    "what": "keys",
    "world_size": 2,
    "ranks": [
        {
            "variants": {"FULL_SHARD": VARIANT, "sync": {"keys": {}, "error": 'a "b"\nc'}, "orig": VARIANT},
            "sync": [1],
        },
        {"variants": {"FULL_SHARD": {"keys": {}, "loss": 1.5}}},
    ],
}


def test_events_go_and_of_a_unit_two_facts_stay():
    kept = slim(LONG)
    first = kept["ranks"][0]["variants"]
    assert first["FULL_SHARD"] == {
        "keys": {}, "units": {"root": {"full": 2, "device": "cuda"}}, "moved": {"gather": 2}
    }  # fmt: skip
    assert first["orig"] == {"keys": {}, "moved": {"gather": 2}}  # no lesson asks for its units
    assert first["sync"] == LONG["ranks"][0]["variants"]["sync"]
    assert kept["ranks"][1] == LONG["ranks"][1] and kept["ranks"][0]["sync"] == [1]
    assert slim(kept) == kept


@pytest.mark.parametrize("report", [LONG, slim(LONG)])
def test_the_text_is_the_report_with_a_variant_a_line(report):
    text = as_text(report)
    assert json.loads(text) == report
    assert len(text.splitlines()) < 25


@pytest.mark.parametrize("name", ["config_keys_2gpu", "config_keys_4gpu"])
def test_the_recorded_keys_are_in_the_slim_form(name):
    text = (RESULTS / f"{name}.json").read_text(encoding="utf-8")
    report = json.loads(text)
    assert slim(report) == report and as_text(report) == text


def test_no_record_is_longer_than_a_reader_could_scroll():
    lines = {
        file.name: len(file.read_text(encoding="utf-8").splitlines()) for file in RESULTS.rglob("*.json")
    }
    assert max(lines.values()) < 1000, max(lines, key=lines.get)
