"""Every option that PEFT has for LoRA: merged, it is what PEFT itself reloads, or it is refused by name."""

import dataclasses
import json
import warnings
from types import SimpleNamespace

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from nbutils.adapters import lora_config
from nbutils.adapters.checkpoint_folder import rank_file, save_pieces, write_checkpoint
from nbutils.adapters.export import export_adapter
from nbutils.adapters.logits import compare_with_record, record_logits
from nbutils.adapters.lora_config import IMPLEMENTED, WITHOUT_EFFECT, UnsupportedAdapter, read_lora_config
from nbutils.adapters.merge import merge
from nbutils.adapters.merge_plan import MergeError

TOKENS = torch.arange(3, 35).view(2, 16)
FIXED = "merged exactly"

# option: what it is given, and what is right: merged exactly, or a word of the refusal
OPTIONS = {
    "plain": ({}, FIXED),
    "rslora": ({"use_rslora": True}, FIXED),
    "rank pattern": ({"rank_pattern": {"q_proj": 7, r"layers\.1\.mlp\.up_proj": 2}}, FIXED),
    "alpha pattern": ({"alpha_pattern": {"layers.1.self_attn.q_proj": 40, "down_proj": 3}}, FIXED),
    "rslora and patterns": (
        {"use_rslora": True, "rank_pattern": {"k_proj": 3}, "alpha_pattern": {"k_proj": 2}},
        FIXED,
    ),
    "dora": ({"use_dora": True}, FIXED),
    "dora and rslora": ({"use_dora": True, "use_rslora": True}, FIXED),
    "dropout": ({"lora_dropout": 0.1}, FIXED),
    "bias all": ({"bias": "all"}, FIXED),
    "bias lora_only": ({"bias": "lora_only"}, FIXED),
    "modules_to_save": ({"modules_to_save": ["lm_head", "norm"]}, FIXED),
    "embedding saved": ({"modules_to_save": ["embed_tokens"]}, FIXED),
    "all-linear": ({"target_modules": "all-linear"}, FIXED),
    "regex": ({"target_modules": r".*\.layers\.1\..*(q_proj|v_proj)"}, FIXED),
    "head": ({"target_modules": ["q_proj", "lm_head"]}, FIXED),
    "embedding": ({"target_modules": ["q_proj", "embed_tokens"]}, FIXED),
    "embedding and dora": ({"target_modules": ["q_proj", "embed_tokens"], "use_dora": True}, FIXED),
    "exclude_modules": ({"exclude_modules": ["layers.0.self_attn.q_proj"]}, FIXED),
    "layers_to_transform": ({"layers_to_transform": [1]}, FIXED),
    "layers_pattern": ({"layers_to_transform": 0, "layers_pattern": "layers"}, FIXED),
    "gaussian": ({"init_lora_weights": "gaussian"}, FIXED),
    "random": ({"init_lora_weights": False}, FIXED),
    "orthogonal": ({"init_lora_weights": "orthogonal", "r": 4}, FIXED),
    "eva": ({"init_lora_weights": "eva"}, FIXED),
    "pissa": ({"init_lora_weights": "pissa"}, 'init_lora_weights: "pissa"'),
    "pissa_niter_4": ({"init_lora_weights": "pissa_niter_4"}, 'init_lora_weights: "pissa_niter_4"'),
    "olora": ({"init_lora_weights": "olora"}, 'init_lora_weights: "olora"'),
    "loftq": ({"init_lora_weights": "loftq"}, 'init_lora_weights: "loftq"'),
    "corda": ({"init_lora_weights": "corda"}, 'init_lora_weights: "corda"'),
    "lora_ga": ({"init_lora_weights": "lora_ga"}, 'init_lora_weights: "lora_ga"'),
    "mica": ({"init_lora_weights": "mica"}, 'init_lora_weights: "mica"'),
    "layer_replication": ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication: [[0, 2], [1, 2]]"),
    "trainable tokens": ({"trainable_token_indices": [3, 5]}, "trainable_token_indices: [3, 5]"),
    "target_parameters": (
        {"target_parameters": ["q_proj.weight"], "target_modules": []},
        "target_parameters",
    ),
    "fan_in_fan_out": ({"fan_in_fan_out": True}, "fan_in_fan_out: true"),
    "lora_bias": ({"lora_bias": True}, "lora_bias: true"),
    "qalora": ({"use_qalora": True}, "use_qalora: true"),
    "alora": ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens: [1, 2]"),
    "megatron": ({"megatron_config": {"a": 1}}, "megatron_config"),
    "velora": ({"velora_config": {"a": 1}}, "velora_config"),
    "monteclora": ({"monteclora_config": {"a": 1}}, "monteclora_config"),
    "bdlora": ({"use_bdlora": {"a": 1}}, "use_bdlora"),
    "arrow": ({"arrow_config": {"a": 1}}, "arrow_config"),
    "kasa": ({"kasa_config": {"a": 1}}, "kasa_config"),
    "ensure_weight_tying": ({"ensure_weight_tying": True}, "ensure_weight_tying: true"),
    "a field of a later PEFT": ({"use_tomorrow": 0.5}, "use_tomorrow: 0.5"),
}
# Refused by what the configuration says; PEFT cannot make such an adapter of a small dense Llama, or wants data for it.
BY_CONFIG_ALONE = {"corda", "lora_ga", "loftq", "qalora", "megatron", "velora", "monteclora", "bdlora", "arrow", "kasa",
                   "fan_in_fan_out", "alora", "ensure_weight_tying", "a field of a later PEFT"}  # fmt: skip


