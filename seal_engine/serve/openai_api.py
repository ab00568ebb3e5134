"""Routes of OpenAI's API as vLLM serves it: completions, chats, responses, models, tokens, adapters."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable
from contextlib import aclosing, suppress
from time import time
from typing import Any, TypeVar

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse

from seal_engine.serve.errors import ApiError, as_api_error, error_body
from seal_engine.serve.formats import ChatFormat, CompletionFormat, new_id
from seal_engine.serve.generation import Generation, Piece, text_options
from seal_engine.serve.requests import SampleRequest
from seal_engine.serve.schemas import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    LoadAdapterBody,
    ResponsesBody,
    Sampling,
    TokenizeBody,
    UnloadAdapterBody,
)
from seal_engine.serve.service import Service
from seal_engine.types import InputError

DEFAULT_MAX_TOKENS = 16  # of /v1/completions, as OpenAI and vLLM have it
T = TypeVar("T")
Format = CompletionFormat | ChatFormat


class EventStream(StreamingResponse):
    """Server-sent events; their source is closed with the response, whatever ends it."""

    def __init__(self, events: AsyncIterator[str]):
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            close = getattr(self.body_iterator, "aclose", None)
            if close is not None:
                await close()


def make_routes(service: Service, errors: dict[int | str, dict[str, Any]]) -> APIRouter:
    """The routes over a service. errors: the responses that any of them may have, for the OpenAPI page."""
    routes = APIRouter(responses=errors)
    names = service.names

    @routes.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The base model under its first name, and the adapters."""
        base = names.base_names[0]
        shared = {"object": "model", "created": int(service.started), "owned_by": "seal_engine"}
        cards = [{"id": base, **shared, "root": base, "parent": None, "max_model_len": service.max_tokens}]
        for name, served in names.served.items():
            cards.append({"id": name, **shared, "root": str(served.directory), "parent": base, "max_model_len": None})
        return {"object": "list", "data": cards}

    @routes.post("/v1/completions")
    async def completions(body: CompletionBody, request: Request) -> Response:
        """Continue prompts: texts or token ids."""
        body.refuse_unsupported()
        adapter = names.resolve(body.model)
        prompts = await service.prompts(body.prompt, body.add_special_tokens is not False)
        limit = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
        scored = body.logprobs if body.echo else None
        wanted = [count for count in (scored, body.prompt_logprobs) if count is not None]
        requests = []
        for text, ids in prompts:
            params = service.params(
                body, len(ids), limit, logprobs=body.logprobs, prompt_logprobs=max(wanted) if wanted else False
            )
            requests.append(SampleRequest(ids, params, adapter, text))
        options = text_options(service, body, requests[0].params)
        drop = body.max_tokens == 0
        generation = Generation(service, requests, options, body.logprobs, bool(body.echo), drop)
        form = CompletionFormat(body, body.model or names.base_names[0], service.token_texts)
        return await _respond(request, generation, form, body)

    @routes.post("/v1/chat/completions")
    async def chat_completions(body: ChatBody, request: Request) -> Response:
        """Answer a chat."""
        body.refuse_unsupported()
        adapter = names.resolve(body.model)
        if body.top_logprobs and not body.logprobs:
            raise ApiError(400, "top_logprobs: found a number; accepted: only with logprobs=true", "top_logprobs")
        ids = await service.chat_prompt(
            body.messages,
            body.add_generation_prompt is not False,
            bool(body.continue_final_message),
            body.chat_template_kwargs,
        )
        limit = body.max_completion_tokens if body.max_tokens is None else body.max_tokens
        num_top = (body.top_logprobs or 0) if body.logprobs else None
        scored = False if body.prompt_logprobs is None else body.prompt_logprobs
        params = service.params(body, len(ids), limit, logprobs=num_top, prompt_logprobs=scored)
        options = text_options(service, body, params)
        generation = Generation(service, [SampleRequest(ids, params, adapter)], options, num_top)
        form = ChatFormat(body, body.model or names.base_names[0], service.token_texts)
        return await _respond(request, generation, form, body)

    @routes.post("/v1/responses")
    async def responses(body: ResponsesBody, request: Request) -> Response:
        """Answer a text or a chat with a text."""
        body.refuse_unsupported()
        if body.stream:
            raise ApiError(400, "stream: found true; accepted: false: /v1/chat/completions streams", "stream")
        adapter = names.resolve(body.model)
        chat = ChatBody.model_validate({"messages": _turns(body)})
        ids = await service.chat_prompt(chat.messages)
        params = service.params(body, len(ids), body.max_output_tokens)
        sample = SampleRequest(ids, params, adapter)
        (output,) = await unless_disconnected(request, service.sample([sample]))
        return JSONResponse(_response(body, names.base_names[0], len(ids), output.outputs[0]))

    @routes.post("/tokenize")
    async def tokenize(body: TokenizeBody) -> dict[str, Any]:
        """Token ids of a prompt or of a chat."""
        body.refuse_unsupported()
        names.resolve(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "prompt: found both or neither of prompt and messages; accepted: one of them", "prompt")
        if body.messages is not None:
            generate, go_on = body.add_generation_prompt is not False, bool(body.continue_final_message)
            ids = await service.chat_prompt(body.messages, generate, go_on, body.chat_template_kwargs)
        else:
            special = body.add_special_tokens is not False
            ids = await asyncio.to_thread(service.engine.tokenizer.encode, body.prompt or "", special)
        texts = [service.token_texts(token) for token in ids] if body.return_token_strs else None
        return {"count": len(ids), "max_model_len": service.max_tokens, "tokens": ids, "token_strs": texts}

    @routes.post("/detokenize")
    async def detokenize(body: DetokenizeBody) -> dict[str, Any]:
        """The text of token ids."""
        names.resolve(body.model)
        return {"prompt": await asyncio.to_thread(service.engine.tokenizer.decode, body.tokens)}

    @routes.post("/v1/load_lora_adapter", response_class=PlainTextResponse)
    async def load_lora_adapter(body: LoadAdapterBody) -> str:
        """Serve an adapter of a directory on the server under a name."""
        directory = names.allowed_directory(body.lora_path)
        if not directory.is_dir():
            raise ApiError(404, f"lora_path: found {body.lora_path!r:.200}; accepted: a directory", "lora_path")
        await service.load_adapter(body.lora_name, directory, bool(body.load_inplace))
        return f"The adapter '{body.lora_name}' is loaded."

    @routes.post("/v1/unload_lora_adapter", response_class=PlainTextResponse)
    async def unload_lora_adapter(body: UnloadAdapterBody) -> str:
        """Forget an adapter; requests that run with it go on."""
        names.unload(body.lora_name)
        return f"The adapter '{body.lora_name}' is unloaded."

    return routes


