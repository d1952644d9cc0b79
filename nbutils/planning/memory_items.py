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


def saved_bytes_per_token(shape: Shape, compiled: bool = False) -> int:
    """What one decoder layer keeps for its backward pass while it is computed again, in bytes a token.

    Counted in `LlamaDecoderLayer` with LoRA on all linear layers and no dropout: each of the two norms keeps its input
    in fp32 and its result in bf16 (the input of `lora_A`); attention keeps rotated queries and keys, values and its
    output (keys and values of the few key-value heads only: the kernel shares them between query heads); the MLP keeps
    gate, activated gate, up, and their product (the input of the last `lora_A`). Frozen weights ask for no input to be
    kept.

    Compiled, there is one tensor of the hidden width for each norm and for the attention's output and queries, and the
    MLP keeps gate, up and product.
    """
    keys = BF16 * shape.head_dim * 2 * shape.kv_heads
    queries = BF16 * shape.head_dim * 2 * shape.heads
    if compiled:
        return 3 * BF16 * shape.intermediate + 3 * BF16 * shape.hidden + queries + keys
    norms = 2 * (FP32 + BF16) * shape.hidden
    mlp = 4 * BF16 * shape.intermediate
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


def evaluating_bytes(shape: Shape, tokens: int, unpacked: int) -> int:
    """What one decoder layer holds at its fullest in an evaluation, where nothing is kept for a backward pass.

    Counted in `LlamaDecoderLayer` under PEFT: four tensors of the hidden width (the layer's input, the sum behind
    attention, and the norm's input and output), the activated gate, and the up projection's result. Beside these stand
    what the adapter adds to it, before and after it is scaled, or a little earlier the projection's unpacked weight.
    Compiled layers are planned like this too; theirs was not counted.

    Args:
        shape: of the model.
        tokens: a rank and batch, padding included.
        unpacked: bytes of the largest weight in bf16.
    """
    mlp = BF16 * shape.intermediate * tokens
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
