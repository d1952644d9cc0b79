"""Real launches of tiny scripts: what a launch shows, what it says when a rank fails, and that no rank survives it."""

import os
import re
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import pytest
import yaml
from jupyter_client import KernelManager
from processes import kill_all_that_name, ranks_of, wait_until

from nbutils.common.paths import ROOT
from nbutils.launching.launch import LaunchFailed, LaunchStopped, launch
from nbutils.launching.launch_command import copyable, launch_command
from nbutils.launching.log_files import own_folder

CONFIG = ROOT / "configs/accelerate/rehearsal_fsdp1.yaml"
pytestmark = pytest.mark.launch

HEAD = """
    import json, os, signal, sys, time
    from pathlib import Path
    import torch.distributed as dist
    from torch.distributed.elastic.multiprocessing.errors import record

    rank = int(os.environ["RANK"])
"""


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path):
    """A test that fails while its ranks sleep would leave them, and the tests after it would find them."""
    yield
    kill_all_that_name(tmp_path)


def script(folder, body, head=HEAD):
    path = folder / "script.py"
    path.write_text(textwrap.dedent(head) + textwrap.dedent(body))
    return path


def run(path, tmp_path, args=(), **options):
    options = {"rehearsal": False, "timeout": 60, **options}
    return launch(path, list(args), CONFIG, log=tmp_path / "launch.log", **options)


def test_a_launch_runs_all_ranks_and_reads_their_progress(tmp_path, capsys):
    path = script(
        tmp_path,
        """
        dist.init_process_group("gloo")
        assert dist.get_world_size() == 2
        print("hello of", rank, sys.argv[1:])
        if rank == 0:
            with open(Path(sys.argv[2]) / "progress.jsonl", "a") as out:
                for step in range(1, 4):
                    out.write(json.dumps({"step": step, "max_steps": 3, "seconds": step, "loss": 4.0 - step}) + "\\n")
        dist.barrier()
        dist.destroy_process_group()
        """,
    )
    (tmp_path / "progress.jsonl").write_text(
        '{"step": 9, "max_steps": 9, "seconds": 1, "loss": 0.0}\n'
    )  # an older run
    result = run(path, tmp_path, ["--output_dir", str(tmp_path)], output_dir=tmp_path)

    assert [line["loss"] for line in result.progress] == [3.0, 2.0, 1.0]
    log = result.log.read_text()
    assert "[rank 0]" in log and "[rank 1]" in log
    assert f"hello of 1 ['--output_dir', '{tmp_path}']" in log
    printed = capsys.readouterr().out
    command = " ".join(printed.replace("\\\n", " ").split())  # it is broken where a path is long
    assert command.startswith("accelerate launch --config_file")
    assert "step 3/3 | loss 1.0000 | finished after" in printed
    assert "\r" not in printed


def test_a_torn_line_of_progress_ends_no_healthy_rank(tmp_path):
    path = script(
        tmp_path,
        """
        out = Path(sys.argv[1]) / "progress.jsonl"
        if rank == 0:
            with out.open("a") as stream:
                stream.write('{"step": 1, "max_st')  # the disk is full
            time.sleep(1)
            with out.open("a") as stream:  # a resume writes on
                stream.write('{"step": 1, "max_steps": 2, "seconds": 1}\\n{"step": 2, "max_steps": 2, "seconds": 2}\\n')
            time.sleep(1)
        """,
    )
    result = run(path, tmp_path, [str(tmp_path)], output_dir=tmp_path)
    assert [line["step"] for line in result.progress] == [2]
    assert [line["step"] for line in run(path, tmp_path, [str(tmp_path)], output_dir=tmp_path).progress] == [
        2
    ]


