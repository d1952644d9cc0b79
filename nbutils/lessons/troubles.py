"""What breaks, read from `docs/troubles.yaml`: message, cause, what to do, versions, and where it can be seen again.

`docs/troubleshooting.md` and the tables of notebook 07 are made of it; the test holds each proof.
Run as: `python -m nbutils.lessons.troubles > docs/troubleshooting.md`
or with the words of a message, `python -m nbutils.lessons.troubles "Timed out waiting"`, to look it up.
"""

import re
import sys
import textwrap
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
    """All that is known: a table for each moment, under its name, one row a trouble."""
    moments = dict.fromkeys(trouble.moment for trouble in TROUBLES)
    return "\n\n".join(f"### {_title(moment)}\n\n{_table(moment)}" for moment in moments)


def messages_as_markdown() -> str:
    """What notebook 07 shows of the troubles that have a message: a table for each moment, without the proofs."""
    spoken = [trouble for trouble in TROUBLES if not is_silent(trouble)]
    moments = dict.fromkeys(trouble.moment for trouble in spoken)
    return "\n\n".join(
        f"### {_title(moment)}\n\n{_short_table([t for t in spoken if t.moment == moment])}"
        for moment in moments
    )


def silent_as_markdown() -> str:
    """What notebook 07 shows of the troubles that say nothing: one table."""
    return _short_table([trouble for trouble in TROUBLES if is_silent(trouble)])


def is_silent(trouble: Trouble) -> bool:
    """Nothing is said; what is seen instead stands in brackets."""
    return trouble.message.startswith("(")


def look_up(text: str) -> list[Trouble]:
    """The troubles whose words stand in a text, or else those in whose message the text stands.

    Args:
        text: a line of a log, or a few words of it.
    """
    wanted = _plain(text)
    if not wanted:
        return []
    found = [
        t for t in TROUBLES if not is_silent(t) and all(_plain(p) in wanted for p in t.message.split("..."))
    ]
    return found or [t for t in TROUBLES if wanted in _plain(t.message)]


def show_trouble(text: str) -> None:
    """Print message, cause and remedy of each trouble that `look_up` finds, or that there is none.

    Args:
        text: a line of a log, or a few words of it.
    """
    found = look_up(text)
    for trouble in found:
        print(_shown(trouble.message))
        for name, said in (("cause", trouble.cause), ("do", trouble.fix)):
            print(
                textwrap.fill(f"{name + ':':<7}{said}", 100, initial_indent="  ", subsequent_indent=" " * 9)
            )
    if not found:
        print("not in the table: try fewer words, without numbers, paths and names of your own")


def _plain(text: str) -> str:
    return " ".join(text.replace("`", "").casefold().split())


def _title(moment: str) -> str:
    return moment[0].upper() + moment[1:]


def _short_table(troubles: list[Trouble]) -> str:
    lines = ["| you see | cause | what to do |", "|---|---|---|"]
    for trouble in troubles:
        seen = trouble.message[1:-1] if is_silent(trouble) else _shown(trouble.message)
        lines.append(f"| {seen} | {trouble.cause} | {trouble.fix} |")
    return "\n".join(lines)


def _table(moment: str) -> str:
    lines = [
        "| you see | who says it | cause | what to do | shown by | reports |",
        "|---|---|---|---|---|---|",
    ]
    for trouble in (trouble for trouble in TROUBLES if trouble.moment == moment):
        reports = ", ".join(trouble.reports) or "-"
        cells = (
            _shown(trouble.message),
            trouble.where,
            trouble.cause,
            trouble.fix,
            where_shown(trouble),
            reports,
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _shown(message: str) -> str:
    """As code, without the marks of code within; or, in brackets, as it is."""
    return message if message.startswith("(") else f"`{message.replace('`', '')}`"


PAGE = f"""# Troubleshooting

## I see this message, by the moment at which it comes

Made of `docs/troubles.yaml` by `python -m nbutils.lessons.troubles`; with words of a message behind it, that command
looks them up. Notebook 07 shows the same, shorter.
*Shown by* names the cell or the test in which the library itself does it, with the versions of
`requirements.lock`; "{RECORDED.strip(": ")}" names a recorded file; the rest is marked "{NOT_REPRODUCED}". Reports are
public and may have other causes as well.

"""


if __name__ == "__main__":
    if sys.argv[1:]:
        show_trouble(" ".join(sys.argv[1:]))
    else:
        print(PAGE + as_markdown())
