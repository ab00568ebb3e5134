"""Token ids to text, one token after the other."""

from collections.abc import Callable, Sequence

Decode = Callable[[list[int]], str]


class Detokenizer:
    """Text of a growing list of tokens, in time linear in them; text that may still change is held back."""

    def __init__(self, decode: Decode, stops: Sequence[str]):
        self.decode = decode
        self.stops = stops
        self.ids: list[int] = []
        self.text = ""
        self.start = self.read = 0  # tokens from `start` on are decoded together; those before `read` are in the text

    def add(self, token: int) -> int | None:
        """Take in a token; returns where a stop text begins, if there is one now."""
        self.ids.append(token)
        known, now = self.decode(self.ids[self.start : self.read]), self.decode(self.ids[self.start :])
        if len(now) <= len(known):
            return None
        searched = max(0, len(self.text) - max(map(len, self.stops), default=0))
        text = self.text + now[len(known) :]
        found = [at for stop in self.stops if (at := text.find(stop, searched)) >= 0]
        if found or not now.endswith("\ufffd"):  # which may be part of a character
            self.text = text
            self.start, self.read = self.read, len(self.ids)
        return min(found, default=None)

    def safe(self) -> int:
        """How much of the text no stop text can cut off, whatever follows."""
        text = self.text
        for start in range(max(0, len(text) - max(map(len, self.stops), default=0) + 1), len(text)):
            if any(stop.startswith(text[start:]) for stop in self.stops):
                return start
        return len(text)
