"""Draw the rooms of `nbutils` and who imports whom, from the code, into CONTRIBUTING.md.

Run as: python docs/house_map.py
"""

import sys
from pathlib import Path

import grimp

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "CONTRIBUTING.md"
BEGIN, END = "<!-- map begin: python docs/house_map.py -->\n", "<!-- map end -->\n"


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


def redrawn(page: str) -> str:
    """The page with the picture of today."""
    before, _, rest = page.partition(BEGIN)
    return before + BEGIN + drawing() + END + rest.partition(END)[2]


if __name__ == "__main__":
    PAGE.write_text(redrawn(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
