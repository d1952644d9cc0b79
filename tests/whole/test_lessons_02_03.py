"""Lessons 02, 02b and 03: what they show is what the package holds, and they notice when their failures are gone."""

import ast
import re
from pathlib import Path

import nbformat
import pytest
import torch.distributed as dist

from nbutils.common.paths import ROOT
from nbutils.launching.launch import LaunchFailed, launch
from nbutils.lessons.intended_failures import LessonObsolete, expect_failure
from nbutils.models.tiny import tiny_base

pytestmark = pytest.mark.filterwarnings("ignore")
LESSON_02 = ROOT / "notebooks" / "02_why_fp32_casting_fails.ipynb"
LESSON_02B = ROOT / "notebooks" / "02b_silent_corruption.ipynb"
LESSON_03 = ROOT / "notebooks" / "03_custom_prep.ipynb"
TAUGHT = re.compile(r"^# taught in notebook (\d\db?)\ndef (\w+)", re.MULTILINE)


def code_cells(notebook: Path) -> list[str]:
    return [cell.source for cell in nbformat.read(notebook, as_version=4).cells if cell.cell_type == "code"]


def meaning(function: ast.FunctionDef) -> str:
    """The syntax tree without docstring and annotations."""
    body = function.body
    if isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
        body = body[1:]
    arguments = function.args
    for argument in arguments.args + arguments.kwonlyargs:
        argument.annotation = None
    return function.name + ast.dump(arguments) + "".join(ast.dump(statement) for statement in body)


def taught_functions() -> list[tuple[Path, str, str]]:
    return [
        (module, number, name)
        for module in sorted((ROOT / "nbutils").rglob("*.py"))
        for number, name in TAUGHT.findall(module.read_text())
    ]


@pytest.mark.parametrize(
    ("module", "number", "name"), taught_functions(), ids=lambda value: str(getattr(value, "name", value))
)
def test_what_a_lesson_teaches_is_what_the_package_holds(module, number, name):
    (notebook,) = (ROOT / "notebooks").glob(f"{number}_*.ipynb")
    shown = [
        function
        for source in code_cells(notebook)
        if f"def {name}(" in source
        for function in ast.parse(source).body
        if isinstance(function, ast.FunctionDef) and function.name == name
    ]
    assert len(shown) == 1, f"{notebook.name} must show {name} exactly once, found {len(shown)}"
    held = next(
        f for f in ast.parse(module.read_text()).body if isinstance(f, ast.FunctionDef) and f.name == name
    )
    assert meaning(shown[0]) == meaning(held)


def test_the_prep_is_among_the_taught_functions():
    assert {"prepare_for_fsdp_qlora", "keep_rotary_frequencies_exact"} <= {
        name for *_, name in taught_functions()
    }


def run_edited(notebook: Path, edits: list[tuple[str, str, str]], tmp_path, monkeypatch) -> None:
    """Run a notebook's cells in this process, without launches and figures; each edited cell must find itself obsolete.

    Args:
        notebook: the lesson.
        edits: (text that marks the cell, what to replace in it, by what).
    """
    monkeypatch.chdir(ROOT)
    namespace = {}
    left = list(edits)
    try:
        for source in code_cells(notebook):
            if not left:
                break
            if any(
                word in source
                for word in (
                    "launch_under(1)",
                    "launch_under(2)",
                    'gather_as("',
                    'launch("nbutils/lessons/adapter',
                    "draw_casts(",
                    "as_told",
                    "counted_step(",
                )
            ):
                continue
            source = source.replace('run_dir: str = ""', f"run_dir: str = {str(tmp_path)!r}")
            for marker, old, new in [edit for edit in left if edit[0] in source]:
                assert old in source, f"the edit {old!r} does not fit the cell any more"
                copied = dict(namespace)
                with pytest.raises(LessonObsolete, match="Lesson obsolete"):
                    exec(source.replace(old, new), copied)
                left.remove((marker, old, new))
            exec(source, namespace)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    assert not left, f"no cell of {notebook.name} holds {left[0][0]!r}"


def test_lesson_02_notices_when_its_causes_are_gone(tmp_path, monkeypatch):
    edits = [
        ("weight does not fit", "adapt(standard_prep(load()))", "adapt(prepare_for_fsdp_qlora(load()))"),
        ("Cannot flatten integer", "(torch.uint8,", "(torch.bfloat16,"),
        ("but got torch.float32 and", "(torch.float32,", "(torch.bfloat16,"),
    ]
    run_edited(LESSON_02, edits, tmp_path, monkeypatch)


def test_lesson_02b_notices_when_its_causes_are_gone(tmp_path, monkeypatch):
    edits = [
        ("no longer casts packed", "if not losses[fp16, bf16] >", "if not losses[fp16, None] >"),
        ("is invalid for input of size", "gather_in=torch.float32", "gather_in=torch.bfloat16"),
    ]
    run_edited(LESSON_02B, edits, tmp_path, monkeypatch)


def test_lesson_03_notices_when_its_causes_are_gone(tmp_path, monkeypatch):
    edits = [
        ("does not require grad", "llama.disable_input_require_grads()", "pass"),
        ("no longer rounds", 'seen["exact frequencies"]', 'seen["nothing"]'),
        ("uniform `requires_grad`", 'cut["the freezing"]', 'cut["nothing"]'),
        ('"mixed dtypes", lines', "standard_prep(load_nf4(base))", "prepare_for_fsdp_qlora(load_nf4(base))"),
    ]
    run_edited(LESSON_03, edits, tmp_path, monkeypatch)


@pytest.mark.launch
def test_the_launched_failure_of_lesson_02_is_real_and_is_missed_when_the_prep_is_right(
    tmp_path, monkeypatch
):
    """The script of the lesson fails as it says; with the cast taken out it trains, and the lesson says so."""
    monkeypatch.chdir(ROOT)
    script = (ROOT / "nbutils/lessons/one_gpu_script.py").read_text()
    standard = (
        'prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})'
    )
    fixed = script.replace(standard, "prepare_for_fsdp_qlora(model)").replace("p.to_local()", "p")
    imported = "from nbutils.training.progress_log"
    fixed = fixed.replace(imported, f"from nbutils.training.prep import prepare_for_fsdp_qlora\n{imported}")
    assert fixed.count("prepare_for_fsdp_qlora") == 2

    def lesson(text: str, name: str):
        path = tmp_path / f"{name}.py"
        path.write_text(text)
        with expect_failure(LaunchFailed, "Must flatten tensors with uniform dtype", lines=0):
            launch(
                path, [str(tiny_base()), str(tmp_path / name)], "configs/accelerate/rehearsal_fsdp1.yaml",
                log=tmp_path / f"{name}.log", rehearsal=True, timeout=200, show=False,
            )  # fmt: skip

    lesson(script, "standard")
    with pytest.raises(LessonObsolete, match="nothing was raised"):
        lesson(fixed, "fixed")
