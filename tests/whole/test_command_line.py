"""The command line: bad input ends in a sentence and status 1, with nothing written; paths are those of the reader."""

import argparse
import dataclasses
import logging
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import save_file
from transformers import LlamaConfig
from trl import SFTConfig

from nbutils.__main__ import COMMANDS, main
from nbutils.common.paths import ROOT, at_root, from_here
from nbutils.launching.dry_run import make_parser as parser_of_dryrun
from nbutils.launching.launch import choose_config
from nbutils.publishing import site

LINEAR = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A base and an adapter that are good, and folders in which something is missing or damaged."""
    folder = tmp_path_factory.mktemp("inputs")
    config = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
                         num_attention_heads=2, num_key_value_heads=2)  # fmt: skip
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder / "base")
    with torch.device("meta"):
        from transformers import LlamaForCausalLM

        shapes = {name: p.shape for name, p in LlamaForCausalLM(config).named_parameters()}
    tensors = {name: torch.randn(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    save_file(tensors, folder / "base" / "model.safetensors", {"format": "pt"})

    LoraConfig(r=2, target_modules=["q_proj"]).save_pretrained(folder / "adapter")
    stem = "base_model.model." + LINEAR.removesuffix(".weight")
    pair = {f"{stem}.lora_A.weight": torch.ones(2, 64), f"{stem}.lora_B.weight": torch.ones(64, 2)}
    save_file(pair, folder / "adapter" / "adapter_model.safetensors")

    def spoiled(source: str, name: str, file: str, content: bytes | None) -> None:
        shutil.copytree(folder / source, folder / name)
        (folder / name / file).unlink()
        if content is not None:
            (folder / name / file).write_bytes(content)

    weights = (folder / "base" / "model.safetensors").read_bytes()
    small = (folder / "adapter" / "adapter_model.safetensors").read_bytes()
    spoiled("base", "base_no_config", "config.json", None)
    spoiled("base", "base_bad_config", "config.json", b"{")
    spoiled("base", "base_cut", "model.safetensors", weights[:-50])
    spoiled("base", "base_bad_index", "model.safetensors", None)
    (folder / "base_bad_index" / "model.safetensors.index.json").write_text("[]")
    spoiled("adapter", "adapter_no_config", "adapter_config.json", None)
    spoiled("adapter", "adapter_bad_config", "adapter_config.json", b"[1]")
    spoiled("adapter", "adapter_no_weights", "adapter_model.safetensors", None)
    spoiled("adapter", "adapter_cut", "adapter_model.safetensors", small[:-50])
    (folder / "empty").mkdir()
    (folder / "file").write_text("")
    (folder / "script.py").write_text("")
    return folder


def files_in(folder: Path) -> dict:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


BAD = {
    "merge: no such folder": ("merge /nonexistent {in}/adapter {out}", "There is no folder /nonexistent."),
    "merge: no such model": (
        "merge nobody/nothing {in}/adapter {out}",
        "nobody/nothing is no local folder, and the hub could not be reached",
    ),
    "merge: base without config": (
        "merge {in}/base_no_config {in}/adapter {out}",
        "base_no_config holds no config.json; wanted a model",
    ),
    "merge: damaged config": (
        "merge {in}/base_bad_config {in}/adapter {out}",
        "base_bad_config/config.json is no JSON",
    ),
    "merge: damaged base": (
        "merge {in}/base_cut {in}/adapter {out}",
        "model.safetensors in {in}/base_cut is cut short or damaged",
    ),
    "merge: damaged index": (
        "merge {in}/base_bad_index {in}/adapter {out}",
        "model.safetensors.index.json is no index of safetensors",
    ),
    "merge: no adapter": (
        "merge {in}/base {in}/empty {out}",
        "empty holds no adapter_config.json; wanted the folder of an adapter",
    ),
    "merge: adapter without config": (
        "merge {in}/base {in}/adapter_no_config {out}",
        "adapter_no_config holds no adapter_config.json",
    ),
    "merge: adapter's damaged config": (
        "merge {in}/base {in}/adapter_bad_config {out}",
        "adapter_bad_config/adapter_config.json is not what PEFT writes",
    ),
    "merge: adapter without weights": (
        "merge {in}/base {in}/adapter_no_weights {out}",
        "adapter_no_weights holds no adapter_model.safetensors",
    ),
    "merge: damaged adapter": (
        "merge {in}/base {in}/adapter_cut {out}",
        "adapter_cut/adapter_model.safetensors is cut short or damaged",
    ),
    "merge: a file in the way": (
        "merge {in}/base {in}/adapter {in}/file",
        "/file cannot be read or written: Not a directory.",
    ),
    "quantise: no such folder": ("quantise /nonexistent {out}", "There is no folder /nonexistent."),
    "quantise: empty folder": ("quantise {in}/empty {out}", "empty holds no config.json; wanted a model"),
    "quantise: damaged base": ("quantise {in}/base_cut {out}", "model.safetensors in {in}/base_cut is cut"),
    "quantise: a file in the way": (
        "quantise {in}/base {in}/file/out",
        "/file/out.partial cannot be read or written: Not a directory.",
    ),
    "export: no such checkpoint": (
        "export /nonexistent {out}",
        "/nonexistent cannot be used: manifest.json is missing.",
    ),
    "dryrun: no such model": (
        "dryrun --model nonsense --run-dir {out}",
        "'nonsense' is neither one of tiny, smollm2,",
    ),
    "dryrun: no such config": (
        "dryrun --model tiny --config nope.yaml --run-dir {out}",
        "There is no config file nope.yaml.",
    ),
    "dryrun: a trained run": (
        "dryrun --model tiny --run-dir {in}",
        "holds train.yaml, and no dry run has written it",
    ),
    "script: a file in the way": (
        "script {in}/file",
        "/file cannot be read or written: File exists.",
    ),
    "site: a file in the way": ("site --out {in}/file", "/file is no earlier site, and is left as it is."),
    "workshop: a file in the way": (
        "workshop --out {in}/file",
        "/file/student cannot be read or written: Not a directory.",
    ),
    "run: a file in the way": ("run --run-dir {in}/file", "/file is a file; wanted a folder for the run"),
    "launch: no such script": ("launch --log {out} nope.py", "There is no script nope.py."),
    "launch: a folder as the log": (
        "launch --log {in}/empty {in}/script.py",
        "/empty cannot be read or written: Is a directory.",
    ),
}


@pytest.mark.parametrize("words, sentence", BAD.values(), ids=BAD.keys())
def test_bad_input_ends_in_a_sentence_and_nothing_is_written(
    inputs, tmp_path, monkeypatch, capsys, words, sentence
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (inputs / "train.yaml").touch()
    before = files_in(inputs)
    places = {"in": str(inputs), "out": str(tmp_path / "out")}
    assert main([word.format(**places) for word in words.split()]) == 1
    assert sentence.format(**places) in capsys.readouterr().err
    assert files_in(inputs) == before and list(tmp_path.iterdir()) == []


# ---- one thing, one spelling ---------------------------------------------------------------------------------------

SCRIPT = {
    "--max-length",
    "--max-steps",
    "--per-device-train-batch-size",
    "--gradient-accumulation-steps",
    "--lora-r",
}
OTHER_SPELLINGS = {
    *(
        "--length",
        "--seq-len",
        "--steps",
        "--batch",
        "--rank",
        "--lora-rank",
        "--timeout",
        "--processes",
        "--config-file",
    ),
    *("--ranks", "--output", "--output-dir", "--accumulation", "--batch-size"),
}


def options_of(command: str, capsys) -> set[str]:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    return set(re.findall(r"--[\w-]+", capsys.readouterr().out))


@pytest.mark.parametrize("command", COMMANDS)
def test_the_command_line_has_one_spelling_for_one_thing(command, capsys):
    shown = options_of(command, capsys)
    assert {option for option in shown if "_" in option} == set()
    assert shown & OTHER_SPELLINGS == set()


def test_settings_of_the_script_have_its_names(capsys, tmp_path):
    shown = options_of("dryrun", capsys)
    assert shown >= SCRIPT
    fields = {field.name for field in dataclasses.fields(SFTConfig)} | {"lora_r"}
    assert {option.removeprefix("--").replace("-", "_") for option in SCRIPT} <= fields
    asked = {
        "--max-length",
        "--per-device-train-batch-size",
        "--gradient-accumulation-steps",
        "--num-processes",
    }
    assert options_of("data", capsys) >= asked
    assert options_of("launch", capsys) >= {"--config", "--num-processes", "--time-limit"}
    assert options_of("doctor", capsys) >= {"--model", "--num-processes"}


def test_what_was_typed_before_is_still_understood():
    options = parser_of_dryrun().parse_args(
        ["--length", "64", "--batch", "2", "--steps", "3", "--timeout", "9"]
    )
    told = (options.max_length, options.per_device_train_batch_size, options.max_steps, options.time_limit)
    assert told == (64, 2, 3, 9.0)
    assert parser_of_dryrun().parse_args([]).max_length == 1024
    parser = argparse.ArgumentParser()
    COMMANDS["launch"].arguments(parser)
    options = parser.parse_args(
        ["--config_file", "c.yaml", "--num_processes", "2", "s.py", "--config", "train.yaml"]
    )
    assert (options.config, options.num_processes) == (Path("c.yaml"), 2)
    assert options.arguments == ["--config", "train.yaml"]


def test_a_site_that_cannot_be_made_is_a_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(site, "CONFIG", tmp_path)
    assert main(["site", "--out", str(tmp_path / "site")]) == 1
    assert "Sphinx cannot make the site:\n" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_fault_of_ours_is_no_sentence(monkeypatch):
    """What is nobody's bad input must keep its traceback."""
    monkeypatch.setattr("nbutils.launching.script_file.script_text", lambda notebook: {}["a bug"])
    with pytest.raises(KeyError):
        main(["script", "unused"])


