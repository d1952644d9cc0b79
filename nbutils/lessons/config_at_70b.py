"""The figures of lesson 01 for the 70B: computed from the shape, and tested against what the tiny model showed."""

from dataclasses import dataclass, replace

from nbutils.lessons import records
from nbutils.planning.memory_items import BF16, FP32, GIB, packed_bytes
from nbutils.planning.memory_plan import fits, plan
from nbutils.planning.run_setup import LORA_RANK, Choices, Setup
from nbutils.planning.shapes import Shape


@dataclass(frozen=True)
class Weights:
    """Bytes of weights on one rank: kept all the time, gathered between the passes, received in a step."""

    kept: float
    held: float
    moved: float


def parts(shape: Shape, lora_r: int) -> tuple[int, int, int]:
    """Bytes of the whole model: (4-bit layers with their norms, root with embedding and head, adapter in bf16).

    Args:
        shape: of the model.
        lora_r: rank of the adapter, on all linear layers.
    """
    layers = shape.layers * (packed_bytes(shape.linear_parameters) + BF16 * 2 * shape.hidden)
    root = BF16 * (2 * shape.vocab * shape.hidden + shape.hidden)
    return layers, root, BF16 * shape.adapter_parameters(lora_r)


def strategies(shape: Shape, ranks: int, lora_r: int, checkpointing: bool = True) -> dict[str, Weights]:
    """What each strategy keeps and moves, with PEFT's wrap policy under FSDP 1, without offload.

    A ring moves (ranks - 1) / ranks of what is gathered, and as much of what is reduced. FULL_SHARD gathers layers and
    adapter for both passes, and with checkpoints nearly all of the adapter once more: the last adapter matrix of a
    layer is still there when the layer has been computed again. FSDP 2 holds layer and adapter in one unit, which is
    not gathered again; it gathers the embedding for both passes and the head once.

    Args:
        shape: of the model; its head is not tied to the embedding.
        ranks: how many share it.
        lora_r: rank of the adapter.
        checkpointing: activation checkpoints are on, as in the training script.
    """
    layers, root, adapter = parts(shape, lora_r)
    whole, share = layers + root + adapter, (ranks - 1) / ranks
    embedding = BF16 * shape.vocab * shape.hidden
    again = adapter - BF16 * lora_r * shape.hidden * shape.layers if checkpointing else 0
    twice = 2 * (layers + adapter)
    return {
        "FULL_SHARD": Weights(whole / ranks, root, share * (twice + root + again + adapter)),
        "SHARD_GRAD_OP": Weights(whole / ranks, whole, share * (whole + adapter)),
        "NO_SHARD": Weights(whole, 0, share * 2 * adapter),
        "fsdp2 reshard": Weights(
            whole / ranks, root - embedding, share * (twice + root + embedding + adapter)
        ),
        "fsdp2 no reshard": Weights(whole / ranks, whole, share * (whole + adapter)),
    }


def gradient_ratio(shape: Shape, lora_r: int) -> float:
    """How many times the gradient bytes of PEFT's policy travel if a layer and its adapter share one unit.

    Args:
        shape: of the model.
        lora_r: rank of the adapter.
    """
    layers, _, adapter = parts(shape, lora_r)
    return (layers + adapter) / adapter


@dataclass(frozen=True)
class Policy:
    """What a wrap policy makes: units, bytes of the largest gather, bytes of gradients received in a step."""

    units: int
    largest: float
    gradients: float


def wrap_policies(shape: Shape, ranks: int, lora_r: int) -> dict[str, Policy]:
    """Units and traffic of each wrap policy, by the names of the measurement.

    PEFT's policy makes a unit of each of the two adapter matrices beside a layer's seven projections. FSDP 2 under
    accelerate gives embedding and head units of their own.

    Args:
        shape: of the model; its head is not tied to the embedding.
        ranks: how many share it.
        lora_r: rank of the adapter.
    """
    layers, root, adapter = parts(shape, lora_r)
    share = (ranks - 1) / ranks
    embedding = BF16 * shape.vocab * shape.hidden
    return {
        "FULL_SHARD": Policy(shape.layers * (1 + 2 * 7) + 1, root, share * adapter),
        "file policy, orig": Policy(shape.layers + 1, root, share * (layers + adapter)),
        "no wrap, orig": Policy(1, layers + root + adapter, share * (layers + root + adapter)),
        "fsdp2 reshard": Policy(shape.layers + 3, embedding, share * adapter),
    }


