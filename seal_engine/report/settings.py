"""Settings of a run, and what it ran on: the end of its page."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from seal_engine.loop.settings import defaults_of
from seal_engine.report.html import NONE, cut, fold, table
from seal_engine.runs import TASKS, configs


def known_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults of the run's task, as they come back from a ledger; {} for a task that is not known."""
    defaults: dict[str, Any] = {}
    if config.get("task") in TASKS:
        for kind in configs(config["task"]):
            defaults |= defaults_of(kind)
        defaults |= TASKS[config["task"]].defaults
    return json.loads(json.dumps(defaults))  # tuples are lists


def settings_section(config: Mapping[str, Any]) -> str:
    """Those that differ from the task's defaults, and all others in a fold."""
    known = known_defaults(config)
    names = sorted(config.keys() - {"task", "sha256"})
    own = [name for name in names if name not in known or known[name] != config[name]]
    rest = [name for name in names if name not in own]
    parts = []
    if own:
        lines = [(name, shown_value(config[name]), shown_value(known[name]) if name in known else NONE) for name in own]
        parts.append("<h3>Settings that differ from the task's defaults</h3>\n")
        parts.append(table(("setting", "here", "default"), lines))
    if rest:
        lines = [(name, shown_value(config[name])) for name in rest]
        parts.append(fold("All other settings, at their defaults", table(("setting", "value"), lines)))
    if isinstance(config.get("sha256"), dict) and config["sha256"]:
        lines = [(name, shown_value(digest)) for name, digest in sorted(config["sha256"].items())]
        parts.append(fold("Files of data, prompts and templates", table(("file", "sha256"), lines)))
    return "".join(parts)


def environment_section(environments: Sequence[Mapping[str, str]]) -> str:
    """The environment of the run; where it went on in others, all of them side by side."""
    if not environments:
        return '<p class="note">The environment was not recorded.</p>\n'
    names = list(dict.fromkeys(name for one in environments for name in one))
    heads = ("", *(f"part {i}" for i in range(1, len(environments) + 1))) if len(environments) > 1 else ("", "")
    return table(heads, [(name, *(one.get(name, NONE) for one in environments)) for name in names])


def shown_value(value: Any) -> str:
    """A setting's value: text that can be seen as it is, all else as JSON."""
    plain = isinstance(value, str) and value.isprintable() and value.strip() == value != ""
    return cut(value if plain else json.dumps(value, ensure_ascii=False), 300)
