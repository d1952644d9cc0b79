"""What the exercises of lessons 02, 02b and 03 want, with the reason behind usual wrong answers."""

from nbutils.lessons.judging import Judge, digest, equal_to, hashed
from nbutils.planning.memory_items import GIB
from nbutils.planning.shapes import SHAPES

WRAPS = {
    "719f86bc2b0ba557",
    "884e0b6d4b754986",
    "d77cd76876618467",
    "df165ab3463c2182",
}  # digests of (prep, storage, right answer)
GATHERED_WHOLE = 0.05  # nats: another arithmetic moves the loss less, a cast far more
SEVENTY, EIGHT = SHAPES["llama31_70b"], SHAPES["llama31_8b"]


def _adapter_gib(rank: int, bytes_a_number: int, ranks: int) -> float:
    return bytes_a_number * SEVENTY.adapter_parameters(rank) / ranks / GIB


def _cast_adds(shape) -> float:
    """GiB that the standard prep adds: two bytes for each number of embedding, head and norms."""
    return 2 * (2 * shape.vocab * shape.hidden + (2 * shape.layers + 1) * shape.hidden) / GIB


def _true(why: str) -> Judge:
    return lambda yours: "" if yours is True else why


def _wraps(yours) -> str:
    """(prep, storage) -> whether FSDP 1 wraps it."""
    reasons = {
        ("custom", "float16"): "the 4-bit values are declared float16. What is the dtype of the norms?",
        ("standard", "float16"): "the standard prep casts the norms. To the dtype of the storage?",
        ("standard", "uint8"): "can integers take part in autograd?",
        ("standard", "float32"): "which dtype do the norms have after the cast, and which one the storage?",
    }
    for (prep, storage), why in reasons.items():
        if digest((prep, storage, yours[prep, storage])) not in WRAPS:
            return f"{prep} prep, {storage} storage: {why}"
    return ""


def _units_of_one_dtype(said: str) -> str:
    if said == "wraps":
        return ""
    return "Which modules of a layer are fp32 beside 4-bit ones? Give their class units of its own."


def _repaired(model) -> str:
    """A model that has been through the standard prep, with the cast undone."""
    import bitsandbytes as bnb  # heavy, and needed by this exercise alone
    import torch

    from nbutils.lessons.one_process import tiny_in_nf4
    from nbutils.training.prep import rotary_error

    def as_bytes(parameter):
        return parameter.data.contiguous().view(torch.uint8)

    if not isinstance(model, torch.nn.Module):
        return "`repair` must return the model."
    for (name, now), loaded in zip(model.named_parameters(), tiny_in_nf4().parameters()):
        if isinstance(loaded, bnb.nn.Params4bit):
            if now.dtype != loaded.dtype or not torch.equal(as_bytes(now), as_bytes(loaded)):
                return f"The packed values of {name} are other bytes now. They were bf16 before: leave them."
        elif now.dtype != torch.bfloat16:
            return f"{name} is still {str(now.dtype).removeprefix('torch.')}."
    if rotary_error(model) > 0:
        return (
            "All parameters are right, and one buffer was cast with them: the rotary frequencies, which must stay fp32 "
            "(notebook 03). Go through the parameters, and leave the rest of the model alone."
        )
    return ""


def _own_prep(seen) -> str:
    """What a prep made of PEFT's gives under FSDP 1: "like ours", "frequencies exact"."""
    if not seen["frequencies exact"]:
        return (
            "It trains, and the rotary frequencies are rounded. Which function of this notebook hides them?"
        )
    if not seen["like ours"]:
        return "The frequencies are exact, and the loss is another one. What does the standard prep cast?"
    return ""


def _half_recomputed(kept: float) -> str:
    """kB that the tiny model keeps for the backward pass when it recomputes every second layer."""
    if kept < 1000:
        return "As few bytes are kept as before: every layer is still recomputed."
    return (
        "" if kept < 3500 else "That is as much as without recomputation. Keep two layers of four recomputed."
    )


OF_THE_PREP: dict[str, Judge] = {
    "02.1": hashed(
        "ced77a9d72eb8ed6",
        {
            "bfloat16 and float16": "It meets the parameters in the order of the figure. Which comes first?",
            "bfloat16 and float32": "That is the message of the standard prep. Here nothing was cast.",
        },
    ),
    "02.2": equal_to(
        lambda: _cast_adds(EIGHT),
        {
            2 * _cast_adds(EIGHT): "bf16 had two of the four bytes already: the cast adds two.",
            _cast_adds(EIGHT) / 2: "The model has an embedding and a head, and both are cast.",
        },
    ),
    "02.3": _wraps,
    "02.4": _units_of_one_dtype,
    "02.5": _repaired,
    "02b.1": lambda gap: (
        ""
        if gap < GATHERED_WHOLE
        else "The loss is not that of the exact weights. A gather may not cast: compare the two dtypes."
    ),
    "02b.2": lambda changed: (
        "" if changed == 0 else "Some patterns arrive changed. Which dtypes does that copy leave alone?"
    ),
    "02b.3": hashed(
        "d78d1a3f3bcf22d7",
        dict.fromkeys(
            ("monday", "wednesday"),
            "Load the base exactly, and work out its loss on the rows of that run. Does it differ?",
        ),
    ),
    "03.1": hashed(
        "8527a891e2241369",
        {
            28: "Is every input of a recomputed layer one that asks for a gradient? Look at layer 2.",
            0: "Layer 3 is not recomputed with every second layer: 0 and 2 are.",
            7: "Each of seven projections has two matrices, A and B.",
        },
    ),
    "03.2": equal_to(
        lambda: _adapter_gib(64, 16, 4),
        {
            _adapter_gib(
                64, 8, 4
            ): "That is bf16. An fp32 adapter takes four bytes, and so do gradient and averages.",
            _adapter_gib(64, 16, 1): "That is the whole adapter; four ranks share it.",
            _adapter_gib(64, 4, 4): "Gradient and Adam's two averages come on top of the weight.",
        },
    ),
    "03.3": _true("The preflight still finds a unit of two dtypes. Which module did it name?"),
    "03.5": _own_prep,
    "03.4": _half_recomputed,
}
