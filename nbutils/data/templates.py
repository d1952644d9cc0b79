"""Chat templates and padding: what a tokenizer needs before a conversation can be trained on."""

from transformers import PreTrainedTokenizerBase

# The layout of Llama 3.1: each turn is a header, an empty line, the text and <|eot_id|>.
LLAMA31_TEMPLATE = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
    "{{- message['content'] | trim + '<|eot_id|>' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"
)

# For base models. It uses no header tokens: a base model has never seen them, QLoRA freezes the embedding and the
# output head, and so their rows would stay as untrained as they came. The end-of-text token it does know.
# The prompt ends in "Answer:" and not in a blank: a blank belongs to the token of the word that follows, so in training
# the answer would begin with another token than after the prompt.
PLAIN_TEMPLATE = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{%- if message['role'] == 'assistant' %}{{- 'Answer: ' + message['content'] | trim + eos_token + '\\n' }}"
    "{%- elif message['role'] == 'system' %}{{- message['content'] | trim + '\\n' }}"
    "{%- else %}{{- 'Question: ' + message['content'] | trim + '\\n' }}{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- 'Answer:' }}{%- endif %}"
)

# Tokens that no text contains, best first: two of Llama 3's vocabulary, and what other tokenizers call theirs. The
# end-of-sequence token must not pad: the loss ignores padding, and a model that never sees its end token in the loss
# never learns to stop.
PAD_CANDIDATES = (
    "<|finetune_right_pad_id|>",
    "<|reserved_special_token_0|>",
    "<pad>",
    "<|pad|>",
    "[PAD]",
    "<|endoftext|>",
)


def ready_for_chat(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Give the tokenizer a chat template and a padding token of its own, where it has none.

    An Instruct model keeps its own template; a base model gets `PLAIN_TEMPLATE`. The vocabulary does not grow, so
    the frozen embedding of the model still fits.

    Args:
        tokenizer: a fast tokenizer; changed in place.

    Returns:
        The same tokenizer, with `chat_template` and `pad_token` set, padding on the right.

    Raises:
        ValueError: the vocabulary has no token that could pad without being the end-of-sequence token.
    """
    if tokenizer.chat_template is None:
        tokenizer.chat_template = PLAIN_TEMPLATE
    if tokenizer.pad_token is None or tokenizer.pad_token == tokenizer.eos_token:
        spare = _spare_tokens(tokenizer)
        if not spare:
            raise ValueError(
                "The tokenizer has no padding token of its own, no token for unknown text that could serve, and none "
                f"of {', '.join(PAD_CANDIDATES)} in its vocabulary. Set tokenizer.pad_token to a token that never "
                "occurs in your text, and not to the end-of-sequence token, and save it beside the model."
            )
        tokenizer.pad_token = spare[0]
    tokenizer.padding_side = "right"
    return tokenizer


def _spare_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Tokens that may pad, best first: in the vocabulary, and neither the end of a text nor a part of the layout.

    The last is the one for unknown text, as Llama 2 has it: a vocabulary with all 256 bytes never needs it.
    """
    vocabulary, template = tokenizer.get_vocab(), tokenizer.chat_template
    used = {tokenizer.eos_token, tokenizer.bos_token}
    wanted = [token for token in (*PAD_CANDIDATES, tokenizer.unk_token) if token and token in vocabulary]
    return [token for token in wanted if token not in used and token not in str(template)]
