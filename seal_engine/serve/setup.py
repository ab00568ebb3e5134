"""From the command line's options to a server that runs."""

import argparse
import asyncio
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from seal_engine.domains.knowledge.endpoint import Endpoint, read_key
from seal_engine.domains.knowledge.grading import make_grader
from seal_engine.domains.templating import read_template
from seal_engine.engine import Engine
from seal_engine.serve.adapters import AdapterNames
from seal_engine.serve.backend import WorkerBackend
from seal_engine.serve.guard import Key
from seal_engine.serve.seal_loop import SealLoop
from seal_engine.serve.seal_socket import SealSocket
from seal_engine.serve.server import ServerSettings, serve
from seal_engine.serve.service import Service
from seal_engine.serve.tinker.service import TinkerService, TinkerSettings
from seal_engine.serve.worker import Worker
from seal_engine.types import InputError, renamed_errors, require

ENDPOINT_FLAGS = {
    "endpoint.base_url": "--endpoint",
    "endpoint.model": "--endpoint-model",
    "endpoint.key_variable": "--endpoint-key-env",
}


def server_settings(host: str, port: int, key: str | None, options: argparse.Namespace) -> ServerSettings:
    """Where to listen. InputError, before a model is loaded, for an address that needs a key."""
    settings = ServerSettings(host, port, None if key is None else Key(key), options.max_body, options.drain_seconds)
    settings.validate()
    return settings


def make_service(
    engine: Engine, options: argparse.Namespace, chat_template: str | None, adapters: Mapping[str, Path]
) -> Service:
    """The service with its adapters loaded. InputError for one that cannot be."""
    _ = engine.tokenizer  # a model without one is refused now
    worker = Worker(engine, options.kv_blocks, options.max_num_seqs, options.max_queue, options.training_share)
    for directory in options.allow_adapters_from:
        require(Path(directory).is_dir(), "--allow-adapters-from", directory, "a directory")
    names = base_names(options.model, options.served_model_name)
    table = AdapterNames(names, [Path(d) for d in options.allow_adapters_from], options.max_adapters)
    for name, directory in adapters.items():
        try:
            table.begin_load(name)
            table.finish_load(name, engine.load_adapter(directory), directory)
        except InputError as error:
            raise InputError(f"--adapter {name}: {error}") from None
    defaults = engine.sampling_defaults() if options.sampling_defaults == "model" else {}
    tinker = TinkerService(worker, names, tinker_settings(options))
    return Service(engine, worker, table, tinker, chat_template, defaults)


def tinker_settings(options: argparse.Namespace) -> TinkerSettings:
    """The settings of the Tinker API. InputError naming the flag."""
    alpha, models, seconds = options.tinker_alpha, options.tinker_max_models, options.tinker_session_seconds
    size, model_bytes = options.tinker_sampler_bytes, options.tinker_model_bytes
    require(math.isfinite(alpha), "--tinker-alpha", alpha, "a finite number")
    require(models is None or models >= 1, "--tinker-max-models", models, "an integer >= 1")
    require(model_bytes is None or model_bytes >= 0, "--tinker-model-bytes", model_bytes, "an integer >= 0")
    require(seconds > 0, "--tinker-session-seconds", seconds, "a number above 0")
    require(size >= 0, "--tinker-sampler-bytes", size, "an integer >= 0")
    return TinkerSettings(Path(options.tinker_dir), alpha, models, model_bytes, seconds, size)


def base_names(model: str, served_name: str | None) -> list[str]:
    """What requests may call the base model: first the name that is listed."""
    names = [served_name, model, os.path.realpath(model), Path(os.path.realpath(model)).name]
    return list(dict.fromkeys(name for name in names if name))


def make_seal(service: Service, options: argparse.Namespace, key: Key | None) -> SealSocket | None:
    """The socket of SEAL's inner loop, if it has a port. InputError naming the flag."""
    if options.seal_port is None:
        return None
    require(0 <= options.seal_port <= 65535, "--seal-port", options.seal_port, "a port from 0 to 65535")
    seed = options.seed
    require(seed is None or 0 <= seed < 2**63, "--seed", seed, "an integer >= 0")
    endpoint = None
    if options.grader == "endpoint":
        require(options.endpoint is not None, "--endpoint", options.endpoint, "a URL, for --grader endpoint")
        with renamed_errors(ENDPOINT_FLAGS):
            endpoint = Endpoint(options.endpoint, options.endpoint_model, options.endpoint_key_env)
            read_key(endpoint.key_variable)  # a key that is not there is missed now
    template = read_template(options.grade_template or "", "grade.txt")
    grader = make_grader(options.grader, WorkerBackend(service.worker), endpoint, template)
    loop = SealLoop(service.worker, grader, seed)
    seal = SealSocket(loop, options.seal_port, key, options.max_body)
    if options.keep_adapter_dir:
        loop.adapters_dir = f"models/tmp_{seal.port}_inner_TTT_{{n}}"
    return seal


def run(service: Service, settings: ServerSettings, ready: Callable[[str], None], seal: SealSocket | None) -> None:
    """Serve until the process is told to end."""
    asyncio.run(serve(service, settings, ready, seal))
