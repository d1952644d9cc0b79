"""How long a reader's rows take at recorded speeds, and what they cost."""

from nbutils.lessons.step_figures import FASTEST, STATED, speed_range
from nbutils.planning.run_setup import Setup
from nbutils.planning.shapes import Shape
from nbutils.planning.step_estimate import estimate, pcie4_links
from nbutils.planning.step_time import hours

# A run whose rows are more than so many times as long as the reader's was made for other data.
TOO_LONG = 8


def hours_rows(runs: dict[str, dict], samples: int, tokens: int, price: float) -> list[list[str]]:
    """Rows of a table: run, rows a step, tokens a second, hours and price with full rows, and with one sample a row.

    Not packed, a row is one sample, and a step takes no longer than the recorded one, whose rows were full.

    Args:
        runs: recorded, by name.
        samples: how many rows are trained on, over all epochs.
        tokens: of one sample.
        price: an hour, of both GPUs.
    """
    rows = []
    for name, run in runs.items():
        speed, config = run["measured"]["tokens_per_second"], run["config"]
        if not speed:
            continue
        full = hours(samples * tokens, speed)
        alone = hours(samples * config["seq_len"], speed)
        shape = f"{config['batch_size']} x {config['seq_len']:,}"
        if config["seq_len"] > TOO_LONG * tokens:
            rows.append(
                [name, shape, f"{speed:,.0f}", f"{full:.1f}", "for long rows", f"{full * price:.0f}", "-"]
            )
        else:
            costs = f"{full * price:.0f}", f"{alone * price:.0f}"
            rows.append([name, shape, f"{speed:,.0f}", f"{full:.1f}", f"{alone:.1f}", *costs])
    return rows


def estimated_rows(shape: Shape, batch: int, length: int, samples: int, tokens: int) -> list[list[str]]:
    """Rows of the same table for two cards that were not measured, in slots of 16 lanes, with the settings `fastest`.

    Each is given from low to high: the estimate, and by how much it was off at most where it could be compared.

    Args:
        shape: of the model, in NF4 with offload.
        batch: rows of a rank and step.
        length: tokens of a row.
        samples: how many are trained on, over all epochs.
        tokens: of one sample.
    """
    setup = Setup(world_size=2, fsdp_version=2, offload=True)
    rows = []
    for card, tflops in STATED.items():
        speed = estimate(shape, setup, batch, length, pcie4_links(16, tflops), FASTEST).tokens_per_second
        slow, fast = speed_range(speed, setup.fsdp_version)
        full, alone = (
            f"{hours(samples * each, fast):.1f} to {hours(samples * each, slow):.1f}"
            for each in (tokens, length)
        )
        speeds = f"{slow:,.0f} to {fast:,.0f}"
        rows.append([f"two {card}s, ESTIMATE", f"{batch} x {length:,}", speeds, full, alone, "-", "-"])
    return rows
