"""Sampling of directives alone: a token is drawn only where the text can still become one.

The text is what Directive.to_json writes, to the last space, and then the end token. Learning rates are at least 1e-99,
and may also be written as people do: 1, 1e-4, 2.50e-5. So a graph of characters, without circles, spells all texts, and
a token of any tokenizer is allowed where a path spells it. Which ones these are is found once for each node.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from seal_engine.domains.few_shot.directive import DATA_GENERATION, MAX_EPOCHS, NAMES, SCHEMA, STRATEGIES
from seal_engine.types import InputError, require

DIGITS = "0123456789"
FRACTION, SIGNIFICANT = 20, 16  # digits after the point that floats have at most: 0.000ddd..., d.ddd...e-05
NEVER = 1 << 30  # tokens

# What each character leads to. A node leads to nodes before it; the first one is the end.
NODES: list[dict[str, int]] = [{}]


def _node(after: Mapping[str, int]) -> int:
    NODES.append(dict(after))
    return len(NODES) - 1


def _text(text: str, then: int) -> int:
    for character in reversed(text):
        then = _node({character: then})
    return then


def _words(words: Sequence[str], then: int) -> int:
    """Any of the words."""
    firsts = dict.fromkeys(word[0] for word in words if word)
    after = {first: _words([word[1:] for word in words if word[:1] == first], then) for first in firsts}
    return _node(after | (NODES[then] if "" in words else {}))


def _fraction(most: int, then: dict[str, int], after_zeros: dict[str, int]) -> int:
    """One to `most` digits, and what may follow them; after_zeros: if all of them are 0."""
    zeros, digits = _node(after_zeros), _node(then)
    for i in reversed(range(most)):
        zeros, digits = (
            _node({"0": zeros} | dict.fromkeys(DIGITS[1:], digits) | (after_zeros if i else {})),
            _node(dict.fromkeys(DIGITS, digits) | then),
        )
    return zeros


def _learning_rate(then: int) -> int:
    after, small = NODES[then], {"e": _text("-", _words([f"{n:0{w}}" for w in (1, 2) for n in range(1, 10**w)], then))}
    below_one = _node({".": _fraction(FRACTION, after, {})})
    one = _node(after | small | {".": _fraction(SIGNIFICANT, small, after | small)})
    others = _node(small | {".": _fraction(SIGNIFICANT, small, small)})
    return _node({"0": below_one, "1": one} | dict.fromkeys(DIGITS[2:], others))


def _directive() -> int:
    values = dict.fromkeys(DATA_GENERATION, partial(_words, ("true", "false"))) | {
        "strategy": partial(_words, [json.dumps(one) for one in STRATEGIES]),
        "learning_rate": _learning_rate,
        "num_train_epochs": partial(_words, [str(n) for n in range(1, MAX_EPOCHS + 1)]),
    }
    blank = json.dumps({part: dict.fromkeys(names) for part, names in SCHEMA.items()})
    *texts, end = blank.split("null")
    node = _text(end, 0)
    for text, name in zip(reversed(texts), reversed(NAMES), strict=True):
        node = _text(text, values[name](node))
    return node


START = _directive()


class DirectiveGrammar:
    """A logits hook (see requests) under which every completion that ends is a directive, within max_tokens."""

    def __init__(self, pieces: Sequence[tuple[str, str]], stop_token_ids: Iterable[int], max_tokens: int):
        """pieces: see Tokenizer.pieces. InputError for a vocabulary, or a bound, with which there is no directive."""
        stops = [i for i in stop_token_ids if i < len(pieces)]
        if not stops:
            raise InputError("grammar: found a model without stop ids; accepted: one with some, to end a directive")
        self.max_tokens = max_tokens
        alone, added = dict[str, list[int]](), dict[str, list[int]]()
        for i, texts in enumerate(pieces):
            for text, known in zip(texts, (alone, added), strict=True):
                if i not in stops:
                    known.setdefault(text, []).append(i)
        further = _Vocabulary(added)
        self.steps = [dict.fromkeys(stops, 0)]  # of each node, and of the start: token -> node
        left = [1]  # tokens that it takes from there at least
        for node in range(1, len(NODES)):
            self.steps.append(further.spelt(node))
            left.append(1 + min((left[after] for after in self.steps[node].values()), default=NEVER))
        spaced = {text.removeprefix(" "): ids for text, ids in alone.items()}
        self.steps.append(_Vocabulary(alone).spelt(START) or _Vocabulary(spaced).spelt(START))
        least = 1 + min((left[after] for after in self.steps[-1].values()), default=NEVER)
        if least > NEVER:
            raise InputError("grammar: found a vocabulary that cannot spell a directive; accepted: one that can")
        require(max_tokens >= least, "max_tokens", max_tokens, f"at least {least}, which a directive takes")
        self.allowed = [
            (torch.tensor([*after], dtype=torch.long), torch.tensor([left[node] for node in after.values()]))
            for after in self.steps
        ]
        self.allowed[0][1].zero_()

    def __call__(self, tokens: list[int], logits: Tensor) -> Tensor:
        """The logits of what may come next; of all else -inf."""
        node = -1
        for token in tokens:
            node = self.steps[node][token]
        ids, left = self.allowed[node]
        ids = ids[left < self.max_tokens - len(tokens)].to(logits.device)
        return torch.full_like(logits, float("-inf")).index_copy_(0, ids, logits[ids])


class _Vocabulary:
    """Tokens by text."""

    def __init__(self, ids: Mapping[str, list[int]]):
        letters = {character for node in NODES for character in node}
        self.ids = {text: own for text, own in ids.items() if text and letters.issuperset(text)}
        self.beginnings = {text[:end] for text in self.ids for end in range(1, len(text) + 1)}

    def spelt(self, node: int) -> dict[int, int]:
        """The tokens that paths from a node spell, and where these lead."""
        found, paths = {}, [("", node)]
        while paths:
            text, node = paths.pop()
            found |= dict.fromkeys(self.ids.get(text, ()), node)
            paths += [(text + one, after) for one, after in NODES[node].items() if text + one in self.beginnings]
        return found
