"""What the exercises want: each answer is worked out or kept as a hash, with the reason behind usual wrong ones."""

from nbutils.launching.config_files import FILLED
from nbutils.lessons.config_at_70b import gradient_ratio
from nbutils.lessons.judging import READ_AGAIN, Judge, equal_to, hashed, shown
from nbutils.planning.memory_items import GIB, quantisation_state_bytes
from nbutils.planning.memory_plan import Plan, fits, plan
from nbutils.planning.model_needs import MODELS, gpu_gib
from nbutils.planning.network_traffic import LINKS, bytes_between_machines
from nbutils.planning.run_setup import Choices, Setup
from nbutils.planning.shapes import SHAPES

SEVENTY, EIGHT, BIG = (SHAPES[name] for name in ("llama31_70b", "llama31_8b", "llama31_405b"))
CHAT = 350  # tokens of a chat in exercise 06.4
UNCHANGED = 0.02  # nats: a loss that moved less has not moved


def _seventy_scales() -> float:
    return SEVENTY.layers * quantisation_state_bytes(SEVENTY.linear_parameters) / GIB


def _adapter_gib(rank: int, bytes_a_number: int, ranks: int) -> float:
    return bytes_a_number * SEVENTY.adapter_parameters(rank) / ranks / GIB


def _cast_adds(shape) -> float:
    """GiB that the standard prep adds: two bytes for each number of embedding, head and norms."""
    return 2 * (2 * shape.vocab * shape.hidden + (2 * shape.layers + 1) * shape.hidden) / GIB


def _plan_with_offload(length: int) -> Plan:
    return plan(SEVENTY, Setup(2, 1, True), 1, length)


def _longest_row() -> int:
    return max(n for n in range(1024, 32768, 1024) if fits(_plan_with_offload(n))[24] > 0)


def _loss_stays(change) -> str:
    if abs(change) < UNCHANGED:
        return ""
    return (
        f"The loss moved by {shown(float(change))}. Which setting says how long a step of the optimizer is?"
    )


def _loss_rises(change) -> str:
    """How far the held-out loss went up."""
    if change > UNCHANGED:
        return ""
    if change > -UNCHANGED:
        return "The loss stayed where it was: such steps are too small to do harm, or good."
    return f"The loss still fell, by {shown(-float(change))}. What makes each step of the optimizer longer?"


def _models_that_fit(yours) -> str:
    wanted = {name for name, m in MODELS.items() if name != "tiny" and gpu_gib(m, 2, False) <= 24}
    for name in set(yours) - {"tiny"}:
        if name not in wanted:
            return f"Look at the column *GiB a GPU* of {name} once more."
    return "" if wanted <= set(yours) else "One more fits."


def _room_for_chats(batch: int, length: int) -> float:
    fastest = Choices(embeddings_on_host=True, compile_layers=True)
    return fits(plan(SEVENTY, Setup(2, 2, True), batch, length, choices=fastest))[24]


