"""Completions as pieces: a whole choice is one piece, a stream has one for each step."""

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

from seal_engine.sampling.requests import Completion, Delta
from seal_engine.serve.loop_calls import LoopCalls
from seal_engine.serve.requests import SampleRequest
from seal_engine.serve.service import Service
from seal_engine.serve.token_texts import TextOptions, TextStream
from seal_engine.types import InputError


@dataclass(frozen=True)
class Piece:
    """Consecutive tokens of a choice, or all of them. logprobs and top_logprobs: one for each token, where they were
    asked for; None for a prompt's first token, which nothing predicts."""

    index: int  # of the choice: n times the prompt's number, plus the sample's
    request: SampleRequest
    text: str
    offset: int  # characters of the choice before it
    token_ids: list[int]
    logprobs: list[float | None] | None
    top_logprobs: list[dict[int, float] | None] | None
    begins: bool  # the first of its choice
    finish_reason: str | None = None
    stop_reason: str | int | None = None


class Generation:
    """The prompts of one HTTP request. echo: pieces begin with the prompt. drop_completion: and end with it."""

    def __init__(
        self,
        service: Service,
        requests: Sequence[SampleRequest],
        options: TextOptions,
        num_top: int | None,
        echo: bool = False,
        drop_completion: bool = False,
    ):
        """num_top: how many most likely tokens the caller asked for; None: no log-probabilities."""
        self.service = service
        self.requests = requests
        self.options = options
        self.num_top = num_top
        self.echo = echo
        self.drop_completion = drop_completion
        self.num_completion_tokens = 0

    @property
    def usage(self) -> dict[str, int]:
        """Token counts, as far as it got."""
        prompt, completion = sum(len(request.token_ids) for request in self.requests), self.num_completion_tokens
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    async def whole(self) -> list[Piece]:
        """All choices, in order."""
        await self.service.sample(self.requests)
        pieces = []
        for number, request in enumerate(self.requests):
            for completion in _outputs(request):
                pieces.append(self._whole_piece(number, request, completion))
        return pieces

    def _whole_piece(self, number: int, request: SampleRequest, completion: Completion) -> Piece:
        """A finished completion as one piece."""
        ids = [] if self.drop_completion else completion.token_ids
        self.num_completion_tokens += len(ids)
        text = "" if self.drop_completion else self.options.text(completion)
        reason = "length" if self.drop_completion else completion.finish_reason
        stop_reason = None if self.drop_completion else self.options.stop_reason(completion)
        index = number * request.params.n + completion.index
        return self._piece(index, request, completion, 0, ids, text, 0, reason, stop_reason)

    def _piece(
        self,
        index: int,
        request: SampleRequest,
        completion: Completion,
        start: int,
        ids: list[int],
        text: str,
        offset: int,
        finish_reason: str | None,
        stop_reason: str | int | None,
    ) -> Piece:
        """Tokens start .. start + len(ids) of a completion; before the first ones the prompt, where it is echoed."""
        begins = start == 0 and offset == 0
        logprobs: list[float | None] | None = None
        top: list[dict[int, float] | None] | None = None
        if self.num_top is not None:
            logprobs = list((completion.logprobs or [])[start : start + len(ids)])
            wanted = completion.top_logprobs or [{}] * len(completion.token_ids)
            top = [self._largest(values) for values in wanted[start : start + len(ids)]]
        if self.echo and begins:
            output = request.output
            assert output is not None
            text = self._prompt_text(request) + text
            ids = [*request.token_ids, *ids]
            if logprobs is not None and top is not None:
                logprobs = [None, *(output.prompt_logprobs or []), *logprobs]
                top = [None, *(self._largest(values) for values in output.prompt_top_logprobs or []), *top]
        return Piece(index, request, text, offset, ids, logprobs, top, begins, finish_reason, stop_reason)

    def _largest(self, values: dict[int, float]) -> dict[int, float]:
        return dict(islice(values.items(), self.num_top))

    def _prompt_text(self, request: SampleRequest) -> str:
        return self.options.decode(list(request.token_ids)) if request.prompt is None else request.prompt

    async def stream(self) -> AsyncIterator[Piece]:
        """Pieces as they come. Closing the iterator cancels what is not done."""
        mailbox = Mailbox(self.service.calls)
        streams: dict[tuple[int, int], _ChoiceStream] = {}
        for number, request in enumerate(self.requests):
            request.on_delta = partial(_put_delta, mailbox, number)
            request.future.add_done_callback(partial(_put_end, mailbox, number))
        self.service.submit(self.requests)
        left = len(self.requests)
        try:
            while left:
                for number, delta in await mailbox.take():
                    request = self.requests[number]
                    if delta is None:
                        left -= 1
                        request.future.result()  # raises what it failed with
                    elif delta.error is None:
                        key = number, delta.index
                        state = streams.setdefault(key, _ChoiceStream(TextStream(self.options)))
                        for piece in self._stream_piece(number, request, delta, state):
                            yield piece
        finally:
            self.service.cancel(self.requests)

    def _stream_piece(
        self, number: int, request: SampleRequest, delta: Delta, state: "_ChoiceStream"
    ) -> Iterator[Piece]:
        """The piece of a delta."""
        completion = _outputs(request)[delta.index]
        if self.drop_completion:
            yield self._whole_piece(number, request, completion)
            return
        start, ids = state.num_tokens, delta.token_ids
        if delta.finish_reason is None:
            text, stop_reason = state.text.add(ids), None
        else:
            text, stop_reason = state.text.finish(completion), self.options.stop_reason(completion)
        index = number * request.params.n + delta.index
        piece = self._piece(
            index, request, completion, start, ids, text, state.offset, delta.finish_reason, stop_reason
        )
        state.num_tokens += len(ids)
        state.offset += len(piece.text)
        self.num_completion_tokens += len(ids)
        yield piece


