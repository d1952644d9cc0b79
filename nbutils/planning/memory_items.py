"""The items of the memory plan: how many bytes each kind of tensor takes, and what is there whatever the model."""

from nbutils.planning.shapes import Shape

GIB = 2**30
BF16 = 2  # bytes
FP32 = 4
# cuBLAS keeps 32 MiB a thread that multiplies (forward and backward) on an H200, 8 on a 4090.
WORKSPACES = 2 * 32 * 2**20
# Python, torch, transformers and the rest in host memory, a rank. Anonymous memory was recorded as 1.6 to 1.8 GiB with
# 8 layers and as 2.1 to 2.5 with 80 (`host` in the records): so a part belongs to the layers, Python's objects.
LIBRARIES = int(1.7 * GIB)
OBJECTS_OF_A_LAYER = 6 * 2**20
LIBRARIES_CPU = int(0.4 * GIB)  # the same with torch's CPU build, which a rehearsal needs no more than


def packed_bytes(parameters: int) -> int:
    """Packed 4-bit weights: half a byte each."""
    return parameters // 2


def quantisation_state_bytes(parameters: int) -> int:
    """Scales of NF4 with double quantisation.

    One byte for each block of 64 weights, and one fp32 for each 256 of these bytes: 0.127 bits a weight
    (QLoRA, arXiv 2305.14314, section 3, "Double Quantization"). FSDP does not shard it: every rank has all of it.
    """
    return parameters // 64 + FP32 * parameters // (64 * 256)


def saved_bytes_per_token(shape: Shape, compiled: bool = False, tiled: bool = False) -> int:
    """What one decoder layer keeps for its backward pass while it is computed again, in bytes a token.

    Counted in `LlamaDecoderLayer` with LoRA on all linear layers and no dropout: each of the two norms keeps its input
    in fp32 and its result in bf16 (the input of `lora_A`); attention keeps rotated queries and keys, values and its
    output (keys and values of the few key-value heads only: the kernel shares them between query heads); the MLP keeps
    gate, activated gate, up, and their product (the input of the last `lora_A`). Frozen weights ask for no input to be
    kept.

    Compiled, there is one tensor of the hidden width for each norm and for the attention's output and queries, and the
    MLP keeps gate, up and product. Tiled, the MLP keeps its input alone, which is the second norm's result.
    """
    keys = BF16 * shape.head_dim * 2 * shape.kv_heads
    queries = BF16 * shape.head_dim * 2 * shape.heads
    norms = (3 * BF16 if compiled else 2 * (FP32 + BF16)) * shape.hidden
    mlp = 0 if tiled else (3 if compiled else 4) * BF16 * shape.intermediate
    return norms + queries + keys + mlp


def passing_bytes_per_token(shape: Shape, compiled: bool = False, stacked: bool = True) -> int:
    """Gradients that are alive at once in the backward pass of a layer, in bytes a token.

    Eager: the gradient that came in and that of the down projection's input. Compiled, the peak is a moment later, in
    the graph that holds gate and up: three tensors of the MLP's width more than what the layer kept, the gradient that
    came in, and one that goes out. (Fitted on `cap_21_gib/`: the recorded peaks grow so from 8,192 tokens to 32,768.)
    Where gate and up do not share a product with their A's, as with dropout, it is one tensor of the MLP's width more,
    and one less of the hidden width (fitted on runs made before they did).
    """
    if compiled and stacked:
        return BF16 * (2 * shape.hidden + 3 * shape.intermediate)
    if compiled:
        return BF16 * (shape.hidden + 4 * shape.intermediate)
    return BF16 * (shape.hidden + shape.intermediate)


def tiled_mlp_bytes(shape: Shape, tokens: int, tiles: int, compiled: bool) -> tuple[int, int]:
    """The backward pass of a tiled MLP (`nbutils.training.tiled_mlp`), beside the input that it keeps.

    A tile keeps what the whole MLP would, makes gradients of the MLP's width and an output that nobody reads: six
    tensors of that width and one of the hidden width, counted on a CPU; compiled, the gradient that goes out as well.

    Returns:
        The gradients that come in and go out, of all tokens; and what a tile holds.
    """
    hidden = BF16 * shape.hidden
    tile = 6 * BF16 * shape.intermediate + (2 if compiled else 1) * hidden
    return 2 * hidden * tokens, tile * -(-tokens // tiles)


def attention_backward_bytes(shape: Shape, tokens: int, compiled: bool) -> int:
    """What a layer holds at its fullest in the backward pass when its MLP is done, which is the peak if that is tiled.

    Eager, it is the second norm's turn: seven tensors in fp32, its own and the first one's, beside that norm's result,
    queries, keys, values, the attention's output and the gradient that came in (counted on a CPU).

    Compiled, it is attention's: the first norm's result and the gradient that came in; of the width of the queries
    these themselves, the output, its gradient, theirs, and those of keys and values, which the kernel makes for each
    head of the queries; a sum in fp32; keys, values and their gradients. Read in torch's `flash_attn/flash_api.cpp`
    (`dk_expanded`, `dq_accum`); not measured.
    """
    queries, keys = shape.head_dim * shape.heads, shape.head_dim * 2 * shape.kv_heads
    if compiled:
        return tokens * (BF16 * (2 * shape.hidden + 6 * queries + 2 * keys) + FP32 * queries)
    return tokens * (7 * FP32 * shape.hidden + BF16 * (2 * shape.hidden + 2 * queries + keys))


def evaluating_bytes(shape: Shape, tokens: int, unpacked: int, tiles: int = 0) -> int:
    """What one decoder layer holds at its fullest in an evaluation, where nothing is kept for a backward pass.

    Counted in `LlamaDecoderLayer` under PEFT: four tensors of the hidden width (the layer's input, the sum behind
    attention, and the norm's input and output), the activated gate, and the up projection's result. Beside these stand
    what the adapter adds to it, before and after it is scaled, or a little earlier the projection's unpacked weight.
    Compiled layers are planned like this too; theirs was not counted. Of a tiled MLP the whole output is there besides,
    and with many tiles a norm is the fullest moment: nine tensors of the hidden width (counted on a CPU).

    Args:
        shape: of the model.
        tokens: a rank and batch, padding included.
        unpacked: bytes of the largest weight in bf16.
        tiles: of the MLP; 0 is the whole of it.
    """
    mlp = BF16 * shape.intermediate * -(-tokens // (tiles or 1))
    if tiles:
        return max(
            9 * BF16 * shape.hidden * tokens,
            5 * BF16 * shape.hidden * tokens + 2 * mlp + max(2 * mlp, unpacked),
        )
    return 4 * BF16 * shape.hidden * tokens + 2 * mlp + max(2 * mlp, unpacked)


def logits_tile_bytes(shape: Shape, tokens: int) -> int:
    """The piece of the logits that the loss holds, in training and in an evaluation: TRL makes them tile by tile.

    A tile has at most 4,096 tokens and 32,768 words (`trl.kernels.chunked_logprob.TOKEN_CHUNK_SIZE` and
    `_CHUNKED_LOGPROB_CHUNK_SIZE`), in bf16.
    """
    return BF16 * min(tokens, 4096) * min(shape.vocab, 32768)


def pinned_bytes(wanted: int) -> int:
    """What PyTorch's pinned allocator takes for a request: the next power of two."""
    return 1 << max(0, wanted - 1).bit_length()
