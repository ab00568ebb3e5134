"""The text of tokens: of each alone, for log-probabilities, and of a completion as it grows, for streams."""

from collections.abc import Sequence
from dataclasses import dataclass

from seal_engine.model.tokenizer import Tokenizer
from seal_engine.sampling.detokenizer import Detokenizer
from seal_engine.sampling.requests import Completion


class TokenTexts:
    """token id -> what the token adds to a text that has begun; special tokens by their names."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self._texts: dict[int, str] = {token: text for text, token in tokenizer.special_tokens.items()}

    def __call__(self, token: int) -> str:
        """The text of one token; "" for an id that is not in the vocabulary."""
        text = self._texts.get(token)
        if text is None:
            once, twice = (self.tokenizer.decode([token] * times, skip_unknown=True) for times in (1, 2))
            text = self._texts[token] = twice.removeprefix(once)
        return text


@dataclass(frozen=True)
class TextOptions:
    """What is text of a completion. stop_ids: that end one. skip_special_tokens: leave them out. include_stop: what
    ended the completion, a stop text or a token, is part of its text."""

    tokenizer: Tokenizer
    stops: Sequence[str]
    stop_ids: frozenset[int]
    skip_special_tokens: bool = True
    include_stop: bool = False

    def decode(self, ids: list[int]) -> str:
        """The text of some tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens=self.skip_special_tokens, skip_unknown=True)

    def text(self, completion: Completion) -> str:
        """The text of a completion that is done."""
        if self.skip_special_tokens and not self.include_stop:
            return completion.text
        ids = completion.token_ids
        if completion.finish_reason != "stop":
            return self.decode(ids)
        if ids[-1] in self.stop_ids:
            return self.decode(ids if self.include_stop else ids[:-1])
        text = self.decode(ids)
        start, stop = max((text.rfind(stop), stop) for stop in self.stops)  # the one that ended it stands last
        return text[: start + len(stop) if self.include_stop else start]

    def stop_reason(self, completion: Completion) -> str | int | None:
        """The stop text or the id that ended a completion; None for one of the model's own ids, and at its length."""
        if completion.finish_reason != "stop":
            return None
        last = completion.token_ids[-1]
        if last in self.stop_ids:
            return None if last in self.tokenizer.stop_token_ids else last
        text = self.decode(completion.token_ids)
        return max((text.rfind(stop), stop) for stop in self.stops)[1]


class TextStream:
    """The text of a growing completion, piece by piece: what no later token changes or cuts off."""

    def __init__(self, options: TextOptions):
        self.options = options
        self.sent = 0  # characters
        self._detokenizer = Detokenizer(options.decode, options.stops)

    def add(self, token_ids: Sequence[int]) -> str:
        """The text that is certain after these tokens, as far as it is new."""
        for token in token_ids:
            self._detokenizer.add(token)
        return self._new(self._detokenizer.text[: self._detokenizer.stable_chars()])

    def finish(self, completion: Completion) -> str:
        """The rest of the text of a completion that is done."""
        return self._new(self.options.text(completion))

    def _new(self, text: str) -> str:
        new = text[self.sent :]
        self.sent = max(self.sent, len(text))
        return new
