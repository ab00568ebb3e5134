"""ReST^EM (arXiv 2312.06585) over self-edits: the outer loop of SEAL (arXiv 2506.10943), algorithm 1.

    Algorithm 1 of the paper                            here
    for each round t of the outer loop:                 ReSTEM.run, round_number
        sample contexts and tasks (C, tau) from D       e_step: domain.contexts, domain.questions
        generate a self-edit SE ~ LM_theta(. | C)       e_step: collect_self_edits; theta: the base and self.policy
        update theta' <- SFT(theta, SE)                 InnerLoop.run: engine.train, an adapter per trial
        evaluate Ans ~ LM_theta'(. | tau)               InnerLoop.run: engine.generate
        compute the reward r <- r(Ans, tau)             e_step: rewards_of, the mean of domain.grade
        update theta <- RL_update(theta, r, SE)         m_step: select, fine_tune, adopt

What contexts, self-edits and questions are is the Domain's; what has been done is the Ledger's. A checkpointed step is
recorded whole or not at all, and what it computes depends on the configuration and on the steps before it alone. So a
run that was interrupted ends like one that was not: on a CPU with the same bits, provided that memory is not what
bounds how many adapters are trained at once.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from time import perf_counter
from typing import Any

from seal_engine.engine import Engine
from seal_engine.errors import RunError
from seal_engine.loop.config import LoopConfig
from seal_engine.loop.domain import Candidate, Domain
from seal_engine.loop.inner import InnerLoop, derive_seed
from seal_engine.loop.ledger import Ledger
from seal_engine.loop.records import BASELINE, EVALUATION, ROUND, Phase, PolicyUpdate, SelfEdit, loss_curve
from seal_engine.loop.selection import Key, rewards_of, select
from seal_engine.loop.steps import CheckpointedSteps
from seal_engine.model.adapters import Adapter
from seal_engine.progress import reporting, write_line
from seal_engine.training.jobs import TrainSequence
from seal_engine.types import require

SELF_EDITS = "self-edits"  # the method whose self-edits the policy writes
CONTINUED_PRETRAINING = "self-edits, one adapter for all"
NO_ADAPTER = "no adapter"


def validate_run(domain: Domain, config: LoopConfig) -> None:
    """InputError for settings that the domain cannot serve: before anything is trained or written."""
    sources = ["", *domain.sources()]
    require(config.self_edit_source in sources, "self_edit_source", config.self_edit_source, f"one of {sources}")
    count, known = config.contexts, len(domain.contexts("train"))
    require(count <= known or not config.rounds, "contexts", count, f"at most {known}: there are no more")
    for split in ("train", "held out"):
        for context in domain.contexts(split)[:1]:
            domain.prompt(context)
            domain.questions(context)
    domain.logits_hook(config.max_tokens)


class ReSTEM:
    """The outer loop over one engine, domain and ledger. `run` does all that the ledger does not have yet."""

    def __init__(
        self,
        engine: Engine,
        domain: Domain,
        config: LoopConfig,
        ledger: Ledger,
        log: Callable[[str], None] = write_line,
        progress: bool = True,
        inner_loop: InnerLoop | None = None,
    ):
        """log: takes one line of text on what has been measured. progress: bars for what takes over a second.
        inner_loop: where trials are computed; None: over the engine."""
        self.engine = engine
        self.domain = domain
        self.config = config
        self.ledger = ledger
        self.log = log
        self.progress = progress
        self.inner_loop = inner_loop or InnerLoop(engine, domain.answer_params, domain.grade, log, progress)
        self.policy: Adapter | None = None  # writes self-edits on top of the base; None: the base writes them
        self.steps = self._steps_of(config.seeds[0])

    def _steps_of(self, seed: int) -> CheckpointedSteps:
        parts = self.engine, self.domain, self.config, self.ledger, self.inner_loop
        return CheckpointedSteps(*parts, seed, self.log, self.progress)

    @property
    def seed(self) -> int:
        """The seed that is being run."""
        return self.steps.seed

    def run(self) -> None:
        """All seeds: evaluate, then in each round improve the policy and evaluate again."""
        validate_run(self.domain, self.config)
        count = len(self.config.seeds) * len(self._phases())
        with reporting(count, "unit", "Run", self.progress, initial=self._num_finished()) as report:
            self._run_seeds(lambda: report(self._num_finished()))

    def is_finished(self) -> bool:
        """Whether all seeds are through all rounds."""
        return self._num_finished() == len(self.config.seeds) * len(self._phases())

    def _phases(self) -> list[Phase]:
        """What ends in a step of its own, of each seed."""
        rounds = range(1, self.config.rounds + 1)
        return [Phase(ROUND, r) for r in rounds] + [Phase(EVALUATION, r) for r in (0, *rounds)]

    def _num_finished(self) -> int:
        """How many of the phases are recorded, of all seeds together."""
        return sum(self._steps_of(seed).finished(phase) for seed in self.config.seeds for phase in self._phases())

    def _run_seeds(self, report: Callable[[], None]) -> None:
        """report: called when a phase is finished."""
        for i, seed in enumerate(self.config.seeds):
            self.steps = self._steps_of(seed)
            if all(map(self.steps.finished, self._phases())):
                continue
            if i:
                self.engine.reload()
            self.policy = None
            self.evaluate_policy(0)
            report()
            for round_number in range(1, self.config.rounds + 1):
                rewards = self.e_step(round_number)
                self.m_step(round_number, rewards)
                report()
                self.evaluate_policy(round_number)
                report()

    def e_step(self, round_number: int) -> dict[Key, float | None]:
        """Sample self-edits for the round's contexts, train an adapter on each, question it: rewards by self-edit."""
        phase, known, count = Phase(ROUND, round_number), self.domain.contexts("train"), self.config.contexts
        contexts = [known[i % len(known)] for i in range((round_number - 1) * count, round_number * count)]
        if not self.steps.finished(phase):
            base = [Candidate(context, None, self.domain.questions(context)) for context in contexts]
            self.steps.evaluate(replace(phase, method=NO_ADAPTER), base, 1)
            name = self.config.self_edit_source
            writer = self.domain.sources()[name] if name else self.policy
            candidates = self.steps.collect_self_edits(phase, contexts, self.config.self_edits, writer)
            self.steps.evaluate(phase, candidates, self.config.repeats)
        return rewards_of(self.ledger.trials(self.seed, str(phase)))

    def m_step(self, round_number: int, rewards: Mapping[Key, float | None]) -> None:
        """Fine-tune the policy on the self-edits that the rewards select, and go on with the new policy."""
        phase = Phase(ROUND, round_number)
        self.steps.end(phase, lambda: self.fine_tune(round_number, self.select(round_number, rewards), rewards))
        shutil.rmtree(self._checkpoint(round_number), ignore_errors=True)
        self.adopt(round_number)

    def select(self, round_number: int, rewards: Mapping[Key, float | None]) -> list[SelfEdit]:
        """The self-edits of a round that the policy is to learn from."""
        phase = Phase(ROUND, round_number)
        base = self.ledger.trials(self.seed, str(replace(phase, method=NO_ADAPTER)))
        return select(
            self.ledger.self_edits(self.seed, str(phase)),
            rewards,
            {trial.context: trial.accuracy for trial in base},
            self.config,
            lambda key: derive_seed(self.seed, str(phase), key),
        )

    def fine_tune(
        self, round_number: int, chosen: Sequence[SelfEdit], rewards: Mapping[Key, float | None]
    ) -> dict[str, Any]:
        """Train the policy on the chosen self-edits and save its adapter; returns what to record."""
        phase, start = Phase(ROUND, round_number), perf_counter()
        kept, sequences = [], []
        for edit in chosen:
            prompt = self.engine.inputs.token_ids(self.domain.prompt(edit.context), "prompt")
            if len(prompt) + len(edit.token_ids) <= self.engine.config.max_position_embeddings:
                kept.append(edit)
                mask = [0] * len(prompt) + [1] * len(edit.token_ids)
                sequences.append(TrainSequence([*prompt, *edit.token_ids], mask))
        if len(kept) < len(chosen):
            self.log(f"{phase}: {len(chosen) - len(kept)} kept self-edits are left out: longer than the model")
        losses, path = [], None
        if kept:
            job = replace(
                self.config.policy_job(sequences),
                seed=derive_seed(self.seed, round_number, "policy"),
                init_from=self.policy,
                checkpoint_dir=self._checkpoint(round_number),
            )
            (result,) = self.engine.train([job], progress=self.progress)
            if result.adapter is None:
                raise RunError(f"{phase}: the policy's update failed: {result.error}")
            directory = self.ledger.policy_directory(self.seed, round_number)
            self.ledger.replace_directory(directory, result.adapter.save)
            losses, path = result.losses, str(directory.relative_to(self.ledger.directory))
        names = tuple((edit.context, edit.index) for edit in kept)
        seconds, final_loss = perf_counter() - start, losses[-1] if losses else None
        numbers = len(losses), final_loss, seconds, loss_curve(losses)
        policy = PolicyUpdate(self.seed, round_number, path, names, *numbers)
        given = [reward for reward in rewards.values() if reward is not None]
        if given and not any(given):
            self.log(_nothing_rewarded(f"seed {self.seed}, {phase}", len(given), len(kept)))
        mean = f"mean reward {fmean(given):.3f}" if given else "no reward"
        self.log(f"seed {self.seed}, {phase}: {mean}, kept {len(kept)} self-edits")
        metrics = {"seed": self.seed, "phase": str(phase), "reward": fmean(given) if given else None, "kept": len(kept)}
        return {"policy": policy, "metrics": metrics}

    def adopt(self, round_number: int) -> None:
        """Make the round's recorded update part of the policy; with nothing kept, the policy stays as it is."""
        (update,) = [p for p in self.ledger.policies(self.seed) if p.round == round_number]
        if update.path is None:
            return
        adapter = self.engine.load_adapter(self.ledger.policy_directory(self.seed, round_number))
        if self.config.policy_update == "merge":
            self.engine.merge(adapter)
        else:
            self.policy = adapter

    def evaluate_policy(self, round_number: int) -> None:
        """Evaluate the policy on held-out contexts; before the first round the baselines, too."""
        config, phase, contexts = self.config, Phase(EVALUATION, round_number), self.domain.contexts("held out")
        if self.steps.finished(phase):
            return
        if round_number == 0:
            for name, candidates_of in self.domain.baselines().items():
                candidates = [replace(c, index=i) for context in contexts for i, c in enumerate(candidates_of(context))]
                trained = any(candidate.job is not None for candidate in candidates)
                self.steps.evaluate(Phase(BASELINE, 0, name), candidates, config.held_out_repeats if trained else 1)
            for name, source in self.domain.sources().items():
                baseline = Phase(BASELINE, 0, name)
                candidates = self.steps.collect_self_edits(baseline, contexts, 0, source)
                self.steps.evaluate(baseline, candidates, config.held_out_repeats, source.aggregate)
        count = max(config.held_out_self_edits, config.continued_pretraining)
        candidates = self.steps.collect_self_edits(phase, contexts, count, self.policy)
        own = [candidate for candidate in candidates if candidate.index < config.held_out_self_edits]
        accuracy = self.steps.evaluate(replace(phase, method=SELF_EDITS), own, config.held_out_repeats)
        if config.continued_pretraining:
            joint = _joint([c for c in candidates if c.index < config.continued_pretraining])
            self.steps.evaluate(replace(phase, method=CONTINUED_PRETRAINING), joint, config.held_out_repeats)
        metrics = {"seed": self.seed, "phase": str(phase), "accuracy": accuracy}
        self.steps.end(phase, lambda: {"metrics": metrics})

    def _checkpoint(self, round_number: int) -> Path:
        return self.ledger.directory / f"checkpoint of seed {self.seed}, round {round_number}"


def _nothing_rewarded(where: str, num_rewards: int, num_kept: int) -> str:
    """A warning for a round whose rewards are all 0."""
    warning = f"{where}: warning: all {num_rewards} rewards are 0"
    if not num_kept:
        return f"{warning}: no self-edit is kept, and the policy stays as it is"
    return (
        f"{warning}: which self-edits are kept is no matter of reward, so the policy learns from noise. With "
        "--keep-reward X only rewards of at least X are kept: above 0, such a round leaves the policy as it is"
    )


def _joint(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Continued pretraining: one job on the sequences of all candidates, evaluated on every context."""
    jobs = [candidate.job for candidate in candidates if candidate.job is not None]
    joint = replace(jobs[0], sequences=[s for job in jobs for s in job.sequences]) if jobs else None
    rejected = None if jobs else "no self-edit to train on"
    questions = {candidate.context: candidate.questions for candidate in candidates}
    return [Candidate(context, joint, asked, rejected=rejected) for context, asked in questions.items()]
