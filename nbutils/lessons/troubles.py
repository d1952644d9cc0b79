"""What breaks, as data: message, cause, what to do, the versions it was seen with, and where it can be seen again.

`docs/troubleshooting.md` and the table of notebook 07 are made of this; the test holds each proof.
Run as: `python -m nbutils.lessons.troubles > docs/troubleshooting.md`
"""

from dataclasses import dataclass

NOT_REPRODUCED = "not reproduced"
RECORDED = "recorded on GPUs: "  # and the file in benchmarks/results/
CELL = "notebook 07: "  # and the tag of the cell


@dataclass(frozen=True)
class Trouble:
    """One thing that goes wrong.

    Args:
        message: words of the library, as they appear; or, in brackets, what is seen where nothing is said.
        where: who says it, and the versions it was seen with.
        cause: why.
        fix: what to do.
        proof: a test as `tests/file.py::name`, a tagged cell, a recorded file, or that it was not reproduced.
        reports: public reports of it, `owner/name#number`.
    """

    message: str
    where: str
    cause: str
    fix: str
    proof: str
    reports: tuple[str, ...] = ()


TROUBLES = [
    # ---- the config file and the launch
    Trouble(
        "The config file at ... had unknown keys",
        "accelerate 1.15",
        "A key on the first level is misspelt.",
        "Fix the key. `python -m nbutils launch` names the nearest one.",
        CELL + "unknown-key",
    ),
    Trouble(
        "(a key below `fsdp_config` has no effect)",
        "accelerate 1.15",
        "It is misspelt, or belongs to the other version of FSDP. There accelerate drops it without a word.",
        "Launch with `python -m nbutils launch` or from notebook 04: both refuse such a file.",
        CELL + "dropped-key",
    ),
    Trouble(
        "(`rdzv_backend: c10d` has no effect)",
        "accelerate 1.15",
        "`rdzv_backend` and `same_network` are read from the command line only.",
        "Add `--rdzv_backend c10d` to the command on each machine.",
        CELL + "two-machines",
    ),
    Trouble(
        "Tried to launch distributed communication on port",
        "accelerate 1.15",
        "Another program, often an earlier run that was not ended, listens on the port of machine 0.",
        "End it, or choose another `main_process_port`. On one machine use `--main_process_port 0`.",
        CELL + "port-in-use",
    ),
    Trouble(
        "(`distributed_type` is MULTI_CPU: each rank holds the whole model)",
        "accelerate 1.15",
        "Without an accelerator accelerate falls back from FSDP to DDP without a word.",
        "Launch the rehearsal, `-m nbutils.launching.rehearsal`. The script stops a run that is not FSDP.",
        "tests/whole/test_training.py::test_a_launch_that_falls_back_from_fsdp_fails",
    ),
    Trouble(
        "(HYBRID_SHARD: each rank trains an adapter of its own)",
        "torch 2.13, FSDP 1",
        "FSDP 1 shards among as many ranks as a process sees devices. One: nothing is sharded, no gradient summed.",
        "`FULL_SHARD`, or all GPUs of each machine. The launcher and the script refuse it.",
        "tests/whole/test_lessons_00_01.py::test_hybrid_with_one_device_sums_no_gradients",
        ("pytorch/pytorch#154888",),
    ),
    # ---- model and data
    Trouble(
        "... is behind a licence",
        "nbutils, for GatedRepoError of huggingface_hub 2.4",
        "The model is behind a licence, and your account has not accepted it or is not logged in.",
        "Accept it on the model's page, then `hf auth login`.",
        "tests/whole/test_bad_input.py::test_bad_input_is_refused_before_a_weight_is_read",
    ),
    Trouble(
        "Repo id must be in the form 'repo_name' or 'namespace/repo_name'",
        "huggingface_hub 2.4",
        "The model's name is a path, and there is no such folder, so it is taken for a hub id.",
        "Look at the path.",
        CELL + "no-folder",
    ),
    Trouble(
        "Error while deserializing header",
        "safetensors 0.8",
        "A shard was cut short: a download or a copy that did not end.",
        "Delete this file and download again; the others are kept.",
        CELL + "cut-short",
    ),
    Trouble(
        "An error occurred while generating the dataset",
        "datasets 5.2",
        "A line of the JSONL file is no JSON. The message does not say which.",
        "`nbutils.data.rows` names the line. Fix it or take it out.",
        CELL + "broken-line",
    ),
    # ---- wrapping
    Trouble(
        "Must flatten tensors with uniform dtype but got",
        "torch 2.11, 2.13, FSDP 1",
        "One unit holds parameters of two dtypes. The standard k-bit prep casts norms, embedding and head to fp32.",
        "`prepare_for_fsdp_qlora` in its place (notebooks 02 and 03).",
        CELL + "flatten-dtype",
        ("axolotl-ai-cloud/axolotl#1482", "axolotl-ai-cloud/axolotl#1494", "huggingface/trl#1723"),
    ),
    Trouble(
        "Cannot flatten integer dtype tensors",
        "torch 2.11, 2.13, FSDP 1",
        "The packed 4-bit weights are stored as uint8, the default of bitsandbytes.",
        "Load with `bnb_4bit_quant_storage=torch.bfloat16`; `load_nf4` does, whatever the checkpoint has.",
        CELL + "flatten-integer",
        ("huggingface/peft#1432", "huggingface/trl#1375", "bitsandbytes-foundation/bitsandbytes#1092"),
    ),
    Trouble(
        "Must flatten tensors with uniform `requires_grad` when `use_orig_params=False`",
        "torch 2.11, 2.13, FSDP 1",
        "Trained and frozen parameters lie in one unit.",
        "Wrap what is trained as units of its own: `peft.utils.other.fsdp_auto_wrap_policy(model)`.",
        CELL + "flatten-grad",
    ),
    Trouble(
        "FSDP needs a non-CPU accelerator device",
        "torch 2.13",
        "FSDP 1 was given no device on a machine without an accelerator.",
        "`device_id=torch.device('cpu')`, or launch the rehearsal, which does it.",
        CELL + "no-accelerator",
    ),
    Trouble(
        "There are currently no available devices found",
        "accelerate 1.15",
        "`fsdp_sync_module_states: true` on a machine without an accelerator.",
        "Take the rehearsal's config there.",
        CELL + "sync-on-cpu",
    ),
    Trouble(
        "(FSDP 2 on GPUs begins with another loss than FSDP 1)",
        "torch 2.11, CUDA, two ranks; 2.13 has the same lines",
        "CUDA's copy in its gather writes every NaN as the same one, so packed values that look like NaN become other "
        "weights: recorded in gather_copy.json. The test's copy on a CPU does the same.",
        "`gather_as_bytes()` before training, as in the script, which also checks its first gather (notebook 02).",
        "tests/patches/test_fsdp2_gather.py::test_without_the_line_the_first_gather_ends_the_run",
        ("pytorch/pytorch#159333", "bitsandbytes-foundation/bitsandbytes#1945"),
    ),
    # ---- training
    Trouble(
        "(the log shows a loss, and the loss is NaN)",
        "transformers 5.23",
        "`logging_nan_inf_filter` puts a number made of the earlier losses into the log, and the run goes on.",
        "The script stops in the step before the optimizer takes it: `nbutils.training.nan_guard`.",
        CELL + "hidden-nan",
        ("huggingface/trl#6702",),
    ),
    Trouble(
        "Timed out waiting ...ms",
        "torch 2.13, gloo",
        "Another rank or its machine is gone, or waits for a dead file system.",
        "Look at the other machine. `ddp_timeout` sets how long a rank waits, in seconds; then `--resume true`.",
        "tests/whole/test_faults.py::test_a_rank_that_hangs_ends_the_run",
        ("huggingface/transformers#31675",),
    ),
    Trouble(
        "Watchdog caught collective operation timeout",
        "torch 2.11, NCCL",
        "The same on GPUs. The rank that says it waited; the one that hangs says nothing.",
        "As above. The run ends some time after `ddp_timeout`: NCCL waited a minute more.",
        RECORDED + "gpu_faults.json",
    ),
    Trouble(
        "Rank ... was killed by signal 9 (SIGKILL)",
        "Linux",
        "Host memory ran out, and the kernel chose this rank; or somebody did.",
        "Compare the plan's host memory with the machine's; add swap; fewer ranks a machine.",
        "tests/whole/test_faults.py::test_every_rank_ends_with_the_cause_and_the_last_checkpoint_is_good",
    ),
    Trouble(
        "Rank ... was killed by signal 7 (SIGBUS)",
        "Linux",
        "A mapped file became shorter or its disk went away while it was read; also a full /dev/shm.",
        "Leave the model's files alone while a run loads; see `python -m nbutils doctor` for /dev/shm.",
        "tests/whole/test_faults.py::test_every_rank_ends_with_the_cause_and_the_last_checkpoint_is_good",
    ),
    Trouble(
        "CUDA out of memory",
        "torch 2.11",
        "Peak of the step above the card. The plan says which moment it is (notebook 06).",
        "In this order: `embeddings_on_host`, one row a rank, activations and then weights in host memory, "
        "shorter rows, more GPUs.",
        RECORDED + "70b_fsdp1_cap_b1_l1024.json",
    ),
    Trouble(
        "Tensors must be CUDA and dense",
        "torch 2.11, trl 1.16, FSDP 2 with offload",
        "TRL's SFTTrainer gathers a metric that lies on the CPU.",
        "`embeddings_on_host: true`, as in configs/goals: the head then comes to the GPU. Or FSDP 1.",
        RECORDED + "gpu_faults.json",
    ),
    Trouble(
        "Inconsistent compute device and `device_id` on rank",
        "torch 2.11, FSDP 1",
        "The model was loaded before the rank had chosen its device, so all ranks loaded onto GPU 0.",
        "`PartialState()` before anything is loaded, as in the script.",
        RECORDED + "gpu_faults.json",
    ),
    # ---- saving
    Trouble(
        "(`adapter_model.safetensors` has 40 bytes and no tensor)",
        "peft 0.21.0 to 0.21.2 with FSDP 1; not 0.20",
        "PEFT looks for names of the wrapped model in a state dict that has none of them.",
        "`nbutils.adapters.save.save_adapter`, which reads back what it wrote (notebook 05).",
        "tests/adapters/test_save.py::test_the_plain_save_loses_the_adapter_and_ours_does_not",
    ),
    Trouble(
        "No space left on device",
        "Linux",
        "The disk filled up while a checkpoint was written. It is left out as a whole; the one before it is good.",
        "Free some space, set `save_total_limit`, and go on with `--resume true`.",
        "tests/whole/test_faults.py::test_a_full_disk_while_saving",
    ),
    Trouble(
        "(FSDP 2 with FULL_STATE_DICT saves only rank 0's part of an adapter)",
        "accelerate before 1.15",
        "Each rank's part was dropped but that of rank 0.",
        "accelerate 1.15, which this package demands; `nbutils.adapters.save` does not take that way.",
        NOT_REPRODUCED,
        ("huggingface/accelerate#4206",),
    ),
]


