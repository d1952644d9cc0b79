"""Embedding and output head in host memory: 3.9 GiB of a 70B model that no GPU has to hold, with the same numbers."""

import os

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

# For measuring: with 1, looked-up rows go to the GPU from pinned memory, and the head sets out while layers compute.
AHEAD = os.environ.get("NBUTILS_HEAD_AHEAD") == "1"
LAYERS_AHEAD = 4  # of the last ones: the head's 2 GiB take as long as these compute, on a slow link


class EmbeddingOnHost(nn.Module):
    """Look tokens up in host memory, and send the rows to the GPU.

    Args:
        table: `(vocabulary, hidden)`, on the CPU. It is no parameter: FSDP neither shards nor moves it.
    """

    def __init__(self, table: torch.Tensor):
        super().__init__()
        self.weight = table

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows of the table.

        Args:
            ids: `(batch, length)`.

        Returns:
            `(batch, length, hidden)`, on the device of `ids`.
        """
        if not (AHEAD and ids.is_cuda):
            return F.embedding(ids.cpu(), self.weight).to(ids.device)
        rows = torch.empty(*ids.shape, self.weight.shape[1], dtype=self.weight.dtype, pin_memory=True)
        torch.index_select(self.weight, 0, ids.cpu().flatten(), out=rows.view(-1, rows.shape[-1]))
        return rows.to(ids.device, non_blocking=True)


class HeadOnHost(nn.Module):
    """An output head whose weight comes to the GPU when the last layer is done, and leaves once its gradient is known.

    In between stands the loss alone. While layers are computed, the head costs nothing on the GPU.

    Args:
        table: `(vocabulary, hidden)`, on the CPU; pinned if there is a GPU, so that the copy is fast.
    """

    bias = None

    def __init__(self, table: torch.Tensor):
        super().__init__()
        self.on_host = table.pin_memory() if torch.cuda.is_available() else table
        self.on_device, self.awaited = None, False
        self.stream = torch.cuda.Stream() if AHEAD and torch.cuda.is_available() else None

    @property
    def weight(self) -> torch.Tensor:
        """The weight where the loss wants it: a copy on the GPU from `fetch` until the backward pass has used it."""
        return self.on_host if self.on_device is None else self.on_device

    def fetch(self, decoder: nn.Module, inputs: tuple, output) -> None:
        """A forward hook of the decoder: the head is needed next."""
        hidden = output.last_hidden_state
        if self.on_device is None:
            self.on_device = self.on_host.to(hidden.device, non_blocking=True)
        else:  # it has set out
            torch.cuda.current_stream().wait_stream(self.stream)
            self.on_device.record_stream(torch.cuda.current_stream())
        self.awaited = False
        if hidden.requires_grad:
            hidden.register_hook(self.drop)

    def expect(self, *_) -> None:
        """A forward pre-hook of the decoder: nothing of the last pass is left, and the head will be wanted."""
        self.drop()
        self.awaited = True

    def set_out(self, *_) -> None:
        """A forward pre-hook of one of the last layers, which runs again when a checkpoint computes the layer again."""
        if self.awaited and self.on_device is None:
            with torch.cuda.stream(self.stream):
                self.on_device = self.on_host.to("cuda", non_blocking=True)

    def drop(self, *_) -> None:
        """The gradient has passed the head; or, after an evaluation, the next forward pass begins."""
        self.on_device = None

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits `(..., vocabulary)` of hidden states `(..., hidden)`."""
        return F.linear(hidden, self.weight.to(hidden.device))


def keep_embeddings_on_host(model: PreTrainedModel) -> PreTrainedModel:
    """Take embedding and output head away from FSDP and off the GPU.

    FSDP 1 gathers both for the whole step, 3.9 GiB of a 24 GB card for 70B. Under FSDP 2 each rank holds its share of
    them, gathers the embedding once more behind the first layer's backward pass, and leaves the head gathered after an
    evaluation (`benchmarks/results/peaks/`). Here a rank looks its tokens up in host memory, and copies the head to the
    GPU for the loss (for 70B 2 GiB a step: 0.04 s over a link of 55 GB/s, 0.15 s over one of 14). The values are the
    same, so the losses are.

    Call it before the adapter is added, and without an adapter on these two modules.

    Args:
        model: on the CPU, frozen base; changed in place.

    Returns:
        The same model.

    Raises:
        ValueError: embedding or head ask for gradients: what is trained must stay with FSDP.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if embedding.weight.requires_grad or head.weight.requires_grad:
        raise ValueError(
            "Embedding and head can stay on the host only while they are frozen; one of them is trained. Freeze the "
            "base first (prepare_for_fsdp_qlora), and leave both out of modules_to_save."
        )
    on_host = HeadOnHost(head.weight.detach())
    model.set_input_embeddings(EmbeddingOnHost(embedding.weight.detach()))
    model.set_output_embeddings(on_host)
    model.get_decoder().register_forward_pre_hook(on_host.expect)
    if on_host.stream is not None:
        layers = model.get_decoder().layers
        layers[max(0, len(layers) - LAYERS_AHEAD)].register_forward_pre_hook(on_host.set_out)
    model.get_decoder().register_forward_hook(on_host.fetch)
    return model


def refuse_offloaded_head() -> None:
    """Refuse FSDP 2 with parameters in host memory and an output head that is one of them.

    Raises:
        ValueError: the launcher's environment asks for both. TRL would take the loss to where the head lies, the CPU,
            and NCCL would refuse to gather its metrics in the first step, after everything was loaded.
    """
    asked = (
        os.environ.get("FSDP_VERSION") == "2" and os.environ.get("FSDP_OFFLOAD_PARAMS", "").lower() == "true"
    )
    if asked and os.environ.get("ACCELERATE_USE_FSDP") == "true":
        raise ValueError(
            "FSDP 2 with fsdp_offload_params wants embeddings_on_host: true; without it the first step fails with "
            "`Tensors must be CUDA and dense`. Set it, as the files in configs/goals do, or take FSDP 1."
        )
