"""The sizes of a run that the memory plan adds up: weights, adapter, what layers keep, all in bytes."""

from dataclasses import dataclass

from nbutils.planning.memory_items import (
    BF16,
    FP32,
    WORKSPACES,
    attention_backward_bytes,
    evaluating_bytes,
    logits_tile_bytes,
    packed_bytes,
    passing_bytes_per_token,
    pinned_bytes,
    quantisation_state_bytes,
    saved_bytes_per_token,
    tiled_mlp_bytes,
)
from nbutils.planning.run_setup import Choices, Setup
from nbutils.planning.shapes import Shape


@dataclass(frozen=True)
class Sizes:
    """Bytes of everything the moments are made of; `layer` and so on are whole, `shard` divides by the ranks."""

    layers: int
    layer: int  # packed weights of one decoder layer and its two norms
    unit_tensors: list[int]  # its packed weights one by one, the smallest first
    adapter_layer: int
    scales: int
    embedding: int  # one of embedding and output head
    root: int  # what FSDP 1 leaves to the root unit: embedding, output head, last norm
    ranks: int
    checkpoints: int  # inputs of the checkpointed layers that are on the GPU
    one_checkpoint: int
    kept: int  # what layers without a checkpoint keep
    offloaded: int  # inputs that wait in pinned host memory
    final_norm: int  # its input in fp32 and its output, kept for the backward pass of the loss
    logits: int  # a tile of them
    computed_again: int
    unpacked: int  # weights in bf16 while they are multiplied
    passing: int  # gradients on their way through the down projection; tiled, of the MLP's output and input
    tile: int  # of a tiled MLP, in its backward pass
    attention: int  # with a tiled MLP, what the backward pass of the rest of a layer holds
    on_host: bool  # embedding and head
    accumulating: bool  # several passes a step: FSDP reduces the gradients in the last one
    evaluated: int  # a layer in an evaluation
    evaluation_loss: int  # hidden states, the last norm of them, and a tile of logits
    checkpoint: int  # the copy of a rank's part that a checkpoint writes

    @classmethod
    def of(
        cls, shape: Shape, setup: Setup, tokens: int, evaluated: int, lora_r: int, choices: Choices
    ) -> "Sizes":
        embedding = BF16 * shape.vocab * shape.hidden
        compiled, tiles = choices.compile_layers, choices.mlp_tiles
        saved = saved_bytes_per_token(shape, compiled, bool(tiles))
        passing = tokens * passing_bytes_per_token(shape, compiled, choices.stacked_adapters)
        passing, tile = tiled_mlp_bytes(shape, tokens, tiles, compiled) if tiles else (passing, 0)
        kept = saved + BF16 * shape.hidden  # with the layer's input, which elsewhere counts as a checkpoint
        largest = BF16 * max(out * into for out, into in shape.linears.values())
        checkpointed = -(-shape.layers // choices.every_n_layers) if choices.checkpointing else 0
        layer_input = tokens * shape.hidden * BF16
        waiting = choices.offload_activations and checkpointed
        return cls(
            layers=shape.layers,
            layer=packed_bytes(shape.linear_parameters) + BF16 * 2 * shape.hidden,
            unit_tensors=sorted(packed_bytes(out * into) for out, into in shape.linears.values()),
            adapter_layer=BF16 * shape.adapter_parameters(lora_r) // shape.layers,
            scales=shape.layers * quantisation_state_bytes(shape.linear_parameters),
            embedding=embedding,
            root=(0 if choices.embeddings_on_host else (1 if shape.tied else 2) * embedding)
            + BF16 * shape.hidden,
            ranks=setup.world_size,
            # Of inputs that wait in host memory, two are on the GPU: this layer's and the next one's.
            # And the embedding's output, which is the first of them, never leaves.
            checkpoints=min(3, checkpointed) * layer_input if waiting else checkpointed * layer_input,
            one_checkpoint=layer_input if checkpointed else 0,
            kept=(shape.layers - checkpointed) * tokens * kept,
            offloaded=checkpointed * pinned_bytes(layer_input) if waiting else 0,
            final_norm=tokens * shape.hidden * (FP32 + BF16),
            logits=logits_tile_bytes(shape, tokens),
            computed_again=tokens * saved if checkpointed else 0,
            unpacked=0 if compiled else largest,  # compiled, it comes when most else is gone
            passing=passing,
            tile=tile,
            attention=attention_backward_bytes(shape, tokens, compiled) if tiles else 0,
            on_host=choices.embeddings_on_host,
            accumulating=choices.accumulation > 1 and setup.fsdp_version > 0,
            evaluated=evaluating_bytes(shape, evaluated, largest, tiles),
            evaluation_loss=evaluated * shape.hidden * (FP32 + 2 * BF16)
            + logits_tile_bytes(shape, evaluated),
            # The adapter and AdamW's two moments.
            checkpoint=3 * BF16 * shape.adapter_parameters(lora_r) // setup.world_size
            if choices.keeps_checkpoints
            else 0,
        )

    @property
    def adapter(self) -> int:
        return self.layers * self.adapter_layer

    def resident(self, offload: bool) -> dict[str, int]:
        """What stays on a GPU all through training.

        Under accelerate's `no_sync` FSDP 1 and FSDP 2 both keep a step's gradients whole on each GPU, with offload too,
        until its last pass reduces them to shards.
        """
        items = {"quantisation state": self.scales, "cuBLAS workspaces": WORKSPACES}
        if self.accumulating:
            items["gradients"] = self.adapter
        if offload:
            return items
        share = self.adapter // self.ranks
        return items | {
            "4-bit shards": self.layers * self.layer // self.ranks,
            "shard of embedding and head": self.root // self.ranks,
            "adapter": share,
            "gradients": self.adapter if self.accumulating else share,
            "optimizer states": 2 * share,  # AdamW: two moments, in the adapter's dtype
        }

    def evaluation(self, resident: dict[str, int], layers: dict[str, int], head: int) -> dict[str, dict]:
        """The moments of an evaluation: a layer, and the loss. No gradient is there.

        Args:
            resident: what stays on the GPU.
            layers: what is gathered of layers, and is on its way.
            head: the output head, where it has to come for the loss.
        """
        resident = resident | {"gradients": 0}
        return {
            "evaluation": resident | layers | {"one layer evaluated": self.evaluated},
            "loss of an evaluation": resident | {"head": head, "its hidden states": self.evaluation_loss},
        }

    def one_layer_backward(self, first: bool = False) -> dict[str, int]:
        """The backward pass of a checkpointed layer: everything computed again is alive.

        With a tiled MLP it is the fuller of two moments: a tile of the MLP, or what comes after it.

        Args:
            first: the model's first layer, whose turn comes last: the other checkpoints are gone by then.
        """
        others = {
            "checkpointed layer inputs": self.one_checkpoint if first else self.checkpoints,
            "layers that keep everything": 0 if first else self.kept,
        }
        in_mlp = {
            "one layer computed again": self.computed_again,
            "its gradients": self.passing,
            "a tile of the MLP": self.tile,
        }
        behind = {"attention and norms, with gradients": self.attention}
        fuller = max(in_mlp, behind, key=lambda items: sum(items.values()))
        # bitsandbytes multiplies by the unpacked weight.
        return others | fuller | {"weights in bf16": self.unpacked}

    def loss(self) -> dict[str, int]:
        """The moment of the loss, when the head has come from the host and no layer is gathered."""
        return {
            "checkpointed layer inputs": self.checkpoints,
            "layers that keep everything": self.kept,
            "head": self.embedding,
            "last norm": self.final_norm,
            "a tile of the logits": self.logits,
        }
