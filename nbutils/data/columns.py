"""The names of columns and of a turn's keys: each is used, known as bookkeeping, or refused by name.

A column that nobody reads is the quietest way to train on something else than what was meant.
"""

from nbutils.common.refused import Refused

# What says nothing of what a model should answer. It is left out, and the script says so once.
_NAMES = """
    id idx index _id uuid row_id prompt_id conversation_id conversation_hash message_id sample_id qid hash sha
    source sources dataset dataset_name dataset_source subset split domain topic topics category categories subcategory
    task task_type task_name type tags keywords difficulty lang language languages license licence url link author user
    user_id model model_name model_id generator created created_at updated_at timestamp date meta metadata
    n_tokens num_tokens token_count tokens num_turns turn turns length score rating
"""
BOOKKEEPING = frozenset(_NAMES.split())

# Why a name that people use is not: what it means, and what would be lost.
REASONS = {
    "chosen": "it is half of a preference pair, and this recipe learns answers and no preferences",
    "rejected": "it is an answer that must not be learned, half of a preference pair",
    "label": "it says which rows are wanted, and a row that is not would be learned",
    "tools": "it describes tools, and turns that call tools are not rendered here",
    "functions": "it describes tools, and turns that call tools are not rendered here",
    "tool_calls": "it calls a tool, and the call would not be learned",
    "function_call": "it calls a tool, and the call would not be learned",
    "tool_call_id": "it answers a tool call, and turns that call tools are not rendered here",
    "name": "it says who speaks, and the chat templates here do not render it",
    "reasoning_content": "it is reasoning beside the answer, and it would not be learned",
    "reasoning": "it is reasoning beside the answer, and it would not be learned",
    "thinking": "it is reasoning beside the answer, and it would not be learned",
    "image": "it is an image, and this recipe trains on text",
    "images": "it holds images, and this recipe trains on text",
    "audio": "it is sound, and this recipe trains on text",
    "audios": "it is sound, and this recipe trains on text",
    "video": "it is film, and this recipe trains on text",
    "videos": "it is film, and this recipe trains on text",
    "weight": "it weighs a row, and every row here counts alike; in an assistant turn it is used",
    "chat_template_kwargs": "it changes the chat template for this row, and all rows here share one",
}


class RowRefused(Refused):
    """One row cannot be trained on as it is; `kind` is the reason in a few words, the same for all such rows."""

    def __init__(self, kind: str, sentence: str):
        super().__init__(sentence)
        self.kind = kind


def is_empty(value: object) -> bool:
    """Whether a value says nothing: null, blank text, or a list or an object of such."""
    if value is None:
        return True
    if isinstance(value, str):
        return not value.strip()
    if isinstance(value, dict):
        return all(is_empty(inner) for inner in value.values())
    if isinstance(value, list | tuple):
        return all(is_empty(inner) for inner in value)
    return False


def refuse_unused(row: dict, used: set[str], what: str) -> set[str]:
    """Refuse a name that is not used and says something.

    Args:
        row: a row or a turn.
        used: the names that the form of the row uses.
        what: "column" or "key of a turn", for the sentence.

    Returns:
        The names of bookkeeping in which something stands, and which are left out.

    Raises:
        RowRefused: naming the first such name, and why.
    """
    left_out = set()
    for name, value in row.items():
        if name in used or is_empty(value):
            continue
        if name not in BOOKKEEPING:
            raise unused(name, what)
        left_out.add(name)
    return left_out


def unused(name: str, what: str) -> RowRefused:
    """The refusal of a name that nothing here reads, with what it means where that is known."""
    reason = REASONS.get(name, "no form of rows here reads it, and what it holds would be lost")
    return RowRefused(
        f"{what} {name}",
        f"the {what} {name} is not used: {reason}. Take it out of the row, or name it in ignore_columns if it may be "
        "left out.",
    )
