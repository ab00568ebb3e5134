"""The routes of /api/v1, as the Tinker SDK calls them."""

import asyncio
from datetime import datetime
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from seal_engine.serve.errors import ApiError
from seal_engine.serve.service import Service
from seal_engine.serve.tinker import schemas
from seal_engine.serve.tinker.checkpoints import CheckpointPath
from seal_engine.serve.tinker.messages import parse
from seal_engine.serve.tinker.models import TrainedModel
from seal_engine.serve.tinker.service import TinkerService
from seal_engine.types import require

NOTE = "adapters train attention and MLP projections; train_unembed has no effect on this server"
LARGE_BODY = 2**18  # bytes, from which on parsing would hold up the event loop
MAX_PAGE = 1000


def make_tinker_routes(service: Service) -> APIRouter:
    """All routes. They are no part of the OpenAPI schema: the SDK is what describes them."""
    router = APIRouter(prefix="/api/v1", include_in_schema=False)
    _add_session_routes(router, service)
    _add_training_routes(router, service.tinker)
    _add_sampling_routes(router, service)
    _add_checkpoint_routes(router, service.tinker)

    @router.api_route("/{path:path}", methods=["GET", "POST", "PUT", "DELETE"])
    async def unknown(path: str) -> None:
        raise ApiError(404, f"/api/v1/{path:.100}: not supported here; docs/tinker.md says what to do instead")

    return router


def _add_session_routes(router: APIRouter, service: Service) -> None:
    tinker = service.tinker

    @router.get("/healthz")
    async def healthz() -> dict[str, Any]:
        return {"status": "ok"}

    @router.post("/client/config")
    async def client_config() -> dict[str, Any]:
        return {}  # the SDK's defaults

    @router.post("/client/dynamic_config")
    async def dynamic_config() -> dict[str, Any]:
        return {"sample_cancel_enabled": True}

    @router.post("/telemetry")
    async def telemetry() -> dict[str, Any]:
        return {"status": "accepted"}  # and not kept

    @router.get("/get_server_capabilities")
    async def capabilities() -> dict[str, Any]:
        length = service.engine.config.max_position_embeddings
        models = [
            {"model_name": name, "max_context_length": length, "trainable": True, "sampleable": True}
            for name in tinker.base_names
        ]
        return {"supported_models": models}

    @router.post("/create_session")
    async def create_session(body: schemas.CreateSession) -> dict[str, Any]:
        return {"type": "create_session", "session_id": tinker.create_session(body), "warning_message": NOTE}

    @router.post("/session_heartbeat")
    async def heartbeat(body: schemas.Heartbeat) -> dict[str, Any]:
        tinker.session(body.session_id)
        return {"type": "session_heartbeat"}

    @router.post("/sessions/{session_id}/finish")
    async def finish(session_id: str) -> dict[str, Any]:
        tinker.session(session_id)
        tinker.end_session(session_id)
        return {}

    @router.get("/sessions")
    async def sessions(limit: int = 20, offset: int = 0) -> dict[str, Any]:
        return {"sessions": _page(list(tinker.sessions), limit, offset)}

    @router.get("/sessions/{session_id}")
    async def session(session_id: str) -> dict[str, Any]:
        found = tinker.session(session_id)
        members = {"training_run_ids": list(found.models), "sampler_ids": list(found.samplers)}
        return {**members, "user_metadata": found.body.user_metadata, "display_name": found.body.display_name}

    @router.post("/retrieve_future")
    async def retrieve_future(body: schemas.OfPromise) -> Response:
        reply = await tinker.promises.fetch(body.request_id, body.allow_metadata_only)
        return Response(reply.content, media_type=reply.media_type)

    @router.post("/cancel_future")
    async def cancel_future(body: schemas.OfPromise) -> dict[str, Any]:
        tinker.cancel(body.request_id)
        return {}


def _add_training_routes(router: APIRouter, tinker: TinkerService) -> None:
    @router.post("/create_model")
    async def create_model(body: schemas.CreateModel) -> dict[str, Any]:
        return tinker.create_model(body).submitted

    @router.post("/get_info")
    async def get_info(body: schemas.OfModel) -> dict[str, Any]:
        model = tinker.model(body.model_id)
        config, engine = model.config, tinker.worker.engine
        directory = None if engine.directory is None else str(engine.directory.resolve())
        return {
            "type": "get_info",
            "model_id": model.model_id,
            "model_name": config.base_model,
            "model_data": {
                "arch": engine.config.architecture,
                "model_name": config.base_model,
                "tokenizer_id": directory,
            },
            "is_lora": True,
            **config.info,
        }

    @router.post("/forward_backward")
    async def forward_backward(request: Request) -> dict[str, Any]:
        if request.headers.get("content-encoding", "identity") != "identity":
            raise ApiError(400, "Content-Encoding: found another; accepted: none")
        body = await request.body()
        large = len(body) > LARGE_BODY
        read = "ForwardBackwardRequest", body
        return tinker.forward_backward(await asyncio.to_thread(parse, *read) if large else parse(*read)).submitted

    @router.post("/optim_step")
    async def optim_step(body: schemas.Numbered) -> dict[str, Any]:
        return tinker.optim_step(body).submitted

    @router.post("/save_weights")
    async def save_weights(body: schemas.Numbered) -> dict[str, Any]:
        return tinker.save_weights(body).submitted

    @router.post("/load_weights")
    async def load_weights(body: schemas.Load) -> dict[str, Any]:
        return tinker.load_weights(body).submitted

    @router.post("/save_weights_for_sampler")
    async def save_weights_for_sampler(body: schemas.Numbered) -> dict[str, Any]:
        return tinker.save_weights_for_sampler(body).submitted

    @router.post("/save_weights_external")
    async def save_weights_external(body: schemas.Numbered) -> dict[str, Any]:
        return tinker.save_weights_external(body).submitted


