"""The real llama.cpp in a test: a small Llama as GGUF, and its log-probabilities with and without an adapter."""

from pathlib import Path

import gguf
import numpy as np
import torch

VOCABULARY = 96


def pairs(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's row order of q_proj and k_proj, written element by element and not as in the package."""
    size = rows.shape[0] // heads
    order = [
        head * size + half * (size // 2) + i
        for head in range(heads)
        for i in range(size // 2)
        for half in (0, 1)
    ]
    return rows[order]


def write_base(model, file: Path) -> Path:
    """Write a transformers Llama (untied, plain rotary frequencies) in fp32."""
    config = model.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(256)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    # Whole ASCII characters: llama.cpp leaves out the log-probability of a token that is half a character. And one
    # merge: it does not load an empty table.
    tokens = [chr(33 + i) for i in range(config.vocab_size - 2)] + ["AB", "<end>"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * (len(tokens) - 1) + [gguf.TokenType.CONTROL])
    writer.add_token_merges(["A B"])
    writer.add_eos_token_id(len(tokens) - 1)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        values = tensor.float().numpy()
        if "q_proj" in name:
            values = pairs(values, config.num_attention_heads)
        if "k_proj" in name:
            values = pairs(values, config.num_key_value_heads)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def greedy(
    base: Path, prompt: list[int], tokens: int, adapter: Path | None = None
) -> tuple[list[int], torch.Tensor]:
    """Let llama.cpp go on greedily.

    Returns:
        The ids, and the log-probabilities of the whole vocabulary before each, (tokens, VOCABULARY).
    """
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(base)
    parameters.n_ctx, parameters.n_parallel, parameters.n_gpu_layers = 256, 1, 0
    # The cache of keys and values is fp16 by default, which would be all that is seen.
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    parameters.warmup, parameters.verbosity = False, -1
    if adapter is not None:
        lora = xllamacpp.CommonAdapterLoraInfo()
        lora.path, lora.scale = str(adapter), 1.0
        parameters.lora_adapters = [lora]
    server = xllamacpp.Server(parameters)
    asked = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "n_probs": VOCABULARY, "ignore_eos": True,
             "cache_prompt": False}  # fmt: skip
    answer = server.handle_completions(asked)
    steps = answer["choices"][0]["logprobs"]["content"]
    table = torch.full((len(steps), VOCABULARY), -torch.inf)
    for row, step in enumerate(steps):
        for entry in step["top_logprobs"]:
            table[row, entry["id"]] = entry["logprob"]
    return [step["id"] for step in steps], table
