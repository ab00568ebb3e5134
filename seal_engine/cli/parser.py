"""The parser of every verb: mistakes are InputErrors of one line, with the name that was probably meant."""

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from seal_engine.errors import InputError, did_you_mean


class Parser(argparse.ArgumentParser):
    """An argument parser that takes no abbreviated flags and reports mistakes as InputError."""

    def __init__(self, **options: Any):
        """options: as of argparse.ArgumentParser."""
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        link = " See" if message.endswith("?") else "; see"
        raise InputError(f"{message}{link} {self.prog} --help")

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """As argparse's, but a parser refuses what it does not know itself, so that the verb's own help is named."""
        if args is not None and self._subparsers is None:
            self._validate_flags(args)
        options, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"{unknown[0]}: unknown argument")
        return options, unknown

    def _validate_flags(self, arguments: Sequence[str]) -> None:
        """InputError for the first unknown flag: before argparse misses the one that was meant."""
        for argument in arguments:
            if argument == "--":
                return
            flag = argument.partition("=")[0]
            is_flag = argument.startswith("--") and " " not in argument
            if is_flag and flag not in self._option_string_actions:
                shown = [f for f, action in self._option_string_actions.items() if action.help != argparse.SUPPRESS]
                self.error(f"{flag}: unknown flag{did_you_mean(flag, shown)}")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """As argparse's, with a suggestion: verbs, tasks and other choices have typos, too."""
        if action.choices is not None and value not in action.choices:
            names = list(map(str, action.choices))
            message = f"invalid choice: {value!r} (choose from {', '.join(names)}){did_you_mean(str(value), names)}"
            raise argparse.ArgumentError(action, message)
