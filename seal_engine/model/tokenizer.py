"""Tokenizer: text to token ids and back, and chats through the model's own chat template.

The pipeline is the one tokenizer.json describes, run by the `tokenizers` library; the files beside it name the
special tokens, the ids that end a completion and the chat template. Results are those of PreTrainedTokenizerFast in
Hugging Face Transformers 5. Its LlamaTokenizer builds a pipeline of its own from the vocabulary, and so differs where
an older tokenizer.json puts a space before leading spaces or after special tokens; here tokenizer.json counts.
"""

import operator
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, overload

import tokenizers
from tokenizers import AddedToken

from seal_engine.files import read_json, read_text, show
from seal_engine.model.chat_template import has_generation_blocks, read_chat_templates, render
from seal_engine.types import InputError

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
TOKEN_FLAGS = ("lstrip", "rstrip", "normalized", "single_word", "special")
# What decoding undoes where tokenizer_config.json asks for clean_up_tokenization_spaces, in this order.
SPACE_CLEAN_UPS = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")


class Tokenizer:
    """A model directory's tokenizer. Make one with `Tokenizer.from_directory`.

    bos_token, eos_token, pad_token, unk_token        str, or None where the files name none
    bos_token_id, eos_token_id, pad_token_id          int, or None likewise
    special_tokens        dict of int: the ids of all special tokens, by their text
    special_tokens_map    dict of str: the special tokens by field name, as templates see them
    stop_token_ids        tuple of int: a completion ends at any of these: the configs' eos ids and eos_token_id
    vocab_size            int: entries in the vocabulary, added tokens among them
    chat_templates        dict of str: the chat templates by name; the usual one is "default"
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special_tokens_map: Mapping[str, str],
        stop_token_ids: Sequence[int] = (),
        chat_templates: Mapping[str, str] | None = None,
        clean_up_spaces: bool = False,
    ):
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._clean_up_spaces = clean_up_spaces
        self.special_tokens = {t.content: i for i, t in backend.get_added_tokens_decoder().items() if t.special}
        self._special_ids = set(self.special_tokens.values())
        self.special_tokens_map = dict(special_tokens_map)
        self.chat_templates = dict(chat_templates or {})
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)
        self.bos_token, self.eos_token, self.pad_token, self.unk_token = (
            special_tokens_map.get(f"{name}_token") for name in ("bos", "eos", "pad", "unk")
        )
        self.bos_token_id, self.eos_token_id, self.pad_token_id = (
            None if token is None else backend.token_to_id(token)
            for token in (self.bos_token, self.eos_token, self.pad_token)
        )
        own = () if self.eos_token_id is None else (self.eos_token_id,)
        self.stop_token_ids = tuple(dict.fromkeys((*stop_token_ids, *own)))

    @classmethod
    def from_directory(cls, path: str | Path) -> "Tokenizer":
        """Read tokenizer.json and, where they are present, the files beside it.

        Raises InputError for a missing tokenizer.json and for a malformed file, naming the file and the field.
        """
        directory = Path(path)
        if not os.path.isdir(directory):
            raise InputError(f"{directory}: not a directory; accepted: a model directory that holds tokenizer.json")
        file = directory / "tokenizer.json"
        if (text := read_text(file)) is None:
            raise InputError(f"{file}: no such file; accepted: a tokenizer.json of the tokenizers library")
        try:
            backend = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises bare Exception
            raise InputError(f"{file}: found {error}; accepted: a tokenizer.json of the tokenizers library") from None
        config_file = directory / "tokenizer_config.json"
        config = read_json(config_file, required=False)
        split = _field(config_file, config, "split_special_tokens", bool, "true or false")
        clean_up = _field(config_file, config, "clean_up_tokenization_spaces", bool, "true or false")
        backend.encode_special_tokens = bool(split)
        return cls(
            backend,
            _register_special_tokens(backend, directory, config),
            read_stop_token_ids(directory),
            read_chat_templates(directory, config),
            # With a BPE vocabulary, a space before punctuation is the text's own: Transformers leaves it there too.
            clean_up_spaces=bool(clean_up) and not isinstance(backend.model, tokenizers.models.BPE),
        )

    def to_json(self) -> str:
        """The contents of a tokenizer.json."""
        return self._backend.to_str(pretty=True)

    @property
    def chat_template(self) -> str | None:
        """The template named "default", or None."""
        return self.chat_templates.get("default")

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The token ids of `text`, with the special tokens that tokenizer.json puts around it unless told otherwise.

        Special tokens spelled out in the text become their ids. Unlike in Transformers, a text that already begins
        with the bos, as chat templates write it, gets no second, and one that has ended gets no further end. Raises
        InputError for what is not valid text.
        """
        if not add_special_tokens:
            return self._encode(text, add_special_tokens=False).ids
        before, ids, after = self._encode_parts(text)
        return before + ids + after

    def encode_pair(self, prompt: str, completion: str) -> tuple[list[int], list[int]]:
        """The token ids of a prompt and of its completion: together, what tokenizer.json puts around them as a text.

        The two are encoded apart, so that no token spans both.
        """
        before, ids, after = self._encode_parts(prompt)
        start, rest, end = self._encode_parts(completion)
        return (before if ids else start) + ids, rest + (end if rest else after)

    def _encode_parts(self, text: str) -> tuple[list[int], list[int], list[int]]:
        """The ids of `text`, between the special tokens to put before and after it (all before, if it is empty)."""
        encoding = self._encode(text, add_special_tokens=True)
        added, ids = encoding.special_tokens_mask, encoding.ids  # 1: added, not of the text
        if 0 not in added:
            return ids, [], []
        first, last = added.index(0), len(added) - added[::-1].index(0)
        before, ids, after = ids[:first], ids[first:last], ids[last:]
        begun, ended = ids[:1] == before[:1], ids[-1] in (*after[-1:], *self.stop_token_ids)
        return [] if begun else before, ids, [] if ended else after

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False, skip_unknown: bool = False) -> str:
        """The text of a list, tuple, one-dimensional tensor or array of token ids.

        skip_unknown: leave out ids that are not in the vocabulary: models may have more rows than there are tokens.
        Raises InputError for ids that are not whole numbers or, otherwise, not in the vocabulary.
        """
        tolist = getattr(ids, "tolist", None)  # tensors and arrays are slow to walk one element at a time
        try:
            token_ids = [operator.index(i) for i in (tolist() if tolist else ids)]
        except TypeError:
            raise InputError(f"ids: found {show(ids)}; accepted: a flat list of whole numbers") from None
        if skip_unknown:
            token_ids = [i for i in token_ids if self._backend.id_to_token(i) is not None]
        for position, token_id in enumerate(token_ids):
            if not 0 <= token_id < 2**32 or self._backend.id_to_token(token_id) is None:
                accepted = f"an id of the vocabulary, which has {self.vocab_size} tokens"
                raise InputError(f"ids[{position}]: found {token_id}; accepted: {accepted}")
        if skip_special_tokens:  # by id: the library goes by the token's text, which a normalizer may have changed
            token_ids = [i for i in token_ids if i not in self._special_ids]
        text = self._backend.decode(token_ids, skip_special_tokens=skip_special_tokens)
        if self._clean_up_spaces:
            for spaced in SPACE_CLEAN_UPS:
                text = text.replace(spaced, spaced.strip())
        return text

    def pieces(self, count: int) -> list[tuple[str, str]]:
        """For each id below count the text of that token alone, and what it adds to a text that has begun.

        Both are "" for special tokens and for ids that are not in the vocabulary.
        """
        ids = [[] if i in self._special_ids else [i] for i in range(count)]
        alone, twice = (self._backend.decode_batch([token * times for token in ids]) for times in (1, 2))
        return [(one, two.removeprefix(one)) for one, two in zip(alone, twice, strict=True)]

    @overload
    def apply_chat_template(
        self,
        messages: Sequence[Mapping],
        add_generation_prompt: bool = ...,
        tokenize: Literal[True] = ...,
        **kwargs: Any,
    ) -> list[int]: ...

    @overload
    def apply_chat_template(
        self,
        messages: Sequence[Mapping],
        add_generation_prompt: bool = ...,
        *,
        tokenize: Literal[False],
        **kwargs: Any,
    ) -> str: ...

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = False,
        tokenize: bool = True,
        continue_final_message: bool | str = False,
        chat_template: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **kwargs: Any,
    ) -> list[int] | str:
        """One conversation through the chat template: its token ids, or with tokenize=False its text.

        messages                 dicts with "role" and what else the template reads; keys with value None are dropped
        add_generation_prompt    end with the header of an assistant's answer
        continue_final_message   end inside the last message, for the model to go on with it: True, or the field
        chat_template            a template's name or its text, in place of the tokenizer's own
        tools                    JSON schemas; they select the template named "tool_use" where there is one
        kwargs                   further variables for the template; they override special tokens of the same name

        The ids are what Transformers 5 returns as `input_ids`. Raises InputError for a chat that is malformed or that
        the template refuses, and for a template that is absent, malformed or reaches outside the sandbox.
        """
        variables = self.special_tokens_map | kwargs
        text, _ = render(
            self.chat_templates,
            messages,
            chat_template,
            tools,
            variables,
            add_generation_prompt,
            continue_final_message,
        )
        return self._encode(text, add_special_tokens=False).ids if tokenize else text

    @property
    def has_generation_blocks(self) -> bool:
        """Whether the usual chat template marks what an assistant writes, so that a chat has a mask."""
        return has_generation_blocks(self.chat_templates)

    def apply_chat_template_with_mask(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = False,
        tokenize: bool = True,
        continue_final_message: bool | str = False,
        chat_template: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **kwargs: Any,
    ) -> tuple[list[int], list[int]]:
        """The token ids of a chat, and for each 1 where a {% generation %} block of the template wrote it, else 0.

        Takes and raises what `apply_chat_template` does, whose ids these are. InputError, too, for tokenize=False, and
        for a chat without a {% generation %} block or whose blocks the template works on.
        """
        if not tokenize:
            raise InputError(f"tokenize: found {show(tokenize)}; accepted: True: a mask is of tokens")
        text, inside = render(
            self.chat_templates,
            messages,
            chat_template,
            tools,
            self.special_tokens_map | kwargs,
            add_generation_prompt,
            continue_final_message,
            masked=True,
        )
        encoding = self._encode(text, add_special_tokens=False)
        # Some post-processors trim spaces off the offsets; a token that is all spaces keeps only its end.
        return encoding.ids, [int(any(inside[start - (start == end) : end])) for start, end in encoding.offsets]

    def _encode(self, text: str, add_special_tokens: bool) -> tokenizers.Encoding:
        if not isinstance(text, str):
            raise InputError(f"text: found {show(text)}; accepted: a str")
        try:
            return self._backend.encode(text, add_special_tokens=add_special_tokens)
        except TypeError:  # the library takes only what UTF-8 can write
            position = next(i for i, character in enumerate(text) if "\ud800" <= character <= "\udfff")
            found = f"a lone surrogate at character {position}"
            raise InputError(f"text: found {found}; accepted: text that UTF-8 can encode") from None


