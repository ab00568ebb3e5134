"""Bodies of the Tinker API's JSON requests. Types are not converted; fields that are not here are ignored."""

from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from seal_engine.serve.errors import first_mistake
from seal_engine.types import InputError

MAX_TOP = 256  # most likely tokens of one place
MAX_SAMPLES = 1024  # of one prompt

Ttl = Annotated[int, Field(ge=1, le=10**9)] | None
Sequence = Annotated[int, Field(ge=0, lt=2**31)]
SequenceId = Annotated[int, Field(ge=1, lt=2**31)] | None
Top = Annotated[int, Field(ge=0, le=MAX_TOP)]
Metadata = dict[str, Any] | None


class Body(BaseModel):
    """A JSON object."""

    model_config = ConfigDict(extra="ignore", strict=True, protected_namespaces=())


B = TypeVar("B", bound=Body)


class Unread(Body):
    """A request with a number in the order of its model's, whose other fields are read when its turn comes: one that is
    wrong fails there, for those behind it would wait for the number of a request that was refused when it came."""

    model_config = ConfigDict(extra="allow")

    seq_id: SequenceId = None

    def read(self, kind: type[B]) -> B:
        """Its fields. InputError naming the first that is wrong."""
        try:
            return kind.model_validate(self.model_dump())
        except ValidationError as error:
            field_name, message = first_mistake(error.errors())
            raise InputError(f"{field_name or 'body'}: {message}") from None


class CreateSession(Body):
    """POST /create_session."""

    user_metadata: Metadata = None
    display_name: str | None = None


class Heartbeat(Body):
    """POST /session_heartbeat."""

    session_id: str


class Lora(Body):
    """What is to be trained. The SDK's default has train_unembed, which trains nothing here."""

    rank: Annotated[int, Field(ge=1)]
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True


class Optimizer(Body):
    """The kind of an optimizer."""

    type: str = "adamw"


class CreateModel(Body):
    """POST /create_model."""

    session_id: str
    model_seq_id: Sequence
    base_model: str
    lora_config: Lora
    user_metadata: Metadata = None
    optimizer_config: Optimizer = Optimizer()


class OfModel(Body):
    """A request that names a model and no more."""

    model_id: str


class Numbered(Unread):
    """POST /optim_step and /save_weights*."""

    model_id: str


class Load(Unread):
    """POST /load_weights: onto a model, or as a new one of a session."""

    model_id: str | None = None


class Adam(Body):
    """Settings of a step. grad_clip_norm 0: no clipping."""

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0


class OptimStep(Body):
    """POST /optim_step. optimizer_params: of another optimizer, refused."""

    adam_params: Adam | None = None
    optimizer_params: dict[str, Any] | None = None


class SaveWeights(Body):
    """POST /save_weights."""

    path: str | None = None
    ttl_seconds: Ttl = None
    overwrite: bool = False
    user_metadata: Metadata = None


class SaveWeightsForSampler(SaveWeights):
    """POST /save_weights_for_sampler: to a path, or without one for the sampler of this number."""

    sampling_session_seq_id: Sequence | None = None


class LoadWeights(Body):
    """POST /load_weights. session_id and model_seq_id: of a new model."""

    path: str
    optimizer: bool
    session_id: str | None = None
    model_seq_id: Sequence | None = None
    user_metadata: Metadata = None


class CreateSamplingSession(Body):
    """POST /create_sampling_session."""

    session_id: str
    sampling_session_seq_id: Sequence
    base_model: str | None = None
    model_path: str | None = None


class OfSampler(Body):
    """A request that names a sampler and no more."""

    sampling_session_id: str


class Chunk(Body):
    """A part of a prompt."""

    type: str = "encoded_text"
    tokens: list[int] | None = None


class Prompt(Body):
    """A prompt."""

    chunks: list[Chunk]


class Params(Body):
    """How to sample."""

    max_tokens: int | None = None
    seed: int | None = None
    stop: str | list[str] | list[int] | None = None
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0


class Sample(OfSampler):
    """POST /asample."""

    seq_id: Annotated[int, Field(ge=0)] | None = None
    num_samples: Annotated[int, Field(ge=1, le=MAX_SAMPLES)] = 1
    prompt: Prompt
    sampling_params: Params
    prompt_logprobs: bool | None = None
    topk_prompt_logprobs: Top = 0
    topk_sample_logprobs: Top = 0
    prompt_logprobs_last_n: Annotated[int, Field(ge=1)] | None = None
    target_prompt_logprobs: dict[str, Any] | None = None
    prompt_alt_tokens_k: int = 0


class OfPromise(Body):
    """A request that names a promise."""

    request_id: str
    allow_metadata_only: bool = False


class OfPath(Body):
    """POST /weights_info."""

    tinker_path: str


class SetTtl(Body):
    """PUT .../ttl."""

    ttl_seconds: Ttl = None
