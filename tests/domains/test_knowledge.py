"""The knowledge task: what its prompts, jobs, questions, baselines and result files hold."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from seal_engine.domains.knowledge.endpoint import Reply
from seal_engine.domains.knowledge.passages import Passage, Question
from seal_engine.domains.knowledge.results import completion_stats, select
from seal_engine.domains.knowledge.seal_files import read_result, write_result
from seal_engine.domains.knowledge.task import Knowledge, KnowledgeConfig
from seal_engine.domains.templating import fill
from seal_engine.loop.config import LoopConfig
from seal_engine.loop.domain import InvalidSelfEditError
from seal_engine.loop.ledger import Ledger
from seal_engine.loop.records import SelfEdit, Trial
from seal_engine.loop.restem import ReSTEM
from seal_engine.loop.selection import rewards_of
from seal_engine.sampling.requests import SamplingParams
from seal_engine.types import InputError


def passage(i, questions=2):
    asked = tuple(Question(f"What is {i}.{k}?", f"answer {k}") for k in range(questions))
    return Passage(f"Title {i}", f"Text {i} with {{braces}} and {{title}}.", asked)


SEAL = Path(__file__).parents[3] / "shared/data/seal"
PASSAGES = [passage(i) for i in range(6)]
ENGINE = SimpleNamespace(
    tokenizer=SimpleNamespace(
        apply_chat_template=lambda turns, add_generation_prompt: [turns, add_generation_prompt],
        encode=lambda text: text.split(" "),
    ),
    config=SimpleNamespace(max_position_embeddings=4096),
)


def knowledge(engine=ENGINE, train=PASSAGES[:4], held_out=PASSAGES[4:], **settings):
    return Knowledge(KnowledgeConfig(**settings), engine, train, held_out)


def data_file(directory, passages, name="data.json"):
    records = [
        {
            "title": p.title,
            "context": p.context,
            "questions": [vars(q) for q in p.questions],
            "completions": list(p.completions),
        }
        for p in passages
    ]
    file = directory / name
    file.write_text(json.dumps(records))
    return str(file)


def test_sequences_longer_than_the_model_are_left_out_and_said(caplog):
    """One of them failed the whole adapter; the others teach. With none left, the self-edit is invalid."""
    engine = SimpleNamespace(tokenizer=ENGINE.tokenizer, config=SimpleNamespace(max_position_embeddings=20))
    domain, context = knowledge(engine), "train 0001 Title 1"
    long = "word " * 30
    job = domain.job(context, f"short\n{long}\nlast")
    assert job.sequences == ["Title 1\nshort", "Title 1\nlast", f"Title 1\n{PASSAGES[1].context}"]
    assert caplog.messages == [f"{context}: 1 training sequences are left out: longer than 20 tokens"]
    with pytest.raises(InvalidSelfEditError, match="no training sequence of at most 20 tokens"):
        knowledge(engine, with_passage=False).job(context, long)


def test_names_are_unique_where_titles_are_not():
    same = [replace(PASSAGES[0], context=f"Other {i}") for i in range(3)]
    domain = knowledge(train=same, held_out=same)
    names = [*domain.contexts("train"), *domain.contexts("held out")]
    assert len(set(names)) == 6
    assert names[0] == "train 0000 Title 0"


def test_templates_are_filled_once():
    assert fill("{a}{b} {c} {{a}}", {"a": "{b}", "b": 1}) == "{b}1 {c} {{b}}"


def test_prompts():
    domain = knowledge()
    (context, *_), passage = domain.contexts("held out"), PASSAGES[4]
    prompt = domain.prompt(context)
    assert f"{passage.title}\n{passage.context}" in prompt
    questions = domain.questions(context)
    assert len(questions) == 2
    assert "What is 4.1?" in questions[1]
    assert "Title 4" in questions[1]
    assert passage.context not in questions[1]
    ((attempt,), *_) = [domain.baselines()["passage in the prompt"](context)]
    assert attempt.job is None
    assert all(passage.context in question for question in attempt.questions)


def test_own_templates_and_chats(tmp_path):
    (tmp_path / "ask.txt").write_text("{question}|{title}|{other}")
    domain = knowledge(question_template=str(tmp_path / "ask.txt"))
    assert domain.questions("train 0000 Title 0")[0] == "What is 0.0?|Title 0|{other}"
    domain = knowledge(question_template=str(tmp_path / "ask.txt"), chat=True)
    asked = [[{"role": "user", "content": "What is 0.0?|Title 0|{other}"}], True]
    assert domain.questions("train 0000 Title 0")[0] == asked
    with pytest.raises(InputError, match=r"absent\.txt: missing"):
        knowledge(prompt_template=str(tmp_path / "absent.txt"))


def test_jobs():
    domain, context = knowledge(), "train 0001 Title 1"
    job = domain.job(context, "one\n\ntwo\n")
    assert job.sequences == ["Title 1\none", "Title 1\ntwo", f"Title 1\n{PASSAGES[1].context}"]
    assert (job.lora.r, job.lora.lora_alpha, job.learning_rate, job.num_epochs, job.batch_size) == (32, 64, 1e-3, 10, 1)
    assert job.lora.target_modules == ("q_proj", "v_proj")
    plain = knowledge(with_title=False, with_passage=False, max_sequences=1, append_eos=True, targets=("all-linear",))
    job = plain.job(context, "one\n\ntwo\n")
    assert (job.sequences, job.append_eos, job.lora.target_modules) == (["one"], True, "all-linear")
    assert knowledge(split_newlines=False).job(context, "one\ntwo").sequences[0] == "Title 1\none\ntwo"
    with pytest.raises(InvalidSelfEditError, match="no text"):
        domain.job(context, " \n---\n ")


def test_passage_baselines_have_the_steps_that_they_say():
    baselines = knowledge(passage_copies=3).baselines()
    (once,) = baselines["passage only"]("train 0000 Title 0")
    (more,) = baselines["passage only, 3 times"]("train 0000 Title 0")
    assert once.job is not None
    assert more.job is not None
    assert list(more.job.sequences) == 3 * list(once.job.sequences) == 3 * [f"Title 0\n{PASSAGES[0].context}"]
    assert [*knowledge(passage_copies=0).baselines()] == ["no adapter", "passage in the prompt", "passage only"]


def test_grades_go_where_they_belong():
    domain = knowledge(grader="exact")
    answered = [("train 0002 Title 2", ["answer 0", "no"]), ("train 0000 Title 0", ["no", "The answer 1."])]
    assert domain.grade(answered) == [[1.0, 0.0], [0.0, 1.0]]
    assert domain.grade([]) == []


def test_self_edits_from_a_file(tmp_path):
    known = [replace(PASSAGES[4], completions=("first", "second")), replace(PASSAGES[0], context="another text")]
    domain = knowledge(self_edits_file=data_file(tmp_path, known))
    written = domain.sources()["file"].write(domain.contexts("held out"), SamplingParams())
    assert written == [("first", "second"), ()]


def test_data_is_split(tmp_path):
    file = data_file(tmp_path, PASSAGES)
    domain = Knowledge(KnowledgeConfig(data=file, held_out_contexts=2), ENGINE)
    assert [p.title for p in domain.splits["train"].values()] == ["Title 0", "Title 1", "Title 2", "Title 3"]
    assert [p.title for p in domain.splits["held out"].values()] == ["Title 4", "Title 5"]
    other = data_file(tmp_path, [replace(p, title="Another") for p in PASSAGES], "other.json")
    domain = Knowledge(KnowledgeConfig(data=file, held_out_data=other, held_out_contexts=6), ENGINE)
    assert len(domain.splits["train"]) == len(domain.splits["held out"]) == 6
    with pytest.raises(InputError, match=r"held_out_contexts: found 6; accepted: at most 5"):
        Knowledge(KnowledgeConfig(data=file, held_out_contexts=6), ENGINE)
    with pytest.raises(InputError, match="data: found ''"):
        Knowledge(KnowledgeConfig(), ENGINE)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"grader": "vibes"}, "grader: found 'vibes'"),
        ({"grader": "endpoint"}, "endpoint: found ''"),
        ({"endpoint_self_edits": 2}, "endpoint: found ''"),
        ({"rank": 0}, "rank: found 0"),
        ({"dropout": 1.0}, "dropout: found 1.0"),
        ({"learning_rate": float("nan")}, "learning_rate: found nan"),
        ({"epochs": 0}, "epochs: found 0"),
        ({"answer_tokens": 0}, "answer_tokens: found 0"),
        ({"passage_copies": -1}, "passage_copies: found -1"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(InputError, match=message):
        KnowledgeConfig(**settings)


@pytest.mark.skipif(not SEAL.exists(), reason="the published data is not here: shared/data/seal")
def test_the_best_are_those_that_the_published_rule_keeps(tmp_path):
    """The published trials, recorded as a run's: what the M-step would learn from is the published choice."""
    result = read_result(SEAL / "rank_iter0.json")
    edits, trials = [], []
    for i, article in enumerate(result.articles):
        for index, judged in enumerate(article.completions):
            edits.append(SelfEdit(0, "round 1", f"{i:02d}", index, judged.text, (1,), 1, 1, None))
            for repeat in range(3):
                grades = tuple(float(a.adapter_correct or 0) for a in judged.questions if a.rep == repeat)
                row = (0, "round 1", f"{i:02d}", index, repeat, 1, 1, 1, 0.0, None, ("",) * len(grades), grades, 0.0)
                trials.append(Trial(*row))
    with Ledger.open(tmp_path / "run", {}) as ledger:
        ledger.finish("unit", self_edits=edits, trials=trials)
        kept = ReSTEM(ENGINE, knowledge(), LoopConfig(), ledger).select(1, rewards_of(trials))
    published = [json.loads(line) for line in (SEAL / "sft_best1of5_iter0.jsonl").read_text().splitlines()]
    assert [edit.text.strip() for edit in kept] == [row["completion"].strip() for row in published]


