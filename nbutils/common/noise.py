"""Known noise of third-party packages, dropped by its exact words; every other warning stays."""

import logging
import os
import warnings

# Messages that are true and that no reader can act on: (logger, how the message begins).
NOISE = [
    # bitsandbytes looks for an optional faster CPU kernel, and falls back to its own.
    ("bitsandbytes.backends.cpu.ops", "Failed to load CPU gemm_4bit_forward from kernels-community"),
    # The first import of matplotlib on a fresh machine.
    ("matplotlib.font_manager", "Matplotlib is building the font cache"),
]


# Libraries whose FutureWarnings concern calls between libraries, not a line that the reader wrote.
FUTURE_WARNINGS_OF = r"(transformers|accelerate|peft|trl|datasets|bitsandbytes|torch)(\.|$)"


def quiet() -> None:
    """Drop the noise that a reader of a notebook cannot act on, progress bars included."""
    drop_noise()
    # Read when the libraries are imported; a bar that redraws itself becomes debris in a saved notebook.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    # Tokenizers warn when a process that has used their threads forks; a launch does.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def drop_noise() -> None:
    """Drop the known noise of third-party packages, by its exact words; every other warning stays."""
    for logger, beginning in NOISE:
        logging.getLogger(logger).addFilter(_without(beginning))
    warnings.filterwarnings("ignore", category=FutureWarning, module=FUTURE_WARNINGS_OF)
    # On a CPU there is nothing to pin memory for; the DataLoader's default says so each time.
    warnings.filterwarnings("ignore", message="'pin_memory' argument is set as true but no accelerator")


def _without(beginning: str):
    return lambda record: not str(record.msg).startswith(beginning)