def llama(folder, **more):
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=96, num_key_value_heads=2, initializer_range=0.2, **shape, **more)
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data = 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A random Llama in fp32 with biases in its attention."""
    return llama(tmp_path_factory.mktemp("options") / "base", attention_bias=True)


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


def make_adapter(base, folder, by_config_alone=False, **options):
    """Let PEFT make the adapter, train it by chance, and save it."""
    chosen = {"r": 5, "lora_alpha": 9, "task_type": "CAUSAL_LM"}
    chosen |= {"target_modules": ["q_proj", "k_proj", "up_proj", "down_proj"]}
    model = get_peft_model(load(base), LoraConfig(**chosen | ({} if by_config_alone else options)))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or "lora_" in name:
            parameter.data += 0.2 * torch.randn(parameter.shape)
    model.save_pretrained(folder)
    if by_config_alone:
        file = folder / lora_config.CONFIG
        file.write_text(json.dumps(json.loads(file.read_text()) | options))
    return folder


@pytest.mark.parametrize("name", OPTIONS)
def test_merged_is_what_peft_reloads_or_it_is_refused_by_name(base, tmp_path, name):
    options, wanted = OPTIONS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapter = make_adapter(base, tmp_path / "adapter", name in BY_CONFIG_ALONE, **options)
        try:
            merge(base, adapter, tmp_path / "out", progress=False)
        except (UnsupportedAdapter, MergeError) as refused:
            assert wanted is not FIXED and wanted in str(refused), refused
            assert not (tmp_path / "out").exists()
            return
        reloaded = PeftModel.from_pretrained(load(base), adapter).eval()
    by_peft, alone, ours = logits(reloaded), logits(load(base)), logits(load(tmp_path / "out"))
    assert (by_peft - alone).abs().max() > 0.1, "the adapter must change something, or nothing was compared"
    assert (by_peft - ours).abs().max() < 2e-4
    assert wanted is FIXED


def test_every_field_that_peft_has_is_asked_for_in_the_matrix():
    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    asked = {name for options, _ in OPTIONS.values() for name in options}
    switches = fields - WITHOUT_EFFECT - {"peft_type", "r", "lora_alpha"}
    if peft.__version__.startswith("0.21."):
        assert switches <= asked, sorted(switches - asked)
    assert IMPLEMENTED.isdisjoint(WITHOUT_EFFECT)


def test_where_the_base_is_untouched_is_what_peft_does():
    start = next(field for field in dataclasses.fields(LoraConfig) if field.name == "init_lora_weights")
    named = {word.strip("'\"") for word in str(start.type).split("Literal")[1].strip("[]").split(", ")}
    tried = {options.get("init_lora_weights") for options, _ in OPTIONS.values()}
    assert named - {"pissa_niter_[number of iters]"} <= tried, named - tried


@pytest.mark.parametrize(
    "options",
    [{"modules_to_save": ["embed_tokens"]}, {"target_modules": ["q_proj", "embed_tokens"]},
     {"target_modules": ["q_proj", "lm_head"]}],
    ids=["embedding saved", "embedding", "head"],
)  # fmt: skip
def test_a_tied_base_is_refused_for_the_real_reason(tmp_path, options):
    base = llama(tmp_path / "base", tie_word_embeddings=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapter = make_adapter(base, tmp_path / "adapter", **options)
    with pytest.raises(MergeError, match="ties them"):
        merge(base, adapter, tmp_path / "out", progress=False)


def test_a_rank_or_a_target_that_the_file_contradicts_is_refused(base, tmp_path):
    adapter = make_adapter(base, tmp_path / "adapter")
    file = adapter / lora_config.CONFIG
    plain = json.loads(file.read_text())
    for change, word in (
        (
            {"rank_pattern": {"q_proj": 8}},
            "q_proj.weight has rank 5 in the adapter, and its configuration says 8",
        ),
        ({"target_modules": ["q_proj", "k_proj", "up_proj"]}, "target_modules leave it out"),
        ({"target_modules": [*plain["target_modules"], "o_proj"]}, "holds nothing for it"),
    ):
        file.write_text(json.dumps(plain | change))
        with pytest.raises(MergeError, match=word):
            merge(base, adapter, tmp_path / "out", progress=False)


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "LOHA", "ADALORA", None])
def test_another_kind_of_adapter_is_refused_in_a_sentence(tmp_path, kind):
    (tmp_path / lora_config.CONFIG).write_text(json.dumps({"peft_type": kind, "r": 4}))
    with pytest.raises(UnsupportedAdapter, match=f"peft_type {kind}; LORA was wanted"):
        read_lora_config(tmp_path)


def test_use_refuses_as_merge_does(base, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapter = make_adapter(base, tmp_path / "adapter", init_lora_weights="pissa")
    asked = SimpleNamespace(file=tmp_path / "logits.safetensors")
    record_logits(PeftModel.from_pretrained(load(base), adapter), TOKENS, asked.file)
    with pytest.raises(UnsupportedAdapter, match="pissa"):
        compare_with_record(load(base), adapter, asked.file)


@pytest.mark.parametrize(("start", "refused"), [("pissa", True), ("gaussian", False)])
def test_export_refuses_as_merge_does(base, tmp_path, start, refused):
    chosen = {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": start, "inference_mode": True}
    config = LoraConfig(**chosen)
    model = get_peft_model(load(base), config)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)

    def write(folder):
        save_pieces(folder / rank_file(0), model, {}, {})
        config.save_pretrained(folder)
        (folder / "trainer_state.json").write_text('{"global_step": 3}')

    write_checkpoint(tmp_path / "checkpoint-3", write, {"world_size": 1})
    if not refused:
        assert export_adapter(tmp_path / "checkpoint-3", tmp_path / "adapter")["step"] == 3
        return
    with pytest.raises(UnsupportedAdapter, match="pissa"):
        export_adapter(tmp_path / "checkpoint-3", tmp_path / "adapter")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]


def test_add_adapter_of_transformers_asks_for_another_peft(base):
    """docs/troubles.yaml says so, and to take peft's way. When this fails, there is a peft that transformers takes."""
    said = "The version of PEFT you are using is not compatible, please use a version >= 0.22.0"
    config = LoraConfig(target_modules=["q_proj"])
    with pytest.raises(ValueError, match=said):
        load(base).add_adapter(config)
    assert get_peft_model(load(base), config).peft_config["default"] is config