def test_two_launches_at_once_have_a_log_and_a_folder_each(tmp_path):
    """One fails; the other must neither say its error nor lose its own output."""
    path = script(
        tmp_path,
        """
        print("this is", sys.argv[1])
        time.sleep(2)
        if sys.argv[1] == "bad" and rank == 0:
            raise SystemExit("the error of the bad one")
        """,
    )
    with ThreadPoolExecutor() as pool:
        launches = [pool.submit(run, path, tmp_path, [name], show=False) for name in ("good", "bad")]
        good, bad = launches[0].result(), launches[1].exception()
    assert "this is good" in good.log.read_text() and "bad" not in good.log.read_text()
    assert "the error of the bad one" in str(bad) and "this is good" not in bad.log.read_text()
    assert {good.log.name, bad.log.name} == {"launch.log", "launch-2.log"}
    run(path, tmp_path, ["again"], show=False)
    assert "again" in (tmp_path / "launch.log").read_text()  # nobody holds it any more


def test_two_folders_of_one_second_are_two(tmp_path):
    folders = [own_folder(tmp_path / "launch.log") for _ in range(3)]
    assert len(set(folders)) == 3 and all(folder.is_dir() for folder in folders)


def test_the_first_failing_rank_is_named_with_its_own_error(tmp_path):
    path = script(
        tmp_path,
        """
        @record
        def main():
            dist.init_process_group("gloo")
            if rank == 1:
                raise ValueError("the shard of rank 1 is damaged")
            time.sleep(60)  # torchrun ends this rank with SIGTERM

        main()
        """,
    )
    with pytest.raises(LaunchFailed) as failed:
        run(path, tmp_path)
    message = str(failed.value)
    assert re.fullmatch(
        r"The log of all ranks: .*/launch\.log\nRank 1 failed first, in main\(\), script\.py, line \d+:\n"
        r"ValueError: the shard of rank 1 is damaged",
        message,
    ), message
    assert "SIGTERM" not in message
    assert (failed.value.rank, failed.value.returncode) == (1, 1)
    assert ranks_of(path) == []


def test_a_later_error_of_a_rank_that_waited_does_not_hide_the_cause(tmp_path):
    path = script(
        tmp_path,
        """
        @record
        def main():
            dist.init_process_group("gloo")
            if rank == 1:
                raise ValueError("the cause")
            dist.barrier()  # fails because rank 1 is gone: the consequence

        main()
        """,
    )
    with pytest.raises(LaunchFailed, match=r"Rank 1 failed first, in .*:\nValueError: the cause$"):
        run(path, tmp_path)


def test_a_script_that_records_nothing_and_exits_with_a_sentence(tmp_path):
    path = script(
        tmp_path,
        """
        if rank == 1:
            raise SystemExit("ConfigError: max_length is 0; it must be at least 8.")
        time.sleep(60)
        """,
    )
    with pytest.raises(LaunchFailed, match=r"Rank 1 failed first:\n.*max_length is 0"):
        run(path, tmp_path)


def test_a_rank_that_c_plus_plus_ends_is_heard(tmp_path):
    """What NCCL's watchdog leaves when a rank hangs: benchmarks/results/gpu_faults.json has it from two GPUs."""
    path = script(
        tmp_path,
        """
        import faulthandler
        if rank == 0:
            time.sleep(60)
        faulthandler.enable()  # as `record` of torchrun does: after an abort Python writes where each thread stood
        print("terminate called after throwing an instance of 'c10::DistBackendError'", file=sys.stderr)
        print("  what():  [Rank 1] Watchdog caught collective operation timeout: it ran for 20086 ms", file=sys.stderr)
        sys.stderr.flush()
        os.abort()
        """,
    )
    with pytest.raises(LaunchFailed) as failed:
        run(path, tmp_path)
    last = "[Rank 1] Watchdog caught collective operation timeout: it ran for 20086 ms"
    assert (failed.value.rank, str(failed.value).splitlines()[-1]) == (1, last)


def test_out_of_gpu_memory_comes_with_the_plan(tmp_path):
    """The error is torch's own class; no card is needed to raise it."""
    path = script(
        tmp_path,
        """
        import torch

        @record
        def main():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.96 GiB.")

        main()
        """,
    )
    settings = {"model": "llama31_70b", "per_device_train_batch_size": 4, "max_length": 2048, "lora_r": 16}
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(LaunchFailed) as failed:
        run(path, tmp_path, ["--config", str(tmp_path / "train.yaml")])
    first, *_, last = str(failed.value).splitlines()
    assert re.match(r"The plan for these settings: [\d.]+ GiB a rank .* Change first: .* GiB, fits\.", first)
    assert last == "OutOfMemoryError: CUDA out of memory. Tried to allocate 1.96 GiB."


