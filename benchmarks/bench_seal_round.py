"""One whole round of the published knowledge task, beside Transformers with PEFT and beside what the machine could do.

Random weights, random tokens, and the lengths of the published round (seal_round.py); lengths that a shape has no
positions for are cut. `--passages N` and `--shape S` measure other cases than the default ones. The parts of a round:

    sampling   5 self-edits a passage, temperature 1, top-p 0.95, each to its recorded length
    training   3 adapters on each, all at once: 10 epochs, batch 1, rank 32, q and v
    asking     all questions of its passage to each adapter: 64 greedy tokens, whatever they are (the worst case)
    updating   the policy on one self-edit a passage, 2 epochs, batch 10, rank 64, all projections; then merged

floor: the longer of FLOPs over the measured matrix rate and bytes over the measured copy rate. FLOPs: 2 a matrix
parameter and token forward, 4 in training; of the lm_head only where a token is predicted. Bytes: the base's matrices
once in a step of sampling and twice in one of training, steps as few as the longest completion or job has; each row's
K/V, a prompt's once for its samples; adapters as in bench_lora and bench_adamw, 16 and 36 a parameter and step, and 4
where they are only read; the merge. Attention's and low-rank products' FLOPs and activations' bytes count for nothing.

host: the share of the wall clock outside kernels, of a short replay under torch's profiler, which slows the host. On a
CPU, kernels are the outermost aten operators; on a GPU, all that ran on it.

peft, one at a time: no padding in training, a job's questions as one padded batch, a passage's samples as another, the
update without the merge. peft, padded to 2048: the same, but training sequences are padded and the loss is taken
there, too, as published. Both are timed on a few jobs, the better of two calls (on a GPU one) after another, and
extrapolated: sampling and the update by steps, training by tokens (padded: by steps), asking by adapters.
extrapolated_from says from how many. On a CPU, a part of ours that takes under a minute is the better of two calls,
too. Their losses and answers are compared with ours first: there is no figure for a wrong result. percent_stolen: of
our time, in which other machines on the same host had the cores.
"""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from statistics import fmean
from time import perf_counter
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

import measure
from bench_sample import generate_padded
from bench_train import PADDED, QV, SEVEN, Batch, OneAtATime, alone, close_to, load_base
from seal_engine import Adapter, Engine, LoraConfig, SamplingParams, TrainJob, TrainSequence
from seal_engine.model.adapter_layout import adapter_layout
from seal_engine.model.config import ModelConfig
from seal_engine.model.devices import return_freed_memory
from seal_round import EPOCHS, REPEATS, Lengths, read_trace, typical
from shapes import random_model

GPU = measure.DEVICE.type == "cuda"
PARTS = ("sampling", "training", "asking", "updating")
INNER = LoraConfig(r=32, lora_alpha=64, target_modules=QV)
POLICY = LoraConfig(r=64, lora_alpha=128, target_modules=SEVEN)
POLICY_RATE, POLICY_EPOCHS, POLICY_BATCH = 3e-4, 2, 10
ANSWER = 64  # tokens
AGAIN = 60  # seconds below which a part is measured twice on a CPU, which others may use: the better call counts
JOBS = 5  # that PEFT trains, for one epoch, and asks
# (shape, dtype, passages)
CASES = [("miniature", torch.float32, 5), ("97m", torch.bfloat16, 5), ("97m", torch.float32, 5)]
if GPU:
    CASES = [("qwen2.5-7b", torch.bfloat16, 50)]


def pytest_generate_tests(metafunc):
    """The default cases, or those of --shape, with --passages of the trace's passages."""
    wanted, passages = metafunc.config.getoption("--shape"), metafunc.config.getoption("--passages")
    cases = [case for case in CASES if wanted in (None, case[0])]
    if not cases:
        cases = [(wanted, torch.bfloat16 if GPU else torch.float32, CASES[0][2])]
    cases = [(shape, dtype, passages or count) for shape, dtype, count in cases]
    metafunc.parametrize(("shape", "dtype", "passages"), cases, ids=str)


