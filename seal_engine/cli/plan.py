"""The verb that needs no weights: plan, of one step's memory and time or of a whole published round."""

import argparse
import json
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from seal_engine.files import read_json
from seal_engine.forecast.forecast import Forecast, as_json, forecast_round
from seal_engine.forecast.published_round import MODEL, read_passages
from seal_engine.forecast.rates import GPUS
from seal_engine.model.config import DTYPES, ModelConfig
from seal_engine.model.gguf import GGUFFile, is_gguf
from seal_engine.model.gguf_config import read_gguf_config
from seal_engine.model.quantize import QUANTIZE, parse_quantize
from seal_engine.plan import RECOMPUTE, Plan, make_plan
from seal_engine.types import InputError, LoraConfig, require

PLAN_DEFAULTS = {  # what a plan can be asked about, and a forecast cannot
    "rank": 8, "alpha": None, "targets": "q_proj,v_proj", "sequence_tokens": None, "adapters": None, "tokens": 8192,
    "dtype": None, "quantize": None, "cpu": False, "recompute": "auto",
}  # fmt: skip
UNITS = {"": 1, "B": 1} | {
    f"{prefix}{suffix}": base**power
    for power, prefix in enumerate("KMGT", 1)
    for suffix, base in (("iB", 1024), ("B", 1000), ("", 1024))
}


def plan_arguments(parser: argparse.ArgumentParser) -> None:
    def add(name: str, text: str, **kwargs: Any) -> None:
        shown = "" if kwargs.get("default") is None else " (default: %(default)s)"
        parser.add_argument(name, help=text + shown, **kwargs)

    add("--model", "checkpoint directory, a config.json or a .gguf file: weights are not read", metavar="PATH")
    add("--round", "forecast a whole published round on --gpu, of Qwen2.5-7B or --model", action="store_true")
    add("--gpu", "memory and rates of this GPU, in place of those below", choices=sorted(GPUS))
    add("--memory", "of the device: 139GiB, 80GB, or bytes", type=memory, metavar="SIZE")
    add("--rank", "r of each adapter", type=int, default=PLAN_DEFAULTS["rank"], metavar="N")
    add("--alpha", "lora_alpha (default: the rank)", type=float, metavar="X")
    targets = "adapted projections, separated by commas, or all-linear"
    add("--targets", targets, default=PLAN_DEFAULTS["targets"], metavar="NAMES")
    add("--sequence-tokens", "tokens an adapter trains on in one step", type=int, metavar="N")
    add("--adapters", "adapters to train (default: as many as fit)", type=int, metavar="N")
    add(
        "--tokens",
        "tokens in one step, of all adapters together",
        type=int,
        default=PLAN_DEFAULTS["tokens"],
        metavar="N",
    )
    add("--dtype", "of the base weights (default: as the config says)", choices=sorted(DTYPES))
    add("--quantize", "of the linears; docs/quantization.md (default: as the config says)", choices=QUANTIZE)
    add("--cpu", "plan for a CPU: activations are float32, and rates are a CPU's", action="store_true")
    rate = "FLOP/s of matrix products, as measured (default: 750e12, or 150e9 with --cpu)"
    add("--matrix-rate", rate, type=float, metavar="X")
    bandwidth = "bytes/s of memory, as measured (default: 4e12, or 20e9 with --cpu)"
    add("--bandwidth", bandwidth, type=float, metavar="X")
    add("--recompute", "what backward computes again", choices=("auto", *RECOMPUTE), default=PLAN_DEFAULTS["recompute"])
    add("--json", "add one JSON object as the last line of stdout", action="store_true")


def plan(options: argparse.Namespace) -> None:
    """Say how many adapters fit in memory at once, and how long a training step or a whole round takes."""
    _validate_plan_options(options)
    config = _read_config(options.model)
    if options.gpu is not None:
        gpu = GPUS[options.gpu]
        options.memory = options.memory or gpu.memory
        options.matrix_rate = options.matrix_rate or gpu.matrix_rate
        options.bandwidth = options.bandwidth or gpu.copy_rate
        if options.round:
            gpu = gpu._replace(memory=options.memory, matrix_rate=options.matrix_rate, copy_rate=options.bandwidth)
            made = forecast_round(config, gpu, read_passages())
            print(_forecast_table(made))
            if options.json:
                print(json.dumps(as_json(made)))
            return
    targets = options.targets if options.targets == "all-linear" else tuple(options.targets.split(","))
    alpha = options.rank if options.alpha is None else options.alpha
    made = make_plan(
        config,
        LoraConfig(r=options.rank, lora_alpha=alpha, target_modules=targets),
        options.memory,
        options.sequence_tokens,
        adapters=options.adapters,
        tokens=options.tokens,
        dtype=DTYPES.get(options.dtype),
        quantization=parse_quantize(options.quantize),
        cpu=options.cpu,
        recompute=options.recompute,
        matrix_rate=options.matrix_rate,
        bandwidth=options.bandwidth,
    )
    print(_plan_answer(made, config, options))
    print(_plan_table(made, options.memory))
    sequence_bytes = _kv_bytes(config, options)
    if made.kv_bytes < sequence_bytes:
        print(
            f"seal-engine: warning: no room for sampling: a sequence of {options.sequence_tokens} tokens takes "
            f"{sequence_bytes / 2**30:.2f} GiB of K/V cache, and {made.kv_bytes / 2**30:.2f} GiB are left; "
            "plan with fewer --adapters",
            file=sys.stderr,
        )
    if options.json:
        speed = {"step_seconds": made.step_seconds, "tokens_per_second": made.tokens / made.step_seconds}
        print(json.dumps({"memory_bytes": options.memory, **asdict(made), **speed}))


