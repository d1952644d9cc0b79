"""One conversation, in the one form into which every row is brought."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Conversation:
    """What one row of a file says, and what of it is learned.

    Args:
        turns: `{"role", "content"}` of each turn, in order; the last one is learned. Empty for plain text.
        learned: for each turn, whether it is an answer to learn.
        text: plain text, all of which is learned, in place of turns.
        where: file and row, for a sentence.
        left_out: what stands in the row and is not used: columns and keys, and turns that follow the last answer.
    """

    turns: list[dict[str, str]] = field(default_factory=list)
    learned: list[bool] = field(default_factory=list)
    text: str | None = None
    where: str = ""
    left_out: frozenset[str] = frozenset()

    @property
    def answers(self) -> int:
        """How many turns are learned."""
        return sum(self.learned)

    @property
    def question(self) -> list[dict[str, str]]:
        """The turns before the first answer that is learned: what a model is asked with."""
        return self.turns[: self.learned.index(True)] if self.answers else []

    @property
    def key(self) -> tuple:
        """What makes two conversations the same: who says what, whatever the blanks between words."""
        if self.text is not None:
            return ("text", " ".join(self.text.split()))
        return tuple((turn["role"], " ".join(turn["content"].split())) for turn in self.turns)
