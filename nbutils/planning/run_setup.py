"""The launch and the settings of the script, as far as they decide about memory."""

from dataclasses import dataclass
from pathlib import Path

import yaml

from nbutils.common import launched
from nbutils.planning.hybrid_shard import is_hybrid

LORA_RANK = 16  # of the adapter, where nothing else is said; tests/whole/test_house.py names each place that must agree


@dataclass(frozen=True)
class Setup:
    """What an accelerate config decides about memory; `fsdp_version` 0 is one process without FSDP."""

    world_size: int = 2
    fsdp_version: int = 1
    offload: bool = True
    reshard: bool = True

    @property
    def no_shard(self) -> bool:
        """FSDP 1 on one rank: whatever the config says, torch turns its strategy into NO_SHARD.

        Then nothing is freed after its use. With offload the host has its copy, and the modules' views keep the other
        on the GPU, until the next copy takes its place.
        """
        return self.fsdp_version == 1 and self.world_size == 1

    @classmethod
    def read(cls, path: str | Path, world_size: int | None = None) -> "Setup":
        """Read an accelerate config file.

        Args:
            path: YAML for `accelerate launch`. Under HYBRID_SHARD the ranks of one machine share the model.
            world_size: ranks of all machines, if they differ from the file's `num_processes`.
        """
        config = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        fsdp = config.get("fsdp_config") or {}
        version = int(fsdp.get("fsdp_version", 1)) if fsdp else 0
        strategy = fsdp.get("fsdp_sharding_strategy", "FULL_SHARD")
        sharing = world_size or config.get("num_processes", 1)
        if version == 1 and is_hybrid(strategy):
            sharing //= config.get("num_machines", 1)
        return cls(
            world_size=sharing,
            fsdp_version=version,
            offload=bool(fsdp.get("fsdp_offload_params", False)),
            reshard=bool(fsdp.get("fsdp_reshard_after_forward", True))
            if version == 2
            else strategy in ("FULL_SHARD", "HYBRID_SHARD"),
        )

    @classmethod
    def of_launch(cls, world_size: int) -> "Setup":
        """The launch that this process is a rank of, as `accelerate launch` has told it.

        Args:
            world_size: ranks of all machines. Under HYBRID_SHARD those of this machine share the model.
        """
        hybrid = is_hybrid(launched.sharding_strategy())
        return cls(
            world_size=launched.ranks_here() if hybrid else world_size,
            fsdp_version=launched.fsdp_version(),
            offload=launched.offloads_parameters(),
            reshard=launched.reshards_after_forward(),
        )


@dataclass(frozen=True)
class Choices:
    """What the script's settings decide about memory, beside batch, length and rank of the adapter.

    Args:
        embeddings_on_host, compile_layers, checkpointing, every_n_layers, offload_activations, mlp_tiles: as in the
            script.
        accumulation: forward passes a step.
        eval_batch: rows a rank in an evaluation; None means as many as in training.
        keeps_checkpoints: some are written while it trains.
        stacked_adapters: compiled, gate and up share a product with their A's; with dropout they do not
            (`nbutils.training.stacked_adapters`).
    """

    embeddings_on_host: bool = False
    compile_layers: bool = False
    checkpointing: bool = True
    every_n_layers: int = 1
    offload_activations: bool = False
    accumulation: int = 1
    eval_batch: int | None = None
    keeps_checkpoints: bool = True
    stacked_adapters: bool = True
    mlp_tiles: int = 0

    @classmethod
    def read(cls, settings: dict) -> "Choices":
        """Read the settings of the script.

        Args:
            settings: as in its YAML; what is absent has the script's default. An evaluation whose rows are not said
                takes as many as training does.
        """
        how = settings.get("activation_checkpointing_kwargs") or {}
        return cls(
            embeddings_on_host=settings.get("embeddings_on_host", False),
            compile_layers=settings.get("compile_layers", False),
            checkpointing=bool(settings.get("activation_checkpointing", True)),
            every_n_layers=how.get("every_n_layers", 1),
            offload_activations=how.get("offload", False),
            accumulation=settings.get("gradient_accumulation_steps", 1),
            eval_batch=settings.get("per_device_eval_batch_size"),
            keeps_checkpoints=settings.get("save_strategy", "steps") != "no",
            stacked_adapters=not settings.get("lora_dropout"),
            mlp_tiles=settings.get("mlp_tiles", 0),
        )

    @classmethod
    def of_script(cls, recipe, training) -> "Choices":
        """The settings as the script has parsed them.

        Args:
            recipe: the script's `RecipeArguments`.
            training: the script's `TrainingArguments`.
        """
        return cls.read(vars(recipe) | vars(training))