@pytest.mark.parametrize("name", ["prompt_template", "question_template", "reading_template"])
def test_templates_need_their_places(tmp_path, name):
    (tmp_path / "template.txt").write_text("{title}\n")
    with pytest.raises(InputError, match=r"template\.txt: found 'no \{(context|question)\}'"):
        knowledge(**{name: str(tmp_path / "template.txt")})


def test_an_editors_newline_at_the_end_of_a_template_is_no_part_of_it(tmp_path):
    (tmp_path / "ask.txt").write_text("{question} A:\n")
    assert knowledge(question_template=str(tmp_path / "ask.txt")).questions("train 0000 Title 0")[0].endswith(" A:")


def test_passages_to_measure_on_are_not_learned_from(tmp_path):
    file = data_file(tmp_path, PASSAGES)
    with pytest.raises(InputError, match="held_out_data: found 'Title 0: Text 0"):
        Knowledge(KnowledgeConfig(data=file, held_out_data=file, held_out_contexts=1), ENGINE)


def test_self_edits_from_an_endpoint(monkeypatch, caplog):
    """Asked for as the loop samples; what could not be had is None, and said."""
    asked = []

    def answer(endpoint, prompts, max_tokens, temperature):
        asked.append((endpoint.model, dict(endpoint.fields), len(prompts), max_tokens, temperature))
        return [Reply("fact"), Reply(error="HTTP 500: sorry")] * (len(prompts) // 2)

    monkeypatch.setattr("seal_engine.domains.knowledge.task.complete", answer)
    settings = {"endpoint": "http://localhost:1/v1", "endpoint_model": "m", "endpoint_key_variable": ""}
    domain = knowledge(endpoint_self_edits=2, **settings)
    params = SamplingParams(temperature=0.3, top_p=0.5, max_tokens=40)
    assert domain.sources()["endpoint"].write(domain.contexts("held out"), params) == [["fact", None]] * 2
    assert asked == [("m", {"top_p": 0.5}, 4, 40, 0.3)]
    assert caplog.messages == ["2 of 4 self-edits could not be had: HTTP 500; the first: HTTP 500: sorry"]


def test_a_missing_key_is_missed_at_once(monkeypatch):
    monkeypatch.delenv("ABSENT_KEY", raising=False)
    with pytest.raises(InputError, match="ABSENT_KEY"):
        knowledge(endpoint="http://localhost:1/v1", endpoint_model="m", endpoint_key_variable="ABSENT_KEY")


def test_seal_result_of_a_round(tmp_path):
    """Two self-edits of a passage, two repeats: statistics by hand, and what the published rule keeps."""
    domain, context = knowledge(), "train 0003 Title 3"
    edits = [
        SelfEdit(0, "round 1", context, index, text, (1,), 5, 1, refused)
        for index, (text, refused) in enumerate([("poor", None), ("rich", None), ("---", "no text")])
    ]

    def trial(phase, index, repeat, grades, error=None):
        answers = () if error else ("a", "b")
        return Trial(0, phase, context, index, repeat, 1, 2, 3, 0.5, error, answers, () if error else grades, 0.1)

    trials = [
        trial("round 1, no adapter", 0, 0, (1.0, 0.0)),
        trial("round 1", 0, 0, (0.0, 0.0)),
        trial("round 1", 0, 1, (), error="diverged"),
        trial("round 1", 1, 0, (1.0, 1.0)),
        trial("round 1", 1, 1, (1.0, None)),
    ]
    with Ledger.open(tmp_path / "run", {"model": "a/model", "repeats": 2}) as ledger:
        ledger.finish("unit", self_edits=edits, trials=trials)
        result = domain.result(ledger, 0, 1)
    (article,) = result.articles
    assert [judged.text for judged in article.completions] == ["poor", "rich", "---"]
    poor, rich = (completion_stats(judged.questions) for judged in article.completions[:2])
    assert (poor["baseline_mean"], poor["adapter_mean"]) == (0.5, 0.0)
    assert (rich["adapter_mean"], rich["ungraded"]) == (1.0, 1)
    assert result.model == "model"
    assert result.eval_times == 2
    assert [row["completion"] for row in select(result)] == ["rich"]
    write_result(tmp_path / "result.json", result)
    assert read_result(tmp_path / "result.json") == result
    assert [asked.adapter_correct for asked in article.completions[2].questions] == [False] * 4


def test_request_fields_can_be_added_and_left_out():
    """Newer models refuse max_tokens, and want another name for it."""
    config = KnowledgeConfig(endpoint="http://h/v1", endpoint_model="m", endpoint_fields='{"max_tokens": null, "n": 1}')
    assert config.make_endpoint().fields == {"max_tokens": None, "n": 1}
    for text in ("{", "[1]", "1"):
        with pytest.raises(InputError, match="endpoint_fields"):
            KnowledgeConfig(endpoint_fields=text)
