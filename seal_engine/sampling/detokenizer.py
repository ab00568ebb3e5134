"""Token ids to text, one token after the other."""

from collections.abc import Callable, Sequence

Decode = Callable[[list[int]], str]


class Detokenizer:
    """Text of a growing list of tokens, in time linear in them; text that may still change is held back."""

    def __init__(self, decode: Decode, stops: Sequence[str]):
        self.decode = decode
        self.stops = stops
        self.longest_stop = max(map(len, stops), default=0)
        self.ids: list[int] = []
        self.text = ""
        self.start = self.read = 0  # tokens from `start` on are decoded together; those before `read` are in the text

    def replay(self, ids: Sequence[int]) -> None:
        """Begin anew with these tokens, in which there is no stop text."""
        self.ids, self.text = [], ""
        self.start = self.read = 0
        for token in ids:
            self.add(token)

    def add(self, token: int) -> int | None:
        """Append a token. Returns where the first stop text begins, if the text holds one now."""
        self.ids.append(token)
        old_text, new_text = self.decode(self.ids[self.start : self.read]), self.decode(self.ids[self.start :])
        if len(new_text) <= len(old_text):
            return None
        search_from = max(0, len(self.text) - self.longest_stop)
        text = self.text + new_text[len(old_text) :]
        stop_positions = [text.find(stop, search_from) for stop in self.stops]
        stop_at = min((position for position in stop_positions if position >= 0), default=None)
        if stop_at is not None or not new_text.endswith("\ufffd"):  # which may be part of a character
            self.text = text
            self.start, self.read = self.read, len(self.ids)
        return stop_at

    def stable_chars(self) -> int:
        """Return how many characters of the text no stop text can cut off, whatever follows."""
        text = self.text
        for start in range(max(0, len(text) - self.longest_stop + 1), len(text)):
            if any(stop.startswith(text[start:]) for stop in self.stops):
                return start
        return len(text)
