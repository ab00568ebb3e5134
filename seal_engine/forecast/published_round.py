"""The published round of the knowledge task: the lengths of its texts, its settings, and its floors.

Floors are what cannot be left out, as benchmarks/bench_seal_round.py counts it: products with the base, once forward
and once backward; its bytes once a pass, in as few steps as the longest completion or job has; K/V, adapters and the
optimizer's states. Attention's and low-rank FLOPs and activations count for nothing.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from seal_engine.model.adapter_layout import adapter_layout
from seal_engine.model.config import ModelConfig
from seal_engine.types import LoraConfig
from seal_kernels.dispatch import ceil_div

FILE = Path(__file__).with_name("published_round.json")  # benchmarks/seal_round.py makes it
MODEL = {  # Qwen2.5-7B
    "architectures": ["Qwen2ForCausalLM"], "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944,
    "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "max_position_embeddings": 32768,
    "rope_theta": 1e6, "tie_word_embeddings": False, "dtype": "bfloat16",
}  # fmt: skip
REPEATS, EPOCHS = 3, 10  # adapters of a self-edit, and passes over its sequences, one sequence a step
INNER = LoraConfig(r=32, lora_alpha=64, target_modules=("q_proj", "v_proj"))
ANSWER = 64  # tokens, whatever they are
POLICY = LoraConfig(r=64, lora_alpha=128, target_modules="all-linear")
POLICY_EPOCHS, POLICY_BATCH = 2, 10


@dataclass(frozen=True)
class Passage:
    """Tokens of a passage's prompt, of itself, of its self-edits (as sampled, as trained on) and of its questions."""

    prompt: int
    passage: int
    completions: list[int]
    sequences: list[list[int]]  # of each self-edit
    questions: list[int]
    kept: int  # the number of the self-edit that the policy is trained on


def read_passages() -> list[Passage]:
    """The passages of the published round."""
    return [Passage(**row) for row in json.loads(FILE.read_text())]


@dataclass(frozen=True)
class Base:
    """Parameters and bytes of a base model, as costs count them."""

    config: ModelConfig
    element: int  # bytes

    @property
    def head(self) -> int:
        """Parameters of the lm_head."""
        return self.config.vocab_size * self.config.hidden_size

    @property
    def body(self) -> int:
        """Parameters of the layers' matrices."""
        return self.config.num_matrix_parameters - self.head

    @property
    def read_bytes(self) -> int:
        """Bytes that a pass reads of the parameters; an embedding table of its own is not read."""
        return self.element * (self.body + self.head)

    @property
    def bytes_in_memory(self) -> int:
        """Bytes of all matrices."""
        return self.read_bytes + (0 if self.config.tie_word_embeddings else self.element * self.head)

    @property
    def kv(self) -> int:
        """Bytes of a token's keys and values."""
        return 2 * self.element * self.config.num_hidden_layers * self.config.key_value_size


def floors(base: Base, passages: Sequence[Passage]) -> dict[tuple[str, str], tuple[float, float]]:
    """(part, row) -> the fewest (FLOPs, bytes)."""
    body, head, weights = base.body, base.head, base.read_bytes
    inner, policy = (adapter_layout(base.config, lora).num_parameters for lora in (INNER, POLICY))
    lengths = [n for p in passages for n in p.completions]
    first, later, prompts = len(lengths), sum(lengths) - len(lengths), sum(p.prompt for p in passages)
    read = sum(p.prompt * max(p.completions) for p in passages) + sum(n * n // 2 for n in lengths)
    jobs = [edit for p in passages for edit in p.sequences for _ in range(REPEATS)]
    trained, steps = EPOCHS * sum(map(sum, jobs)), EPOCHS * sum(map(len, jobs))
    asked = [n for p in passages for _ in range(REPEATS * len(p.sequences)) for n in p.questions]
    context = ANSWER * sum(asked) + len(asked) * ANSWER**2 // 2
    step = weights + 4 * inner * len(jobs)  # all adapters answer
    targets = POLICY_EPOCHS * sum(p.completions[p.kept] for p in passages)
    kept, updates = targets + POLICY_EPOCHS * prompts, POLICY_EPOCHS * ceil_div(len(passages), POLICY_BATCH)
    base_steps = EPOCHS * max(map(len, jobs))
    return {
        ("sampling", "prefill"): (2 * (body * prompts + head * first), weights),
        ("sampling", "decode"): (2 * (body + head) * later, weights * (max(lengths) - 1) + base.kv * read),
        ("training", "base products"): (4 * (body * trained + head * (trained - steps)), 2 * weights * base_steps),
        ("training", "low-rank products"): (0, 16 * inner * steps),
        ("training", "optimizer"): (0, 36 * inner * steps),
        ("asking", "prefill"): (2 * (body * sum(asked) + head * len(asked)), step),
        ("asking", "decode"): (2 * (body + head) * (ANSWER - 1) * len(asked), (ANSWER - 1) * step + base.kv * context),
        ("updating", "training"): (4 * (body * kept + head * targets), (2 * weights + 52 * policy) * updates),
        ("updating", "merge"): (0, 2 * base.element * body),
    }
