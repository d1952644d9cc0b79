"""The workshop: editions made from one master, an archive that is the same twice, plans whose minutes add up."""

import re
import zipfile

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from nbutils.common.paths import ROOT
from nbutils.lessons.course_map import LESSONS
from nbutils.publishing import workshop as editions
from nbutils.publishing import workshop_proof as proving
from nbutils.publishing.solution_names import uses_of_solutions

MASTERS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
EXERCISE = (
    "import math\n\nroot = ...\n# solution begin\nroot = math.sqrt(4)\n# solution end\nassert root == 2"
)


def master(*sources):
    notebook = new_notebook(cells=[new_markdown_cell("# A title"), *map(new_code_cell, sources)])
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return notebook


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    out = tmp_path_factory.mktemp("workshop")
    return out, editions.build(out)


def test_a_solution_becomes_a_line_that_raises_and_the_rest_stays():
    (cell,) = editions.student(master(EXERCISE)).cells[1:]
    head, raises, tail = cell.source.partition(cell.source.splitlines()[3])
    assert head == "import math\n\nroot = ...\n" and tail == "\nassert root == 2"
    assert raises.startswith('raise NotImplementedError("Exercise 1: put your answer where the `...` stands')
    compile(cell.source, "cell", "exec")


def test_a_solution_inside_a_function_keeps_its_indentation():
    source = "def double(x):\n    # solution begin\n    return 2 * x\n    # solution end\n\n\ndouble(2)"
    (cell,) = editions.student(master(source)).cells[1:]
    assert cell.source.startswith("def double(x):\n    raise NotImplementedError(")
    compile(cell.source, "cell", "exec")


BAD_MARKS = {
    "no end": "# solution begin\nx = 1",
    "no begin": "x = 1\n# solution end",
    "two in a cell": EXERCISE + "\n" + EXERCISE,
    "the wrong order": "# solution end\nx = 1\n# solution begin",
    "indented otherwise": "if True:\n    # solution begin\n    x = 1\n# solution end",
}


@pytest.mark.parametrize("source", BAD_MARKS.values(), ids=BAD_MARKS.keys())
def test_marks_that_do_not_pair_are_refused(source):
    with pytest.raises(editions.BadMaster, match="wanted one of each"):
        editions.student(master(source))


FUNCTION = "def double(x):\n    # solution begin\n    return 2 * x\n    # solution end\n\n\ndouble(2)"
NEEDS_A_SOLUTION = {
    "a value": ([EXERCISE, "root + 1"], "root"),
    "a value in a function": ([EXERCISE, "def more():\n    return root + 1"], "root"),
    "a new name": (["# solution begin\nimport math\n# solution end", "math.pi"], "math"),
    "a function": ([FUNCTION, "double(3)"], "double"),
    "after a function that has such a name of its own": (
        [EXERCISE, "def f(root):\n    return root", "root"],
        "root",
    ),
    "an exercise, before it raises": ([EXERCISE, "root + 1\n" + FUNCTION], "root"),
}


@pytest.mark.parametrize("sources, name", NEEDS_A_SOLUTION.values(), ids=NEEDS_A_SOLUTION.keys())
def test_a_cell_that_needs_a_solution_is_found_without_running_it(sources, name):
    notebook = master(*sources)
    first, *_, second = (cell.id for cell in notebook.cells[1:])
    assert uses_of_solutions(notebook, editions.student(notebook)) == [(second, name, first)]


@pytest.mark.parametrize(
    "later",
    [
        "root = 1\nroot + 1",
        "print(math.pi)",
        EXERCISE.replace("math.sqrt(4)", "root"),
        "%%writefile x\nroot +",
    ],
)
def test_a_cell_that_needs_no_solution_passes(later):
    notebook = master(EXERCISE, later)
    assert not uses_of_solutions(notebook, editions.student(notebook))


def test_a_master_whose_cells_need_a_solution_makes_no_workshop(tmp_path, monkeypatch):
    monkeypatch.setattr(editions, "teachers_notes", lambda: {"00_first": "notes"})
    nbformat.write(master(EXERCISE, "root + 1"), tmp_path / "00_first.ipynb")
    with pytest.raises(editions.BadMaster, match=r"uses `root`, which only the solution in cell .* makes"):
        editions.build(tmp_path / "out", tmp_path)


@pytest.mark.parametrize("path", MASTERS, ids=lambda path: path.stem)
def test_each_notebook_has_exercises_that_are_solved(path):
    notebook = nbformat.read(path, as_version=4)
    declared = editions.exercises(notebook)
    assert len(declared) >= 3
    for cell in notebook.cells:
        if cell.id in declared:
            stub = cell.source.partition(editions.BEGIN)[0]
            assert re.search(r"= \.\.\.|: \.\.\.|^ +\.\.\.", stub, re.MULTILINE), cell.id
            assert "check(" in cell.source.partition(editions.END)[2], cell.id
            assert "  OK\n" in "".join(output.get("text", "") for output in cell.outputs)


@pytest.mark.parametrize("path", MASTERS, ids=lambda path: path.stem)
def test_the_student_edition_holds_no_output_and_no_solution(path, built):
    shown = nbformat.read(built[0] / "student" / path.name, as_version=4)
    source = nbformat.read(path, as_version=4)
    assert built[1][path.stem] == sum("raise NotImplementedError" in cell.source for cell in shown.cells) > 0
    for cell, original in zip(shown.cells, source.cells, strict=True):
        assert not cell.get("outputs") and cell.get("execution_count") is None
        if editions.BEGIN in original.source:
            solution = original.source.partition(editions.BEGIN)[2].partition(editions.END)[0].strip()
            assert solution not in cell.source.partition("check(")[0]  # the checker may know the answer
        else:
            assert cell.source == original.source
    assert "For the teacher" not in "".join(cell.source for cell in shown.cells)


