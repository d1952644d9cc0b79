"""Packed rows: loss, gradients and logits are those of the same rows on their own; no row sees another one."""

from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from trl import SFTConfig
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from nbutils.common.refused import Refused
from nbutils.training import packed_attention
from nbutils.training.packed_attention import attend_within_rows, refuse_packing

LENGTHS = (5, 17, 1, 30, 2, 64)  # one row of a single token, and one that fills a pack alone


def llama(dtype: torch.dtype, checkpoints: bool = False, **more) -> nn.Module:
    """A narrow Llama with fewer heads for keys than for queries, and an adapter that does something."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False, **more,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(dtype).requires_grad_(False)
    if checkpoints:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, lora, autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zeros: no gradient would reach an A
            nn.init.normal_(parameter, std=0.1)
    return model.train()


def rows(seed: int = 3) -> list[dict]:
    """Rows of which about half the tokens are learned, in several spans."""
    random = torch.Generator().manual_seed(seed)
    made = []
    for length in LENGTHS:
        ids = torch.randint(0, 97, (length,), generator=random)
        learned = torch.randint(0, 2, (length,), generator=random).bool()
        made.append({"input_ids": ids.tolist(), "labels": torch.where(learned, ids, -100).tolist()})
    return made


def pack(several: list[dict]) -> dict:
    """A batch as TRL makes it of packs."""
    return DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)(several)


def token_losses(model: nn.Module, batch: dict) -> torch.Tensor:
    """The loss of each learned token, in the order of the rows."""
    labels = batch["labels"]
    logits = model(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False).logits.float()
    wanted, given = labels[:, 1:].flatten(), logits[:, :-1].flatten(0, 1)
    return nn.functional.cross_entropy(given, wanted, reduction="none", ignore_index=-100)[wanted != -100]


def alone(row: dict) -> dict:
    return {name: torch.tensor([values]) for name, values in row.items()}


def gradients(model: nn.Module, losses: torch.Tensor) -> dict[str, torch.Tensor]:
    losses.sum().backward()
    found = {name: p.grad.float() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return found


@pytest.mark.parametrize("checkpoints", [False, True])
@pytest.mark.parametrize(
    ("dtype", "near"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)], ids=["fp32", "bf16"]
)
def test_loss_and_gradients_of_a_pack_are_those_of_its_rows(dtype, near, checkpoints):
    model = llama(dtype, checkpoints)
    separate = torch.cat([token_losses(model, alone(row)) for row in rows()])  # through SDPA, unpacked
    wanted = gradients(model, separate)

    attend_within_rows(model.base_model.model)
    packed = token_losses(model, pack(rows()))
    found = gradients(model, packed)

    assert packed.shape == separate.shape and packed.numel() > 40
    assert (packed - separate).abs().max() < near
    assert all(gradient.any() for gradient in found.values()) and len(found) == 2 * 7 * 2
    for name in wanted:
        assert (found[name] - wanted[name]).norm() < near * wanted[name].norm(), name


@pytest.mark.parametrize("changed", range(len(LENGTHS)))
def test_a_changed_row_moves_no_other_rows_logits(changed):
    model = llama(torch.float32)
    attend_within_rows(model.base_model.model)
    before, after = rows(), rows()
    after[changed]["input_ids"] = [(token + 1) % 97 for token in after[changed]["input_ids"]]
    with torch.no_grad():
        logits = [
            model(**{k: v for k, v in pack(several).items() if k != "labels"}, use_cache=False).logits[0]
            for several in (before, after)
        ]
    for number, (old, new) in enumerate(zip(*(each.split(LENGTHS) for each in logits))):
        assert torch.equal(old, new) == (number != changed)


def test_a_batch_with_padding_is_left_to_sdpa():
    model = llama(torch.float32)
    ids = torch.arange(24).view(2, 12)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    with torch.no_grad():
        wanted = [model(ids, use_cache=False).logits, model(ids, attention_mask=mask, use_cache=False).logits]
        attend_within_rows(model.base_model.model)
        found = [model(ids, use_cache=False).logits, model(ids, attention_mask=mask, use_cache=False).logits]
    assert torch.equal(wanted[0], found[0])
    assert torch.equal(wanted[1][mask.bool()], found[1][mask.bool()])
    assert not torch.equal(found[0], found[1])


def test_what_the_kernel_cannot_do_is_refused(monkeypatch):
    with pytest.raises(Refused, match=r"attention_dropout is 0.1; packed rows want 0"):
        attend_within_rows(llama(torch.float32, attention_dropout=0.1).base_model.model)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(packed_attention, "varlen_attn", lambda query, key, value: None)
    with pytest.raises(Refused, match=r"packing wants torch 2\.13 on a GPU"):
        attend_within_rows(llama(torch.float32).base_model.model)


def test_packing_that_mixes_rows_or_held_out_losses_is_refused(tmp_path):
    def asked(**more):
        return refuse_packing(SFTConfig(str(tmp_path), bf16=False, use_cpu=True, packing=True, **more))

    asked(eval_packing=False)
    refuse_packing(SimpleNamespace(packing=False))
    with pytest.raises(Refused, match="eval_packing is on; wanted false"):
        asked()  # TRL packs the held-out rows if nothing is said
    with pytest.raises(Refused, match="packing_strategy is wrapped; wanted bfd"):
        asked(eval_packing=False, packing_strategy="wrapped")
