"""Runs: a task, its configuration and a directory; started, gone on with, and summed up.

TASKS names what can be run. A run's directory holds its ledger (see ledger), from which `resume` needs nothing else,
and what the task writes when it is done.
"""

import hashlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from seal_engine.cluster.pool import Pool
from seal_engine.cluster.shares import record_workers
from seal_engine.domains.few_shot.puzzle_picture import write_puzzles
from seal_engine.domains.few_shot.submission import write_submission
from seal_engine.domains.few_shot.task import PUBLISHED, FewShot, FewShotConfig
from seal_engine.domains.knowledge.context_texts import write_contexts
from seal_engine.domains.knowledge.seal_files import write_result, write_sft
from seal_engine.domains.knowledge.task import Knowledge, KnowledgeConfig, validate_sizes
from seal_engine.engine import Engine
from seal_engine.environment import record_environment
from seal_engine.loop.config import LoopConfig
from seal_engine.loop.continual import Continual, validate_continual
from seal_engine.loop.continual_config import ContinualConfig
from seal_engine.loop.continual_results import read_result, write_summaries
from seal_engine.loop.continual_results import table as continual_table
from seal_engine.loop.inner import InnerLoop
from seal_engine.loop.ledger import Ledger
from seal_engine.loop.records import EVALUATION, ROUND, Phase
from seal_engine.loop.restem import CONTINUED_PRETRAINING, SELF_EDITS, ReSTEM, validate_run
from seal_engine.loop.settings import defaults_of, make, rename_old
from seal_engine.model.adapter_layout import adapter_layout
from seal_engine.model.fingerprint import fingerprint
from seal_engine.model.quantize import QUANTIZE
from seal_engine.progress import write_line
from seal_engine.real.conclusion import conclusion
from seal_engine.real.demo import REAL, RealPassages
from seal_engine.tiny.continual_demo import CONTINUAL_MINIATURE, make_continual_miniature
from seal_engine.tiny.demo import MINIATURE, make_miniature
from seal_engine.tiny.puzzle_demo import PUZZLE_MINIATURE, make_puzzle_miniature
from seal_engine.types import InputError, renamed_errors, require, setting

DTYPES = ("auto", "float32", "bfloat16", "float16")
FILES = (
    "data", "held_out_data", "probe_data", "prompt_template", "question_template", "reading_template", "grade_template",
    "self_edits_file", "challenges", "solutions", "held_out_challenges", "held_out_solutions",
    "few_shot_prompt_template", "example_template", "grid_template", "directive_template",
)  # fmt: skip


# Settings that change no result: a run may go on with other values.
MUTABLE = (
    "device",
    "workers",
    "ray_address",
    "max_ungraded",
    "endpoint",
    "endpoint_key_variable",
    "endpoint_concurrency",
    "endpoint_timeout",
    "endpoint_fields",
)
GROWING = ("rounds",)  # settings that may be larger when a run goes on


@dataclass(frozen=True)
class EngineConfig:
    """What runs the model."""

    model: str = setting("", "directory of a Hugging Face checkpoint, or a .gguf file")
    device: str = setting("auto", "auto, cpu, cuda or cuda:N")
    dtype: str = setting("auto", "of the weights", DTYPES)
    quantize: str = setting("none", "what linears are quantised to while they are loaded", ("none", *QUANTIZE))
    deterministic: bool = setting(False, "an adapter's bits do not depend on which others are trained with it")
    workers: int = setting(0, "engines that train and sample, each a process, on Ray (0: one, in this process)")
    ray_address: str = setting("", "Ray that workers run on: auto, HOST:PORT; without it one is started here")

    def __post_init__(self):
        require(self.workers >= 0, "workers", self.workers, "an integer >= 0")
        require(bool(self.model), "model", self.model, "the directory of a checkpoint")
        require(self.quantize in ("none", *QUANTIZE), "quantize", self.quantize, f"one of {['none', *QUANTIZE]}")


@dataclass(frozen=True)
class Loop:
    """What is done with a task: settings, their check, and the loop over (engine, domain, settings, ledger)."""

    config: type
    validate: Callable[[Any, Any], None]
    make: Callable[..., ReSTEM | Continual]


RESTEM = Loop(LoopConfig, validate_run, ReSTEM)
CONTINUAL = Loop(ContinualConfig, validate_continual, Continual)


