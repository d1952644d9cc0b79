"""The forms in which people keep conversations, and how a row of each becomes turns.

`messages` (OpenAI), `conversations` (ShareGPT), prompt + completion (TRL), instruction + output (Alpaca), text.
"""

from nbutils.data.columns import REASONS, RowRefused, is_empty, refuse_unused, unused
from nbutils.data.conversation import Conversation
from nbutils.data.files import FORMS

ROLES = ("system", "user", "assistant")
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "system": "system",
}
# "Learn this turn or not", as OpenAI, axolotl and ms-swift spell it.
LEARN_KEYS = ("weight", "train", "loss")
TURN_KEYS = {"role", "content", *LEARN_KEYS}

Turn = tuple[str, str, bool]  # role, content, whether it is learned


def conversation_of(row: dict, where: str, ignored: frozenset[str] = frozenset()) -> Conversation:
    """Bring a row of any known form into turns.

    Args:
        row: as it stands in the file.
        where: file and row, for a sentence.
        ignored: columns and keys of turns that the user wants to leave out.

    Returns:
        The conversation up to its last learned turn. What comes after it cannot be learned, nor be seen by what is.

    Raises:
        RowRefused: naming the form, column, key, role or content that cannot be used.
    """
    row = {name: value for name, value in row.items() if name not in ignored}
    names = {name for name, value in row.items() if not is_empty(value)} or set(row)
    for form, belongs in _FORMS:
        if belongs(names):
            turns, used, left_out = form(row, ignored)
            break
    else:
        if known := sorted(names & set(REASONS)):
            raise unused(known[0], "column")
        raise RowRefused(
            "unknown form",
            f"it has the columns {', '.join(sorted(row))}, and none of the known forms has these. Wanted: {FORMS}.",
        )
    left_out |= refuse_unused(row, used, "column")
    if isinstance(turns, str):
        return Conversation(text=turns, where=where, left_out=frozenset(left_out))
    return _conversation(turns, where, frozenset(left_out))


def _conversation(turns: list[Turn], where: str, left_out: frozenset[str]) -> Conversation:
    answers = [i for i, (role, _, _) in enumerate(turns) if role == "assistant"]
    if not answers:
        raise RowRefused(
            "no answer", "the conversation has no assistant turn, so there is nothing to train on."
        )
    if answers[0] == 0:
        raise RowRefused(
            "begins with an answer",
            "the conversation begins with an assistant turn, which answers nothing. "
            "Take that turn out, or put the user's turn before it.",
        )
    last = max((i for i, (_, _, learned) in enumerate(turns) if learned), default=None)
    if last is None:
        raise RowRefused(
            "every answer has weight 0",
            "each of its answers is marked as not to be learned, so there is nothing to train on. Take the row out.",
        )
    kept = turns[: last + 1]
    if len(kept) < len(turns):
        left_out |= {"turns after the last answer"}
    return Conversation(
        turns=[{"role": role, "content": content} for role, content, _ in kept],
        learned=[learned for _, _, learned in kept],
        where=where,
        left_out=left_out,
    )


# ---- each form ------------------------------------------------------------------------------------------------------


def _from_messages(row: dict, ignored: frozenset[str]) -> tuple[list[Turn], set[str], set[str]]:
    both = [name for name in ("messages", "conversations") if not is_empty(row.get(name))]
    if len(both) == 2:
        raise RowRefused(
            "two forms", "it has messages and conversations, and only one can be used. Ignore one."
        )
    name = both[0] if both else "messages" if "messages" in row else "conversations"
    turns, left_out = _turns(row[name], name, ignored)
    system, used = _system(row)
    if system and turns and turns[0][0] == "system":
        raise RowRefused(
            "two system texts", f"it has a system turn and a column {used} besides. Take one of them out."
        )
    return system + turns, {name, used}, left_out


def _from_prompt_completion(row: dict, ignored: frozenset[str]) -> tuple[list[Turn], set[str], set[str]]:
    turns, left_out = [], set()
    for name, role in (("prompt", "user"), ("completion", "assistant")):
        value = row.get(name)
        if isinstance(value, list):
            found, out = _turns(value, name, ignored)
            left_out |= out
        else:
            found = [(role, _text(value, name), role == "assistant")]
        # An answer in the prompt is given, not asked for.
        turns += [(who, text, learned and name == "completion") for who, text, learned in found]
    system, used = _system(row)
    return system + turns, {"prompt", "completion", used}, left_out


