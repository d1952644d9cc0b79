"""Lessons 04 to 07b: what stands beside the script is about the script, and their exercises ask for what is there."""

import ast
import re
import subprocess
import sys

import gguf
import nbformat
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from nbutils.common.paths import ROOT
from nbutils.launching.script_file import script_text
from nbutils.lessons.course_map import LESSONS
from nbutils.lessons.three_adapters import FILE, write_three


def cell_of(notebook: str, words: str) -> str:
    (path,) = (ROOT / "notebooks").glob(f"{notebook}_*.ipynb")
    (source,) = (c.source for c in nbformat.read(path, as_version=4).cells if words in c.source)
    return source


def test_each_import_of_the_script_has_its_price():
    rows = re.findall(r"^\| (`.*?) \| (.+?) \| (.+?) \|$", cell_of("04", "## What each import"), re.MULTILINE)
    priced = {name for cell, _, _ in rows for name in re.findall(r"`(\w+)`", cell)}
    imported = {
        alias.name
        for node in ast.walk(ast.parse(script_text()))
        if isinstance(node, ast.ImportFrom) and node.module.startswith("nbutils")
        for alias in node.names
    }
    assert priced == imported
    numbers = {number for _, _, shown in rows for number in re.findall(r"\b\d\db?\b", shown)}
    assert numbers <= {lesson.number for lesson in LESSONS}


def test_the_lines_that_exercises_change_stand_in_the_script():
    """04.2 changes the seed, 04b.2 the kill; a script without these lines would be launched unchanged."""
    script = script_text()
    for words in (
        "set_seed(training.seed)",
        "    trainer.train(",
        "    question = torch.tensor(",
        "state = ",
    ):
        assert words in script
    kill = cell_of("04b", "class Kill(")
    assert "signal.SIGKILL" in kill and "global_step == 5" in kill


def test_of_the_three_adapters_one_is_an_adapter(tmp_path):
    config = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                         num_attention_heads=2, num_key_value_heads=1)  # fmt: skip
    model = get_peft_model(LlamaForCausalLM(config), LoraConfig(target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.ones_(parameter)
    model.save_pretrained(tmp_path / "adapter")
    whole = load_file(tmp_path / "adapter" / FILE)
    found = {
        letter: load_file(f / FILE) for letter, f in write_three(tmp_path / "adapter", tmp_path / "x").items()
    }
    assert found["b"].keys() == whole.keys() and all(torch.equal(found["b"][k], whole[k]) for k in whole)
    assert len(found["a"]) == len(whole) and not found["a"].keys() & whole.keys()
    assert found["c"].keys() == whole.keys() and not any(
        t.any() for k, t in found["c"].items() if "lora_B" in k
    )
    with pytest.warns(UserWarning, match="missing adapter keys"):
        loaded = PeftModel.from_pretrained(LlamaForCausalLM(config), tmp_path / "x" / "a")
    assert not any(
        p.any() for name, p in loaded.named_parameters() if "lora_B" in name
    )  # nothing of it arrived
    sizes = [(tmp_path / "x" / letter / FILE).stat().st_size for letter in found]
    assert max(sizes) < 1.2 * min(sizes)


def test_the_look_into_a_base_shows_what_the_lesson_asks_of_it(tmp_path):
    """The pattern of notebook 05, on a base file whose header is that of a 70B Instruct."""
    (pattern,) = re.findall(r'gguf-dump BASE\S+ \| grep -E "(\S+)"', cell_of("05", "gguf-dump"))
    writer = gguf.GGUFWriter(tmp_path / "base.gguf", "llama")
    writer.add_name("Llama 3.1 70B Instruct")
    writer.add_finetune("Instruct")
    writer.add_block_count(80)
    writer.add_chat_template("{% for message in messages %}")
    writer.add_tensor("rope_freqs.weight", torch.ones(64).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    dump = [sys.executable, "-m", "gguf.scripts.gguf_dump", str(tmp_path / "base.gguf")]
    printed = subprocess.run(dump, check=True, capture_output=True, text=True).stdout
    lines = [line for line in printed.splitlines() if re.search(pattern, line)]
    wanted = ("general.name = 'Llama 3.1 70B Instruct'", "'Instruct'", "block_count = 80", "chat_template")
    assert all(any(words in line for line in lines) for words in (*wanted, "rope_freqs.weight"))
    assert len(lines) == 5
