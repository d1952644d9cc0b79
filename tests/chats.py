"""Random conversations, templates and tokenizers for the tests of rows and labels; made here, the same every time."""

import random

from nbutils.data.templates import LLAMA31_TEMPLATE, PLAIN_TEMPLATE, ready_for_chat
from nbutils.models.tiny import read_prose, train_tokenizer
from nbutils.models.tiny_plain import as_base_model

TURN = "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n' + m['content'] + '<|eot_id|>\n' }}"
ASK = "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n' }}{% endif %}"
# As ChatML: no begin token, nothing trimmed, a line break after each end.
CHATML = "{% for m in messages %}" + TURN + "{% endfor %}" + ASK
# As DeepSeek-R1-Distill: of an answer, what stands after </think> is all that is rendered.
THINK = "{{ bos_token }}{% for m in messages %}" + TURN.replace(
    "m['content']", "m['content'].split('</think>')[-1] | trim"
) + "{% endfor %}" + ASK  # fmt: skip
# As Qwen3: an empty thought stands before the last answer, and before no earlier one.
LAST_THINKS = "{{ bos_token }}{% for m in messages %}" + TURN.replace(
    "m['content']", "('<think></think>' if loop.last and m['role'] == 'assistant' else '') + m['content'] | trim"
) + "{% endfor %}" + ASK  # fmt: skip
ALTERNATE = (
    "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('turns must take turns: user, assistant, user') }}{% endif %}"
    + TURN.replace("m['content']", "m['content'] | trim") + "{% endfor %}" + ASK
)  # fmt: skip
TEMPLATES = {
    "llama": LLAMA31_TEMPLATE,
    "plain": PLAIN_TEMPLATE,
    "chatml": CHATML,
    "think": THINK,
    "last thinks": LAST_THINKS,
    "alternate": ALTERNATE,
}
PIECES = [
    "shard", "1,024", "Ü", "naïve", "日本語", "🙂", "👩\u200d👩\u200d👧", "e\u0301", "\u202eright to left", "a\tb",
    "line\nbreak", "}{", "%", "\\n", "<think>", "</s>", "Answer:", "Question: x", "a\u00a0b", "...", "'s", "x" * 60,
    "0", "-", "def f(x):\n    return x", "ﬁ",
]  # fmt: skip


def tokenizers() -> dict:
    """A tokenizer for each template; those with a begin token of their own put it before every text by themselves."""
    made = {}
    for name, template in TEMPLATES.items():
        tokenizer = train_tokenizer(read_prose()[0])
        if name == "plain":
            as_base_model(tokenizer)
        tokenizer.chat_template = template
        made[name] = ready_for_chat(tokenizer)
    return made


def text(dice: random.Random, longest: int = 8) -> str:
    words = [dice.choice(PIECES) for _ in range(dice.randint(1, longest))]
    blanks = ["", " ", "\n", "  ", "\n\n "]
    return dice.choice(blanks) + dice.choice(blanks[1:]).join(words) + dice.choice(blanks)


def turns(dice: random.Random, longest: int = 8) -> list[dict]:
    """System or not, then user and assistant by turns; now and then a user who speaks twice."""
    made = [{"role": "system", "content": text(dice)}] if dice.random() < 0.3 else []
    for _ in range(dice.randint(1, 4)):
        made += [{"role": "user", "content": text(dice)} for _ in range(1 + (dice.random() < 0.1))]
        made.append({"role": "assistant", "content": text(dice, longest)})
    return made


# ---- a file of many chats -------------------------------------------------------------------------------------------

THINGS = (
    "a shard",
    "a rank",
    "a unit",
    "a layer",
    "an adapter",
    "a checkpoint",
    "a gather",
    "a step",
    "a scale",
)
ASKS = ("What is {}?", "Who needs {}?", "When does {} matter?", "How large is {}?", "Tell me more about {}.")
TELLS = (
    "{} is a part of the whole, and each process holds one.",
    "It depends on the model and on the memory of the cards.",
    "Every process needs it once a step, and frees it after that.",
    "Look at the log: the first lines of each rank say it.",
    "About {} megabytes, if the layer has four bits a weight.",
)


def share_gpt(count: int = 2000, seed: int = 0) -> list[dict]:
    """Multi-turn chats as a ShareGPT export has them: our own words, lengths as people write, no two alike.

    Args:
        count: of chats.
        seed: of the dice; the same chats every time.
    """
    dice, made = random.Random(seed), []
    for number in range(count):
        thing, talk = dice.choice(THINGS), []
        for turn in range(1 + min(int(dice.expovariate(0.7)), 5)):
            asked = dice.choice(ASKS).format(thing if dice.random() < 0.7 else dice.choice(THINGS))
            sentences = max(1, round(dice.lognormvariate(0.6, 0.55)))
            told = " ".join(dice.choice(TELLS).format(dice.randint(1, 999)) for _ in range(sentences))
            talk += [
                {"from": "human", "value": f"Chat {number}: {asked}" if turn == 0 else asked},
                {"from": "gpt", "value": told[0].upper() + told[1:]},
            ]
        made.append({"id": f"chat_{number}", "conversations": talk})
    return made
