"""What else has changed after the last step: probes of every method's systems.

reading     questions about other passages, with the passage in the prompt
knowledge   questions of no passage: what the model knew before ("probe" contexts of the domain)
writing     the reward of self-edits that the system writes for other passages, each trained on the untrained model
kl          KL(untrained model || system), nats per token, over texts of the untrained model that no method has seen
routing     of a bank: how often a question reaches its edit, and a question of no edit none
"""

from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean
from typing import TYPE_CHECKING, Any

from seal_engine.loop.continual_data import divergence
from seal_engine.loop.continual_methods import Bank, Method, Oracle
from seal_engine.loop.domain import Candidate
from seal_engine.loop.inner import derive_seed
from seal_engine.loop.records import Trial

if TYPE_CHECKING:
    from seal_engine.loop.continual import Continual

KL_TEXTS = 32
UNTRAINED = "untrained"  # the phase of row 0 of the matrices, and a system that is probed
NO_EDIT = "no edit"  # what a question of no passage is about


def probe_phase(probe: str, method: str) -> str:
    """The phase of a probe's trials, as the ledger names it."""
    return f"probe of {probe}, {method}"


def probe_methods(
    run: "Continual",
    seed: int,
    methods: Sequence[Method],
    sequences: Sequence[Sequence[str]],
    texts: Sequence[Sequence[int]],
) -> dict[str, Any]:
    """All probes of all methods and of the untrained model; returns what to record. texts: of the untrained model."""
    trials: list[Trial] = []
    systems: list[Method | None] = [None, *methods]
    for probe in ("reading", "knowledge"):
        trials += _ask(run, seed, probe, systems, len(sequences))
    written, edits = _write(run, seed, systems, len(sequences))
    metrics: dict[str, Any] = {"seed": seed}
    for method in methods:
        metrics |= {f"{method.name}: {name}": value for name, value in _divergence(run, method, texts).items()}
        if isinstance(method, Bank) and not isinstance(method, Oracle):
            routing = route_shares(run, method, sequences)
            metrics |= {f"{method.name}: {name}": value for name, value in routing.items()}
    return {"trials": trials + written, "self_edits": edits, "metrics": metrics}


def _name(system: Method | None) -> str:
    return UNTRAINED if system is None else system.name


def _ask(run: "Continual", seed: int, probe: str, systems: Sequence[Method | None], count: int) -> list[Trial]:
    """Questions of other passages, with the passage in the prompt, or of what the model knew before."""
    contexts, number = run.domain.contexts("train" if probe == "reading" else "probe"), run.config.probe_contexts
    if not contexts or not number:
        return []
    places, questions = [], []
    for system in systems:
        for s in range(count):
            for i in range(number):
                context = contexts[(s * number + i) % len(contexts)]
                prompts = run.domain.reading(context) if probe == "reading" else run.domain.questions(context)
                plain = [run.text(prompt) for prompt in run.domain.questions(context)]
                route = [None] * len(prompts) if system is None else system.route(s, NO_EDIT, plain)
                places.append((probe_phase(probe, _name(system)), context, s * number + i))
                questions.append((context, prompts, route))
    answered = run.inner_loop.answer(questions)
    trials = [
        Trial(seed, phase, context, index, 0, 0, 0, 0, None, None, answers, grades, 0.0)
        for (phase, context, index), (answers, grades) in zip(places, answered, strict=True)
    ]
    run.validate_grades(f"probe of {probe}", trials)
    return trials


def _write(run: "Continual", seed: int, systems: Sequence[Method | None], count: int) -> tuple[list[Trial], list]:
    """Self-edits of every system for other passages, and their rewards on the untrained model."""
    contexts, number = run.domain.contexts("train"), run.config.probe_writing
    edits, places, candidates = [], [], []
    known: dict[tuple[int, int | None], list] = {}
    for system in systems:
        phase = probe_phase("writing", _name(system))
        for s in range(count):
            writer = None if system is None else system.writer(s)
            key = s, None if writer is None else writer.uid
            if key not in known:
                due = {(contexts[(s * number + i) % len(contexts)], s * number + i): writer for i in range(number)}
                known[key] = run.sample(seed, "probe of writing", due)
            for edit in known[key]:
                job = None if edit.rejected else run.make_job(edit.context, edit.text)
                edits.append((phase, edit))
                places.append((phase, edit))
                questions = run.domain.questions(edit.context)
                candidates.append((Candidate(edit.context, job, questions, edit.index, edit.rejected), 0))
    train_seed = derive_seed(seed, "probe of writing")
    results = run.inner_loop.run([(candidate, train_seed) for candidate, _ in candidates])
    trials = [
        Trial(seed, phase, edit.context, edit.index, 0, train_seed, **vars(result))
        for (phase, edit), result in zip(places, results, strict=True)
    ]
    return trials, [replace(edit, phase=phase) for phase, edit in edits]


def _divergence(run: "Continual", method: Method, texts: Sequence[Sequence[int]]) -> dict[str, float]:
    """KL to the untrained model on its own texts, the mean over sequences; a bank routes each text."""
    some = [ids for ids in texts if len(ids) > 1][:KL_TEXTS]
    decoded = [run.text(list(ids)) for ids in some]
    sums = []
    for s in range(len(method.current)):
        routes = method.route(s, NO_EDIT, decoded)
        for adapter in dict.fromkeys(routes):
            own = [ids for ids, route in zip(some, routes, strict=True) if route is adapter]
            sums.append(divergence(run.engine, [adapter], own)[0] * sum(map(len, own)))
    return {"kl": sum(sums) / (len(method.current) * sum(map(len, some)))}


def route_shares(run: "Continual", bank: Bank, sequences: Sequence[Sequence[str]]) -> dict[str, float]:
    """Shares of questions that go where they should: with the whole title in them, with the first word of it, without
    it, and of questions of no edit."""
    right: dict[str, list[bool]] = {"routed": [], "routed by first word": [], "routed without title": []}
    for s, contexts in enumerate(sequences):
        order = [lesson.context for lesson in bank.lessons[s]]
        for context in contexts:
            title = run.domain.title(context)
            for text in (run.text(prompt) for prompt in run.domain.questions(context)):
                asked = (text, text.replace(title, title.split()[0]), text.replace(title, "this"))
                for kind, query in zip(right, asked, strict=True):
                    found = bank.routers[s].route(query)
                    right[kind].append(found is not None and order[found] == context)
    shares = {kind: fmean(own) for kind, own in right.items() if own}
    others = [run.text(p) for context in run.domain.contexts("probe") for p in run.domain.questions(context)]
    none = [router.route(text) is None for router in bank.routers for text in others[:64]]
    return shares | ({"routed to none": fmean(none)} if none else {})
