"""What is wrong with the machine: disk, folders, memory, versions."""

import json

from bad_input.case import settings


def huge(case):
    """The shape of a Llama of 405 B parameters; of its checkpoint a header and a hole, more is not looked at."""
    base = case.base(
        hidden_size=16384,
        intermediate_size=53248,
        num_attention_heads=128,
        num_hidden_layers=126,
        head_dim=128,
    )
    header = {
        "lm_head.weight": {"dtype": "BF16", "shape": [1024, 16384], "data_offsets": [0, 1024 * 16384 * 2]}
    }
    text = json.dumps(header).encode()
    (base / "model.safetensors").unlink()
    with (base / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + 1024 * 16384 * 2)


def another_run(case):
    (case.folder / "out/checkpoint-50").mkdir()


def adapter_name_taken(case):
    (case.folder / "out/adapter/adapter_config.json").unlink()
    (case.folder / "out/adapter/thesis.txt").write_text("years of work")


def output_is_a_file(case):
    (case.folder / "file").write_text("a file")
    case.settings["output_dir"] = str(case.folder / "file")


CASES = {
    # A run goes on by itself from a complete checkpoint of its own; this one is none.
    "another run": (another_run, r"checkpoint-50 cannot be used: manifest\.json is missing\. .* start anew"),
    "adapter folder of something else": (
        adapter_name_taken,
        r"holds something that is no adapter \(thesis\.txt\)",
    ),
    "output is a file": (output_is_a_file, r"output_dir .* is a file; wanted a folder"),
    "no disk for the checkpoints": (
        settings(save_strategy="steps", save_steps=1, max_steps=10**10),
        r"the checkpoints and the adapter need [\d,.]+ GB and [\d,.]+ GB are free",
    ),
    "too little host memory": (
        huge,
        r"2 processes need about [\d.]+ GiB of host memory on this machine \(planned\), and [\d.]+ GiB are free",
    ),
    "broken version": (
        lambda case: (case.installed("peft", "0.19.1"), case.variables.update(NBUTILS_UNTESTED="0")),
        r"peft is 0\.19\.1, and this code works with peft[<>=0-9.,]+ only\. .*pip install .*peft==",
    ),
}
