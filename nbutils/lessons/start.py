"""The first line of every notebook: `from nbutils.lessons.start import start; start()`."""

from nbutils.common.noise import quiet
from nbutils.common.paths import go_to_root


def start() -> None:
    """Go to the repository's root and quiet what a reader cannot act on.

    Paths in the notebooks are relative to the root, in JupyterLab as under papermill.

    Raises:
        FileNotFoundError: the package is installed without its repository.
    """
    go_to_root()
    quiet()
