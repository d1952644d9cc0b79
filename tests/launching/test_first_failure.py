"""What is said of a launch that failed, from the files it left."""

import os

import pytest

from nbutils.launching.first_failure import exit_statuses, first_failure, last_words

SUMMARY = """
[0]:
  time      : 2026-11-25_12:00:00
  host      : two
  rank      : {rank} (local_rank: {local})
  exitcode  : {code} (pid: {pid})
  error_file: <N/A>
"""


@pytest.fixture
def left(tmp_path):
    """`left(log, {local rank: {file: text}})` writes what a launch leaves; its result is what is said."""

    def write(log: str, ranks: dict[int, dict[str, str]]):
        (tmp_path / "log").write_text(log)
        for local, files in ranks.items():
            folder = tmp_path / "ranks/none_x1/attempt_0" / str(local)
            folder.mkdir(parents=True)
            for number, (name, text) in enumerate(files.items()):
                (folder / name).write_text(text)
                os.utime(folder / name, (number, number))
        return first_failure(tmp_path / "log", tmp_path / "ranks", 1)

    return write


def test_a_damaged_error_file_does_not_hide_the_failure(left):
    failed = left("", {1: {"error.json": '{"message": {"mess'}})
    assert "Rank 1 failed first:\n(its error file is damaged" in failed.message


def test_on_the_second_machine_ranks_have_their_number_over_all_machines(left):
    """torchrun's folders carry the numbers of this machine: here 0 and 1, which are ranks 2 and 3."""
    log = SUMMARY.format(rank=3, local=1, code=1, pid=12)
    failed = left(log, {0: {}, 1: {"error.json": '{"message": "ValueError: the cause"}'}})
    assert (failed.rank, failed.message.splitlines()[-2]) == (3, "Rank 3 failed first:")


def test_without_a_summary_the_lines_of_the_log_tell_the_numbers(left):
    log = "[rank 3] loading\n[rank 3] loaded\n"  # rank 2 said nothing
    failed = left(log, {0: {"error.json": '{"message": "ValueError: the cause"}'}, 1: {}})
    assert failed.rank == 2


@pytest.mark.parametrize("local, rank", [(0, 0), (0, 2), (1, 3)])
def test_an_abort_says_what_stands_in_its_error_output(left, local, rank):
    stderr = "loading\nfree(): invalid pointer\nFatal Python error: Aborted\n\nCurrent thread 0x01:\n"
    stderr += "  File y, line 4\n" * 20 + "Extension modules: numpy, torch (total: 2)\n"
    failed = left(SUMMARY.format(rank=rank, local=local, code=-6, pid=12), {local: {"stderr.log": stderr}})
    assert failed.rank == rank
    assert f"Rank {rank} failed first, ended by signal 6 (SIGABRT):\n" in failed.message
    assert failed.error.splitlines()[-2:] == ["free(): invalid pointer", "Fatal Python error: Aborted"]


def test_the_words_of_c_plus_plus_count_above_the_dump():
    text = "ValueError: an old one, caught\n  what():  [Rank 1] Watchdog\nframe #0\nFatal Python error: Aborted\n  File"
    assert last_words(text) == "[Rank 1] Watchdog"


def test_a_signal_that_has_no_name_is_said_by_its_number(left):
    failed = left(SUMMARY.format(rank=1, local=1, code=-35, pid=12), {1: {}})
    assert failed.error == "Rank 1 was killed by signal 35."


ONE = {"rank": 0, "local": 0, "pid": 1}
OTHER = {"rank": 1, "local": 1, "pid": 2}


@pytest.mark.parametrize(
    "log, codes",
    {
        "both": (SUMMARY.format(code=75, **ONE) + SUMMARY.format(code=75, **OTHER), {75}),
        "one, torchrun ended the other": (
            SUMMARY.format(code=75, **ONE)
            + "Sending process 2 closing signal SIGTERM\n"
            + SUMMARY.format(code=-15, **OTHER),
            {75},
        ),
        "one failed": (SUMMARY.format(code=75, **ONE) + SUMMARY.format(code=1, **OTHER), {75, 1}),
        "alone": (
            "subprocess.CalledProcessError: Command '[python]' returned non-zero exit status 75.\n",
            {75},
        ),
        "nothing": ("exit status 75", set()),
    }.values(),
)
def test_what_ranks_say_with_their_exit_status(tmp_path, log, codes):
    (tmp_path / "log").write_text(log)
    assert exit_statuses(tmp_path / "log") == codes
