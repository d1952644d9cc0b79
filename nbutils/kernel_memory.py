"""What a notebook's kernel holds on the GPUs, the ranks of a launch cannot have."""

import gc
import sys

NOTABLE = 2**28  # bytes: 256 MiB


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
