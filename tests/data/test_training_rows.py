"""The one look at every row: what is refused before a weight is read, what is counted, and what the trainer gets."""

import json
from types import SimpleNamespace

import chats
import pytest

from nbutils.common.refused import Refused
from nbutils.data.labels import IGNORED
from nbutils.data.rows import load_conversations
from nbutils.data.templates import PLAIN_TEMPLATE
from nbutils.data.training_rows import look_at_every_row, rows_to_learn

OTHER = {"prompt": "What is a rank?", "completion": "A process."}
# What `PLAIN_TEMPLATE` was: it asks with a blank that belongs to the first token of the answer.
ENDS_IN_A_BLANK = PLAIN_TEMPLATE.replace("'Answer:' }}{%- endif", "'Answer: ' }}{%- endif")


@pytest.fixture(scope="module")
def tokenizers():
    return chats.tokenizers()


def look(tokenizer, tmp_path, rows: list[dict], share: float = 0.5, **settings):
    """Both sets as the script gets them; the held-out one is a good row."""
    told = {
        "max_length": 256, "truncation_mode": "keep_start", "completion_only_loss": None, "assistant_only_loss": False,
        "chat_template_path": None, "eos_token": None, "dataset_text_field": "text",
    }  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "heldout.jsonl").write_text(json.dumps(OTHER) + "\n")
    sets = [load_conversations(str(tmp_path / name)) for name in ("rows.jsonl", "heldout.jsonl")]
    return look_at_every_row(*sets, tokenizer, SimpleNamespace(**{**told, **settings}), share)


def turns(*texts: str) -> dict:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]}


def learned(rows, tokenizer) -> list[str]:
    return [tokenizer.decode([label for label in row["labels"] if label != IGNORED]) for row in rows]


def test_reasoning_that_the_template_strips_is_refused_with_its_row(tokenizers, tmp_path):
    """Public reports: trl 6766, 2919."""
    rows = [turns("Q", "A."), turns("What is 15 times 3?", "<think>\nTen threes are 30.\n</think>\n\n45.")]
    with pytest.raises(Refused, match=r"rows\.jsonl, row 2: the chat template changes the answer: '<think>"):
        look(tokenizers["think"], tmp_path, rows)


def test_a_template_that_wants_turns_to_alternate_names_file_and_row(tokenizers, tmp_path):
    """Public report: alignment-handbook 93."""
    two = {"messages": [{"role": "user", "content": "Hear."}, *turns("Where?", "Here.")["messages"]]}
    with pytest.raises(
        Refused, match=r"rows\.jsonl, row 2: the chat template refuses .*turns must take turns"
    ):
        look(tokenizers["alternate"], tmp_path, [turns("Q", "A."), two])


def test_a_prompt_that_ends_within_a_token_is_refused(tokenizers, tmp_path):
    """Public report: trl 5213; and our own template for base models, as it was."""
    tokenizer = chats.tokenizers()["plain"]
    tokenizer.chat_template = ENDS_IN_A_BLANK
    with pytest.raises(Refused, match=r"row 1: the prompt does not end on a token boundary: .*Answer: '"):
        look(tokenizer, tmp_path, [{"prompt": "Capital of Kenya?", "completion": "Nairobi."}])


def test_every_row_of_the_course_begins_with_its_prompt(tokenizers):
    """With a tokenizer as Llama 3.1's without Instruct: no template of its own, and a begin token by itself."""
    tokenizer = tokenizers["plain"]
    assert tokenizer.chat_template == PLAIN_TEMPLATE
    for name in ("train", "heldout"):
        conversations = load_conversations(f"data/instructions/{name}.jsonl")
        rows = rows_to_learn(conversations, tokenizer)
        for talk, row in zip(conversations, rows, strict=True):
            prompt = tokenizer.apply_chat_template(
                talk.question, add_generation_prompt=True, return_dict=False
            )
            assert row["input_ids"][: len(prompt)] == prompt
            first = next(i for i, label in enumerate(row["labels"]) if label != IGNORED)
            assert first == len(prompt)


def test_keep_end_keeps_the_end(tokenizers, tmp_path, capsys):
    row = {"prompt": "The log says. " * 90 + "What is the last number?", "completion": "59"}
    with pytest.raises(Refused, match=r"Every one of the 1 rows is longer than max_length, 64 tokens"):
        look(tokenizers["llama"], tmp_path, [row], max_length=64)
    train, _ = look(tokenizers["llama"], tmp_path, [row], max_length=64, truncation_mode="keep_end")
    assert len(train[0]["input_ids"]) == 64
    assert learned(train, tokenizers["llama"]) == ["59<|eot_id|>"]
    assert "cut" not in capsys.readouterr().out


@pytest.mark.parametrize(("name", "begins"), [("llama", 1), ("plain", 1), ("chatml", 0)])
def test_text_begins_and_ends_once(tokenizers, tmp_path, name, begins):
    """Public report: OpenRLHF 393. "plain" puts the begin token by itself; of "llama" the chats begin with it."""
    tokenizer = tokenizers[name]
    end = tokenizer.eos_token
    texts = [
        "Plain prose without any mark.",
        f"<|begin_of_text|>Prose.{end}",
        f"<|begin_of_text|>Prose.{end}\n",
    ]
    turn, _ = look(tokenizer, tmp_path, [{"text": "<|begin_of_text|>Say 0<|eot_id|>\n"}])
    assert tokenizer.decode(turn[0]["input_ids"]) == "<|begin_of_text|>Say 0<|eot_id|>", "no second end"
    train, _ = look(tokenizer, tmp_path, [{"text": text} for text in texts])
    for text, row in zip(texts, train, strict=True):
        found = row["input_ids"].count(tokenizer.bos_token_id)
        assert found == (1 if text.startswith("<") else begins)
        assert (
            row["input_ids"].count(tokenizer.eos_token_id) == 1
            and row["input_ids"][-1] == tokenizer.eos_token_id
        )
        assert row["labels"] == row["input_ids"]


