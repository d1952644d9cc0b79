"""Output folders whose names could not be written at the end of a run are refused at its beginning."""

import os
import subprocess
import sys

import pytest

from nbutils.common.disk import refuse_name
from nbutils.common.paths import ROOT
from nbutils.common.refused import Refused

TRY = "import sys; from pathlib import Path; from nbutils.common.disk import refuse_output as r; r(Path(sys.argv[1]))"


@pytest.mark.parametrize(
    "locale, name, said",
    [
        ({"LC_ALL": "C", "PYTHONUTF8": "0"}, "runs/\u00e7al\u0131\u015fma", "names files in ascii"),
        ({"LC_ALL": "C", "PYTHONUTF8": "0"}, "runs/plain", ""),
        ({"LC_ALL": "C"}, "runs/\u00e7al\u0131\u015fma", ""),  # Python takes UTF-8 by itself
        ({"LC_ALL": "C.UTF-8"}, "runs/\u00e7al\u0131\u015fma", ""),
        ({"LC_ALL": "C.UTF-8"}, b"runs/\xe7al", "is not written in UTF-8"),
    ],
)
def test_a_name_that_cannot_be_saved_under_is_refused(locale, name, said):
    done = subprocess.run(
        [sys.executable, "-c", TRY, name], env=os.environ | locale, cwd=ROOT, capture_output=True, check=False
    )
    last = (done.stderr.decode("utf-8", "replace").splitlines() or [""])[-1]
    assert (done.returncode == 0) == (not said), last
    assert said in last


def test_another_encoding_than_utf8_is_named(monkeypatch):
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "iso8859-9")
    with pytest.raises(
        Refused, match=r"runs/\u00e7ok has letters beyond ASCII.*names files in iso8859-9.*PYTHONUTF8=1"
    ):
        refuse_name(ROOT.__class__("runs/\u00e7ok"))
    refuse_name(ROOT.__class__("runs/cok"))
