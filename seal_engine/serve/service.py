"""The Service: what every route needs: an engine behind its worker, names of models, prompts of a request."""

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from time import time
from typing import Any

from seal_engine.engine import Engine
from seal_engine.sampling.requests import RequestOutput, SamplingParams
from seal_engine.serve.adapters import AdapterNames
from seal_engine.serve.errors import ApiError
from seal_engine.serve.loop_calls import LoopCalls
from seal_engine.serve.requests import SampleRequest
from seal_engine.serve.schemas import Message
from seal_engine.serve.tinker.service import TinkerService
from seal_engine.serve.token_texts import TokenTexts
from seal_engine.serve.worker import Worker
from seal_engine.types import InputError

LONG_TEXT = 20_000  # characters, from which on tokenizing would hold up the event loop
SAMPLING_FIELDS = (
    *("n", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty"),
    *("min_tokens", "stop", "stop_token_ids", "ignore_eos", "seed"),
)
# Variables of a chat template that a request may not set: they are the server's own.
RESERVED_VARIABLES = (
    "messages",
    "chat_template",
    "tokenize",
    "tools",
    "add_generation_prompt",
    "continue_final_message",
)


@dataclass
class Service:
    """chat_template: in place of the tokenizer's. sampling_defaults: of requests that do not say."""

    engine: Engine
    worker: Worker
    names: AdapterNames
    tinker: TinkerService
    chat_template: str | None = None
    sampling_defaults: Mapping[str, Any] = field(default_factory=dict)
    started: float = field(default_factory=time)

    @cached_property
    def token_texts(self) -> TokenTexts:
        """The text of each token alone."""
        return TokenTexts(self.engine.tokenizer)

    @cached_property
    def calls(self) -> LoopCalls:
        """What the worker's thread calls on the event loop; first used there."""
        return LoopCalls()

    @property
    def max_tokens(self) -> int:
        """Tokens that a prompt and its completion may have together: the model's length, or what the cache holds."""
        pool = self.worker.sampler.cache.pool
        return min(self.engine.config.max_position_embeddings, pool.num_blocks * pool.block_size + 1)

    def params(self, body: Any, prompt_length: int, max_tokens: int | None, **fields: Any) -> SamplingParams:
        """SamplingParams of a body. max_tokens None: as many as fit. InputError naming the field."""
        values = {name: getattr(body, name, None) for name in SAMPLING_FIELDS}
        values = {name: value for name, value in values.items() if value is not None}
        limit = max(1, self.max_tokens - prompt_length)
        count = limit if max_tokens is None else max(1, max_tokens)
        return SamplingParams(**{**self.sampling_defaults, **values, **fields, "max_tokens": count})

    # Prompts

    async def prompts(
        self, prompt: str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]], add_special_tokens: bool
    ) -> list[tuple[str | None, list[int]]]:
        """The prompts of a completions request, each as its text, if it was one, and its token ids."""
        several = not isinstance(prompt, str) and not (prompt and isinstance(prompt[0], int))
        items: Sequence[Any] = prompt if several else [prompt]
        if not items:
            raise InputError("prompt: found an empty list; accepted: a text, token ids, or a list of either")
        size = sum(len(item) for item in items if isinstance(item, str))

        def encode() -> list[tuple[str | None, list[int]]]:
            names = [f"prompt[{i}]" if several else "prompt" for i in range(len(items))]
            return [
                (item if isinstance(item, str) else None, self.token_ids(item, name, add_special_tokens))
                for item, name in zip(items, names, strict=True)
            ]

        return await asyncio.to_thread(encode) if size > LONG_TEXT else encode()

    def token_ids(self, prompt: str | Sequence[int], name: str, add_special_tokens: bool = True) -> list[int]:
        """Checked token ids of a text or of token ids."""
        if isinstance(prompt, str) and not add_special_tokens:
            prompt = self.engine.tokenizer.encode(prompt, add_special_tokens=False)
        return self.engine.inputs.token_ids(prompt, name)

    def chat_token_ids(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """The token ids of a chat through the chat template. A model without one reads the messages' texts, one after
        the other, a newline between them; the server says so when it starts."""
        turns = [{**message.model_dump(exclude_none=True), "content": message_text(message)} for message in messages]
        if not self.has_chat_template:
            return self.token_ids("\n".join(turn["content"] for turn in turns), "messages")
        for name in variables or {}:
            if name in RESERVED_VARIABLES:
                raise InputError(f"chat_template_kwargs: found {name!r}; accepted: other variables of the template")
        ids = self.engine.tokenizer.apply_chat_template(
            turns,
            add_generation_prompt=add_generation_prompt and not continue_final_message,
            continue_final_message=continue_final_message,
            chat_template=self.chat_template,
            **(variables or {}),
        )
        return self.token_ids(ids, "messages")

    @property
    def has_chat_template(self) -> bool:
        """Whether chats go through a template."""
        return self.chat_template is not None or bool(self.engine.tokenizer.chat_templates)

    # Sampling

    def submit(self, requests: Sequence[SampleRequest]) -> None:
        """Queue the prompts of one HTTP request. ApiError for more than the queue ever takes; QueueFullError."""
        most, count = self.worker.max_queue, sum(request.params.n for request in requests)
        if count > most:
            raise ApiError(400, f"prompt: found {count} samples of all prompts; accepted: {most} in one request", "n")
        self.worker.sample(requests)

    async def chat_prompt(self, messages: Sequence[Message], *arguments: Any) -> list[int]:
        """`chat_token_ids`, beside the event loop where that takes long."""
        if sum(len(str(message.content)) for message in messages) > LONG_TEXT:
            return await asyncio.to_thread(self.chat_token_ids, messages, *arguments)
        return self.chat_token_ids(messages, *arguments)

    async def sample(self, requests: Sequence[SampleRequest]) -> list[RequestOutput]:
        """The outputs of prompts. Whoever stops waiting cancels them."""
        self.submit(requests)
        try:
            return await asyncio.gather(*(self.calls.wait(request.future) for request in requests))
        finally:
            self.cancel(requests)

    def cancel(self, requests: Iterable[SampleRequest]) -> None:
        """End those that are not done."""
        for request in requests:
            self.worker.cancel(request)

    # Adapters

    async def load_adapter(self, name: str, directory: Path, replace: bool = False) -> None:
        """Load an adapter and serve it under a name. InputError for the name, or for what the directory holds."""
        self.names.begin_load(name, replace)
        try:
            load = self.worker.call(lambda engine: engine.load_adapter(directory))
            adapter = await asyncio.wrap_future(load)
        except BaseException:
            self.names.abandon_load(name)
            raise
        self.names.finish_load(name, adapter, directory)


def message_text(message: Message) -> str:
    """The text of a message: its content, or its content's parts of type text one after the other. InputError."""
    if isinstance(message.content, str):
        return message.content
    texts = []
    for i, part in enumerate(message.content or []):
        text = part.get("text")
        if part.get("type") not in ("text", "input_text", "output_text") or not isinstance(text, str):
            raise InputError(f"messages: content[{i}]: found {part!r:.80}; accepted: parts of type text")
        texts.append(text)
    return "".join(texts)
