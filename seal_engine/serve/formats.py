"""Pieces as JSON: a completion's and a chat's, whole and streamed, with the field names of OpenAI's API."""

from random import getrandbits
from time import time
from typing import Any

from seal_engine.serve.generation import Generation, Piece
from seal_engine.serve.schemas import ChatBody, CompletionBody
from seal_engine.serve.token_texts import TokenTexts

LEAST_LOGPROB = -9999.0  # in place of minus infinity, which JSON cannot hold


class CompletionFormat:
    """/v1/completions"""

    def __init__(self, body: CompletionBody, model: str, texts: TokenTexts):
        self.body = body
        self.texts = texts
        self.head = {"id": f"cmpl-{new_id()}", "object": "text_completion", "created": int(time()), "model": model}

    def whole(self, pieces: list[Piece], generation: Generation) -> dict[str, Any]:
        """The response."""
        choices = []
        for piece in pieces:
            choice = self._choice(piece)
            if self.body.prompt_logprobs is not None:
                choice["prompt_logprobs"] = prompt_logprobs(piece, self.body.prompt_logprobs, self.texts)
            choices.append(choice)
        return {**self.head, "choices": choices, "usage": generation.usage}

    def chunks(self, piece: Piece) -> list[dict[str, Any]]:
        """What a stream sends for a piece."""
        return [{**self.head, "choices": [self._choice(piece)]}]

    def last(self) -> dict[str, Any]:
        """The chunk that carries the usage."""
        return {**self.head, "choices": []}

    def _choice(self, piece: Piece) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": piece.index,
            "text": piece.text,
            "logprobs": None if piece.logprobs is None else self._logprobs(piece),
            "finish_reason": piece.finish_reason,
            "stop_reason": piece.stop_reason,
        }
        if self.body.return_token_ids:
            prompt = list(piece.request.token_ids) if piece.begins else []
            choice["prompt_token_ids"] = prompt or None
            echoed = len(prompt) if self.body.echo else 0
            choice["token_ids"] = piece.token_ids[echoed:]
        return choice

    def _logprobs(self, piece: Piece) -> dict[str, Any]:
        tokens, offsets, values, tops = [], [], [], []
        offset = piece.offset
        for token, value, top in zip(piece.token_ids, piece.logprobs or [], piece.top_logprobs or [], strict=True):
            text = token_name(token, self.texts, self.body.return_tokens_as_token_ids)
            tokens.append(text)
            offsets.append(offset)
            offset += len(self.texts(token))
            values.append(json_logprob(value))
            tops.append(None if top is None or value is None else self._top(token, text, value, top))
        return {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}

    def _top(self, token: int, text: str, value: float, top: dict[int, float]) -> dict[str, float | None]:
        """By text; of tokens with the same text the most likely one. The token itself is always there."""
        values: dict[str, float | None] = {}
        for other, other_value in top.items():
            name = token_name(other, self.texts, self.body.return_tokens_as_token_ids)
            values.setdefault(name, json_logprob(other_value))
        values.setdefault(text, json_logprob(value))
        return values


class ChatFormat:
    """/v1/chat/completions"""

    def __init__(self, body: ChatBody, model: str, texts: TokenTexts):
        self.body = body
        self.texts = texts
        self.head = {"id": f"chatcmpl-{new_id()}", "created": int(time()), "model": model}

    def whole(self, pieces: list[Piece], generation: Generation) -> dict[str, Any]:
        """The response."""
        choices = []
        for piece in pieces:
            message = {"role": "assistant", "content": piece.text, "refusal": None}
            choices.append({**self._choice(piece), "message": message})
        response = {**self.head, "object": "chat.completion", "choices": choices, "usage": generation.usage}
        if self.body.prompt_logprobs is not None:
            response["prompt_logprobs"] = prompt_logprobs(pieces[0], self.body.prompt_logprobs, self.texts)
        if self.body.return_token_ids:
            response["prompt_token_ids"] = list(pieces[0].request.token_ids)
        return response

    def chunks(self, piece: Piece) -> list[dict[str, Any]]:
        """What a stream sends for a piece: before the first of a choice, the role."""
        head = {**self.head, "object": "chat.completion.chunk"}
        chunks = [{**head, "choices": [{**self._choice(piece), "delta": {"content": piece.text}}]}]
        if piece.begins:
            begin = {"index": piece.index, "delta": {"role": "assistant", "content": ""}}
            chunks.insert(0, {**head, "choices": [{**begin, "logprobs": None, "finish_reason": None}]})
        return chunks

    def last(self) -> dict[str, Any]:
        """The chunk that carries the usage."""
        return {**self.head, "object": "chat.completion.chunk", "choices": []}

    def _choice(self, piece: Piece) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": piece.index,
            "logprobs": None if piece.logprobs is None else {"content": self._logprobs(piece), "refusal": None},
            "finish_reason": piece.finish_reason,
            "stop_reason": piece.stop_reason,
        }
        if self.body.return_token_ids:
            choice["token_ids"] = piece.token_ids
        return choice

    def _logprobs(self, piece: Piece) -> list[dict[str, Any]]:
        content = []
        for token, value, top in zip(piece.token_ids, piece.logprobs or [], piece.top_logprobs or [], strict=True):
            likely = [self._entry(other, other_value) for other, other_value in (top or {}).items()]
            content.append({**self._entry(token, value), "top_logprobs": likely})
        return content

    def _entry(self, token: int, value: float | None) -> dict[str, Any]:
        text = token_name(token, self.texts, self.body.return_tokens_as_token_ids)
        return {"token": text, "logprob": json_logprob(value), "bytes": list(text.encode())}


def new_id() -> str:
    """32 hexadecimal digits, drawn in the process: a system call would hand the interpreter to the worker's thread."""
    return f"{getrandbits(128):032x}"


def token_name(token: int, texts: TokenTexts, as_id: bool | None) -> str:
    """A token in log-probabilities: its text, or "token_id:5" where that was asked for."""
    return f"token_id:{token}" if as_id else texts(token)


def json_logprob(value: float | None) -> float | None:
    """A log-probability that JSON can hold."""
    return None if value is None else max(value, LEAST_LOGPROB)


def prompt_logprobs(piece: Piece, count: int, texts: TokenTexts) -> list[dict[str, Any] | None]:
    """vLLM's field: for each token of the prompt its log-probability and those of the most likely ones, by id."""
    output = piece.request.output
    assert output is not None
    entries: list[dict[str, Any] | None] = [None]
    values, tops = output.prompt_logprobs or [], output.prompt_top_logprobs or []
    for token, value, top in zip(list(piece.request.token_ids)[1:], values, tops, strict=True):
        shown = {token: value} | dict(list(top.items())[:count])
        ranks = {other: rank for rank, other in enumerate(top, 1)}
        entries.append(
            {
                str(other): {
                    "logprob": json_logprob(other_value),
                    "rank": ranks.get(other),
                    "decoded_token": texts(other),
                }
                for other, other_value in shown.items()
            }
        )
    return entries
