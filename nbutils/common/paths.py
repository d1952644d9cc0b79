"""Where things are: the root of the repository, and the folders of runs."""

import os
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RUNS = Path("runs")


def go_to_root() -> Path:
    """Make the root of the repository the working directory.

    Returns:
        The root, absolute.

    Raises:
        FileNotFoundError: the package is installed without its repository.
    """
    if not (ROOT / "configs" / "accelerate").is_dir():
        raise FileNotFoundError(
            f"nbutils was imported from {ROOT}, where the course's configs/ folder is missing. "
            "Install the clone itself: pip install --editable . in the root of the repository."
        )
    os.chdir(ROOT)
    return ROOT


def at_root(path: str | Path) -> Path:
    """What was typed in the working directory, as it must be called from the root of the repository.

    Args:
        path: relative to the working directory, or absolute.

    Returns:
        Relative to the root if it lies below it. In the root, and if it is absolute, it stays as it was typed.
    """
    if Path(path).is_absolute() or Path.cwd() == ROOT:
        return Path(path)
    whole = Path(os.path.abspath(path))  # noqa: PTH100 (resolve() would follow the link runs/latest)
    return whole.relative_to(ROOT) if whole.is_relative_to(ROOT) else whole


def from_here(path: str | Path) -> Path:
    """A file of the repository, as it must be called from the working directory: the other way round.

    Args:
        path: relative to the root.

    Returns:
        Relative if the working directory lies in the repository, or else absolute.
    """
    return Path(os.path.relpath(ROOT / path)) if Path.cwd().is_relative_to(ROOT) else ROOT / path


def new_run_dir(given: str | Path = "") -> Path:
    """The folder of a new run: the one given, or `runs/<UTC time>`, and then `runs/latest` points to it.

    Args:
        given: the `run_dir` parameter of a notebook; empty means a new folder.

    Returns:
        The folder, which exists, relative to the root of the repository.

    Raises:
        NotADirectoryError: `given` is a file.
    """
    if given and Path(given).is_file():
        raise NotADirectoryError(f"{given} is a file; wanted a folder for the run, a new one or an old one.")
    if given:
        Path(given).mkdir(parents=True, exist_ok=True)
        return Path(given)
    name = datetime.now(UTC).strftime("%Y-%m-%dT%H-%M-%SZ")
    folder, tries = RUNS / name, 1
    while folder.exists():  # two runs within a second
        tries += 1
        folder = RUNS / f"{name}-{tries}"
    folder.mkdir(parents=True)
    point_latest_to(folder)
    return folder


def point_latest_to(folder: Path) -> None:
    """Let the link `latest`, beside the run's folder, point to it; a reader never meets a missing link.

    Args:
        folder: the run's folder.
    """
    fresh = folder.parent / f".latest-{os.getpid()}"
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(folder.name, target_is_directory=True)
    fresh.replace(folder.parent / "latest")  # rename is atomic


def latest(given: str | Path = "") -> Path:
    """The folder of the run to look at: the one given, or the newest one that has trained.

    Notebooks 01 to 03 make run folders too; going back to one of them must not hide what notebook 04 has trained.

    Args:
        given: the `run_dir` parameter of a notebook; empty means `runs/latest`, or the newest run that has trained.

    Returns:
        The folder, relative to the root of the repository.

    Raises:
        FileNotFoundError: there is no such run yet.
    """
    if given and Path(given).is_dir():
        return Path(given)
    if not given:
        newest_first = sorted(RUNS.glob("[0-9]*/"), reverse=True)  # their names are times
        for folder in [RUNS / "latest", *newest_first]:
            if (folder / "train" / "run.json").is_file():
                return RUNS / folder.resolve().name
    raise FileNotFoundError(
        f"{given or 'A run that has trained'} does not exist: there is no run to look at. "
        "Run notebooks/04_write_and_launch.ipynb first, or type: make tutorial"
    )