def test_a_full_disk_ends_in_a_sentence_and_is_given_back(inputs, tmp_path):
    """No file of the command may grow beyond 16 KiB: to whoever writes it that is a full disk."""
    ended = subprocess.run(
        [sys.executable, "-m", "nbutils", "quantise", inputs / "base", tmp_path / "out"],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (16384, 16384)),
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert ended.returncode == 1
    assert "model-00001.safetensors could not be written" in ended.stderr.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_the_commands_are_as_quiet_as_the_notebooks(tmp_path, monkeypatch):
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    monkeypatch.setattr(logger, "filters", [])
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS", raising=False)
    assert main(["script", str(tmp_path)]) == 0

    def passes(text: str) -> bool:
        return bool(logger.filter(logging.makeLogRecord({"msg": text})))

    assert not passes("Failed to load CPU gemm_4bit_forward from kernels-community: install kernels")
    assert passes("anything else")
    assert "HF_HUB_DISABLE_PROGRESS_BARS" not in os.environ  # a download of 140 GB shows where it is


# ---- from a folder that is not the root -----------------------------------------------------------------------------


def test_files_of_the_repository_are_found_from_anywhere(tmp_path, monkeypatch):
    config = "configs/accelerate/rehearsal_fsdp1.yaml"
    for place, wanted in ((ROOT, config), (ROOT / "notebooks", f"../{config}"), (tmp_path, ROOT / config)):
        monkeypatch.chdir(place)
        assert choose_config(1, rehearsal=True) == Path(wanted)
        assert choose_config(1, rehearsal=True).is_file()
        assert from_here("runs").absolute().resolve() == (ROOT / "runs").resolve()


