"""The memory plan: bytes a rank, item by item, on the GPU and in host memory, before anything is bought or started."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from nbutils.planning.memory_items import GIB
from nbutils.planning.memory_moments import items_of
from nbutils.planning.run_setup import LORA_RANK, Choices, Setup
from nbutils.planning.shapes import Shape

OUTSIDE = int(2.3 * GIB)  # CUDA context and NCCL, a rank; recorded on H200s: 1.3 to 2.3
# What a card of a nominal size shows to programs, in GiB: `total_memory` of torch.cuda.get_device_properties.
CARDS = {16: 15.6, 24: 23.6, 40: 39.4, 48: 47.4, 80: 79.1, 141: 139.8}
DRIVER = 0.4  # GiB that nvidia-smi's total counts besides: 24.0 for a card of 24 GB
# Of what a card leaves, a plan may fill so much: it is off by up to 3 %, and PyTorch reserves more than it uses.
FILLED = 0.95


@dataclass
class Plan:
    """Bytes a rank: on the GPU item by item at each moment that can be its peak, and in host memory."""

    moments: dict[str, dict[str, int]]
    host: dict[str, int]

    @property
    def peak_moment(self) -> str:
        """The moment that needs most."""
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def gpu(self) -> dict[str, int]:
        """The items of that moment."""
        return self.moments[self.peak_moment]

    @property
    def gpu_peak_bytes(self) -> int:
        return sum(self.gpu.values())

    @property
    def host_bytes(self) -> int:
        """Of one rank."""
        return sum(self.host.values())


def plan(
    shape: Shape,
    setup: Setup,
    batch: int,
    length: int,
    lora_r: int = LORA_RANK,
    spare_host: bool = True,
    choices: Choices = Choices(),
) -> Plan:
    """Predict the memory of a training run with the recipe's script.

    What is alive at which moment was read from traces of the allocator in the recorded runs of 8 layers
    (`benchmarks/results/fit_*.json`); sizes come from the model's shape. Two items were fitted to runs of all 80 layers
    as well: what compiled layers pass back (`cap_21_gib/`), and Python's objects in host memory. Every other recorded
    run is a test of the plan and was not used to make it.

    Args:
        shape: of the model.
        setup: from the accelerate config.
        batch: rows a rank and forward pass, or packs.
        length: tokens a row. The rows of a batch are padded to the longest of them: what is planned is a batch of rows
            that are all as long.
        lora_r: rank of the adapter, on all linear layers.
        spare_host: `spare_host_memory` (nbutils.patches) was called; matters for FSDP 1 with offload only.
        choices: further settings of the script.

    Returns:
        The plan.
    """
    evaluated = length * (batch if choices.eval_batch is None else choices.eval_batch)
    return Plan(*items_of(shape, setup, batch * length, evaluated, lora_r, choices, spare_host))


def left_gib(card_gib: float) -> float:
    """What a card leaves to PyTorch's allocator: 21.3 GiB of a 24 GB card.

    Args:
        card_gib: what the card shows to programs, as `CARDS` has it; nvidia-smi's total is `DRIVER` more.
    """
    return card_gib - OUTSIDE / GIB


def fits(plan: Plan) -> dict[int, float]:
    """The room that is left on cards of each usual size, in GiB; below zero it does not fit.

    Args:
        plan: of one rank.

    Returns:
        `{nominal size in GB: GiB left}`.
    """
    return {size: left_gib(shown) - plan.gpu_peak_bytes / GIB for size, shown in CARDS.items()}


def what_to_change(
    shape: Shape,
    setup: Setup,
    batch: int,
    length: int,
    lora_r: int,
    budget: int,
    choices: Choices = Choices(),
) -> list[str]:
    """What brings a plan under a budget: each change alone, cheapest in speed first, then all on these GPUs together.

    Args:
        shape: of the model.
        setup: from the accelerate config.
        batch: rows a rank and step.
        length: tokens a row.
        lora_r: rank of the adapter.
        budget: bytes that the allocator may have.
        choices: further settings of the script.

    Returns:
        Sentences; empty if the plan fits as it is.
    """

    def peak(run: _Run) -> int:
        return plan(shape, run.setup, run.batch, run.length, lora_r, choices=run.choices).gpu_peak_bytes

    def sentence(change: str, run: _Run) -> str:
        verdict = "fits" if peak(run) <= budget else "too much"
        return f"{change}: {peak(run) / GIB:.1f} GiB, {verdict}"

    run = _Run(setup, batch, length, choices)
    if peak(run) <= budget:
        return []
    changes = _changes(run)
    together = run
    for change in changes.values():
        together = change(together)
    said = [sentence(name, change(run)) for name, change in changes.items()]
    if len(changes) > 1:
        said.append(sentence("all of these", together))
    for version in range(setup.fsdp_version, 3) if setup.fsdp_version else ():
        more = replace(setup, world_size=2 * setup.world_size, fsdp_version=version)
        if version == 1 or not more.offload or choices.embeddings_on_host:  # what FSDP 2 does not refuse
            said.append(sentence(f"twice as many GPUs, FSDP {version}", replace(run, setup=more)))
    return said


@dataclass(frozen=True)
class _Run:
    """What a change changes."""

    setup: Setup
    batch: int
    length: int
    choices: Choices

    def with_setup(self, **changes) -> "_Run":
        return replace(self, setup=replace(self.setup, **changes))

    def with_choices(self, **changes) -> "_Run":
        return replace(self, choices=replace(self.choices, **changes))


def _changes(run: _Run) -> dict[str, Callable[[_Run], _Run]]:
    """What can be changed in a run, in words that can be followed; each leaves it one that the script accepts."""
    setup, choices, changes = run.setup, run.choices, {}
    if (choices.eval_batch or 0) > run.batch:
        changes[f"per_device_eval_batch_size: {run.batch}"] = lambda r: r.with_choices(eval_batch=r.batch)
    if setup.fsdp_version and not choices.embeddings_on_host:
        changes["embeddings_on_host: true"] = lambda r: r.with_choices(embeddings_on_host=True)
    if choices.checkpointing and not choices.offload_activations and run.length > 1024:
        changes["activations in host memory (activation_checkpointing_kwargs, offload)"] = lambda r: (
            r.with_choices(offload_activations=True)
        )
    if run.batch > 1:
        changes[f"one row a rank instead of {run.batch}"] = lambda r: replace(r, batch=1)
    if not setup.reshard and not setup.no_shard:
        changes["reshard after the forward pass (FULL_SHARD)"] = lambda r: r.with_setup(reshard=True)
    if not choices.checkpointing or choices.every_n_layers > 1:
        changes["checkpoints of every layer (activation_checkpointing)"] = lambda r: r.with_choices(
            checkpointing=True, every_n_layers=1
        )
    if setup.fsdp_version == 1 and not setup.offload and not setup.no_shard:
        changes["parameters in host memory (fsdp_offload_params: true)"] = lambda r: r.with_setup(
            offload=True
        )
    if setup.no_shard or (setup.fsdp_version == 2 and not setup.offload):
        # The head must not be among the parameters that FSDP 2 offloads: the script refuses that.
        words = "config_fsdp2_offload.yaml and embeddings_on_host: true"
        changes[f"parameters in host memory ({words})"] = lambda r: r.with_setup(
            fsdp_version=2, offload=True, reshard=True
        ).with_choices(embeddings_on_host=True)
    # Tiles were run for such rows; of shorter ones they take little. With lora_dropout the script may refuse them.
    if run.length >= 32768 and not choices.mlp_tiles and choices.stacked_adapters:
        changes["mlp_tiles: 8"] = lambda r: r.with_choices(mlp_tiles=8)
    if run.length > 1024:
        changes[f"rows of 1,024 tokens instead of {run.length:,}"] = lambda r: replace(r, length=1024)
    return changes
