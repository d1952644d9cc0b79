"""Answer `accelerate config` through a terminal, as a person would."""

import re
import sys
from pathlib import Path

import pexpect

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
        timeout: seconds to wait for each question.

    Returns:
        The questions that were asked, word for word.

    Raises:
        RuntimeError: another question came than the one expected, or the questionnaire failed.
    """
    command = ["-m", "accelerate.commands.accelerate_cli", "config", "--config_file", str(file)]
    terminal = pexpect.spawn(sys.executable, command, timeout=timeout, encoding="utf-8", dimensions=(50, 300))
    terminal.delaybeforesend = 0.1  # a menu empties its input while it draws
    asked, wanted = [], ""
    try:
        for wanted, reply, _ in answers:
            # Behind its default, as in "[yes/NO]:", a question waits in its line; above a menu the line ends.
            terminal.expect(re.escape(wanted) + r"[^\r\n]*?(?:\]:|\r|\n)")
            asked.append(_without_codes(terminal.after).strip())
            if isinstance(reply, int):
                _choose(terminal, reply)
            else:
                terminal.send(reply + "\r")
        wanted = "accelerate configuration saved at"
        terminal.expect_exact(wanted)
        terminal.expect(pexpect.EOF)
    except (pexpect.TIMEOUT, pexpect.EOF):
        shown = _without_codes(terminal.before or "")[-600:]
        raise RuntimeError(
            f"`accelerate config` was expected to show {wanted!r} and did not. The end of its screen:\n{shown}\n"
            "Today's accelerate asks other questions: fix nbutils/lessons/accelerate_questionnaire.py."
        ) from None
    finally:
        terminal.close(force=True)
    return asked


def _choose(terminal: pexpect.spawn, row: int) -> None:
    """Choose a row of a menu. A key that comes while it draws is lost, so Enter is pressed until it is taken."""
    terminal.expect_exact(MENU_WAITS)
    terminal.send(str(row))
    for _ in range(30):
        terminal.send("\r")
        if terminal.expect_exact([MENU_DONE, pexpect.TIMEOUT], timeout=1) == 0:
            return
    raise pexpect.TIMEOUT("the menu took no answer")


def _without_codes(text: str) -> str:
    return re.sub(r"[\r\n]+", "\n", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text))
