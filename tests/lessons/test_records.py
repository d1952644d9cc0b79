"""Every record says where it comes from, and what is recorded next will say so in the same words."""

import json
import subprocess
from datetime import date

import psutil
import pytest
from recording import record

from nbutils.common import provenance
from nbutils.common.paths import ROOT
from nbutils.lessons import records as recorded

RESULTS = ROOT / "benchmarks" / "results"
RECORDS = sorted(path for path in RESULTS.rglob("*.json") if path.parent.name != "peaks")


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: str(path.relative_to(RESULTS)))
def test_every_record_says_where_it_comes_from(path):
    report = json.loads(path.read_text())
    assert report["machine"] and report["commit"] and date.fromisoformat(report["date"][:10])
    assert {"torch", "transformers"} <= report["versions"].keys()


def test_a_record_that_is_made_here_has_a_line_for_readers():
    said = provenance.provenance("python x.py")
    assert list(said) == ["machine", "versions", "commit", "date", "command"]
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    if head.returncode == 0:
        assert said["commit"].removesuffix("-dirty") == head.stdout.strip()
    line = recorded.label(said)
    assert said["versions"]["torch"] in line and said["date"] in line and f"commit {said['commit']}" in line
    assert (said["machine"]["gpus"] or [said["machine"]["cpu"]])[0] in line
    assert said["machine"]["host_memory_bytes"] == psutil.virtual_memory().total


def test_a_machine_without_history_is_told_the_commit(tmp_path, monkeypatch):
    assert provenance.provenance("python x.py", "abc1234")["commit"] == "abc1234"
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    assert provenance.provenance("python x.py")["commit"] == "unknown"


def test_a_changed_record_makes_no_tree_dirty_and_changed_code_does(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    record, code = tmp_path / "benchmarks/results/speed.json", tmp_path / "code.py"
    record.parent.mkdir(parents=True)
    git = ["git", "-C", str(tmp_path), "-c", "user.name=Somebody", "-c", "user.email=somebody@example.com"]
    for path in (record, code):
        path.write_text("1")
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *words], check=True)
    record.write_text("2")
    assert not provenance.commit().endswith("-dirty")
    code.write_text("2")
    assert provenance.commit().endswith("-dirty")


def test_a_package_that_is_missing_is_said_to_be():
    found = provenance.versions(["torch", "no_such_package"])
    assert found["no_such_package"] == "not installed" and set(found) == {
        "python",
        "torch",
        "no_such_package",
    }


def test_a_long_test_writes_its_record_only_where_it_is_asked_to(tmp_path, monkeypatch):
    monkeypatch.delenv("RECORD", raising=False)
    record("what was found", "RECORD=FILE pytest", rows=[1])
    monkeypatch.setenv("RECORD", str(tmp_path / "found.json"))
    record("what was found", "RECORD=FILE pytest", rows=[1])
    assert list(tmp_path.iterdir()) == [tmp_path / "found.json"]
    said = json.loads((tmp_path / "found.json").read_text())
    assert (said["what"], said["rows"]) == ("what was found", [1]) and said["machine"]["cpus"]


def test_packed_rows_are_as_fast_as_full_ones_and_the_speed_log_says_what_was_recorded():
    runs = {path.stem: json.loads(path.read_text()) for path in (RESULTS / "chats").glob("*.json")}
    speed = {name: run["measured"]["tokens_per_second"] for name, run in runs.items()}
    assert runs["chats_80_grouped"]["outcome"] == runs["chats_80_grouped"]["predicted"]["outcome"] == "oom"
    assert speed["chats_80_packed"] / speed["chats_80_as_they_come"] == pytest.approx(3.9, abs=0.05)
    for layers in (12, 80):
        assert speed[f"chats_{layers}_packed"] > 0.9 * speed[f"chats_{layers}_full_rows"]
    assert speed["chats_12_packed"] > 5 * speed["chats_12_as_they_come"]
    for name in ("chats_12_packed", "chats_80_packed"):
        measured = runs[name]["measured"]
        assert measured["gpu_peak_bytes"] == pytest.approx(
            runs[name]["predicted"]["gpu_peak_bytes"], rel=0.05
        )
        assert len(set(measured["compiled_graphs"])) == 1  # none after the first step
    lines = [line for line in (ROOT / "docs/speed_log.md").read_text().splitlines() if "`chats_" in line]
    assert len(lines) == len(runs)
    for line in lines:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        found = speed[cells[6].strip("`")]
        assert cells[3] == (f"{found:,.0f}" if found else "-")