def where_shown(trouble: Trouble) -> str:
    """The proof as a reader reads it."""
    if trouble.proof.startswith("tests/"):
        return f"`{trouble.proof}`"
    if trouble.proof.startswith(CELL):
        return f"notebook 07, cell `{trouble.proof.removeprefix(CELL)}`"
    return trouble.proof


def as_markdown() -> str:
    """The table, one row a trouble."""
    lines = [
        "| you see | who says it | cause | what to do | shown by | reports |",
        "|---|---|---|---|---|---|",
    ]
    for trouble in TROUBLES:
        message = trouble.message if trouble.message.startswith("(") else f"`{trouble.message}`"
        message = message.replace(
            "`requires_grad` when `use_orig_params=False`", "requires_grad when use_orig_params=False"
        )
        message = message.replace("and `device_id` on", "and device_id on")
        reports = ", ".join(trouble.reports) or "-"
        cells = (message, trouble.where, trouble.cause, trouble.fix, where_shown(trouble), reports)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


PAGE = f"""# Troubleshooting

Made of `nbutils/lessons/troubles.py` by `python -m nbutils.lessons.troubles`; notebook 07 shows the same table.
*Shown by* names the cell or the test in which the library itself does it, with the versions of
`requirements.lock`; "{RECORDED.strip(": ")}" names a recorded file; the rest is marked "{NOT_REPRODUCED}". Reports are
public and may have other causes as well.

"""


if __name__ == "__main__":
    print(PAGE + as_markdown())
