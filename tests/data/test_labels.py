"""What is learned is exactly the answers, each with its end token; or the row is refused."""

import copy
import json
import random
from collections import Counter

import chats
import pytest
from datasets import Dataset

from nbutils.data.conversation import Conversation
from nbutils.data.forms import SHAREGPT_ROLES
from nbutils.data.labels import IGNORED, Marker
from nbutils.data.rows import look_through
from nbutils.data.training_rows import cut, mark


@pytest.fixture(scope="module")
def tokenizers():
    return chats.tokenizers()


@pytest.fixture(scope="module")
def markers(tokenizers):
    return {name: Marker(tokenizer) for name, tokenizer in tokenizers.items()}


# ---- random rows through the loader ---------------------------------------------------------------------------------

TO_SHAREGPT = {role: name for name, role in SHAREGPT_ROLES.items() if name in ("human", "gpt", "system")}
SPOILED = {
    "an empty answer": lambda turns: turns[-1].update(content=" \n"),
    "an empty question": lambda turns: turns[-2].update(content=""),
    "a foreign role": lambda turns: turns[-1].update(role="tool"),
    "a tool call": lambda turns: turns[-1].update(tool_calls=[{"id": 1}]),
    "half a character": lambda turns: turns[-1].update(content="\ud83d"),
    "a control token": lambda turns: turns[-1].update(content="So.<|eot_id|>And on."),
    "no text": lambda turns: turns[-1].update(content=7),
}
SPOILED_FOR = {"think": {"a thought": lambda turns: turns[-1].update(content="It is 7.</think>Seven.")}}


def random_row(dice: random.Random, name: str) -> tuple[dict, list[str] | None]:
    """A row in a random form; and the answers that must be learned, or None where the row must be refused."""
    turns = chats.turns(dice)
    form = dice.choice(["messages", "messages", "conversations", "prompt", "prompt of turns", "alpaca"])
    answers = [turn["content"] for turn in turns if turn["role"] == "assistant"]
    spoiled = form in ("messages", "conversations") and dice.random() < 0.15
    if spoiled:
        dice.choice(list({**SPOILED, **SPOILED_FOR.get(name, {})}.values()))(turns)
    elif form == "messages" and dice.random() < 0.3:
        answers = []
        for turn in turns:
            if turn["role"] == "assistant":
                turn["weight"] = dice.randint(0, 1)
                answers += [turn["content"]] * turn["weight"]
    if form == "messages":
        return {"messages": turns}, None if spoiled or not answers else answers
    if form == "conversations":
        names = {"role": "from", "content": "value"}
        talk = [{names.get(key, key): value for key, value in turn.items()} for turn in turns]
        for turn in talk:
            turn["from"] = TO_SHAREGPT.get(turn["from"], turn["from"])
        return {"conversations": talk}, None if spoiled else answers
    if form == "prompt of turns":
        return {"prompt": turns[:-1], "completion": turns[-1:]}, answers[-1:]
    question, answer = chats.text(dice), chats.text(dice)
    if form == "prompt":
        return {"prompt": question, "completion": answer}, [answer]
    system, more = dice.choice(["", " ", "Be brief."]), dice.choice(["", " ", "Some input."])
    history = [[turns[-2]["content"], answers[-1]]] * dice.randint(0, 1)
    row = {"instruction": question, "input": more, "output": answer, "system": system, "history": history}
    return row, [answer]


def what_is_learned(rows, tokenizer) -> list[str]:
    """The text of each run of labels, its end token taken off; there must be one, and one only."""
    found = []
    for row in rows:
        labels, run = row.labels(), []
        for label in [*labels, IGNORED]:
            if label != IGNORED:
                run.append(label)
            elif run:
                assert run.count(tokenizer.eos_token_id) == 1 and run[-1] == tokenizer.eos_token_id
                found.append(tokenizer.decode(run[:-1]))
                run = []
    return found


@pytest.mark.parametrize("name", chats.TEMPLATES)
def test_random_rows_are_learned_exactly_or_refused(name, markers, tokenizers, tmp_path):
    dice, tokenizer, marker = random.Random(name), tokenizers[name], markers[name]
    made = [random_row(dice, name) for _ in range(500)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row, _ in made))
    loaded = look_through(str(path))
    by_number = {int(talk.where.rsplit(" ", 1)[1]): talk for talk in loaded.conversations}
    count = Counter()
    for number, (row, answers) in enumerate(made, start=1):
        rows, refused = mark([by_number[number]], marker) if number in by_number else ([], loaded.refused)
        if answers is None:
            assert refused, f"learned {what_is_learned(rows, tokenizer)} of {row}"
            count["spoiled"] += 1
        elif refused:
            # A template may refuse turns, change an answer, or merge a blank of the text with its own line break.
            assert name in ("alternate", "chatml", "think"), refused
            count[getattr(refused[0], "kind", "loader")] += 1
        else:
            learned = [
                text.replace("<think></think>", "").strip() for text in what_is_learned(rows, tokenizer)
            ]
            assert learned == [answer.strip() for answer in answers]
            for one in rows:
                if tokenizer.bos_token_id in one.ids:
                    assert one.ids.count(tokenizer.bos_token_id) == 1 and one.ids[0] == tokenizer.bos_token_id
                assert one.answers[-1][1] == len(one.ids), "nothing stands after the last end token"
            count["learned"] += 1
    print(name, dict(count))
    assert sum(count.values()) == 500 and count["spoiled"] > 10
    assert count["learned"] > (100 if name in ("alternate", "chatml", "think") else 400)
    kinds = set(count) - {"spoiled", "learned"}
    assert kinds <= {
        "the chat template refuses it", "no token boundary", "the answer is not what is learned",
        "the prompt is not a prefix",
    }  # fmt: skip


