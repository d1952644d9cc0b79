"""Answer `accelerate config` through a terminal, as a person would."""

import contextlib
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

# (part of the question, what to answer, the key it sets). A number is a row of a menu, counted from 0; "" is Enter.
ANSWERS: list[tuple[str, int | str, str]] = [
    ("In which compute environment are you running?", 0, "compute_environment"),
    ("Which type of machine are you using?", 4, "distributed_type"),
    ("How many different machines will you use", "1", "num_machines"),
    ("Should distributed operations be checked while running", "no", "debug"),
    ("Do you wish to optimize your script with torch dynamo?", "no", "dynamo_config"),
    ("Do you want to use DeepSpeed?", "no", "deepspeed_config"),
    ("Do you want to use FullyShardedDataParallel?", "yes", "distributed_type"),
    ("What should be your FSDP version?", 0, "fsdp_version"),
    ("What should be your sharding strategy?", 0, "fsdp_reshard_after_forward"),
    ("Do you want to offload parameters and gradients to CPU?", "yes", "fsdp_offload_params"),
    ("What should be your auto wrap policy?", 0, "fsdp_auto_wrap_policy"),
    (
        "Do you want to use the model's `_no_split_modules` to wrap",
        "yes",
        "fsdp_transformer_layer_cls_to_wrap",
    ),
    ("What should be your FSDP's backward prefetch policy?", 0, "fsdp_backward_prefetch"),
    ("What should be your FSDP's state dict type?", 2, "fsdp_state_dict_type"),
    ("Do you want to enable FSDP's forward prefetch policy?", "no", "fsdp_forward_prefetch"),
    ("Do you want to enable FSDP's `use_orig_params` feature?", "no", "fsdp_use_orig_params"),
    ("Do you want to enable CPU RAM efficient model loading?", "yes", "fsdp_cpu_ram_efficient_loading"),
    ("Do you want to enable FSDP activation checkpointing?", "no", "fsdp_activation_checkpointing"),
    ("How many GPU(s) should be used for distributed training?", "2", "num_processes"),
    ("Do you wish to use mixed precision?", 0, "mixed_precision"),
]
# In which keys the answered file differs from config_fsdp.yaml, and why the plugin is the same all the same.
DIFFERENCES: dict[str, str] = {
    "fsdp_version": "new: 2024's file has no version, and no version means 1",
    "fsdp_sharding_strategy": "2024's spelling; today's questionnaire does not write it, and FULL_SHARD is its default",
    "fsdp_reshard_after_forward": "today's spelling of the strategy; FSDP 1 does not read it",
    "fsdp_activation_checkpointing": "new: off; our script asks the Trainer for activation checkpointing",
    "enable_cpu_affinity": "new: off; pins each process to the CPU cores near its GPU",
}
MENU_WAITS, MENU_DONE = "\x1b[?25l", "\x1b[?25h"  # a menu hides the cursor while it waits for a key


def answer(
    file: str | Path, answers: list[tuple[str, int | str, str]] = ANSWERS, timeout: float = 90
) -> list[str]:
    """Run `accelerate config` in a terminal and answer each question as it appears.

    Args:
        file: the YAML file that the questionnaire shall write.
        answers: (part of the question, answer, key) in the order in which they are asked.
        timeout: seconds for the whole questionnaire.

    Returns:
        The questions that were asked, word for word.

    Raises:
        RuntimeError: another question came than the one expected, or the questionnaire failed.
    """
    terminal, other_end = pty.openpty()
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.accelerate_cli",
        "config",
        "--config_file",
        str(file),
    ]
    process = subprocess.Popen(
        command, stdin=other_end, stdout=other_end, stderr=other_end, start_new_session=True, close_fds=True
    )
    os.close(other_end)
    screen = _Screen(terminal, time.monotonic() + timeout)
    asked = []
    try:
        for question, reply, _ in answers:
            line = screen.wait_for(question)
            if isinstance(reply, int):
                screen.wait_for(MENU_WAITS)
                screen.press(str(reply), again_until=None)
                screen.press("\r", again_until=MENU_DONE)
            else:
                screen.press(reply + "\r", again_until=None)
            asked.append(line)
        screen.wait_for("accelerate configuration saved at")
        process.wait(timeout=30)
    finally:
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        os.close(terminal)
    return asked


class _Screen:
    """What the terminal has shown so far, and how far it has been read."""

    def __init__(self, terminal: int, deadline: float):
        self.terminal, self.deadline = terminal, deadline
        self.text, self.read_to = "", 0

    def wait_for(self, what: str) -> str:
        """Read until `what` is on the screen; return the line it stands in."""
        while what not in self.text[self.read_to :]:
            if not self._more(self.deadline - time.monotonic()):
                shown = _plain(self.text)[-600:]
                raise RuntimeError(
                    f"`accelerate config` was expected to show {what!r} and did not. The end of its screen:\n{shown}\n"
                    "Today's accelerate asks other questions: fix nbutils/lessons/accelerate_questionnaire.py."
                )
        at = self.text.index(what, self.read_to)
        self.read_to = at + len(what)
        time.sleep(0.05)
        self._more(0.05)
        return _plain(self.text[at:]).strip().partition("\n")[0].strip()

    def press(self, keys: str, again_until: str | None) -> None:
        """Type keys. A menu empties its input while it draws, so a key may have to be pressed again."""
        os.write(self.terminal, keys.encode())
        if again_until is None:
            time.sleep(0.1)
            return
        while again_until not in self.text[self.read_to :]:
            if not self._more(1.0):
                os.write(self.terminal, keys.encode())
            if time.monotonic() > self.deadline:
                raise RuntimeError(
                    f"A menu of `accelerate config` did not take its answer:\n{_plain(self.text)[-600:]}"
                )
        self.read_to = self.text.index(again_until, self.read_to) + len(again_until)

    def _more(self, seconds: float) -> bool:
        ready, _, _ = select.select([self.terminal], [], [], max(0.0, seconds))
        if not ready:
            return False
        try:
            piece = os.read(self.terminal, 65536)
        except OSError:  # the other end has closed
            return False
        self.text += piece.decode(errors="replace")
        return bool(piece)


def _plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r", "\n")
