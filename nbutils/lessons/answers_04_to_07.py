"""What the exercises of lessons 04, 05 and 07 want, as `nbutils.lessons.answers` does for the others."""

import math
from functools import cache

from nbutils.adapters.change_kept import INTO_NF4, change_kept
from nbutils.launching.config_faults import BadConfig, refuse_bad_config
from nbutils.launching.config_files import launch_environment
from nbutils.lessons.judging import Judge, equal_to, hashed, shown
from nbutils.planning.memory_items import GIB
from nbutils.planning.memory_plan import CARDS
from nbutils.planning.network_traffic import LINKS, bytes_between_machines, tokens_per_second
from nbutils.planning.run_setup import Setup
from nbutils.planning.serving_memory import serving_bytes
from nbutils.planning.shapes import SHAPES

SEVENTY = SHAPES["llama31_70b"]
COURSE_ROWS = "data/instructions/train.jsonl"
STEP_OF_LENGTH = 32  # tokens, in exercise 04.3
KEPT_FREE = 1.0  # GiB a card, in exercise 05.4
HALF = (0.45, 0.55)  # what counts as half in exercise 05.3
SENT = bytes_between_machines(SEVENTY, Setup(world_size=4), 2)  # FULL_SHARD, two machines of two GPUs


@cache
def answers_cut(length: int) -> int:
    """How many answers of the course's rows lose their end at this `max_length`, with the tiny model's tokenizer."""
    from nbutils.data.report import look_at_data  # seconds of imports, for this exercise alone
    from nbutils.models.loading import load_tokenizer
    from nbutils.models.made_here import model_path

    return look_at_data(COURSE_ROWS, load_tokenizer(model_path("tiny")), length).answers_cut


def _whole_answers(length) -> str:
    """The smallest multiple of STEP_OF_LENGTH at which no answer is cut."""
    if not isinstance(length, int) or length < 1:
        return "Give a number of tokens."
    if length % STEP_OF_LENGTH:
        return f"It is not a multiple of {STEP_OF_LENGTH}."
    if lost := answers_cut(length):
        return f"At this length {lost} of the answers still lose their end."
    if not answers_cut(length - STEP_OF_LENGTH):
        return (
            "No answer is cut, and none would be with shorter rows. Each token more is computed in every row."
        )
    return ""


def _half_is_left(size) -> str:
    """A size of the change at which the merge into the 4-bit base leaves half of it."""
    if not isinstance(size, int | float) or not 0 < size < 1:
        return "Give the size as a part of the weights' norm, like 0.02 for 2 %."
    left = change_kept(size, width=512)[INTO_NF4]
    if HALF[0] <= left <= HALF[1]:
        return ""
    other = "larger" if left < 0.5 else "smaller"
    return f"At a change of {size:.1%} a share of {left:.2f} is left. Take a {other} one."


def room_for_context(tokens: int) -> float:
    """GiB that two 24 GB cards have left while they serve the 70B in Q4_K_M with a context of so many tokens."""
    return 2 * CARDS[24] - sum(serving_bytes(SEVENTY, context=tokens, rank=16).values()) / GIB


def _longest_context(tokens) -> str:
    if not isinstance(tokens, int) or tokens % 1024:
        return "Give a multiple of 1,024 tokens."
    if (left := room_for_context(tokens)) < 2 * KEPT_FREE:
        return f"It leaves {left:.1f} GiB of both cards together, and each was to keep {KEPT_FREE:g}."
    if room_for_context(tokens + 1024) >= 2 * KEPT_FREE:
        return "It fits, and 1,024 tokens more would fit as well."
    return ""


def _culprit(yours) -> str:
    """(rank, name of its error) in the log of exercise 07.1."""
    rank, error = yours
    if rank != 1:
        return "That rank only says that somebody is missing. Whose error is about the data?"
    if "valueerror" not in str(error).casefold():
        return "The rank is right. Name its own error, the last line of its traceback."
    return ""


def _config_is_right(file) -> str:
    """A file for FSDP 1 with FULL_SHARD and offload that `accelerate launch` takes as it is meant: exercise 07.2."""
    try:
        refuse_bad_config(file)
    except BadConfig as refused:
        return str(refused)
    wanted = {
        "FSDP_VERSION": ("1", "This is no file for FSDP 1 any more."),
        "FSDP_SHARDING_STRATEGY": ("FULL_SHARD", "The strategy is another one now."),
        "FSDP_OFFLOAD_PARAMS": (
            "true",
            "It is not refused, and it no longer offloads. What was the first key to say?",
        ),
    }
    made = launch_environment(file)
    return next(
        (why for key, (value, why) in wanted.items() if made.get(key, "1").lower() != value.lower()), ""
    )


