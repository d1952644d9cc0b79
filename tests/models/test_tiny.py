"""The tiny base is a real Llama that has learned something."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer

from nbutils.data.templates import PLAIN_TEMPLATE, ready_for_chat
from nbutils.models.tiny import SPECIAL_TOKENS, read_prose, tiny_base, train_tokenizer

TURNS = [{"role": "user", "content": "What is a shard?"}, {"role": "assistant", "content": "A slice."}]


@pytest.fixture(scope="module")
def base():
    return tiny_base()


def test_it_has_what_llama_31_has(base):
    config = AutoConfig.from_pretrained(base)
    assert config.model_type == "llama"
    assert config.num_key_value_heads < config.num_attention_heads, "grouped-query attention"
    assert not config.tie_word_embeddings
    assert config.rope_parameters["rope_type"] == "llama3"
    assert 2e6 < json.loads((base / "tiny.json").read_text())["parameters"] < 4e6
    assert config.dtype == torch.bfloat16


def test_it_has_learned_something(base):
    facts = json.loads((base / "tiny.json").read_text())
    assert facts["heldout_loss"] <= 0.6 * facts["uniform_loss"]


def test_it_is_made_once(base):
    made = (base / "tiny.json").stat().st_mtime_ns
    assert tiny_base() == base
    assert (base / "tiny.json").stat().st_mtime_ns == made


def test_the_tokenizer_is_deterministic_and_loses_nothing(base):
    saved = AutoTokenizer.from_pretrained(base)
    again = train_tokenizer(read_prose()[0])
    assert saved.get_vocab() == again.get_vocab()
    text = "FSDP gathers 1,024 units - twice.\n\nThen it frees them."
    assert saved.decode(saved(text)["input_ids"], skip_special_tokens=True) == text


def test_the_chat_layout_is_that_of_llama_31(base):
    tokenizer = AutoTokenizer.from_pretrained(base)
    assert set(SPECIAL_TOKENS) <= set(tokenizer.get_vocab())
    assert tokenizer.apply_chat_template(TURNS, tokenize=False) == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nWhat is a shard?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nA slice.<|eot_id|>"
    )


def test_a_base_tokenizer_gets_a_template_and_a_padding_token(base):
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = None
    tokenizer.pad_token = tokenizer.eos_token = "<|end_of_text|>"
    ready_for_chat(tokenizer)
    assert tokenizer.chat_template == PLAIN_TEMPLATE
    assert tokenizer.pad_token == "<|finetune_right_pad_id|>"
    assert tokenizer.apply_chat_template(TURNS, tokenize=False) == (
        "<|begin_of_text|>Question: What is a shard?\nAnswer: A slice.<|end_of_text|>\n"
    )


def test_the_prompt_is_a_prefix_of_the_whole_conversation(base):
    tokenizer = AutoTokenizer.from_pretrained(base)
    for template in (tokenizer.chat_template, PLAIN_TEMPLATE):
        tokenizer.chat_template = template
        prompt = tokenizer.apply_chat_template(TURNS[:1], add_generation_prompt=True, tokenize=False)
        assert tokenizer.apply_chat_template(TURNS, tokenize=False).startswith(prompt)


def test_an_instruct_tokenizer_keeps_its_own(base):
    tokenizer = AutoTokenizer.from_pretrained(base)
    template, pad = tokenizer.chat_template, tokenizer.pad_token
    ready_for_chat(tokenizer)
    assert (tokenizer.chat_template, tokenizer.pad_token) == (template, pad)


def test_a_tokenizer_that_cannot_pad_is_refused(base):
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = None
    tokenizer.get_vocab = lambda: {"a": 0}
    with pytest.raises(ValueError, match=r"no padding token of its own"):
        ready_for_chat(tokenizer)


@pytest.mark.parametrize(
    ("unknown", "vocabulary", "pad"),
    [
        (None, ["<|endoftext|>"], "<|endoftext|>"),
        ("<unk>", ["<unk>"], "<unk>"),  # as Llama 2 has it
        (None, ["<pad>", "<|endoftext|>"], "<pad>"),
    ],
)
def test_a_padding_token_that_is_the_end_token_is_replaced(base, unknown, vocabulary, pad):
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.unk_token = unknown
    tokenizer.get_vocab = lambda: dict.fromkeys([*vocabulary, tokenizer.eos_token], 0)
    assert ready_for_chat(tokenizer).pad_token == pad


def test_no_part_of_the_layout_pads(base):
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token, tokenizer.chat_template = None, "{{ bos_token }}<|endoftext|>"
    tokenizer.get_vocab = lambda: {"<|endoftext|>": 0}
    with pytest.raises(ValueError, match=r"no padding token of its own"):
        ready_for_chat(tokenizer)
