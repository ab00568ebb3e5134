"""The verbs that need no loop: plan, train, generate."""

import argparse
import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from seal_engine.engine import Engine
from seal_engine.files import read_json, read_text
from seal_engine.forecast.forecast import Forecast, as_json, forecast_round
from seal_engine.forecast.published_round import MODEL, read_passages
from seal_engine.forecast.rates import GPUS
from seal_engine.model.config import DTYPES, ModelConfig
from seal_engine.model.gguf import GGUFFile, is_gguf
from seal_engine.model.gguf_config import read_gguf_config
from seal_engine.model.quantize import QUANTIZE, parse_quantize
from seal_engine.plan import RECOMPUTE, Plan, make_plan
from seal_engine.sampling.requests import RequestOutput, SamplingParams
from seal_engine.training.jobs import SCHEDULERS, TrainJob, TrainSequence
from seal_engine.types import InputError, LoraConfig, rename_field, renamed_errors, require

LINE_FIELDS = {"text": str, "messages": list, "prompt": str, "completion": str}  # of an object in a .jsonl file
LINES = "a text, a list of token ids, a chat, or an object with text, with messages, or with prompt and completion"
SAMPLING_FLAGS = {  # field of SamplingParams -> type and help
    "n": (int, "samples of each prompt"),
    "temperature": (float, "0: greedy"),
    "top_p": (float, "nucleus sampling probability"),
    "top_k": (int, "sample from this many most likely tokens; 0: from all"),
    "max_tokens": (int, "maximum length of a sample, in tokens"),
    "seed": (int, "random seed of every prompt"),
}
FLAGS = {name: f"--{name.replace('_', '-')}" for name in (*SAMPLING_FLAGS, "stop", "learning_rate", "batch_size")} | {
    "num_epochs": "--epochs",
    "lora.r": "--rank",
    "lora.lora_alpha": "--alpha",
    "lora.lora_dropout": "--dropout",
    "lora.target_modules": "--targets",
    "sequences": "--data",
}
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
    print(_plan_table(made, options.memory))
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


def _plan_table(made: Plan, memory_bytes: int) -> str:
    sizes = {
        "base weights": made.weights_bytes,
        "adapters": made.master_bytes,
        "their gradients": made.gradient_bytes,
        "their moments": made.moment_bytes,
        "activations": made.activation_bytes,
        "packed copies for sampling": made.packed_bytes,
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
        "Never yet held against a run on a GPU.",
    ]
    return "\n".join(lines)


def memory(text: str) -> int:
    """Bytes from "139GiB" (binary), "80GB" (decimal), "512M" (binary) or a plain number of bytes."""
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    units = {unit.lower(): size for unit, size in UNITS.items()}
    if not match or match[2].lower() not in units:
        raise argparse.ArgumentTypeError(f"found {text!r}; accepted: a size such as 139GiB, 80GB or 1000000000")
    return int(float(match[1]) * units[match[2].lower()])


def _model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="Hugging Face checkpoint, or a .gguf file", required=True, metavar="PATH")
    parser.add_argument("--device", help="auto, cpu, cuda or cuda:N (default: %(default)s)", default="auto")
    parser.add_argument("--dtype", help="of the weights (default: as the checkpoint says)", choices=sorted(DTYPES))
    quantize = "of the linears, while they are loaded (default: as the checkpoint has them)"
    parser.add_argument("--quantize", help=quantize, choices=QUANTIZE)
    parser.add_argument("--quiet", help="no progress bars, and no text but what --json gives", action="store_true")
    parser.add_argument("--json", help="add one JSON object as the last line of stdout", action="store_true")


def _engine(options: argparse.Namespace) -> Engine:
    return Engine.from_pretrained(options.model, options.device, options.dtype or "auto", quantize=options.quantize)


