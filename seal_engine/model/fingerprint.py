"""What tells one checkpoint from another without reading all of it."""

import hashlib
import os
from pathlib import Path

from seal_engine.model.gguf import is_gguf

MEGABYTE = 1 << 20
MODEL_FILES: tuple[str, ...] = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "chat_template.jinja", "chat_template.json",
)  # fmt: skip


def fingerprint(model: Path) -> dict[str, str]:
    """What tells this checkpoint from another: small files whole, of large ones the size and both ends.

    All files count that decide a number: weights, configs, and whatever the tokenizer and its chat templates read.
    """
    if is_gguf(model):
        return {"model.gguf": _ends_digest(model)}
    found = dict.fromkeys(MODEL_FILES, "absent")
    for pattern in (*MODEL_FILES, "*.safetensors", "additional_chat_templates/*.jinja"):
        for file in sorted(model.glob(pattern)):
            found[str(file.relative_to(model))] = _ends_digest(file)
    return found


def _ends_digest(file: Path) -> str:
    with file.open("rb") as stream:
        size = stream.seek(0, os.SEEK_END)
        parts = [str(size).encode()]
        for start in (0, max(0, size - MEGABYTE)):
            stream.seek(start)
            parts.append(stream.read(MEGABYTE))
    return hashlib.sha256(b"".join(parts)).hexdigest()