def _no_number(loss) -> str:
    if isinstance(loss, float) and math.isnan(loss):
        return ""
    return f"The log still shows {shown(loss)}. Which of TrainingArguments' fields filters it?"


def _times_as_fast(seconds: float, link: str) -> float:
    return tokens_per_second(1, 4, seconds, SENT, LINKS[link])[0] * seconds / 2


ANSWERS_04_TO_07: dict[str, Judge] = {
    "04.1": equal_to(
        lambda: 2 * 7 * SEVENTY.layers,
        {
            7 * SEVENTY.layers: "Each adapted layer has an A and a B.",
            2 * SEVENTY.layers: "All seven linear layers of a Llama layer are adapted.",
            2 * 7 * 4: "That is the tiny model, with its four layers.",
        },
    ),
    "04.2": hashed(
        "b5bea41b6c623f7c",
        {False: "Look into the run.json of this launch: what does `verified` under `adapter` say?"},
    ),
    "04.3": _whole_answers,
    "04b.1": equal_to(
        lambda: 100,
        {
            150: "That is the newest one, and it is damaged.",
            173: "Between two checkpoints nothing is kept.",
            172: "Between two checkpoints nothing is kept.",
            0: "There are complete checkpoints.",
        },
    ),
    "04b.2": equal_to(
        lambda: "checkpoint-5",
        {
            "checkpoint-4": "That one is written every second step. Was the rank killed, or was it asked?",
            "checkpoint-6": "The signal came in the sixth step. Send it one step earlier.",
        },
    ),
    "04b.3": equal_to(
        lambda: "checkpoint-4",
        {"checkpoint-6": "The changed byte did not reach the file, or another folder was changed."},
    ),
    "05.1": hashed(
        "3e23e8160039594a",
        {
            "a": "Look at the names: PEFT finds none of them in its model, says so in a warning, and loads nothing.",
            "c": "Its B matrices are all zero: that is the adapter before the first step.",
        },
    ),
    "05.2": equal_to(
        lambda: (True, False),
        {
            (False, False): "The file of tensors was not to be touched, and the hash is of that file alone.",
            (
                True,
                True,
            ): "The logits are still the same: does the copy's adapter_config.json hold the new lora_alpha?",
        },
    ),
    "05.3": _half_is_left,
    "05.4": _longest_context,
    "07.1": _culprit,
    "07.2": _config_is_right,
    "07.3": _no_number,
    "07b.1": equal_to(
        lambda: (2, 3),
        {
            (8, 3): "`num_processes` counts the processes of all machines.",
            (2, 4): "Machines count from 0.",
            (2, 0): "That is the first machine.",
        },
    ),
    "07b.2": equal_to(
        lambda: SENT / LINKS["25 Gbit/s"],
        {
            SENT / 25e9: "25 Gbit/s are 25/8 gigabytes a second.",
            SENT / LINKS["10 Gbit/s"]: "That is 10 Gbit/s.",
            bytes_between_machines(SEVENTY, Setup(world_size=4), 2, hybrid=True)
            / LINKS["25 Gbit/s"]: "That is HYBRID_SHARD.",
        },
    ),
    "07b.3": equal_to(
        lambda: _times_as_fast(20, "10 Gbit/s"),
        {
            2.0: "That would be so if nothing had to be sent.",
            tokens_per_second(1, 4, 20, SENT, LINKS["10 Gbit/s"])[1] * 10: "That is with all of it hidden.",
            _times_as_fast(20, "10 Gbit/s") / 2: "Four GPUs work now, and each has its own rows.",
        },
    ),
}
# What is said of a right answer, and would give it away if it stood in the notebook.
EXPLAINED = {
    "04.2": """\
The check after saving proves that the file is what the ranks hold. It cannot know how they began.
On CPUs each rank keeps its part of its own copy, so this adapter is a patchwork of several
beginnings: it trains, and no single seed makes it again. On GPUs FSDP 1 has
`fsdp_sync_module_states`, which sends rank 0's copy to all while it wraps (notebook 01b).""",
    "04b.2": """\
The launch says that the ranks have saved, and prints the command that goes on. Status 75 is for
whoever started it: Slurm, or a loop in a shell, knows by it that the same command should be started
again.""",
    "04b.3": "Size and SHA-256 of each file stand in the manifest, which is written last.",
    "05.2": """\
The hash is of the tensors; what they are multiplied with stands in the config beside them. So the
answers are compared as well.""",
    "07.1": """\
Rank 0 was in a gather, where all ranks must take part. The other one was gone, so its connection
closed. Errors that speak of a peer, a connection or a time-out come from those who waited: look for
the rank that does not speak of another one.""",
}