@dataclass(frozen=True)
class Task:
    """Something that can be run. defaults: in place of the configurations' own. begin, finish: what is written before
    the loop and after it. conclude: says what a run shows."""

    config: type
    make: Callable[[Any, Engine], Any]
    finish: Callable[[Any, Ledger], None]
    defaults: Mapping[str, Any]
    summary: str
    loop: Loop = RESTEM
    begin: Callable[[Any, Ledger], None] = lambda domain, ledger: None
    conclude: Callable[[Ledger], str] | None = None


def write_passages(domain: Knowledge, ledger: Ledger) -> None:
    """What the report shows of passages and questions."""
    write_contexts(domain.passages, ledger.directory)


def write_seal_files(domain: Knowledge, ledger: Ledger) -> None:
    """SEAL's own files of every round: the result, and the self-edits that were kept."""
    for policy in ledger.policies():
        name, phase = f"seed-{policy.seed}-round-{policy.round}", f"round {policy.round}"
        write_result(ledger.directory / f"{name}.json", domain.result(ledger, policy.seed, policy.round))
        texts = {(edit.context, edit.index): edit.text for edit in ledger.self_edits(policy.seed, phase)}
        kept = [{"prompt": domain.prompt_text(c), "completion": texts[c, index].strip()} for c, index in policy.kept]
        write_sft(ledger.directory / f"{name}-kept.jsonl", kept)


def write_continual_files(domain: Knowledge, ledger: Ledger) -> None:
    """SEAL's summary file of every method."""
    write_summaries(ledger)


def write_arc_files(domain: FewShot, ledger: Ledger) -> None:
    """The picture of some puzzles, and ARC's submission file."""
    write_puzzles(domain, ledger)
    write_submission(domain, ledger)


TASKS = {
    "knowledge": Task(
        KnowledgeConfig, Knowledge, write_seal_files, {}, "learn passages, answer without them", begin=write_passages,
    ),
    "few-shot": Task(
        FewShotConfig, FewShot, write_arc_files, PUBLISHED,
        "learn to solve puzzles (ARC): self-edits choose augmentations and hyper-parameters",
    ),
    "miniature": Task(
        KnowledgeConfig, make_miniature, write_seal_files, MINIATURE,
        "knowledge with the shipped model, in a small world of invented people", begin=write_passages,
    ),
    "real-model": Task(
        KnowledgeConfig, RealPassages, write_seal_files, REAL,
        "knowledge with a real language model of 135M parameters, on passages about real things",
        begin=write_passages, conclude=conclusion,
    ),
    "puzzle-miniature": Task(
        FewShotConfig, make_puzzle_miniature, write_arc_files, PUZZLE_MINIATURE,
        "few-shot with the shipped model, on small puzzles of its own",
    ),
    "continual": Task(
        KnowledgeConfig, Knowledge, write_continual_files, {},
        "learn passages one after another: what is forgotten, and what keeps it", CONTINUAL,
    ),
    "continual-miniature": Task(
        KnowledgeConfig, make_continual_miniature, write_continual_files, CONTINUAL_MINIATURE,
        "continual with the shipped model, in a small world of invented people", CONTINUAL,
    ),
}  # fmt: skip


def configs(task: str) -> tuple[type, type, type]:
    """The dataclasses whose fields configure the task; no two share a field's name."""
    require(task in TASKS, "task", task, f"one of {list(TASKS)}")
    return EngineConfig, TASKS[task].loop.config, TASKS[task].config


