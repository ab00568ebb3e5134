"""The tokenizer that a GGUF file's metadata describes: byte-level BPE with a named way to split text first.

Token ids are those of Transformers 5 reading the same file, but for control tokens that the byte alphabet cannot spell,
which Transformers drops, and which here keep their ids.
"""

import json
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors

from seal_engine.files import show
from seal_engine.model.gguf import GGUFFile
from seal_engine.model.gguf_config import read_gguf_stop_ids
from seal_engine.model.tokenizer import Tokenizer
from seal_engine.types import InputError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
SPECIAL_IDS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}  # *_token -> *_token_id of the file
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# How a text is split before merges, by tokenizer.ggml.pre; None: as GPT-2 splits it.
LLAMA3 = rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{REST}"
QWEN2 = rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{REST}"
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {
    "llama-bpe": LLAMA3,
    "llama-v3": LLAMA3,
    "llama3": LLAMA3,
    "smaug-bpe": LLAMA3,
    "qwen2": QWEN2,
    "deepseek-r1-qwen": QWEN2,
    "tekken": TEKKEN,
    "smollm": None,
    "gpt-2": None,
}


def read_gguf_tokenizer(file: GGUFFile) -> Tokenizer:
    """The tokenizer of a file. Raises InputError naming the key: missing, malformed, or a name that is not known."""
    kind = file.require("tokenizer.ggml.model", str)
    if kind != "gpt2":
        raise InputError(f"{file.path}: tokenizer.ggml.model: found {show(kind)}; accepted: 'gpt2' (byte-level BPE)")
    tokens, types = _vocabulary(file)
    backend = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, _merges(file, set(tokens))))
    backend.pre_tokenizer = _pre_tokenizer(file)
    backend.decoder = decoders.ByteLevel()
    special = _special_tokens(file, tokens)
    named = set(special.values())
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL or token in named]
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    whole = [token for token, kind in zip(tokens, types, strict=True) if kind == USER_DEFINED and token not in named]
    backend.add_tokens([AddedToken(token, normalized=False, special=False) for token in whole])
    backend.post_processor = _post_processor(file, special, backend)
    return Tokenizer(backend, special, read_gguf_stop_ids(file), _chat_templates(file))


def tokenizer_files(tokenizer: Tokenizer) -> dict[str, str]:
    """Names and texts of the files from which Transformers makes this tokenizer."""
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **tokenizer.special_tokens_map,
    }
    templates = [{"name": name, "template": text} for name, text in tokenizer.chat_templates.items()]
    if templates:
        config["chat_template"] = templates if len(templates) > 1 else templates[0]["template"]
    return {"tokenizer.json": tokenizer.to_json(), "tokenizer_config.json": json.dumps(config, indent=2) + "\n"}


def _vocabulary(file: GGUFFile) -> tuple[list[str], list[int]]:
    tokens = _texts(file, "tokenizer.ggml.tokens")
    if len(set(tokens)) < len(tokens):
        twice = next(token for i, token in enumerate(tokens) if token in tokens[:i])
        raise InputError(f"{file.path}: tokenizer.ggml.tokens: found {show(twice)} twice; accepted: each token once")
    types = file.get("tokenizer.ggml.token_type", list, [NORMAL] * len(tokens))
    if len(types) != len(tokens) or not set(types) <= set(range(NORMAL, BYTE + 1)):
        accepted = f"{len(tokens)} numbers from {NORMAL} to {BYTE}, one a token"
        raise InputError(f"{file.path}: tokenizer.ggml.token_type: found {show(types)}; accepted: {accepted}")
    return tokens, types


def _merges(file: GGUFFile, tokens: set[str]) -> list[tuple[str, str]]:
    merges = []
    for i, merge in enumerate(_texts(file, "tokenizer.ggml.merges")):
        left, _, right = merge.partition(" ")
        if not {left, right, left + right} <= tokens:
            accepted = "two tokens and a space between, which together are a token"
            raise InputError(f"{file.path}: tokenizer.ggml.merges[{i}]: found {show(merge)}; accepted: {accepted}")
        merges.append((left, right))
    return merges


def _texts(file: GGUFFile, key: str) -> list[str]:
    values = file.require(key, list)
    if not all(isinstance(value, str) for value in values):
        raise InputError(f"{file.path}: {key}: found {show(values)}; accepted: an array of text")
    return values


def _pre_tokenizer(file: GGUFFile) -> pre_tokenizers.PreTokenizer:
    name = file.require("tokenizer.ggml.pre", str)
    if name not in SPLITS:
        accepted = f"one of {sorted(SPLITS)}"
        raise InputError(f"{file.path}: tokenizer.ggml.pre: found {show(name)}; accepted: {accepted}")
    split = SPLITS[name]
    if split is None:
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    steps = [
        pre_tokenizers.Split(Regex(split), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    return pre_tokenizers.Sequence(steps)


def _special_tokens(file: GGUFFile, tokens: list[str]) -> dict[str, str]:
    special = {}
    for name, stored in SPECIAL_IDS.items():
        key = f"tokenizer.ggml.{stored}_token_id"
        token_id = file.get(key, int)
        if token_id is None:
            continue
        if not 0 <= token_id < len(tokens):
            raise InputError(f"{file.path}: {key}: found {token_id}; accepted: 0 to {len(tokens) - 1}")
        special[f"{name}_token"] = tokens[token_id]
    return special


def _post_processor(
    file: GGUFFile, special: dict[str, str], backend: tokenizers.Tokenizer
) -> processors.PostProcessor | None:
    """Puts the bos before and the eos after a text, where the file says so."""
    added = {}
    for name in ("bos", "eos"):
        key = f"tokenizer.ggml.add_{name}_token"
        if file.get(key, bool, False):
            if f"{name}_token" not in special:
                raise InputError(f"{file.path}: {key}: found True without tokenizer.ggml.{name}_token_id")
            added[name] = special[f"{name}_token"]
    if not added:
        return processors.ByteLevel(trim_offsets=False)
    single = [piece for piece in (added.get("bos"), "$A", added.get("eos")) if piece is not None]
    ids = [(token, backend.token_to_id(token)) for token in dict.fromkeys(added.values())]
    return processors.TemplateProcessing(single=single, special_tokens=ids)


def _chat_templates(file: GGUFFile) -> dict[str, str]:
    """The usual template, and those of tokenizer.chat_template.NAME."""
    templates = {}
    for key in file.metadata:
        if key == "tokenizer.chat_template" or key.startswith("tokenizer.chat_template."):
            name = key.removeprefix("tokenizer.chat_template").removeprefix(".") or "default"
            templates[name] = file.require(key, str)
    return templates
