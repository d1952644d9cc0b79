"""The facts of a run that stand in its checkpoints: what a resumed run must share, and what it may change.

A checkpoint holds each rank's pieces, the optimizer's memory, and how many batches are behind it. So whatever decides
how the pieces lie, what is trained on what, and which rows come next must stay. What steers the steps that are still
to come may change, and then changes: on a resume the learning rate is that of the new schedule at this step.
"""

import enum
import hashlib
import json

from datasets import Dataset

from nbutils.adapters.pieces import peft_model
from nbutils.common.launched import fsdp_version, sharding_strategy
from nbutils.common.ranks import world_size
from nbutils.models.base_digest import base_digest
from nbutils.planning.hybrid_shard import is_hybrid

# Fields of TRL's SFTConfig: the order of the rows, and what is learned of each.
FIXED = (
    "seed",
    "data_seed",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "train_sampling_strategy",
    "dataloader_drop_last",
    "ignore_data_skip",
    "max_length",
    "truncation_mode",
    "packing",
    "packing_strategy",
    "padding_free",
    "completion_only_loss",
    "assistant_only_loss",
    "loss_type",
    "label_smoothing_factor",
    "neftune_noise_alpha",
    "average_tokens_across_devices",
    "optim",
    "optim_args",
)
# The steps that are still to come. The optimizer's own settings come from the launch as well.
MAY_CHANGE = (
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "max_steps",
    "num_train_epochs",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "logging_steps",
    "eval_strategy",
    "eval_steps",
    "per_device_eval_batch_size",
    "save_strategy",
    "save_steps",
    "save_total_limit",
)
ADAPTER = ("lora_r", "lora_alpha", "lora_dropout")
SCHEDULE = ("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs")
FOLLOWS_LOSSES = ("reduce_lr_on_plateau", "greedy")  # schedules that keep what they saw


def facts_before_loading(recipe, training) -> dict:
    """The facts that are known before a weight is read.

    Args:
        recipe: the script's `RecipeArguments`.
        training: the script's `TrainingArguments`.

    Returns:
        A part of `run_facts`: without what the rows become, and without `base` if the weights have yet to come.
    """
    adapter = {name: getattr(recipe, name) for name in ADAPTER}
    base = base_digest(recipe.model)
    return _launch() | _settings(training) | adapter | ({"base": base} if base else {})


def run_facts(trainer, base: str | None, train: Dataset, heldout: Dataset | None) -> dict:
    """What a resumed run must share with the run that wrote the checkpoint, and under `may_change` what it need not.

    Args:
        trainer: constructed.
        base: `base_digest` of the model's folder; None if nobody has said which it is.
        train: the rows that the trainer was given, before it packs them.
        heldout: the held-out rows likewise.

    Returns:
        Names and values, as JSON can hold them.
    """
    config = peft_model(trainer.model).peft_config["default"]
    adapter = {"lora_r": config.r, "lora_alpha": config.lora_alpha, "lora_dropout": config.lora_dropout}
    more = {
        "targets": _names(config.target_modules),
        "modules_to_save": _names(config.modules_to_save),
        "rank_pattern": config.rank_pattern,
        "alpha_pattern": config.alpha_pattern,
        "use_dora": config.use_dora,
        "use_rslora": config.use_rslora,
        "rows": rows_digest(train),
        "heldout_rows": rows_digest(heldout),
    }
    return _launch() | _settings(trainer.args) | adapter | {"base": base} | more


def keeps_its_schedule(facts: dict) -> bool:
    """Whether a run's schedule follows its losses: then no other can take over in the middle."""
    return facts.get("may_change", {}).get("lr_scheduler_type") in FOLLOWS_LOSSES


def rows_digest(rows: Dataset | None) -> str | None:
    """Tell rows by what is in them and by their order: tokens, and masks or labels where they are prepared.

    Returns:
        64 hexadecimal digits; None without rows.
    """
    if rows is None:
        return None
    digest = hashlib.sha256()
    for batch in rows.with_format(None).iter(batch_size=256):
        digest.update(json.dumps(batch, sort_keys=True, ensure_ascii=False, default=str).encode())
    return digest.hexdigest()


def _launch() -> dict:
    strategy, version = sharding_strategy(), fsdp_version()
    inside = "inside each machine" if is_hybrid(strategy) else "over all ranks"
    return {
        "world_size": world_size(),
        "fsdp_version": version or None,
        "sharding": inside if version and str(strategy).upper() not in ("NO_SHARD", "3") else "none",
    }


def _settings(args) -> dict:
    fixed = {name: _plain(getattr(args, name)) for name in FIXED if hasattr(args, name)}
    changeable = {name: _plain(getattr(args, name)) for name in MAY_CHANGE if hasattr(args, name)}
    return fixed | {"may_change": changeable}


def _names(found: str | set[str] | list[str] | None) -> list[str]:
    return [found] if isinstance(found, str) else sorted(found or ())


def _plain(value: object) -> object:
    """As JSON gives it back."""
    value = value.value if isinstance(value, enum.Enum) else value
    return json.loads(json.dumps(value, default=str))
