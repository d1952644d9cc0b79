"""Is the adapter on disk the model that was trained? Ask both the same question and compare the logits."""

from pathlib import Path

import torch
import torch.distributed as dist
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

from nbutils.adapters.gather import compute_device
from nbutils.adapters.lora_config import read_lora_config
from nbutils.adapters.pieces import peft_model
from nbutils.adapters.save import AdapterMismatch
from nbutils.common.ranks import agree, rank

# Largest difference allowed, as a part of the largest logit. 2**-8 is the rounding step of bf16: FSDP and one
# process may add up in another order, and each layer rounds once more.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 16 * 2**-8, torch.float16: 16 * 2**-11}


def fixed_batch_logits(model: torch.nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    """Compute the logits of a fixed batch. On a model spread over processes every rank must call it.

    Args:
        model: plain or wrapped; its training mode is put back afterwards.
        input_ids: (B, T) int64, the same on every rank.

    Returns:
        (B, T, V) float32 on the CPU, on every rank.
    """
    device = compute_device() if dist.is_initialized() else next(model.parameters()).device
    was_training = model.training
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=input_ids.to(device)).logits.float().cpu()
    model.train(was_training)
    return logits


def record_logits(model: torch.nn.Module, input_ids: torch.Tensor, file: str | Path) -> torch.Tensor:
    """Write a fixed batch and the trained model's logits for it. Every rank must call it; rank 0 writes.

    Args:
        model: the trained model, still wrapped.
        input_ids: (B, T) int64, the same on every rank.
        file: a `.safetensors` file, beside the adapter's folder and not in it.

    Returns:
        The logits, as `fixed_batch_logits`.
    """
    logits = fixed_batch_logits(model, input_ids)
    problem = None
    if rank() == 0:
        dtype = str(peft_model(model).get_base_model().config.dtype).removeprefix("torch.")
        try:
            Path(file).parent.mkdir(parents=True, exist_ok=True)
            save_file({"input_ids": input_ids.cpu(), "logits": logits}, file, metadata={"dtype": dtype})
        except OSError as error:
            problem = f"The logits were not written to {file}: {error}"
    agree(problem, RuntimeError)
    return logits


def compare_with_record(base: PreTrainedModel, folder: str | Path, file: str | Path) -> dict:
    """Load the adapter on a fresh base, on one process, and compare with the logits that the trained model gave.

    Args:
        base: loaded as for the training (same quantisation, same dtype), without adapter; it gets the adapter.
        folder: the saved adapter.
        file: what `record_logits` wrote.

    Returns:
        What `compare_logits` returns.

    Raises:
        UnsupportedAdapter: the adapter's configuration asks for what is not implemented here; the field is named.
        AdapterMismatch: see `compare_logits`.
    """
    read_lora_config(folder)
    with safe_open(file, "pt") as record:
        input_ids, trained = record.get_tensor("input_ids"), record.get_tensor("logits")
        dtype = getattr(torch, record.metadata()["dtype"])
    reloaded_model = PeftModel.from_pretrained(base, str(folder))
    reloaded = fixed_batch_logits(reloaded_model, input_ids)
    with reloaded_model.disable_adapter():
        plain = fixed_batch_logits(reloaded_model, input_ids)
    return compare_logits(trained, reloaded, plain, dtype)


def compare_logits(
    trained: torch.Tensor, reloaded: torch.Tensor, base: torch.Tensor, dtype: torch.dtype
) -> dict:
    """Check that the reloaded model speaks as the trained one did, and not as the base does.

    Args:
        trained, reloaded, base: logits of one batch, (B, T, V) float32.
        dtype: the dtype the model computes in; it sets the tolerance.

    Returns:
        `reloaded` and `base`: the largest difference to `trained`, as a part of its largest logit; `tolerance`.

    Raises:
        AdapterMismatch: reloaded and trained differ by more than the tolerance, or by more than half of what lies
            between trained and base: then the file could as well be the base.
    """
    scale = trained.abs().max().item()
    result = {
        "reloaded": (reloaded - trained).abs().max().item() / scale,
        "base": (base - trained).abs().max().item() / scale,
        "tolerance": TOLERANCE[dtype],
    }
    if not result["reloaded"] <= result["tolerance"]:
        raise AdapterMismatch(
            f"The reloaded model's logits differ from the trained model's by {result['reloaded']:.2e} of the largest "
            f"logit; at most {result['tolerance']:.2e} was wanted. Compare adapter_config.json and base of the two."
        )
    if not result["base"] > 2 * result["reloaded"]:
        raise AdapterMismatch(
            f"The trained model's logits are {result['base']:.2e} from the base's and {result['reloaded']:.2e} from "
            "the reloaded model's: the adapter makes no difference that could be seen. Train longer, or save again."
        )
    return result
