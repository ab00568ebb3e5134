"""Plans: activation memory against what a pass really takes, arithmetic on a known model, limits and refusals."""

import os
import subprocess
import sys

import pytest
import torch

import seal_engine.plan
from seal_engine import InputError, LoraConfig
from seal_engine.model.adapter_layout import adapter_layout
from seal_engine.model.config import ModelConfig
from seal_engine.model.transformer import Model
from seal_engine.plan import HEADROOM, RECOMPUTE, activation_bytes, make_plan, packed_weight_bytes, training_memory
from seal_kernels import packed
from seal_kernels.cross_entropy import CPU_CHUNK_BYTES

GIB = 2**30
QWEN_7B = ModelConfig.from_dict({
    "architectures": ["Qwen2ForCausalLM"], "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944,
    "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6, "rope_theta": 1e6, "hidden_act": "silu", "tie_word_embeddings": False, "dtype": "bfloat16",
})  # fmt: skip
SEAL = LoraConfig(r=32, lora_alpha=64, target_modules=("q_proj", "v_proj"))

MEASURED = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 8000, "hidden_size": 256, "intermediate_size": 768,
    "num_hidden_layers": 16, "num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6, "hidden_act": "silu", "tie_word_embeddings": True, "dtype": "float32",
}  # fmt: skip
TOKENS = 1024
SHRUNK_CHUNK = CPU_CHUNK_BYTES // 4  # a chunk of logits that stands to TOKENS as the whole one stands to 4096
CASES = {
    "nothing recomputed, all projections": ("none", "all-linear"),
    "nothing recomputed, two projections": ("none", ("q_proj", "v_proj")),
    "MLP recomputed, all projections": ("mlp", "all-linear"),
    "layers recomputed, two projections": ("layer", ("q_proj", "v_proj")),
}
PEAKS = """
import torch
import seal_kernels.cross_entropy
from seal_engine.model.adapters import Adapter
from seal_engine.model.config import ModelConfig
from seal_engine.model.transformer import Model
from seal_engine.training.verbs import AdapterBatch, target_logprobs
from seal_engine.types import LoraConfig

def kib(key):
    return int(next(l for l in open("/proc/self/status") if l.startswith(key)).split()[1])

seal_kernels.cross_entropy.CPU_CHUNK_BYTES = {chunk}
config = ModelConfig.from_dict({config})
model = Model(config, torch.float32, torch.device("cpu"))
for _, tensor in model.named_tensors():
    tensor.normal_(0, 0.02)
for recompute, targets in {cases}:
    adapter = Adapter.create(config, LoraConfig(r=8, target_modules=targets), model.device)
    adapter.allocate_optimizer_state()
    for count in (1, {count}):  # the first loads what a first pass loads
        before = kib("VmRSS")
        open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
        ids = [[(7 * i + j) % 8000 for j in range(64)] for i in range(count)]
        work = AdapterBatch(adapter, ids, [[False] + [True] * 63] * count)
        target_logprobs(model, [work], recompute)[0][0].sum().backward()
    print((kib("VmHWM") - before) * 1024)
"""


@pytest.fixture(scope="module")
def peaks():
    """Bytes by which resident memory grows in one forward and backward, by case: one process measures them all."""
    cases = list(CASES.values())
    code = PEAKS.format(config=MEASURED, chunk=SHRUNK_CHUNK, cases=cases, count=TOKENS // 64)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(sys.path), "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536",
    }  # fmt: skip
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    return dict(zip(CASES, map(int, result.stdout.split()), strict=True))


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="peak memory is read from /proc")
@pytest.mark.xdist_group("peaks")
@pytest.mark.parametrize("case", CASES)
def test_activations_are_as_large_as_planned(case, peaks, monkeypatch):
    """Measured as the growth of resident memory in one forward and backward of 1024 tokens, at 0.9 to 1.6 times.

    A plan below the measurement runs out of memory, and HEADROOM leaves a tenth for that. One above it is waste, which
    is largest with "layer": all of a layer's tensors count as if they were alive together, and the chunk of logits
    counts as CPU_CHUNK_BYTES, of which a CPU writes half (no second, 16-bit buffer).
    """
    recompute, targets = CASES[case]
    monkeypatch.setattr(seal_engine.plan, "CPU_CHUNK_BYTES", SHRUNK_CHUNK)
    config = ModelConfig.from_dict(MEASURED)
    layout = adapter_layout(config, LoraConfig(r=8, target_modules=targets))
    planned = activation_bytes(config, layout, TOKENS, 4, recompute, cpu=True)
    assert 0.9 <= planned / peaks[case] <= 1.6


