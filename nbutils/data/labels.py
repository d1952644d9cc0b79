"""From a conversation to token ids, and to which of them are learned: the answers, each with its end token.

A chat of several answers is one row with several learned spans. Each span is what a row for that answer alone would
learn: the prompt up to an answer is rendered as it is when the model is asked, and its tokens must begin the whole.
"""

import re
import unicodedata
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from nbutils.common.refused import Refused
from nbutils.data.columns import RowRefused
from nbutils.data.conversation import Conversation

IGNORED = -100  # a label that the loss leaves out
# The day that templates with a date are told. Llama 3.1's and 3.3's say this one by themselves; Llama 3.2's asks the
# clock, and then the same rows would be other tokens tomorrow: no resume would know them again.
THE_DAY = "26 Jul 2024"


@dataclass(frozen=True)
class Row:
    """One sequence to train on.

    Args:
        ids: tokens of the whole.
        answers: begin and end (exclusive) of each answer in `ids`, its end token included; none in plain text.
        conversation: what it was made of.
    """

    ids: list[int]
    answers: list[tuple[int, int]]
    conversation: Conversation

    def labels(self, everything: bool = False) -> list[int]:
        """The ids that are learned, and `IGNORED` elsewhere; of plain text, or if `everything`, all are learned."""
        if everything or self.conversation.text is not None:
            return list(self.ids)
        labels = [IGNORED] * len(self.ids)
        for begin, end in self.answers:
            labels[begin:end] = self.ids[begin:end]
        return labels


