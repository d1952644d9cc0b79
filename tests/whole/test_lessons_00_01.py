"""Lessons 00, 01 and 01b: they cover every key, they run, and what they say is what was measured."""

import math
import os
import re

import nbformat
import pytest

from nbutils.common.paths import ROOT
from nbutils.launching import config_files as configs
from nbutils.launching.config_faults import refuse_bad_config
from nbutils.launching.launch import choose_config
from nbutils.lessons import records as recorded
from nbutils.lessons.choice_figure import QUESTIONS
from nbutils.lessons.config_at_70b import four_ways, gradient_ratio, strategies, wrap_policies
from nbutils.lessons.config_keys import measure
from nbutils.lessons.course_map import LESSONS
from nbutils.planning.shapes import Shape, shape_of

START, DECIDE, OTHERS = (
    ROOT / f"notebooks/{name}.ipynb"
    for name in ("00_start_here", "01_fsdp_config_choices", "01b_every_other_key")
)
FIVE = {
    ("fsdp_sharding_strategy", "fsdp_reshard_after_forward"),
    ("fsdp_auto_wrap_policy",),
    ("fsdp_offload_params",),
    ("fsdp_version",),
    ("mixed_precision",),
}
PARTS = ("**Question.**", "**Measurement.**", "**Change it")


def sections(path) -> dict[tuple[str, ...], list]:
    """The sections of a lesson that are about keys: (keys of the heading) -> [(kind, text), ...]."""
    found, keys = {}, None
    for cell in nbformat.read(path, as_version=4).cells:
        pieces = (
            re.split(r"^(#+ .*)$", cell.source, flags=re.MULTILINE)
            if cell.cell_type == "markdown"
            else [cell.source]
        )
        for piece in pieces:
            if cell.cell_type == "markdown" and re.match(r"#+ ", piece):
                keys = tuple(re.findall(r"`([a-z0-9_]+)`", piece)) if piece.startswith("### ") else None
                if keys:
                    found[keys] = []
            elif keys:
                found[keys].append((cell.cell_type, piece))
    return found


def test_the_keys_of_the_lessons_are_the_keys_of_the_files():
    explained = [key for path in (DECIDE, OTHERS) for keys in sections(path) for key in keys]
    in_files = set()
    for file in (ROOT / "configs/accelerate").glob("*.yaml"):
        in_files |= configs.flat_keys(file).keys()
    assert sorted(explained) == sorted(in_files)  # both ways, and no key twice


def test_lesson_01_has_the_five_keys_that_decide_each_with_a_column_for_the_70b():
    found = sections(DECIDE)
    assert found.keys() == FIVE
    for keys, pieces in found.items():
        assert any("70B" in text for kind, text in pieces if kind == "code"), keys


def test_each_key_comes_as_question_measurement_and_when_to_change_it():
    for keys, pieces in (sections(DECIDE) | sections(OTHERS)).items():
        text = "\n".join(piece for kind, piece in pieces if kind == "markdown")
        assert [part for part in PARTS if part in text] == list(PARTS), keys
        assert any(kind == "code" for kind, _ in pieces), f"{keys}: nothing is measured"


@pytest.mark.parametrize("notebook", [START, DECIDE, OTHERS], ids=lambda path: path.stem)
def test_exercises_come_as_stub_solution_and_check(notebook):
    cells = [c.source for c in nbformat.read(notebook, as_version=4).cells if "# solution begin" in c.source]
    assert len(cells) >= 3
    for source in cells:
        stub = source[: source.index("# solution begin")]
        assert re.search(r"= \.\.\.", stub), "the stub has nothing to fill in"
        assert source.index("# solution begin") < source.index("# solution end") < source.index("check(")


def test_the_map_names_every_notebook():
    assert [lesson.number for lesson in LESSONS if "b" not in lesson.number] == [f"{n:02d}" for n in range(8)]
    there = {path.stem for path in (ROOT / "notebooks").glob("[0-9]*.ipynb")}
    assert there <= {lesson.name for lesson in LESSONS}


TIMES = re.compile(
    r"\*Time: tiny run (\d+) (second|minute)s? · reading (\d+) minutes · exercises (\d+) minutes"
)


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda lesson: lesson.name)
def test_a_notebook_begins_with_the_minutes_of_the_map(lesson):
    path = ROOT / "notebooks" / f"{lesson.name}.ipynb"
    if not path.exists():
        pytest.skip("not written yet")
    run, unit, reading, exercises = TIMES.search(nbformat.read(path, as_version=4).cells[0].source).groups()
    minutes = math.ceil(int(run) / (60 if unit == "second" else 1))
    assert (minutes, int(reading), int(exercises)) == (lesson.run, lesson.reading, lesson.exercises)


