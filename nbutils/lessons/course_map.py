"""The course at a glance, kept as data: what each notebook answers, how long it takes, what it needs."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Lesson:
    """One notebook.

    Args:
        name: the file without its ending.
        question: what it answers.
        run: minutes of the tiny run on two CPU cores, rounded up.
        reading: minutes for its words and figures, the exercises apart; `tests/lessons/test_course_map.py` counts them.
        exercises: minutes for its exercises.
        needs: what must be there.
    """

    name: str
    question: str
    run: int
    reading: int
    exercises: int
    needs: str

    @property
    def number(self) -> str:
        """`01`, or `01b` for a notebook that goes on from another one."""
        return number(self.name)


def number(name: str) -> str:
    """What stands before the first `_` in the name of a notebook: `01b` of `01b_every_other_key`."""
    return name.split("_")[0]


LESSONS = [
    Lesson(
        "00_start_here",
        "Can this machine do it, and what will it take?",
        2,
        13,
        10,
        "Linux, Python 3.11 to 3.13",
    ),
    Lesson("01_fsdp_config_choices", "Which keys of the config decide?", 1, 19, 15, "nothing more"),
    Lesson("01b_every_other_key", "What does each other key do?", 1, 18, 15, "nothing more; a reference"),
    Lesson(
        "02_why_fp32_casting_fails", "Why does the standard prep die under FSDP?", 1, 10, 20, "nothing more"
    ),
    Lesson("02b_silent_corruption", "What spoils weights without a word?", 1, 15, 20, "nothing more"),
    Lesson("03_custom_prep", "What must the prep do, then?", 1, 20, 20, "nothing more"),
    Lesson("04_write_and_launch", "How do I train?", 2, 18, 15, "70B: 2 GPUs of 24 GB, 64 GiB host memory"),
    Lesson("04b_stop_and_resume", "It stopped. How do I go on?", 1, 10, 15, "nothing more"),
    Lesson(
        "05_save_verify_merge",
        "How do I get my model out?",
        1,
        19,
        15,
        "a run of 04; 70B merge: 302 GiB of disk",
    ),
    Lesson(
        "06_scale_to_70b",
        "Will 70B fit, and how fast?",
        2,
        22,
        15,
        "GPUs for its dry run; recorded otherwise",
    ),
    Lesson("07_when_it_breaks", "I see this message.", 1, 10, 15, "nothing more"),
    Lesson("07b_more_than_one_machine", "What if one machine is not enough?", 1, 14, 15, "nothing more"),
]
