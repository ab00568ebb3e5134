"""The few-shot task: directives become jobs or are rejected, questions become votes, votes become grades."""

from types import SimpleNamespace

import pytest

from seal_engine.domains.few_shot.arc import Example, Task
from seal_engine.domains.few_shot.directive import ALL_TOKENS, OUTPUT_TOKENS, Directive
from seal_engine.domains.few_shot.task import FewShot, FewShotConfig
from seal_engine.loop.domain import InvalidSelfEditError
from seal_engine.model.tokenizer import Tokenizer
from seal_engine.sampling.requests import SamplingParams
from seal_engine.tiny import MODEL
from seal_engine.types import InputError

GRIDS = [((1, 2), (3, 4)), ((5, 0), (0, 6)), ((7, 8), (1, 0)), ((2, 2), (9, 1)), ((4, 0), (3, 3))]


def mirrored(grid):
    return tuple(row[::-1] for row in grid)


EXAMPLES = [Example(grid, mirrored(grid)) for grid in GRIDS]
TASK = Task("mirror", tuple(EXAMPLES[:3]), tuple(EXAMPLES[3:]))
ENGINE = SimpleNamespace(
    tokenizer=Tokenizer.from_directory(MODEL), config=SimpleNamespace(max_position_embeddings=4096)
)
CONTEXT = "train mirror"


def few_shot(**settings):
    return FewShot(FewShotConfig(**settings), ENGINE, [TASK], [])


def directive(strategy=ALL_TOKENS, rate=1e-4, epochs=2, basic=False):
    return Directive(basic, False, False, False, strategy, rate, epochs).to_json()


def test_a_directive_decides_the_job():
    domain = few_shot()
    job = domain.job(CONTEXT, directive(rate=3e-4, epochs=4))
    # 3 demonstrations: 3 tasks without one, 6 without two; each again with its demonstrations in another order.
    assert len(job.sequences) == 12
    assert (job.learning_rate, job.num_epochs, job.lr_scheduler, job.warmup_steps) == (3e-4, 4, "cosine", 11)
    assert (job.lora.r, job.lora.lora_alpha, job.batch_size) == (128, 16, 2)
    assert all(sequence.loss_mask is None for sequence in job.sequences)
    masked = domain.job(CONTEXT, directive(OUTPUT_TOKENS))
    for sequence in masked.sequences:
        answer = [t for t, m in zip(sequence.token_ids, sequence.loss_mask, strict=True) if m]
        assert domain.form.read_answer(ENGINE.tokenizer.decode(answer)) in [e.output for e in EXAMPLES[:3]]
    assert len(domain.job(CONTEXT, directive(basic=True)).sequences) > 12
    assert len(few_shot(max_tasks=5).job(CONTEXT, directive()).sequences) == 5


@pytest.mark.parametrize(
    ("text", "reason", "retryable"),
    [
        ("no idea", "JSON", True),
        (directive().replace("0.0001", "-1"), "learning_rate", False),
        (directive(epochs=300), "300 epochs x 12 tasks / 2 are 1800 steps", False),
    ],
)
def test_rejected(text, reason, retryable):
    with pytest.raises(InvalidSelfEditError, match=reason) as caught:
        few_shot().job(CONTEXT, text)
    assert caught.value.retryable == retryable


def answers(domain, solve):
    """What one who applies `solve` to every question's grid says."""
    queries = [query for own in domain.queries(CONTEXT) for query in own]
    return [domain.form.answer(solve(query)) for query in queries]


def test_votes_are_graded_test_by_test():
    domain = few_shot()
    assert len(domain.questions(CONTEXT)) == sum(map(len, domain.queries(CONTEXT)))

    def right(query):
        (undone,) = {query.undo.apply(query.task.tests[0].input)}
        target = mirrored(undone)
        return next(grid for grid in all_turned(target) if query.prediction(grid) == target)

    solved = answers(domain, right)
    count = len(domain.queries(CONTEXT)[0])
    wrong = ["nonsense"] * count
    assert domain.grade([(CONTEXT, solved)]) == [[1.0, 1.0]]
    assert domain.grade([(CONTEXT, wrong + solved[count:]), (CONTEXT, ["[[1]]"] * len(solved))]) == [
        [0.0, 1.0],
        [0.0] * 2,
    ]


