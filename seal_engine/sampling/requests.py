"""What a caller asks of the sampler and gets back."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from seal_engine.types import is_integer, is_number, require, require_integers

# Called before each token with the completion's tokens so far and the logits [V]; returns the logits to sample from.
LogitsHook = Callable[[list[int], Tensor], Tensor]

# Settings of generation_config.json that change what is sampled, and the values that change nothing.
UNSUPPORTED_SAMPLING = {
    "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0,
    "no_repeat_ngram_size": 0, "encoder_repetition_penalty": 1.0, "num_beams": 1, "bad_words_ids": None,
    "suppress_tokens": None, "begin_suppress_tokens": None, "forced_bos_token_id": None, "forced_eos_token_id": None,
    "sequence_bias": None, "guidance_scale": None, "penalty_alpha": None,
}  # fmt: skip


@dataclass(frozen=True)
class SamplingParams:
    """How to continue a prompt, with vLLM's names. Raises InputError when built with a field out of range."""

    n: int = 1  # completions of the same prompt
    temperature: float = 1.0  # 0: the most likely token
    top_p: float = 1.0  # sample from the fewest most likely tokens that have this much probability together
    top_k: int = 0  # sample from this many most likely tokens; 0 or -1: from all
    min_p: float = 0.0  # sample from tokens that are at least this share as likely as the most likely one
    repetition_penalty: float = 1.0  # above 1: tokens of the prompt and the completion become less likely
    frequency_penalty: float = 0.0  # subtracted from a token's logit for every time that it was sampled
    presence_penalty: float = 0.0  # subtracted from the logits of tokens that were sampled
    max_tokens: int | None = 64  # None: as many as the model's length leaves
    min_tokens: int = 0  # tokens before a stop id may be sampled, or a stop text may end it
    stop: str | Sequence[str] | None = None  # texts that end a completion and are cut off
    stop_token_ids: Sequence[int] | None = None  # ids that end a completion, beside the model's own
    ignore_eos: bool = False  # the model's own stop ids do not end a completion
    seed: int | None = None  # the same seed samples the same tokens, whatever else is sampled; None: a new seed
    logprobs: int | None = None  # report each token's log-probability, and those of this many most likely tokens
    # Report the log-probabilities of the prompt's tokens; a number: and those of this many most likely tokens there.
    prompt_logprobs: bool | int = False
    logits_hook: LogitsHook | None = None

    def __post_init__(self):
        require_integers(self, n=1, top_k=-1, min_tokens=0)
        if self.max_tokens is not None:
            valid = is_integer(self.max_tokens) and self.max_tokens >= 1
            require(valid, "max_tokens", self.max_tokens, "None or an integer >= 1")
            require(self.min_tokens <= self.max_tokens, "min_tokens", self.min_tokens, "at most max_tokens")
        temperature, top_p = self.temperature, self.top_p
        require(is_number(temperature) and temperature >= 0, "temperature", temperature, "a finite number >= 0")
        require(is_number(top_p) and 0 < top_p <= 1, "top_p", top_p, "0 < top_p <= 1")
        self._validate_penalties()
        stops = self.stops
        valid = isinstance(stops, list | tuple) and all(isinstance(text, str) and text for text in stops)
        require(valid, "stop", self.stop, "None, a text or a list of texts, none of them empty")
        ids = self.stop_token_ids
        valid = ids is None or (isinstance(ids, Sequence) and all(map(is_integer, ids)))
        require(valid, "stop_token_ids", ids, "None or a list of token ids")
        seed, logprobs = self.seed, self.logprobs
        require(seed is None or (is_integer(seed) and 0 <= seed < 2**63), "seed", seed, "None or 0 <= seed < 2**63")
        require(logprobs is None or (is_integer(logprobs) and logprobs >= 0), "logprobs", logprobs, "None or >= 0")
        require(isinstance(self.ignore_eos, bool), "ignore_eos", self.ignore_eos, "True or False")
        scores = self.prompt_logprobs
        valid = isinstance(scores, bool) or (is_integer(scores) and scores >= 0)
        require(valid, "prompt_logprobs", scores, "True, False or an integer >= 0")
        hook = self.logits_hook
        require(hook is None or callable(hook), "logits_hook", hook, "None or a function of (token ids, logits)")

    def _validate_penalties(self) -> None:
        require(is_number(self.min_p) and 0 <= self.min_p <= 1, "min_p", self.min_p, "0 <= min_p <= 1")
        penalty = self.repetition_penalty
        usable = is_number(penalty) and 0.01 <= penalty <= 100  # beyond, logits overflow
        require(usable, "repetition_penalty", penalty, "a number from 0.01 to 100; 1: none")
        for name in ("frequency_penalty", "presence_penalty"):
            penalty = getattr(self, name)
            require(is_number(penalty) and -2 <= penalty <= 2, name, penalty, "a number from -2 to 2")

    @property
    def penalizes(self) -> bool:
        """Whether a penalty is set, so that logits depend on the tokens so far."""
        return self.repetition_penalty != 1 or self.frequency_penalty != 0 or self.presence_penalty != 0

    @property
    def scores_prompt(self) -> bool:
        """Whether the prompt's log-probabilities are reported."""
        return self.prompt_logprobs is not False

    @property
    def stops(self) -> Sequence[str]:
        """The stop texts as a sequence."""
        if self.stop is None:
            return []
        return [self.stop] if isinstance(self.stop, str) else self.stop


@dataclass
class Completion:
    """One sample. finish_reason: "stop" (a stop id or text), "length", "cancelled", or None where it failed."""

    index: int
    text: str = ""  # without stop texts, stop ids and special tokens; empty without a tokenizer
    token_ids: list[int] = field(default_factory=list)  # with the stop id, if that ended it
    finish_reason: str | None = None
    logprobs: list[float] | None = None  # the model's log-probability of each of token_ids, as `score` gives it
    top_logprobs: list[dict[int, float]] | None = None  # for each of token_ids, the most likely tokens there


@dataclass
class RequestOutput:
    """The result of a request. A failed request has an error, and the tokens that were sampled until then."""

    prompt: str | None  # None where the prompt was token ids
    prompt_token_ids: list[int]
    outputs: list[Completion]
    prompt_logprobs: list[float] | None = None  # of tokens 1 .. n - 1
    prompt_top_logprobs: list[dict[int, float]] | None = None  # for tokens 1 .. n - 1, the most likely tokens there
    error: str | None = None


@dataclass(frozen=True)
class Delta:
    """What one step of a sampler added to a completion."""

    request_id: int
    index: int  # of the completion, among the request's n
    token_ids: list[int]
    text: str  # with `stream`: text that no later token changes or cuts off; "" otherwise
    finish_reason: str | None
    error: str | None = None  # the request has just failed


def read_sampling_defaults(source: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """What a generation_config.json says of sampling, as fields of SamplingParams. source names it in errors.

    Without do_sample that is greedy decoding, as in Transformers. InputError for a setting that is not supported.
    """
    for name, neutral in UNSUPPORTED_SAMPLING.items():
        accepted = f"{neutral}: it is not supported"
        require(values.get(name) in (None, neutral), f"{source}: {name}", values.get(name), accepted)
    if values.get("do_sample") is not True:
        return {"temperature": 0.0}
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    return {name: values[name] for name in names if values.get(name) is not None}
