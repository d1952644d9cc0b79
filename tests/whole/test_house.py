"""The house: imports go down and in no circle, what is private stays in its room, and each file can be read at once."""

import ast
import json
import os
import re
import runpy
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from nbutils.common.paths import ROOT
from nbutils.planning.run_setup import LORA_RANK

MODULES = sorted((ROOT / "nbutils").rglob("*.py"))
MODULE_LINES, FUNCTION_LINES, MEDIAN_FUNCTION = 300, 50, 12
# Where an attribute of somebody else's object may be assigned, besides the files in nbutils/patches.
CHANGES_OTHERS = ("launching/rehearsal.py", "launching/measured_run.py")


def lint_imports(folder: Path) -> subprocess.CompletedProcess:
    """Run import-linter over the `nbutils` of a folder."""
    words = [
        sys.executable,
        "-c",
        "from importlinter.cli import lint_imports_command as lint; lint()",
        "--no-cache",
    ]
    alone = {**os.environ, "PYTHONPATH": str(folder)}
    return subprocess.run(words, cwd=folder, env=alone, capture_output=True, text=True)


def test_imports_go_down_and_in_no_circle():
    done = lint_imports(ROOT)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("file", "line", "contract"),
    [
        ("common/disk.py", "from nbutils.models.nf4 import write_nf4", "imports go down, room by room"),
        (
            "common/disk.py",
            "def late():\n    import nbutils.common.paths\n",
            "no circles, late imports included",
        ),
        (
            "launching/launch.py",
            "import nbutils.training.prep",
            "launching stays light: it never imports training",
        ),
        (
            "adapters/save.py",
            "import nbutils.patches.fsdp2_gather",
            "patches are applied by training and the rehearsal alone",
        ),
    ],
)
def test_a_forbidden_import_is_found(tmp_path, file, line, contract):
    shutil.copytree(ROOT / "nbutils", tmp_path / "nbutils", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    changed = tmp_path / "nbutils" / file
    changed.write_text(f"{changed.read_text()}\n{line}\n")
    other_way = tmp_path / "nbutils/common/paths.py"  # makes a circle of the second case
    other_way.write_text(f"{other_way.read_text()}\nimport nbutils.common.disk\n")
    done = lint_imports(tmp_path)
    assert done.returncode == 1
    assert f"{contract} BROKEN" in " ".join(done.stdout.split())


def test_the_launcher_is_light():
    """A launch and its checks start at once: what takes seconds to import is imported by the ranks."""
    code = (
        "import sys, nbutils.__main__, nbutils.launching.launch\n"
        "sys.exit(', '.join({'torch', 'transformers', 'accelerate', 'datasets', 'trl'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr == ""


def test_the_map_of_the_house_is_that_of_the_code():
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert runpy.run_path(str(ROOT / "docs/house_map.py"))["redrawn"](page) == page, (
        "python docs/house_map.py"
    )


def test_readme_names_every_room():
    tree = (ROOT / "README.md").read_text(encoding="utf-8").partition("## The tree")[2].partition("\n## ")[0]
    rooms = {path.parent.name for path in (ROOT / "nbutils").glob("*/__init__.py")}
    assert set(re.findall(r"^ {6}(\w+)/", tree, re.MULTILINE)) == rooms


def test_every_suite_that_contributing_names_exists():
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = re.findall(r"`(tests/[\w./*]+)`", page)
    assert [name for name in named if not list(ROOT.glob(name))] == []


# ---------------------------------------------------------------- what is private, and what is somebody else's


def sources() -> list[tuple[str, str]]:
    """Each source of the repository but the tests: a name, and its text. Notebooks and the script in them included."""
    files = [*MODULES, *(ROOT / "benchmarks").rglob("*.py"), *(ROOT / "docs").rglob("*.py")]
    found = [(str(path.relative_to(ROOT)), path.read_text()) for path in files]
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        for number, cell in enumerate(json.loads(path.read_text())["cells"], 1):
            if cell["cell_type"] == "code":
                text = re.sub(r"^%.*$", "", "".join(cell["source"]), flags=re.MULTILINE)
                found.append((f"{path.name}, cell {number}", text))
    return found


def room_of(name: str) -> str:
    """`nbutils.models.hub` and `nbutils/models/hub.py` are in models."""
    return re.split(r"[./]", name)[1] if name.startswith("nbutils") else ""


def private_across_rooms(name: str, text: str) -> list[str]:
    """Private names of another room that a source takes: imported, or reached through an imported module."""
    found, modules = [], {}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("nbutils"):
            for alias in node.names:
                modules[alias.asname or alias.name] = node.module
                path = [*node.module.split("."), alias.name]
                if any(re.match(r"_(?!_)", part) for part in path) and room_of(node.module) != room_of(name):
                    found.append(f"{name} imports {'.'.join(path)}")
    for node in ast.walk(ast.parse(text)):
        if (
            isinstance(node, ast.Attribute)
            and re.match(r"_(?!_)", node.attr)
            and isinstance(node.value, ast.Name)
        ):
            module = modules.get(node.value.id)
            if module and room_of(module) != room_of(name):
                found.append(f"{name} reaches {node.value.id}.{node.attr}")
    return found


def test_nothing_private_crosses_a_room():
    assert [fault for name, text in sources() for fault in private_across_rooms(name, text)] == []


@pytest.mark.parametrize(
    "line",
    [
        "from nbutils.models.nf4 import _Shards",
        "from nbutils.models import nf4\nnf4._save(1)",
        "def late():\n    from nbutils.models.nf4 import _save",
    ],
)
def test_a_private_name_across_rooms_is_found(line):
    assert len(private_across_rooms("nbutils/adapters/save.py", line)) == 1
    assert private_across_rooms("nbutils/models/tiny.py", line) == []  # at home


def changes_of_others(name: str, text: str) -> list[str]:
    """Assignments to an attribute of something that was imported from a foreign package; Python's own are none."""
    tree, foreign = ast.parse(text), set()
    ours = {"nbutils", *sys.stdlib_module_names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [
                alias.asname or alias.name for alias in node.names if alias.name.split(".")[0] not in ours
            ]
            foreign |= {name.split(".")[0] for name in names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] not in ours:
            foreign |= {alias.asname or alias.name for alias in node.names}
    found = []
    for node in ast.walk(tree):
        targets = node.targets if isinstance(node, ast.Assign) else []
        if isinstance(node, ast.AugAssign | ast.AnnAssign):
            targets = [node.target]
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "setattr":
            targets = [ast.Attribute(node.args[0], "...")]
        for target in targets:
            owner = target
            while isinstance(owner, ast.Attribute):
                owner = owner.value
            if isinstance(target, ast.Attribute) and isinstance(owner, ast.Name) and owner.id in foreign:
                found.append(f"{name} assigns {ast.unparse(target)}")
    return found


def test_foreign_code_is_changed_in_patches_alone():
    allowed = tuple(f"nbutils/{path}" for path in ("patches/", *CHANGES_OTHERS))
    package = [(name, text) for name, text in sources() if name.startswith("nbutils/")]
    found = {name: changes_of_others(name, text) for name, text in package}
    assert [fault for name, faults in found.items() if not name.startswith(allowed) for fault in faults] == []
    assert any(found[name] for name in found if name.startswith("nbutils/patches/"))  # so it is seen at all


def test_every_patch_says_what_upstream_it_waits_for():
    page = (ROOT / "docs/upstream.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:nbutils|docs|benchmarks)/[\w./]+)`", page)
    assert [path for path in named if not (ROOT / path).exists()] == []
    patches = [f"nbutils/patches/{path.name}" for path in (ROOT / "nbutils/patches").glob("[a-z]*.py")]
    assert [path for path in patches if path not in named] == []


# ---------------------------------------------------------------- files that can be read


def test_a_room_says_what_it_is_and_passes_nothing_on():
    """No re-export: an import in the script leads to the definition in one jump."""
    rooms = [path.parent for path in MODULES if path.name == "__init__.py"]
    assert {path.parent for path in MODULES} == set(rooms)
    for room in rooms:
        body = ast.parse((room / "__init__.py").read_text()).body
        assert len(body) == 1 and isinstance(body[0], ast.Expr), (
            f"{room.name}/__init__.py holds more than a docstring"
        )


def test_no_module_is_too_long():
    lines = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in MODULES}
    assert {name: count for name, count in lines.items() if count > MODULE_LINES} == {}


def test_functions_can_be_read_at_a_glance():
    lengths = {
        f"{path.relative_to(ROOT)}: {node.name}": node.end_lineno - node.lineno + 1
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert {name: count for name, count in lengths.items() if count > FUNCTION_LINES} == {}
    assert statistics.median(lengths.values()) <= MEDIAN_FUNCTION


# ---------------------------------------------------------------- said once


def test_the_default_rank_of_the_adapter_is_said_once():
    """To change it: `LORA_RANK`, and the literals that a reader edits; this names each that says something else."""
    texts = dict(sources()) | {"tiny.yaml": (ROOT / "configs/params/tiny.yaml").read_text()}
    again = [
        name
        for name, text in texts.items()
        if name.startswith("nbutils/") and re.search(rf"lora[_-]r\b.*\b{LORA_RANK}\b", text)
    ]
    assert again == [], "take nbutils.planning.run_setup.LORA_RANK"
    literal = re.compile(r"^ *(?:plan_)?lora_r: (?:int = (?:field\(default=)?)?(\d+)", re.M)
    said = {name: literal.findall(text) for name, text in texts.items() if literal.search(text)}
    assert len(said) >= 4  # tiny.yaml, parameters and script in 04, parameters of 06
    assert {name: ranks for name, ranks in said.items() if set(ranks) != {str(LORA_RANK)}} == {}