@pytest.mark.parametrize("path", MASTERS, ids=lambda path: path.stem)
def test_the_solutions_edition_is_the_master_and_a_note(path, built):
    shown = nbformat.read(built[0] / "solutions" / path.name, as_version=4)
    note = shown.cells.pop(1)
    assert shown.cells == nbformat.read(path, as_version=4).cells  # so one run proves both
    for part in ("**Timing.**", "**What people get wrong.**", "**If a machine fails.**"):
        assert part in note.source


def test_a_notebook_without_notes_is_refused(tmp_path):
    nbformat.write(master(EXERCISE), tmp_path / "42_unknown.ipynb")
    with pytest.raises(editions.BadMaster, match="no section `## 42_unknown`"):
        editions.build(tmp_path / "out", tmp_path)


def test_the_archive_is_the_same_twice_and_holds_what_it_needs(built):
    out, _ = built
    archive = out / f"{editions.NAME}.zip"
    first = archive.read_bytes()
    editions.pack(archive, out / "student")
    assert archive.read_bytes() == first
    names = {
        name.removeprefix(f"{editions.NAME}/"): zipfile.ZipFile(archive).read(name)
        for name in zipfile.ZipFile(archive).namelist()
    }
    wanted = {"Makefile", "START.txt", "nbutils/common/paths.py", "configs/accelerate/config_fsdp.yaml"}
    wanted |= {"CONTRIBUTING.md", "docs/conf.py", "docs/site.css"}  # for `make site`
    wanted |= {f"notebooks/{path.name}" for path in MASTERS}
    assert wanted <= names.keys()
    assert not [name for name in names if name.startswith(("tests/", "runs/", ".")) or "teachers" in name]
    for path in MASTERS:
        assert names[f"notebooks/{path.name}"] == (out / "student" / path.name).read_bytes()


def test_only_the_tiny_base_goes_along_with_the_proof(tmp_path, monkeypatch):
    for name, file in (("tiny-1", "tiny.json"), ("tiny-1.7.part", "half"), ("nf4-70b", "model.safetensors")):
        (tmp_path / "runs/cache" / name).mkdir(parents=True)
        (tmp_path / "runs/cache" / name / file).touch()
    monkeypatch.setattr(proving, "ROOT", tmp_path)
    proving.copy_tiny_bases(tmp_path / "tree")
    assert [path.name for path in (tmp_path / "tree/runs/cache").iterdir()] == ["tiny-1"]


@pytest.mark.notebook
def test_a_run_finds_each_cell_that_fails_and_should_not(tmp_path):
    """A cell that needs a solution, an exercise that raises something else, and one that raises nothing."""
    sources = [
        EXERCISE,
        "root + 1",
        "1 / 0\n# solution begin\nx = 1\n# solution end",
        "# solution begin\nx = 1\n# solution end",
        "print('to the end')",
    ]
    notebook = master(*sources)
    notebook.cells.insert(1, new_code_cell("x: int = 0  # a number", metadata={"tags": ["parameters"]}))
    ids = [cell.id for cell in notebook.cells[2:]]
    path = tmp_path / "00_first.ipynb"
    shown = editions.student(notebook)
    shown.cells[-2].source = "x = 1"
    nbformat.write(shown, path)
    (tmp_path / "runs").mkdir()
    executed = proving.run_through(path, tmp_path)
    assert executed.cells[-1].outputs[0].text == "to the end\n"
    assert proving.compare(editions.exercises(notebook), proving.failing_cells(executed)) == [
        f"exercise {ids[3]} raises nothing",
        f"cell {ids[1]} is no exercise and raises TypeError",
        f"exercise {ids[2]} raises ZeroDivisionError, not NotImplementedError",
    ]


# ---- the plan of the day --------------------------------------------------------------------------------------------

PLAN = (ROOT / "docs/workshop.md").read_text(encoding="utf-8")
ROW = re.compile(r"^\| (\d\d):(\d\d) \| (\d+) \| (.*?) \| (\d\db?)? ?\|$", re.MULTILINE)
ROOMS = re.split(r"^## (A room .*)\n", PLAN, flags=re.MULTILINE)[1:]


@pytest.mark.parametrize("room, text", list(zip(ROOMS[::2], ROOMS[1::2])), ids=ROOMS[::2])
def test_the_minutes_of_the_plan_add_up(room, text):
    rows = ROW.findall(text)
    assert len(rows) == len(re.findall(r"^\| \d", text, re.MULTILINE)) >= 8
    clock = 9 * 60
    for hour, minute, minutes, what, _ in rows:
        assert int(hour) * 60 + int(minute) == clock, what
        clock += int(minutes)
    (together,) = re.findall(r"^Together (\d+) minutes\.$", text, re.MULTILINE)
    assert clock - 9 * 60 == int(together) == 240


def test_there_is_a_plan_for_each_kind_of_room():
    assert ROOMS[::2] == ["A room without GPUs", "A room with one shared machine of two GPUs"]


@pytest.mark.parametrize("text", ROOMS[1::2], ids=ROOMS[::2])
def test_the_plan_leaves_time_to_run_each_notebook_and_names_exercises_that_exist(text, built):
    given, lessons = {}, {lesson.number: lesson for lesson in LESSONS}
    for _, _, minutes, what, number in ROW.findall(text):
        if not number:
            continue
        given[number] = given.get(number, 0) + int(minutes)
        last = re.search(r"exercises? (?:\d(?: to | and ))?(\d)", what)
        if last:
            assert int(last[1]) <= built[1][lessons[number].name], what
    assert {f"{n:02d}" for n in range(5)} <= given.keys()
    for number, minutes in given.items():
        assert minutes > lessons[number].run, number
