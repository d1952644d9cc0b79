"""The custom prep: make a 4-bit model ready for QLoRA under FSDP, without the cast to fp32."""

import torch
from transformers import PreTrainedModel


# taught in notebook 03
def prepare_for_fsdp_qlora(
    model: PreTrainedModel, activation_checkpointing: bool = True, use_reentrant: bool = False
) -> PreTrainedModel:
    """Freeze the base, keep its dtypes, and let gradients flow through it.

    It differs from `peft.prepare_model_for_kbit_training` in one step above all: norms, embedding and head stay in
    the dtype they were loaded in (bf16), because FSDP 1 builds one flat parameter out of each unit and a flat parameter
    has one dtype.

    Args:
        model: a 4-bit model whose storage dtype equals the dtype of its other weights; changed in place.
        activation_checkpointing: keep only each layer's input, and compute the layer again in the backward pass.
        use_reentrant: which of torch's two checkpoints to use; see notebook 03 for what each costs.

    Returns:
        The same model, with no trainable parameter: the adapter comes next.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    keep_rotary_frequencies_exact(model)
    model.config.use_cache = False  # a key-value cache is of use in generation only
    if activation_checkpointing:
        # It also lets the embedding's output ask for a gradient. The frozen embedding would not, and a reentrant
        # checkpoint whose inputs ask for none passes none on: the adapter would never learn.
        model.activation_checkpointing_enable(
            activation_checkpointing_kwargs={"use_reentrant": use_reentrant}
        )
    return model


# taught in notebook 03
def keep_rotary_frequencies_exact(model: torch.nn.Module) -> int:
    """Hide the rotary frequencies from FSDP 1, which would round them to bf16.

    The Trainer gives FSDP 1 a mixed-precision policy with the storage dtype of the 4-bit weights, and FSDP 1 applies
    it to every registered buffer. In bf16 a frequency is off by up to 0.4 %, so the angle of a token grows wrong with
    its position. As a plain attribute the tensor is out of FSDP's reach; the model moves it to the right device at
    each use.

    Args:
        model: any model; changed in place.

    Returns:
        The number of tensors that are no longer buffers.
    """
    hidden = 0
    for module in model.modules():
        for name in ("inv_freq", "original_inv_freq"):
            if name in module._buffers:
                frequencies = module._buffers.pop(name)
                module._non_persistent_buffers_set.discard(name)
                # detach() also drops the mark of torch.nn.Buffer, by which setattr would register it again
                setattr(module, name, frequencies.detach())
                hidden += 1
    return hidden


def rotary_error(model: torch.nn.Module) -> float:
    """Compare the rotary frequencies with those the configuration gives in fp32.

    Args:
        model: any model, wrapped or not, after at least one forward: FSDP 1 casts buffers in its first one.

    Returns:
        The largest relative error; 0.0 if they are exact or there are none, about 0.003 if they were rounded to bf16.
    """
    worst = 0.0
    for module in list(model.modules()):
        if hasattr(module, "inv_freq") and hasattr(module, "config"):
            exact = type(module)(module.config).inv_freq
            now = module.inv_freq.detach().to("cpu", torch.float32)
            worst = max(worst, ((now - exact) / exact).abs().max().item())
    return worst
