"""Versions that were not tested: refused outside the ranges, said inside them, the same by script and doctor."""

import pytest

from nbutils.common import versions
from nbutils.common.refused import Refused
from nbutils.planning import doctor

LOCKED = versions.locked_versions()


@pytest.fixture
def installed(monkeypatch):
    """Let these versions be installed beside the locked ones, on a machine with or without GPUs."""

    def install(gpus: int = 0, **found: str) -> None:
        here = {name: LOCKED[name] for name in (*versions.STACK, *versions.TOOLS)} | found
        monkeypatch.setattr(versions, "installed_versions", lambda: here)
        monkeypatch.setattr(versions, "find_gpus", lambda: [{}] * gpus)

    monkeypatch.delenv(versions.UNTESTED, raising=False)
    return install


def said() -> list[str]:
    lines = []
    versions.refuse_versions(lines.append)
    return lines


def test_nothing_is_said_of_the_tested_versions(installed):
    installed()
    assert said() == [] and versions.not_tested_together() is None


def test_every_package_outside_its_range_is_named(installed):
    installed(torch="2.99.0", peft="0.1.0", trl="1.16.99")
    with pytest.raises(Refused) as refused:
        said()
    text = str(refused.value)
    assert "torch is 2.99.0, and this code works with torch" in text
    assert "peft is 0.1.0, and this code works with peft" in text
    assert f"pip install torch=={LOCKED['torch']} peft=={LOCKED['peft']}. Or go on at your own risk" in text
    assert "trl" not in text  # inside its range


def test_the_override_turns_the_refusal_into_a_sentence(installed, monkeypatch):
    installed(torch="2.99.0", peft="0.1.0", trl="1.16.99")
    monkeypatch.setenv("NBUTILS_UNTESTED", "1")
    (sentence,) = said()
    assert sentence.startswith("Not tested together: torch 2.99.0 (outside ")
    assert f"peft 0.1.0 (outside {versions.allowed_versions()['peft']}, tested: {LOCKED['peft']})" in sentence
    assert f"trl 1.16.99 (tested: {LOCKED['trl']})" in sentence
    assert versions.not_tested_together() == sentence  # what run.json gets


def test_on_gpus_the_torch_of_the_records_was_tested(installed):
    installed(gpus=2, torch=versions.RECORDED_ON_GPUS["torch"])
    assert said() == []
    installed(gpus=0, torch=versions.RECORDED_ON_GPUS["torch"])
    assert len(said()) == 1


@pytest.mark.parametrize("override", ["", "1"])
@pytest.mark.parametrize("gpus", [0, 2])
@pytest.mark.parametrize(
    ("name", "found"),
    [
        *(("torch", found) for found in (LOCKED["torch"], versions.RECORDED_ON_GPUS["torch"], "2.99.0")),
        *(("peft", found) for found in (LOCKED["peft"], "0.21.99", "0.1.0")),
    ],
)
def test_doctor_and_script_weigh_a_version_alike(installed, monkeypatch, name, found, gpus, override):
    installed(gpus, **{name: found})
    monkeypatch.setenv("NBUTILS_UNTESTED", override)
    try:
        script = doctor.WARN if said() else doctor.OK
    except Refused:
        script = doctor.FAIL
    (check,) = doctor.check_packages(LOCKED, {name: found}, on_gpus=bool(gpus))
    assert check.verdict == script