def highest_moment(shape: Shape, ranks: int, version: int, offload: bool) -> float:
    """GiB planned on each GPU for one row of 1,024 tokens; FSDP 2 with offload has embedding and head on the host."""
    choices = Choices(embeddings_on_host=version == 2 and offload)
    return plan(shape, Setup(ranks, version, offload), 1, 1024, choices=choices).gpu_peak_bytes / GIB


def trained_bytes(shape: Shape, ranks: int, lora_r: int = LORA_RANK) -> dict[str, float]:
    """Bytes on a rank for adapter, gradients and Adam's two averages, by the dtype in which the adapter is kept."""
    adapter = parts(shape, lora_r)[2]
    return {"bfloat16": 4 * adapter / ranks, "float32": 4 * FP32 / BF16 * adapter / ranks}


def five_keys(shape: Shape, ranks: int = 2, lora_r: int = LORA_RANK) -> list[list[str]]:
    """Rows for the keys that decide: key, what it decides, the recipe's value, another value; GiB of one rank.

    Args:
        shape: of the model.
        ranks: how many share it.
        lora_r: rank of the adapter.
    """
    weights = strategies(shape, ranks, lora_r)
    layers, root, adapter = parts(shape, lora_r)
    peaks = {way: highest_moment(shape, ranks, *way) * GIB for way in ((1, True), (1, False), (2, False))}
    trained = trained_bytes(shape, ranks, lora_r)

    def row(key: str, decides: str, recipe: tuple[str, float], other: tuple[str, float]) -> list[str]:
        return [key, decides, *(f"{value}: {size / GIB:.1f}" for value, size in (recipe, other))]

    return [
        row("fsdp_sharding_strategy", "weights kept all the time", ("FULL_SHARD", weights["FULL_SHARD"].kept),
            ("NO_SHARD", weights["NO_SHARD"].kept)),
        row("fsdp_auto_wrap_policy", "largest piece gathered at once", ("TRANSFORMER_BASED", root),
            ("NO_WRAP (FSDP 2)", layers + root + adapter)),
        row("fsdp_offload_params", "highest moment of the run", ("true", peaks[1, True]), ("false", peaks[1, False])),
        row("fsdp_version", "the same, no offload", ("1", peaks[1, False]), ("2", peaks[2, False])),
        row("mixed_precision", "adapter, gradients, Adam", ("no (bf16)", trained["bfloat16"]),
            ("bf16 (fp32 kept)", trained["float32"])),
    ]  # fmt: skip


def four_ways(shape: Shape) -> list[list[str]]:
    """Rows for FSDP 1 and 2, with and without offload, on two cards of 24 GB, with rows of 2,048 tokens.

    Returns:
        FSDP, offload, GiB of room on the card as it is with two rows a GPU, settings of the script to add, rows a GPU
        with them, GiB of room then, GiB of host memory for both ranks, recorded speed in times the first way's.
    """
    resident = Choices(embeddings_on_host=True, compile_layers=True, offload_activations=True)
    ways = [
        (1, True, Choices(), "none", 2, "70b_fsdp1_offload_cap_b2_l2048"),
        (1, False, replace(resident, compile_layers=False), "embeddings, activations on the host", 2, None),
        (2, True, replace(resident, offload_activations=False), "fastest_2x24gb.yaml", 4, "70b_fast_cap_b4_l2048"),
        (2, False, resident, "resident_2x24gb.yaml", 2, "70b_resident_cap_b2_l2048"),
    ]  # fmt: skip
    speeds = [name and records.load(name)["measured"]["tokens_per_second"] for *_, name in ways]
    rows = []
    for (version, offload, choices, settings, batch, _), speed in zip(ways, speeds):
        setup = Setup(2, version, offload)
        plain, chosen = plan(shape, setup, 2, 2048), plan(shape, setup, batch, 2048, choices=choices)
        before = "refused" if (version, offload) == (2, True) else f"{fits(plain)[24]:+.1f}"
        host_gib = setup.world_size * sum(chosen.host.values()) / GIB
        said = f"{speed / speeds[0]:.2f}" if speed else "not run"
        room = f"{fits(chosen)[24]:+.1f}"
        rows.append(
            [
                f"{version}",
                "yes" if offload else "no",
                before,
                settings,
                f"{batch}",
                room,
                f"{host_gib:.0f}",
                said,
            ]
        )
    return rows
