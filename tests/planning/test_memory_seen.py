"""Evaluation, accumulation and checkpoints in the memory plan, beside the bytes that a CPU shows to be held."""

import weakref
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from training_runs import run, train

from nbutils.adapters.checkpoint_folder import checkpoints_in, rank_file
from nbutils.launching.random_weights import prepare
from nbutils.launching.rehearsal import keep_four_bit_weights_in_order
from nbutils.models.loading import load_nf4
from nbutils.planning.memory_items import (
    BF16,
    attention_backward_bytes,
    evaluating_bytes,
    logits_tile_bytes,
    tiled_mlp_bytes,
)
from nbutils.planning.memory_plan import plan
from nbutils.planning.run_setup import Choices, Setup
from nbutils.planning.shapes import SHAPES
from nbutils.training.prep import prepare_for_fsdp_qlora
from nbutils.training.tiled_mlp import tile_mlps

TINY = SHAPES["tiny"]
ADAPTER = BF16 * TINY.adapter_parameters(4)  # as tests/training_runs.py asks for it


class Live(TorchDispatchMode):
    """Bytes of all tensors that were made within it and are still there; `peak` is the most of them."""

    def __init__(self):
        super().__init__()
        self.sizes, self.peak = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if (
                isinstance(tensor, torch.Tensor)
                and (storage := tensor.untyped_storage())._cdata not in self.sizes
            ):
                self.sizes[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.sizes.pop, storage._cdata, None)
        self.peak = max(self.peak, sum(self.sizes.values()))
        return made


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    """Of a tiny Llama in NF4 with an adapter in bf16, as TRL trains it."""
    keep_four_bit_weights_in_order()
    model = load_nf4(str(prepare(TINY, tmp_path_factory.mktemp("weights"))))
    model = prepare_for_fsdp_qlora(model, activation_checkpointing=True, use_reentrant=False)
    lora = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, lora, autocast_adapter_dtype=False).to(torch.bfloat16)
    return model.eval().get_base_model().model


def test_a_token_more_in_an_evaluated_layer_takes_what_is_planned(decoder):
    """Eager, on a CPU. The difference of two batches: what does not grow with the tokens is left out."""
    peaks = {}
    for rows in (4, 8):
        with torch.no_grad(), Live() as live:
            decoder(torch.randint(10, 1000, (rows, 512)))
        peaks[rows] = live.peak
    largest = BF16 * max(out * into for out, into in TINY.linears.values())
    planned = [evaluating_bytes(TINY, rows * 512, largest) for rows in peaks]
    assert peaks[8] - peaks[4] == pytest.approx(planned[1] - planned[0], rel=0.02)


@pytest.fixture
def tiled(decoder):
    """The same decoder with its MLPs in so many tiles; whole again afterwards."""
    plain = [layer.mlp.forward for layer in decoder.layers]

    def in_tiles(tiles: int):
        for layer, whole in zip(decoder.layers, plain):
            layer.mlp.forward = whole
        if tiles:
            tile_mlps(SimpleNamespace(get_decoder=lambda: decoder), tiles)
        return decoder

    yield in_tiles
    in_tiles(0)


def more_bytes(step) -> int:
    """What 2,048 tokens hold at their fullest beyond 1,024: what does not grow with the tokens is left out."""
    peaks = []
    for tokens in (1024, 2048):
        with Live() as live:
            step(tokens)
        peaks.append(live.peak)
    return peaks[1] - peaks[0]


@pytest.mark.parametrize("tiles", [1, 2, 8])
def test_a_tiled_mlp_holds_what_is_planned(tiled, tiles):
    """Besides: the rows, a copy that asks for a gradient, and the output of the forward pass."""

    def step(tokens: int) -> None:
        x, gradient = torch.randn(2, 1, tokens, TINY.hidden, dtype=torch.bfloat16)
        tiled(tiles).layers[1].mlp(x.clone().requires_grad_()).backward(gradient)

    beside = 3 * 1024 * BF16 * TINY.hidden
    planned = sum(tiled_mlp_bytes(TINY, 1024, tiles, compiled=False))
    assert more_bytes(step) == pytest.approx(planned + beside, rel=0.05)


@pytest.mark.parametrize("tiles", [2, 16])
def test_behind_a_tiled_mlp_a_norm_is_the_fullest_moment(tiled, tiles):
    """Besides the inputs of all layers. Adapters keep a little of their own: r columns of each projection."""
    decoder = tiled(tiles).train()

    def step(tokens: int) -> None:
        ids = torch.randint(10, 1000, (1, tokens))
        (decoder(ids, use_cache=False).last_hidden_state ** 2).float().mean().backward()

    grown = more_bytes(step)
    decoder.eval()
    inputs = TINY.layers * 1024 * BF16 * TINY.hidden
    planned = attention_backward_bytes(TINY, 1024, compiled=False)
    assert grown == pytest.approx(planned + inputs, rel=0.04)