def test_paths_are_those_of_the_folder_they_were_typed_in(tmp_path, monkeypatch):
    typed = {ROOT: "configs/x.yaml", ROOT / "notebooks": "../configs/x.yaml", ROOT / "configs": "x.yaml"}
    for place, path in typed.items():
        monkeypatch.chdir(place)
        assert at_root(path) == Path("configs/x.yaml")
    monkeypatch.chdir(tmp_path)
    assert at_root("x.yaml") == tmp_path / "x.yaml"
    assert at_root(ROOT / "configs") == ROOT / "configs"


def test_a_run_finds_the_parameters_that_were_typed_in_a_subfolder(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.yaml").write_text("max_stepz: 1\n")
    monkeypatch.chdir(tmp_path)
    assert main(["run", "--params", "mine.yaml", "--run-dir", "out"]) == 2
    assert "Did you mean max_steps?" in capsys.readouterr().err
    monkeypatch.chdir(ROOT / "notebooks")
    assert main(["run", "-p", "dataset", "../data/nothing.jsonl", "--run-dir", "out"]) == 2
    assert "there is no file or folder data/nothing.jsonl." in capsys.readouterr().err
    assert Path.cwd() == ROOT


def test_a_dry_run_finds_the_config_that_was_typed_in_a_subfolder(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.yaml").write_text("distributed_type: FSDP\n")
    monkeypatch.chdir(ROOT / "notebooks")
    assert main(["dryrun", "--model", "nonsense"]) == 1
    assert "\n'nonsense' is neither" in capsys.readouterr().err  # as it was typed
    monkeypatch.chdir(tmp_path)
    assert main(["dryrun", "--model", "tiny", "--config", "mine.yaml", "--run-dir", "out"]) == 1
    assert f"{tmp_path}/mine.yaml says distributed_type: FSDP" in capsys.readouterr().err
