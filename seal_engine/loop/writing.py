"""Self-edits: sampled from the policy, or taken from another source."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from seal_engine.engine import Engine
from seal_engine.loop.config import LoopConfig
from seal_engine.loop.domain import Domain, InvalidSelfEditError, SelfEditSource
from seal_engine.loop.inner import derive_seed
from seal_engine.loop.records import SelfEdit
from seal_engine.model.adapters import Adapter
from seal_engine.sampling.requests import Completion
from seal_engine.training.jobs import TrainJob

MISSING = "could not be had"  # why a self-edit is rejected that its source failed to give: it counts nowhere
MakeJob = Callable[[str, str], TrainJob]  # as Domain.job


def sample_self_edits(
    engine: Engine,
    domain: Domain,
    config: LoopConfig,
    make_job: MakeJob,
    seed: int,
    phase: str,
    contexts: Sequence[str],
    policy: Adapter | None,
    count: int,
    progress: bool,
) -> list[SelfEdit]:
    """`count` self-edits of the policy for each context; invalid ones are sampled again, `config.resamples` times."""
    due = [(context, index) for context in contexts for index in range(count)]
    edits: dict[tuple[str, int], SelfEdit] = {}
    params = replace(config.sampling_params, logits_hook=domain.logits_hook(config.max_tokens))
    attempt = 0
    while due and attempt <= config.resamples:
        attempt += 1
        seeds = [derive_seed(seed, phase, *key, attempt) for key in due]
        prompts = [domain.prompt(context) for context, _ in due]
        own_params = [replace(params, seed=own) for own in seeds]
        outputs = engine.generate(prompts, own_params, policy, progress=progress)
        again = []
        for (context, index), own, output in zip(due, seeds, outputs, strict=True):
            sample = output.outputs[0] if output.outputs else Completion(index)
            rejected, retryable = (output.error, False) if output.error else validate(make_job, context, sample.text)
            edits[context, index] = SelfEdit(
                seed, phase, context, index, sample.text, tuple(sample.token_ids), own, attempt, rejected
            )
            if retryable:
                again.append((context, index))
        due = again
    return list(edits.values())


def take_self_edits(
    engine: Engine,
    config: LoopConfig,
    make_job: MakeJob,
    seed: int,
    phase: str,
    contexts: Sequence[str],
    source: SelfEditSource,
) -> list[SelfEdit]:
    """The self-edits that another source gives for each context."""
    edits = []
    # The end token is part of a self-edit, so that a policy that learns from it learns to end.
    end = () if engine.end_token_id is None else (engine.end_token_id,)
    for context, texts in zip(contexts, source.write(contexts, config.sampling_params), strict=True):
        for index, text in enumerate(texts or [None]):
            if text is None:
                edits.append(SelfEdit(seed, phase, context, index, "", end, None, 1, MISSING))
                continue
            ids = engine.tokenizer.encode(text, add_special_tokens=False)
            rejected, _ = validate(make_job, context, text)
            edits.append(SelfEdit(seed, phase, context, index, text, (*ids, *end), None, 1, rejected))
    return edits


def validate(make_job: MakeJob, context: str, text: str) -> tuple[str | None, bool]:
    """Why nothing can be trained on a self-edit, None if it is valid; and whether to sample it again."""
    try:
        make_job(context, text)
    except InvalidSelfEditError as error:
        return str(error), error.retryable
    return None, False
