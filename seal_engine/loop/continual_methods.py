"""How edits are kept: the methods of the continual experiment behind one protocol, `Method`.

    merge         each edit's adapter is added to the weights for good (as published)
    replay        merge, trained on earlier self-edits as well
    replay-one    one adapter that goes on being trained, on earlier self-edits as well
    distil        merge; the targets are what the model itself predicts with the passage in its prompt (top K)
    gate          merge, scaled: the largest scale at which kept texts stay about as likely as they were
    null-space    merge; the update is blind to the directions that the base's own texts and earlier edits use
    consolidate   null-space with replay and rehearsal of the base's own texts
    bank          an adapter per edit, never merged; a retriever chooses one, or none, for each question
    oracle        bank with the right choice
    joint         one adapter, trained anew on all self-edits so far
    slow          merge at a tenth of the learning rate, with four times the epochs
    all-linear    merge on all seven projections

What is merged is kept beside the base, as one adapter that grows up to full rank (model/adapter_stack.py), so the
sequences of all methods train in the same passes. The sum is of float32 factors, never rounded to the base's dtype.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from seal_engine.loop.continual_data import SharedTexts
from seal_engine.loop.inner import derive_seed
from seal_engine.loop.null_space import Covariances, input_covariances, null_space_adapter
from seal_engine.loop.retrieval import Document
from seal_engine.model.adapter_stack import compact, stack_adapters, top_block
from seal_engine.model.adapters import Adapter
from seal_engine.training.jobs import TrainJob, TrainResult
from seal_engine.types import LoraConfig
from seal_kernels.dispatch import ceil_div

SCALES = tuple(i / 8 for i in range(8, 0, -1))  # that the gate tries
GATE_SAMPLES = 32  # texts of the base that the gate scores
SLOWER, LONGER = 10, 4  # the control 'slow': divides the learning rate, multiplies the epochs


@dataclass(frozen=True)
class Lesson:
    """What a sequence learns in a step: a self-edit on a context, and the job that the task makes of it."""

    context: str
    title: str
    text: str
    job: TrainJob


@dataclass(frozen=True)
class Block:
    """What a step adds: an adapter, and the factor of its update."""

    adapter: Adapter
    factor: float = 1.0


Prepare = Callable[["Method", int, Lesson], TrainJob]


class Method:
    """Edits merged one after another, as published; and the protocol of all methods.

    The experiment calls, in each step: `writer` for the adapter that writes a sequence's next self-edit, `job` for what
    to train, `block` for what to keep of the result, `adopt` to keep it, `route` for the adapter that answers. A run
    that goes on calls `adopt` alone for the steps that are recorded.
    """

    def __init__(self, name: str, shared: SharedTexts, sequences: int, prepare: Prepare | None = None):
        """prepare: makes a lesson's job of its own; None: the task's."""
        self.name, self.shared = name, shared
        self.prepare = prepare or (lambda _, __, lesson: lesson.job)
        self.lessons: list[list[Lesson]] = [[] for _ in range(sequences)]  # learned so far
        self.blocks: list[list[Block]] = [[] for _ in range(sequences)]
        self.current: list[Adapter | None] = [None] * sequences

    def writer(self, sequence: int) -> Adapter | None:
        """What writes the sequence's next self-edit; None: the base."""
        return self.current[sequence]

    def job(self, sequence: int, lesson: Lesson) -> TrainJob:
        """What is trained on the lesson."""
        return replace(self.prepare(self, sequence, lesson), on_top_of=self.current[sequence])

    def block(self, sequence: int, lesson: Lesson, result: TrainResult) -> Block | None:
        """What is kept of a trained job; None where it failed."""
        if result.adapter is None:
            return None
        lora = self.lora(lesson)
        return Block(top_block(result.adapter, lora.r, lora))

    def lora(self, lesson: Lesson) -> LoraConfig:
        """The shape of a lesson's block."""
        return lesson.job.lora

    def adopt(self, sequence: int, lesson: Lesson, block: Block) -> None:
        """Keep a block."""
        self.lessons[sequence].append(lesson)
        self.blocks[sequence].append(block)
        self.current[sequence] = compact(stack_adapters([(b.adapter, b.factor) for b in self.blocks[sequence]]))

    def route(self, sequence: int, context: str, texts: Sequence[str]) -> list[Adapter | None]:
        """The adapter that answers each question. context: what they are about, which only the oracle may use."""
        return [self.current[sequence]] * len(texts)

    @property
    def bytes_kept(self) -> int:
        """Beside one set of weights, into which a stack can be merged: adapters that stay apart, and texts."""
        return 0


