"""The public names of the package, which `import seal_engine` offers."""

from seal_engine.engine import Engine
from seal_engine.model.adapters import Adapter
from seal_engine.plan import Plan
from seal_engine.sampling.requests import Completion, Delta, RequestOutput, SamplingParams
from seal_engine.training.jobs import AdamParams, Datum, DatumResult, TrainJob, TrainResult, TrainSequence
from seal_engine.types import InputError, LoraConfig

__all__ = [
    "AdamParams",
    "Adapter",
    "Completion",
    "Datum",
    "DatumResult",
    "Delta",
    "Engine",
    "InputError",
    "LoraConfig",
    "Plan",
    "RequestOutput",
    "SamplingParams",
    "TrainJob",
    "TrainResult",
    "TrainSequence",
]
