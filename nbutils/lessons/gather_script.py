"""One forward pass of the tiny Llama under FSDP 2, gathered as numbers or as bytes. Lesson 02b starts it on two ranks.

Run as: accelerate launch ... nbutils/lessons/gather_script.py MODEL numbers|bytes
"""

import sys
from unittest import mock

import torch
from accelerate import PartialState
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.fsdp import fully_shard

from nbutils.lessons.cuda_copy import copy_as_numbers
from nbutils.lessons.one_process import loss_of, sentence
from nbutils.models.loading import load_nf4
from nbutils.patches.fsdp2_gather import gather_as_bytes
from nbutils.training.first_gather import check_first_gather


def sharded(model_path: str, state: PartialState) -> torch.nn.Module:
    """The 4-bit model under FSDP 2, a unit for each decoder layer."""
    model = load_nf4(model_path).requires_grad_(False)
    mesh = init_device_mesh(state.device.type, (state.num_processes,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


@record
def main() -> None:
    """Gather, check the first gather as the training script does, and print the loss."""
    model_path, how = sys.argv[1:]
    state = PartialState()
    if how == "bytes":
        gather_as_bytes()
    model = sharded(model_path, state)
    check_first_gather(model)
    # On a GPU torch's own copy is under test; a CPU's is exact, so CUDA's is imitated.
    copy = torch._foreach_copy_ if state.device.type == "cuda" else copy_as_numbers
    with mock.patch.object(torch, "_foreach_copy_", copy):
        loss = loss_of(model, sentence().to(state.device))
    print(f"every byte of this rank's first gather is as it was; loss {loss:.4f}")


if __name__ == "__main__":
    main()