class Marker:
    """Renders conversations with a tokenizer's template and marks what is learned.

    Args:
        tokenizer: with its chat template, as `nbutils.data.templates.ready_for_chat` leaves it.

    Raises:
        Refused: the tokenizer has no end token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        if tokenizer.eos_token_id is None:
            raise Refused(
                "The tokenizer has no end token, so no answer could end. Set eos_token and save it."
            )
        self.tokenizer = tokenizer
        self.bos, self.eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        self.adds_bos = self.bos is not None and tokenizer("a")["input_ids"][:1] == [self.bos]
        self.begins = self.adds_bos or (
            self.bos is not None
            and "bos_token" in str(tokenizer.chat_template)  # what every chat begins with
        )
        control = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        control |= set(tokenizer.all_special_tokens)
        self.control = re.compile("|".join(re.escape(token) for token in sorted(control)) or r"(?!)")

    def rows(self, conversation: Conversation) -> list[Row]:
        """The rows of one conversation: one; or, if the template renders earlier answers otherwise, one an answer.

        Raises:
            RowRefused: what is learned would not be the answers and their end tokens.
        """
        if conversation.text is not None:
            return [self._text(conversation)]
        for turn in conversation.turns:
            if found := self.control.search(turn["content"]):
                raise RowRefused(
                    "control token in the text",
                    f"the {turn['role']} turn holds {found[0]}, which the tokenizer reads as a token of the chat "
                    "layout and not as text. Write it otherwise.",
                )
        learned = [i for i, is_learned in enumerate(conversation.learned) if is_learned]
        alone = [self._one_answer(conversation, i) for i in learned]
        whole = alone[-1]  # the last turn is learned: it holds all others
        spans = [row.answers[0] for row in alone]
        if all(whole.ids[:end] == row.ids[:end] for row, (_, end) in zip(alone, spans)):
            return [Row(whole.ids, spans, conversation)]
        return alone

    def _one_answer(self, conversation: Conversation, answer: int) -> Row:
        """The row that learns this one answer and nothing else."""
        turns = conversation.turns[: answer + 1]
        prompt, whole = self._render(turns[:-1], ask=True), self._render(turns)
        if not whole.startswith(prompt):
            raise RowRefused(
                "the prompt is not a prefix",
                f"the chat template renders the prompt of answer {answer + 1} in another way when the answer follows: "
                f"alone it ends in {prompt[-30:]!r}. The model would be trained behind another prompt than it is "
                "asked with.",
            )
        prompt_ids, ids = self._tokens(prompt), self._tokens(whole)
        begin = len(prompt_ids)
        if ids[:begin] != prompt_ids:
            raise RowRefused(
                "no token boundary",
                f"the prompt does not end on a token boundary: {prompt[-12:]!r} and {whole[len(prompt) :][:12]!r} "
                "share a token. The chat template must end its prompt where a token ends.",
            )
        self._look_at_begin(ids)
        end = self._end(ids, begin, whole[len(prompt) :])
        self._look_at_answer(turns[-1]["content"], whole[len(prompt) :], ids[begin:end])
        return Row(ids[:end], [(begin, end)], conversation)

    def _render(self, turns: list[dict], ask: bool = False) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                turns,
                tokenize=False,
                add_generation_prompt=ask,
                date_string=THE_DAY,
            )
        except Exception as problem:  # whatever a template raises
            said = next(iter(str(problem).splitlines()), "") or type(problem).__name__
            raise RowRefused(
                "the chat template refuses it",
                f"the chat template refuses the conversation: {said.rstrip('.')}. Change the row, or take it out.",
            ) from None

    def _tokens(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _look_at_begin(self, ids: list[int]) -> None:
        """The begin token once, at the begin; not at all if neither the template nor the tokenizer knows it."""
        if self.bos is None or self.bos == self.eos:
            return
        in_layout = self.tokenizer.bos_token in str(
            self.tokenizer.chat_template
        )  # as SmolLM2's, before each turn
        found, begins = ids.count(self.bos), ids[:1] == [self.bos]
        twice = ids[:2] == [self.bos] * 2 or (found > 1 and not in_layout)
        if twice or (not begins and (self.adds_bos or (found and not in_layout))):
            raise RowRefused(
                "begin token",
                f"{self.tokenizer.bos_token} stands {found} times in the rendered row; wanted once, at its begin. "
                "Look at the chat template.",
            )

    def _end(self, ids: list[int], begin: int, rest: str) -> int:
        """Where the answer's end token ends. The answer's text holds none, so the first one is the template's."""
        if self.eos not in ids[begin:]:
            raise RowRefused(
                "no end token",
                f"the rendered answer ends in {rest[-20:]!r} and holds no {self.tokenizer.eos_token}, the end token "
                "of this tokenizer: the model would not learn to stop. Set eos_token, or the chat template, so that "
                "they fit.",
            )
        return ids.index(self.eos, begin) + 1

    def _look_at_answer(self, answer: str, rendered: str, learned: list[int]) -> None:
        """The answer's text stands in what is learned; blanks around it may go, as the templates trim them."""
        decoded = self.tokenizer.decode(learned)
        if answer.strip() not in rendered or _squeezed(answer) not in _squeezed(decoded):
            raise RowRefused(
                "the answer is not what is learned",
                f"the chat template changes the answer: {_short(answer)} became {_short(decoded)}. What is not in the "
                "rendered answer would not be learned.",
            )

    def _text(self, conversation: Conversation) -> Row:
        """Plain text: the begin token where tokenizer or chats put one, the end token at the end, neither twice."""
        text = conversation.text
        found = list(self.control.finditer(text))
        ends = bool(found) and found[-1].start() > 0 and not text[found[-1].end() :].strip()
        if ends:
            text = text.rstrip()  # what follows the end would be learned after it
        ids = self._tokens(text)
        if self.begins and ids[:1] != [self.bos]:
            ids = [self.bos, *ids]
        if not ends:  # whoever wrote an end token, of a turn or of a text, has chosen it
            ids = [*ids, self.eos]
        if self.bos != self.eos and ids.count(self.bos) > 1:
            raise RowRefused(
                "begin token",
                f"{self.tokenizer.bos_token} stands {ids.count(self.bos)} times in the text; wanted once at most. "
                "Cut it into a row each.",
            )
        return Row(ids, [], conversation)


def _squeezed(text: str) -> str:
    return "".join(unicodedata.normalize("NFKC", text).split())


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:20]}...{text[-15:]}")
