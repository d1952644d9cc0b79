"""Stop a run whose loss is no number any more: on every rank, and before the optimizer takes the step.

The Trainer does not. It writes the mean of the steps before into the log (`logging_nan_inf_filter`), and trains on.
"""

import torch
import torch.distributed as dist

from nbutils.common.ranks import rank


class LossIsNoNumber(RuntimeError):
    """The loss is NaN or infinite; what it would do to the adapter was not done."""


def stop_at_no_number(loss: torch.Tensor, step: int, learning_rate: float) -> None:
    """Raise on every rank if the loss of one is NaN or infinite. Every rank must call it, in each step.

    Args:
        loss: of this rank, a scalar.
        step: the step that it belongs to, from 1.
        learning_rate: as set, for the message.

    Raises:
        LossIsNoNumber: names the step and a rank.
    """
    # The highest rank that is in trouble, counted from 1, or 0: one small collective a step.
    where = torch.where(torch.isfinite(loss.detach()), 0, rank() + 1).reshape(1)
    if dist.is_initialized():
        dist.all_reduce(where, op=dist.ReduceOp.MAX)
    if where.item():
        raise LossIsNoNumber(
            f"The loss of step {step} is no number on rank {where.item() - 1} (rank {rank()} has {float(loss):g}). All "
            "ranks stopped before the optimizer took the step. Look at the rows of this step, or lower learning_rate "
            f"({learning_rate:g}): on a resume the new one counts. Go on from the newest checkpoint with --resume true."
        )
