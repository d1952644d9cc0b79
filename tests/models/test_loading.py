"""The loader against plain transformers, bit by bit; its memory; and checkpoints that must be refused by name."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from nbutils.__main__ import main
from nbutils.models import loading
from nbutils.models.hub import CannotDownload, local_folder
from nbutils.models.loading import load_nf4, quantise_checkpoint
from nbutils.models.nf4 import nf4_config
from nbutils.models.safetensors_reader import BadCheckpoint

NORM, LINEAR = "model.layers.1.input_layernorm.weight", "model.layers.1.mlp.up_proj.weight"


def write_base(folder: Path, tied: bool = False) -> Path:
    """A random two-layer Llama in bf16, in several shards."""
    config = LlamaConfig(
        vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=tied,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder, max_shard_size="300KB")
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def copy(base, tmp_path) -> Path:
    """A copy that a test may spoil."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for file in base.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def plain(folder: Path, quantised: bool = False) -> torch.nn.Module:
    settings = {} if quantised else {"quantization_config": nf4_config()}
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, device_map={"": "cpu"}, **settings
    )


def contents(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter, buffer and part of a quantisation state, as bytes."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, parameter in model.named_parameters():
        if getattr(parameter, "quant_state", None) is not None:
            tensors |= {
                f"{name}.{part}": value for part, value in parameter.quant_state.as_dict(packed=True).items()
            }
    return {name: t.detach().contiguous().view(-1).view(torch.uint8) for name, t in tensors.items()}


def assert_same(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    left, right = contents(ours), contents(theirs)
    assert left.keys() == right.keys()
    different = [name for name in left if not torch.equal(left[name], right[name])]
    assert not different
    assert any(name.endswith(".nested_absmax") for name in left)  # double quantisation is in it
    ids = torch.arange(24)[None]
    with torch.no_grad():
        assert torch.equal(ours.eval()(ids).logits, theirs.eval()(ids).logits)


@pytest.mark.parametrize("tied", [False, True])
def test_bf16_becomes_what_transformers_makes_of_it(tmp_path, tied, monkeypatch):
    monkeypatch.setattr("nbutils.models.nf4.PIECE", 64 * 100)  # several pieces, the last one shorter
    folder = write_base(tmp_path / "base", tied)
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert_same(load_nf4(str(folder)), plain(folder))


def test_a_large_model_goes_through_a_copy_on_disk_once(base, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "IN_MEMORY_BYTES", 0)
    monkeypatch.setattr(loading, "ROOT", tmp_path / "root")
    monkeypatch.chdir(tmp_path)  # wherever it is called from, the copy belongs to the repository
    assert_same(load_nf4(str(base)), plain(base))
    copies = [path for path in (tmp_path / "root" / "runs" / "cache").iterdir() if path.is_dir()]
    assert len(copies) == 1
    monkeypatch.setattr(loading, "quantise_checkpoint", lambda *_: pytest.fail("quantised a second time"))
    load_nf4(str(base))


def test_quantise_once_is_read_by_us_and_by_plain_transformers(base, tmp_path, capsys):
    out = tmp_path / "nf4"
    assert main(["quantise", str(base), str(out)]) == 0
    assert "NF4" in capsys.readouterr().out
    assert_same(
        load_nf4(str(out)), plain(base)
    )  # a fresh reference each time: a forward may repack its weights
    assert_same(plain(out, quantised=True), plain(base))
    assert main(["quantise", str(base), str(out)]) == 1
    assert "exists already" in capsys.readouterr().err
    assert main(["quantise", str(out), str(tmp_path / "again")]) == 1
    assert "quantised already" in capsys.readouterr().err


def test_what_a_killed_try_has_left_is_in_no_checkpoint(base, tmp_path):
    left = tmp_path / "out.partial"
    left.mkdir()
    (left / "model-00099.safetensors").write_bytes(b"of another model")
    quantise_checkpoint(base, tmp_path / "out")
    assert "model-00099.safetensors" not in [path.name for path in (tmp_path / "out").iterdir()]
    assert not left.exists()


def test_a_checkpoint_stored_as_uint8_is_repacked(base, tmp_path):
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=settings, dtype=torch.bfloat16, device_map={"": "cpu"}
    )
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.uint8
    model.save_pretrained(tmp_path / "uint8")
    ours = load_nf4(str(tmp_path / "uint8"))
    assert ours.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    assert_same(ours, plain(base))


def test_another_quantisation_is_refused(base, tmp_path):
    out = tmp_path / "nf4"
    quantise_checkpoint(base, out)
    changes = {"fp4": {"bnb_4bit_quant_type": "fp4"}, "gptq": {"load_in_4bit": False, "quant_method": "gptq"}}
    for word, change in changes.items():
        config = json.loads((out / "config.json").read_text())
        config["quantization_config"] |= change
        (out / "config.json").write_text(json.dumps(config))
        with pytest.raises(BadCheckpoint, match=f"quantised as {word}"):
            load_nf4(str(out))


def shard_of(folder: Path, name: str) -> Path:
    return folder / json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][name]


