"""The protobuf messages of the Tinker API, made from their field numbers when this module is imported.

Requests and replies of forward_backward, and replies of asample, are protobuf on the wire. The table below is all that
a reader needs of a .proto file, so there is no compiler and no generated code. Enumerations are int32 here, and fields
that exclude each other are plain fields: both are the same bytes.
"""

from typing import Any

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

from seal_engine.types import InputError

PACKAGE = "seal_engine.tinker"
# Message -> (field number, name, type); "*": repeated, "{}": a map from strings.
MESSAGES: dict[str, list[tuple[int, str, str]]] = {
    "EncodedText": [(1, "tokens", "bytes")],  # int32
    "Image": [(1, "data", "bytes")],
    "Audio": [(1, "dmel", "bytes")],
    "Chunk": [(1, "encoded_text", "EncodedText"), (2, "image", "Image"), (3, "dmel", "Audio")],
    "SparseCsr": [(1, "values", "bytes"), (2, "crow_indices", "bytes"), (3, "col_indices", "bytes")],  # indices int64
    "Tensor": [
        (1, "dense", "bytes"), (2, "sparse_csr", "SparseCsr"), (3, "dtype", "int32"), (4, "shape", "*int64"),
    ],
    "Datum": [(1, "model_input", "*Chunk"), (2, "loss_fn_inputs", "{}Tensor")],
    "LossConfigValue": [(1, "number", "double"), (2, "text", "string")],
    "ForwardBackwardRequest": [
        (1, "model_id", "string"), (2, "seq_id", "int32"), (3, "data", "*Datum"), (4, "loss_fn", "string"),
        (5, "loss_fn_config", "{}double"), (6, "forward_only", "bool"), (7, "loss_fn_config_v2", "{}LossConfigValue"),
    ],
    "BatchedTensor": [
        (1, "data", "bytes"), (2, "offsets", "bytes"), (3, "dtype", "int32"), (4, "trailing_shape", "*int64"),
    ],
    "ArrayRecord": [(1, "type_tag", "string"), (2, "fields", "{}BatchedTensor"), (3, "num_datums", "int64")],
    "ForwardBackwardOutput": [
        (1, "loss_fn_output_type", "string"), (2, "loss_fn_outputs", "*ArrayRecord"), (3, "metrics", "{}double"),
    ],
    "TopkLogprobs": [(1, "token_ids", "bytes"), (2, "logprobs", "bytes"), (3, "k", "uint32"), (4, "length", "uint32")],
    "SampledSequence": [
        (1, "stop_reason", "int32"), (2, "tokens", "bytes"), (3, "logprobs", "bytes"),
        (4, "topk_sampled_logprobs", "TopkLogprobs"),
    ],
    "SampleResponse": [
        (1, "sequences", "*SampledSequence"), (2, "prompt_logprobs", "bytes"),
        (3, "topk_prompt_logprobs", "TopkLogprobs"),
    ],
}  # fmt: skip
DTYPES = {1: np.dtype("<f4"), 2: np.dtype("<i8"), 3: np.dtype("<i4")}  # of a Tensor; 4, bfloat16, no client sends
FLOAT32 = 1
STOP_REASONS = {"stop": 0, "length": 1}

_Field = descriptor_pb2.FieldDescriptorProto
_SCALARS = {
    "bytes": _Field.TYPE_BYTES, "string": _Field.TYPE_STRING, "bool": _Field.TYPE_BOOL, "double": _Field.TYPE_DOUBLE,
    "int32": _Field.TYPE_INT32, "int64": _Field.TYPE_INT64, "uint32": _Field.TYPE_UINT32,
}  # fmt: skip


def _add_field(message: Any, number: int, name: str, kind: str) -> None:
    repeated = kind.startswith(("*", "{}"))
    field = message.field.add(name=name, number=number)
    field.label = _Field.LABEL_REPEATED if repeated else _Field.LABEL_OPTIONAL
    if kind.startswith("{}"):
        entry = message.nested_type.add(name=f"{name.title().replace('_', '')}Entry")
        entry.options.map_entry = True
        _add_field(entry, 1, "key", "string")
        _add_field(entry, 2, "value", kind[2:])
        field.type, field.type_name = _Field.TYPE_MESSAGE, f".{PACKAGE}.{message.name}.{entry.name}"
        return
    kind = kind.removeprefix("*")
    if kind in _SCALARS:
        field.type = _SCALARS[kind]
    else:
        field.type, field.type_name = _Field.TYPE_MESSAGE, f".{PACKAGE}.{kind}"


def _message_classes() -> dict[str, Any]:
    """A class for each message, in a pool of their own: the SDK's classes may live in the same process."""
    file = descriptor_pb2.FileDescriptorProto(name="seal_engine/tinker.proto", package=PACKAGE, syntax="proto3")
    for name, fields in MESSAGES.items():
        message = file.message_type.add(name=name)
        for field in fields:
            _add_field(message, *field)
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    names = {name: f"{PACKAGE}.{name}" for name in MESSAGES}
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(full)) for name, full in names.items()}


_CLASSES = _message_classes()


def new_message(name: str) -> Any:
    """An empty message."""
    return _CLASSES[name]()


def parse(name: str, body: bytes) -> Any:
    """A message from its bytes. InputError for others."""
    message = new_message(name)
    try:
        message.ParseFromString(body)
    except DecodeError:
        raise InputError(f"body: found {len(body)} bytes that are no {name}; accepted: protobuf") from None
    return message


def array(content: bytes, dtype: np.dtype[Any], name: str) -> np.ndarray:
    """The numbers in a field of bytes, as an array that may be written to. InputError naming the field."""
    if len(content) % dtype.itemsize:
        raise InputError(f"{name}: found {len(content)} bytes; accepted: a multiple of {dtype.itemsize}")
    return np.frombuffer(content, dtype).copy()
