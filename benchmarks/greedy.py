"""Whether greedy answers are right, by the baseline's own weights: there is no figure for a wrong result."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

CHECKED = 64  # answers in 16 bits


def check_answers(
    model: Any,
    prompts: Sequence[list[int]],
    ours: Sequence[list[int]],
    theirs: Sequence[list[int]],
    least: float = 0.97,
    use_adapter: Callable[[int], object] = lambda i: None,
) -> None:
    """Raises an AssertionError if our answers are not those that the baseline's model gives.

    In float32 a share `least` of the answers must be the same, to the last token. In 16 bits rounding turns a near tie,
    and all that follows it, so the tokens of CHECKED answers of ours are checked one by one: after the prompt and our
    tokens before, each must be the most likely one by the model's weights in float32, or below it by at most twice what
    16 bits change this model's own logits there. use_adapter: makes the adapter of an answer the model's.
    """
    if dtype_of(model) == torch.float32:
        equal = sum(a == b for a, b in zip(ours, theirs, strict=True))
        assert equal >= least * len(ours), f"{equal} of {len(ours)} answers are the same: no figure for a wrong result"
        return
    assert list(map(len, ours)) == list(map(len, theirs)), "answers of other lengths"
    members = range(0, len(ours), -(-len(ours) // CHECKED))
    narrow = [logits_of(model, use_adapter, i, prompts[i], ours[i]) for i in members]
    with in_float32(model):
        for i, rounded in zip(members, narrow, strict=True):
            exact = logits_of(model, use_adapter, i, prompts[i], ours[i])
            error = (rounded.float() - exact).abs().amax(1)
            tokens = torch.tensor(ours[i], device=exact.device)[:, None]
            gap = exact.amax(1) - exact.gather(1, tokens)[:, 0]
            assert (gap <= 2 * error).all(), f"answer {i}: below the largest logits by {gap}; rounding makes {error}"


def dtype_of(model: Any) -> torch.dtype:
    return model.get_input_embeddings().weight.dtype


@torch.no_grad()
def logits_of(model: Any, use_adapter: Callable[[int], object], i: int, prompt: list[int], answer: list[int]) -> Tensor:
    """What answer i is drawn from: [len(answer), V]."""
    use_adapter(i)
    ids = torch.tensor([prompt + answer[:-1]], device=model.device)
    return model(input_ids=ids, use_cache=False, logits_to_keep=len(answer)).logits[0]


@contextmanager
def in_float32(model: Any) -> Iterator[None]:
    """The model with its parameters as float32, which is exact, and so is the way back."""
    parameters = list(model.parameters())
    dtypes = [parameter.dtype for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.data = parameter.data.float()
        yield
    finally:
        for parameter, dtype in zip(parameters, dtypes, strict=True):
            parameter.data = parameter.data.to(dtype)
