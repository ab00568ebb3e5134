"""A small, fast engine for self-adapting language models. See README.md."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from seal_engine.api import *  # noqa: F403


def __getattr__(name: str) -> Any:
    """Import `api`, and torch with it, when a public name is first used: the command line sets threads before."""
    api = import_module("seal_engine.api")
    if name == "__all__" or name in api.__all__:
        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
