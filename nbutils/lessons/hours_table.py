"""How long a reader's rows take at recorded speeds, and what they cost."""

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
