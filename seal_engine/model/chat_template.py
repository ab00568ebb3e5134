"""Chat templates: the Jinja programs beside a tokenizer that write a chat as text.

Results are those of Hugging Face Transformers 5. A template is foreign code: it runs in a sandbox, meets only plain
values, and whatever it raises becomes an InputError.
"""

import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from seal_engine.files import read_json, read_text, show
from seal_engine.types import InputError

REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
TEMPLATE_PLACES = (
    "chat_template.jinja, additional_chat_templates/*.jinja, tokenizer_config.json's and chat_template.json's "
    "chat_template"
)
# Stand-ins for what a block writes, and a second for where the block writes the first: rare, and of the same kind.
OTHER_SPACES, OTHER_LETTERS = "\u2001\u2000", "\ue000\ue001"
# What becomes of a {% generation %} block's text. It is no variable, so that no template can see it.
_block_writer: ContextVar[Callable[[str], str]] = ContextVar("_block_writer", default=str)
# Arguments of Transformers' apply_chat_template that are not the template's: here, they would be lost in it.
TRANSFORMERS_ARGUMENTS = (
    *("padding", "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask"),
    *("tokenizer_kwargs", "sanitize_control_tokens"),
)


def read_chat_templates(directory: Path, config: dict[str, Any]) -> dict[str, str]:
    """The chat templates by name, from the first of TEMPLATE_PLACES that has any (the .jinja files count as one)."""
    files = [directory / "chat_template.jinja", *sorted((directory / "additional_chat_templates").glob("*.jinja"))]
    texts = {"default" if file is files[0] else file.name.removesuffix(".jinja"): read_text(file) for file in files}
    if templates := {name: text for name, text in texts.items() if text is not None}:
        return templates
    config_file, json_file = directory / "tokenizer_config.json", directory / "chat_template.json"
    accepted = 'a string, or a list of objects with the strings "name" and "template"'
    for file, data in ((config_file, config), (json_file, read_json(json_file, required=False))):
        found = data.get("chat_template")
        if found is None:
            continue
        if not isinstance(found, str | list):
            raise InputError(f"{file}: chat_template: found {show(found)}; accepted: {accepted}")
        entries = [{"name": "default", "template": found}] if isinstance(found, str) else found
        for entry in entries:
            if not (isinstance(entry, dict) and all(isinstance(entry.get(k), str) for k in ("name", "template"))):
                raise InputError(f"{file}: chat_template: found {show(entry)} in the list; accepted: {accepted}")
        return {entry["name"]: entry["template"] for entry in entries}
    return {}


