"""The exercises: what is right passes, what is wrong is told why, and nothing shows what was expected."""

import ast
import re

import nbformat
import pytest
import torch
from peft import prepare_model_for_kbit_training

from nbutils.common.paths import ROOT
from nbutils.launching.config_files import RECIPE, variant
from nbutils.lessons.answers import ANSWERS
from nbutils.lessons.answers_04_to_07 import EXPLAINED
from nbutils.lessons.exercises import check
from nbutils.lessons.judging import READ_AGAIN, digest, hashed, same, shown
from nbutils.lessons.one_process import tiny_in_nf4
from nbutils.planning.model_needs import MODELS

ALL = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
WRAPPED = [("custom", "float16"), ("standard", "float16"), ("standard", "uint8"), ("standard", "float32")]
# number of the exercise: (right, wrong, words of the reason)
ANSWERED = {
    "00.1": (3.725, 7.45, "half"),
    "00.2": (1.01, 0.51, "divided it by the ranks"),
    "00.3": (
        {name for name in MODELS if name not in ("tiny", "llama31_70b")},
        {"llama32_1b", "llama31_8b", "llama31_70b"},
        "llama31_70b once more",
    ),
    "00.4": (0.0, -0.4, "Which setting"),
    "00.5": (1.06, -0.5, "still fell"),
    "01.1": ((9.05, 36.2), (9.05, 9.05), "frees nothing"),
    "01.2": (
        [(131072, 0), (131072, 262144), (131072, 262144)],
        [(131072, 0), (131072, 262144), (131072, 0)],
        "Which line frees it",
    ),
    "01.3": (4, 3, "less room"),
    "01b.1": (
        {"nnodes": "2", "nproc_per_node": "8", "node_rank": "1", "rdzv_endpoint": "10.0.0.1:29500"},
        {"nnodes": "2", "nproc_per_node": "4", "node_rank": "1", "rdzv_endpoint": "10.0.0.1:29500"},
        "all machines together",
    ),
    "01b.2": (21.66, 83.64, "rank 16"),
    "01b.3": ("SHARD_GRAD_OP", "FULL_SHARD", "Which key"),
    "02.1": ("float16 and bfloat16", "bfloat16 and float16", "Which comes first"),
    "02.2": (1.958, 3.916, "the cast adds two"),
    "02.3": (
        {case: case == ("standard", "float32") for case in WRAPPED},
        {case: case[0] == "custom" for case in WRAPPED},
        "dtype of the norms",
    ),
    "02.4": ("wraps", "Must flatten tensors with uniform dtype but got bfloat16 and float32", "are fp32"),
    "02b.1": (0.002, 2.5, "may not cast"),
    "02b.2": (0, 253, "leave alone"),
    "02b.3": ("tuesday", "monday", "Load the base exactly"),
    "03.1": (14, 28, "Look at layer 2"),
    "03.2": (3.086, 12.34, "four ranks share it"),
    "03.3": (True, False, "two dtypes"),
    "03.4": (2370.0, 3981.0, "as much as without"),
    "03.5": (
        {"like ours": True, "frequencies exact": True},
        {"like ours": True, "frequencies exact": False},
        "hides them",
    ),
    "06.1": ((5.936, False), (0.742, True), "does not shard"),
    "06.2": (9216, 10240, "first that does not fit"),
    "06.3": (4096, 5120, "A shorter row"),
    "06.4": ((31, 352), (33, 350), "less than 1 GiB"),
    "04.1": (1120, 560, "an A and a B"),
    "04.2": (True, False, "run.json of this launch"),
    "04.3": (320, 288, "still lose"),
    "04b.1": (100, 150, "it is damaged"),
    "04b.2": ("checkpoint-5", "checkpoint-4", "was it asked"),
    "04b.3": ("checkpoint-4", "checkpoint-6", "did not reach the file"),
    "05.1": ("b", "a", "the names"),
    "05.2": ((True, False), (True, True), "still the same"),
    "05.3": (0.066, 0.02, "Take a larger one"),
    "05.4": (15360, 16384, "was to keep 1"),
    "07.1": ((1, "ValueError"), (0, "RuntimeError"), "somebody is missing"),
    "07.2": (RECIPE, ROOT / "configs/accelerate/no_such_file.yaml", "There is no config file"),
    "07.3": (float("nan"), 1.5, "filters it"),
    "07b.1": ((2, 3), (8, 3), "all machines"),
    "07b.2": (18.75, 2.34, "25/8"),
    "07b.3": (0.598, 2.0, "nothing had to be sent"),
}


JUDGED_BY_RUNNING = {"02.5"}  # its answer is a model: below


def test_every_exercise_is_among_these():
    assert ANSWERED.keys() | JUDGED_BY_RUNNING == ANSWERS.keys()


@pytest.mark.parametrize("number", ANSWERED)
def test_right_passes_and_wrong_is_told_why_without_the_answer(number, capsys):
    right, wrong, reason = ANSWERED[number]
    check(number, right)
    assert "  OK" in capsys.readouterr().out
    with pytest.raises(AssertionError, match=re.escape(reason)) as told:
        check(number, wrong)
    printed = capsys.readouterr().out + str(told.value)
    if isinstance(right, float | int | str) and not isinstance(right, bool) and right not in (0.0, 2):
        assert shown(right) not in printed
    with pytest.raises(AssertionError, match="not answered yet"):
        check(number, (...,) if isinstance(right, tuple) else ...)