@dataclass(frozen=True)
class Passage:
    """Random tokens of the recorded lengths."""

    prompt: list[int]
    completions: list[int]  # lengths
    self_edits: list[list[list[int]]]  # the sequences of each
    questions: list[list[int]]
    kept: TrainSequence  # prompt and self-edit, the loss on the latter


def draw(trace: Sequence[Lengths], config: ModelConfig) -> list[Passage]:
    """Passages of the trace's lengths, as far as the model has positions."""
    generator, most = torch.Generator().manual_seed(0), config.max_position_embeddings

    def ids(length: int, longest: int = most) -> list[int]:
        return torch.randint(config.vocab_size, (min(length, longest),), generator=generator).tolist()

    made = []
    for own in trace:
        prompt = ids(own.prompt, most // 2)
        completions = [min(length, most - len(prompt)) for length in own.completions]
        kept = completions[own.kept]
        made.append(
            Passage(
                prompt,
                completions,
                [[ids(length) for length in sequences] for sequences in own.sequences],
                [ids(length, most - ANSWER) for length in own.questions],
                TrainSequence([*prompt, *ids(kept)], [0] * len(prompt) + [1] * kept),
            )
        )
    return made


def short(passages: Sequence[Passage]) -> list[Passage]:
    """The same with completions of at most 32 tokens and the first two sequences of each self-edit."""
    return [
        replace(p, completions=[min(n, 32) for n in p.completions], self_edits=[own[:2] for own in p.self_edits])
        for p in passages
    ]


class Round:
    """seal_engine's round: a method a part, to be called in their order."""

    def __init__(self, engine: Engine, passages: Sequence[Passage], epochs: int = EPOCHS, answer: int = ANSWER):
        self.engine = engine
        self.passages = passages
        self.epochs = epochs
        self.answer = answer
        self.adapters: list[Adapter] = []  # REPEATS of each self-edit of each passage

    def sampling(self) -> None:
        requests = [(p.prompt, n) for p in self.passages for n in p.completions]
        params = [SamplingParams(temperature=1.0, top_p=0.95, max_tokens=n, ignore_eos=True) for _, n in requests]
        outs = self.engine.generate([prompt for prompt, _ in requests], params, progress=False)
        assert [len(out.outputs[0].token_ids) for out in outs] == [n for _, n in requests]

    def training(self) -> None:
        self.adapters = []  # an earlier call's
        jobs = [
            TrainJob(sequences, INNER, num_epochs=self.epochs, seed=repeat)
            for p in self.passages
            for sequences in p.self_edits
            for repeat in range(REPEATS)
        ]
        results = self.engine.train(jobs, progress=False)
        self.adapters = [result.adapter for result in results if result.adapter is not None]
        assert len(self.adapters) == len(jobs), {result.error for result in results}

    def owned(self) -> list[tuple[Passage, Adapter]]:
        """Each adapter with its passage."""
        passages = [p for p in self.passages for _ in range(REPEATS * len(p.self_edits))]
        return list(zip(passages, self.adapters, strict=True))

    def asking(self) -> None:
        asked = [(question, adapter) for p, adapter in self.owned() for question in p.questions]
        params = SamplingParams(temperature=0.0, max_tokens=self.answer, ignore_eos=True)
        questions, owners = zip(*asked, strict=True)
        outs = self.engine.generate(questions, params, owners, progress=False)
        assert all(len(out.outputs[0].token_ids) == self.answer for out in outs)

    def updating(self) -> None:
        job = TrainJob(
            [p.kept for p in self.passages], POLICY, POLICY_RATE, num_epochs=POLICY_EPOCHS, batch_size=POLICY_BATCH
        )
        (result,) = self.engine.train([job], progress=False)
        assert result.adapter is not None, result.error
        self.engine.merge(result.adapter)


def costs(engine: Engine, passages: Sequence[Passage]) -> dict[str, tuple[float, float]]:
    """The fewest FLOPs and bytes of each part."""
    config, element = engine.config, engine.model.dtype.itemsize
    head = config.vocab_size * config.hidden_size
    body = config.num_matrix_parameters - head
    weights = element * (body + head)
    kv = 2 * config.num_hidden_layers * config.key_value_size * engine.model.product_dtype.itemsize  # bytes a token
    inner, policy = (adapter_layout(config, lora).num_parameters for lora in (INNER, POLICY))

    lengths = [n for p in passages for n in p.completions]
    prompts, drawn = sum(len(p.prompt) for p in passages), sum(lengths)
    read = sum(len(p.prompt) * max(p.completions) for p in passages) + sum(n * n // 2 for n in lengths)
    jobs = [own for p in passages for own in p.self_edits for _ in range(REPEATS)]
    trained, steps = EPOCHS * sum(len(ids) for job in jobs for ids in job), EPOCHS * sum(map(len, jobs))
    asked = [len(ids) for p in passages for _ in range(REPEATS * len(p.self_edits)) for ids in p.questions]
    answered, context = ANSWER * len(asked), ANSWER * sum(asked) + len(asked) * ANSWER**2 // 2
    kept = POLICY_EPOCHS * sum(len(p.kept.token_ids) for p in passages)
    targets = POLICY_EPOCHS * sum(sum(p.kept.loss_mask or ()) for p in passages)
    updates = POLICY_EPOCHS * -(-len(passages) // POLICY_BATCH)
    return {
        "sampling": (
            2 * (body * (prompts + drawn - len(lengths)) + head * drawn),
            weights * max(lengths) + kv * read,
        ),
        "training": (
            4 * (body * trained + head * (trained - steps)),
            2 * weights * EPOCHS * max(map(len, jobs)) + 52 * inner * steps,
        ),
        "asking": (
            2 * (body * (sum(asked) + answered - len(asked)) + head * answered),
            ANSWER * (weights + 4 * inner * len(jobs)) + kv * context,
        ),
        "updating": (
            4 * (body * kept + head * targets),
            2 * weights * updates + 52 * policy * updates + 2 * element * body,
        ),
    }


def timed(fn: Callable[[], Any]) -> float:
    """Seconds of one call."""
    measure.synchronize()
    start = perf_counter()
    fn()
    measure.synchronize()
    return perf_counter() - start


def host_share(fn: Callable[[], Any]) -> float:
    """The share of the wall clock of one call, under torch's profiler, in which nothing computed."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if GPU else [])]
    with profile(activities=activities) as profiler, record_function("whole"):
        seconds = timed(fn)
    events = profiler.events() or []
    thread = next(event.thread for event in events if event.name == "whole")
    busy = end = 0.0
    for event in sorted(events, key=lambda event: event.time_range.start):
        on_device = event.device_type.name == "CUDA" and event.name != "whole"
        kernel = on_device if GPU else event.name.startswith(("aten::", "mkldnn::")) and event.thread == thread
        if kernel and event.time_range.end > end:
            busy += event.time_range.end - max(end, event.time_range.start)
            end = event.time_range.end
    return max(0.0, 1 - busy / 1e6 / seconds)


def release_memory() -> None:
    """Give what nobody uses back to the system: a CPU's peak is what the process holds, used or not."""
    gc.collect()
    if GPU:
        torch.cuda.empty_cache()
    return_freed_memory()


def padded(sequences: Sequence[TrainSequence]) -> Batch:
    """A step on some sequences, the loss where their masks say."""
    width = max(len(s.token_ids) for s in sequences)
    ids = [[*s.token_ids, *[0] * (width - len(s.token_ids))] for s in sequences]
    masks = [[*(s.loss_mask or ()), *[0] * (width - len(s.token_ids))] for s in sequences]
    labels = [
        [token if m else -100 for token, m in zip(own, mask, strict=True)] for own, mask in zip(ids, masks, strict=True)
    ]
    return ids, labels


def check(engine: Engine, baseline: OneAtATime, passage: Passage, dtype: torch.dtype) -> None:
    """Losses of two jobs, and what their adapters answer, are PEFT's: there is no figure for a wrong result.

    In 16 bits, rounding soon turns a near tie, and all that follows: there, first tokens are compared.
    """
    compared, least = (ANSWER, 0.9) if dtype == torch.float32 else (1, 0.5)
    greedy, same = SamplingParams(temperature=0.0, max_tokens=compared, ignore_eos=True), []
    for i, own in enumerate(passage.self_edits[:2]):
        start, sequences = engine.create_adapter(INNER, seed=i), own[-3:] * 2
        (result,) = engine.train([TrainJob(sequences, init_from=start, seed=None)], progress=False)
        baseline.load(start)
        theirs = baseline.train([alone(ids) for ids in sequences])
        assert result.losses == close_to(theirs, dtype), "a wrong result"
        assert result.adapter is not None
        baseline.load(result.adapter)
        answers = generate_padded(baseline.model, passage.questions, compared)
        outs = engine.generate(passage.questions, greedy, result.adapter, progress=False)
        same += [out.outputs[0].token_ids == answer for out, answer in zip(outs, answers, strict=True)]
    assert fmean(same) >= least, f"{sum(same)} of {len(same)} answers are the same: no figure for a wrong result"


class Theirs:
    """PEFT's round, from a few jobs: each method gives a part's seconds, and what they are extrapolated from."""

    def __init__(self, peft: OneAtATime, passages: Sequence[Passage], owned: Sequence[tuple[Passage, Adapter]]):
        self.peft = peft
        self.passages = passages
        self.edits = [own for p in passages for own in p.self_edits]
        self.owned = some(owned, JOBS)
        self.adapters = len(owned)

    def sampling(self) -> tuple[float, str]:
        middle, options = self.passages[len(self.passages) // 2], {"do_sample": True, "top_p": 0.95, "top_k": 0}
        longest = max(middle.completions)

        def run() -> None:
            with self.peft.model.disable_adapter():
                generate_padded(self.peft.model, [middle.prompt] * len(middle.completions), longest, **options)

        return extrapolated(run, longest, sum(max(p.completions) for p in self.passages), "steps, one passage")

    def training(self) -> tuple[float, str]:
        chosen, tokens = some(self.edits, JOBS), lambda edits: sum(len(ids) for own in edits for ids in own)

        def run() -> None:
            for own in chosen:
                self.peft.load(self.owned[0][1])
                self.peft.train([alone(ids) for ids in own])

        whole = REPEATS * EPOCHS * tokens(self.edits)
        return extrapolated(run, tokens(chosen), whole, f"tokens, {len(chosen)} jobs")

    def training_padded(self) -> tuple[float, str]:
        width = min(PADDED, self.peft.model.config.max_position_embeddings)
        ids = (self.edits[0][0] + [0] * width)[:width]
        whole = REPEATS * EPOCHS * sum(map(len, self.edits))
        return extrapolated(lambda: self.peft.train([alone(ids)] * 2), 2, whole, "steps")

    def asking(self) -> tuple[float, str]:
        def run() -> None:
            for passage, adapter in self.owned:
                self.peft.load(adapter)
                generate_padded(self.peft.model, passage.questions, ANSWER)

        return extrapolated(run, len(self.owned), self.adapters, "adapters")

    def updating(self) -> tuple[float, str]:
        """The last: it takes the inner loop's adapter out of the model."""
        policy, kept = OneAtATime(self.peft.model.unload(), POLICY), some([p.kept for p in self.passages], POLICY_BATCH)
        run = lambda: policy.train([padded(kept)], POLICY_RATE)  # noqa: E731
        return extrapolated(run, len(kept), POLICY_EPOCHS * len(self.passages), "sequences")


def some(items: Sequence[Any], count: int) -> list[Any]:
    """At most `count` of them, evenly spread."""
    return list(items[:: -(-len(items) // count)])


def extrapolated(run: Callable[[], Any], done: int, whole: int, unit: str) -> tuple[float, str]:
    """Seconds of the whole, from those of a run that does a part of it; and the part."""
    return measure.fastest(
        run, rounds=1 if GPU else 2
    ) * whole / done, "" if done == whole else f"{done} of {whole} {unit}"


def measure_theirs(theirs: Theirs, row: Callable[..., None]) -> None:
    """Rows of PEFT's parts and of its rounds; padding concerns training alone."""
    totals = {"peft, one at a time": 0.0, f"peft, padded to {PADDED}": 0.0}
    for part in PARTS:
        one = getattr(theirs, part)()
        both = one, theirs.training_padded() if part == "training" else one
        for who, (time, source) in zip(totals, both, strict=True):
            totals[who] += time
            row(part, who, time, extrapolated_from=source)
    for who, time in totals.items():
        row("round", who, time, extrapolated_from="its parts")


def test_seal_round(benchmark, record, tmp_path, shape, dtype, passages):
    """Rows are recorded as parts are done: on a GPU all of it takes minutes."""
    engine = Engine(random_model(shape, dtype, measure.DEVICE))
    work = draw(typical(read_trace(), passages), engine.config)
    peft = None
    if all(map(find_spec, ("transformers", "peft"))):  # a machine without them still shows what is ours
        peft = OneAtATime(load_base(engine, tmp_path / "checkpoint"), INNER)
        check(engine, peft, work[len(work) // 2], dtype)
        peft.model.to("cpu")  # a GPU's memory is ours while ours is measured
        release_memory()
    ours, replay = Round(engine, work), Round(engine, short(work), epochs=1, answer=16)
    for part in PARTS:
        getattr(replay, part)()  # the first calls compile
    replay.adapters.clear()
    if GPU:
        Round(engine, work, epochs=1).training()  # and load what the library has for each size of product
    needs, rates = costs(engine, work), {"FLOPs": measure.matrix_rate(dtype), "bytes": measure.copy_rate()}
    seconds: dict[str, float] = {}
    floors: dict[str, float] = {}

    def row(part: str, who: str, time: float, **columns: Any) -> None:
        record(
            shape=shape, dtype=str(dtype).removeprefix("torch."), passages=passages, part=part, who=who, seconds=time,
            seal_engine_times_faster=time / seconds[part], **columns,
        )  # fmt: skip

    def call(part: str) -> tuple[float, float]:
        """Seconds of a part, and the percentage of them that other machines took."""
        before = measure.stolen()
        time = timed(getattr(ours, part))
        return time, 100 * (measure.stolen() - before) / time

    def turn() -> None:
        for part in PARTS:
            calls = [call(part)]
            if not GPU and calls[0][0] < AGAIN:
                calls.append(call(part))
            seconds[part], taken = min(calls)
            flops, moved = needs[part]
            times = {"FLOPs": flops / rates["FLOPs"], "bytes": moved / rates["bytes"]}
            limit = max(times, key=times.__getitem__)
            floors[part] = times[limit]
            row(part, "seal_engine", seconds[part], percent_of_floor=100 * floors[part] / seconds[part],
                percent_stolen=taken)  # fmt: skip
            row(part, "floor", floors[part], limit=limit, tflop=flops / 1e12, gb=moved / 1e9)

    release_memory()
    peak = measure.peak_memory(lambda: benchmark.pedantic(turn, rounds=1, iterations=1))
    seconds["round"], floors["round"] = sum(seconds.values()), sum(floors.values())
    share = 100 * floors["round"] / seconds["round"]
    row("round", "seal_engine", seconds["round"], percent_of_floor=share, peak_mib=peak / 2**20)
    flops, moved = (sum(column) for column in zip(*needs.values(), strict=True))
    row("round", "floor", floors["round"], tflop=flops / 1e12, gb=moved / 1e9,
        matrix_tflops=rates["FLOPs"] / 1e12, copy_gb_per_s=rates["bytes"] / 1e9)  # fmt: skip

    if peft is not None:
        peft.model.to(measure.DEVICE)
        theirs = Theirs(peft, work, ours.owned())
        ours.adapters.clear()  # but for those that PEFT takes over
        measure_theirs(theirs, row)
    hosts = {part: host_share(getattr(replay, part)) * seconds[part] for part in PARTS}
    for part, time in (hosts | {"round": sum(hosts.values())}).items():
        row(part, "host, by a profiled replay", time, percent_of_seal_engine=100 * time / seconds[part])