def test_a_rank_that_is_killed_from_outside_is_said_to_be(tmp_path):
    path = script(
        tmp_path,
        """
        @record
        def main():
            dist.init_process_group("gloo")
            if rank == 0:
                os.kill(os.getpid(), signal.SIGKILL)  # what the kernel does when memory runs out
            dist.barrier()

        main()
        """,
    )
    with pytest.raises(LaunchFailed, match=r"Rank 0 was killed by signal 9 \(SIGKILL\)"):
        run(path, tmp_path)


def test_a_launch_that_cannot_start_says_why(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no script .*missing\.py"):
        run(tmp_path / "missing.py", tmp_path)
    with pytest.raises(LaunchFailed, match=r"SyntaxError"):
        run(script(tmp_path, "if:"), tmp_path)


def test_a_time_out_ends_every_rank(tmp_path):
    path = script(
        tmp_path,
        """
        Path(sys.argv[1], f"ready{rank}").touch()
        time.sleep(600)
        """,
    )
    with pytest.raises(LaunchStopped, match="had not ended after 8 s"):
        run(path, tmp_path, [str(tmp_path)], timeout=8)
    assert len(list(tmp_path.glob("ready*"))) == 2  # both had begun
    assert ranks_of(path) == []


LAUNCH = """
from nbutils.launching.launch import launch
launch({script!r}, [{folder!r}], {config!r}, log={folder!r} + "/launch.log", rehearsal=False)
"""
SLEEPER = """
    Path(sys.argv[1], f"ready{rank}").touch()
    time.sleep(600)
"""


def sleeper(tmp_path, body=SLEEPER):
    path = script(tmp_path, body)
    return path, LAUNCH.format(script=str(path), folder=str(tmp_path), config=str(CONFIG))


def both_ranks_are_up(tmp_path):
    return len(list(tmp_path.glob("ready*"))) == 2


def test_interrupting_the_kernel_ends_every_rank_and_leaves_the_kernel(tmp_path):
    stubborn = "\n    signal.signal(signal.SIGTERM, signal.SIG_IGN)" + SLEEPER
    path, code = sleeper(tmp_path, stubborn)
    manager = KernelManager(kernel_name="python3")
    manager.start_kernel(cwd=str(ROOT), env={**os.environ, "PYTHONPATH": str(ROOT)})
    client = manager.blocking_client()
    try:
        client.start_channels()
        client.wait_for_ready(timeout=60)
        launching = client.execute(code)
        wait_until(lambda: both_ranks_are_up(tmp_path), 60)
        assert len(ranks_of(path)) >= 3  # accelerate launch, two ranks

        manager.interrupt_kernel()
        wait_until(lambda: ranks_of(path) == [], 10)
        reply = client.get_shell_msg(timeout=10)
        while reply["parent_header"]["msg_id"] != launching:  # a slow kernel answers "are you ready?" twice
            reply = client.get_shell_msg(timeout=10)
        assert reply["content"]["ename"] == "KeyboardInterrupt"
        assert client.execute_interactive("1 + 1", timeout=10)["content"]["status"] == "ok"
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def test_no_rank_outlives_a_kernel_that_dies(tmp_path):
    path, code = sleeper(tmp_path)
    parent = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)})
    wait_until(lambda: both_ranks_are_up(tmp_path), 60)
    parent.kill()
    wait_until(lambda: ranks_of(path) == [], 10)
    parent.wait()


def test_the_printed_command_is_one_command_for_a_shell():
    words = launch_command(
        "a b.py", ["--model", "x" * 60, "--note", "it's"], "c.yaml", "nbutils.launching.rehearsal", 2
    )
    text = copyable(words)
    assert "\\\n" in text
    heard = subprocess.run(
        ["bash", "-c", text.replace("accelerate", "printf '%s\\0'", 1)], capture_output=True, text=True
    )
    assert heard.stdout.split("\0")[:-1] == words[1:]