def _rows_for_chats(yours) -> str:
    """(rows a GPU, tokens a row) for chats of CHAT tokens, one in a row: the most rows that fit a 24 GB card."""
    batch, length = yours
    if length < CHAT:
        return f"A chat of {CHAT} tokens would be cut. Take longer rows."
    if length > CHAT + 64:
        return "Most of such a row is padding, which is computed like text. Take shorter rows."
    if _room_for_chats(batch, length) <= 0:
        return "The plan says that it does not fit a 24 GB card. Take fewer rows."
    if _room_for_chats(batch + max(1, batch // 8), length) > 0:
        return "It fits, and there is room for many more rows: each step moves all weights anyway."
    return ""


def _copy_stays(held) -> str:
    """[(shard, gathered copy), ...] in bytes before, during and after the layer: the copy must be there afterwards."""
    if held[0][1]:
        return "Now the copy is there before anything was gathered. Another line frees it after the layer."
    if not held[-1][1]:
        return "After the layer the gathered copy is gone. Which line frees it?"
    return "" if held[1][1] else "Nothing is gathered any more. Take out one line, and leave the others."


def _cards_without_offload() -> int:
    seventy, room = MODELS["llama31_70b"], FILLED * 23.6
    return next(cards for cards in range(2, 100) if gpu_gib(seventy, cards, False) <= room)


def _two_machines(given) -> str:
    wanted = {"nnodes": 2, "nproc_per_node": 8, "node_rank": 1}
    explain = {
        "nnodes": "`num_machines` says how many machines there are.",
        "nproc_per_node": "`num_processes` counts the GPUs of all machines together.",
        "node_rank": "The second machine has the number 1: machines count from 0.",
    }
    return next((explain[key] for key, value in wanted.items() if str(given.get(key)) != str(value)), "")


def _really_asks(name: str) -> str:
    if name == "SHARD_GRAD_OP":
        return ""
    return f"Accelerate makes {name} of it. Which key does FSDP 1 read its strategy from?"


def _true(why: str) -> Judge:
    return lambda yours: "" if yours is True else why


ANSWERS: dict[str, Judge] = {
    "00.1": equal_to(
        lambda: 8e9 / 2 / GIB,
        {
            8e9 / GIB: "That is a byte a weight; NF4 takes half of one.",
            4.0: "That is in units of 10^9 bytes; a GiB is 2^30.",
            2 * 8e9 / GIB: "That is bf16, two bytes a weight.",
        },
    ),
    "00.2": equal_to(_seventy_scales, {0.51: "You divided it by the ranks. Is it a parameter?"}),
    "00.3": _models_that_fit,
    "00.4": _loss_stays,
    "00.5": _loss_rises,
    "01.1": equal_to(
        lambda: (35.8 / 4, 35.8),
        {
            (
                35.8 / 4,
                35.8 / 4,
            ): "Between the passes SHARD_GRAD_OP frees nothing that the forward pass gathered.",
            (35.8 / 2, 35.8): "Four ranks share the weights, not two.",
        },
    ),
    "01.2": _copy_stays,
    "01.3": equal_to(
        _cards_without_offload,
        {
            2: "Offload is still true there: print the whole fsdp_config of the file for two cards.",
            3: "By the bare count it fits, and leaves less room than `for_machine` wants.",
        },
    ),
    "01b.1": _two_machines,
    "01b.2": equal_to(
        lambda: gradient_ratio(SEVENTY, 64),
        {
            gradient_ratio(SEVENTY, 16): "That is rank 16. A larger adapter is a larger part of the unit.",
            4
            * gradient_ratio(SEVENTY, 16): "A larger adapter is a larger part of the unit: the ratio falls.",
        },
    ),
    "01b.3": _really_asks,
    "02.2": equal_to(
        lambda: _cast_adds(EIGHT),
        {
            2 * _cast_adds(EIGHT): "bf16 had two of the four bytes already: the cast adds two.",
            _cast_adds(EIGHT) / 2: "The model has an embedding and a head, and both are cast.",
        },
    ),
    "02.4": _true(
        "The loss is not that of the exact weights. A gather may not cast: compare the two dtypes."
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
    "03.4": lambda kept: "" if kept > 100 else "As few tensors are kept as before. Which line saves memory?",
    "06.1": equal_to(
        lambda: (BIG.layers * quantisation_state_bytes(BIG.linear_parameters) / GIB, False),
        {
            (
                BIG.layers * quantisation_state_bytes(BIG.linear_parameters) / GIB,
                True,
            ): "FSDP does not shard it.",
            (
                BIG.layers * quantisation_state_bytes(BIG.linear_parameters) / GIB / 8,
                True,
            ): "FSDP does not shard it.",
            (quantisation_state_bytes(BIG.linear_parameters) / GIB, False): "That is one layer.",
        },
    ),
    "06.2": equal_to(
        _longest_row,
        {
            _longest_row()
            + 1024: "That row is the first that does not fit. Mind what CUDA and NCCL take: `fits` does."
        },
    ),
    "06.3": equal_to(
        lambda: _plan_with_offload(8192).peak_moment,
        {"wrapping": "Wrapping does not depend on the rows. Print the moments of the plan for 8,192 tokens."},
    ),
    "06.4": _rows_for_chats,
    "07.1": equal_to(lambda: 2, {8: "`num_processes` counts the processes of all machines.", 4: READ_AGAIN}),
    "07.2": equal_to(
        lambda: 150, {200: "Checkpoint 200 is torn: it does not count.", 0: "One complete one is there."}
    ),
    "07.3": equal_to(
        lambda: bytes_between_machines(SEVENTY, Setup(world_size=4), 2) / LINKS["25 Gbit/s"],
        {
            bytes_between_machines(SEVENTY, Setup(world_size=4), 2)
            / 25e9: "25 Gbit/s are 25/8 gigabytes a second."
        },
    ),
    "07.4": lambda yours: _culprit(yours),
}


def _culprit(yours) -> str:
    """(rank, name of its error) in the log of exercise 07.4."""
    rank, error = yours
    if rank != 1:
        return "That rank only says that somebody is missing. Whose error is about the data?"
    if "valueerror" not in str(error).casefold():
        return "The rank is right. Name its own error, the last line of its traceback."
    return ""
