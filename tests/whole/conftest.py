"""What the tests of bad input share: every row of every table is run once, whichever file asks first."""

import http.server
import json
import statistics
import threading
from pathlib import Path

import pytest
import torch
from bad_input.case import SAVED, SETTINGS, Case, Hub, fork, prepare, words
from bad_input.data import GOOD
from bad_input.every import BAD
from safetensors.torch import load_file, save_file

from nbutils.launching.script_file import write_script
from nbutils.models.loading import quantise_checkpoint
from nbutils.models.tiny import tiny_base


@pytest.fixture(scope="session")
def hub():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="session")
def script(tmp_path_factory):
    return str(write_script(tmp_path_factory.mktemp("script")))


@pytest.fixture(scope="session")
def answered(tmp_path_factory, hub):
    """Every row of the table, run on two forked ranks: its case, and what came of it."""
    folder = tmp_path_factory.mktemp("bad")
    cases = prepare(folder, BAD)
    runs = [
        {
            "name": str(number),
            "out": str(case.folder / "out"),
            "fsdp": 1,
            "world": 2,
            "refuse": True,
            "args": ["--config", str(case.file)],
            "path": case.path,
            "variables": case.variables,
            "timeout": 60,
        }
        for number, case in enumerate(cases.values())
    ]
    seen = dict(zip(cases, fork(folder, runs, hub).values()))
    print("\nseconds on two ranks, imports aside")
    for name, row in seen.items():
        print(f"{row['seconds']:6.1f}  {name}")
    print(f"{statistics.median(row['seconds'] for row in seen.values()):6.1f}  median")
    return cases, seen


@pytest.fixture(scope="session")
def accepted(tmp_path_factory, hub):
    """Runs that look like bad input and are none: they train a step, or are ended where they would read weights."""
    folder = tmp_path_factory.mktemp("good")
    quantise_checkpoint(tiny_base(), folder / "nf4")
    for file in (folder / "nf4").glob("*.safetensors"):
        as_uint8(file)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        told = json.loads((folder / "nf4" / name).read_text())
        told.pop("pad_token", None)
        (folder / "nf4" / name).write_text(json.dumps(told))
    (folder / "nf4/chat_template.jinja").unlink(missing_ok=True)
    (folder / "four.jsonl").write_text(GOOD * 4)
    (folder / "other.jsonl").write_text(GOOD.replace("shard", "rank"))
    case = Case(folder / "untested")
    case.installed("peft", "0.21.99")
    told = {**SETTINGS, "max_steps": 1, "max_length": 64, "max_cut_share": 1}
    runs = [
        {
            "name": "uint8",
            "out": "uint8",
            "fsdp": 1,
            "world": 2,
            "args": words(told, model=folder / "nf4", output_dir=folder / "uint8"),
        },
        {
            "name": "untested",
            "out": "untested",
            "fsdp": 1,
            "world": 1,
            "path": case.path,
            "args": words(told, model=tiny_base(), output_dir=case.folder / "new"),
        },
        {
            "name": "short",
            "out": "short",
            "fsdp": 1,
            "world": 1,
            "args": words(
                {**told, "max_steps": -1, "num_train_epochs": 1, "logging_steps": 500},
                model=tiny_base(),
                dataset=folder / "four.jsonl",
                heldout_dataset=folder / "other.jsonl",
                output_dir=folder / "short",
            ),
        },
        {
            "name": "shared",
            "out": str(folder / "runs/out"),
            "fsdp": 1,
            "world": 2,
            "refuse": True,
            "args": words(SAVED, model=tiny_base(), output_dir=folder / "runs/out"),
            "variables": {"LOCAL_WORLD_SIZE": "1"},  # each the only rank of its machine
        },
    ]
    return fork(folder, runs, hub) | {"folder": folder}


def as_uint8(file: Path) -> None:
    """Store the packed weights as most of the hub does."""
    tensors = load_file(file)
    packed = {name: tensor for name, tensor in tensors.items() if f"{name}.absmax" in tensors}
    assert packed
    save_file(
        tensors | {name: tensor.contiguous().view(torch.uint8) for name, tensor in packed.items()},
        file,
        metadata={"format": "pt"},
    )
