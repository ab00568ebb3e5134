"""Masks of chats: ids are always those of the chat without a mask, and 1 where a {% generation %} block wrote."""

import itertools

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from seal_engine.model.tokenizer import Tokenizer
from seal_engine.types import InputError

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
CHAT = [
    {"role": "user", "content": " hi "},
    {"role": "assistant", "content": "  hi  there\n", "reasoning_content": "why not"},
    {"role": "user", "content": "hi there"},
    {"role": "assistant", "content": "\u2001\u2000 \ue000 x\ue001 Ähm?"},
]
ANSWERS = [message["content"] for message in CHAT[1::2]]
SET = "{% set body %}{% generation %}{{ m.content }}{% endgeneration %}{% endset %}"
LOOP = "{% for m in messages %}<{{ m.role }}>#{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
ANSWER = "{% if m.role == 'user' %}{{ m.content }}{% else %}@{% endif %}"
# What a template does with a block: (template of one message, what the mask covers of an answer)
TEMPLATES = {
    "written as it is": ("{% generation %}{{ m.content }}{% endgeneration %}", str),
    "with a tag's own spaces": ("x\n{%- generation -%}\n {{ m.content }} {%- endgeneration -%}\n", str),
    "captured": (SET + "[{{ body }}]", str),
    "trimmed": (SET + "[{{ body | trim }}]", str.strip),
    "stripped by a method": (SET + "[{{ body.rstrip() }}]", str.rstrip),
    "measured": (SET + "{{ body | length }}:{{ body }}", str),
    "cut": (SET + "{{ body[2:6] }}", lambda text: text[2:6]),
    "in capitals": (SET + "{{ body | upper }}", str.upper),
    "centred": (SET + "{{ body | center(30) }}", str),
    "twice": (SET + "{{ body }}/{{ body }}", lambda text: text * 2),
    "in a macro": (
        "{% macro f(t) %}{% generation %}{{ t }}{% endgeneration %}{% endmacro %}{{ f(m.content) | trim }}", str.strip,
    ),
    "filtered": ("{% filter trim %}{% generation %}{{ m.content }}{% endgeneration %}{% endfilter %}", str.strip),
    "with an end": ("{% generation %}{{ m.content + '<|end|>' }}{% endgeneration %}\n", lambda text: text + "<|end|>"),
    "a block in a block": (
        "{% generation %}{{ m.content }}{% generation %}!{% endgeneration %}{% endgeneration %}",
        lambda text: text + "!",
    ),
    "looking for markers": (
        "{{ generation_marker }}{{ _block_writer }}{% generation %}{{ m.content }}{% endgeneration %}", str,
    ),
}  # fmt: skip


def one_message(text):
    return LOOP.replace("#", ANSWER.replace("@", text))


