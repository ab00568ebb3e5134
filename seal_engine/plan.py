"""What fits in memory, and how long a training step should take: arithmetic on a config, no weights needed."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from seal_engine.model.adapter_layout import AdapterLayout, adapter_layout
from seal_engine.model.config import ModelConfig
from seal_engine.types import InputError, LoraConfig, is_integer, is_number, require
from seal_kernels.cross_entropy import CHUNK_BYTES, CPU_CHUNK_BYTES
from seal_kernels.packed import MIN_ELEMENTS, num_copies, packs
from seal_kernels.quantized_linear import WeightFormat

RECOMPUTE = ("none", "mlp", "layer")
GRAPHED_FLOPS = 1.2e12  # a layer's base products in a pass that takes an H100 about as long as the host launches it
HEADROOM = 0.9  # share of the memory that is planned with: allocators fragment


@dataclass(frozen=True)
class Plan:
    """Bytes by kind, jobs resident at once, and the expected time of a training step and what bounds it."""

    tokens: int  # a step
    recompute: str
    adapters: int  # resident: in training at once
    weights_bytes: int
    master_bytes: int  # of all resident adapters: float32 parameters
    gradient_bytes: int
    moment_bytes: int
    activation_bytes: int
    packed_bytes: int  # of packed copies of the weights, which a CPU uses
    kv_bytes: int  # a block table's worth: what is left, for sampling
    matrix_seconds: float  # base products, 4 N FLOPs a token (6 N and more when recomputing)
    adapter_matrix_seconds: float  # low-rank products, 6 FLOPs a parameter and token
    adapter_bytes_seconds: float  # adapters read twice, gradients and moments read and written
    weight_bytes_seconds: float  # base weights, read twice a step
    limit: str  # the largest of these

    @property
    def step_seconds(self) -> float:
        """Products and the adapters' traffic one after the other; weights are read while products run."""
        return max(self.matrix_seconds, self.weight_bytes_seconds) + max(
            self.adapter_matrix_seconds, self.adapter_bytes_seconds
        )


def activation_bytes(
    config: ModelConfig, layout: AdapterLayout, tokens: int, element_size: int, recompute: str, cpu: bool
) -> int:
    """Bytes that a forward pass keeps for backward and its largest temporaries, for one packed stream.

    Temporaries are those of a layer's backward or the chunk of logits, which is gone by then: whichever is larger.
    """
    D, F, Q, KV = config.hidden_size, config.intermediate_size, config.query_size, config.key_value_size
    adapted = layout.ranks.sum((0, 2)).tolist()  # [4]: above 0 for groups that keep their input
    attention = 2 * D + (Q + 2 * KV) + (Q + KV) + Q + D * bool(adapted[0])
    mlp = 2 * F + D * bool(adapted[2] or recompute == "mlp") + F * bool(adapted[3])
    layer = {"none": attention + mlp, "mlp": attention + D, "layer": 2 * D}[recompute]
    kept = config.num_hidden_layers * layer
    working = 5 * F + 4 * D + (mlp if recompute != "none" else 0) + (attention if recompute == "layer" else 0)
    floats = 4 * (D + config.num_hidden_layers * config.num_attention_heads)  # unit gradients, log-sum-exps
    chunk = min(CPU_CHUNK_BYTES if cpu else CHUNK_BYTES, tokens * config.vocab_size * (4 + element_size))
    return tokens * (kept * element_size + floats) + max(tokens * working * element_size, chunk)


def packed_weight_bytes(
    config: ModelConfig, dtype: torch.dtype, free_bytes: int, quantization: WeightFormat | None = None
) -> int:
    """The packed copies that are made on a CPU with so much memory beside the weights, as `from_pretrained` does by
    default: of the large matrices, if they take at most a quarter of it."""
    D, F = config.hidden_size, config.intermediate_size
    layer = [D * (config.query_size + 2 * config.key_value_size), D * config.query_size, 2 * D * F, D * F]
    linears = layer * config.num_hidden_layers * num_copies(dtype) if quantization is None else []
    matrices = [*linears, D * config.vocab_size]
    total = sum(size for size in matrices if size >= MIN_ELEMENTS) * dtype.itemsize
    return total if packs(dtype) and total <= free_bytes // 4 else 0