def all_turned(grid):
    """The grid in all eight positions."""
    made = []
    for _ in range(4):
        grid = tuple(zip(*grid[::-1], strict=True))
        made += [grid, mirrored(grid)]
    return made


def test_sources():
    fixed = directive()
    domain = few_shot(fixed_directive=fixed, grid_learning_rates=(1e-4, 1e-3), grid_epochs=(1, 2, 4))
    found = {name: writer.write(["a", "b"], SamplingParams()) for name, writer in domain.sources().items()}
    assert found["fixed directive"] == [[fixed], [fixed]]
    assert [len(set(texts)) for texts in found["best directive of a grid"]] == [16 * 2 * 2 * 3] * 2
    assert domain.sources()["best directive of a grid"].aggregate == "max"
    assert few_shot().sources() == {}


def test_puzzles_to_learn_from_need_solutions():
    unsolved = Task("open", TASK.train, (Example(GRIDS[0], None),))
    with pytest.raises(InputError, match="open: solutions: found 'a test without one'"):
        FewShot(FewShotConfig(), ENGINE, [unsolved], [])


def test_held_out_puzzles_without_solutions_are_answered_but_not_graded():
    """As ARC's own test files are. What has no output has no grade; None would count as a grade that is missing."""
    half = Task("half", TASK.train, (EXAMPLES[3], Example(GRIDS[4], None)))
    domain = FewShot(FewShotConfig(), ENGINE, [TASK], [half])
    answers = [domain.form.answer(EXAMPLES[3].output)] * len(domain.questions("held out half"))
    (grades,) = domain.grade([("held out half", answers)])
    assert len(grades) == 1


@pytest.mark.parametrize("wrap", ["{}", "```json\n{}\n```", "```\n{}\n```\n"])
def test_an_answer_in_a_fence_or_another_spelling_of_json_counts(wrap):
    domain = few_shot()
    text = wrap.format("[[2,1],[4,3]]")
    assert domain.form.read_answer(text) == ((2, 1), (4, 3))
    queries = domain.queries(CONTEXT)[0]
    assert domain.attempts(CONTEXT, [text] * len(domain.questions(CONTEXT)))[0]
    assert queries[0].prediction(domain.form.read_answer(text)) == ((2, 1), (4, 3))


def test_a_stop_text_inside_of_grids_is_an_error(tmp_path):
    """It would cut every answer after its first row, so that none could be right."""
    template = tmp_path / "grid.txt"
    template.write_text("0 1\n2 3")
    with pytest.raises(
        InputError, match=r"answer_stop: found '\\n'; accepted: a text that is not part of a grid such as"
    ):
        few_shot(grid_template=str(template))
    assert few_shot(grid_template=str(template), answer_stop="\n\n").answer_params.stops == ["\n\n"]
    assert few_shot().answer_params.stops == ["\n"]
    assert few_shot(chat=True).answer_params.stops == []  # the end of the turn stops it


def test_questions_longer_than_the_model_are_said(caplog):
    engine = SimpleNamespace(tokenizer=ENGINE.tokenizer, config=SimpleNamespace(max_position_embeddings=200))
    domain = FewShot(FewShotConfig(answer_tokens=180), engine, [TASK], [])
    assert domain.questions(CONTEXT) == []
    assert caplog.messages[0].startswith(
        f"{CONTEXT}: test 0 does not fit the model's 200 tokens with 180 for the answer"
    )
    assert len(caplog.messages) == 2


def test_training_tasks_longer_than_the_model_are_left_out_and_said(caplog):
    """Six of twelve fit, as with a real puzzle of 4,096 tokens: one that does not once failed the whole adapter."""
    wide = Example(((1,) * 25,) * 4, ((2,) * 25,) * 4)
    task = Task("wide", (*EXAMPLES[:2], wide), (EXAMPLES[3],))
    lengths = sorted(
        len(s.token_ids) for s in FewShot(FewShotConfig(), ENGINE, [task], []).job("train wide", directive()).sequences
    )
    engine = SimpleNamespace(tokenizer=ENGINE.tokenizer, config=SimpleNamespace(max_position_embeddings=lengths[5]))
    job = FewShot(FewShotConfig(), engine, [task], []).job("train wide", directive())
    assert sorted(len(s.token_ids) for s in job.sequences) == [n for n in lengths if n <= lengths[5]]
    assert caplog.messages[-1].endswith(f"training tasks are left out: longer than {lengths[5]} tokens")
