"""A first look, in two seconds and before a rank starts, at what the training script will be given.

It imports none of the libraries that train. The script itself looks again, and closer: `nbutils.refusing`.
"""

import json
import os
import tomllib
from collections.abc import Callable
from pathlib import Path

from packaging.requirements import Requirement

from nbutils.checkpoint import Checkpoint, refuse_other_quantisations
from nbutils.course import ROOT
from nbutils.data import refuse_unreadable
from nbutils.doctor import installed_versions, locked_versions
from nbutils.download import local_folder

# The prep, the memory plan and the units were made for it and tested with it.
SUPPORTED = ("llama",)


class Refused(ValueError):
    """The run was not begun and nothing was written."""


def look(settings: dict) -> None:
    """Refuse what the settings of a run give away at a glance.

    Args:
        settings: of the training script, as far as they are known.

    Raises:
        Refused, BadCheckpoint, CannotDownload, FileNotFoundError, ValueError: what was found, what was wanted, and
            what to do.
    """
    refuse_versions(say=lambda _: None)  # a rank says what is merely untested
    if settings.get("output_dir"):
        refuse_output(Path(settings["output_dir"]))
    if settings.get("model"):
        look_at_model(str(settings["model"]))
    for source in filter(None, (settings.get("dataset"), settings.get("heldout_dataset"))):
        refuse_unreadable(str(source))


def refuse_versions(say: Callable[[str], object] = print) -> None:
    """Outside pyproject's ranges the code does not work; inside them, only the locked versions were tested.

    Args:
        say: told what is not tested.

    Raises:
        Refused: a package lies outside its range.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    ranges = {need.name: need.specifier for need in map(Requirement, project["dependencies"])}
    locked, untested = locked_versions(), []
    for name, found in installed_versions().items():
        if found is None or name not in ranges:
            continue
        if not ranges[name].contains(found, prereleases=True):
            raise Refused(
                f"{name} is {found}, and this code works with {name}{ranges[name]} only. "
                f"Install the tested one: pip install {name}=={locked[name]}"
            )
        if found != locked[name]:
            untested.append(f"{name} {found} (tested: {locked[name]})")
    if untested:
        say(f"Not tested together: {', '.join(untested)}. pip install -r requirements.lock")


def refuse_output(output: Path) -> None:
    """Refuse an output folder that cannot be one.

    Raises:
        Refused: it is a file, or cannot be made.
    """
    if output.exists() and not output.is_dir():
        raise Refused(f"output_dir {output} is a file; wanted a folder, new or of this run. Name another.")
    place = nearest_folder(output)
    if not os.access(place, os.W_OK):
        raise Refused(f"output_dir {output} cannot be made: no right to write in {place}. Name another.")


def look_at_model(model: str) -> tuple[Path, dict]:
    """Find a model's config and refuse another architecture or quantisation; of local weights, read the headers.

    Args:
        model: a local folder, or a hub id, of which config and tokenizer are fetched.

    Returns:
        The folder, and what its config.json holds.

    Raises:
        Refused, BadCheckpoint, CannotDownload: with what was found.
    """
    folder = local_folder(model, weights=False)
    file = folder / "config.json"
    if not file.is_file():
        raise Refused(
            f"{model} holds no config.json; wanted a model as the hub keeps them. Look at the path."
        )
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        kind = config.get("model_type")
    except (ValueError, AttributeError) as problem:
        raise Refused(f"{file} is no JSON object ({problem}). Download it again.") from None
    if kind not in SUPPORTED:
        raise Refused(
            f"{model} is a {kind}; wanted a model of the architecture {' or '.join(SUPPORTED)}. Prep, memory plan and "
            "units were made for it and tested with it; see nbutils.glance.SUPPORTED."
        )
    if config.get("quantization_config"):
        refuse_other_quantisations(config["quantization_config"], folder)
    if Path(model).is_dir():
        Checkpoint(folder)  # the hub's weights are looked at when they have come
    return folder, config


def nearest_folder(path: Path) -> Path:
    """The folder itself, or the nearest one above it that is there."""
    path = path.absolute()
    while not path.is_dir():
        path = path.parent
    return path