class _GenerationBlocks(Extension):
    """{% generation %} ... {% endgeneration %}: renders its body, as `_block_writer` writes it."""

    tags = {"generation"}  # noqa: RUF012  jinja2 declares it so

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body, lineno=line)

    def _mark(self, caller) -> str:
        return _block_writer.get()(caller())


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    # jinja2's own filter escapes HTML, which a prompt must not.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@lru_cache(maxsize=64)
def _compile(source: str) -> tuple[Template, bool]:
    """A template ready to render, in the sandbox and with the filters and functions that chat templates count on; and
    whether it has a {% generation %} block."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlocks, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        calls = environment.parse(source).find_all(nodes.ExtensionAttribute)
        marks = any(call.identifier == _GenerationBlocks.identifier for call in calls)
        return environment.from_string(source), marks
    except Exception as error:  # TemplateError, or what Python makes of the program that jinja2 writes
        raise InputError(f"chat_template: {type(error).__name__}: {error}") from error


def has_generation_blocks(templates: Mapping[str, str]) -> bool:
    """Whether the usual template has a {% generation %} block, so that a chat has a mask."""
    return "default" in templates and _compile(templates["default"])[1]


def render(
    templates: Mapping[str, str],
    messages: Sequence[Mapping[str, Any]],
    chat_template: str | None,
    tools: Sequence[Mapping[str, Any]] | None,
    variables: Mapping[str, Any],
    add_generation_prompt: bool = False,
    continue_final_message: bool | str = False,
    masked: bool = False,
) -> tuple[str, bytes]:
    """The chat as the template writes it, and with `masked` for each character 1 where a {% generation %} block wrote
    it, else 0.

    chat_template: a name in `templates` or a text; None: the usual one. continue_final_message: True or the field.
    """
    source = _choose_template(templates, chat_template, tools)
    if tools is not None and not (isinstance(tools, (list, tuple)) and all(isinstance(t, Mapping) for t in tools)):
        raise InputError(f"tools: found {show(tools)}; accepted: a list of JSON schemas, each a dict")
    for name in TRANSFORMERS_ARGUMENTS:
        if variables.get(name):
            raise InputError(f"{name}: found {show(variables[name])}; accepted: none: ids come as they are, in a list")
    plain = {name: _plain(value, name) for name, value in {"documents": None, **variables, "tools": tools}.items()}
    if continue_final_message and add_generation_prompt:
        raise InputError("continue_final_message: found with add_generation_prompt; accepted: one of the two")
    template, _ = _compile(source)
    chat = _check_messages(messages)
    end_marker = secrets.token_hex(16) + " "
    final_text = _append_to_final_message(chat, continue_final_message, source, end_marker)
    variables = {**plain, "messages": chat, "add_generation_prompt": add_generation_prompt}
    text = _rendered(template, variables, str)
    mask = _mask(template, variables, text) if masked else b""
    if final_text is not None:
        text = _cut_at_marker(text, end_marker, final_text)
    return text, mask[: len(text)]


def _rendered(template: Template, variables: Mapping[str, Any], block_writer: Callable[[str], str]) -> str:
    token = _block_writer.set(block_writer)
    try:
        return template.render(variables)
    except Exception as error:  # a template is foreign code: whatever it raises, it or the chat is at fault
        raise InputError(f"chat_template: {type(error).__name__}: {error}") from error
    finally:
        _block_writer.reset(token)


def _mask(template: Template, variables: Mapping[str, Any], text: str) -> bytes:
    """For each character of `text`, what the template renders, 1 where a {% generation %} block wrote it.

    A second rendering has another character in place of each that a block writes: a space for a space, a letter for
    a letter, so that a template that trims or measures a block does as before.
    """
    blocks: list[str] = []

    def write(block: str) -> str:
        blocks.append(block)
        return "".join(map(_other_character, block))

    other = _rendered(template, variables, write)
    if not blocks:
        raise InputError("chat_template: no {% generation %} block was rendered; a mask needs at least one")
    pairs = list(zip(text, other, strict=False))
    if len(text) != len(other) or any(a != b and b not in OTHER_SPACES + OTHER_LETTERS for a, b in pairs):
        raise InputError(
            "chat_template: what it makes of a {% generation %} block depends on its text: no mask is known"
        )
    return bytes(a != b for a, b in pairs)


def _other_character(character: str) -> str:
    pair = OTHER_SPACES if character.isspace() else OTHER_LETTERS
    return pair[1] if character == pair[0] else pair[0]


def _choose_template(templates: Mapping[str, str], chat_template: str | None, tools: Sequence[Mapping] | None) -> str:
    if chat_template is not None:
        if not isinstance(chat_template, str):
            raise InputError(f"chat_template: found {show(chat_template)}; accepted: a template's name or text")
        return templates.get(chat_template, chat_template)
    name = "tool_use" if tools is not None and "tool_use" in templates else "default"
    if name not in templates:
        found = f"none named default among {sorted(templates)}" if templates else "none"
        raise InputError(f"chat_template: found {found} in {TEMPLATE_PLACES}; accepted: one there or given")
    return templates[name]


def _plain(value: Any, name: str) -> Any:
    """`value` rebuilt from JSON's types: a template must meet no object whose methods the sandbox cannot judge."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)  # not str(value), which a subclass may answer otherwise
    if isinstance(value, (int, float)):
        return int(value) if isinstance(value, int) else float(value)
    if isinstance(value, Mapping):
        return {_plain(key, name): _plain(item, f"{name}[{key!r}]") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [_plain(item, f"{name}[{index}]") for index, item in enumerate(value)]
        return items if isinstance(value, list) else tuple(items)
    raise InputError(f"{name}: found {show(value)}; accepted: None, bool, str, int, float, and lists and dicts of them")


def _check_messages(messages: Any) -> list[dict[str, Any]]:
    """The chat as templates see it: of plain types, without keys whose value is None.

    Templates disagree on the name of a message's reasoning, so it is there as reasoning_content and as thinking.
    """
    if not isinstance(messages, (list, tuple)) or not messages:
        raise InputError(f"messages: found {show(messages)}; accepted: a list of at least one message")
    chat = []
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            accepted = 'a dict with the string "role"'
            raise InputError(f"messages[{index}]: found {show(message)}; accepted: {accepted}")
        fields = _plain({key: item for key, item in message.items() if item is not None}, f"messages[{index}]")
        reasoning = next((fields[name] for name in REASONING_FIELDS if name in fields), None)
        if reasoning is not None:
            fields = {"thinking": reasoning} | fields | {"reasoning_content": reasoning}
        chat.append(fields)
    return chat


def _append_to_final_message(
    chat: list[dict[str, Any]], continued: bool | str, source: str, end_marker: str
) -> str | None:
    """Put `end_marker` behind the text that the continued field of the last message ends with; return that text."""
    if not continued:
        return None
    if not isinstance(continued, bool | str):
        raise InputError(f"continue_final_message: found {show(continued)}; accepted: true, false or a field's name")
    name, last = continued if isinstance(continued, str) else "content", chat[-1]
    content = last.get(name)
    # The reasoning is there under several names; the template reads one of them.
    names = [n for n in REASONING_FIELDS if last.get(n) == content] if name in REASONING_FIELDS else [name]
    if not any(n in source for n in names):
        raise InputError(f"continue_final_message: found {show(name)}, which the chat template does not read")
    if isinstance(content, str):
        last |= dict.fromkeys(names, content + end_marker)
        return content
    for part in reversed(content if isinstance(content, (list, tuple)) else ()):
        if isinstance(part, dict) and isinstance(part.get("text"), str):
            part["text"] += end_marker
            return part["text"].removesuffix(end_marker)
    accepted = "text, or a list with a text part, to continue"
    raise InputError(f"messages[{len(chat) - 1}][{name!r}]: found {show(content)}; accepted: {accepted}")


def _cut_at_marker(text: str, end_marker: str, final_text: str) -> str:
    """The rendered chat up to the end of its last message."""
    position = text.rfind(end_marker.strip())
    if position < 0 or final_text.strip() not in text:
        raise InputError(
            "continue_final_message: the chat template does not render the last message's content unchanged"
        )
    # Where the marker's trailing space is gone, the template trims content, and would have trimmed this one's end.
    trimmed = not text.startswith(end_marker, position)
    return text[:position].rstrip() if trimmed else text[:position]
