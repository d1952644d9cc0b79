"""One line of the doctor's table."""

from dataclasses import dataclass

OK, WARN, FAIL = "OK", "WARN", "FAIL"


@dataclass
class Check:
    """What was looked at, what was found, how it is, and what to do if it is not OK."""

    what: str
    found: str
    verdict: str = OK
    fix: str = ""