def _from_alpaca(row: dict, ignored: frozenset[str]) -> tuple[list[Turn], set[str], set[str]]:
    """`history` holds earlier pairs of question and answer; they are context, and `output` alone is learned."""
    question = _text(row.get("instruction"), "instruction")
    if not is_empty(row.get("input")):
        question += "\n\n" + _text(row["input"], "input")
    turns, used = _system(row)
    for pair in row.get("history") or []:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise RowRefused("history", "history must hold pairs of question and answer.")
        turns.append(("user", _text(pair[0], "a question in history"), False))
        turns.append(("assistant", _text(pair[1], "an answer in history"), False))
    turns += [("user", question, False), ("assistant", _text(row.get("output"), "output"), True)]
    return turns, {"instruction", "input", "output", "history", used}, set()


def _from_text(row: dict, ignored: frozenset[str]) -> tuple[str, set[str], set[str]]:
    return _text(row["text"], "text"), {"text"}, set()


_FORMS = (  # the first one that fits is taken; what it does not use is refused
    (_from_messages, lambda names: names & {"messages", "conversations"}),
    (_from_alpaca, lambda names: {"instruction", "output"} <= names),
    (_from_prompt_completion, lambda names: {"prompt", "completion"} <= names),
    (_from_text, lambda names: "text" in names),
    # Half of a form: its own sentence says what is missing.
    (_from_prompt_completion, lambda names: names & {"prompt", "completion"} and "chosen" not in names),
    (_from_alpaca, lambda names: "instruction" in names),
)


# ---- turns ----------------------------------------------------------------------------------------------------------


def _system(row: dict) -> tuple[list[Turn], str]:
    """A system text that stands in a column of its own, and the name of the column."""
    names = [name for name in ("system", "system_prompt") if not is_empty(row.get(name))]
    if len(names) == 2:
        raise RowRefused("two system texts", "it has system and system_prompt. Take one of them out.")
    return [("system", _text(row[name], name), False) for name in names], names[0] if names else "system"


def _turns(turns: object, name: str, ignored: frozenset[str]) -> tuple[list[Turn], set[str]]:
    if not isinstance(turns, list):
        raise RowRefused("no list of turns", f"{name} must be a list, found {type(turns).__name__}.")
    if not turns:
        raise RowRefused("no turns", f"{name} is empty.")
    found, left_out = [], set()
    for turn in turns:
        if not isinstance(turn, dict):
            raise RowRefused("no turn", f"each turn must be {{role, content}}, found {type(turn).__name__}.")
        turn = {key: value for key, value in turn.items() if key not in ignored}
        turn, role = _as_openai(turn)
        left_out |= refuse_unused(turn, TURN_KEYS, "key of a turn")
        if role == "system" and is_empty(turn.get("content")):
            continue  # a blank system text is none
        found.append((role, _content(turn, role), _is_learned(turn, role)))
    return found, left_out


def _as_openai(turn: dict) -> tuple[dict, str]:
    """A turn of ShareGPT, {from, value}, with the names of OpenAI; and its role."""
    if "role" not in turn and "from" in turn:
        known = SHAREGPT_ROLES
        turn = {{"from": "role", "value": "content"}.get(key, key): value for key, value in turn.items()}
    else:
        known = {role: role for role in ROLES}
    role = known.get(turn.get("role")) if isinstance(turn.get("role"), str) else None
    if role is None:
        raise RowRefused(
            f"role {turn.get('role')}", f"the role {turn.get('role')!r} is not one of {', '.join(known)}."
        )
    return turn, role


def _content(turn: dict, role: str) -> str:
    content, name = turn.get("content"), f"content of the {role} turn"
    if isinstance(content, list):  # parts, as multimodal sets have them
        kinds = [part.get("type") if isinstance(part, dict) else type(part).__name__ for part in content]
        if kinds != ["text"]:
            raise RowRefused(
                "content in parts",
                f"{name} has the parts {', '.join(map(str, kinds))}; wanted text, or one part of the type text.",
            )
        refuse_unused(content[0], {"type", "text"}, "key of a part")
        content = content[0].get("text")
    return _text(content, name)


def _is_learned(turn: dict, role: str) -> bool:
    marks = {key: turn[key] for key in LEARN_KEYS if turn.get(key) is not None}
    for key, mark in marks.items():
        if mark not in (0, 1):  # True and False are
            raise RowRefused(
                f"key of a turn {key}",
                f"{key} is {mark!r}: a turn is learned whole or not at all. Wanted 0 or 1.",
            )
        if mark and role != "assistant":
            raise RowRefused(
                f"key of a turn {key}",
                f"{key} asks to learn the {role} turn, and only answers are learned. Take it out.",
            )
    if len({bool(mark) for mark in marks.values()}) > 1:
        raise RowRefused("marks that differ", f"{' and '.join(marks)} of one turn say different things.")
    return role == "assistant" and all(marks.values())


def _text(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise RowRefused(f"{name} is no text", f"{name} must be text, found {type(value).__name__}.")
    if not value.strip():
        raise RowRefused(f"{name} is empty", f"{name} is empty.")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise RowRefused(
            "half a character", f"{name} holds half a character (a surrogate without its other half)."
        ) from None
    return value