@pytest.mark.parametrize("tiles", [1, 2, 8])
def test_an_evaluated_layer_with_a_tiled_mlp_takes_what_is_planned(tiled, tiles):
    with torch.no_grad():
        grown = more_bytes(lambda tokens: tiled(tiles)(torch.randint(10, 1000, (1, tokens)), use_cache=False))
    planned = [evaluating_bytes(TINY, tokens, 0, tiles) for tokens in (1024, 2048)]
    assert grown == pytest.approx(planned[1] - planned[0], rel=0.04)


def test_tiles_of_70b_by_hand():
    """65,536 tokens: a tensor of the hidden width is 1 GiB, one of the MLP's 3.5. A tile has an eighth."""
    seventy, tokens, gib = SHAPES["llama31_70b"], 65536, 2**30
    assert tiled_mlp_bytes(seventy, tokens, 8, compiled=True) == (2 * gib, (6 * 7 * gib // 2 + 2 * gib) // 8)
    assert attention_backward_bytes(seventy, tokens, compiled=True) == 10.5 * gib
    assert attention_backward_bytes(seventy, tokens, compiled=False) == 18.25 * gib
    settings = Choices(True, True, offload_activations=True)
    whole, tiles = (
        plan(seventy, Setup(2, 2, True), 1, tokens, choices=replace(settings, mlp_tiles=n)) for n in (0, 8)
    )
    assert whole.gpu_peak_bytes / gib == pytest.approx(33.3, abs=0.05)
    assert tiles.gpu_peak_bytes / gib == pytest.approx(15.6, abs=0.05)
    assert tiles.host == whole.host


def test_an_evaluation_of_70b_by_hand():
    """4 x 2,048 tokens: four tensors of 8,192 and four of 28,672 for each token, in two bytes."""
    seventy = SHAPES["llama31_70b"]
    assert evaluating_bytes(seventy, 8192, 2 * 8192 * 28672) == 8192 * 2 * 4 * (8192 + 28672) == 2_415_919_104
    # One short row: the weight that is multiplied counts for more than what is made of it.
    assert evaluating_bytes(seventy, 64, 2 * 8192 * 28672) == 64 * 2 * (4 * 8192 + 2 * 28672) + 469_762_048
    assert logits_tile_bytes(seventy, 8192) == 2 * 4096 * 32768 and logits_tile_bytes(TINY, 8) == 2 * 8 * 1024
    fast = Choices(embeddings_on_host=True, compile_layers=True)
    moment = plan(seventy, Setup(2, 2, True), 4, 2048, choices=fast).moments["evaluation"]
    assert moment["one layer evaluated"] == 2_415_919_104


def test_an_evaluation_of_more_rows_than_a_batch_has_can_be_the_peak():
    many = Choices(embeddings_on_host=True, compile_layers=True, eval_batch=8)
    assert plan(SHAPES["llama31_70b"], Setup(2, 2, True), 1, 2048, choices=many).peak_moment == "evaluation"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("passes")
    asked = [
        run(folder, f"fsdp{fsdp} {passes}", f"fsdp{fsdp}_{passes}", fsdp, max_steps=2, save_steps=2, logging_steps=1,
            gradient_accumulation_steps=passes) | {"gradients": True}
        for fsdp, passes in product((1, 2), (1, 2))
    ]  # fmt: skip
    seen = train(folder, asked)
    for name, one in seen.items():
        assert one["status"] == [0, 0], (name, one["output"])
    return folder


@pytest.mark.launch
@pytest.mark.parametrize("fsdp", [1, 2])
@pytest.mark.parametrize("passes", [1, 2])
def test_gradients_are_whole_on_each_rank_between_the_passes_of_a_step(runs, fsdp, passes):
    """accelerate's `no_sync`: FSDP reduces them to shards in the last pass, and not before."""
    for rank in range(2):
        held = [int(line) for line in (runs / f"fsdp{fsdp} {passes}.gradients{rank}").read_text().split()]
        assert len(held) == 2 * passes
        assert held[::passes] == [0, 0]
        if passes == 2:
            assert held[1::2] == pytest.approx([ADAPTER, ADAPTER], rel=0.01)
    setup = Setup(2, fsdp, offload=True)
    planned = plan(TINY, setup, 2, 64, 4, choices=Choices(accumulation=passes)).moments["backward of a layer"]
    assert planned.get("gradients", 0) == (ADAPTER if passes == 2 else 0)


@pytest.mark.launch
@pytest.mark.parametrize("fsdp", [1, 2])
def test_a_checkpoint_has_the_bytes_that_are_planned(runs, fsdp):
    (folder,) = checkpoints_in(runs / f"fsdp{fsdp}_1")
    written = sum((folder / rank_file(rank)).stat().st_size for rank in range(2))
    planned = 2 * plan(TINY, Setup(2, fsdp, False), 2, 64, 4).host["a checkpoint on its way to the disk"]
    assert planned == 3 * ADAPTER
    assert written == pytest.approx(planned, rel=0.15)  # names and places of the tensors come on top
