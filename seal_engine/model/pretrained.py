"""What comes with a model's weights: its tokenizer, the ids that end a text, its settings for sampling.

Two kinds of checkpoint offer the same: a Hugging Face directory, and a GGUF file, whose metadata has all of it.
"""

import shutil
from pathlib import Path
from typing import Any, Protocol

from seal_engine.files import read_json
from seal_engine.model.gguf import GGUFFile, is_gguf
from seal_engine.model.gguf_config import read_gguf_stop_ids
from seal_engine.model.gguf_tokenizer import read_gguf_tokenizer, tokenizer_files
from seal_engine.model.tokenizer import Tokenizer, read_stop_token_ids

# Patterns of what Transformers writes beside the weights: copied unchanged.
COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    "generation_config.json",
)


class Pretrained(Protocol):
    """A checkpoint, beside its weights."""

    path: Path

    @property
    def has_tokenizer(self) -> bool:
        """Whether text works: token ids always do."""
        ...

    def read_tokenizer(self) -> Tokenizer:
        """The tokenizer. InputError if it is missing or malformed."""
        ...

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """The ids that end a completion, as the configs name them."""
        ...

    def generation_config(self) -> tuple[str, dict[str, Any]]:
        """(name for errors, the contents of generation_config.json)."""
        ...

    def write_companions(self, directory: Path) -> None:
        """Write the files that Transformers reads beside the weights."""
        ...


def open_pretrained(path: Path) -> Pretrained:
    """The checkpoint at a path, of either kind."""
    return GGUFPretrained(path) if is_gguf(path) else PretrainedDirectory(path)


class PretrainedDirectory:
    """A Hugging Face checkpoint directory; its files are read when they are first needed."""

    def __init__(self, path: Path):
        self.path = path

    @property
    def has_tokenizer(self) -> bool:
        return (self.path / "tokenizer.json").exists()

    def read_tokenizer(self) -> Tokenizer:
        return Tokenizer.from_directory(self.path)

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        return tuple(read_stop_token_ids(self.path))

    def generation_config(self) -> tuple[str, dict[str, Any]]:
        file = self.path / "generation_config.json"
        return str(file), read_json(file, required=False)

    def write_companions(self, directory: Path) -> None:
        for file in (file for pattern in COMPANIONS for file in self.path.glob(pattern)):
            if file.is_file():
                copy = directory / file.relative_to(self.path)
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, copy)


class GGUFPretrained:
    """A GGUF file. It says nothing of sampling."""

    def __init__(self, path: Path):
        self.path = path
        file = GGUFFile(path)
        self._has_tokenizer = "tokenizer.ggml.model" in file.metadata
        self._stop_token_ids = tuple(read_gguf_stop_ids(file))

    @property
    def has_tokenizer(self) -> bool:
        return self._has_tokenizer

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        return self._stop_token_ids

    def read_tokenizer(self) -> Tokenizer:
        return read_gguf_tokenizer(GGUFFile(self.path))

    def generation_config(self) -> tuple[str, dict[str, Any]]:
        return str(self.path), {}

    def write_companions(self, directory: Path) -> None:
        if self.has_tokenizer:
            for name, text in tokenizer_files(self.read_tokenizer()).items():
                (directory / name).write_text(text, "utf-8")
