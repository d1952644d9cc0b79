"""The held-out loss counts tokens: the same in batches of any size, and on any number of ranks."""

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from datasets import Dataset
from torch.nn import functional as F
from torch.utils.data import BatchSampler, SequentialSampler
from transformers import AutoModelForCausalLM
from trl import SFTConfig

from nbutils.models.loading import load_tokenizer
from nbutils.models.tiny import tiny_base
from nbutils.training.held_out_loss import TokenMeanTrainer, without_repeated_rows


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(tiny_base(), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def rows():
    """Answers of 1 to 40 tokens behind a short question."""
    dice = torch.Generator().manual_seed(0)
    made = []
    for length in (1, 40, 2, 3, 25, 1, 8):
        ids = torch.randint(10, 1000, (4 + length,), generator=dice).tolist()
        made.append({"input_ids": ids, "labels": [-100] * 4 + ids[4:]})
    return made


def counted(model, rows) -> float:
    """Nats of each learned token, one row at a time, and their mean over all of them."""
    nats, tokens = 0.0, 0
    with torch.no_grad():
        for row in rows:
            logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1]
            labels = torch.tensor(row["labels"][1:])
            nats += F.cross_entropy(logits, labels, reduction="sum").item()
            tokens += (labels != -100).sum().item()
    return nats / tokens


@pytest.mark.parametrize("behind_each_other", [False, True])  # True: as TRL lays rows where packing is on
@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 8])
def test_it_is_the_mean_over_tokens_in_batches_of_any_size(
    model, rows, batch_size, behind_each_other, tmp_path
):
    settings = SFTConfig(
        str(tmp_path), bf16=False, use_cpu=True, report_to="none", disable_tqdm=True, max_length=None,
        per_device_eval_batch_size=batch_size, gradient_checkpointing=False, padding_free=behind_each_other,
    )  # fmt: skip
    data = Dataset.from_list(rows)
    trainer = TokenMeanTrainer(
        model=model,
        args=settings,
        train_dataset=data,
        eval_dataset=data,
        processing_class=load_tokenizer(str(tiny_base())),
    )
    wanted = counted(model, rows)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(wanted, abs=1e-4)
    assert trainer.state.log_history[-1]["eval_loss"] == pytest.approx(wanted, abs=1e-4), (
        "logged as it is returned"
    )


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
@pytest.mark.parametrize("rows", [1, 2, 5, 7, 16])
def test_rows_that_accelerate_repeats_count_once(ranks, batch_size, rows):
    seen = []
    for rank in range(ranks):
        batches = BatchSampler(SequentialSampler(range(rows)), batch_size, drop_last=False)
        for step, batch in enumerate(BatchSamplerShard(batches, ranks, rank)):
            labels = torch.tensor(batch)[:, None].expand(-1, 3)
            place = step * ranks + rank, batch_size, rows
            kept = without_repeated_rows(labels, *place)
            of_token = torch.arange(len(batch), dtype=torch.int32).repeat_interleave(3)[None]
            laid = without_repeated_rows(labels.reshape(1, -1), *place, of_token)  # behind each other
            assert torch.equal(laid.view(-1, 3), kept)
            seen += [row[0].item() for row in kept if row[0] != -100]
    assert sorted(seen) == list(range(rows))
