"""Checkpoints <-> parameters: directories of safetensors in and out, GGUF files in.

Reading copies each tensor once, from a memory-mapped file to its place in the model (see sources.py). Nothing is ever
unpickled. Writing streams each tensor to disk; a directory appears complete or not at all.
"""

import json
import os
import struct
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from seal_engine.files import complete_directory, read_json
from seal_engine.model.config import DTYPES, ModelConfig
from seal_engine.model.gguf import GGUFFile, is_gguf
from seal_engine.model.gguf_config import ROPE_FACTORS, hugging_face_name, read_gguf_config, row_order
from seal_engine.model.quantize import QuantizingSource, gather_codes
from seal_engine.model.sources import FloatSource, MappedFiles, Source, StoredTensor
from seal_engine.model.transformer import Model
from seal_engine.types import InputError
from seal_kernels.quantized_linear import QuantizedWeight, WeightFormat

SAFETENSORS_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CODE_DTYPES = {"F8_E4M3": torch.float8_e4m3fn, "U8": torch.uint8}  # beside those, where config.json says quantised
SHARD_BYTES = 5_000_000_000
INDEX = "model.safetensors.index.json"
EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def stored_tensors(directory: Path, quantized: bool = False) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint directory by name, from its single file, else its index. Reads headers only.

    quantized: tensors may be codes.
    """
    dtypes = SAFETENSORS_DTYPES | (CODE_DTYPES if quantized else {})
    index, single = directory / INDEX, directory / "model.safetensors"
    if single.exists():  # as in Transformers, it goes before an index that an earlier save may have left
        return _read_header(single, dtypes)
    if not index.exists():
        found = sorted(p.name for p in directory.glob("*.bin")) or "no weights"
        raise InputError(f"{directory}: found {found}; accepted: model.safetensors or {INDEX} with its shards")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index}: weight_map: found {type(weight_map).__name__}; accepted: names to shard files")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise InputError(f"{index}: weight_map: {name}: found {shard!r}; accepted: a .safetensors file name")
    tensors: dict[str, StoredTensor] = {}
    for shard in sorted(set(weight_map.values())):
        for name, stored in _read_header(directory / shard, dtypes).items():
            if name in tensors:  # the index and Transformers, which takes the last, could disagree
                raise InputError(f"{stored.file}: tensor {name} is in {tensors[name].file.name}, too")
            tensors[name] = stored
    for name, shard in weight_map.items():
        if name not in tensors or tensors[name].file.name != shard:
            raise InputError(f"{directory / shard}: tensor {name} is in {INDEX} but not in this file")
    return tensors


def _read_header(file: Path, dtypes: Mapping[str, torch.dtype]) -> dict[str, StoredTensor]:
    try:
        with safe_open(file, framework="pt"):  # checks the header, the offsets and the file's length
            pass
        with open(file, "rb") as stream:
            length = struct.unpack("<Q", stream.read(8))[0]
            header = json.loads(stream.read(length))
    except FileNotFoundError:
        raise InputError(f"{file}: missing") from None
    except (SafetensorError, OSError, ValueError, struct.error) as error:
        raise InputError(f"{file}: not a readable safetensors file (truncated?): {error}") from None
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] not in dtypes:
            accepted = sorted(dtypes)
            raise InputError(f"{file}: tensor {name}: found dtype {entry['dtype']}; accepted: one of {accepted}")
        start, stop = (8 + length + offset for offset in entry["data_offsets"])
        dtype = dtypes[entry["dtype"]]
        tensors[name] = StoredTensor(file, name, dtype, tuple(entry["shape"]), start, stop)
    return tensors


def load_model(
    path: str | Path, dtype: torch.dtype | None, device: torch.device, quantization: WeightFormat | None = None
) -> Model:
    """The model of a Hugging Face checkpoint directory or of a GGUF file.

    dtype None: as config.json says, else as the tensors are; of a GGUF file as its matrices are, float32 where they are
    quantised. quantization: what linears are quantised to; None: as they are stored. Raises InputError (a ValueError)
    naming the file and the tensor: missing or truncated shards, missing or unknown tensors, wrong shapes or dtypes.
    """
    path = Path(path)
    config, sources = _read_checkpoint(path)
    if config.quantization is not None and quantization is not None:
        found = f"{quantization.kind!r} for weights that are stored as {config.quantization.kind}"
        raise InputError(f"{path}: quantize: found {found}; accepted: None")
    quantization = quantization or config.quantization
    model = Model(config, dtype or config.dtype or _stored_dtype(sources), device, quantization)
    _fill(model, sources, path)
    return model


def _stored_dtype(sources: Mapping[str, Source]) -> torch.dtype:
    """Of the first tensor of floats."""
    stored = (source.stored for source in sources.values() if isinstance(source, FloatSource))
    return next(tensor.dtype for tensor in stored if isinstance(tensor, StoredTensor))


def reload_model(model: Model, path: Path) -> None:
    """Fill the model with the checkpoint that it was loaded from, as if nothing had been merged since."""
    _, sources = _read_checkpoint(path, model.config)
    _fill(model, sources, path)
    model.version += 1


def _read_checkpoint(path: Path, config: ModelConfig | None = None) -> tuple[ModelConfig, dict[str, Source]]:
    """The config, if it is not known, and what fills each parameter, by the model's names."""
    if is_gguf(path):
        return _read_gguf(GGUFFile(path))
    if config is None:
        config = ModelConfig.from_directory(path)
        if (path / "adapter_config.json").exists():
            raise InputError(
                f"{path / 'adapter_config.json'}: an adapter beside a model's weights, which Transformers would apply "
                "to them; accepted: directories of their own, and Engine.load_adapter"
            )
    form = config.quantization
    config, stored = _matched(config, stored_tensors(path, quantized=form is not None))
    sources: dict[str, Source] = {name: FloatSource(tensor) for name, tensor in stored.items()}
    if form is not None:
        sources = gather_codes(stored, form)
    _check(config, sources, path)
    return config, sources