def _field(file: Path, data: Mapping[str, Any], name: str, kind: type | tuple[type, ...], accepted: str) -> Any:
    """data[name] if it is of `kind`; None where it is absent or null."""
    value = data.get(name)
    if value is not None and not isinstance(value, kind):
        raise InputError(f"{file}: {name}: found {show(value)}; accepted: {accepted}")
    return value


def _added_token(file: Path, name: str, value: Any, **forced: bool) -> AddedToken:
    """A token written as a string, or as an object of its content and how it is matched in text."""
    fields = {"content": value} if isinstance(value, str) else value
    try:
        flags = {flag: fields[flag] for flag in TOKEN_FLAGS if flag in fields}
        return AddedToken(fields["content"], **{**flags, **forced})
    except (TypeError, KeyError, ValueError):  # ValueError: text that UTF-8 cannot encode
        accepted = f"a string, or an object of content and the booleans {', '.join(TOKEN_FLAGS)}"
        raise InputError(f"{file}: {name}: found {show(value)}; accepted: {accepted}") from None


def _register_special_tokens(backend: tokenizers.Tokenizer, directory: Path, config: dict[str, Any]) -> dict[str, str]:
    """Make known to `backend` the tokens that tokenizer.json left out; return the named ones by field name.

    special_tokens_map.json overrides tokenizer_config.json, and added_tokens.json is read, but only beside the older
    kind of tokenizer_config.json that lists no added_tokens_decoder.
    """
    file, map_file = directory / "tokenizer_config.json", directory / "special_tokens_map.json"
    older = "added_tokens_decoder" not in config
    overrides = read_json(map_file, required=False) if older else {}
    sources = {name: (file, value) for name, value in config.items()}
    sources |= {name: (map_file, value) for name, value in overrides.items()}
    if backend.padding:
        sources.setdefault("pad_token", (directory / "tokenizer.json", backend.padding["pad_token"]))
    own = {name: (file, value) for name, value in config.items() if _is_named(name, value, dict)}
    own |= {name: (map_file, value) for name, value in overrides.items() if _is_named(name, value, str | dict)}
    own |= {name: (file, value) for name, value in config.items() if _is_named(name, value, str)}
    further: list[AddedToken] = []
    for name in ("extra_special_tokens", "additional_special_tokens"):
        source, value = sources.get(name, (file, None))
        _field(source, {name: value}, name, (list, dict), "a list of tokens, or an object of them by name")
        if isinstance(value, dict):
            own |= {key: (source, token) for key, token in value.items()}
        elif value and not further:
            further = [_added_token(source, name, token, special=True) for token in value]
    usual = {name: sources[name] for name in SPECIAL_TOKENS if name in sources and sources[name][1] is not None}
    named = {name: _added_token(source, name, value, special=True) for name, (source, value) in (usual | own).items()}

    known = backend.get_added_tokens_decoder()
    listed = _listed_tokens(file, config)
    if older:
        special = {token.content for token in (*(named[name] for name in usual), *further)}
        listed = _older_added_tokens(directory / "added_tokens.json", special) | known
    # In this order those that are new take the next ids; those that are known get these flags.
    added = [listed[token_id] for token_id in sorted(listed)]
    for token in added:
        token.special = token.special or token.content in {token.content for token in named.values()}
    contents = {token.content for token in (*known.values(), *added)}
    for token in (*named.values(), *further):
        if token.content not in contents:
            contents.add(token.content)
            added.append(token)
    backend.add_tokens(added)
    return {name: token.content for name, token in named.items()}


