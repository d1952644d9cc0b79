"""A dry run on somebody's own rows: their lengths, what is learned of them, and what an epoch of them takes."""

from dataclasses import dataclass
from pathlib import Path

from nbutils.common.refused import Refused
from nbutils.data.rows_ahead import RowsAhead, rows_ahead
from nbutils.launching.dry_run_settings import DryRun
from nbutils.launching.measurements import steady
from nbutils.models.hub import local_folder
from nbutils.models.loading import load_tokenizer
from nbutils.models.made_here import NAMES, model_path
from nbutils.planning.shapes import SHAPES, Shape
from nbutils.planning.step_time import hours
from nbutils.planning.whole_run import whole_run


@dataclass(frozen=True)
class OwnRows:
    """The rows of a file as the trainer will take them.

    Args:
        settings: of the script.
        ahead: the rows, counted.
        shape: of the model.
        ranks: over all machines.
    """

    settings: dict
    ahead: RowsAhead
    shape: Shape
    ranks: int

    @classmethod
    def read(cls, run: DryRun, settings: dict, ranks: int) -> "OwnRows":
        """Count the rows as training will take them, before anything is launched.

        Args:
            run: what is asked for.
            settings: from `write_settings`.
            ranks: over all machines.

        Raises:
            FileNotFoundError, ValueError: the file cannot be read, or a row cannot be trained on.
        """
        return cls(settings, rows_ahead(settings, load_tokenizer(str(run.tokenizer))), run.shape, ranks)

    @property
    def taken(self) -> str:
        """How the trainer takes them: packed, grouped by length, or as they come."""
        if self.settings.get("packing"):
            return "packed"
        grouped = self.settings.get("train_sampling_strategy") == "group_by_length"
        return "grouped by length" if grouped else "as they come"

    @property
    def longest(self) -> int:
        """Tokens of the longest row of a batch, for the plan; a pack may be as long as max_length."""
        return self.settings["max_length"] if self.settings.get("packing") else self.ahead.longest

    def record(self) -> dict:
        """For the record of the dry run: the file by its name alone, and the counts."""
        name = Path(self.settings["dataset"]).name
        return {"file": name, "taken": self.taken, **vars(self.ahead)}

    def measured(self, run_dir: Path, seconds: list[float]) -> dict:
        """Tokens of real text a second, and what an epoch of these rows takes at that speed.

        Args:
            run_dir: of the dry run.
            seconds: `all_step_seconds` of its record.
        """
        seen = steady(run_dir, seconds)
        speed = seen["tokens_per_second"]
        epoch = self.settings | {"max_steps": -1, "num_train_epochs": 1}
        run = whole_run(epoch, self.ahead.rows, self.ahead.tokens, self.ranks, self.shape, speed)
        taken = round(hours(self.ahead.tokens, speed), 4)
        return seen | {"epoch": {"steps": run.steps, "tokens_a_step": run.tokens_a_step, "hours": taken}}


def tokenizer_folder(named: str | Path | None, model: str) -> Path:
    """The folder whose tokenizer makes tokens of the rows.

    Args:
        named: a name of `made_here`, a folder or a hub id, of which config and tokenizer alone are fetched; None takes
            the model's own.
        model: as it was named for the dry run.

    Raises:
        Refused: none was named, and a built-in shape has none.
        CannotDownload: the hub refuses, or cannot be reached.
    """
    source = str(named or model)
    if source in NAMES:
        return Path(model_path(source))
    if source in SHAPES:
        raise Refused(
            f"{source} is a shape without a tokenizer, and rows of a file want one. Name the model that you train: "
            "--tokenizer meta-llama/Llama-3.1-70B, or a folder that holds its tokenizer.json."
        )
    return local_folder(source, weights=False)


def model_with_a_shape(model: str) -> str:
    """What `shape_of` takes: a built-in shape, or a folder; of a hub id the config is fetched.

    Args:
        model: as it was named for the dry run.
    """
    if model in SHAPES or Path(model).exists() or "/" not in model:
        return model
    return str(local_folder(model, weights=False))
