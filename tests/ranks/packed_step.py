"""One step of packed rows, and of the same rows one by one, under FSDP 1 and FSDP 2 on two ranks, in fp32.

Run as: python tests/ranks/packed_step.py FOLDER      (the tests do it)

What was seen goes to `FOLDER/seen.json`.
"""

import json
import multiprocessing
import socket
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from nbutils.training.packed_attention import attend_within_rows

LENGTHS = ((5, 64, 17), (30, 2, 41))  # of each rank's rows


def build(version: int, packed: bool) -> nn.Module:
    """A narrow Llama with an adapter, sharded by layers, each layer a checkpoint."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).requires_grad_(False)
    model.activation_checkpointing_enable({"use_reentrant": False})
    if packed:
        attend_within_rows(model)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zeros: no gradient would reach an A
            nn.init.normal_(parameter, std=0.1)
    if version == 1:
        policy, cpu = ModuleWrapPolicy({LlamaDecoderLayer}), torch.device("cpu")
        return FSDP(model.train(), auto_wrap_policy=policy, device_id=cpu, use_orig_params=True)
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model.train(), mesh=mesh)


def rows(rank: int) -> list[dict]:
    """Rows of which about half the tokens are learned, in several spans."""
    random = torch.Generator().manual_seed(rank)
    made = []
    for length in LENGTHS[rank]:
        ids = torch.randint(0, 97, (length,), generator=random)
        learned = torch.randint(0, 2, (length,), generator=random).bool()
        made.append({"input_ids": ids.tolist(), "labels": torch.where(learned, ids, -100).tolist()})
    return made


def step(model: nn.Module, batches: list[dict]) -> torch.Tensor:
    """Forward and backward pass of each batch; the losses of the learned tokens."""
    losses = []
    for batch in batches:
        wanted = batch.pop("labels")[:, 1:].flatten()
        given = model(**batch, use_cache=False).logits[:, :-1].flatten(0, 1)
        each = nn.functional.cross_entropy(given, wanted, reduction="none", ignore_index=-100)
        each.sum().backward()
        losses.append(each.detach()[wanted != -100])
    return torch.cat(losses)


def gradients(model: nn.Module, version: int) -> dict[str, torch.Tensor]:
    """Whole, by name; every rank must call it."""
    if version == 1:
        with FSDP.summon_full_params(model, with_grads=True):
            return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    return {n: p.grad.full_tensor() for n, p in model.named_parameters() if p.requires_grad}


def compare(version: int, rank: int) -> dict:
    alone = [{name: torch.tensor([values]) for name, values in row.items()} for row in rows(rank)]
    pack = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)(rows(rank))
    separate, packed = build(version, packed=False), build(version, packed=True)
    wanted, found = step(separate, alone), step(packed, [pack])
    before, after = gradients(separate, version), gradients(packed, version)
    furthest = [((after[n] - before[n]).norm() / before[n].norm()).item() for n in before]
    return {
        "tokens": len(found),
        "loss": (found - wanted).abs().max().item(),
        "gradients": len(furthest),
        "furthest": max(furthest),
        "smallest_norm": min(gradient.norm().item() for gradient in before.values()),
    }


def be_rank(rank: int, port: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    seen = {str(version): compare(version, rank) for version in (1, 2)}
    (folder / f"seen{rank}.json").write_text(json.dumps(seen))
    dist.barrier()
    dist.destroy_process_group()


def main(folder: Path) -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=be_rank, args=(number, port, folder)) for number in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    return max(abs(process.exitcode) for process in ranks)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