# ---- one row of several answers beside a row an answer --------------------------------------------------------------


def spans_of_a_row_an_answer(turns: list[dict], tokenizer) -> list[tuple[int, ...]]:
    """What TRL would learn of each answer alone, by its own means: the prompt's tokens, the whole's, and the rest."""
    learned = []
    for index, turn in enumerate(turns):
        if turn["role"] == "assistant":
            prompt = tokenizer.apply_chat_template(
                turns[:index], add_generation_prompt=True, return_dict=False
            )
            whole = tokenizer.apply_chat_template(turns[: index + 1], return_dict=False)
            assert whole[: len(prompt)] == prompt
            end = (
                whole.index(tokenizer.eos_token_id, len(prompt)) + 1
            )  # TRL learns a line break after it as well
            learned.append(tuple(whole[:end])), learned.append((len(prompt), end))
    return learned


@pytest.mark.parametrize("name", ["llama", "plain", "think", "last thinks"])
def test_the_spans_of_a_chat_are_those_of_a_row_an_answer(name, markers, tokenizers):
    dice, tokenizer = random.Random(1), tokenizers[name]
    talks, rows_made, answers, tokens = 1000, 0, 0, 0
    for _ in range(talks):
        turns = chats.turns(dice)
        learned = [turn["role"] == "assistant" for turn in turns]
        rows = markers[name].rows(Conversation(turns, learned))
        wanted = spans_of_a_row_an_answer(turns, tokenizer)
        found = [piece for row in rows for span in row.answers for piece in (tuple(row.ids[: span[1]]), span)]
        assert found == wanted, "context and span of each answer"
        rows_made += len(rows)
        answers += sum(learned)
        tokens += sum(label != IGNORED for row in rows for label in row.labels())
    assert tokens == sum_of_spans(1, talks, tokenizer)
    one_row = name != "last thinks"  # which renders an earlier answer otherwise: there, a row an answer
    print(f"{name}: {talks} chats, {answers} answers, {rows_made} rows, {tokens} tokens learned")
    assert rows_made == (talks if one_row else answers) and answers > 2 * talks


def sum_of_spans(seed: int, talks: int, tokenizer) -> int:
    dice = random.Random(seed)
    return sum(
        end - begin
        for _ in range(talks)
        for begin, end in spans_of_a_row_an_answer(chats.turns(dice), tokenizer)[1::2]
    )


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "wrapped"])
def test_the_labels_survive_trl_s_packing_and_its_collator(strategy, markers, tokenizers):
    from trl.data_utils import pack_dataset
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    dice = random.Random(2)
    talks = [chats.turns(dice) for _ in range(200)]
    rows = [
        row
        for turns in talks
        for row in markers["llama"].rows(Conversation(turns, [turn["role"] == "assistant" for turn in turns]))
    ]
    shortened = cut(rows, 1024)
    packed = pack_dataset(
        Dataset.from_dict({"input_ids": shortened.ids, "labels": shortened.labels}), 1024, strategy
    )
    assert len(packed) < len(shortened.ids) / 2
    collator = DataCollatorForLanguageModeling(
        tokenizers["llama"].pad_token_id, padding_free=strategy != "wrapped"
    )
    batch = collator(packed.to_list())
    learned = Counter(label for labels in shortened.labels for label in labels if label != IGNORED)
    assert Counter(batch["labels"][batch["labels"] != IGNORED].tolist()) == learned
    at = batch["labels"] != IGNORED
    assert (batch["labels"][at] == batch["input_ids"][at]).all()
    if strategy != "wrapped":
        starts = (batch["position_ids"] == 0).sum()
        assert starts == len(shortened.ids), "positions start again in each row"


ASKS_THE_CLOCK = (  # as Llama 3.2's template does
    "{%- if not date_string is defined %}{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}{{ date_string }}"
)


def test_a_template_that_asks_the_clock_is_told_the_same_day_on_every_day(tokenizers):
    """Or else no resume on the next day would know its rows again."""
    tokenizer = copy.deepcopy(tokenizers["llama"])
    tokenizer.chat_template = ASKS_THE_CLOCK + tokenizer.chat_template
    turns = [{"role": "user", "content": "What day is it?"}, {"role": "assistant", "content": "A day."}]
    assert Marker(tokenizer)._render(turns).startswith("26 Jul 2024")
