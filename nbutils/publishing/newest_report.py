"""The report of `make newest`: the same in JSON for programs and in Markdown for people."""

import json
import os
from pathlib import Path

from nbutils.publishing.newest_items import BROKEN, DRIFTED, NOT_REACHED, OBSOLETE, SAME, Item
from nbutils.publishing.refresh import without_paths

FIELDS = ("name", "state", "details", "culprit", "seconds")
WHAT_TO_DO = {
    SAME: "nothing",
    DRIFTED: "look whether the text still says what the cell shows; then `make notebooks`",
    OBSOLETE: "fix the text, or take the patch out",
    BROKEN: "fix the code",
    NOT_REACHED: "fix what comes before it; if time ran out, look at it alone",
}


def write(folder: Path, about: dict, items: list[Item]) -> Path:
    """Write `report.json` and `report.md`, each under a temporary name first.

    Args:
        folder: for both.
        about: `provenance`, `changed` (package to locked and installed version), `torch_build`, `pip_check` (lines).
        items: in the order in which they were looked at.

    Returns:
        The path of the Markdown.
    """
    for item in items:
        item.details = [without_paths(text, str(folder)) for text in item.details]
    rows = [{name: getattr(item, name) for name in FIELDS} for item in items]
    _replace(folder / "report.json", json.dumps(about | {"items": rows}, indent=1, ensure_ascii=False) + "\n")
    _replace(folder / "report.md", markdown(about, items))
    return folder / "report.md"


def earlier(folder: Path, about: dict) -> dict[str, Item]:
    """The items of a report that lies there, by name; none if it is of another commit or of other packages.

    Args:
        folder: of the report.
        about: of the report that is being written.
    """
    try:
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    now = json.loads(json.dumps(about))  # a pair is a list there
    if (report["provenance"]["commit"], report["changed"]) != (now["provenance"]["commit"], now["changed"]):
        return {}
    return {row["name"]: Item(**row) for row in report["items"]}


def markdown(about: dict, items: list[Item]) -> str:
    """The report for people: what is newer, one line an item, then the details of what is not SAME."""
    where = about["provenance"]
    lines = [
        "# The newest releases beside the tested ones",
        "",
        f"{where['date']}, commit {where['commit']}, {where['machine']['cpus']} cores of {where['machine']['cpu']}.",
        "",
        "| package | tested | newest |",
        "| --- | --- | --- |",
        *(f"| {name} | {old} | {new} |" for name, (old, new) in about["changed"].items()),
        "",
        f"The build of torch: {about['torch_build']}. "
        "`pip check`: " + ("; ".join(about["pip_check"]) or "nothing to say") + ".",
        "",
        "| looked at | state | because of | what to do | seconds |",
        "| --- | --- | --- | --- | --- |",
        *(
            f"| {i.name} | {i.state} | {i.culprit or '-'} | {WHAT_TO_DO[i.state]} | {i.seconds} |"
            for i in items
        ),
    ]
    for item in items:
        if item.details:
            lines += [
                "",
                f"## {item.name}: {item.state}",
                "",
                *(f"- {_one_line(text)}" for text in item.details),
            ]
    return "\n".join(lines) + "\n"


def fingerprint(report: dict) -> list:
    """What two reports must share to say the same: states and culprits, and no machine, date or wording."""
    return [[row["name"], row["state"], row["culprit"]] for row in report["items"]]


def _one_line(text: str, limit: int = 400) -> str:
    text = " ".join(text.split()).replace("|", "\\|")
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _replace(path: Path, text: str) -> None:
    fresh = path.with_name(f".{path.name}-{os.getpid()}")
    fresh.write_text(text, encoding="utf-8")
    fresh.replace(path)
