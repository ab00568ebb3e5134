"""One round that is learned from its rewards, and the control that is learned from the rewards of other self-edits."""

import shutil
from dataclasses import replace

from seal_engine import Engine, runs
from seal_engine.loop.config import LoopConfig
from seal_engine.loop.ledger import Ledger
from seal_engine.loop.restem import ReSTEM
from seal_engine.loop.settings import make


def learn_with_control(task, directory, baselines=True, **settings):
    """Mean accuracies by method of a run of one round, and of its control.

    Both share all that is done before the rewards are used: it is computed once, and the control goes on from a copy of
    the ledger. baselines: whether to measure the task's baselines, too.
    """
    values = {**runs.TASKS[task].defaults, **settings, "rounds": 1}
    config = make(LoopConfig, values)
    engine = Engine.from_pretrained(values["model"], device="cpu", dtype=values["dtype"])
    domain = runs.TASKS[task].make(make(runs.TASKS[task].config, values), engine)
    if not baselines:
        domain.baselines = domain.sources = dict

    def loop(ledger, shuffle_rewards):
        own = replace(config, shuffle_rewards=shuffle_rewards)
        return ReSTEM(engine, domain, own, ledger, lambda line: None, progress=False)

    with Ledger.open(directory / "run", {}) as ledger:
        shared = loop(ledger, False)
        shared.evaluate_policy(0)
        shared.e_step(1)
    shutil.copytree(directory / "run", directory / "control")
    accuracies = []
    for name, shuffle_rewards in (("run", False), ("control", True)):
        engine.reload()
        with Ledger.open(directory / name, {}) as ledger:
            loop(ledger, shuffle_rewards).run()
            accuracies.append({row.name: row.mean for row in runs.rows(ledger)})
    return accuracies