@pytest.mark.parametrize("text", ["[]", "{", '{"weight_map": []}'])
def test_a_damaged_index_is_named(copy, text):
    (copy / "model.safetensors.index.json").write_text(text)
    with pytest.raises(BadCheckpoint, match="is no index of safetensors"):
        load_nf4(str(copy))


def test_a_truncated_shard_is_named(copy):
    shard = shard_of(copy, LINEAR)
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(BadCheckpoint, match=f"{shard.name}.*cut short"):
        load_nf4(str(copy))


def test_a_missing_shard_is_named(copy):
    shard = shard_of(copy, LINEAR)
    shard.unlink()
    with pytest.raises(BadCheckpoint, match=f"{shard.name} is missing"):
        load_nf4(str(copy))


@pytest.mark.parametrize("name", [NORM, LINEAR])
@pytest.mark.parametrize("in_index", [True, False])
def test_a_missing_tensor_is_named(copy, name, in_index):
    shard = shard_of(copy, name)
    tensors = load_file(shard)
    del tensors[name]
    save_file(tensors, shard, {"format": "pt"})
    if not in_index:
        index = json.loads((copy / "model.safetensors.index.json").read_text())
        del index["weight_map"][name]
        (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BadCheckpoint, match=name):
        load_nf4(str(copy))


def test_a_tensor_of_another_shape_is_named(copy):
    shard = shard_of(copy, LINEAR)
    tensors = load_file(shard)
    tensors[LINEAR] = tensors[LINEAR][:-1].clone()
    save_file(tensors, shard, {"format": "pt"})
    with pytest.raises(BadCheckpoint, match=rf"{LINEAR} has shape \(255, 128\).*\(256, 128\)"):
        load_nf4(str(copy))


def test_nothing_to_download_is_said_in_a_sentence(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CannotDownload, match="no-such/model is no local folder"):
        local_folder("no-such/model")


# What is asked for is memory in use. Without these, malloc keeps freed blocks of up to 32 MB, in one pool a thread, and
# the figure moves by tens of MB from run to run.
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
MEMORY = """
import sys, re
from pathlib import Path
from nbutils.models import loading
import bitsandbytes, torch
def anonymous():
    return int(re.search(r"^RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text(), re.M)[1]) * 1024
from transformers import AutoModelForCausalLM
loading.load_nf4(sys.argv[3])  # imports and buffers are there now
before, highest = anonymous(), 0
def watch(function):
    def wrapped(*args, **kwargs):
        global highest
        result = function(*args, **kwargs)
        highest = max(highest, anonymous())
        return result
    return wrapped
loading.quantise_tensor = watch(loading.quantise_tensor)
import nbutils.models.nf4 as q
q.quantise_tensor = watch(q.quantise_tensor)
model = loading.load_nf4(sys.argv[1])
loaded = max(highest, anonymous()) - before
del model
highest = 0
loading.quantise_checkpoint(sys.argv[1], sys.argv[2])
print(loaded, highest - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's accounting of memory")
def test_memory_stays_below_the_quantised_model_and_a_few_tensors(base, tmp_path):
    config = LlamaConfig(
        vocab_size=512, hidden_size=1024, intermediate_size=4096, num_hidden_layers=6, num_attention_heads=8,
        num_key_value_heads=8,
    )  # fmt: skip
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in LlamaForCausalLM(config).named_parameters()}
    folder = tmp_path / "base"
    config.save_pretrained(folder)
    tensors = {name: torch.randn(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    in_bf16 = sum(t.numel() * 2 for t in tensors.values())
    run = subprocess.run(
        [sys.executable, "-c", MEMORY, str(folder), str(tmp_path / "out"), str(base)],
        capture_output=True, text=True, check=True, env=os.environ | GIVE_BACK,
    )  # fmt: skip
    loading_took, quantising_took = map(int, run.stdout.split()[-2:])
    print(f"bf16 {in_bf16:,}, loading took {loading_took:,}, quantising {quantising_took:,}")
    room = 40e6  # for the pieces a CPU works on
    assert loading_took < in_bf16 * (1 / 4 + 1 / 128) + room < 0.8 * in_bf16
    assert quantising_took < 0.6 * in_bf16  # it begins with what loading has left behind
