"""The few-shot self-edit's JSON: what is read, and why anything else is refused."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seal_engine.domains.few_shot.directive import ChoiceError, Directive, DirectiveError, NoJSONError, parse

DOCUMENT: dict[str, dict[str, Any]] = {
    "data_generation": {
        "use_basic_augmentations": True,
        "use_size_augmentations": False,
        "use_chain_augmentations": True,
        "use_repeat_augmentations": False,
    },
    "training": {"strategy": "train_using_output_tokens", "learning_rate": 1e-4, "num_train_epochs": 2},
}
TEXT = json.dumps(DOCUMENT)
DIRECTIVE = Directive(True, False, True, False, "train_using_output_tokens", 1e-4, 2)


def changed(part: str, name: str, value: Any = ...) -> str:
    """The JSON with one value in place of another, or without it."""
    inner = {key: one for key, one in DOCUMENT[part].items() if key != name} | ({} if value is ... else {name: value})
    return json.dumps({**DOCUMENT, part: inner})


@pytest.mark.parametrize(
    "text",
    [
        TEXT,
        f"\n {json.dumps(DOCUMENT, indent=4)}\n\n",
        f"```json\n{TEXT}\n```",
        f"```\n{json.dumps(DOCUMENT, indent=2)}\n```\n",
        json.dumps(dict(reversed(DOCUMENT.items()))),
        TEXT.replace("0.0001", "1E-4"),
    ],
)
def test_what_is_read(text):
    assert parse(text) == DIRECTIVE
    assert not parse(text).all_tokens


def test_equal_ones_are_equal():
    whole = parse(changed("training", "learning_rate", 1))
    assert whole == parse(changed("training", "learning_rate", 1.0))
    assert whole.to_json() == parse(changed("training", "learning_rate", 1.0)).to_json()
    assert len({DIRECTIVE, parse(TEXT), whole}) == 2
    assert parse(changed("training", "strategy", "train_using_all_tokens")).all_tokens
    assert DIRECTIVE.to_json() == TEXT


DIRECTIVES = st.builds(
    Directive,
    *[st.booleans()] * 4,
    st.sampled_from(["train_using_all_tokens", "train_using_output_tokens"]),
    st.floats(0, 1, exclude_min=True),
    st.integers(1, 375),
)


@given(directive=DIRECTIVES)
def test_any_directive_is_read_back(directive):
    assert parse(directive.to_json()) == directive


NO_JSON = {
    "": "not JSON: Expecting value",
    "none": "not JSON: Expecting value",
    TEXT[:-1]: "not JSON: Expecting ',' delimiter",
    f"Sure: {TEXT}": "not JSON: Expecting value",
    f"{TEXT} That is it.": "not JSON: Extra data",
    f"{TEXT}\n{TEXT}": "not JSON: Extra data",
    f"```json\n{TEXT}": "not JSON: Expecting value",
    f"```python\n{TEXT}\n```": "not JSON: Expecting value",
    f"```json\n{TEXT}\n```\nDone.": "not JSON: Expecting value",
    TEXT.replace("true", "True"): "not JSON: Expecting value",
    TEXT.replace('"', "'"): "not JSON: Expecting property name",
    TEXT.replace("0.0001", "NaN"): "not JSON: NaN is no number",
    TEXT.replace("0.0001", "-Infinity"): "not JSON: -Infinity is no number",
    TEXT.replace("0.0001", "9" * 5000): "not JSON: Exceeds the limit",
    TEXT.replace("0.0001", ".0001"): "not JSON: Expecting value",
    TEXT.replace("}}", ',"strategy": "train_using_all_tokens"}}'): "not JSON: the key 'strategy' twice in one object",
    "[" * 10**5: "not JSON: ",
    "[]": r"found list \[\]; accepted: one JSON object",
    "null": "found NoneType None; accepted: one JSON object",
    f"[{TEXT}]": "found list .*; accepted: one JSON object",
}


@pytest.mark.parametrize("text", NO_JSON, ids=lambda text: text[:20])
def test_what_is_no_json_object(text):
    with pytest.raises(NoJSONError, match=f"^{NO_JSON[text]}"):
        parse(text)


BASIC = "use_basic_augmentations"
CHOICES = [
    ("{}", "directive: found no data_generation; accepted: data_generation, training, and nothing else"),
    (json.dumps({"data_generation": DOCUMENT["data_generation"]}), "directive: found no training"),
    (
        json.dumps({**DOCUMENT, "reason": ""}),
        "directive: found the key str 'reason'; accepted: data_gen",
    ),
    (json.dumps(DOCUMENT["data_generation"] | DOCUMENT["training"]), "directive: found no data_generation"),
    (json.dumps({**DOCUMENT, "training": []}), r"training: found list \[\]; accepted: an object"),
    (json.dumps({**DOCUMENT, "data_generation": None}), "data_generation: found NoneType None; accepted: an object"),
    (changed("data_generation", BASIC), f"data_generation: found no {BASIC}; accepted: {BASIC}, .*nothing else"),
    (changed("data_generation", "use_all", True), "data_generation: found the key str 'use_all'"),
    (changed("data_generation", BASIC, "true"), f"{BASIC}: found str 'true'; accepted: true or false"),
    (changed("data_generation", BASIC, 1), f"{BASIC}: found int 1; accepted: true or false"),
    (changed("data_generation", BASIC, None), f"{BASIC}: found NoneType None; accepted: true or false"),
    (changed("training", "strategy"), "training: found no strategy; accepted: strategy, learning_rate"),
    (changed("training", "strategy", "all"), "strategy: found str 'all'; accepted: train_using_all_tokens or train_"),
    (changed("training", "strategy", ["train_using_all_tokens"]), "strategy: found list"),
    (changed("training", "learning_rate", "1e-4"), "learning_rate: found str '1e-4'; accepted: a number above 0"),
    (changed("training", "learning_rate", True), "learning_rate: found bool True"),
    (changed("training", "learning_rate", 0), "learning_rate: found int 0; accepted: a number above 0, at most 1"),
    (changed("training", "learning_rate", -1e-4), "learning_rate: found float -0.0001"),
    (changed("training", "learning_rate", 1.5), "learning_rate: found float 1.5"),
    (TEXT.replace("0.0001", "1e999"), "learning_rate: found float inf"),
    (changed("training", "learning_rate", 10**400), "learning_rate: found int 1000"),
    (changed("training", "num_train_epochs", 2.0), "num_train_epochs: found float 2.0; accepted: an integer 1 to 375"),
    (changed("training", "num_train_epochs", 0), "num_train_epochs: found int 0"),
    (changed("training", "num_train_epochs", 376), "num_train_epochs: found int 376"),
    (changed("training", "num_train_epochs", True), "num_train_epochs: found bool True"),
    (changed("training", "num_train_epochs", "2"), "num_train_epochs: found str '2'"),
    (changed("training", "optimizer", "sgd"), "training: found the key str 'optimizer'"),
]


@pytest.mark.parametrize(("text", "message"), CHOICES, ids=lambda text: text[:40])
def test_what_is_no_choice(text, message):
    with pytest.raises(ChoiceError, match=f"^{message}"):
        parse(text)


@given(text=st.one_of(st.text(), st.text(alphabet='{}[]":,0.1etrufals \n`')))
def test_any_text(text):
    """It is refused with a reason."""
    with pytest.raises(DirectiveError, match=r"\w"):
        parse(text)


@given(cut=st.integers(0, len(TEXT) - 1), insert=st.text(max_size=3))
def test_any_change_of_the_text(cut, insert):
    """What is read is a directive; what is not is refused, never anything else."""
    try:
        made = parse(TEXT[:cut] + insert + TEXT[cut + 1 :])
    except DirectiveError:
        return
    assert parse(made.to_json()) == made