class AllLinear(Method):
    """Control: merge on all seven projections."""

    def job(self, sequence: int, lesson: Lesson) -> TrainJob:
        return replace(super().job(sequence, lesson), lora=self.lora(lesson))

    def lora(self, lesson: Lesson) -> LoraConfig:
        return replace(lesson.job.lora, target_modules="all-linear")


class Replay(Method):
    """Merge with earlier self-edits among the training sequences, which are therefore kept."""

    @property
    def bytes_kept(self) -> int:
        return sum(len(lesson.text.encode()) for lessons in self.lessons for lesson in lessons)


class ReplayOne(Replay):
    """One adapter that goes on being trained."""

    def job(self, sequence: int, lesson: Lesson) -> TrainJob:
        job = self.prepare(self, sequence, lesson)
        current = self.current[sequence]
        return job if current is None else replace(job, init_from=current)

    def adopt(self, sequence: int, lesson: Lesson, block: Block) -> None:
        self.lessons[sequence].append(lesson)
        self.current[sequence] = block.adapter


class Joint(ReplayOne):
    """One adapter for all edits so far, trained anew in each step: the most that one adapter of this shape can hold."""

    def job(self, sequence: int, lesson: Lesson) -> TrainJob:
        lessons = [*self.lessons[sequence], lesson]
        return replace(lesson.job, sequences=[s for one in lessons for s in one.job.sequences])


class Gate(Replay):
    """Merge with a factor: the largest of SCALES that lowers the new self-edit's loss and keeps kept texts likely."""

    def block(self, sequence: int, lesson: Lesson, result: TrainResult) -> Block | None:
        block = super().block(sequence, lesson, result)
        if block is None:
            return None
        before = [(b.adapter, b.factor) for b in self.blocks[sequence]]
        systems = [self.current[sequence], *(stack_adapters([*before, (block.adapter, scale)]) for scale in SCALES)]
        new = list(lesson.job.sequences)
        kept = [s for one in self.lessons[sequence] for s in one.job.sequences]
        kept += self.shared.samples[:GATE_SAMPLES]
        losses = self.shared.losses(systems, new), self.shared.losses(systems, kept)
        return Block(block.adapter, choose_scale(SCALES, *losses, self.shared.config.gate_budget))


class NullSpace(Replay):
    """Merge of updates that are blind to what the base's own texts and earlier edits use."""

    def __init__(self, name: str, shared: SharedTexts, sequences: int, prepare: Prepare | None = None):
        super().__init__(name, shared, sequences, prepare)
        self._of_edits: list[list[Covariances]] = [[] for _ in range(sequences)]

    def job(self, sequence: int, lesson: Lesson) -> TrainJob:
        config, lora = self.shared.config, self.lora(lesson)
        earlier = [(covariances, config.null_space_edits) for covariances in self._of_edits[sequence]]
        covariances = [(self.shared.covariances, 1.0), *(earlier if config.null_space_edits else [])]
        start = null_space_adapter(
            self.shared.engine, lora, covariances, config.null_space_energy, lesson.job.seed or 0
        )
        epochs = max(1, round(config.null_space_epochs * lesson.job.num_epochs))
        rate = config.null_space_learning_rate
        longer = replace(lesson, job=replace(lesson.job, lora=lora, num_epochs=epochs, learning_rate=rate))
        return replace(super().job(sequence, longer), init_from=start, freeze_a=True)

    def lora(self, lesson: Lesson) -> LoraConfig:
        return self.shared.null_space_lora

    def adopt(self, sequence: int, lesson: Lesson, block: Block) -> None:
        super().adopt(sequence, lesson, block)
        if self.shared.config.null_space_edits:
            ids = self.shared.token_ids(lesson.job.sequences)
            self._of_edits[sequence].append(input_covariances(self.shared.engine, ids, self.shared.null_space_lora))


class Bank(Method):
    """An adapter per edit, trained on the base alone; a router of each sequence knows its edits."""

    def __init__(self, name: str, shared: SharedTexts, sequences: int, prepare: Prepare | None = None):
        super().__init__(name, shared, sequences, prepare)
        self.routers = [shared.router() for _ in range(sequences)]

    def adopt(self, sequence: int, lesson: Lesson, block: Block) -> None:
        self.lessons[sequence].append(lesson)
        self.blocks[sequence].append(block)
        pieces = tuple(str(piece) for piece in lesson.job.sequences)
        self.routers[sequence].add(Document(lesson.title, pieces))

    def route(self, sequence: int, context: str, texts: Sequence[str]) -> list[Adapter | None]:
        chosen = [self.routers[sequence].route(text) for text in texts]
        return [None if i is None else self.blocks[sequence][i].adapter for i in chosen]

    def forget(self, sequence: int, index: int) -> None:
        """Roll an edit back: questions about it are answered as if it had never been learned."""
        for kept in (self.lessons, self.blocks):
            del kept[sequence][index]
        self.routers[sequence].remove(index)

    @property
    def bytes_kept(self) -> int:
        texts = sum(len(lesson.text.encode()) for lessons in self.lessons for lesson in lessons)
        return texts + sum(block.adapter.nbytes for blocks in self.blocks for block in blocks)


