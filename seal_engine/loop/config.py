"""LoopConfig: the settings of the outer loop."""

from collections.abc import Sequence
from dataclasses import dataclass

from seal_engine.sampling.requests import SamplingParams
from seal_engine.training.jobs import SCHEDULERS, TrainJob, TrainSequence
from seal_engine.types import LoraConfig, is_integer, is_number, renamed_errors, require, require_integers, setting

KEEP = ("best", "gain", "top")
UPDATES = ("merge", "adapter")


@dataclass(frozen=True)
class LoopConfig:
    """The outer loop. Defaults are those of the published recipe (knowledge incorporation)."""

    seeds: tuple[int, ...] = setting((0,), "random seeds; each is a whole run of its own, for a spread of results")
    rounds: int = setting(2, "ReST^EM rounds; each samples, trains, rewards and updates the policy once")
    contexts: int = setting(50, "training contexts per round; each round takes the next ones")
    self_edits: int = setting(5, "self-edits sampled per training context and round")
    repeats: int = setting(3, "adapters trained on each self-edit, each with its own seed")
    held_out_self_edits: int = setting(1, "self-edits sampled per held-out context for an evaluation")
    held_out_repeats: int = setting(1, "adapters trained on each held-out self-edit")
    continued_pretraining: int = setting(
        0, "self-edits per held-out context that one adapter for all contexts is trained on (0: no such adapter)"
    )
    temperature: float = setting(1.0, "sampling temperature of self-edits")
    top_p: float = setting(0.95, "nucleus sampling probability of self-edits")
    max_tokens: int = setting(1024, "tokens of a self-edit at most")
    resamples: int = setting(3, "times that an invalid self-edit is sampled again")
    keep: str = setting(
        "best",
        "self-edits to learn from: best of each context, all that beat the model without an adapter (gain), or the top",
        KEEP,
    )
    keep_fraction: float = setting(0.2, "fraction of the valid self-edits to learn from, with keep = top")
    keep_reward: float = setting(
        0.0, "least reward of a self-edit to learn from; above 0, a round whose rewards are all 0 changes no policy"
    )
    shuffle_rewards: bool = setting(False, "control experiment: every self-edit gets the reward of another one")
    policy_rank: int = setting(64, "LoRA rank r of the policy update")
    policy_alpha: float = setting(128, "lora_alpha of the policy update")
    policy_learning_rate: float = setting(3e-4, "learning rate of the policy update")
    policy_lr_scheduler: str = setting("linear", "learning-rate schedule of the policy update", SCHEDULERS)
    policy_epochs: int = setting(2, "epochs of the policy update over the kept self-edits")
    policy_batch_size: int = setting(10, "self-edits per optimizer step of the policy update")
    policy_update: str = setting(
        "merge", "merge each update into the base, or keep it as an adapter that only writes self-edits", UPDATES
    )
    max_ungraded: float = setting(0.1, "share of missing grades or self-edits above which the run stops")
    self_edit_source: str = setting("", "source of a round's self-edits (a name that the table shows); default: policy")
    trials_per_step: int = setting(250, "adapters trained and questioned at once, then recorded as one step")

    def __post_init__(self):
        seeds = self.seeds
        valid = isinstance(seeds, tuple) and bool(seeds) and all(is_integer(s) and 0 <= s < 2**31 for s in seeds)
        require(valid and len(set(seeds)) == len(seeds), "seeds", seeds, "different integers >= 0")
        minimum = {name: 1 for name, kind in type(self).__annotations__.items() if kind is int}
        minimum |= {"rounds": 0, "continued_pretraining": 0, "resamples": 0}
        require_integers(self, **minimum)
        for name in ("keep_fraction", "max_ungraded"):
            value = getattr(self, name)
            require(is_number(value) and 0 <= value <= 1, name, value, "0 to 1")
        require(is_number(self.keep_reward), "keep_reward", self.keep_reward, "a number")
        require(self.keep in KEEP, "keep", self.keep, f"one of {list(KEEP)}")
        require(self.policy_update in UPDATES, "policy_update", self.policy_update, f"one of {list(UPDATES)}")
        _ = self.sampling_params
        same = {name: f"policy_{name}" for name in ("learning_rate", "lr_scheduler", "batch_size")}
        names = {"num_epochs": "policy_epochs", "lora.r": "policy_rank", "lora.lora_alpha": "policy_alpha"}
        with renamed_errors(same | names):
            self.policy_job([TrainSequence([0, 0])]).check()

    @property
    def sampling_params(self) -> SamplingParams:
        """How self-edits are sampled."""
        return SamplingParams(temperature=self.temperature, top_p=self.top_p, max_tokens=self.max_tokens)

    def policy_job(self, sequences: Sequence[TrainSequence]) -> TrainJob:
        """The M-step's fine-tuning of the policy."""
        lora = LoraConfig(r=self.policy_rank, lora_alpha=self.policy_alpha, target_modules="all-linear")
        rate, scheduler, batch = self.policy_learning_rate, self.policy_lr_scheduler, self.policy_batch_size
        return TrainJob(sequences, lora, rate, scheduler, num_epochs=self.policy_epochs, batch_size=batch)
