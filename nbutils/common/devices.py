"""CUDA devices that this machine shows."""


def no_accelerator() -> bool:
    """Whether this machine shows no CUDA device."""
    return gpus_shown() == 0


def gpus_shown() -> int:
    """CUDA devices of this machine; asks the driver and creates no CUDA context in this process."""
    import torch

    return torch.cuda.device_count()
