"""The tables of lesson 02: which kinds of parameters have which dtype, and what the standard prep's cast adds."""

import torch

from nbutils.lessons import plots

GIB = 2**30
KINDS = ("4-bit linear layers", "norm", "embed_tokens", "lm_head")


def by_kind(model: torch.nn.Module) -> dict[str, tuple[str, int]]:
    """Kind of parameter -> (its dtypes, its bytes).

    Args:
        model: a Llama, without an adapter.
    """
    kinds = {}
    for name, parameter in model.named_parameters():
        kind = name.split(".")[-2]
        kind = KINDS[0] if kind.endswith("proj") else "norm" if "norm" in kind else kind
        seen, size = kinds.get(kind, (set(), 0))
        kinds[kind] = (seen | {str(parameter.dtype)[6:]}, size + parameter.numel() * parameter.element_size())
    return {kind: ("/".join(sorted(seen)), size) for kind, (seen, size) in kinds.items()}


def print_by_kind(models: dict[str, dict[str, tuple[str, int]]]) -> None:
    """Print what `by_kind` found, two columns a model.

    Args:
        models: a name for each model -> what was found in it.
    """
    head = ["parameters", *(word for name in models for word in (name, "bytes"))]
    rows = []
    for kind in KINDS:
        found = [model[kind] for model in models.values()]
        rows.append([kind, *(word for dtype, size in found for word in (dtype, f"{size:,}"))])
    plots.table(head, rows)


def print_cost_of_cast(tiny: int, seventy: int, tiny_head: int, seventy_head: int) -> None:
    """Print what the cast adds; all in bytes. The first number of the tiny model is measured, the others computed.

    Args:
        tiny: to the whole tiny model.
        seventy: to the whole 70B.
        tiny_head: to the tiny model's `lm_head`.
        seventy_head: to that of the 70B.
    """
    print(f"numbers that the cast makes fp32 in the tiny model: {tiny // 2:,}")
    places = [
        ("to each rank's whole copy in host RAM", tiny, seventy),
        ("to each of two GPUs, its shard", tiny / 2, seventy / 2),
        ("to each GPU while lm_head is gathered", tiny_head, seventy_head),
    ]
    rows = [(where, f"{here / 1e6:.3f} MB", f"{there / GIB:.2f} GiB") for where, here, there in places]
    plots.table(["what the cast adds", "tiny model", "70B"], rows)
