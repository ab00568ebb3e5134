"""The few-shot task's inner loops: 12 puzzles x 15 directives, 180 adapters trained at once and asked, beside PEFT.

The puzzles are the miniature's; directives are drawn from its whole menu, no two of a puzzle alike, so that training
tasks, their number, loss masks, learning rates and epochs differ. Adapters are those of the published recipe, or of the
miniature. Each answers the 11 questions whose answers vote, greedily.

PEFT takes one adapter after another: training in batches of two, padded on the right, then all questions of the adapter
as one batch, padded on the left. It trains by a loop of its own, with nothing but the Trainer's optimizer, schedule and
clipping, and by Transformers' Trainer. It does so with every 12th adapter, which are of all puzzles, and what all would
take follows from its tokens a second. Losses are compared first, and answers of the same adapters. Tokens are real
ones: trained on, or read and answered. FLOPs are 4 a parameter of the base and 6 of an adapter, a token.
"""

import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

import measure
from bench_sample import generate_padded
from bench_train import SEVEN, Batch, OneAtATime, load_base
from greedy import check_answers
from seal_engine import Engine, SamplingParams, TrainJob
from seal_engine.domains.few_shot.directive import STRATEGIES, Directive
from seal_engine.domains.few_shot.task import FewShot, FewShotConfig
from seal_engine.tiny.puzzles import DATA, EPOCHS, LEARNING_RATES, PROMPT, PUZZLE_MODEL, SELF_EDIT, Puzzles
from seal_engine.training.jobs import TrainResult
from shapes import random_model

TASKS, SELF_EDITS, EVERY = 12, 15, 12
LORAS: dict[str, dict[str, Any]] = {
    "published": {},
    "miniature": {"rank": 16, "alpha": 32.0, "targets": SEVEN, "lr_scheduler": "linear", "warmup_steps": 0},
}
ANSWER_TOKENS = 12  # a grid takes 10, its end one
SMALL = {"max_tasks": 8, "max_sequence_tokens": 96, "answer_tokens": ANSWER_TOKENS}
TAME, FIRST = 1e-2, 4  # with higher learning rates rounding soon decides; only the first steps are compared
pytestmark = pytest.mark.skipif(measure.DEVICE.type == "cuda", reason="the models are too small for a GPU")


def make_domain(base: str, lora: str) -> FewShot:
    """The puzzles, with the shipped model or a random one that has its tokenizer."""
    engine = Engine.from_pretrained(PUZZLE_MODEL, measure.DEVICE, torch.float32)
    if base != "puzzle model":
        engine = Engine(random_model(base, torch.float32, measure.DEVICE), tokenizer=engine.tokenizer)
    config = FewShotConfig(
        few_shot_prompt_template=str(PROMPT), directive_template=str(SELF_EDIT), **SMALL, **LORAS[lora]
    )
    tasks = [replace(task, tests=task.tests[:1]) for task in Puzzles().puzzles("train", TASKS)]
    return FewShot(config, engine, tasks, [])


def inner_loops(domain: FewShot) -> tuple[list[TrainJob], list[list[list[int]]]]:
    """A job for each directive of each puzzle, and what its adapter is asked."""
    rng, jobs, questions = random.Random(0), [], []
    menu = [
        Directive(basic, False, False, repeat, strategy, rate, epochs)
        for (basic, repeat), strategy, rate, epochs in product(DATA, STRATEGIES, LEARNING_RATES, EPOCHS)
    ]
    for context in domain.contexts("train"):
        for directive in rng.sample(menu, SELF_EDITS):
            jobs.append(replace(domain.job(context, directive.to_json()), seed=None))  # sequences in their order
            questions.append(domain.questions(context))
    return jobs, questions


def batches_of(job: TrainJob) -> list[Batch]:
    """The steps of an epoch of a job, padded on the right."""
    made: list[Batch] = []
    for first in range(0, len(job.sequences), job.batch_size):
        ids: list[list[int]] = []
        labels: list[list[int]] = []
        members: Sequence[Any] = job.sequences[first : first + job.batch_size]
        width = max(len(one.token_ids) for one in members)
        for one in members:
            padding, mask = width - len(one.token_ids), one.loss_mask or [1] * len(one.token_ids)
            ids.append([*one.token_ids, *[0] * padding])
            labels.append([i if m else -100 for i, m in zip(one.token_ids, mask, strict=True)] + [-100] * padding)
        made.append((ids, labels))
    return made


