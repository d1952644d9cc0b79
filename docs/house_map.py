"""Draw the rooms of `nbutils`, who imports whom, and the list of tests into CONTRIBUTING.md, from the code.

Run as: python docs/house_map.py [JUNIT.xml ...]

With reports of `python -m pytest --junitxml=JUNIT.xml` the seconds of each file of tests go to suite_seconds.json.
"""

import ast
import json
import re
import sys
import xml.etree.ElementTree as xml
from pathlib import Path

import grimp

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "CONTRIBUTING.md"
SECONDS = ROOT / "docs" / "suite_seconds.json"
BEGIN, END = "<!-- {0} begin: python docs/house_map.py -->\n", "<!-- {0} end -->\n"


def arrows() -> dict[str, set[str]]:
    """Each room and `__main__`, with the rooms that it imports; late imports count."""
    sys.path.insert(0, str(ROOT))
    graph = grimp.build_graph("nbutils", cache_dir=None)
    found = {}
    for module in sorted(graph.modules - {"nbutils"}):
        room = module.split(".")[1]
        imported = {name.split(".")[1] for name in graph.find_modules_directly_imported_by(module)}
        found.setdefault(room, set()).update(imported - {room})
    return found


def needed(found: dict[str, set[str]]) -> list[tuple[str, str]]:
    """The arrows that say something: an arrow beside a longer way of arrows is left out."""

    def reached(room: str) -> set[str]:
        return found[room].union(*(reached(below) for below in found[room]))

    return [
        (room, below)
        for room, under in found.items()
        for below in sorted(under)
        if not any(below in reached(other) for other in under - {below})
    ]


def drawing() -> str:
    """The picture in mermaid's words, which code hosts draw, and what each room holds."""
    found = arrows()
    lines = [
        "```mermaid",
        "graph TD",
        *(f"    {above} --> {below}" for above, below in needed(found)),
        "```",
        "",
    ]
    lines += ["| room | what it holds |", "| --- | --- |"]
    for room in sorted(found.keys() - {"__main__"}, key=lambda name: (len(found[name]), name)):
        said = (ROOT / "nbutils" / room / "__init__.py").read_text(encoding="utf-8").strip().strip('"')
        lines.append(f"| `{room}` | {said} |")
    return "\n".join(lines) + "\n"


def suites() -> str:
    """Each file of tests with what it holds, as its first line says, when it runs, and its seconds."""
    seconds = json.loads(SECONDS.read_text(encoding="utf-8"))
    lines = ["| suite | what it holds | tier | seconds |", "| --- | --- | --- | --- |"]
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        text = path.read_text(encoding="utf-8")
        said = " ".join((ast.get_docstring(ast.parse(text)) or "").partition("\n\n")[0].split())
        all_in_ci = re.search(r"^pytestmark = .*mark\.ci\b", text, re.MULTILINE)
        tier = "CI" if all_in_ci else "each commit"
        more = ", parts in CI" if "mark.ci" in text and not all_in_ci else ""
        more += ", parts by hand" if "mark.matrix" in text else ""
        name = str(path.relative_to(ROOT))
        lines.append(f"| `{name}` | {said.replace('|', ' ')} | {tier}{more} | {seconds.get(name, '-')} |")
    return "\n".join(lines) + "\n"


def keep_seconds(reports: list[Path]) -> None:
    """Add up the seconds of each file of tests over these reports, and write them for the next list."""
    spent: dict[str, float] = {}
    for case in (case for report in reports for case in xml.parse(report).iter("testcase")):
        name = case.get("classname", "").replace(".", "/") + ".py"
        spent[name] = spent.get(name, 0.0) + float(case.get("time", 0))
    SECONDS.write_text(json.dumps({name: round(spent[name]) for name in sorted(spent)}, indent=1) + "\n")


def redrawn(page: str) -> str:
    """The page with the picture and the list of today."""
    for name, text in {"map": drawing(), "suites": suites()}.items():
        before, _, rest = page.partition(BEGIN.format(name))
        page = before + BEGIN.format(name) + text + END.format(name) + rest.partition(END.format(name))[2]
    return page


if __name__ == "__main__":
    if sys.argv[1:]:
        keep_seconds([Path(name) for name in sys.argv[1:]])
    PAGE.write_text(redrawn(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
