"""A round as the engine makes it: passes as the Trainer packs them, steps as the Sampler makes them, on a timeline.

FLOPs and bytes of each operation are those that the kernels' docstrings state. Not counted: programs of a captured
graph that have no rows, preempted sequences, tokenizing, grading, compiling.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from seal_engine.engine import MAX_NUM_SEQS, TOKEN_BUDGET
from seal_engine.forecast import published_round as published
from seal_engine.forecast.published_round import Base, Passage
from seal_engine.forecast.rates import Count, Gpu, assumed, launches
from seal_engine.forecast.timeline import Timeline, Work
from seal_engine.model.adapter_layout import adapter_layout, projection_sizes
from seal_engine.model.config import ModelConfig
from seal_engine.plan import training_memory
from seal_engine.training.pass_graph import padded_tokens
from seal_engine.types import LoraConfig
from seal_kernels.cross_entropy import CHUNK_BYTES, chunk_tokens
from seal_kernels.dispatch import ceil_div

GREEDY_PASSES, TOP_P_PASSES = 1.0, 3.5  # over a row of logits, to draw a token
NARROW, LINK = "norms, rotary, SwiGLU, logits", "adapters between host and device"


class LowRank(NamedTuple):
    """Adapters of one LoraConfig: sums over all layers."""

    parameters: int = 0
    projections: int = 0
    groups: int = 0
    inputs: int = 0  # features that adapted groups share
    outputs: int = 0  # features of adapted projections

    @staticmethod
    def of(config: ModelConfig, lora: LoraConfig) -> "LowRank":
        """An adapter's, on all layers."""
        layout, sizes = adapter_layout(config, lora), projection_sizes(config)
        groups = [(sizes[g], ranks) for layer in layout.ranks for g, ranks in enumerate(layer) if ranks.any()]
        widths = [w for (_, own), ranks in groups for w, r in zip(own, ranks, strict=False) if r]
        return LowRank(layout.num_parameters, len(widths), len(groups), sum(s[0] for s, _ in groups), sum(widths))


class Job(NamedTuple):
    """A job that is being trained: the lengths of the sequences of its next steps."""

    number: int
    steps: deque[int]


@dataclass
class Sample:
    """A sequence to sample."""

    new: int  # tokens of the prompt that are computed for it: none for a prompt's second sample
    context: int  # tokens that it has
    left: int  # to sample
    adapter: int | None = None


