"""Attention in packed rows: each row sees itself alone, in a kernel that knows where rows begin."""

import inspect

import torch
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from nbutils.common.refused import Refused

NAME = "within_rows"  # in transformers' registers of attention functions and masks
CAUSAL = (-1, 0)  # a token sees all tokens before it, and none after it


def attend_within_rows(model: PreTrainedModel) -> None:
    """Let a model compute packed rows as fast as one long row, and as if each row stood alone.

    With `packing: true` TRL puts rows of all lengths behind each other, lets positions begin again in each, and tells
    the model where rows begin (`cu_seq_lens_q`). SDPA makes a mask of all pairs of tokens of that, and a mask keeps it
    from its flash kernel. Here a GPU takes torch's kernel for rows of several lengths, and a CPU one row after the
    other. Batches that tell no row beginnings are left to SDPA.

    Args:
        model: with or without an adapter, before FSDP wraps it; changed in place.

    Raises:
        Refused: torch is too old for the kernel with grouped heads, or the model drops attention weights, which the
            kernel cannot do.
    """
    if torch.cuda.is_available() and "enable_gqa" not in inspect.signature(varlen_attn).parameters:
        raise Refused(
            f"packing wants torch 2.13 on a GPU: varlen_attn of torch {torch.__version__} has no enable_gqa. Update "
            "torch, or leave packing off and set train_sampling_strategy: group_by_length."
        )
    if model.config.attention_dropout:
        raise Refused(
            f"attention_dropout is {model.config.attention_dropout}; packed rows want 0. Leave packing off, or set "
            "attention_dropout to 0 in the model's config.json."
        )
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, padding_mask)
    model.set_attn_implementation(NAME)


def refuse_packing(training) -> None:
    """Refuse packing that would let a row see another one, or count a held-out row twice.

    Args:
        training: the script's `TrainingArguments`.

    Raises:
        Refused: naming the setting.
    """
    if not training.packing:
        return
    if training.packing_strategy != "bfd":
        raise Refused(
            f"packing_strategy is {training.packing_strategy}; wanted bfd, which keeps rows whole and apart. Leave it "
            "out."
        )
    if training.eval_packing is not False:
        raise Refused(
            f"eval_packing is {training.eval_packing}; wanted false, so that each held-out row is counted once and the "
            "loss can be compared with that of a run without packing."
        )


def padding_mask(
    *args, attention_mask: torch.Tensor | None = None, device: torch.device | str = "cpu", **shape
) -> torch.Tensor | None:
    """The mask of a batch with padding; None where there is none, because packed rows need no mask.

    transformers calls it once a forward pass (`AttentionMaskInterface`).

    Args:
        args: as for `sdpa_mask`.
        attention_mask: `(batch, length)`, bool; None for packed rows.
        device: of the mask.
        shape: as for `sdpa_mask`.

    Returns:
        `(batch, 1, length, length)`, bool, or None.
    """
    if attention_mask is None:
        return None
    return sdpa_mask(*args, attention_mask=attention_mask, device=device, **shape)


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **more,
) -> tuple[torch.Tensor, None]:
    """An attention function of transformers (`AttentionInterface`) that takes packed rows one by one.

    Args:
        module: the attention layer.
        query: `(batch, heads, length, head size)`, rotated; batch is 1 for packed rows.
        key: the same with as many heads as the model has for keys.
        value: like `key`.
        attention_mask: from `padding_mask`.
        dropout: 0 for packed rows.
        scaling: of the scores; None is one over the root of the head size.
        cu_seq_lens_q: `(rows + 1,)`, int32: where rows begin, and the length of all; None if rows are not packed.
        max_length_q: tokens of the longest row.
        more: what else transformers passes on.

    Returns:
        `(batch, length, heads, head size)`, and None in place of the weights.
    """
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **more
        )
    packed = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]  # (length, heads, head size)
    if query.is_cuda:
        # The longest row decides how many blocks the kernel starts; one number for all lengths compiles once.
        starts, longest = cu_seq_lens_q, max_length_q
        out = varlen_attn(
            *packed, starts, starts, longest, longest, scale=scaling, window_size=CAUSAL, enable_gqa=True
        )
    else:
        out = _row_by_row(*packed, cu_seq_lens_q, scaling)
    return out[None], None


@torch.compiler.disable  # the number of rows differs from batch to batch
def _row_by_row(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, starts: torch.Tensor, scaling: float | None
) -> torch.Tensor:
    """The same through SDPA, for a CPU: `(length, heads, head size)` of each."""
    lengths = starts.diff().tolist()
    rows = zip(*(tensor.transpose(0, 1)[None].split(lengths, dim=2) for tensor in (query, key, value)))
    out = [
        F.scaled_dot_product_attention(*row, is_causal=True, scale=scaling, enable_gqa=True) for row in rows
    ]
    return torch.cat(out, dim=2)[0].transpose(0, 1)
