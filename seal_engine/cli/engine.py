"""The verbs that need a model and no loop: train, generate."""

import argparse
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from seal_engine.engine import Engine
from seal_engine.files import read_text
from seal_engine.model.config import DTYPES
from seal_engine.model.quantize import QUANTIZE
from seal_engine.sampling.requests import RequestOutput, SamplingParams
from seal_engine.training.jobs import SCHEDULERS, TrainJob, TrainSequence
from seal_engine.types import InputError, LoraConfig, rename_field, renamed_errors

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
ADAPTER_CONFIG = "adapter_config.json"  # a directory with it is an adapter in PEFT's format


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
        place = None
        if result.adapter is not None:
            try:
                result.adapter.save(out / file.stem)
                place = out / file.stem
            except InputError as failure:  # such as a full disk: the others may still be written
                error = str(failure)
        if error is not None:
            failed.append(f"{file}: {error}")
        first, last = (result.losses[0], result.losses[-1]) if result.losses else (None, None)
        report[str(file)] = {
            "adapter": None if place is None else str(place),
            "steps": result.num_steps,
            "tokens": result.num_tokens,
            "first_loss": first,
            "loss": last,
            "error": error,
        }
        if not options.quiet:
            work = f"{result.num_steps} steps, {result.num_tokens} tokens, loss {_losses(first, last)}"
            print(f"{file}: {error or f'{work}; adapter in {place}'}")
        if error is None and first is not None and last is not None and result.num_steps > 1 and not last < first:
            print(f"seal-engine: warning: {file}: nothing was learned: loss {_losses(first, last)}", file=sys.stderr)
    if options.json:
        print(json.dumps({"out": str(out), "adapters": report}))
    if failed:
        raise InputError("; ".join(failed))


def _losses(first: float | None, last: float | None) -> str:
    """The first loss and the last one."""
    return "none" if first is None or last is None else f"{first:.4f} to {last:.4f}"


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
        keys = f" with the keys {', '.join(map(repr, given))}" if given else ""
        raise InputError(f"{place}: found {value!r:.80}{keys}; accepted: {LINES}")
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
    directories = [str(_adapter_directory(Path(name))) for name in options.adapter]
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
    adapters = [engine.load_adapter(directory) for directory in directories] or [None]
    names = directories or [None]
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


def _adapter_directory(directory: Path) -> Path:
    """The directory of an adapter: the one that is named, or the only one in it, as `train` writes them."""
    if (directory / ADAPTER_CONFIG).exists():
        return directory
    inside = sorted(file.parent for file in directory.glob(f"*/{ADAPTER_CONFIG}"))
    if len(inside) > 1:
        names = ", ".join(map(str, inside))
        raise InputError(f"--adapter: found {len(inside)} adapters in {directory}; accepted: one of {names}")
    return inside[0] if inside else directory


def _shown(output: RequestOutput, adapter: str | None) -> str:
    prompt = output.prompt if output.prompt is not None else f"{len(output.prompt_token_ids)} token ids"
    lines = [f"--- {prompt}" + (f" [{adapter}]" if adapter else "")]
    lines += [output.error] if output.error else [sample.text for sample in output.outputs]
    return "\n".join(lines)
