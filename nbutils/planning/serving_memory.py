"""What llama.cpp needs to answer: the base in Q4_K_M, its cache of keys and values, and the adapter. Counted."""

from nbutils.planning.shapes import Shape

# Bits a weight of llama.cpp's k-quants, their scales included (ggml/src/ggml-common.h: block_q4_K and its neighbours).
Q4_K, Q5_K, Q6_K = 4.5, 5.5, 6.5625
F16, F32 = 2, 4  # bytes


def serving_bytes(shape: Shape, context: int = 8192, rank: int = 16) -> dict[str, int]:
    """Count what lies on the GPUs together while a model answers, without what CUDA and the computation take.

    Args:
        shape: of the base.
        context: tokens that the cache has room for, over all conversations (`-c`).
        rank: of the adapter, on all seven projections.

    Returns:
        Bytes by item.
    """
    cache = 2 * shape.layers * shape.kv_heads * shape.head_dim * context * F16
    return {
        "base in Q4_K_M": q4_k_m_bytes(shape),
        "keys and values in fp16": cache,
        "adapter in fp32": shape.adapter_parameters(rank) * F32,
    }


def q4_k_m_bytes(shape: Shape) -> int:
    """Count a Llama's weights in Q4_K_M: Q4_K, but Q6_K for the head and, in half of the layers, v_proj and down_proj.

    At 70B, where eight heads share a v_proj, it never has less than Q5_K (llama.cpp, src/llama-quant.cpp,
    llama_tensor_get_type_impl). Norms and the vocabulary's texts are not counted: some MB.

    Args:
        shape: of the base; a tied embedding is the head too, in Q6_K.
    """
    sizes = {name: out * into for name, (out, into) in shape.linears.items()}
    v_bits = Q5_K if shape.heads // shape.kv_heads >= 8 and shape.layers == 80 else Q4_K
    bits = 0.0
    for layer in range(shape.layers):
        better = has_more_bits(layer, shape.layers)
        own = {"v_proj": Q6_K if better else v_bits, "down_proj": Q6_K if better else Q4_K}
        bits += sum(size * own.get(name, Q4_K) for name, size in sizes.items())
    table = shape.vocab * shape.hidden
    bits += table * (Q6_K if shape.tied else Q4_K + Q6_K)
    return int(bits / 8)


def has_more_bits(layer: int, layers: int) -> bool:
    """Whether Q4_K_M gives this layer more bits: the first and last eighth, and every third between."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2
