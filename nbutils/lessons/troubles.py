"""What breaks, read from `docs/troubles.yaml`: message, cause, what to do, versions, and where it can be seen again.

`docs/troubleshooting.md` and the table of notebook 07 are made of it; the test holds each proof.
Run as: `python -m nbutils.lessons.troubles > docs/troubleshooting.md`
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from nbutils.common.paths import ROOT

FILE = ROOT / "docs" / "troubles.yaml"
NOT_REPRODUCED = "not reproduced"
RECORDED = "recorded on GPUs: "  # and the file in benchmarks/results/
CELL = re.compile(r"(notebook \d\db?): ([\w-]+)")  # a notebook, and the tag of a cell in it


@dataclass(frozen=True)
class Trouble:
    """One thing that goes wrong.

    Args:
        moment: when it does.
        message: words of the library, as they appear; or, in brackets, what is seen where nothing is said.
        where: who says it, and the versions it was seen with.
        cause: why.
        fix: what to do.
        proof: a test as `tests/file.py::name`, a tagged cell, a recorded file, or that it was not reproduced.
        reports: public reports of it, `owner/name#number`.
    """

    moment: str
    message: str
    where: str
    cause: str
    fix: str
    proof: str
    reports: tuple[str, ...] = ()


def read_troubles(file: Path = FILE) -> list[Trouble]:
    """The troubles of a file, in its order.

    Args:
        file: YAML, `moment: [trouble, ...]`; a trouble has the keys of `Trouble`.

    Raises:
        ValueError: a key is missing, or is none of a trouble.
    """
    found = []
    for moment, entries in yaml.safe_load(file.read_text(encoding="utf-8")).items():
        for entry in entries:
            try:
                trouble = Trouble(moment=moment, **entry)
            except TypeError as problem:
                raise ValueError(f"{file}, {entry.get('message', moment)}: {problem}.") from None
            found.append(replace(trouble, reports=tuple(trouble.reports)))
    return found


TROUBLES = read_troubles()


def where_shown(trouble: Trouble) -> str:
    """The proof as a reader reads it."""
    if trouble.proof.startswith("tests/"):
        return f"`{trouble.proof}`"
    if cell := CELL.fullmatch(trouble.proof):
        return f"{cell[1]}, cell `{cell[2]}`"
    return trouble.proof


def as_markdown() -> str:
    """A table for each moment, under its name, one row a trouble."""
    moments = dict.fromkeys(trouble.moment for trouble in TROUBLES)
    return "\n\n".join(f"### {_title(moment)}\n\n{_table(moment)}" for moment in moments)


def _title(moment: str) -> str:
    return moment[0].upper() + moment[1:]


def _table(moment: str) -> str:
    lines = [
        "| you see | who says it | cause | what to do | shown by | reports |",
        "|---|---|---|---|---|---|",
    ]
    for trouble in (trouble for trouble in TROUBLES if trouble.moment == moment):
        message = trouble.message if trouble.message.startswith("(") else f"`{trouble.message}`"
        message = message.replace(
            "`requires_grad` when `use_orig_params=False`", "requires_grad when use_orig_params=False"
        )
        message = message.replace("and `device_id` on", "and device_id on")
        reports = ", ".join(trouble.reports) or "-"
        cells = (message, trouble.where, trouble.cause, trouble.fix, where_shown(trouble), reports)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


PAGE = f"""# Troubleshooting

## I see this message, by the moment at which it comes

Made of `docs/troubles.yaml` by `python -m nbutils.lessons.troubles`; notebook 07 shows the same tables.
*Shown by* names the cell or the test in which the library itself does it, with the versions of
`requirements.lock`; "{RECORDED.strip(": ")}" names a recorded file; the rest is marked "{NOT_REPRODUCED}". Reports are
public and may have other causes as well.

"""


if __name__ == "__main__":
    print(PAGE + as_markdown())
