"""Packed rows: loss, gradients and logits are those of the same rows on their own; no row sees another one."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from recording import record
from torch import nn
from training_runs import run, train
from transformers import LlamaConfig, LlamaForCausalLM
from trl import SFTConfig
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from nbutils.common.paths import ROOT
from nbutils.common.progress_file import read_progress
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
    with pytest.raises(Refused, match="eval_packing is None; wanted false"):
        asked()  # TRL packs the held-out rows if nothing is said
    with pytest.raises(Refused, match="packing_strategy is wrapped; wanted bfd"):
        asked(eval_packing=False, packing_strategy="wrapped")


# ---- on two ranks ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """What tests/ranks/packed_step.py saw on its two ranks."""
    folder = tmp_path_factory.mktemp("sharded")
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)]))
    command = [sys.executable, str(ROOT / "tests/ranks/packed_step.py"), str(folder)]
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"seen{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.launch
@pytest.mark.parametrize("version", ["1", "2"])
def test_under_fsdp_a_pack_has_loss_and_gradients_of_its_rows(sharded, version):
    for rank in sharded:
        seen = rank[version]
        assert seen["tokens"] > 25 and seen["gradients"] == 2 * 7 * 2 and seen["smallest_norm"] > 0
        assert seen["loss"] < 1e-5
        assert seen["furthest"] < 1e-5  # of a gradient's norm


PACKED, GROUPED = {"packing": "true"}, {"train_sampling_strategy": "group_by_length"}
WAYS = {  # fourteen rows, or four packs, a step: ranks, rows or packs a rank, passes of a step, FSDP, more
    "two ranks": (2, 7, 1, 2, {}),
    "two ranks, FSDP 1": (2, 7, 1, 1, {}),
    "accumulated": (2, 1, 7, 2, {}),
    "grouped by length": (2, 7, 1, 2, GROUPED),
    "grouped, accumulated": (2, 1, 7, 1, GROUPED),
    "packed": (2, 2, 1, 2, PACKED),
    "packed, FSDP 1": (2, 2, 1, 1, PACKED),
    "one rank": (1, 14, 1, 2, {}),
    "one rank, grouped": (1, 7, 2, 2, GROUPED),
    "one rank, packed": (1, 4, 1, 2, PACKED),
    "one rank, packed, accumulated": (1, 2, 2, 2, PACKED),
}
COMMAND = "python -m pytest tests/training/test_packed_attention.py -k mean_over_tokens"


def folder_of(name: str) -> str:
    return name.replace(", ", "_").replace(" ", "_")


@pytest.fixture(scope="module")
def losses(tmp_path_factory):
    """The real script: the loss of each of three steps, and the held-out loss before and after them, in each way."""
    folder = tmp_path_factory.mktemp("losses")
    rows = (ROOT / "data/instructions/train.jsonl").read_text().splitlines(keepends=True)
    (folder / "fourteen.jsonl").write_text("".join(rows[:14]))
    same = {
        "dataset": folder / "fourteen.jsonl",
        "max_steps": 3,
        "max_length": 512,
        "lora_dropout": 0,
        "logging_steps": 1,
        "per_device_eval_batch_size": 3,  # of four rows: two ranks repeat two of them
    }
    more = same | {"eval_strategy": "steps", "eval_steps": 3, "save_strategy": "no", "warmup_steps": 0}
    plan = [
        run(
            folder, name, folder_of(name), fsdp=fsdp, world=world, **more, **way,
            per_device_train_batch_size=batch, gradient_accumulation_steps=accumulated,
        )
        for name, (world, batch, accumulated, fsdp, way) in WAYS.items()
    ]  # fmt: skip
    seen = train(folder, plan)
    for name in WAYS:
        assert set(seen[name]["status"]) == {0}, seen[name]["output"]
    lines = {name: read_progress(folder / folder_of(name)) for name in WAYS}
    found = {
        name: {kind: [line[kind] for line in lines[name] if kind in line] for kind in ("loss", "eval_loss")}
        for name in WAYS
    }
    record(
        "Losses of the same rows and model in each way of taking rows", f"RECORD=FILE {COMMAND}", ways=found
    )
    return found


@pytest.mark.launch
@pytest.mark.parametrize("name", WAYS)
def test_the_loss_is_a_mean_over_tokens_packed_or_not_accumulated_or_not_on_one_rank_or_two(losses, name):
    """A mean over rows, packs or ranks would be another number: the rows' answers are of all lengths."""
    trained, expected = losses[name]["loss"], losses["two ranks"]["loss"]
    assert len(trained) == 3 and trained[0] != trained[-1]
    assert trained == pytest.approx(expected, abs=0.003)  # bf16


@pytest.mark.launch
@pytest.mark.parametrize("name", WAYS)
def test_the_held_out_loss_means_the_same_in_every_way(losses, name):
    """Each held-out row counts once, each of its learned tokens as any other: before the first step and after."""
    held_out, expected = losses[name]["eval_loss"], losses["two ranks"]["eval_loss"]
    assert len(held_out) == 2 and held_out[1] < held_out[0] - 0.02
    assert held_out == pytest.approx(expected, abs=0.003)
