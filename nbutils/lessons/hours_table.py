"""How long a reader's rows take at recorded speeds, and what they cost."""

from nbutils.planning.shapes import Shape
from nbutils.planning.step_time import ASSUMED_CARDS, hours, packed_weights, pcie_estimate

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
    """Rows of the same table for cards that were not measured: from nothing hidden to the shorter time hidden.

    Args:
        shape: of the model, in NF4 with offload.
        batch: rows of a rank and step.
        length: tokens of a row.
        samples: how many are trained on, over all epochs.
        tokens: of one sample.
    """
    rows = []
    for name, card in ASSUMED_CARDS.items():
        guess = pcie_estimate(packed_weights(shape), shape.parameters, batch * length, 2, **card)
        slow, fast = guess["tokens_per_second"], guess["hidden_tokens_per_second"]
        full, alone = (
            f"{hours(samples * each, fast):.1f} to {hours(samples * each, slow):.1f}"
            for each in (tokens, length)
        )
        speeds = f"{slow:,.0f} to {fast:,.0f}"
        rows.append([f"{name}, ESTIMATE", f"{batch} x {length:,}", speeds, full, alone, "-", "-"])
    return rows