@pytest.mark.parametrize("more", ["{{ bos_token }}", "<|begin_of_text|>"])
def test_a_template_that_begins_twice_is_refused(tmp_path, more):
    tokenizer = chats.tokenizers()["llama"]
    tokenizer.chat_template = more + tokenizer.chat_template
    with pytest.raises(
        Refused, match=r"row 1: <\|begin_of_text\|> stands 2 times in the rendered row; wanted once"
    ):
        look(tokenizer, tmp_path, [turns("Q", "A.")])


def test_a_begin_token_that_opens_each_turn_is_no_fault(tmp_path):
    """SmolLM2's template is of this kind: its begin token and its token before each role are one."""
    tokenizer = chats.tokenizers()["chatml"]
    tokenizer.bos_token = "<|start_header_id|>"
    assert len(look(tokenizer, tmp_path, [turns("Q", "A.", "R", "B.")])[0]) == 1


def test_a_template_whose_end_is_not_the_tokenizer_s_is_refused(tmp_path):
    tokenizer = chats.tokenizers()["llama"]
    tokenizer.eos_token = "<|end_of_text|>"
    with pytest.raises(
        Refused, match=r"row 1: the rendered answer ends in .*eot_id.* holds no <\|end_of_text\|>"
    ):
        look(tokenizer, tmp_path, [turns("Q", "A.")])


def test_cut_answers_are_counted_and_refused_above_a_share(tokenizers, tmp_path, capsys):
    """Public report: trl 3910."""
    long = {"prompt": "Count.", "completion": ", ".join(map(str, range(100)))}
    rows = [turns("Q", "A."), turns("R", "B."), long]
    look(tokenizers["llama"], tmp_path, rows, max_length=64)
    assert "1 of 3 answers of these rows are cut by max_length 64 (33.3%)" in capsys.readouterr().out
    with pytest.raises(
        Refused, match=r"max_length 64 cuts 1 of the 3 answers that are learned, 33%; wanted at most 30%"
    ):
        look(tokenizers["llama"], tmp_path, rows, share=0.3, max_length=64)
    with pytest.raises(Refused, match=r"max_length 64 cuts 2 of the 2 answers that are learned, 100%"):
        look(tokenizers["llama"], tmp_path, [long, long], max_length=64)
    look(tokenizers["llama"], tmp_path, [long, long], share=1, max_length=64)


def test_a_row_without_a_label_left_never_reaches_a_pack(tokenizers, tmp_path, capsys):
    """Public report: trl 6668, where such rows stay when rows are packed, and their loss counts as 0."""
    rows = [turns("Q", "A."), *[turns("Why? " * 200, "B.")] * 3]
    train, _ = look(tokenizers["llama"], tmp_path, rows, max_length=64)
    assert learned(train, tokenizers["llama"]) == ["A.<|eot_id|>"]
    assert "3 of 4 rows keep no token of their answer within max_length 64 (" in capsys.readouterr().out


def test_what_is_not_used_is_said(tokenizers, tmp_path, capsys):
    look(tokenizers["llama"], tmp_path, [{**turns("Q", "A."), "topic": "letters", "id": 7}])
    assert "Not used of the rows: id, topic." in capsys.readouterr().out


def test_prompts_are_learned_too_if_that_is_asked_for(tokenizers, tmp_path):
    train, _ = look(tokenizers["llama"], tmp_path, [turns("Q", "A.")], completion_only_loss=False)
    assert train[0]["labels"] == train[0]["input_ids"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"chat_template_path": "x.jinja"},
            r"chat_template_path is 'x\.jinja': rows are rendered with the tokenizer",
        ),
        ({"eos_token": "<x>"}, r"eos_token is '<x>'"),
        ({"dataset_text_field": "prose"}, r"wanted text: name the column so"),
        ({"assistant_only_loss": True}, r"answers alone are learned anyway"),
        ({"truncation_mode": "middle"}, r"wanted keep_start or keep_end"),
    ],
)
def test_settings_that_the_rows_cannot_follow_are_refused(tokenizers, tmp_path, settings, words):
    with pytest.raises(Refused, match=words):
        look(tokenizers["llama"], tmp_path, [turns("Q", "A.")], **settings)


def test_answers_alone_of_plain_text_are_refused(tokenizers, tmp_path):
    with pytest.raises(Refused, match=r"a row is plain text, which has no answer of its own"):
        look(tokenizers["llama"], tmp_path, [{"text": "Prose."}], completion_only_loss=True)


def test_the_tiny_base_goes_the_base_model_s_way_too(tmp_path):
    from nbutils.models.loading import load_tokenizer
    from nbutils.models.tiny import tiny_base
    from nbutils.models.tiny_plain import tiny_plain

    tokenizer = load_tokenizer(str(tiny_plain()))
    assert (
        tokenizer.chat_template == PLAIN_TEMPLATE and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    )
    assert tokenizer.eos_token == "<|end_of_text|>" and tokenizer.pad_token != tokenizer.eos_token
    assert (tiny_plain() / "model.safetensors").samefile(tiny_base() / "model.safetensors")
    assert load_tokenizer(str(tiny_base())).chat_template != PLAIN_TEMPLATE, "the other one is as it was"