@dataclass
class _ChoiceStream:
    """How far a choice has been sent."""

    text: TextStream
    num_tokens: int = 0
    offset: int = 0  # characters, an echoed prompt among them


def _outputs(request: SampleRequest) -> list[Completion]:
    assert request.output is not None
    return request.output.outputs


class Mailbox:
    """Items from any thread for one task of the event loop."""

    def __init__(self, calls: LoopCalls):
        self._calls = calls
        self._items: list[Any] = []
        self._event = asyncio.Event()

    def put(self, item: Any) -> None:
        """Add an item, from any thread."""
        self._calls.put(partial(self._add, item))

    def _add(self, item: Any) -> None:
        self._items.append(item)
        self._event.set()

    async def take(self) -> list[Any]:
        """Wait for items, and take all."""
        await self._event.wait()
        self._event.clear()
        items, self._items = self._items, []
        return items


def _put_delta(mailbox: Mailbox, number: int, delta: Delta) -> None:
    mailbox.put((number, delta))


def _put_end(mailbox: Mailbox, number: int, _: Any) -> None:
    mailbox.put((number, None))


def text_options(service: Service, body: Any, request_params: Any) -> TextOptions:
    """What is text of the completions that a body asks for. InputError for stop texts that cannot be."""
    tokenizer, params = service.engine.tokenizer, request_params
    special = [tokenizer.special_tokens[text] for text in params.stops if text in tokenizer.special_tokens]
    own = () if params.ignore_eos else service.engine.stop_token_ids
    if any(not 0 <= token < service.engine.config.vocab_size for token in params.stop_token_ids or ()):
        raise InputError(f"stop_token_ids: found {params.stop_token_ids!r:.80}; accepted: ids of the vocabulary")
    return TextOptions(
        tokenizer,
        params.stops,
        frozenset((*own, *special, *(params.stop_token_ids or ()))),
        body.skip_special_tokens is not False,
        bool(body.include_stop_str_in_output),
    )
