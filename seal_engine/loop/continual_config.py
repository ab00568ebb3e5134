"""ContinualConfig: the settings of the continual experiment."""

from dataclasses import dataclass

from seal_engine.loop.retrieval import RETRIEVERS
from seal_engine.sampling.requests import SamplingParams
from seal_engine.types import is_integer, is_number, require, require_integers, setting

# Each method is described where it is built, in continual_methods.py.
METHODS = (
    "merge", "replay", "replay-one", "distil", "gate", "replay+gate", "null-space", "consolidate", "bank", "oracle",
    "joint", "slow", "all-linear",
)  # fmt: skip


WRITERS = ("system", "policy")


@dataclass(frozen=True)
class ContinualConfig:
    """One edit after another. Sequences and passages are by default as many as were published."""

    seeds: tuple[int, ...] = setting((0,), "random seeds; each is a whole run of its own")
    methods: tuple[str, ...] = setting(
        ("merge", "replay", "distil", "gate", "bank", "joint"), f"how edits are kept: {', '.join(METHODS)}"
    )
    sequences: int = setting(64, "sequences of passages, all of which run side by side")
    passages: int = setting(8, "passages in a sequence, learned one after another")
    edit_writer: str = setting(
        "system",
        "what writes self-edits: the current system (as published), or the policy, which no edit touches",
        WRITERS,
    )
    policies: tuple[str, ...] = setting((), "directories of adapters that are merged into the base first, in order")
    temperature: float = setting(1.0, "sampling temperature of self-edits")
    top_p: float = setting(0.95, "nucleus sampling probability of self-edits")
    max_tokens: int = setting(1024, "tokens of a self-edit at most")
    resamples: int = setting(3, "times that an invalid self-edit is sampled again")
    base_samples: int = setting(2048, "texts that the untrained model writes; half train, half measure divergence")
    base_sample_tokens: int = setting(48, "tokens of such a text at most")
    replay_ratio: float = setting(1.0, "training sequences of earlier self-edits per sequence of the new one")
    replay_buffer: int = setting(0, "earlier self-edits that are kept for replay (0: all)")
    distil_top_k: int = setting(20, "soft targets per token")
    gate_budget: float = setting(0.05, "rise of the loss of kept texts, in nats per token, that the gate allows")
    null_space_energy: float = setting(0.99, "share of the base's input energy that updates must not touch")
    null_space_rank: int = setting(128, "LoRA rank r of an update in the null space; lora_alpha is the same")
    null_space_targets: tuple[str, ...] = setting(("down_proj",), "projections that such an update adapts")
    null_space_learning_rate: float = setting(1.2e-2, "learning rate of such an update")
    null_space_epochs: float = setting(1.25, "epochs of such an update, as a multiple of the task's")
    null_space_edits: float = setting(0.05, "weight of earlier self-edits' inputs beside the base's")
    consolidate_replay: float = setting(0.6, "replay_ratio of 'consolidate'")
    consolidate_rehearsal: float = setting(0.6, "base samples per sequence of the new self-edit, in 'consolidate'")
    retriever: str = setting("bm25", "what routes a question to an edit of the bank", RETRIEVERS)
    probe_contexts: int = setting(6, "contexts per sequence for the probes of reading and of what the model knew")
    probe_writing: int = setting(2, "self-edits per sequence that are written and rewarded after the last step")
    max_ungraded: float = setting(0.1, "share of missing grades above which the run stops")

    def __post_init__(self):
        valid = bool(self.seeds) and all(is_integer(seed) and 0 <= seed < 2**31 for seed in self.seeds)
        require(valid and len(set(self.seeds)) == len(self.seeds), "seeds", self.seeds, "different integers >= 0")
        known = bool(self.methods) and set(self.methods) <= set(METHODS)
        different = len(set(self.methods)) == len(self.methods)
        require(known and different, "methods", self.methods, f"different ones of {', '.join(METHODS)}")
        require_integers(
            self, sequences=1, passages=1, max_tokens=1, resamples=0, base_samples=2, base_sample_tokens=2,
            replay_buffer=0, distil_top_k=1, null_space_rank=1, probe_contexts=0, probe_writing=0,
        )  # fmt: skip
        for name in ("replay_ratio", "consolidate_replay", "consolidate_rehearsal", "gate_budget", "null_space_edits"):
            value = getattr(self, name)
            require(is_number(value) and value >= 0, name, value, "a number >= 0")
        for name in ("null_space_learning_rate", "null_space_epochs"):
            value = getattr(self, name)
            require(is_number(value) and value > 0, name, value, "a number > 0")
        for name in ("null_space_energy", "max_ungraded"):
            value = getattr(self, name)
            require(is_number(value) and 0 <= value <= 1, name, value, "0 to 1")
        require(self.edit_writer in WRITERS, "edit_writer", self.edit_writer, f"one of {list(WRITERS)}")
        require(self.retriever in RETRIEVERS, "retriever", self.retriever, f"one of {list(RETRIEVERS)}")
        _ = self.sampling_params

    @property
    def sampling_params(self) -> SamplingParams:
        """How self-edits are sampled."""
        return SamplingParams(temperature=self.temperature, top_p=self.top_p, max_tokens=self.max_tokens)