def test_qwen_7b_on_139_gib():
    """The arithmetic by hand, Qwen2.5-7B in bfloat16, rank 32 on q_proj and v_proj, sequences of 50 tokens.

    A layer: D (2 Q + 2 KV + 3 F) = 3584 (7168 + 1024 + 56832) = 233_046_016. N: 28 of them and the lm_head,
    152064 x 3584: 7_070_285_824; the embedding table as much as the lm_head again: weights 15_230_566_400 bytes.
    An adapter: 28 x 32 x (3584 + 3584 + 3584 + 512) = 10_092_544 numbers; with gradient and moments 161_480_704 bytes.
    163 sequences of 50 tokens are a step of 8150 tokens. Nothing is recomputed: for each token and layer
    2 D (residual, sum) + (Q + 2 KV) + (Q + KV) + Q + D (the input of q and v) + 2 F = 61_056 numbers are kept, 28 GB.
    Left of 0.9 x 139 GiB is room for 550 to 556 adapters. 4 N FLOPs a token at 750e12 take 307 ms.
    """
    made = make_plan(QWEN_7B, SEAL, 139 * GIB, sequence_tokens=50)
    assert made.weights_bytes == 15_230_566_400
    assert made.master_bytes + made.gradient_bytes + made.moment_bytes == made.adapters * 161_480_704
    assert made.tokens == 8150
    assert made.recompute == "none"
    kept = 8192 * 28 * 61_056 * 2
    assert kept < made.activation_bytes < 1.1 * kept
    assert 550 <= made.adapters <= 556
    assert made.matrix_seconds == pytest.approx(4 * 7_070_285_824 * 8150 / 750e12)
    assert made.adapter_matrix_seconds == pytest.approx(6 * 10_092_544 * 8150 / 750e12)
    assert made.adapter_bytes_seconds == pytest.approx(163 * 10_092_544 * 4 * 13 / 4e12)
    assert made.weight_bytes_seconds == pytest.approx(2 * 15_230_566_400 / 4e12)
    assert made.limit == "matrix rate, base products"
    assert made.step_seconds == pytest.approx(made.matrix_seconds + made.adapter_bytes_seconds)
    assert 20_000 < made.tokens / made.step_seconds < 30_000


@pytest.mark.parametrize("recompute", ["auto", *RECOMPUTE])
@pytest.mark.parametrize("adapters", [None, 3])
def test_bytes_by_kind_add_up(recompute, adapters):
    """To HEADROOM of the memory, and with room for no further adapter where their number was not given."""
    memory = 60 * GIB
    made = make_plan(QWEN_7B, SEAL, memory, 50, adapters=adapters, recompute=recompute)
    kinds = (made.weights_bytes, made.master_bytes, made.gradient_bytes, made.moment_bytes, made.activation_bytes)
    assert sum(kinds) + made.kv_bytes == int(HEADROOM * memory)
    assert made.gradient_bytes == made.master_bytes
    assert made.moment_bytes == 2 * made.master_bytes
    size = adapter_layout(QWEN_7B, SEAL).size
    assert made.master_bytes == made.adapters * size * 4
    if adapters is None:
        assert made.kv_bytes < 16 * size
    else:
        assert made.adapters == adapters
        assert made.tokens == 150


