"""What the exercises want: each answer is worked out or kept as a hash, with the reason behind usual wrong ones."""

from nbutils.lessons.answers_04_to_07 import ANSWERS_04_TO_07
from nbutils.lessons.answers_of_prep import OF_THE_PREP
from nbutils.lessons.config_at_70b import gradient_ratio
from nbutils.lessons.judging import Judge, equal_to, shown
from nbutils.planning.memory_items import GIB, quantisation_state_bytes
from nbutils.planning.memory_plan import Plan, fits, plan
from nbutils.planning.model_needs import MODELS, gpu_gib, has_room
from nbutils.planning.run_setup import Choices, Setup
from nbutils.planning.shapes import SHAPES

SEVENTY, BIG = SHAPES["llama31_70b"], SHAPES["llama31_405b"]
CHAT = 350  # tokens of a chat in exercise 06.4
UNCHANGED = 0.02  # nats: a loss that moved less has not moved


def _seventy_scales() -> float:
    return SEVENTY.layers * quantisation_state_bytes(SEVENTY.linear_parameters) / GIB


def _plan_with_offload(length: int) -> Plan:
    return plan(SEVENTY, Setup(2, 1, True), 1, length)


def _longest_row() -> int:
    return max(n for n in range(1024, 32768, 1024) if fits(_plan_with_offload(n))[24] > 0)


def _first_backward(length: int) -> str:
    """The shortest row, in steps of 1,024 tokens, with which the backward pass of a layer is highest."""
    if length % 1024 or length <= 0:
        return "Take a multiple of 1,024 tokens."
    moments = {n: _plan_with_offload(n).peak_moment for n in (length, length - 1024) if n > 0}
    if moments.get(length) != "backward of a layer":
        return f"With such rows another moment is highest: {moments.get(length)}."
    return "" if moments.get(length - 1024) != "backward of a layer" else "A shorter row does it too."


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
    """(rows a GPU, tokens a row) for chats of CHAT tokens, one in a row: the most that leave 1 GiB of a card."""
    batch, length = yours
    if length < CHAT:
        return f"A chat of {CHAT} tokens would be cut. Take longer rows."
    if length > CHAT + 64:
        return "Most of such a row is padding, which is computed like text. Take shorter rows."
    if _room_for_chats(batch, length) < 1:
        return "The plan leaves less than 1 GiB of a 24 GB card. Take fewer rows."
    if _room_for_chats(batch + max(1, batch // 8), length) >= 1:
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
    seventy = MODELS["llama31_70b"]
    return next(cards for cards in range(2, 100) if has_room(seventy, cards, offload=False, card_gib=23.6))


def _two_machines(given) -> str:
    wanted = {"nnodes": 2, "nproc_per_node": 8, "node_rank": 1}
    explain = {
        "nnodes": "`num_machines` says how many machines there are.",
        "nproc_per_node": "`num_processes` counts the GPUs of all machines together.",
        "node_rank": "The second machine has the number 1: machines count from 0.",
    }
    for key, value in wanted.items():
        if str(given.get(key)) != str(value):
            return explain[key]
    if str(given.get("rdzv_endpoint")).startswith("None"):
        return "Where does the second machine look for the first? `main_process_ip` says it on every machine."
    return ""


def _really_asks(name: str) -> str:
    if name == "SHARD_GRAD_OP":
        return ""
    return f"Accelerate makes {name} of it. Which key does FSDP 1 read its strategy from?"


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
        lambda: (36.2 / 4, 36.2),
        {
            (
                36.2 / 4,
                36.2 / 4,
            ): "Between the passes SHARD_GRAD_OP frees nothing that the forward pass gathered.",
            (36.2 / 2, 36.2): "Four ranks share the weights, not two.",
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
    **OF_THE_PREP,
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
    "06.3": _first_backward,
    "06.4": _rows_for_chats,
    **ANSWERS_04_TO_07,
}
