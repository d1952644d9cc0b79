"""A first look, in two seconds and before a rank starts, at what the training script will be given.

It imports none of the libraries that train. The script itself looks again, and closer: `training.before_loading`.
"""

from pathlib import Path

from nbutils.common.devices import gpus_shown, no_accelerator
from nbutils.common.disk import refuse_output
from nbutils.common.versions import refuse_versions
from nbutils.data.files import refuse_unreadable
from nbutils.launching.recipe_faults import refuse_for_recipe
from nbutils.models.supported import look_at_model


def look(settings: dict, config: str | Path | None = None, num_processes: int | None = None) -> None:
    """Refuse what the settings of a run and its config file give away at a glance.

    Args:
        settings: of the training script, as far as they are known.
        config: for `accelerate launch`; None for one of the course's.
        num_processes: ranks, if they differ from the config's.

    Raises:
        BadConfig, Refused, BadCheckpoint, CannotDownload, FileNotFoundError, ValueError: what was found, what was
            wanted, and what to do.
    """
    if config:
        refuse_for_recipe(config, num_processes, gpus=None if no_accelerator() else gpus_shown())
    refuse_versions(say=lambda _: None)  # a rank says what is merely untested
    if settings.get("output_dir"):
        refuse_output(Path(settings["output_dir"]))
    if settings.get("model"):
        look_at_model(str(settings["model"]))
    for source in filter(None, (settings.get("dataset"), settings.get("heldout_dataset"))):
        refuse_unreadable(str(source))