def weights_bytes(config: ModelConfig, dtype: torch.dtype, quantization: WeightFormat | None) -> int:
    """Bytes of the base: all matrices in dtype, but for linears that are quantised."""
    embedding = config.vocab_size * config.hidden_size * (0 if config.tie_word_embeddings else 1)
    if quantization is None:
        return (config.num_matrix_parameters + embedding) * dtype.itemsize
    D, F, Q = config.hidden_size, config.intermediate_size, config.query_size
    linears = ((Q + 2 * config.key_value_size, D), (D, Q), (2 * F, D), (D, F))
    layer = sum(quantization.nbytes(outputs, inputs) for outputs, inputs in linears)
    head = config.vocab_size * config.hidden_size
    return config.num_hidden_layers * layer + (head + embedding) * dtype.itemsize


class TrainingMemory(NamedTuple):
    """How a Trainer uses memory."""

    recompute: str  # what backward computes again
    kept_tokens: int  # in a pass of at most so many tokens nothing: all its activations fit in the same memory
    graph_tokens: int  # a pass of at most so many tokens is a CUDA graph, which keeps memory of its own
    state_bytes: int  # what is left for adapters and their states


def training_memory(
    config: ModelConfig,
    tokens: int,
    element_size: int,
    free_bytes: int,
    recompute: str = "auto",
    cpu: bool = False,
    layouts: Sequence[AdapterLayout] = (),
) -> TrainingMemory:
    """What a Trainer's backward computes again, and how much memory is left for adapters and their states.

    tokens: of a pass. free_bytes: beside the weights. "auto": as little as leaves half of what is planned with, and
    nothing in a pass that needs no more memory with all of its activations. layouts: of the adapters that will be
    trained; none: of any. On a GPU passes are graphs that the host would take longer to launch than the device takes to
    compute, as far as their activations take at most a tenth of the memory.
    """
    layouts = layouts or [adapter_layout(config, LoraConfig(r=1, target_modules="all-linear"))]

    def cost(tokens: int, recompute: str) -> int:
        return max(activation_bytes(config, layout, tokens, element_size, recompute, cpu) for layout in layouts)

    choice = recompute
    if recompute == "auto":
        enough = (choice for choice in RECOMPUTE if cost(tokens, choice) <= HEADROOM * free_bytes / 2)
        choice = next(enough, "layer")
    planned, kept_tokens = cost(tokens, choice), 0
    if recompute == "auto":
        kept_tokens = bisect_right(range(1, tokens + 1), planned, key=lambda tokens: cost(tokens, "none"))
    graph_tokens = 0
    if not cpu and recompute == "auto":
        per_layer = config.num_matrix_parameters / config.num_hidden_layers
        host_bound = min(tokens, int(GRAPHED_FLOPS / (4 * per_layer)))
        sizes = range(1, host_bound + 1)
        graph_tokens = bisect_right(sizes, free_bytes // 10, key=lambda tokens: cost(tokens, "none"))
    graph_bytes = cost(graph_tokens + graph_tokens // 8, "none") if graph_tokens else 0  # passes are padded
    state_bytes = max(0, int(HEADROOM * (free_bytes - planned - graph_bytes)))
    return TrainingMemory(choice, kept_tokens, graph_tokens, state_bytes)


def make_plan(
    config: ModelConfig,
    lora: LoraConfig,
    memory_bytes: int,
    sequence_tokens: int,
    adapters: int | None = None,
    tokens: int = 8192,
    dtype: torch.dtype | None = None,
    cpu: bool = False,
    recompute: str = "auto",
    matrix_rate: float | None = None,
    bandwidth: float | None = None,
    quantization: WeightFormat | None = None,
) -> Plan:
    """Plan training with adapters like `lora` on sequences of `sequence_tokens`, one a step and adapter.

    memory_bytes: of the device. adapters: jobs there are to run (None: as many as fit). tokens: a step's budget.
    recompute "auto": the least that lets a whole step's worth of adapters (tokens / sequence_tokens) be resident.
    quantization: of the linears; None: as the config says, or none.
    matrix_rate (FLOP/s), bandwidth (bytes/s): measured, or 150e9 and 20e9 on a CPU, 750e12 and 4e12 on a GPU.
    Raises InputError if not even one adapter fits.
    """
    for name, value in (("memory_bytes", memory_bytes), ("sequence_tokens", sequence_tokens), ("tokens", tokens)):
        require(is_integer(value) and value >= 1, name, value, "an integer >= 1")
    require(adapters is None or (is_integer(adapters) and adapters >= 1), "adapters", adapters, "an integer >= 1")
    for name, rate in (("matrix_rate", matrix_rate), ("bandwidth", bandwidth)):
        require(rate is None or (is_number(rate) and rate > 0), name, rate, "a number > 0, per second")
    require(recompute in ("auto", *RECOMPUTE), "recompute", recompute, f"one of {['auto', *RECOMPUTE]}")
    layout = adapter_layout(config, lora)
    dtype = dtype or config.dtype or torch.float32
    element_size = 4 if cpu else dtype.itemsize
    matrix_rate = matrix_rate or (150e9 if cpu else 750e12)
    bandwidth = bandwidth or (20e9 if cpu else 4e12)
    weights = weights_bytes(config, dtype, quantization or config.quantization)
    state = 4 * layout.size * 4  # parameters, gradients, two moments, float32
    wanted = min(adapters or 10**9, max(1, tokens // sequence_tokens))
    choices = []
    for choice in RECOMPUTE if recompute == "auto" else (recompute,):
        activations = activation_bytes(config, layout, tokens, element_size, choice, cpu)
        resident = int(HEADROOM * memory_bytes - weights - activations) // state
        choices.append((min(resident, wanted), choice, activations, resident))
        if resident >= wanted:
            break
    _, choice, activations, resident = max(choices, key=lambda c: c[0])
    if resident < 1:
        needed = int((weights + activations + state) / HEADROOM)
        raise InputError(
            f"memory_bytes: found {memory_bytes}; accepted: at least {needed} for one adapter (weights {weights},"
            f" activations of {tokens} tokens {activations}, adapter state {state}), or fewer tokens"
        )
    resident = min(resident, adapters or resident)
    in_step = min(resident, wanted)
    step_tokens = min(tokens, in_step * sequence_tokens)
    N, P = config.num_matrix_parameters, layout.num_parameters
    mlp_products = 3 if layout.ranks[:, 3].any() else 2  # a frozen down is not made again
    mlp = 2 * mlp_products * config.hidden_size * config.intermediate_size * config.num_hidden_layers
    extra = {"none": 0, "mlp": mlp}
    flops = step_tokens * (4 * N + extra.get(choice, 2 * N))
    seconds = {
        "matrix": flops / matrix_rate,
        "adapter_matrix": step_tokens * 6 * P / matrix_rate,
        "adapter_bytes": in_step * P * 4 * (2 + 3 + 8) / bandwidth,
        "weight_bytes": 2 * weights / bandwidth,
    }
    left = max(0, int(HEADROOM * memory_bytes) - weights - activations - resident * state)
    packed = min(left, packed_weight_bytes(config, dtype, memory_bytes - weights, quantization)) if cpu else 0
    names = {
        "matrix": "matrix rate, base products",
        "adapter_matrix": "matrix rate, low-rank products",
        "adapter_bytes": "bandwidth, adapters and their optimizer state",
        "weight_bytes": "bandwidth, base weights",
    }
    return Plan(
        tokens=step_tokens,
        recompute=choice,
        adapters=resident,
        weights_bytes=weights,
        master_bytes=resident * layout.size * 4,
        gradient_bytes=resident * layout.size * 4,
        moment_bytes=resident * layout.size * 8,
        activation_bytes=activations,
        packed_bytes=packed,
        kv_bytes=left - packed,
        matrix_seconds=seconds["matrix"],
        adapter_matrix_seconds=seconds["adapter_matrix"],
        adapter_bytes_seconds=seconds["adapter_bytes"],
        weight_bytes_seconds=seconds["weight_bytes"],
        limit=names[max(seconds, key=lambda name: seconds[name])],
    )
