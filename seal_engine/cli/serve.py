"""The verb that serves: HTTP for OpenAI's clients, vLLM's and Tinker's, ZMQ for SEAL's drivers."""

import argparse
import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from seal_engine.domains.knowledge.grading import GRADERS
from seal_engine.engine import Engine
from seal_engine.files import read_text
from seal_engine.model.config import DTYPES
from seal_engine.types import InputError, require

LIBRARIES = ("fastapi", "uvicorn", "zmq", "prometheus_client", "google.protobuf")  # of the extra `serve`


def serve_arguments(parser: argparse.ArgumentParser) -> None:
    def add(name: str, text: str, **kwargs: Any) -> None:
        shown = " (default: %(default)s)" if kwargs.get("default") not in (None, []) else ""
        parser.add_argument(name, help=text + shown, **kwargs)

    add("--model", "directory of a Hugging Face checkpoint", required=True, metavar="DIR")
    add("--device", "auto, cpu, cuda or cuda:N", default="auto")
    add("--dtype", "of the weights (default: as the checkpoint says)", choices=sorted(DTYPES))
    add("--deterministic", "an adapter's bits do not depend on what else is trained (CPU)", action="store_true")
    add("--host", "address to listen on; beyond loopback a key is required", default="127.0.0.1")
    add("--port", "port of HTTP; 0: a free one", type=int, default=8000, metavar="N")
    add("--api-key-env", "environment variable that holds the key which clients must send", metavar="NAME")
    add("--served-model-name", "another name of the base model, beside its path", metavar="NAME")
    text = "serve PEFT adapters, each under a name"
    add("--adapter", text, action="extend", nargs="+", default=[], metavar="NAME=DIR")
    add("--max-adapters", "adapters served at once (default: no limit)", type=int, metavar="N")
    text = "directory that clients may load adapters from (default: none)"
    add("--allow-adapters-from", text, action="append", default=[], metavar="DIR")
    add("--chat-template", "file: Jinja chat template in place of the model's", metavar="FILE")
    add("--sampling-defaults", "of fields that a request leaves out", choices=("vllm", "model"), default="vllm")
    add(
        "--kv-blocks",
        "blocks of 16 tokens in the K/V cache (default: GPU half of the free memory, CPU 4096)",
        type=int,
        metavar="N",
    )
    add("--max-num-seqs", "completions sampled at once", type=int, default=256, metavar="N")
    add("--max-queue", "samples, and jobs, in the queue or running", type=int, default=16384, metavar="N")
    add("--max-body", "bytes of a request", type=int, default=2**25, metavar="N")
    add("--training-share", "of the time, while there is sampling, too", type=float, default=0.2, metavar="X")
    add("--drain-seconds", "that running requests have after SIGTERM", type=float, default=30.0, metavar="X")
    seal = parser.add_argument_group("SEAL's inner loop")

    def add_seal(name: str, text: str, **kwargs: Any) -> None:
        shown = " (default: %(default)s)" if kwargs.get("default") is not None else ""
        seal.add_argument(name, help=text + shown, **kwargs)

    add_seal("--seal-port", "port of the ZMQ socket, on 127.0.0.1 (default: none)", type=int, metavar="N")
    add_seal("--grader", "how answers are graded", choices=GRADERS, default="contains")
    add_seal("--seed", "of every training (default: another one for each request)", type=int, metavar="N")
    add_seal("--keep-adapter-dir", "write models/tmp_PORT_inner_TTT_N/final_adapter", action="store_true")
    add_seal("--grade-template", "file: template of the prompt of a model that grades", metavar="FILE")
    add_seal("--endpoint", "base URL of an OpenAI-compatible endpoint, for --grader endpoint", metavar="URL")
    add_seal("--endpoint-model", "name of the model at the endpoint", default="", metavar="NAME")
    add_seal("--endpoint-key-env", "environment variable with the endpoint's key", metavar="NAME")
    tinker = parser.add_argument_group("the Tinker API")

    def add_tinker(name: str, text: str, **kwargs: Any) -> None:
        shown = " (default: %(default)s)" if kwargs.get("default") is not None else ""
        tinker.add_argument(name, help=text + shown, **kwargs)

    add_tinker("--tinker-dir", "directory of checkpoints", default="tinker-checkpoints", metavar="DIR")
    add_tinker("--tinker-alpha", "lora_alpha of new models", type=float, default=32.0, metavar="X")
    add_tinker("--tinker-max-models", "models at once; others wait (default: no limit)", type=int, metavar="N")
    text = "of models' states on the device; others wait elsewhere (default: half of what is free at the start)"
    add_tinker("--tinker-model-bytes", text, type=int, metavar="N")
    text = "after which a client that shows no sign of life loses its models"
    add_tinker("--tinker-session-seconds", text, type=float, default=120.0, metavar="X")
    text = "of samplers' adapters in memory; others wait on the disk"
    add_tinker("--tinker-sampler-bytes", text, type=int, default=2**32, metavar="N")
    parser.add_argument("--quiet", help="no text on stdout but what --json gives", action="store_true")
    parser.add_argument("--json", help="one JSON object on stdout once requests are answered", action="store_true")


