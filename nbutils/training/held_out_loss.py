"""The held-out loss as a mean over tokens: the same whatever the batches are, and on any number of ranks.

The Trainer takes the mean of each batch, and the mean of those: a batch of short answers counts as much as one of long
answers, and a row that fills up the last batch of a rank counts twice.
"""

import torch
from trl import SFTTrainer


class TokenMeanTrainer(SFTTrainer):
    """TRL's `SFTTrainer`, whose evaluations count every learned token of every row once."""

    def evaluation_loop(self, *args, **kwargs):
        self._batch, self._rows = 0, len(kwargs.get("dataloader", args[0] if args else None).dataset)
        self._nats = torch.zeros(
            2, dtype=torch.float64, device=self.args.device
        )  # their sum, and of how many tokens
        output = super().evaluation_loop(*args, **kwargs)
        nats, tokens = self.accelerator.reduce(self._nats, "sum").tolist()
        name = f"{kwargs.get('metric_key_prefix', 'eval')}_loss"
        if tokens and name in output.metrics:
            output.metrics[name] = nats / tokens
        return output

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs["labels"] = without_repeated_rows(
            inputs["labels"],
            self._batch * self.accelerator.num_processes + self.accelerator.process_index,
            self.args.eval_batch_size,
            self._rows,
            inputs.get("seq_idx"),
        )
        self._batch += 1
        result = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        tokens = (inputs["labels"][:, 1:] != -100).sum().to(self._nats)  # of the first token nothing is asked
        self._nats += torch.stack([result[0].to(self._nats) * tokens, tokens])
        return result


def without_repeated_rows(
    labels: torch.Tensor, batch: int, batch_size: int, rows: int, row_of_token: torch.Tensor | None = None
) -> torch.Tensor:
    """Take the labels off the rows that accelerate repeats, so that all ranks have as many batches.

    Args:
        labels: `(batch size, tokens)`, int64, of one rank's batch; `(1, tokens)` if its rows stand behind each other.
        batch: its number among the batches of all ranks.
        batch_size: rows a rank.
        rows: in the data set; what lies behind the last one is a repetition.
        row_of_token: `(1, tokens)`: in which row of the batch each token stands, where they stand behind each other, as
            TRL lays them for packing; None if each has a line of its own.

    Returns:
        The same, with -100 in the repeated rows.
    """
    if row_of_token is None:
        row_of_token = torch.arange(len(labels), device=labels.device)[:, None]
    return labels.masked_fill(row_of_token + batch * batch_size >= rows, -100)