class Oracle(Bank):
    """A bank that is told what a question is about."""

    def route(self, sequence: int, context: str, texts: Sequence[str]) -> list[Adapter | None]:
        contexts = [lesson.context for lesson in self.lessons[sequence]]
        known = context in contexts
        return [self.blocks[sequence][contexts.index(context)].adapter if known else None] * len(texts)


def choose_scale(
    scales: Sequence[float], new_losses: Sequence[float], kept_losses: Sequence[float], budget: float
) -> float:
    """The largest scale at which the new text's loss is lower than without the update, and that of kept texts at most
    `budget` higher; 0 if there is none.

    losses: without the update, then at each scale.
    """
    allowed = [
        scale
        for scale, new, kept in zip(scales, new_losses[1:], kept_losses[1:], strict=True)
        if new < new_losses[0] and kept <= kept_losses[0] + budget
    ]
    return max(allowed, default=0.0)


def slowly(method: Method, sequence: int, lesson: Lesson) -> TrainJob:
    """A tenth of the learning rate, more epochs."""
    job = lesson.job
    return replace(job, learning_rate=job.learning_rate / SLOWER, num_epochs=LONGER * job.num_epochs)


def distilled(method: Method, sequence: int, lesson: Lesson) -> TrainJob:
    """The targets of the untrained model with the passage in its prompt (context distillation, arXiv 2209.15189)."""
    return replace(lesson.job, sequences=method.shared.distil(lesson.context, lesson.job.sequences))


def replayed(method: Method, sequence: int, lesson: Lesson) -> TrainJob:
    """Earlier self-edits among the new one's training sequences."""
    return _mixed(method, sequence, lesson, method.shared.config.replay_ratio, 0.0)


def rehearsed(method: Method, sequence: int, lesson: Lesson) -> TrainJob:
    """Earlier self-edits and the base's own texts, with its predictions as soft targets, among the new sequences."""
    config = method.shared.config
    return _mixed(method, sequence, lesson, config.consolidate_replay, config.consolidate_rehearsal)


def _mixed(method: Method, sequence: int, lesson: Lesson, replay: float, rehearsal: float) -> TrainJob:
    """The lesson's job with other sequences among its own, drawn anew for each epoch; as many optimizer steps."""
    config, job, new = method.shared.config, lesson.job, list(lesson.job.sequences)
    earlier = method.lessons[sequence]
    draw = random.Random(derive_seed(method.shared.seed, "replay", sequence, len(earlier)))
    if config.replay_buffer:
        earlier = draw.sample(earlier, min(config.replay_buffer, len(earlier)))
    old = [s for one in earlier for s in one.job.sequences]
    base = method.shared.rehearsal if rehearsal else []
    if not old and not base:
        return job
    sequences, size = [], 0
    for _ in range(job.num_epochs):
        mixed = [*new, *_draw(draw, old, round(replay * len(new)))]
        mixed += _draw(draw, base, round(rehearsal * len(new)))
        draw.shuffle(mixed)
        sequences, size = [*sequences, *mixed], len(mixed)
    batch_size = ceil_div(job.batch_size * size, len(new))
    start = method.shared.engine.create_adapter(method.lora(lesson), job.seed or 0)
    return replace(job, sequences=sequences, num_epochs=1, batch_size=batch_size, seed=None, init_from=start)


def _draw(draw: random.Random, items: Sequence, count: int) -> list:
    """`count` of the items, none twice before all were drawn."""
    drawn = []
    while items and len(drawn) < count:
        drawn += draw.sample(items, min(len(items), count - len(drawn)))
    return drawn


def make_method(name: str, shared: SharedTexts, sequences: int) -> Method:
    """The method of this name, for so many sequences."""
    kinds: dict[str, tuple[type[Method], Prepare | None]] = {
        "merge": (Method, None),
        "replay": (Replay, replayed),
        "replay-one": (ReplayOne, replayed),
        "distil": (Method, distilled),
        "gate": (Gate, None),
        "replay+gate": (Gate, replayed),
        "null-space": (NullSpace, None),
        "consolidate": (NullSpace, rehearsed),
        "bank": (Bank, None),
        "oracle": (Oracle, None),
        "joint": (Joint, None),
        "slow": (Method, slowly),
        "all-linear": (AllLinear, None),
    }
    kind, prepare = kinds[name]
    return kind(name, shared, sequences, prepare)
