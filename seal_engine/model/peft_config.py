"""adapter_config.json as PEFT writes it: each field is read, has no say in the forward pass, or is refused.

A field that this module does not name is accepted only with a value that switches nothing on, so that whatever PEFT
adds later is refused instead of ignored.
"""

import re
from collections.abc import Mapping
from typing import Any

from seal_engine.files import show
from seal_engine.model.adapter_layout import check_pattern, projection_names
from seal_engine.model.config import ModelConfig
from seal_engine.types import InputError, LoraConfig

READ = frozenset(
    (
        *("peft_type", "bias", "init_lora_weights", "r", "lora_alpha", "lora_dropout", "use_rslora"),
        *("rank_pattern", "alpha_pattern", "target_modules", "exclude_modules", "layers_to_transform"),
        "layers_pattern",
    )
)
# Fields that PEFT's own reload of plain LoRA ignores: names, and settings of initialisations and methods that other
# fields, refused below, switch on.
IGNORED = frozenset(
    (
        *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
        *("runtime_config", "fan_in_fan_out", "ensure_weight_tying", "megatron_core", "qalora_group_size"),
        *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    )
)
NEUTRAL = (None, False, "", [], {})
# Initialisations that leave the base weights as they are. PEFT repeats the others (PiSSA, OLoRA, CorDA, LoftQ,
# LoRA-GA) on the base whenever it loads the adapter.
INITIALISATIONS = (None, True, False, "gaussian", "orthogonal", "eva", "mica")
NOT_ADAPTED = ("model.embed_tokens", "lm_head")  # modules that PEFT adapts and this engine does not


def read_peft_config(raw: Mapping[str, Any], model: ModelConfig, source: str) -> LoraConfig:
    """The LoraConfig of a PEFT configuration, its targets resolved as PEFT resolves them on `model`.

    Raises InputError naming `source` and the field.
    """
    try:
        _validate_fields(raw)
        config = LoraConfig(
            r=raw.get("r", 8),
            lora_alpha=raw.get("lora_alpha", 8),
            lora_dropout=raw.get("lora_dropout", 0.0),
            target_modules=_target_modules(raw, model),
            use_rslora=raw.get("use_rslora") is True,
            rank_pattern=raw.get("rank_pattern") or {},
            alpha_pattern=raw.get("alpha_pattern") or {},
        )
        for name in ("rank_pattern", "alpha_pattern"):
            check_pattern(getattr(config, name), f"lora.{name}")
        config.check()
    except InputError as error:
        raise InputError(f"{source}: {error}") from None
    return config


def _validate_fields(raw: Mapping[str, Any]) -> None:
    accepted = {
        "peft_type": ("LORA",),
        "bias": (None, "none"),
        "use_rslora": (None, True, False),
        "init_lora_weights": INITIALISATIONS,
    }
    for name, values in accepted.items():
        if raw.get(name) not in values:
            hint = ""
            if name == "init_lora_weights":
                hint = (
                    ": others change the base, too, and this file does not hold that change; PEFT's save_pretrained "
                    "with path_initial_model_for_weight_conversion writes an adapter of the unchanged base"
                )
            raise InputError(f"{name}: found {raw.get(name)!r:.80}; accepted: {_listed(values)}{hint}")
    for name, value in raw.items():
        if name not in READ | IGNORED and value not in NEUTRAL:
            raise InputError(f"{name}: found {value!r:.80}; accepted: null or false: this engine does not support it")


def _listed(values: tuple[Any, ...]) -> str:
    return " or ".join(repr(value) for value in values if value is not None)


def _target_modules(raw: Mapping[str, Any], model: ModelConfig) -> str | tuple[str, ...]:
    """The file's target_modules where they can stand as they are, else the full names of what PEFT would adapt."""
    targets = _names(raw, "target_modules", "names of projections")
    targets = ("q_proj", "v_proj") if targets is None else targets  # PEFT's for the architectures of this engine
    if not targets:
        raise InputError(f"target_modules: found {show(targets)}; accepted: names of projections")
    select = _Selection(raw, targets)
    names = projection_names(model)
    for name in NOT_ADAPTED:
        if select(name):
            raise InputError(f"target_modules: found {raw['target_modules']!r:.80}, which adapts {name}; not supported")
    selected = tuple(name for name in names if select(name))
    if not selected:
        raise InputError(f"target_modules: found {targets!r:.80}, which match no module of this model")
    narrowed = any(raw.get(name) not in NEUTRAL for name in ("exclude_modules", "layers_to_transform"))
    if narrowed or (not isinstance(targets, str) and any(not _ends(target, names) for target in targets)):
        return selected
    return targets


def _names(raw: Mapping[str, Any], field: str, accepted: str) -> str | tuple[str, ...] | None:
    """A pattern, or names as a tuple. PEFT holds names as a set, its files as a list."""
    value = raw.get(field)
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list | tuple | set) or not all(isinstance(name, str) for name in value):
        raise InputError(f"{field}: found {show(value)}; accepted: {accepted}")
    return tuple(sorted(value)) if isinstance(value, set) else tuple(value)


def _ends(target: str, names: tuple[str, ...]) -> bool:
    return any(name == target or name.endswith(f".{target}") for name in names)


class _Selection:
    """Whether PEFT adapts the module of a name: target_modules less exclude_modules, in layers_to_transform."""

    def __init__(self, raw: Mapping[str, Any], targets: str | tuple[str, ...]):
        self.targets = targets
        self.excluded = _names(raw, "exclude_modules", "null, a pattern or names of modules") or ()
        layers = raw.get("layers_to_transform")
        layers = [layers] if type(layers) is int else layers or []
        if not isinstance(layers, list | tuple) or any(type(layer) is not int for layer in layers):
            raise InputError(f"layers_to_transform: found {show(layers)}; accepted: null, a number or a list of them")
        self.layers = set(layers)
        patterns = _names(raw, "layers_pattern", "null, a name or names of lists of layers") or ()
        self.patterns = (patterns,) if isinstance(patterns, str) else patterns
        if self.layers and isinstance(targets, str):
            raise InputError(f"layers_to_transform: found {show(layers)} beside a pattern; accepted: a list of targets")
        if self.patterns and not self.layers:
            raise InputError(f"layers_pattern: found {show(patterns)}; accepted: only beside layers_to_transform")
        for field, value in (("target_modules", targets), ("exclude_modules", self.excluded)):
            if isinstance(value, str):
                _validate_pattern(field, value)
        for pattern in self.patterns:
            _validate_pattern("layers_pattern", pattern)

    def __call__(self, name: str) -> bool:
        if _matches(self.excluded, name):
            return False
        if self.targets == "all-linear":
            return name not in NOT_ADAPTED
        if not _matches(self.targets, name):
            return False
        return isinstance(self.targets, str) or name in self.targets or not self.layers or self._in_layers(name)

    def _in_layers(self, name: str) -> bool:
        for pattern in self.patterns or (r"[^.]*",):
            match = re.match(rf"(?:^|.*?\.){pattern}\.(?P<layer>\d+)\.", name)
            if match is not None:
                return int(match["layer"]) in self.layers
        return False


def _validate_pattern(field: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise InputError(f"{field}: found {pattern!r}, no regular expression: {error}") from None


def _matches(targets: str | tuple[str, ...], name: str) -> bool:
    """PEFT's rule: a string is a regular expression for the whole name, a list holds ends of names."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)