def serve(options: argparse.Namespace) -> None:
    """Serve a model and its adapters: OpenAI's API, vLLM's adapter calls, Tinker's API, SEAL's inner loop."""
    missing = [name for name in LIBRARIES if not _is_installed(name)]
    if missing:
        raise InputError(f"serve: found no {', '.join(missing)}; accepted: pip install 'seal-engine[serve]'")
    from seal_engine.serve import setup  # the extra's libraries are imported nowhere else

    require(options.max_queue >= 1, "--max-queue", options.max_queue, "an integer >= 1")
    require(options.max_body >= 1, "--max-body", options.max_body, "an integer >= 1")
    require(0 < options.training_share < 1, "--training-share", options.training_share, "above 0 and below 1")
    require(options.drain_seconds >= 0, "--drain-seconds", options.drain_seconds, "a number >= 0")
    count = options.max_adapters
    require(count is None or count >= 0, "--max-adapters", count, "an integer >= 0")
    template = None
    if options.chat_template is not None:
        template = read_text(Path(options.chat_template))
        require(template is not None, "--chat-template", options.chat_template, "a file")
    settings = setup.server_settings(options.host, options.port, _key(options.api_key_env), options)
    engine = Engine.from_pretrained(options.model, options.device, options.dtype or "auto", options.deterministic)
    service = setup.make_service(engine, options, template, _adapters(options.adapter))
    seal = setup.make_seal(service, options, settings.key)

    def ready(url: str) -> None:
        if not options.quiet:
            print(f"serving {service.names.base_names[0]} at {url}", flush=True)
            if not service.has_chat_template:
                print("the model has no chat template: a chat's messages are read one after the other", flush=True)
            if seal is not None:
                print(f"SEAL's inner loop at {seal.address}, grader {options.grader}", flush=True)
        if options.json:
            print(json.dumps({"url": url, "seal": None if seal is None else seal.address}), flush=True)

    setup.run(service, settings, ready, seal)


def _is_installed(library: str) -> bool:
    try:
        return find_spec(library) is not None
    except ModuleNotFoundError:  # a package that it would be part of
        return False


def _key(variable: str | None) -> str | None:
    """The key in an environment variable, never shown. InputError for one that is empty."""
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    usable = len(key) >= 8 and key.isascii() and key.isprintable() and " " not in key
    accepted = f"a key of at least 8 printable characters in the environment variable {variable}"
    require(usable, "--api-key-env", "another value (not shown)" if key else "nothing", accepted)
    return key


def _adapters(values: list[str]) -> dict[str, Path]:
    """Names and directories of --adapter. InputError for a value that is not NAME=DIR, and for a name twice."""
    adapters: dict[str, Path] = {}
    for value in values:
        name, equals, directory = value.partition("=")
        require(bool(name and equals and directory), "--adapter", value, "NAME=DIR")
        require(name not in adapters, "--adapter", value, "every name once")
        adapters[name] = Path(directory)
    return adapters