def cast_numbers(model):
    for parameter in model.parameters():
        if parameter.dtype == torch.float32:
            parameter.data = parameter.data.bfloat16()
    return model


def cast_packed(model):
    weight = model.model.layers[0].self_attn.q_proj.weight
    weight.data = weight.data.half().bfloat16()
    return cast_numbers(model)


REPAIRS = {
    "the parameters alone": (cast_numbers, ""),
    "all with its method": (lambda model: model.bfloat16(), "rotary frequencies"),
    "nothing": (lambda model: model, "is still float32"),
    "packed bytes too": (cast_packed, "are other bytes now"),
    "nothing returned": (lambda model: None, "must return the model"),
}


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable")  # PEFT's prep calls it
@pytest.mark.parametrize(("repair", "reason"), REPAIRS.values(), ids=REPAIRS.keys())
def test_a_repaired_model_is_looked_at_whole(repair, reason):
    model = prepare_model_for_kbit_training(tiny_in_nf4())
    said = ANSWERS["02.5"](repair(model))
    assert reason in said and bool(said) == bool(reason)


@pytest.mark.parametrize(
    "changes, why",
    [
        ({"fsdp_ofload_params": True}, "Did you mean fsdp_offload_params"),
        ({"fsdp_reshard_after_forward": True}, "belongs to FSDP 2"),
        ({"mixed_precision": "bf16"}, "wanted 'no'"),
        ({"fsdp_offload_params": False}, "no longer offloads"),
        ({"fsdp_sharding_strategy": "SHARD_GRAD_OP"}, "strategy is another one"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_config_that_is_not_what_was_meant_is_told_why(tmp_path, changes, why):
    with pytest.raises(AssertionError, match=re.escape(why)):
        check("07.2", variant(RECIPE, tmp_path, **changes))


@pytest.mark.parametrize(
    "number, wrong, why",
    [
        ("04.3", 352, "none would be with shorter rows"),
        ("04.3", 300, "multiple of 32"),
        ("05.3", 0.2, "Take a smaller one"),
        ("05.3", 6.6, "as a part of the weights' norm"),
        ("05.4", 8192, "1,024 tokens more would fit"),
        ("05.1", "c", "all zero"),
    ],
)
def test_too_much_and_too_little_are_told_apart(number, wrong, why):
    with pytest.raises(AssertionError, match=re.escape(why)):
        check(number, wrong)


def test_an_answer_that_nobody_foresaw_is_sent_back():
    with pytest.raises(AssertionError, match=re.escape(READ_AGAIN)):
        check("00.1", 123.0)
    with pytest.raises(KeyError):
        check("99.1", 1)


def test_what_a_cell_worked_out_is_not_shown_either(capsys):
    check("tensors", 56, 56)
    with pytest.raises(AssertionError) as told:
        check("tensors", 28, 56)
    assert "56" not in str(told.value) + capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize("number", EXPLAINED)
def test_a_right_answer_is_explained_and_a_wrong_one_is_not(number, capsys):
    right, wrong, _ = ANSWERED[number]
    check(number, right)
    assert EXPLAINED[number] in capsys.readouterr().out
    with pytest.raises(AssertionError) as told:
        check(number, wrong)
    assert EXPLAINED[number] not in capsys.readouterr().out + str(told.value)
    assert not [path for path in ALL if EXPLAINED[number].splitlines()[0] in sources_of(path)]


def sources_of(path) -> str:
    return "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells)


def test_a_hash_gives_nothing_away():
    judge = hashed(digest("Rank 1"))
    assert judge(" rank 1 ") == "" and judge("rank 0") == READ_AGAIN
    assert same({"a": 1.0}, {"a": 1.001}) and not same("1", 1) and not same(True, 1)


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_no_check_carries_its_answer(path):
    """An expected value may be a variable that the cell has worked out, and no expression that could be copied."""
    calls = []
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code" and "check(" in cell.source and "# solution begin" in cell.source:
            tree = ast.parse(cell.source)
            calls += [
                n for n in ast.walk(tree) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "check"
            ]
    assert len(calls) >= 3
    for call in calls:
        assert len(call.args) == 2 or isinstance(call.args[2], ast.Name | ast.Call), ast.unparse(call)


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_cells_are_short(path):
    """25 lines at most; a script that is written out whole, and the parameters, may be longer."""
    for cell in nbformat.read(path, as_version=4).cells:
        whole = "%%writefile" in cell.source or "parameters" in cell.metadata.get("tags", [])
        if cell.cell_type == "code" and not whole:
            assert len(cell.source.splitlines()) <= 25, f"cell {cell.id}"
            assert "fmt: skip" not in cell.source and "fmt: off" not in cell.source, f"cell {cell.id}"


def test_a_second_machine_that_knows_no_first_is_told_so():
    given = {"nnodes": "2", "nproc_per_node": "8", "node_rank": "1", "rdzv_endpoint": "None:29500"}
    with pytest.raises(AssertionError, match="Where does the second machine look for the first"):
        check("01b.1", given)