def _validate_plan_options(options: argparse.Namespace) -> None:
    """InputError for options that are missing, or that a forecast, whose adapters are published, has no use for."""
    memory_known = options.memory is not None or options.gpu is not None
    needed = {"--model": options.model, "--memory": memory_known or None, "--sequence-tokens": options.sequence_tokens}
    if options.round:
        needed = {"--gpu": options.gpu}
        for name, default in PLAN_DEFAULTS.items():
            value = getattr(options, name)
            require(
                value == default,
                f"--{name.replace('_', '-')}",
                value,
                "none with --round, whose settings are published",
            )
    missing = [name for name, value in needed.items() if value is None]
    if missing:
        raise InputError(f"the following arguments are required: {', '.join(missing)}; see seal-engine plan --help")


def _read_config(model: str | None) -> ModelConfig:
    """Of a checkpoint directory, a config.json or a GGUF file; None: of the published round's model."""
    if model is None:
        return ModelConfig.from_dict(MODEL)
    path = Path(model)
    if is_gguf(path):
        return read_gguf_config(GGUFFile(path))
    if path.suffix == ".json":
        return ModelConfig.from_dict(read_json(path), str(path))
    return ModelConfig.from_directory(path)


def _plan_answer(made: Plan, config: ModelConfig, options: argparse.Namespace) -> str:
    """What was asked, and what was assumed and why."""
    source = "the file" if options.model and is_gguf(Path(options.model)) else "config.json"
    dtype = options.dtype or str(config.dtype or torch.float32).removeprefix("torch.")
    why = "--dtype" if options.dtype else source if config.dtype else f"{source} names none"
    device = "CPU (--cpu)" if options.cpu else f"GPU ({f'--gpu {options.gpu}' if options.gpu else 'no --cpu'})"
    weights = f"base weights in {dtype} ({why})"
    quantization = parse_quantize(options.quantize)
    if quantization is not None:
        weights += f", linears in {quantization.kind} (--quantize)"
    elif config.quantization is not None:
        weights += f", linears in {config.quantization.kind} ({source})"
    count = f"{made.adapters} adapter{'s' if made.adapters > 1 else ''}"
    return (
        f"{count} in training at once, {made.tokens / made.step_seconds:,.0f} tokens a second, "
        f"limited by {made.limit}\nassumed: {device}, {weights}\n"
    )


def _kv_bytes(config: ModelConfig, options: argparse.Namespace) -> int:
    """Bytes of K/V cache of one sequence of --sequence-tokens."""
    base = DTYPES[options.dtype] if options.dtype else config.dtype or torch.float32
    dtype = torch.float32 if options.cpu else base
    return 2 * config.num_hidden_layers * config.key_value_size * options.sequence_tokens * dtype.itemsize


def _plan_table(made: Plan, memory_bytes: int) -> str:
    sizes = {
        "base weights": made.weights_bytes,
        "adapters": made.master_bytes,
        "their gradients": made.gradient_bytes,
        "their moments": made.moment_bytes,
        "activations": made.activation_bytes,
        "packed copies of weights": made.packed_bytes,
        "left for sampling": made.kv_bytes,
    }
    sizes["kept free"] = memory_bytes - sum(sizes.values())
    times = {
        "base products": made.matrix_seconds,
        "base weights read (meanwhile)": made.weight_bytes_seconds,
        "low-rank products": made.adapter_matrix_seconds,
        "adapters and moments read and written (meanwhile)": made.adapter_bytes_seconds,
        "whole step": made.step_seconds,
    }
    rows = [("Memory", "GiB"), *((name, f"{size / 2**30:.2f}") for name, size in sizes.items()), ("", "")]
    rows += [("Time", "ms"), *((name, f"{1000 * seconds:.3f}") for name, seconds in times.items()), ("", "")]
    rows += [
        ("adapters resident", f"{made.adapters}"),
        ("tokens a step", f"{made.tokens}"),
        ("tokens a second", f"{made.tokens / made.step_seconds:,.0f}"),
        ("recomputed in backward", made.recompute),
        ("limited by", made.limit),
    ]
    width = max(len(name) for name, _ in rows) + 2
    return "\n".join(f"{name:<{width}}{value:>12}".rstrip() for name, value in rows)


def _forecast_table(made: Forecast) -> str:
    lines = [f"{'Forecast':<46}{'s':>9}{'floor s':>9}{'share':>7}  limited by"]
    whole = made.rows[-1].seconds
    for row in made.rows:
        name = f"  {row.what}" if row.what else row.part
        share = f"{100 * row.seconds / whole:.1f}%"
        lines.append(f"{name:<46}{row.seconds:>9.2f}{row.floor_seconds:>9.2f}{share:>7}  {row.limit}")
    lines += [
        "",
        f"{made.training_passes} training passes, {made.sampling_steps} sampling steps; recomputed: {made.recompute}",
        f"adapters in training at once: at most {made.adapters_resident}, room for {made.adapters_planned};"
        f" moved to host memory: {made.adapters_offloaded}",
        f"blocks of K/V that fit: {made.kv_blocks}",
        "A run of ten passages on an H100 took longer than forecast: docs/benchmarks.md.",
    ]
    return "\n".join(lines)


def memory(text: str) -> int:
    """Bytes from "139GiB" (binary), "80GB" (decimal), "512M" (binary) or a plain number of bytes."""
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    units = {unit.lower(): size for unit, size in UNITS.items()}
    if not match or match[2].lower() not in units:
        raise argparse.ArgumentTypeError(f"found {text!r}; accepted: a size such as 139GiB, 80GB or 1000000000")
    return int(float(match[1]) * units[match[2].lower()])
