"""The few-shot task's self-edit: a JSON object that chooses augmentations and hyper-parameters.

    {"data_generation": {"use_basic_augmentations": true, "use_size_augmentations": false,
                         "use_chain_augmentations": false, "use_repeat_augmentations": false},
     "training": {"strategy": "train_using_output_tokens", "learning_rate": 1e-4, "num_train_epochs": 2}}

White space around it and one Markdown fence around all of it are tolerated, as neither changes what is meant. Anything
else is rejected, with the reason: other text, an object cut short, a key too many, twice or too few, another type (true
is no number, 2.0 no integer, "true" no boolean), a number that is not finite or out of range.
"""

import json
from dataclasses import asdict, dataclass, fields
from typing import Any

from seal_engine.domains.templating import strip_fence
from seal_engine.files import show, strict_json
from seal_engine.types import is_integer, is_number

ALL_TOKENS, OUTPUT_TOKENS = STRATEGIES = ("train_using_all_tokens", "train_using_output_tokens")
MAX_EPOCHS = 375  # over two training tasks, in batches of two, this is the recipe's bound on steps


class DirectiveError(ValueError):
    """A self-edit that says nothing that can be done; the message says why."""


class NoJSONError(DirectiveError):
    """Its text is not one JSON object. The recipe samples another."""


class ChoiceError(DirectiveError):
    """It is a JSON object, but not of a choice that there is. The recipe trains nothing."""


@dataclass(frozen=True)
class Directive:
    """What a self-edit asks for. Equal ones ask for the same."""

    use_basic_augmentations: bool
    use_size_augmentations: bool
    use_chain_augmentations: bool
    use_repeat_augmentations: bool
    strategy: str
    learning_rate: float
    num_train_epochs: int

    def __post_init__(self):
        """Raises ChoiceError naming the field."""
        for name in DATA_GENERATION:
            _require(isinstance(getattr(self, name), bool), name, getattr(self, name), "true or false")
        _require(self.strategy in STRATEGIES, "strategy", self.strategy, " or ".join(STRATEGIES))
        rate, epochs = self.learning_rate, self.num_train_epochs
        _require(is_number(rate) and 0 < rate <= 1, "learning_rate", rate, "a number above 0, at most 1")
        wanted = is_integer(epochs) and 1 <= epochs <= MAX_EPOCHS
        _require(wanted, "num_train_epochs", epochs, f"an integer 1 to {MAX_EPOCHS}")
        object.__setattr__(self, "learning_rate", float(rate))  # 1 and 1.0 are the same, in to_json too

    @property
    def all_tokens(self) -> bool:
        """True if the loss is on all tokens, not only on the answer's."""
        return self.strategy == ALL_TOKENS

    def to_json(self) -> str:
        """Canonical: equal directives give equal text, which parse reads back."""
        values = asdict(self)
        return json.dumps({part: {name: values[name] for name in names} for part, names in SCHEMA.items()})


NAMES = tuple(field.name for field in fields(Directive))
DATA_GENERATION, TRAINING = NAMES[:4], NAMES[4:]
SCHEMA = {"data_generation": DATA_GENERATION, "training": TRAINING}


def parse(text: str) -> Directive:
    """The directive in a self-edit. Raises NoJSONError or ChoiceError, which are DirectiveErrors."""
    try:
        document = strict_json(strip_fence(text))
    except (ValueError, RecursionError) as error:
        raise NoJSONError(f"not JSON: {error}") from None
    if not isinstance(document, dict):
        raise NoJSONError(f"found {show(document)}; accepted: one JSON object")
    parts = _members(document, "directive", tuple(SCHEMA))
    values: dict[str, Any] = {}
    for part, names in SCHEMA.items():
        _require(isinstance(parts[part], dict), part, parts[part], "an object")
        values |= _members(parts[part], part, names)
    return Directive(**values)


def _members(found: dict[str, Any], place: str, names: tuple[str, ...]) -> dict[str, Any]:
    accepted = f"{', '.join(names)}, and nothing else"
    for name in names:
        if name not in found:
            raise ChoiceError(f"{place}: found no {name}; accepted: {accepted}")
    for name in found:
        if name not in names:
            raise ChoiceError(f"{place}: found the key {show(name)}; accepted: {accepted}")
    return found


def _require(condition: bool, place: str, found: Any, accepted: str) -> None:
    if not condition:
        raise ChoiceError(f"{place}: found {show(found)}; accepted: {accepted}")
