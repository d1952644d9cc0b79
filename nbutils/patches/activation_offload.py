"""Activations that wait in host memory, copied there and back beside the computation.

Changes `save_on_cpu` of `transformers.modeling_utils`, which is torch's. Needed while torch copies on the stream that
computes (pytorch/pytorch#106360, open). Ran with transformers 5.23 and torch 2.11 and 2.13.
"""

import torch
import transformers.modeling_utils
from transformers import PreTrainedModel

from nbutils.common.foreign_code import expect, expect_source, source

# Bytes. What is smaller stays where it is, as rotary angles do: all layers share them.
SMALL = 4 * 2**20


class WaitingTensor:
    """A tensor that left the GPU: its copy in pinned memory, and the copy that is on its way back."""

    def __init__(self, tensor: torch.Tensor, stream: torch.cuda.Stream):
        self.stream, self.device, self.back, self.ready = stream, tensor.device, None, None
        stream.wait_stream(torch.cuda.current_stream())  # the tensor must be complete
        with torch.cuda.stream(stream):
            self.on_host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self.on_host.copy_(tensor, non_blocking=True)
        tensor.record_stream(stream)  # its memory is not reused before the copy is done

    def fetch(self) -> None:
        """Begin the way back; a second call does nothing."""
        if self.back is None:
            with torch.cuda.stream(self.stream):
                self.back = self.on_host.to(self.device, non_blocking=True)
                self.ready = self.stream.record_event()

    def take(self) -> torch.Tensor:
        """The tensor on the GPU again, for the current stream."""
        self.fetch()
        torch.cuda.current_stream().wait_event(self.ready)
        back, self.back = self.back, None
        back.record_stream(torch.cuda.current_stream())
        return back


class WaitOnHost(torch.autograd.graph.saved_tensors_hooks):
    """`torch.autograd.graph.save_on_cpu` with its copies beside the computation instead of in its way.

    The backward pass wants the inputs of the layers in reverse order. While it works on one layer, the input of the
    layer before is already coming: one more input in GPU memory, and no waiting.

    Args:
        pin_memory: always; the argument is there because `save_on_cpu` has it.
        device_type: likewise.
    """

    waiting: list[WaitingTensor] = []  # of the whole model, in the order of the forward pass
    stream: torch.cuda.Stream | None = None

    def __init__(self, pin_memory: bool = True, device_type: str = "cuda"):
        super().__init__(self.pack, self.unpack)

    def pack(self, tensor: torch.Tensor):
        """In the forward pass: send the tensor to the host, if it is worth it."""
        if not tensor.is_cuda or tensor.numel() * tensor.element_size() < SMALL:
            return tensor
        if WaitOnHost.stream is None:
            WaitOnHost.stream = torch.cuda.Stream()
        self.waiting.append(WaitingTensor(tensor, WaitOnHost.stream))
        return self.waiting[-1]

    def unpack(self, packed) -> torch.Tensor:
        """In the backward pass: take this one, and call the one that is wanted next."""
        if isinstance(packed, torch.Tensor):
            return packed
        tensor = packed.take()
        if packed in self.waiting:
            del self.waiting[self.waiting.index(packed) :]
        if self.waiting:
            self.waiting[-1].fetch()
        return tensor


def check() -> None:
    """Refuse a transformers that offloads activations in another way.

    Raises:
        UnknownCode: `save_on_cpu` is gone, takes other arguments, or is not what the checkpoints use.
    """
    expect(transformers.modeling_utils, "save_on_cpu", ("pin_memory", "device_type"), "activation_offload")
    call = "with save_on_cpu(pin_memory=True, device_type=device_type):"
    expect_source(PreTrainedModel._activation_checkpointing_enable, call, "activation_offload")


def still_needed() -> bool:
    """Whether torch's own `save_on_cpu` still copies on the stream that computes."""
    return "Stream" not in source(torch.autograd.graph.save_on_cpu)


def copy_activations_beside_compute() -> None:
    """Let transformers' activation offload (`activation_checkpointing_kwargs: {offload: true}`) use `WaitOnHost`.

    Raises:
        UnknownCode: as `check`.
    """
    check()
    transformers.modeling_utils.save_on_cpu = WaitOnHost
