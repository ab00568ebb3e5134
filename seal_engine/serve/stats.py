"""What runs, as numbers: for the page as JSON, and for Prometheus."""

from statistics import quantiles
from time import time
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from seal_engine.serve.service import Service
from seal_engine.serve.worker import SAMPLING, TRAINING

COUNTERS = {  # name in /metrics -> number of `counts`, help
    "seal_engine_sampled_tokens": ("sampled_tokens", "Tokens that were sampled."),
    "seal_engine_computed_tokens": ("computed_tokens", "Tokens that sampling ran the model over."),
    "seal_engine_reused_tokens": ("reused_tokens", "Prompt tokens whose K/V the prefix cache had."),
    "seal_engine_trained_tokens": ("trained_tokens", "Tokens that adapters were trained on."),
    "seal_engine_sampler_steps": ("sampler_steps", "Steps of the sampler."),
    "seal_engine_training_passes": ("training_passes", "Passes of training."),
}
GAUGES = {
    "seal_engine_sequences_running": ("sequences_running", "Completions that are being sampled."),
    "seal_engine_sequences_waiting": ("sequences_waiting", "Completions that wait for the sampler."),
    "seal_engine_requests_open": ("requests_open", "Samples without a result yet."),
    "seal_engine_jobs_running": ("jobs_running", "Training jobs that are resident."),
    "seal_engine_jobs_open": ("jobs_open", "Training jobs and calls without a result yet."),
    "seal_engine_cache_blocks": ("cache_blocks", "Blocks of the K/V cache."),
    "seal_engine_cache_blocks_in_use": ("cache_blocks_in_use", "Blocks that running completions hold."),
    "seal_engine_adapters": ("adapters", "Adapters that are served."),
    "seal_engine_adapter_bytes": ("adapter_bytes", "Bytes of their parameters."),
    "seal_engine_tinker_model_bytes": ("tinker_model_bytes", "Bytes of states of Tinker's models on the device."),
    "seal_engine_tinker_sampler_bytes": ("tinker_sampler_bytes", "Bytes of adapters of Tinker's samplers in memory."),
}


def counts(service: Service) -> dict[str, int]:
    """The numbers of COUNTERS and GAUGES."""
    worker = service.worker
    sampler, trainer = worker.sampler, worker.trainer
    pool, served = sampler.cache.pool, list(service.names.served.values())
    return {
        "sampled_tokens": sampler.tokens_done,
        "computed_tokens": sampler.tokens_computed,
        "reused_tokens": sampler.scheduler.tokens_reused,
        "trained_tokens": worker.verb_tokens + (0 if trainer is None else trainer.tokens_done),
        "sampler_steps": worker.turns[SAMPLING],
        "training_passes": worker.turns[TRAINING],
        "sequences_running": len(sampler.scheduler.running),
        "sequences_waiting": len(sampler.scheduler.waiting),
        "requests_open": worker.num_open(SAMPLING),
        "jobs_running": 0 if trainer is None else trainer.num_resident,
        "jobs_open": worker.num_open(TRAINING),
        "cache_blocks": pool.num_blocks,
        "cache_blocks_in_use": pool.num_blocks - pool.num_available,
        "adapters": len(served),
        "adapter_bytes": sum(entry.adapter.nbytes for entry in served),
        "tinker_model_bytes": service.tinker.memory.nbytes,
        "tinker_sampler_bytes": service.tinker.snapshots.nbytes,
    }


def describe(service: Service, seal_requests: list[dict[str, Any]]) -> dict[str, Any]:
    """All that the page shows. seal_requests: of the inner loop, those that run."""
    adapters = [
        {
            "name": entry.name,
            "rank": entry.adapter.config.r,
            "targets": entry.adapter.config.target_modules,
            "version": entry.adapter.version,
            "bytes": entry.adapter.nbytes,
        }
        for entry in service.names.served.values()
    ]
    return {
        "model": service.names.base_names[0],
        "device": str(service.engine.model.device),
        "seconds": time() - service.started,
        "accepting": not service.worker.closed,
        "counts": counts(service),
        "step_seconds": step_seconds(service),
        "adapters": adapters,
        "seal_requests": seal_requests,
    }


def step_seconds(service: Service) -> dict[str, float]:
    """Median and 95th percentile of the seconds from one sampler step to the next, over the last steps."""
    times = list(service.worker.step_times)
    if len(times) < 2:
        return {}
    cuts = quantiles(times, n=20)
    return {"p50": cuts[9], "p95": cuts[18]}


class _Numbers(Collector):
    """Reads the numbers when Prometheus asks, so that nothing is counted twice and requests pay nothing."""

    def __init__(self, service: Service):
        self.service = service

    def collect(self) -> Any:
        """The metrics."""
        numbers = counts(self.service)
        for name, (number, text) in COUNTERS.items():
            yield CounterMetricFamily(name, text, value=numbers[number])
        for name, (number, text) in GAUGES.items():
            yield GaugeMetricFamily(name, text, value=numbers[number])
        steps = GaugeMetricFamily("seal_engine_step_seconds", "Seconds between sampler steps.", labels=["quantile"])
        for name, value in step_seconds(self.service).items():
            steps.add_metric([name], value)
        yield steps


def make_registry(service: Service) -> CollectorRegistry:
    """A registry of this service alone."""
    registry = CollectorRegistry()
    registry.register(_Numbers(service))
    return registry