def test_three_questions_lead_to_files_that_exist_and_to_the_memory_that_is_planned(monkeypatch):
    monkeypatch.chdir(ROOT)
    named = {
        name
        for answers in QUESTIONS.values()
        for _, then in answers
        for name in re.findall(r"\w+\.yaml", then)
    }
    assert named <= {path.name for path in (ROOT / "configs").rglob("*.yaml")} and len(named) == 5
    host = {
        (version, offload): float(gib) for version, offload, *_, gib, _ in four_ways(shape_of("llama31_70b"))
    }
    assert max(host.values()) < 64 and host["2", "no"] < host["2", "yes"] < host["1", "yes"]


def test_a_result_that_is_not_recorded_is_said_to_be_missing():
    assert recorded.load("nothing_of_this_name") is None
    assert "not recorded" in recorded.label(None)


@pytest.mark.parametrize("name", ["config_keys_2gpu", "config_keys_4gpu"])
def test_recorded_results_say_where_they_come_from(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    report = recorded.load(name)
    if report is None:
        pytest.skip(f"{name} has not been recorded yet")
    assert report["machine"]["gpus"] and report["machine"]["driver"]
    assert {"torch", "accelerate", "peft"} <= report["versions"].keys()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", report["date"]) and report["commit"] and report["command"]
    for variant in ("FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD", "offload", "NO_PREFETCH", "fsdp2 reshard"):
        assert "error" not in report["ranks"][0]["variants"][variant], variant
    assert "/" not in recorded.label(report)


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """What lessons 01 and 01b say as committed, and their measurement, made here as on a machine with one GPU.

    All printed text, and the measurement of each rank. `refresh --check` executes both lessons and compares the text.
    """
    cells = [cell for path in (DECIDE, OTHERS) for cell in nbformat.read(path, as_version=4).cells]
    printed = [o.get("text", "") for c in cells if c.cell_type == "code" for o in c.outputs]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr("torch.cuda.device_count", lambda: int(os.environ.get("CUDA_VISIBLE_DEVICES") != ""))
        report = measure(tmp_path_factory.mktemp("lesson01"), num_processes=1)
    return "\n".join(printed), report["ranks"]


@pytest.mark.ci
@pytest.mark.launch
class TestLesson01:
    """What the two lessons say, held against what their measurement sees, as if the machine had one GPU."""

    def test_its_exercises_are_solved(self, executed):
        assert executed[0].count("  OK") == 6

    def test_a_layer_by_hand_is_gathered_and_freed(self, executed):
        rows = re.findall(r"rank [01]  (before|gathered: compute|freed) +(\d+) +(\d+)", executed[0])
        each = [("before", "128", "0"), ("gathered: compute", "128", "256"), ("freed", "128", "0")]
        assert rows[:6] == each * 2

    def test_a_machine_with_one_gpu_may_launch_two_ranks_on_its_cpu(self):
        """The other launches of the lessons: the layer by hand, and the question for the type."""
        for number in (2, None):
            refuse_bad_config(choose_config(1, rehearsal=True), number, 1)

    def test_it_measures_two_ranks_on_any_machine(self, executed):
        assert len(executed[1]) == 2
        assert "measured here: 2 ranks on cpu" in executed[0]

    def test_it_was_real_fsdp(self, executed):
        for variant in executed[1][0]["variants"].values():
            assert "error" in variant or variant["distributed_type"] == "FSDP"

    def test_strategies_keep_and_hold_what_the_lesson_says(self, executed):
        v = executed[1][0]["variants"]
        full = sum(unit["full"] for unit in v["FULL_SHARD"]["units"].values())
        assert v["FULL_SHARD"]["resident_after_wrapping"]["shard"] * 2 == pytest.approx(full, rel=0.01)
        assert v["NO_SHARD"]["resident_after_wrapping"]["shard"] == full
        assert v["SHARD_GRAD_OP"]["resident_after_forward"]["gathered"] == pytest.approx(full, rel=0.01)
        root = v["FULL_SHARD"]["units"]["root"]["full"]
        assert v["FULL_SHARD"]["resident_after_forward"]["gathered"] == pytest.approx(root, rel=0.01)
        moved = {name: sum(v[name]["moved"].values()) for name in ("FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD")}
        assert moved["FULL_SHARD"] > moved["SHARD_GRAD_OP"] > moved["NO_SHARD"] > 0

    def test_the_arithmetic_for_70b_is_that_of_the_measured_bytes(self, executed):
        """Same functions, the shape that was measured: every byte agrees, with activation checkpoints and without."""
        v = executed[1][0]["variants"]
        measured = Shape("measured", 4, 128, 256, 8, 4, 16, 512)
        for checkpoints, suffix in ((False, ""), (True, ", checkpoints")):
            for name, computed in strategies(measured, 2, 8, checkpoints).items():
                if (seen := v.get(name + suffix)) is None:
                    assert name == "NO_SHARD"
                    continue
                assert seen["resident_after_wrapping"]["shard"] == computed.kept, name
                assert seen["resident_after_forward"]["gathered"] == computed.held, name
                assert sum(seen["moved"].values()) == computed.moved, name
        for name, computed in wrap_policies(measured, 2, 8).items():
            seen = v[name]["units"], v[name]["gathers"]["largest"], v[name]["moved"]["reduce_scatter"]
            assert (len(seen[0]), *seen[1:]) == (computed.units, computed.largest, computed.gradients), name
        own, shared = (v[name]["moved"]["reduce_scatter"] for name in ("FULL_SHARD", "file policy, orig"))
        assert gradient_ratio(measured, 8) == pytest.approx(shared / own, rel=1e-3)

    def test_checkpoints_gather_the_adapter_once_more_under_fsdp1(self, executed):
        v = executed[1][0]["variants"]
        counts = {name: v[name]["gathers"]["count"] for name in v if "gathers" in v[name]}
        assert (counts["FULL_SHARD"], counts["FULL_SHARD, checkpoints"]) == (121, 173)
        assert counts["fsdp2 reshard"] == counts["fsdp2 reshard, checkpoints"]
        assert "47% less than FULL_SHARD at 70B" in executed[0]

    def test_hybrid_shards_among_the_ranks_of_a_machine(self, executed):
        v = executed[1][0]["variants"]
        assert v["HYBRID_SHARD"]["resident_after_wrapping"] == v["FULL_SHARD"]["resident_after_wrapping"]

    def test_hybrid_with_one_device_sums_no_gradients(self, executed):
        for rank in executed[1]:
            one = rank["one device a machine"]
            assert (
                one["HYBRID_SHARD"]["resident_after_wrapping"] == one["NO_SHARD"]["resident_after_wrapping"]
            )
            assert one["HYBRID_SHARD"]["gradients"] == one["NO_SHARD"]["gradients"] > 0
            assert one["NO_SHARD"]["gradients_agree"] and not one["HYBRID_SHARD"]["gradients_agree"]

    def test_the_file_policy_needs_original_parameters_and_moves_more(self, executed):
        v = executed[1][0]["variants"]
        assert "uniform `requires_grad`" in v["file policy, flat"]["error"]
        assert (
            v["file policy, orig"]["moved"]["reduce_scatter"] > 3 * v["FULL_SHARD"]["moved"]["reduce_scatter"]
        )

    def test_only_whole_layer_units_fetch_the_next_layer_early(self, executed):
        def order(name):
            kinds = [(e[0], e[1]) for e in executed[1][0]["variants"][name]["events"]]
            return kinds.index(("backward", "layers.3")), max(
                i for i, kind in enumerate(kinds) if kind == ("gather", "layers.2")
            )

        for name in ("file policy, orig", "fsdp2 reshard"):
            computed, fetched = order(name)
            assert fetched < computed, name
        for name in ("FULL_SHARD", "NO_PREFETCH"):
            computed, fetched = order(name)
            assert fetched > computed, name

    def test_without_sync_the_adapter_is_a_patchwork(self, executed):
        for rank in executed[1]:
            seen = rank["sync_module_states"]["False"]
            assert 0.4 < seen["equal_to_own_start"] < 0.6
            assert 0.4 < seen["equal_to_rank0_start"] < 0.6

    def test_the_loading_key_spares_nothing(self, executed):
        seen = executed[1][1]["cpu_ram_efficient_loading"]["NF4, key on"]
        assert seen["bytes_equal_to_rank0"] == seen["bytes"] > 0

    def test_fsdp1_rounds_rotary_frequencies_and_fsdp2_does_not(self, executed):
        v = executed[1][0]["variants"]
        assert v["FULL_SHARD"]["inv_freq"]["after"] != v["FULL_SHARD"]["inv_freq"]["before"]
        for name in ("fsdp2 reshard", "no policy of precision"):
            assert v[name]["inv_freq"]["after"] == v[name]["inv_freq"]["before"]
        assert v["mixed bf16"]["gradient_dtypes"] == ["float32"]

    def test_the_adapter_is_missing_from_a_checkpoint_of_fsdp1(self, executed):
        files = executed[1][0]["state_dict_type"]["fsdp1 SHARDED_STATE_DICT"]["adapter only"]
        assert [size for name, size in files.items() if name.endswith(".distcp")] == [0, 0]
        whole = executed[1][0]["state_dict_type"]["fsdp2 SHARDED_STATE_DICT"]["adapter only"]
        assert all(size > 0 for size in whole.values())

    def test_it_shows_the_traps(self, executed):
        text = executed[0]
        assert "same plugin: True" in text
        assert "asked for SHARD_GRAD_OP, got FULL_SHARD" in text
        assert "plain accelerate launch on CPUs: MULTI_CPU" in text


def test_lesson_00_trained_and_held_the_machine_against_the_model():
    """What it says as committed; `refresh --check` executes it again and compares."""
    cells = nbformat.read(START, as_version=4).cells
    text = "\n".join(o.get("text", "") for c in cells if c.cell_type == "code" for o in c.outputs)
    assert "checked for: tiny" in text and "FAIL on" in text
    assert text.count("  OK") == 5
    assert "it was FSDP, version 1, on 2 ranks" in text
    before, after = re.search(r"held-out loss ([\d.]+) -> ([\d.]+)", text).groups()
    assert float(after) < float(before) - 0.1
    assert re.search(r"together +29\.2", text)  # the sum of the parts above it