class Simulation:
    """The parts of a round in their order; call each once."""

    def __init__(self, config: ModelConfig, gpu: Gpu):
        self.config, self.gpu, self.timeline = config, gpu, Timeline(gpu)
        self.base = Base(config, (config.dtype or torch.bfloat16).itemsize)
        self.inner, self.policy = LowRank.of(config, published.INNER), LowRank.of(config, published.POLICY)
        self.free_bytes = gpu.memory - self.base.bytes_in_memory
        self.recompute, self.kept_tokens, self.graph_tokens, self.state_bytes = training_memory(
            config, TOKEN_BUDGET, self.base.element, self.free_bytes, layouts=[adapter_layout(config, published.INNER)]
        )
        self.pass_ended = 0.0  # the last one of training, on the device's clock
        self.passes: list[list[int]] = []  # of training: lengths
        self.steps: list[tuple[int, int]] = []  # of sampling: (tokens, sequences)
        self.max_resident = self.num_offloaded = 0
        self.offloaded: set[int | None] = set()  # adapters that are in host memory now

    def run(self, passages: Sequence[Passage]) -> None:
        """The whole round: top-p when sampling, greedy when asking."""
        samples = [
            Sample(0 if i else p.prompt, p.prompt, tokens) for p in passages for i, tokens in enumerate(p.completions)
        ]
        self.generate("sampling", samples, LowRank(), TOP_P_PASSES)
        edits = [(p, edit) for p in passages for edit in p.sequences for _ in range(published.REPEATS)]
        self.timeline.begin("training")
        self.train([edit * published.EPOCHS for _, edit in edits])
        questions = [Sample(n, n, published.ANSWER, i) for i, (p, _) in enumerate(edits) for n in p.questions]
        self.generate("asking", questions, self.inner, GREEDY_PASSES)
        self.timeline.begin("updating, training")
        self.update(passages)
        self.timeline.begin("updating, merge")
        self.merge()
        self.timeline.begin("")

    def layers(self, tokens: int, pairs: int, segments: int, lora: LowRank, backward: bool = False) -> list[Work]:
        """All layers of a pass, forward or backward: a segment is an adapter's tokens."""
        c, L, work, element = self.config, self.config.num_hidden_layers, self.timeline.work, self.base.element
        D, F, heads = c.hidden_size, c.intermediate_size, c.query_size + c.key_value_size
        per_pair, per_head = (14, 6) if backward else (4, 2)  # FLOPs and elements of attention
        narrow = 8 * D + 2 * heads + (5 if backward else 3) * F
        wide = (3 if backward else 1) * lora.inputs + 2 * lora.outputs
        products = 4 if backward else 2
        factors = (12 if backward else 4) * lora.parameters * segments  # gradients are read and written
        return [
            work("base products", 2 * self.base.body * tokens, element * self.base.body),
            work("attention", per_pair * pairs * c.query_size * L, per_head * element * tokens * heads * L),
            work("low-rank products", products * lora.parameters * tokens, element * tokens * wide + factors),
            work(NARROW, 0, element * tokens * narrow * L),
        ]

    def training_pass(self, lengths: Sequence[int], targets: int, adapters: int, lora: LowRank) -> None:
        """Forward, backward and an optimizer step of each adapter, over all their sequences."""
        c, base, T, L, phase = self.config, self.base, sum(lengths), self.config.num_hidden_layers, self.timeline.phase
        chunks, work = ceil_div(targets, chunk_tokens(c.vocab_size, base.element, CHUNK_BYTES)), self.timeline.work
        graphed = self.graph_tokens >= T
        computed = padded_tokens(T) if graphed else T
        batch = computed, sum(n * (n + 1) // 2 for n in lengths), adapters, lora
        forward, backward = self.layers(*batch), self.layers(*batch, backward=True)
        loss = [
            work("base products", 4 * base.head * targets, 2 * base.element * base.head * chunks),
            work(NARROW, 0, (12 + 2 * base.element) * c.vocab_size * targets),
        ]
        python = assumed("host: training pass") + adapters * assumed("host: adapter of a training pass")
        counts = [
            launches("forward", once=1, layer=L, group=lora.groups),
            launches("loss", once=1, job=adapters, chunk=chunks),
            launches("backward", once=1, job=adapters, layer=L, group=lora.groups),
        ]
        if graphed:
            kernels = sum(count.torch + count.triton for count in counts)
            begin = launches("graphed pass", once=1)
            phase(begin, *forward, *loss, *backward, host=("host: Python", python), graph_kernels=kernels)
        else:
            phase(launches("packing", once=1), host=("host: Python", python))
            for count, own in zip(counts, (forward, loss, backward), strict=True):
                phase(count, *own)
            self._recompute(T, batch, lora)
        phase(launches("optimizer", once=1), work("optimizer", 0, 36 * lora.parameters * adapters))
        self.timeline.wait_until(self.pass_ended)  # the losses of the pass before are read
        self.pass_ended = self.timeline.device
        self.passes.append(list(lengths))

    def _recompute(self, T: int, batch: tuple[int, int, int, LowRank], lora: LowRank) -> None:
        """What backward computes again in a pass of T tokens."""
        c, L, work, phase = self.config, self.config.num_hidden_layers, self.timeline.work, self.timeline.phase
        recompute = "none" if self.kept_tokens >= T else self.recompute
        if recompute == "layer":
            everywhere = lora.groups == 4 * L  # then the layer's last product is made again, too
            count = launches("layer again", adapted_layer=L) if everywhere else launches("layer again", layer=L)
            phase(count, *self.layers(*batch))
        elif recompute == "mlp":
            everywhere = lora.groups == 4 * L  # then down's input is needed, too
            count = launches("MLP again", adapted_layer=L) if everywhere else launches("MLP again", layer=L)
            products = (3 if everywhere else 2) * L * c.hidden_size * c.intermediate_size
            element = self.base.element
            narrow = work(NARROW, 0, 3 * element * T * c.intermediate_size * L)
            phase(count, work("base products", 2 * products * T, element * products), narrow)

    def train(self, jobs: Sequence[Sequence[int]]) -> None:
        """Inner loops, each as the lengths of its steps' sequences; the longest are submitted first."""
        order = sorted(range(len(jobs)), key=lambda i: -len(jobs[i]))
        waiting = deque(Job(i, deque(jobs[i])) for i in order)
        resident: list[Job] = []
        finished: deque[int] = deque()  # on the device, the oldest first
        while waiting or resident:
            chosen: list[Job] = []
            tokens, seen = 0, 0
            while seen < len(resident) or self._admit(waiting, resident, finished):
                job = resident[seen]
                if chosen and tokens + job.steps[0] > TOKEN_BUDGET:
                    break
                chosen.append(job)
                tokens, seen = tokens + job.steps[0], seen + 1
            self.max_resident = max(self.max_resident, len(resident))
            lengths = [job.steps.popleft() for job in chosen]
            self.training_pass(lengths, tokens - len(lengths), len(lengths), self.inner)
            finished.extend(job.number for job in chosen if not job.steps)
            resident = [job for job in (*resident[seen:], *chosen) if job.steps]

    def _admit(self, waiting: deque[Job], resident: list[Job], finished: deque[int]) -> bool:
        """Make the next job resident if there is memory for its state, finished adapters moving to the host for it."""
        size, moves = 4 * self.inner.parameters, 0
        needed = 4 * size * (len(resident) + 1)
        while waiting and finished and needed + size * len(finished) > self.state_bytes:
            self.offloaded.add(finished.popleft())
            moves += 1
        self.num_offloaded += moves
        if moves:
            link = f"{LINK}: bandwidth", moves * size / assumed("link of host and device, bytes/s")
            locking = "host: page-locking", moves * size / assumed("host: page-locking, bytes/s")
            self.timeline.phase(Count(waits=moves), link, host=locking)
        if not waiting or (resident and needed + size * len(finished) > self.state_bytes):
            return False
        kinds = self.inner.groups // self.config.num_hidden_layers
        made = launches("adapter made", **{"adapter": 1, "kind of group": kinds})
        self.timeline.phase(made, self.timeline.work("adapters made", 0, 5 * size))
        resident.append(waiting.popleft())
        return True

    def generate(self, part: str, samples: Sequence[Sample], lora: LowRank, sample_passes: float) -> None:
        """Sequences in order, as many at once as the Sampler runs. A step without new prompts replays a graph."""
        waiting, running = deque(samples), list[Sample]()
        while waiting or running:
            admitted = list[Sample]()
            budget = TOKEN_BUDGET - len(running)
            while waiting and len(running) + len(admitted) < MAX_NUM_SEQS and budget > 0:
                admitted.append(waiting.popleft())
                budget -= admitted[-1].new
            running += admitted
            self.timeline.begin(f"{part}, {'prefill' if admitted else 'decode'}")
            self._fetch({sample.adapter for sample in admitted} & self.offloaded)
            continued = sum(sample.left > 1 for sample in running)
            ahead = continued > 0 and (not waiting or continued == MAX_NUM_SEQS)  # the next step is launched first
            self.sampling_step(running, admitted, lora, sample_passes, waits=0 if ahead else 1)
            for sample in running:
                sample.context, sample.left = sample.context + 1, sample.left - 1
            running = [sample for sample in running if sample.left]

    def _fetch(self, adapters: set[int | None]) -> None:
        """Adapters that are needed come back from the host."""
        if adapters:
            seconds = len(adapters) * 4 * self.inner.parameters / assumed("link of host and device, bytes/s")
            self.timeline.phase(Count(torch=len(adapters)), (f"{LINK}: bandwidth", seconds))
            self.offloaded -= adapters

    def sampling_step(
        self, running: list[Sample], admitted: list[Sample], lora: LowRank, sample_passes: float, waits: int
    ) -> None:
        """One token of each running sequence, and the prompts of those that are new."""
        base, N, phase, work = self.base, len(running), self.timeline.phase, self.timeline.work
        adapters = len({sample.adapter for sample in running if sample.adapter is not None})
        tokens = N - len(admitted) + sum(sample.new for sample in admitted)
        pairs = sum(sample.new * (sample.new + 1) // 2 for sample in admitted)
        layers = self.layers(tokens, pairs, adapters, lora)
        layers.append(work("K/V", 0, base.kv * sum(sample.context for sample in running)))
        forward = launches("paged forward", once=1, layer=self.config.num_hidden_layers, group=lora.groups)
        python = assumed("host: sampling step") + N * assumed("host: sequence of a sampling step")
        new_adapters = 1 if admitted and adapters else 0
        batch = launches("batch", once=1 if admitted else 0, new_adapters=new_adapters)
        phase(batch, host=("host: Python", python))
        if admitted:
            phase(forward, *layers)
        else:
            fill = launches("graph's tensors", once=1, adapters=1 if adapters else 0)
            phase(fill, *layers, graph_kernels=forward.torch + forward.triton)
        logits = (2 * base.element + 4 + 4 * sample_passes) * self.config.vocab_size * N
        head = work("lm_head", 2 * base.head * N, base.element * base.head)
        sample = launches("sample", once=1, prompts=1 if admitted else 0)
        phase(sample._replace(waits=waits), head, work("sampling", 0, logits))
        self.steps.append((tokens, N))

    def update(self, passages: Sequence[Passage]) -> None:
        """The policy's adapter, a pass a step: a step's sequences fit one."""
        for first in [*range(0, len(passages), published.POLICY_BATCH)] * published.POLICY_EPOCHS:
            batch = passages[first : first + published.POLICY_BATCH]
            kept = [p.completions[p.kept] for p in batch]
            lengths = [p.prompt + n for p, n in zip(batch, kept, strict=True)]
            self.training_pass(lengths, sum(kept), 1, self.policy)

    def merge(self) -> None:
        """Each weight is merged twice, to check it and to keep it: widened, added to, rounded, checked or copied."""
        moved = 2 * (16 + 3 * self.base.element) * self.base.body
        work = self.timeline.work("merge", 4 * published.POLICY.r * self.base.body, moved)
        self.timeline.phase(launches("merge", projection=self.policy.projections), work)