def train_arguments(parser: argparse.ArgumentParser) -> None:
    _model_arguments(parser)
    data = f"files, an adapter each: .jsonl (a line is {LINES}) or text (a sequence a line)"
    parser.add_argument("--data", help=data, required=True, nargs="+", metavar="FILE")
    parser.add_argument("--out", help="new directory: an adapter in PEFT's format for each file", required=True)
    for name, kind, default, text in (
        ("--rank", int, 32, "r"),
        ("--alpha", float, 64.0, "lora_alpha"),
        ("--dropout", float, 0.0, "lora_dropout"),
        ("--learning-rate", float, 1e-3, "of AdamW"),
        ("--epochs", int, 10, "over a file's sequences"),
        ("--batch-size", int, 1, "sequences in an optimizer step"),
        ("--seed", int, 0, "draws the adapter and shuffles each epoch"),
    ):
        parser.add_argument(name, type=kind, default=default, help=f"{text} (default: %(default)s)", metavar="X")
    schedule = "of the learning rate (default: %(default)s)"
    parser.add_argument("--lr-scheduler", choices=SCHEDULERS, default="linear", help=schedule)
    targets = "adapted projections, separated by commas, or all-linear (default: %(default)s)"
    parser.add_argument("--targets", default="q_proj,v_proj", metavar="NAMES", help=targets)
    parser.add_argument("--append-eos", action="store_true", help="sequences end with the end token")


def train(options: argparse.Namespace) -> None:
    """Train an adapter on each file, all at once."""
    files, out = [Path(name) for name in options.data], Path(options.out)
    if len({file.stem for file in files}) < len(files):
        raise InputError(f"--data: found {options.data}; accepted: files of different names, as adapters are named so")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"--out: {out} exists; accepted: a new or empty directory")
    whole = options.targets == "all-linear"
    targets = "all-linear" if whole else tuple(options.targets.split(","))
    jobs = [
        TrainJob(
            read_sequences(file),
            LoraConfig(options.rank, options.alpha, options.dropout, targets),
            options.learning_rate,
            options.lr_scheduler,
            num_epochs=options.epochs,
            batch_size=options.batch_size,
            seed=options.seed,
            append_eos=options.append_eos,
        )
        for file in files
    ]
    with renamed_errors(FLAGS):
        for job in jobs:
            job.check()
    engine = _engine(options)
    jobs = [replace(job, sequences=[_with_mask(sequence, engine) for sequence in job.sequences]) for job in jobs]
    report, failed = {}, []
    for file, result in zip(files, engine.train(jobs, progress=not options.quiet), strict=True):
        error = None if result.error is None else rename_field(result.error, FLAGS)
        if result.adapter is not None:
            try:
                result.adapter.save(out / file.stem)
            except InputError as failure:  # such as a full disk: the others may still be written
                error = str(failure)
        if error is not None:
            failed.append(f"{file}: {error}")
        loss = result.losses[-1] if result.losses else None
        report[str(file)] = {
            "steps": result.num_steps,
            "tokens": result.num_tokens,
            "loss": loss,
            "error": error,
        }
        if not options.quiet:
            shown = error or f"{result.num_steps} steps, {result.num_tokens} tokens, last loss {loss:.4f}"
            print(f"{file}: {shown}")
    if options.json:
        print(json.dumps({"out": str(out), "adapters": report}))
    if failed:
        raise InputError("; ".join(failed))