def _is_named(name: str, value: Any, kind: Any) -> bool:
    """Whether a field names a special token of the model's own, beside the usual seven, by a value of this kind."""
    return name.endswith("_token") and name not in SPECIAL_TOKENS and isinstance(value, kind)


def _listed_tokens(file: Path, config: dict[str, Any]) -> dict[int, AddedToken]:
    listed = _field(file, config, "added_tokens_decoder", dict, "an object of tokens by id") or {}
    if not all(token_id.isdecimal() and len(token_id) < 10 for token_id in listed):
        raise InputError(f"{file}: added_tokens_decoder: found {show(list(listed))}; accepted: ids as keys")
    return {int(token_id): _added_token(file, "added_tokens_decoder", token) for token_id, token in listed.items()}


def _older_added_tokens(file: Path, special: set[str]) -> dict[int, AddedToken]:
    """added_tokens.json: ids by token, as tokenizers before 2023 were saved."""
    listed = read_json(file, required=False)
    if not all(type(token_id) is int and 0 <= token_id < 2**32 for token_id in listed.values()):
        raise InputError(f"{file}: found {show(listed)}; accepted: an object of tokens and their ids")
    flags = {token: {"special": token in special, "normalized": token not in special} for token in listed}
    return {token_id: _added_token(file, token, token, **flags[token]) for token, token_id in listed.items()}


def read_stop_token_ids(directory: Path) -> list[int]:
    """The ids that generation_config.json and config.json name as eos_token_id, without repeats."""
    stop_ids: dict[int, None] = {}
    for name in ("generation_config.json", "config.json"):
        found = read_json(directory / name, required=False).get("eos_token_id")
        ids = found if isinstance(found, list) else [] if found is None else [found]
        if not all(type(token_id) is int and token_id >= 0 for token_id in ids):
            accepted = "a token id or a list of token ids"
            raise InputError(f"{directory / name}: eos_token_id: found {show(found)}; accepted: {accepted}")
        stop_ids |= dict.fromkeys(ids)
    return list(stop_ids)