def _read_gguf(file: GGUFFile) -> tuple[ModelConfig, dict[str, Source]]:
    config = read_gguf_config(file)
    sources: dict[str, Source] = {}
    for stored in file.tensors.values():
        name = hugging_face_name(stored.name)
        if name is not None:
            sources[name] = FloatSource(stored, row_order(config, name))
        elif stored.name != ROPE_FACTORS:
            raise InputError(f"{file.path}: tensor {stored.name} has no place in a {config.architecture}")
    _check(config, sources, file.path)
    return config, sources


def _matched(config: ModelConfig, stored: dict[str, StoredTensor]) -> tuple[ModelConfig, dict[str, StoredTensor]]:
    """The tensors by the model's own names, and the config that they bear out, as Transformers settles both."""
    stored = _with_prefix(stored)
    if config.tie_word_embeddings and HEAD in stored:
        if EMBEDDINGS not in stored:
            stored[EMBEDDINGS] = stored.pop(HEAD)
        elif not _same_values(stored[EMBEDDINGS], stored[HEAD]):
            raw = {**config.raw, "tie_word_embeddings": False}
            config = replace(config, tie_word_embeddings=False, raw=raw)
    return config, stored


def _with_prefix(stored: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Tensors of a model that was saved without its lm_head lack the prefix of the names."""
    named: dict[str, StoredTensor] = {}
    for name, tensor in stored.items():
        full = f"model.{name}" if name.startswith(("embed_tokens.", "layers.", "norm.")) else name
        if full in named:
            raise InputError(f"{tensor.file}: tensor {full} is there twice, once without the prefix model.")
        named[full] = tensor
    return named


def _same_values(first: StoredTensor, second: StoredTensor) -> bool:
    return first.shape == second.shape and first.dtype == second.dtype and torch.equal(_read(first), _read(second))


def _read(stored: StoredTensor) -> Tensor:
    with safe_open(stored.file, framework="pt") as file:
        return file.get_tensor(stored.name)


def _fill(model: Model, sources: Mapping[str, Source], path: Path) -> None:
    """Every parameter from its place in the files, in the order of the files."""
    total = sum(view.nbytes for _, view in model.named_tensors())
    places = sorted(
        ((sources[name], view) for name, view in model.named_tensors()), key=lambda p: (p[0].file, p[0].start)
    )
    title = f"Loading {path.name}"
    with (
        tqdm(total=total, unit="B", unit_scale=True, desc=title, delay=1.0, disable=None) as progress,
        MappedFiles() as files,
    ):
        for source, view in places:
            if isinstance(view, QuantizedWeight) and isinstance(source, FloatSource):
                source = QuantizingSource(source)
            source.fill(files, view)
            progress.update(view.nbytes)


def _check(config: ModelConfig, sources: Mapping[str, Source], path: Path) -> None:
    """InputError unless `sources` are what `config` asks for: first by its sizes, so that a config with absurd ones is
    refused before anything is made of them."""
    layer, hidden = "model.layers.0.", config.hidden_size
    sizes = {
        EMBEDDINGS: (config.vocab_size, hidden),
        layer + "self_attn.q_proj.weight": (config.query_size, hidden),
        layer + "self_attn.k_proj.weight": (config.key_value_size, hidden),
        layer + "mlp.gate_proj.weight": (config.intermediate_size, hidden),
    }
    _check_shapes(sizes, sources, path)
    if config.num_hidden_layers > len(sources):
        raise InputError(
            f"{path}: found {len(sources)} tensors; {_described_by(path)} asks for {config.num_hidden_layers} layers "
            "(num_hidden_layers)"
        )
    model = Model(config, torch.float32, torch.device("meta"))
    expected = {name: tuple(view.shape) for name, view in model.named_tensors()}
    _check_shapes(expected, sources, path)
    for name in sources.keys() - expected.keys():
        # A tied lm_head may be stored as well, and old Llama checkpoints store the rotary frequencies.
        if not (name == HEAD and config.tie_word_embeddings) and not name.endswith("rotary_emb.inv_freq"):
            raise InputError(f"{sources[name].file}: tensor {name} has no place in a {config.architecture}")


def _check_shapes(expected: dict[str, tuple[int, ...]], sources: Mapping[str, Source], path: Path) -> None:
    for name, shape in expected.items():
        asked = f"{_described_by(path)} asks for {list(shape)}"
        if name not in sources:
            raise InputError(f"{path}: tensor {name} is missing; {asked}")
        if sources[name].shape != shape:
            raise InputError(f"{sources[name].file}: tensor {name}: found {list(sources[name].shape)}; {asked}")


def _described_by(path: Path) -> str:
    return "the metadata" if is_gguf(path) else "config.json"


def save_model(model: Model, directory: str | Path, write_companions: Callable[[Path], None] | None = None) -> None:
    """Write a checkpoint that Transformers loads: config.json, safetensors, and what write_companions writes.

    directory must be new or empty: InputError otherwise. It appears complete or not at all. InputError for a quantised
    model, whose weights are no longer those of its checkpoint.
    """
    if model.quantization is not None:
        found = f"a base quantised to {model.quantization.kind}"
        raise InputError(f"save_pretrained: found {found}; accepted: one in floats; adapters can be saved")
    with complete_directory(Path(directory)) as partial:
        config = dict(model.config.raw)
        config.pop("dtype", None)
        config.pop("torch_dtype", None)
        key = "torch_dtype" if "torch_dtype" in model.config.raw else "dtype"
        config[key] = next(name for name, dtype in DTYPES.items() if dtype == model.dtype)
        _write_json(partial / "config.json", config)
        _write_shards(partial, list(model.named_tensors()))
        if write_companions is not None:
            write_companions(partial)


def _write_json(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", "utf-8")


def _write_shards(directory: Path, tensors: list[tuple[str, Tensor]]) -> None:
    shards: list[list[tuple[str, Tensor]]] = [[]]
    size = 0
    for name, tensor in tensors:
        if shards[-1] and size + tensor.nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append((name, tensor))
        size += tensor.nbytes
    if len(shards) == 1:
        write_safetensors(directory / "model.safetensors", shards[0])
        return
    weight_map = {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(directory / file, shard)
        weight_map |= {name: file for name, _ in shard}
    total = sum(tensor.nbytes for _, tensor in tensors)
    _write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def write_safetensors(file: Path, tensors: list[tuple[str, Tensor]]) -> None:
    """One safetensors file, a tensor at a time: the library's own writer copies the whole in memory."""
    names = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors:
        header[name] = {
            "dtype": names[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # tensors start at a multiple of 8
    with open(file, "wb") as stream:
        stream.write(struct.pack("<Q", len(encoded)))
        stream.write(encoded)
        for _, tensor in tensors:
            tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tofile(stream)
        stream.flush()
        os.fsync(stream.fileno())
