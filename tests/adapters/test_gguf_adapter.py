"""The GGUF adapter in the real llama.cpp: PEFT's words and PEFT's log-probabilities, or a refusal by name."""

import json
import math
from importlib.util import find_spec

import gguf
import pytest
import torch
from llama_cpp import VOCABULARY, greedy, write_base
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from nbutils.__main__ import main
from nbutils.adapters import gguf_adapter
from nbutils.adapters.gguf_adapter import GgufError, write_gguf
from nbutils.adapters.lora_config import CONFIG, WEIGHTS, UnsupportedAdapter
from nbutils.adapters.merge_plan import MergeError

PROMPT, NEW = [3, 40, 5, 61, 7], 20
KINDS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {"q_proj": 7, "up_proj": 3},
        "alpha_pattern": {"layers.1.self_attn.k_proj": 40, "o_proj": 2},
    },
}
needs_llama_cpp = pytest.mark.skipif(
    find_spec("xllamacpp") is None, reason="pip install xllamacpp (llama.cpp)"
)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A random Llama of two layers, grouped queries, in fp32."""
    folder = tmp_path_factory.mktemp("gguf") / "base"
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base_gguf(base):
    return write_base(load(base), base.parent / "base.gguf")


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def make_adapter(base, folder, **options):
    chosen = {"r": 5, "lora_alpha": 9, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | options
    model = get_peft_model(load(base), LoraConfig(**chosen))
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape)
    model.save_pretrained(folder)
    return folder


def by_transformers(model):
    """Greedy ids, and the log-probabilities before each, as `greedy` gives them."""
    ids, table = list(PROMPT), []
    for _ in range(NEW):
        with torch.no_grad():
            table.append(model(torch.tensor([ids])).logits[0, -1].log_softmax(-1))
        ids.append(table[-1][:-1].argmax().item())  # the last token ends a text; llama.cpp is told to go on
    return ids[len(PROMPT) :], torch.stack(table)


def compare(base, base_gguf, adapter, file):
    ids, table = by_transformers(PeftModel.from_pretrained(load(base), adapter).eval())
    spoken, heard = greedy(base_gguf, PROMPT, NEW, file)
    same = sum(a == b for a, b in zip(ids, spoken))
    first = (table[0] - heard[0]).abs().max().item()  # the later ones have another past, if a word differed
    return same, first, (table - heard).abs().max().item() if same == NEW else math.inf


@needs_llama_cpp
@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_says_what_peft_says(base, base_gguf, tmp_path, kind):
    adapter = make_adapter(base, tmp_path / "adapter", **KINDS[kind])
    done = write_gguf(adapter, tmp_path / "adapter.gguf")
    assert (done["tensors"], done["permuted"]) == (28, 4)
    same, _, all_steps = compare(base, base_gguf, adapter, tmp_path / "adapter.gguf")
    print(f"{kind}: {same} of {NEW} words, log-probabilities to {all_steps:.1e}")
    assert same == NEW and all_steps < 1e-3

    alone, heard = by_transformers(load(base)), greedy(base_gguf, PROMPT, NEW)
    assert alone[0] == heard[0] and (alone[1] - heard[1]).abs().max() < 1e-3  # the test's own base is right
    assert (
        alone[1][0] - by_transformers(PeftModel.from_pretrained(load(base), adapter))[1][0]
    ).abs().max() > 0.1


@needs_llama_cpp
@pytest.mark.parametrize(
    "kind, broken", [("lora", "to_neighbours"), ("rslora", "rslora"), ("patterns", "pattern")]
)
def test_each_of_the_three_differences_is_needed(base, base_gguf, tmp_path, monkeypatch, kind, broken):
    adapter = make_adapter(base, tmp_path / "adapter", **KINDS[kind])
    if broken == "to_neighbours":
        monkeypatch.setattr(gguf_adapter, "to_neighbours", lambda rows, heads: rows)
    else:
        monkeypatch.setattr(gguf_adapter, "b_factor", lambda config, module: 1.0)
    if broken == "to_neighbours":  # the package notices by itself, and writes nothing
        with pytest.raises(GgufError, match="is not"):
            write_gguf(adapter, tmp_path / "adapter.gguf")
        assert not list(tmp_path.glob("*.gguf")) and not list(tmp_path.glob(".*.part"))
        monkeypatch.setattr(gguf_adapter, "_compare", lambda *args, **more: None)
    write_gguf(adapter, tmp_path / "adapter.gguf")
    same, first, _ = compare(base, base_gguf, adapter, tmp_path / "adapter.gguf")
    print(f"without {broken}: {same} of {NEW} words, first log-probabilities off by {first:.2f}")
    assert first > 1e-2


@needs_llama_cpp
def test_bf16_costs_little_and_is_half_the_size(base, base_gguf, tmp_path):
    adapter = make_adapter(base, tmp_path / "adapter")
    exact = write_gguf(adapter, tmp_path / "exact.gguf")
    half = write_gguf(adapter, tmp_path / "half.gguf", dtype="bf16")
    assert half["bytes"] < 0.65 * exact["bytes"]
    assert 1e-4 < compare(base, base_gguf, adapter, tmp_path / "half.gguf")[1] < 0.1


REFUSED = {
    "dora": ({"use_dora": True}, "use_dora: true"),
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, "lm_head.weight is no LoRA"),
    "norm": ({"modules_to_save": ["input_layernorm"]}, "input_layernorm.weight is no LoRA"),
    "head": ({"target_modules": ["q_proj", "lm_head"]}, "lm_head.base_layer.weight is no LoRA"),
    "embedding": (
        {"target_modules": ["q_proj", "embed_tokens"]},
        "embed_tokens.base_layer.weight is no LoRA",
    ),
    "trainable tokens": ({"trainable_token_indices": [3]}, r"trainable_token_indices: \[3\]"),
    "layer replication": ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
    "lora_bias": ({"lora_bias": True}, "lora_bias: true"),
    "pissa": ({"init_lora_weights": "pissa"}, "pissa"),
    "olora": ({"init_lora_weights": "olora"}, "olora"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", REFUSED)
def test_what_llama_cpp_cannot_do_is_refused_by_name(base, tmp_path, name):
    options, sentence = REFUSED[name]
    adapter = make_adapter(base, tmp_path / "adapter", **options)
    with pytest.raises(UnsupportedAdapter, match=sentence):
        write_gguf(adapter, tmp_path / "out.gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


def test_nothing_is_overwritten_half_written_or_of_another_base(base, tmp_path, monkeypatch):
    adapter, out = make_adapter(base, tmp_path / "adapter"), tmp_path / "out.gguf"

    def stop(*args, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr(gguf_adapter, "_compare", stop)
    with pytest.raises(KeyboardInterrupt):
        write_gguf(adapter, out)
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]

    write_gguf(adapter, out)
    with pytest.raises(GgufError, match="nothing is overwritten"):
        write_gguf(adapter, out)
    first = gguf.GGUFReader(out).tensors[0]
    assert (first.name, first.tensor_type.name) == ("blk.0.ffn_down.weight.lora_a", "F32")

    smaller = tmp_path / "smaller"
    smaller.mkdir()
    settings = json.loads((base / "config.json").read_text())
    (smaller / "config.json").write_text(json.dumps(settings | {"num_hidden_layers": 1}))
    with pytest.raises(MergeError, match=r"layers\.1\..* and the base has no such tensor"):
        write_gguf(adapter, tmp_path / "other.gguf", base=smaller)
    (smaller / "config.json").write_text(json.dumps(settings | {"model_type": "qwen3"}))
    with pytest.raises(UnsupportedAdapter, match="is a qwen3; a llama was wanted"):
        write_gguf(adapter, tmp_path / "other.gguf", base=smaller)

    tensors = load_file(adapter / WEIGHTS)
    tensors.pop("base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight")
    save_file(tensors, adapter / WEIGHTS)
    with pytest.raises(MergeError, match="A, B were wanted"):
        write_gguf(adapter, tmp_path / "other.gguf")
    (adapter / CONFIG).write_text("{}")
    with pytest.raises(UnsupportedAdapter, match="peft_type None"):
        write_gguf(adapter, tmp_path / "other.gguf")


def test_the_command_says_what_it_wrote_and_refuses_in_a_sentence(base, tmp_path, capsys):
    adapter, out = make_adapter(base, tmp_path / "adapter"), tmp_path / "out.gguf"
    assert main(["gguf", str(adapter), str(out)]) == 0
    assert f"{out}: tensors 28, bytes {out.stat().st_size}, permuted 4" in capsys.readouterr().out
    assert main(["gguf", str(adapter), str(out)]) == 1
    assert "exists already, and nothing is overwritten" in capsys.readouterr().err
