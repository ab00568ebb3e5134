"""ARC's submission file: two attempts at every test of the held-out puzzles, whether or not their outputs are known."""

import json

from seal_engine.domains.few_shot.arc import Grid
from seal_engine.domains.few_shot.task import FewShot
from seal_engine.files import replace_file
from seal_engine.loop.ledger import Ledger
from seal_engine.loop.records import EVALUATION, Phase
from seal_engine.loop.restem import SELF_EDITS

SUBMISSION = "submission.json"
NOTHING: Grid = ((0,),)  # where no answer is a grid: the file wants one


def write_submission(domain: FewShot, ledger: Ledger) -> None:
    """Write, by the name of each held-out puzzle, the attempts after the last round of the first seed.

    The format is that of ARC Prize: {"name": [{"attempt_1": rows, "attempt_2": rows}, ... per test], ...}.
    """
    seed, *_ = ledger.config["seeds"]
    last = max((policy.round for policy in ledger.policies(seed)), default=0)
    answers = {
        trial.context: trial.answers
        for trial in reversed(ledger.trials(seed, str(Phase(EVALUATION, last, SELF_EDITS))))  # the first one wins
    }
    submission = {}
    for context in domain.contexts("held out"):
        task = domain.tasks[context]
        made = domain.attempts(context, answers[context]) if answers.get(context) else [[] for _ in task.tests]
        padded = [[*attempts, NOTHING, NOTHING][:2] for attempts in made]
        submission[task.name] = [{"attempt_1": first, "attempt_2": second} for first, second in padded]
    if submission:
        replace_file(ledger.directory / SUBMISSION, json.dumps(submission).encode())
