"""Embedding and output head in host memory: 3.9 GiB of a 70B model that no GPU has to hold, with the same numbers."""

import os

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel


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
        return F.embedding(ids.cpu(), self.weight).to(ids.device)


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
        self.on_device = None

    @property
    def weight(self) -> torch.Tensor:
        """The weight where the loss wants it: a copy on the GPU from `fetch` until the backward pass has used it."""
        return self.on_host if self.on_device is None else self.on_device

    def fetch(self, decoder: nn.Module, inputs: tuple, output) -> None:
        """A forward hook of the decoder: the head is needed next."""
        hidden = output.last_hidden_state
        self.on_device = self.on_host.to(hidden.device, non_blocking=True)
        if hidden.requires_grad:
            hidden.register_hook(self.drop)

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
    model.get_decoder().register_forward_pre_hook(on_host.drop)
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
