"""What a caller asks of the sampler and gets back."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from seal_engine.types import is_integer, is_number, require, require_integers

# Called before each token with the completion's tokens so far and the logits [V]; returns what to draw from.
LogitsHook = Callable[[list[int], Tensor], Tensor]


@dataclass(frozen=True)
class SamplingParams:
    """How to continue a prompt, with vLLM's names. Raises InputError when built with a field out of range."""

    n: int = 1  # completions of the same prompt
    temperature: float = 1.0  # 0: the most likely token
    top_p: float = 1.0  # draw from the fewest most likely tokens that have this much probability together
    top_k: int = 0  # draw from this many most likely tokens; 0: from all
    max_tokens: int | None = 64  # None: as many as the model's length leaves
    min_tokens: int = 0  # tokens before a stop id may be drawn
    stop: str | Sequence[str] | None = None  # text that ends a completion, and is cut off
    stop_token_ids: Sequence[int] | None = None  # these end it too, beside the model's own
    ignore_eos: bool = False  # the model's own stop ids do not end a completion
    seed: int | None = None  # the same seed draws the same tokens, whatever else is sampled; None: one of its own
    logprobs: int | None = None  # report each token's log-probability, and those of this many most likely tokens
    prompt_logprobs: bool = False  # report the prompt's
    logits_hook: LogitsHook | None = None

    def __post_init__(self):
        require_integers(self, n=1, top_k=0, min_tokens=0)
        most = self.max_tokens
        require(most is None or (is_integer(most) and most >= 1), "max_tokens", most, "None or an integer >= 1")
        require(most is None or self.min_tokens <= most, "min_tokens", self.min_tokens, "at most max_tokens")
        temperature, top_p = self.temperature, self.top_p
        require(is_number(temperature) and temperature >= 0, "temperature", temperature, "a finite number >= 0")
        require(is_number(top_p) and 0 < top_p <= 1, "top_p", top_p, "0 < top_p <= 1")
        stops = self.stops
        plain = isinstance(stops, list | tuple) and all(isinstance(text, str) and text for text in stops)
        require(plain, "stop", self.stop, "None, a text or a list of texts, none of them empty")
        ids = self.stop_token_ids
        plain = ids is None or (isinstance(ids, Sequence) and all(map(is_integer, ids)))
        require(plain, "stop_token_ids", ids, "None or a list of token ids")
        seed, logprobs = self.seed, self.logprobs
        require(seed is None or (is_integer(seed) and 0 <= seed < 2**63), "seed", seed, "None or 0 <= seed < 2**63")
        require(logprobs is None or (is_integer(logprobs) and logprobs >= 0), "logprobs", logprobs, "None or >= 0")
        for name in ("ignore_eos", "prompt_logprobs"):
            require(isinstance(getattr(self, name), bool), name, getattr(self, name), "True or False")
        hook = self.logits_hook
        require(hook is None or callable(hook), "logits_hook", hook, "None or a function of (token ids, logits)")

    @property
    def stops(self) -> Sequence[str]:
        """The stop texts as a sequence."""
        return [] if self.stop is None else [self.stop] if isinstance(self.stop, str) else self.stop


@dataclass
class Completion:
    """One sample. finish_reason: "stop" (a stop id or text), "length", "cancelled", or None where it failed."""

    index: int
    text: str = ""  # without stop texts, stop ids and special tokens; empty without a tokenizer
    token_ids: list[int] = field(default_factory=list)  # with the stop id, if that ended it
    finish_reason: str | None = None
    logprobs: list[float] | None = None  # log p of each of token_ids under the model: what `score` gives
    top_logprobs: list[dict[int, float]] | None = None  # at each place, those of the most likely tokens


@dataclass
class RequestOutput:
    """What became of a request. One that failed has an error, and what was sampled until then."""

    prompt: str | None  # None where the prompt was token ids
    prompt_token_ids: list[int]
    outputs: list[Completion]
    prompt_logprobs: list[float] | None = None  # of tokens 1 .. n - 1
    error: str | None = None


@dataclass(frozen=True)
class Delta:
    """What a sampler's step added to a completion."""

    request_id: int
    index: int  # which of the request's n
    token_ids: list[int]
    text: str  # with `stream`: text that no later token changes or cuts off; "" otherwise
    finish_reason: str | None
    error: str | None = None  # the request has just failed
