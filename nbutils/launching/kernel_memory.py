"""A notebook's kernel on the GPUs: what it holds, the ranks of a launch cannot have; and it uses one card alone."""

import gc
import sys

NOTABLE = 2**28  # bytes: 256 MiB
FOR_WEIGHTS = 0.8  # of a card; the rest is left for activations, logits and what CUDA takes


def give_back() -> str:
    """Return what PyTorch keeps on the GPUs for later, and say what tensors still hold.

    Returns:
        A sentence for the reader, or nothing: no tensor of note is there, or this process never used a GPU.
    """
    torch = sys.modules.get("torch")  # not imported here: a process without torch holds nothing
    if torch is None or not torch.cuda.is_initialized():
        return ""
    gc.collect()
    torch.cuda.empty_cache()
    held = {device: torch.cuda.memory_allocated(device) for device in range(torch.cuda.device_count())}
    if sum(held.values()) < NOTABLE:
        return ""
    parts = ", ".join(f"{size / 2**30:.1f} GiB on GPU {device}" for device, size in held.items() if size)
    return (
        f"This kernel holds {parts}, which the ranks cannot have. If the launch runs out of memory, restart the "
        "kernel and run only the cells that the launch needs."
    )


def too_large_for_a_gpu(weights: int) -> str:
    """Say why a cell leaves out what would put weights on the first GPU, all of them on this one card.

    Args:
        weights: bytes that will lie there together.

    Returns:
        A sentence for the reader, or nothing: the card has room for them, or there is none and nothing is put there.
    """
    import torch

    if not torch.cuda.is_available():
        return ""
    card = torch.cuda.get_device_properties(0).total_memory
    if weights <= FOR_WEIGHTS * card:
        return ""
    return (
        f"Skipped: this cell needs {weights / 2**30:.1f} GiB of weights on one GPU; GPU 0 has {card / 2**30:.1f} GiB, "
        f"and {FOR_WEIGHTS:.0%} of it may be weights. To use the model, spread the 4-bit base over all GPUs, as "
        "benchmarks/use_adapter.py does; train/run.json has the held-out losses that the training run measured."
    )