@pytest.fixture(scope="module")
def tokenizer():
    backend = Backend(models.BPE({c: i for i, c in enumerate(ALPHABET)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend, {"eos_token": "<|end|>"}, chat_templates={"default": "{{ messages[0].content }}"})


@pytest.mark.parametrize("label", TEMPLATES)
@pytest.mark.parametrize("arguments", [{}, {"add_generation_prompt": True}, {"style": "x"}], ids=str)
def test_a_mask_changes_no_token(tokenizer, label, arguments):
    template, covered = TEMPLATES[label]
    arguments = {"chat_template": one_message(template), **arguments}
    ids, mask = tokenizer.apply_chat_template_with_mask(CHAT, **arguments)
    assert ids == tokenizer.apply_chat_template(CHAT, **arguments)
    inside = [
        tokenizer.decode([i for i, _ in run])
        for m, run in itertools.groupby(zip(ids, mask, strict=True), lambda p: p[1])
        if m
    ]
    assert "".join(inside) == "".join(covered(answer) for answer in ANSWERS)


@pytest.mark.parametrize("continued", [True, "content", "reasoning_content", "thinking"])
@pytest.mark.parametrize("label", ["written as it is", "captured", "stripped by a method", "with an end"])
def test_a_mask_of_a_continued_message(tokenizer, label, continued):
    template = TEMPLATES[label][0].replace("m.content", "(m.reasoning_content or '') + '|' + m.content")
    arguments = {"chat_template": one_message(template), "continue_final_message": continued}
    ids, mask = tokenizer.apply_chat_template_with_mask(CHAT[:2], **arguments)
    assert ids == tokenizer.apply_chat_template(CHAT[:2], **arguments)
    written = "why not|  hi  there\n" if continued in (True, "content") else "why not"
    text = tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m])
    assert text == (written.rstrip() if label == "stripped by a method" else written)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("{% if body == '  hi  there\n' %}yes{% endif %}", "depends on its text"),
        ("{{ body | tojson }}", "depends on its text"),
        ("{{ body.split('\n') }}", "depends on its text"),
    ],
    ids=["compared", "escaped", "split"],
)
def test_no_mask_is_guessed(tokenizer, body, message):
    """Where the template reads what a block wrote, nobody knows which characters are the block's."""
    with pytest.raises(InputError, match=message):
        tokenizer.apply_chat_template_with_mask(CHAT, chat_template=one_message(SET + body))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokenize": False}, "tokenize: found bool False"),
        ({"add_generation_prompt": True, "continue_final_message": True}, "continue_final_message: found with"),
        (
            {"continue_final_message": "name"},
            "continue_final_message: found str 'name', which the chat template does not",
        ),
        ({"continue_final_message": 1}, "continue_final_message: found int 1"),
        ({"continue_final_message": ["content"]}, "continue_final_message: found list"),
        ({"continue_final_message": "role_"}, "continue_final_message: found str 'role_'"),
        ({"return_tensors": "pt"}, "return_tensors: found str 'pt'"),
        ({"padding": True}, "padding: found bool True"),
        ({"max_length": 5}, "max_length: found int 5"),
        ({"return_assistant_tokens_mask": True}, "return_assistant_tokens_mask: found"),
    ],
    ids=str,
)
def test_arguments_are_honoured_or_refused(tokenizer, arguments, message):
    template = one_message(TEMPLATES["written as it is"][0])
    with pytest.raises(InputError, match=message):
        tokenizer.apply_chat_template_with_mask(CHAT, chat_template=template, **arguments)
    if "tokenize" not in arguments:
        with pytest.raises(InputError, match=message):
            tokenizer.apply_chat_template(CHAT, chat_template=template, **arguments)


def test_a_field_that_the_last_message_lacks(tokenizer):
    template = "{% for m in messages %}{{ m.reasoning_content }}{{ m.content }}{% endfor %}"
    with pytest.raises(InputError, match=r"messages\[0\]\['reasoning_content'\]: found NoneType None"):
        tokenizer.apply_chat_template(CHAT[:1], chat_template=template, continue_final_message="reasoning_content")


TAGS = {
    "{% generation %}x{% endgeneration %}": True,
    "{%- generation -%}x{%- endgeneration -%}": True,
    "{%generation%}x{%endgeneration%}": True,
    "{% if false %}{% generation %}x{% endgeneration %}{% endif %}": True,
    "{% macro f() %}{% generation %}x{% endgeneration %}{% endmacro %}": True,
    "{% if add_generation_prompt %}<assistant>{% endif %}": False,
    "{# {% generation %} #}": False,
    "{{ '{% generation %}' }}": False,
    "{% raw %}{% generation %}{% endraw %}": False,
    "{% set generation = 1 %}{{ generation }}": False,
    "{{ messages[0].generation }}": False,
}


@pytest.mark.parametrize("template", TAGS)
def test_the_tag_is_found_by_jinjas_parser(tokenizer, template):
    marked = Tokenizer(tokenizer._backend, {}, chat_templates={"default": template})
    assert marked.has_generation_blocks == TAGS[template]
    assert not Tokenizer(tokenizer._backend, {}, chat_templates={"other": template}).has_generation_blocks