def test_small_passes_keep_their_activations():
    """Within the memory of a whole pass that recomputes: the next larger one needs more. What is asked for holds."""
    layout = adapter_layout(QWEN_7B, SEAL)
    recompute, kept, graphed, state = training_memory(QWEN_7B, 8192, 2, 60 * 10**9, layouts=[layout])
    planned = activation_bytes(QWEN_7B, layout, 8192, 2, "mlp", cpu=False)
    graphs = activation_bytes(QWEN_7B, layout, graphed + graphed // 8, 2, "none", cpu=False)
    assert (recompute, state) == ("mlp", int(HEADROOM * (60 * 10**9 - planned - graphs)))
    sizes = [activation_bytes(QWEN_7B, layout, tokens, 2, "none", cpu=False) for tokens in (kept, kept + 1)]
    assert sizes[0] <= planned < sizes[1]
    state = int(HEADROOM * (60 * 10**9 - planned))
    assert training_memory(QWEN_7B, 8192, 2, 60 * 10**9, "mlp", layouts=[layout]) == ("mlp", 0, 0, state)
    assert training_memory(QWEN_7B, 8192, 2, 90 * 10**9, layouts=[layout])[:2] == ("none", 8192)


def test_graphs_are_for_passes_that_wait_for_the_host():
    """About 1.8 ms a layer on an H100 (docs/decisions.md): 1.2 TFLOP, forward and backward. A tenth of the memory is
    the most that their activations take; on a CPU there are none."""
    small = ModelConfig.from_dict({**MEASURED, "hidden_size": 1024, "intermediate_size": 4096})
    for config, memory in ((QWEN_7B, 60 * 10**9), (small, 60 * 10**9), (QWEN_7B, 20 * 10**9)):
        graphed = training_memory(config, 8192, 2, memory).graph_tokens
        layout = adapter_layout(config, LoraConfig(r=1, target_modules="all-linear"))
        taken, more = [activation_bytes(config, layout, n, 2, "none", cpu=False) for n in (graphed, graphed + 1)]
        flops = 4 * config.num_matrix_parameters / config.num_hidden_layers * graphed
        assert taken <= memory // 10
        assert more > memory // 10 or graphed == 8192 or flops == pytest.approx(1.2e12, rel=0.01)
    assert training_memory(QWEN_7B, 8192, 4, 60 * 10**9, cpu=True).graph_tokens == 0


def test_recompute_is_the_least_that_lets_a_step_be_resident():
    """163 adapters of 154 MiB are a step. Where not even "layer" makes room for them, whatever holds the most."""
    state = 16 * adapter_layout(QWEN_7B, SEAL).size
    found = set()
    for memory in range(24 * GIB, 120 * GIB, 4 * GIB):
        made = make_plan(QWEN_7B, SEAL, memory, 50)
        room = {}
        for choice in RECOMPUTE:
            costs = activation_bytes(QWEN_7B, adapter_layout(QWEN_7B, SEAL), 8192, 2, choice, cpu=False)
            room[choice] = (int(HEADROOM * memory) - made.weights_bytes - costs) // state
        assert room["none"] < room["mlp"] < room["layer"]
        assert made.recompute == next((choice for choice in RECOMPUTE if room[choice] >= 163), "layer")
        assert made.adapters == room[made.recompute]
        found.add(made.recompute)
    assert found == set(RECOMPUTE)
    flops = {c: make_plan(QWEN_7B, SEAL, 139 * GIB, 50, recompute=c).matrix_seconds * 750e12 / 8150 for c in RECOMPUTE}
    N, mlp = QWEN_7B.num_matrix_parameters, 28 * 2 * 3584 * 18944  # a frozen down is not made again
    assert flops == pytest.approx({"none": 4 * N, "mlp": 4 * N + 2 * mlp, "layer": 6 * N})


def test_limits_switch():
    """Many tokens: the matrix rate. Few: the weights are read for nothing. Large ranks, short sequences: adapters."""
    limits = {
        "matrix rate, base products": dict(lora=SEAL, sequence_tokens=50),
        "bandwidth, base weights": dict(lora=SEAL, sequence_tokens=8, tokens=8),
        "bandwidth, adapters and their optimizer state": dict(
            lora=LoraConfig(r=256, target_modules="all-linear"), sequence_tokens=10
        ),
        "matrix rate, low-rank products": dict(
            lora=LoraConfig(r=3000, target_modules="all-linear"), sequence_tokens=8192, bandwidth=1e15
        ),
    }
    for limit, fields in limits.items():
        made = make_plan(QWEN_7B, memory_bytes=1000 * GIB, **fields)
        seconds = {
            "matrix rate, base products": made.matrix_seconds,
            "matrix rate, low-rank products": made.adapter_matrix_seconds,
            "bandwidth, adapters and their optimizer state": made.adapter_bytes_seconds,
            "bandwidth, base weights": made.weight_bytes_seconds,
        }
        assert made.limit == limit
        assert max(seconds, key=lambda name: seconds[name]) == limit
        fast = make_plan(QWEN_7B, memory_bytes=1000 * GIB, **{**fields, "matrix_rate": 1e18, "bandwidth": 1e16})
        assert fast.step_seconds < made.step_seconds


def test_a_cpu_keeps_float32_activations_of_16_bit_weights():
    gpu, cpu = (make_plan(QWEN_7B, SEAL, 300 * GIB, 50, cpu=cpu, recompute="none") for cpu in (False, True))
    assert cpu.weights_bytes == gpu.weights_bytes
    assert 1.8 < cpu.activation_bytes / gpu.activation_bytes < 2
    assert cpu.matrix_seconds == pytest.approx(gpu.matrix_seconds * 750 / 0.150)
    wide = make_plan(QWEN_7B, SEAL, 300 * GIB, 50, dtype=torch.float32)
    assert wide.weights_bytes == 2 * gpu.weights_bytes


def test_too_little_memory():
    """The message has the sizes, and the least that it names is enough."""
    with pytest.raises(InputError, match=r"memory_bytes: found \d+; accepted: at least \d+ for one adapter") as caught:
        make_plan(QWEN_7B, SEAL, 16 * GIB, 50)
    words = str(caught.value)
    assert "weights 15230566400" in words
    assert f"adapter state {16 * adapter_layout(QWEN_7B, SEAL).size}" in words
    least = int(words.split("at least ")[1].split(" ")[0])
    assert 16 * GIB < least < 26 * GIB
    assert make_plan(QWEN_7B, SEAL, least + 2, 50).adapters == 1
    with pytest.raises(InputError, match="memory_bytes"):
        make_plan(QWEN_7B, SEAL, least - 2, 50)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(memory_bytes=0), "memory_bytes: found 0"),
        (dict(memory_bytes=1e12), "memory_bytes: found 1000000000000.0; accepted: an integer"),
        (dict(sequence_tokens=0), "sequence_tokens: found 0"),
        (dict(tokens=-1), "tokens: found -1"),
        (dict(adapters=0), "adapters: found 0"),
        (dict(recompute="all"), "recompute: found 'all'; accepted: one of"),
        (dict(matrix_rate=0), "matrix_rate: found 0"),
        (dict(bandwidth=float("nan")), "bandwidth: found nan"),
        (dict(lora=LoraConfig(r=0)), "lora.r: found 0"),
        (dict(lora=LoraConfig(target_modules=("wq",))), "lora.target_modules: found"),
    ],
)
def test_fields_out_of_range(fields, message):
    with pytest.raises(InputError) as caught:
        make_plan(QWEN_7B, **{"lora": SEAL, "memory_bytes": 139 * GIB, "sequence_tokens": 50, **fields})
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("copies", [1, 2])
def test_packed_copies_are_counted_as_the_model_counts_them(monkeypatch, copies):
    """MEASURED's large matrices, from 2^18 elements on: gate_up 2 x 256 x 768 = 393_216 in each of 16 layers, and the
    lm_head 8000 x 256 = 2_048_000: 4 (16 x 393_216 + 2_048_000) bytes in float32. qkv has 98_304, o 65_536, down
    196_608 elements, and are not packed. They are made if they take at most a quarter of the memory beside the weights.
    On AMD the layers' have another copy for backward.
    """
    monkeypatch.setattr(packed, "packs_all_rows", lambda: copies == 2)
    config, expected = ModelConfig.from_dict(MEASURED), 4 * (copies * 16 * 393_216 + 2_048_000)
    assert Model(config, torch.float32, torch.device("cpu")).packed_bytes == expected
    assert packed_weight_bytes(config, torch.float32, 4 * expected) == expected
    assert packed_weight_bytes(config, torch.float32, 4 * expected - 1) == 0
    assert packed_weight_bytes(config, torch.float64, GIB) == 0
    plans = [make_plan(config, SEAL, GIB, sequence_tokens=50, adapters=1, cpu=cpu) for cpu in (True, False)]
    assert [made.packed_bytes for made in plans] == [expected, 0]