def start(
    task: str,
    values: Mapping[str, Any],
    out: str | Path,
    log: Callable[[str], None] = write_line,
    progress: bool = True,
) -> Path:
    """Run a task with the given settings, or go on with the run in `out`; returns its directory.

    values: by name of field; others have their defaults. log, progress: as of ReSTEM. Raises InputError for settings
    or data that cannot be used, before anything is trained, and where `out` holds a run with other settings.
    """
    kinds = configs(task)
    values = {**TASKS[task].defaults, **rename_old(values)}
    known = {name for kind in kinds for name in defaults_of(kind)}
    for name in values:
        require(name in known, name, values[name], f"one of {sorted(known)}")
    # Absolute, so that the run can be resumed from another directory.
    values |= {name: os.path.abspath(values[name]) for name in ("model", *FILES) if values.get(name)}
    if isinstance(values.get("policies"), Sequence):
        values["policies"] = tuple(map(os.path.abspath, values["policies"]))
    engine_config, loop, own = (make(kind, values) for kind in kinds)
    files = {name: _digest(values[name]) for name in FILES if values.get(name)}
    files |= {f"policies[{i}]": _digest(path) for i, path in enumerate(values.get("policies", ()))}
    settings = asdict(engine_config) | asdict(loop) | asdict(own)
    if TASKS[task].make is Knowledge and isinstance(loop, LoopConfig) and own.data and loop.rounds:
        validate_sizes(own, loop.contexts)
    engine = _load_engine(engine_config, log)
    _validate_policy_update(engine, loop)
    with renamed_errors({"lora.target_modules": "targets"}):
        adapter_layout(engine.config, own.lora)  # targets that the model lacks are an error now, not in hours
    if isinstance(loop, LoopConfig):
        fixed = getattr(own, "grader", "") != "model" or loop.policy_update == "adapter" or not loop.rounds
        require(fixed, "grader", "model", "it with policy_update 'adapter': a merge would change who grades")
    domain = TASKS[task].make(own, engine)
    TASKS[task].loop.validate(domain, loop)
    base = fingerprint(Path(engine_config.model))
    settings |= {"task": task, "sha256": files | base}
    # A file that lies elsewhere now is the same file if its digest is the same; a run of an earlier version took fewer.
    mutable = (*MUTABLE, "model", "policies", *files)
    defaults = {name: value for kind in kinds for name, value in defaults_of(kind).items()} | {"sha256": base}
    with Ledger.open(out, settings, mutable, defaults, GROWING) as ledger, _workers(engine, ledger):
        record_environment(ledger.directory, engine.model.device)
        TASKS[task].begin(domain, ledger)
        parts = domain.answer_params, domain.grade, log, progress
        inner_loop = engine.inner_loop(*parts) if isinstance(engine, Pool) else InnerLoop(engine, *parts)
        work = TASKS[task].loop.make(engine, domain, loop, ledger, log, progress, inner_loop)
        if work.is_finished():
            log(_finished_line(ledger))
        work.run()
        TASKS[task].finish(domain, ledger)
        return ledger.directory


def _load_engine(config: EngineConfig, log: Callable[[str], None]) -> Engine:
    """The engine of a run, or the workers in its place."""
    quantize = None if config.quantize == "none" else config.quantize
    pooled = config.workers > 0 or bool(config.ray_address)
    device = "cpu" if pooled else config.device
    engine = Engine.from_pretrained(config.model, device, config.dtype, config.deterministic, quantize)
    return Pool(engine, config.workers, config.ray_address, config.device, quantize, log) if pooled else engine


@contextmanager
def _workers(engine: Engine, ledger: Ledger) -> Iterator[None]:
    """Ends the engine's workers, if it has any, with the block, and records what they have done."""
    if not isinstance(engine, Pool):
        yield
        return
    try:
        with engine:
            yield
    finally:
        record_workers(ledger.directory, engine.shares())


def _finished_line(ledger: Ledger) -> str:
    """That a run has nothing left to do, and how to go on."""
    _, finished, *_ = ledger.steps()[-1]
    rounds = ledger.config.get("rounds")
    line = f"{ledger.directory}: finished {finished[:16].replace('T', ' ')} UTC; nothing is run again"
    if rounds is None:
        return line
    done = f"{rounds} round{'' if rounds == 1 else 's'}"
    return f"{line}. It has {done}; to go on: seal-engine resume {ledger.directory} --rounds {rounds + 1}"


def _validate_policy_update(engine: Engine, loop: object) -> None:
    """InputError for updates that the base cannot take: now, not after the first round's hours."""
    quantized = engine.model.quantization
    merges = isinstance(loop, LoopConfig) and loop.rounds and loop.policy_update == "merge"
    if quantized is not None and merges:
        accepted = f"'adapter': nothing is merged into a base quantised to {quantized.kind}"
        raise InputError(f"policy_update: found 'merge'; accepted: {accepted}")


def resume(
    directory: str | Path,
    log: Callable[[str], None] = write_line,
    progress: bool = True,
    rounds: int | None = None,
) -> Path:
    """Go on with a run, from its directory alone. rounds: at least as many as it began with; None: as many."""
    with Ledger.read(directory) as ledger:
        settings = dict(ledger.config)
    task = settings.pop("task", None)
    settings.pop("sha256", None)
    settings |= {} if rounds is None else {"rounds": rounds}
    return start(str(task), settings, directory, log, progress)