def _add_sampling_routes(router: APIRouter, service: Service) -> None:
    tinker = service.tinker

    @router.post("/create_sampling_session")
    async def create_sampling_session(body: schemas.CreateSamplingSession) -> dict[str, Any]:
        sampler = await tinker.create_sampler(body)
        return {"type": "create_sampling_session", "sampling_session_id": sampler.sampler_id}

    @router.post("/join_sampling_session")
    async def join_sampling_session(body: schemas.OfSampler) -> dict[str, Any]:
        sampler = tinker.sampler(body.sampling_session_id)
        sampler.clients += 1
        return {"type": "join_sampling_session", "client_counter": sampler.clients - 1}

    @router.get("/samplers/{sampler_id}")
    async def get_sampler(sampler_id: str) -> dict[str, Any]:
        sampler = tinker.sampler(sampler_id)
        return {"sampler_id": sampler_id, "base_model": sampler.base_model, "model_path": sampler.model_path}

    @router.post("/asample")
    async def asample(body: schemas.Sample) -> dict[str, Any]:
        return tinker.sample(body, service.max_tokens).submitted


def _add_checkpoint_routes(router: APIRouter, tinker: TinkerService) -> None:
    checkpoints = tinker.checkpoints

    @router.post("/weights_info")
    async def weights_info(body: schemas.OfPath) -> dict[str, Any]:
        info = checkpoints.info(CheckpointPath.parse(body.tinker_path))
        return {**info, "is_lora": True, "train_unembed": False}

    @router.get("/training_runs")
    async def training_runs(limit: int = 20, offset: int = 0) -> dict[str, Any]:
        runs = await asyncio.to_thread(_training_runs, tinker)
        cursor = {"offset": offset, "limit": limit, "total_count": len(runs)}
        return {"training_runs": _page(runs, limit, offset), "cursor": cursor}

    @router.get("/training_runs/{run}")
    async def training_run(run: str) -> dict[str, Any]:
        for found in await asyncio.to_thread(_training_runs, tinker):
            if found["training_run_id"] == run:
                return found
        raise ApiError(404, f"training_run_id: found {run!r:.100}; accepted: a run of this server")

    @router.get("/training_runs/{run}/checkpoints")
    async def run_checkpoints(run: str) -> dict[str, Any]:
        return {"checkpoints": await asyncio.to_thread(checkpoints.list, run)}

    @router.get("/checkpoints")
    async def all_checkpoints(limit: int = 100, offset: int = 0) -> dict[str, Any]:
        found = await asyncio.to_thread(checkpoints.list)
        cursor = {"offset": offset, "limit": limit, "total_count": len(found)}
        return {"checkpoints": _page(found, limit, offset), "cursor": cursor}

    @router.delete("/training_runs/{run}/checkpoints/{kind}/{name}")
    async def delete_checkpoint(run: str, kind: str, name: str) -> dict[str, Any]:
        await asyncio.to_thread(checkpoints.delete, CheckpointPath.parse(f"tinker://{run}/{kind}/{name}"))
        return {}

    @router.put("/training_runs/{run}/checkpoints/{kind}/{name}/ttl")
    async def set_ttl(run: str, kind: str, name: str, body: schemas.SetTtl) -> dict[str, Any]:
        checkpoints.set_ttl(CheckpointPath.parse(f"tinker://{run}/{kind}/{name}"), body.ttl_seconds)
        return {}


def _page(items: list[Any], limit: int, offset: int) -> list[Any]:
    require(0 <= limit <= MAX_PAGE, "limit", limit, f"an integer from 0 to {MAX_PAGE}")
    require(offset >= 0, "offset", offset, "an integer >= 0")
    return items[offset : offset + limit]


def _training_runs(tinker: TinkerService) -> list[dict[str, Any]]:
    """Models that live, and those of which a checkpoint is left, the last used first."""
    runs: dict[str, dict[str, Any]] = {}
    live: list[TrainedModel] = [
        model for session in list(tinker.sessions.values()) for model in session.models.values()
    ]
    for model in live:
        runs[model.model_id] = _run(model.model_id, model.config.info, model.last_request.isoformat())
    for checkpoint in tinker.checkpoints.list():
        path = CheckpointPath.parse(checkpoint["tinker_path"])
        if path.run not in runs:
            info = tinker.checkpoints.info(path)
            runs[path.run] = _run(path.run, {**info, "user_metadata": None}, checkpoint["time"])
        name = "last_checkpoint" if path.kind == "weights" else "last_sampler_checkpoint"
        runs[path.run].setdefault(name, checkpoint)
    return sorted(runs.values(), key=lambda run: datetime.fromisoformat(run["last_request_time"]), reverse=True)


def _run(run: str, info: dict[str, Any], last_request: str) -> dict[str, Any]:
    """A run as the SDK's TrainingRun has it."""
    names = ("base_model", "lora_rank", "user_metadata")
    fields = {"training_run_id": run, "model_owner": "local", "is_lora": True, "last_request_time": last_request}
    return {**fields, **{name: info[name] for name in names}}