async def _respond(request: Request, generation: Generation, form: Format, body: Sampling) -> Response:
    """The response, whole or as a stream."""
    if not body.stream:
        pieces = await unless_disconnected(request, generation.whole())
        return JSONResponse(form.whole(pieces, generation))
    pieces = generation.stream()
    first = await unless_disconnected(request, anext(pieces))  # an error until here has a status of its own
    return EventStream(_events(first, pieces, generation, form, body))


async def _events(
    first: Piece, pieces: AsyncIterator[Piece], generation: Generation, form: Format, body: Sampling
) -> AsyncIterator[str]:
    """A stream's events. An error after the first piece is an event of its own."""
    usage = body.stream_options
    with_usage = usage is not None and bool(usage.include_usage)
    continuous = with_usage and usage is not None and bool(usage.continuous_usage_stats)

    def event(chunk: dict[str, Any], counts: dict[str, int] | None) -> str:
        return _event({**chunk, "usage": counts} if with_usage else chunk)

    async with aclosing(pieces):  # pyright: ignore[reportArgumentType]
        try:
            for chunk in form.chunks(first):
                yield event(chunk, generation.usage if continuous else None)
            async for piece in pieces:
                for chunk in form.chunks(piece):
                    yield event(chunk, generation.usage if continuous else None)
            if with_usage:
                yield event(form.last(), generation.usage)
        except Exception as error:
            yield _event(error_body(as_api_error(error)))
    yield "data: [DONE]\n\n"


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(',', ':'))}\n\n"


async def unless_disconnected(request: Request, work: Awaitable[T]) -> T:
    """The result of some work, which is cancelled when the client goes away; nobody sees the ApiError then."""
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ApiError(499, "the client is gone")
    finally:
        watcher.cancel()
        if not task.done():
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _turns(body: ResponsesBody) -> list[dict[str, Any]]:
    turns = [] if body.instructions is None else [{"role": "system", "content": body.instructions}]
    if isinstance(body.input, str):
        return [*turns, {"role": "user", "content": body.input}]
    for i, message in enumerate(body.input):
        if (message.model_extra or {}).get("type", "message") != "message":
            raise InputError(f"input[{i}]: found {message.model_extra!r:.80}; accepted: messages")
    return [*turns, *({"role": message.role, "content": message.content} for message in body.input)]


def _response(body: ResponsesBody, base_name: str, prompt_tokens: int, completion: Any) -> dict[str, Any]:
    """A response object of the Responses API, with the fields that OpenAI's client requires."""
    done = completion.finish_reason == "stop"
    content = {"type": "output_text", "text": completion.text, "annotations": [], "logprobs": []}
    status = "completed" if done else "incomplete"
    message = {
        "type": "message",
        "id": f"msg_{new_id()}",
        "status": status,
        "role": "assistant",
        "content": [content],
    }
    count = len(completion.token_ids)
    usage = {
        "input_tokens": prompt_tokens,
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": count,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": prompt_tokens + count,
    }
    return {
        "id": f"resp_{new_id()}",
        "object": "response",
        "created_at": int(time()),
        "model": body.model or base_name,
        "status": status,
        "error": None,
        "incomplete_details": None if done else {"reason": "max_output_tokens"},
        "instructions": body.instructions,
        "metadata": {},
        "output": [message],
        "parallel_tool_calls": False,
        "tool_choice": "none",
        "tools": [],
        "temperature": body.temperature,
        "top_p": body.top_p,
        "usage": usage,
    }