class OneByOne(OneAtATime):
    """PEFT with a job's own schedule, by a bare loop or the Trainer; and its answers."""

    def train_job(self, job: TrainJob) -> list[float]:
        """The losses of a job, from the parameters that are there."""
        batches = batches_of(job) * job.num_epochs
        return self.train(batches, job.learning_rate, job.lr_scheduler, job.warmup_steps)

    def train_job_by_trainer(self, job: TrainJob, directory: Path) -> None:
        """The same by Transformers' Trainer, in an order of its own."""
        from transformers import PrinterCallback, Trainer, TrainingArguments

        arguments = TrainingArguments(
            output_dir=str(directory), per_device_train_batch_size=1, num_train_epochs=job.num_epochs,
            learning_rate=job.learning_rate, lr_scheduler_type=job.lr_scheduler, warmup_steps=job.warmup_steps,
            report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True, use_cpu=True,
            dataloader_pin_memory=False,
        )  # fmt: skip
        batches: Any = batches_of(job)  # one at a time

        def collate(given: list[Batch]) -> dict[str, torch.Tensor]:
            ids, labels = map(torch.tensor, given[0])
            return {"input_ids": ids, "labels": labels}

        trainer = Trainer(self.model, arguments, collate, batches)
        trainer.remove_callback(PrinterCallback)
        trainer.train()

    @torch.no_grad()
    def ask(self, prompts: list[list[int]], stops: list[int]) -> list[list[int]]:
        """Greedy answers, each up to the token that ends it."""
        found = generate_padded(self.model, prompts, ANSWER_TOKENS, eos_token_id=stops)
        ends = [next((i + 1 for i, token in enumerate(ids) if token in stops), len(ids)) for ids in found]
        return [ids[:end] for ids, end in zip(found, ends, strict=True)]


@pytest.mark.parametrize("lora", LORAS)
@pytest.mark.parametrize("base", ["puzzle model", "2m"])
def test_inner_loops(benchmark, record, tmp_path, base, lora):
    domain = make_domain(base, lora)
    engine, config = domain.engine, domain.config.lora
    jobs, questions = inner_loops(domain)
    everyone, sample = range(len(jobs)), range(0, len(jobs), EVERY)
    stops = [*engine.stop_token_ids, *engine.tokenizer.encode("\n", add_special_tokens=False)]
    params = SamplingParams(temperature=0.0, max_tokens=ANSWER_TOKENS, stop_token_ids=stops)
    peft, start = OneByOne(load_base(engine, tmp_path / "base"), config), engine.create_adapter(config)
    results: list[TrainResult] = []
    answers: list[list[int]] = []

    def train() -> None:
        results[:] = engine.train(jobs, progress=False)
        assert all(result.error is None for result in results)

    def ask() -> None:
        prompts = [ids for i in everyone for ids in questions[i]]
        owners = [results[i].adapter for i in everyone for _ in questions[i]]
        answers[:] = [out.outputs[0].token_ids for out in engine.generate(prompts, params, owners, progress=False)]

    def train_alone() -> list[list[float]]:
        losses = []
        for i in sample:
            peft.load(start)
            losses.append(peft.train_job(jobs[i]))
        return losses

    def train_by_trainer() -> None:
        for i in sample:
            peft.load(start)
            peft.train_job_by_trainer(jobs[i], tmp_path / "trainer")

    def ask_alone() -> list[list[int]]:
        found = []
        for i in sample:
            adapter = results[i].adapter
            assert adapter is not None
            peft.load(adapter)
            found += peft.ask(questions[i], stops)
        return found

    train()
    ask()
    for i, losses in zip(sample, train_alone(), strict=True):
        steps = len(losses) if jobs[i].learning_rate < TAME else FIRST
        assert results[i].losses[:steps] == pytest.approx(losses[:steps], rel=1e-3), "a wrong result"
    own = [answers[i * len(questions[0]) + k] for i in sample for k in range(len(questions[i]))]
    theirs = ask_alone()
    check_answers(peft.model, [ids for i in sample for ids in questions[i]], own, theirs)
    measure.matrix_rate(torch.float32)
    times = measure.side_by_side(benchmark, [train, ask, train_alone, train_by_trainer, ask_alone], rounds=1)
    trained = [sum(results[i].num_tokens for i in members) for members in (everyone, sample)]
    read = [sum(len(ids) for i in members for ids in questions[i]) for members in (everyone, sample)]
    asked = [count + sum(map(len, given)) for count, given in zip(read, (answers, theirs), strict=True)]
    rate, size = measure.matrix_rate(torch.float32), engine.config.num_matrix_parameters
    flops = 4 * size + 6 * start.layout.size
    ours = times[:2]
    for who, seconds in (
        ("seal_engine", ours),
        ("peft", [times[2] * trained[0] / trained[1], times[4] * asked[0] / asked[1]]),
        ("peft, Trainer", [times[3] * trained[0] / trained[1], times[4] * asked[0] / asked[1]]),
    ):
        record(
            base=base, lora=lora, rank=config.r, adapters=len(jobs), who=who,
            training_tokens_per_s=trained[0] / seconds[0], asking_tokens_per_s=asked[0] / seconds[1],
            training_s=seconds[0], asking_s=seconds[1], measured=len(jobs if who == "seal_engine" else sample),
            percent_of_matrix_rate_training=100 * flops * trained[0] / seconds[0] / rate,
            training_times_faster=seconds[0] / ours[0], asking_times_faster=seconds[1] / ours[1],
            together_times_faster=sum(seconds) / sum(ours),
        )  # fmt: skip
