"""TRL's trainer takes the rows as they were made: packed or padded, every learned span arrives in a batch."""

import json
from itertools import pairwise

import chats
import pytest
from transformers import AutoModelForCausalLM
from trl import SFTConfig

from nbutils.data.labels import IGNORED
from nbutils.data.rows import load_conversations, train_and_heldout
from nbutils.data.rows_ahead import rows_ahead
from nbutils.data.training_rows import look_at_every_row
from nbutils.models.loading import load_tokenizer
from nbutils.models.tiny import tiny_base
from nbutils.planning.shapes import SHAPES
from nbutils.planning.whole_run import whole_run
from nbutils.training.held_out_loss import TokenMeanTrainer


@pytest.mark.parametrize("packing", [False, True])
def test_every_row_arrives_with_its_labels(packing, tmp_path):
    """200 chats of one to six answers, through the trainer's own preparation, its loader and its collator."""
    (tmp_path / "chats.json").write_text(json.dumps(chats.share_gpt(200)))
    settings = SFTConfig(
        str(tmp_path), bf16=False, use_cpu=True, report_to="none", disable_tqdm=True, max_length=512, packing=packing,
        eval_packing=False, per_device_train_batch_size=4, gradient_checkpointing=False,
    )  # fmt: skip
    tokenizer = load_tokenizer(str(tiny_base()))
    conversations = load_conversations(str(tmp_path / "chats.json"))
    train, heldout = look_at_every_row(conversations[:190], conversations[190:], tokenizer, settings, 1)
    given = sorted((row["input_ids"], row["labels"]) for row in train)
    trainer = TokenMeanTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny_base()),
        args=settings,
        train_dataset=train,
        eval_dataset=heldout,
        processing_class=tokenizer,
    )
    assert trainer.eval_dataset.to_list() == heldout.to_list(), "held-out rows are never packed"
    arrived = []
    for batch in trainer.get_train_dataloader():
        if packing:
            starts = batch["cu_seq_lens_q"].tolist()
            spans = [(0, begin, end) for begin, end in pairwise(starts)]
        else:
            spans = [(row, 0, int(mask.sum())) for row, mask in enumerate(batch["attention_mask"])]
        arrived += [
            (batch["input_ids"][row, begin:end].tolist(), batch["labels"][row, begin:end].tolist())
            for row, begin, end in spans
        ]
    assert sorted(arrived) == given and len(given) > 180
    runs = sum(
        (before == IGNORED) != (after == IGNORED)
        for _, labels in arrived
        for before, after in zip(labels, [*labels[1:], IGNORED])
    )
    assert runs / 2 > 1.5 * len(arrived), "chats of several answers keep several learned spans"


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("more", [{}, {"shuffle_dataset": True}])
def test_what_is_counted_ahead_is_what_the_trainer_takes(packing, more, tmp_path):
    """5 % of 300 chats are held out, some rows are cut: to the row and to the token."""
    file = tmp_path / "chats.json"
    file.write_text(json.dumps(chats.share_gpt(300)))
    settings = {"max_length": 128, "packing": packing, "seed": 0, "per_device_train_batch_size": 2, **more}
    tokenizer = load_tokenizer(str(tiny_base()))
    counted = rows_ahead(settings | {"dataset": str(file), "eval_rows": 7}, tokenizer)
    training = SFTConfig(
        str(tmp_path), bf16=False, use_cpu=True, report_to="none", disable_tqdm=True, eval_packing=False,
        gradient_checkpointing=False, **settings,
    )  # fmt: skip
    train, heldout = look_at_every_row(*train_and_heldout(str(file), None), tokenizer, training, 1)
    trainer = TokenMeanTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny_base()), args=training, train_dataset=train,
        eval_dataset=heldout, processing_class=tokenizer,
    )  # fmt: skip
    taken = [len(ids) for ids in trainer.train_dataset["input_ids"]]
    assert (counted.rows, counted.tokens, counted.longest) == (len(taken), sum(taken), max(taken))
    assert counted.heldout == 7 < len(heldout) == 15
    ahead = whole_run(settings | {"lora_r": 4}, counted.rows, counted.tokens, 1, SHAPES["tiny"])
    assert ahead.steps_an_epoch == len(trainer.get_train_dataloader())
