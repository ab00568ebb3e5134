"""Bodies of requests, with the names of OpenAI's API and vLLM's additions.

Three kinds of fields: those below, checked; those in UNSUPPORTED, which change the result and are refused by name
unless they have a value that switches nothing on; all others, which are tolerated and ignored, as vLLM does.
"""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from seal_engine.serve.errors import ApiError

MAX_LOGPROBS = 20
MAX_N = 128
NEUTRAL = (None, False, 0, "", [], {})
# Field -> values beside NEUTRAL that switch nothing on.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "logit_bias": (), "best_of": (1,), "suffix": (), "use_beam_search": (), "length_penalty": (1, 1.0),
    "early_stopping": (), "bad_words": (), "allowed_token_ids": (), "truncate_prompt_tokens": (), "prompt_embeds": (),
    "logits_processors": (), "response_format": ({"type": "text"},), "structured_outputs": (), "guided_json": (),
    "guided_regex": (), "guided_choice": (), "guided_grammar": (), "guided_decoding_backend": (), "tools": (),
    "tool_choice": ("none", "auto"), "functions": (), "function_call": ("none", "auto"), "audio": (),
    "modalities": (["text"],), "prediction": (), "chat_template": (), "documents": (), "mm_processor_kwargs": (),
    "web_search_options": (), "kv_transfer_params": (), "thinking_token_budget": (),
    "text": ({"format": {"type": "text"}},), "previous_response_id": (), "background": (), "conversation": (),
    "max_tool_calls": (), "truncation": ("disabled",), "prompt": (),
}  # fmt: skip

TokenIds = list[int]
Count = Annotated[int, Field(ge=0)]


class Body(BaseModel):
    """A JSON object. JSON types are not converted; unknown fields are tolerated."""

    model_config = ConfigDict(extra="allow", strict=True)

    def refuse_unsupported(self) -> None:
        """ApiError naming the first field that is set and has no support."""
        for name, value in (self.model_extra or {}).items():
            if name in UNSUPPORTED and value not in NEUTRAL and value not in UNSUPPORTED[name]:
                raise ApiError(400, f"{name}: found {value!r:.80}; accepted: nothing: it is not supported", name)


class StreamOptions(Body):
    """What a stream has beside its pieces."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class Sampling(Body):
    """How to sample, in completions and chats. None: the default."""

    model: str | None = None
    n: Annotated[int, Field(ge=1, le=MAX_N)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    min_tokens: Count | None = None
    stop: str | list[str] | None = None
    stop_token_ids: TokenIds | None = None
    ignore_eos: bool | None = None
    seed: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    add_special_tokens: bool | None = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None


class CompletionBody(Sampling):
    """POST /v1/completions"""

    prompt: str | TokenIds | list[str] | list[TokenIds]
    max_tokens: Count | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool | None = None


class Message(Body):
    """One turn of a chat. content: a text, or a list of parts of type "text"."""

    role: str
    content: str | list[dict[str, Any]] | None = None


class ChatBody(Sampling):
    """POST /v1/chat/completions"""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class ResponsesBody(Body):
    """POST /v1/responses, text in and text out."""

    model: str | None = None
    input: str | Annotated[list[Message], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    stream: bool | None = None


class TokenizeBody(Body):
    """POST /tokenize: a prompt or a chat."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(Body):
    """POST /detokenize"""

    model: str | None = None
    tokens: TokenIds


class LoadAdapterBody(Body):
    """POST /v1/load_lora_adapter. load_inplace: replace an adapter of the same name."""

    lora_name: Annotated[str, Field(min_length=1, max_length=200)]
    lora_path: Annotated[str, Field(min_length=1)]
    load_inplace: bool | None = None


class UnloadAdapterBody(Body):
    """POST /v1/unload_lora_adapter"""

    lora_name: Annotated[str, Field(min_length=1)]