def read_sequences(file: Path) -> list[Any]:
    """Training sequences: each line of a text that is not blank, or of a .jsonl file the JSON value."""
    text = read_text(file)
    if text is None:
        raise InputError(f"{file}: missing")
    lines = [(i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise InputError(f"{file}: found no sequence; accepted: at least one line")
    return [_json_line(line, f"{file}: line {i}") if file.suffix == ".jsonl" else line for i, line in lines]


def _json_line(line: str, place: str) -> Any:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{place}: not JSON: {error}") from None
    if isinstance(value, str | list):
        return value
    given = value if isinstance(value, dict) else {}
    fields = {name: given[name] for name in LINE_FIELDS if given.get(name) is not None}
    valid = all(isinstance(field, LINE_FIELDS[name]) for name, field in fields.items())
    if not valid or set(fields) not in ({"text"}, {"messages"}, {"prompt", "completion"}):
        raise InputError(f"{place}: found {value!r:.80}; accepted: {LINES}")
    for name in ("tools", "chat_template_kwargs"):
        if given.get(name):  # other keys are columns of the data set; these change what is trained on
            raise InputError(f"{place}: {name}: found {given[name]!r:.80}; accepted: none")
    return fields if "prompt" in fields else next(iter(fields.values()))


def _with_mask(sequence: Any, engine: Engine) -> Any:
    """A pair of prompt and completion as tokens with a loss on the completion and the end; all else as it is."""
    if not isinstance(sequence, dict):
        return sequence
    prompt, rest = engine.tokenizer.encode_pair(sequence["prompt"], sequence["completion"])
    if engine.end_token_id is not None and (not rest or rest[-1] not in engine.stop_token_ids):
        rest.append(engine.end_token_id)
    return TrainSequence([*prompt, *rest], [0] * len(prompt) + [1] * len(rest))


def generate_arguments(parser: argparse.ArgumentParser) -> None:
    _model_arguments(parser)
    parser.add_argument("--prompt", help="a text to continue", action="append", default=[], metavar="TEXT")
    parser.add_argument("--prompts", help="file: a text a line, or .jsonl as for train", metavar="FILE")
    parser.add_argument("--adapter", help="PEFT directories: all prompts go to each", nargs="*", default=[])
    parser.add_argument("--chat", help="send prompts as a user's turn of the chat template", action="store_true")
    for name, (kind, text) in SAMPLING_FLAGS.items():
        default = getattr(SamplingParams, name)
        shown = "" if default is None else f" (default: {default})"
        parser.add_argument("--" + name.replace("_", "-"), type=kind, help=text + shown, metavar="X")
    parser.add_argument(
        "--sampling-defaults",
        choices=("vllm", "model"),
        default="vllm",
        help="where settings come from that are not given: the defaults above, or the model's generation_config.json",
    )
    parser.add_argument("--stop", help="text that ends a sample", action="append", metavar="TEXT")


def generate(options: argparse.Namespace) -> None:
    """Continue prompts with the base or with adapters, all at once."""
    prompts = [*options.prompt, *(read_sequences(Path(options.prompts)) if options.prompts else [])]
    if not prompts:
        raise InputError("--prompt: found none; accepted: at least one --prompt TEXT, or --prompts FILE")
    engine = _engine(options)
    given = {name: value for name in SAMPLING_FLAGS if (value := getattr(options, name)) is not None}
    if options.sampling_defaults == "model":
        defaults = engine.sampling_defaults()
        if not options.quiet:
            print(f"the model's own sampling defaults: {defaults}")
        given = defaults | given
    with renamed_errors(FLAGS):
        params = SamplingParams(stop=options.stop, **given)
    if options.chat:
        turns = [[{"role": "user", "content": p}] if isinstance(p, str) else p for p in prompts]
        prompts = [engine.tokenizer.apply_chat_template(turn, add_generation_prompt=True) for turn in turns]
    adapters = [engine.load_adapter(directory) for directory in options.adapter] or [None]
    names = options.adapter or [None]
    asked = [(prompt, name, adapter) for name, adapter in zip(names, adapters, strict=True) for prompt in prompts]
    progress = not options.quiet
    outputs = engine.generate([p for p, _, _ in asked], params, [a for _, _, a in asked], progress=progress)
    if not options.quiet:
        for (_, name, _), output in zip(asked, outputs, strict=True):
            print(_shown(output, name))
    if options.json:
        print(
            json.dumps({"outputs": [{"adapter": n, **asdict(o)} for (_, n, _), o in zip(asked, outputs, strict=True)]})
        )
    errors = [output.error for output in outputs if output.error]
    if errors:
        raise InputError(f"{len(errors)} of {len(outputs)} prompts failed: {errors[0]}")


def _shown(output: RequestOutput, adapter: str | None) -> str:
    prompt = output.prompt if output.prompt is not None else f"{len(output.prompt_token_ids)} token ids"
    lines = [f"--- {prompt}" + (f" [{adapter}]" if adapter else "")]
    lines += [output.error] if output.error else [sample.text for sample in output.outputs]
    return "\n".join(lines)