def _digest(path: str) -> str:
    """sha256 of a file, or of a directory's, that the run reads: the run cannot go on with another."""
    digest, place = hashlib.sha256(), Path(path)
    try:
        for file in sorted(place.iterdir()) if place.is_dir() else [place]:
            digest.update(file.read_bytes())
        return digest.hexdigest()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None


@dataclass(frozen=True)
class Row:
    """A line of the table: a method's accuracy on held-out contexts."""

    name: str
    accuracies: tuple[float, ...]  # of each seed that has one, 0 to 1
    contexts: int = 0  # measured, of each seed the fewest
    rejected: int = 0  # trials of rejected self-edits: wrong answers
    failed: int = 0  # adapters that could not be trained: wrong answers
    ungraded: int = 0  # answers that are left out
    errors: tuple[float, ...] = ()  # standard errors over contexts, of each seed that has one

    @property
    def mean(self) -> float:
        """Over seeds."""
        return fmean(self.accuracies)

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation over seeds; None for one."""
        return stdev(self.accuracies) if len(self.accuracies) > 1 else None

    @property
    def standard_error(self) -> float | None:
        """Over contexts: the mean of the seeds', which share their contexts. None where no seed has one."""
        return fmean(self.errors) if self.errors else None


def is_continual(ledger: Ledger) -> bool:
    """Whether the run is of the continual experiment."""
    task = ledger.config.get("task")
    return task in TASKS and TASKS[str(task)].loop is CONTINUAL


def summary(ledger: Ledger) -> tuple[str, list[dict[str, Any]]]:
    """What a run came to: a table as text, and its lines as JSON."""
    if is_continual(ledger):
        result = read_result(ledger)
        lines = [{name: value for name, value in asdict(m).items() if name != "matrices"} for m in result.methods]
        return continual_table(result), lines
    found = rows(ledger)
    lines = [{"method": r.name, "mean": r.mean, "sd": r.deviation, "se": r.standard_error, **asdict(r)} for r in found]
    task = TASKS.get(str(ledger.config.get("task")))
    words = task.conclude(ledger) if task is not None and task.conclude is not None else ""
    return "\n".join(filter(None, [table(found), words])), lines


def rows(ledger: Ledger) -> list[Row]:
    """The table: all that was measured on held-out contexts, in the order in which it was."""
    found: dict[str, list[dict[str, Any]]] = {}
    for entry in ledger.metrics():
        known = entry.get("accuracy") is not None and math.isfinite(entry["accuracy"])
        if "trials" in entry and Phase.parse(str(entry["phase"])).stage != ROUND and known:
            found.setdefault(entry["phase"], []).append(entry)
    return [
        Row(
            _title(phase),
            tuple(entry["accuracy"] for entry in entries),
            min(entry.get("contexts", 0) for entry in entries),
            *(sum(entry.get(name, 0) for entry in entries) for name in ("rejected", "failed", "ungraded")),
            errors=tuple(entry["standard_error"] for entry in entries if entry.get("standard_error") is not None),
        )
        for phase, entries in found.items()
    ]


def _title(text: str) -> str:
    phase = Phase.parse(text)
    if phase.stage != EVALUATION:
        return text
    when = f"after round {phase.round}" if phase.round else "before any round"
    by_the_policy = phase.method in (SELF_EDITS, CONTINUED_PRETRAINING)
    return f"{phase.method}, {when}" if by_the_policy else f"{phase.method} ({when})"


def table(found: Sequence[Row]) -> str:
    """Rows as text: means, standard deviations over seeds (sd) and standard errors over contexts (se) in percent,
    and what was left out or failed."""
    lines, max_contexts = [("method", "accuracy", "sd", "se", "")], max((row.contexts for row in found), default=0)
    for row in found:
        sd, se = ("" if s is None else f"{100 * s:.1f}" for s in (row.deviation, row.standard_error))
        notes = [f"{row.contexts} of {max_contexts} contexts"] if row.contexts < max_contexts else []
        notes += [f"{getattr(row, n)} {n}" for n in ("rejected", "failed", "ungraded") if getattr(row, n)]
        lines.append((row.name, f"{100 * row.mean:.1f}", sd, se, ", ".join(notes)))
    width = max(len(name) for name, *_ in lines) + 2
    return "\n".join(f"{name:<{width}}{mean:>9}{sd:>7}{se:>7}  {notes}".rstrip() for name, mean, sd, se, notes in lines)
