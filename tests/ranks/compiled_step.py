"""One training step under FSDP 2, eager and with compiled layers: gradients, multiplications, graphs, graph breaks.

And steps of packed rows: graphs after each.

Run as: python tests/ranks/compiled_step.py FOLDER      (the tests do it)

A process of its own, because `compile_layers` changes bitsandbytes for the whole process. What was seen goes to
`FOLDER/seen.json`.
"""

import json
import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch._dynamo.utils import counters
from torch.distributed import HashStore
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.profiler import profile
from transformers import LlamaConfig, LlamaForCausalLM
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from nbutils.launching.rehearsal import keep_four_bit_weights_in_order
from nbutils.models.loading import load_nf4
from nbutils.training.compiled_layers import compile_layers
from nbutils.training.packed_attention import attend_within_rows
from nbutils.training.prep import prepare_for_fsdp_qlora
from nbutils.training.tiled_mlp import tile_mlps

LAYERS = 12  # more than the eight compilations of one function after which torch.compile gives up
MULTIPLICATION = "bitsandbytes::gemm_4bit"


def write_base(folder: Path) -> None:
    """A narrow Llama of many layers, random values."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def build(folder: Path, compiled: bool, tiles: int = 0) -> nn.Module:
    """The model as the script makes it, sharded by layers as Accelerate does it."""
    model = prepare_for_fsdp_qlora(load_nf4(str(folder)))
    torch.manual_seed(1)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, lora, autocast_adapter_dtype=False).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zeros: no gradient would reach an A
            nn.init.normal_(parameter, std=0.02)
    if compiled:
        compile_layers(model)
    if tiles:
        tile_mlps(model, tiles)
    mesh = init_device_mesh("cpu", (1,))
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def step(model: nn.Module) -> dict[str, torch.Tensor]:
    """One forward and backward pass; the gradients by name."""
    ids = torch.arange(128).view(2, 64)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    gradients = {name: p.grad.full_tensor().float() for name, p in trained}
    model.zero_grad()
    return gradients


def multiplications(model: nn.Module) -> int:
    """Products with a 4-bit weight in one step: forward and recomputation (the backward pass unpacks instead)."""
    step(model)
    with profile() as seen:
        step(model)
    return sum(event.count for event in seen.key_averages() if event.key == MULTIPLICATION)


def graphs_of_packed_rows(model: nn.Module) -> list[int]:
    """Graphs made so far, after each of several batches of packed rows; their number and lengths differ each time."""
    attend_within_rows(model.base_model.model)
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    random = torch.Generator().manual_seed(0)
    graphs = []
    for rows in (3, 5, 4, 7, 2, 6, 1, 9):
        lengths = torch.randint(2, 40, (rows,), generator=random).tolist()
        model(**collate([{"input_ids": list(range(n))} for n in lengths]), use_cache=False).loss.backward()
        model.zero_grad()
        graphs.append(counters["stats"]["unique_graphs"])
    return graphs


def main(folder: Path) -> None:
    torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    keep_four_bit_weights_in_order()
    write_base(folder / "base")
    eager = build(folder / "base", compiled=False)
    wanted, eager_products = step(eager), multiplications(eager)
    compiled = build(folder / "base", compiled=True)
    found, compiled_products = step(compiled), multiplications(compiled)
    seen = {
        "layers": LAYERS,
        "gradients": len(wanted),
        "names_agree": sorted(wanted) == sorted(found),
        "furthest": max(((found[n] - wanted[n]).norm() / wanted[n].norm()).item() for n in wanted),
        "products": {"eager": eager_products, "compiled": compiled_products},
        "graphs": counters["stats"]["unique_graphs"],
        "breaks": {reason[:300]: count for reason, count in counters["graph_break"].items()},
    }
    tiled = build(folder / "base", compiled=True, tiles=4)
    found, tiled_products = step(tiled), multiplications(tiled)
    seen["tiled"] = {
        "furthest": max(((found[n] - wanted[n]).norm() / wanted[n].norm()).item() for n in wanted),
        "products": tiled_products,
        "breaks": {reason[:300]: count for reason, count in counters["graph_break"].items()},
    }
    seen["packed_graphs"] = graphs_of_packed_rows(compiled)
    (folder / "seen.json").write_text(json.dumps(seen))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
