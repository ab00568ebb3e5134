"""The round's trace and its replay; the verb `bench`, on a checkout made up for it."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import bench_profile
import bench_sample
import bench_seal_round
import plot
import seal_round
from greedy import check_answers
from seal_engine import Engine, SamplingParams
from seal_engine.cli import bench as verbs_bench
from seal_engine.cli.main import main
from seal_kernels.linear import frozen_linear
from seal_kernels.packed import allow_packing
from shapes import SHAPES, random_model

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PUBLISHED = Path(__file__).parents[2].parent / "shared/data/seal/rank_iter0.json"
TRACE, SHIPPED = seal_round.read_trace(), seal_round.TRACE


# The trace


def test_the_trace_is_the_published_round():
    edits = [own for passage in TRACE for own in passage.sequences]
    assert (len(TRACE), len(edits)) == (50, 250)
    assert sum(map(len, edits)) / 250 == pytest.approx(8.7, abs=0.05)
    assert sum(map(sum, edits)) / 250 == pytest.approx(430, rel=0.01)
    assert sum(passage.training_tokens for passage in TRACE) == pytest.approx(3.2e6, rel=0.01)


def test_the_trace_holds_together():
    assert seal_round.TRACE.stat().st_size < 100_000
    for p in TRACE:
        numbers = [p.prompt, p.passage, *p.completions, *p.questions, *(n for own in p.sequences for n in own)]
        assert all(type(n) is int and n >= 1 for n in numbers)
        assert len(p.completions) == len(p.sequences) == 5
        assert 0 <= p.kept < 5
        assert p.questions
        assert {own[-1] for own in p.sequences} == {p.sequences[0][-1]}, "the passage is the last of each"
        assert p.passage <= p.sequences[0][-1] < p.passage + 20, "with its title"
        assert p.prompt > p.passage


@pytest.mark.skipif(not PUBLISHED.exists(), reason="the published file is not on this machine")
def test_the_trace_can_be_made_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(seal_round, "TRACE", tmp_path / "trace.json")
    seal_round.main([str(PUBLISHED)])
    assert (tmp_path / "trace.json").read_text() == SHIPPED.read_text()
    assert "750 inner loops: 3204390 tokens" in capsys.readouterr().out


def test_some_passages_stand_for_all():
    assert sorted(TRACE, key=id) == sorted(seal_round.typical(TRACE, 50), key=id)
    mean = sum(p.training_tokens for p in TRACE) / 50
    for count in (1, 5, 10):
        chosen = seal_round.typical(TRACE, count)
        assert len(chosen) == count
        assert sum(p.training_tokens for p in chosen) / count == pytest.approx(mean, rel=0.1)


# The replay


def small() -> list[seal_round.Lengths]:
    return [
        seal_round.Lengths(10, 5, [3, 7], [[6, 4], [9]], [5, 6, 2], 1),
        seal_round.Lengths(8, 5, [2], [[5]], [3], 0),
    ]


def test_lengths_are_cut_to_the_models():
    config = Engine(random_model("2m", torch.float32, torch.device("cpu"))).config
    (passage,) = bench_seal_round.draw([seal_round.Lengths(900, 5, [2000], [[3000]], [5000], 0)], config)
    assert len(passage.prompt) + passage.completions[0] == 1024
    assert (len(passage.self_edits[0][0]), len(passage.questions[0])) == (1024, 1024 - bench_seal_round.ANSWER)
    assert len(passage.kept.token_ids) == 1024


def test_a_round_runs_and_costs_what_it_must():
    """3 self-edits, 9 adapters; FLOPs and bytes worked out by hand."""
    engine = Engine(random_model("miniature", torch.float32, torch.device("cpu")))
    work = bench_seal_round.draw(small(), engine.config)
    replay = bench_seal_round.Round(engine, work, epochs=1, answer=4)
    for part in bench_seal_round.PARTS:
        getattr(replay, part)()
    assert [passage for passage, _ in replay.owned()] == [work[0]] * 6 + [work[1]] * 3
    assert engine.model.version == 1, "the policy's update is merged"

    body, head, inner = 4 * 128 * (4 * 128 + 3 * 352), 1280 * 128, 4 * 2 * 32 * 256
    policy = 4 * 64 * (4 * 256 + 3 * (128 + 352))
    weights, kv = 4 * (body + head), 2 * 4 * 128 * 4
    assert bench_seal_round.costs(engine, work) == {
        "sampling": (2 * (body * (18 + 9) + head * 12), weights * 7 + kv * (10 * 7 + 4 + 24 + 8 * 2 + 2)),
        "training": (4 * (body * 720 + head * (720 - 120)), 2 * weights * 20 + 52 * inner * 120),
        "asking": (
            2 * (body * (6 * 13 + 3 * 3 + 21 * 63) + head * 21 * 64),
            64 * (weights + 9 * 4 * inner) + kv * (64 * 87 + 21 * 2048),
        ),
        "updating": (4 * 2 * (body * (17 + 10) + head * 9), 2 * (2 * weights + 52 * policy) + 8 * body),
    }


@pytest.mark.parametrize("times", [1, 2])
def test_pictures_claim_what_the_record_says(times, monkeypatch):
    """A round of 780 s, and 1,812 with PEFT: 13.0 and 30.2 minutes; with all seconds doubled, 26 and 60."""
    rows, machine = plot.read("bench_seal_round_cpu")
    rounds = {"seal_engine": 780 * times, "peft, one at a time": 1812 * times}
    changed = [
        row | {"seconds": rounds[row["who"]]} if row["part"] == "round" and row["who"] in rounds else row
        for row in rows
    ]
    monkeypatch.setattr(plot, "read", lambda name: (changed, machine))
    claim = f"A round takes {13 * times} minutes where PEFT takes {30 * times}, one adapter at a time"
    assert claim in plot.seal_round()


def test_a_packed_product_is_no_time_of_the_host():
    """Its operation has another name space than torch's other ones: all of it would seem to be Python's."""
    weight, x = torch.randn(2048, 2048), torch.randn(256, 2048)
    allow_packing(weight)
    frozen_linear(x, weight)
    assert bench_seal_round.host_share(lambda: [frozen_linear(x, weight) for _ in range(20)]) < 0.5


@pytest.mark.parametrize(
    ("name", "shapes", "rank", "kind"),
    [
        ("mkldnn::_linear_pointwise", [[1554, 896], [], [], []], 32, "products"),
        ("aten::mm", [[32, 896], [896, 8192]], None, "products"),
        ("aten::addmm_", [[48, 896], [48, 32], [32, 896], []], 32, "low-rank products"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", [[1, 14, 48, 64]] * 3, None, "attention"),
        ("aten::fill_", [[896, 32], []], 32, "zeroing"),
        ("aten::linalg_vector_norm", [[1554, 896]], 32, "norms"),
        ("aten::_fused_adamw_", [[]], 32, "optimizer"),
        ("aten::silu", [[32, 4864]], 32, "all else"),
    ],
)
def test_what_an_operation_is_for(name, shapes, rank, kind):
    assert bench_profile.kind_of(name, shapes, rank) == kind


def test_every_shape_is_a_model():
    for name in SHAPES:
        assert bench_seal_round.ModelConfig.from_dict(SHAPES[name], name).num_matrix_parameters > 0


# The check of greedy answers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("adapted", [False, True], ids=["base", "adapters"])
def test_one_wrong_token_fails_the_check_of_greedy_answers(tmp_path, dtype, adapted):
    """Ours pass; so they do not with the token after the most likely one, or with another adapter's answers."""
    engine = Engine(random_model("2m", dtype, torch.device("cpu")))
    prompts = torch.randint(1024, (8, 6), generator=torch.Generator().manual_seed(0)).tolist()
    adapters = bench_sample.make_adapters(engine, 2) if adapted else []
    owners = [adapters[i % 2] if adapted else None for i in range(8)]
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    ours = [out.outputs[0].token_ids for out in engine.generate(prompts, params, owners, progress=False)]
    model = bench_sample.Padded(engine, adapters, tmp_path).model
    dtypes = [parameter.dtype for parameter in model.parameters()]

    def check(answers, theirs=ours):
        use_adapter = lambda i: model.set_adapter(str(i % 2)) if adapted else None  # noqa: E731
        check_answers(model, prompts, answers, theirs, least=1.0, use_adapter=use_adapter)

    check(ours)
    assert [parameter.dtype for parameter in model.parameters()] == dtypes
    wrong = [list(answer) for answer in ours]
    wrong[5][7] = (wrong[5][7] + 1) % 1024
    with pytest.raises(AssertionError, match=r"answer 5|7 of 8"):
        check(wrong)
    if adapted:
        with pytest.raises(AssertionError, match=r"answer 0|of 8"):
            check([*ours[1:], ours[0]])
    with pytest.raises(AssertionError, match=r"other lengths|7 of 8"):
        check([*ours[:7], ours[7][:4]])


# The verb

FILES = {
    "pyproject.toml": '[tool.pytest.ini_options]\npython_files = ["test_*.py", "bench_*.py"]\npythonpath = ["."]\n'
    'addopts = "-p no:xdist -p no:hypothesispytest -p no:benchmark"\n',
    "seal_engine/__init__.py": "MS = 8.0\nGOOD = True\n",
    "kernels/seal_kernels/__init__.py": "",
    "benchmarks/measure.py": """
import json
from types import SimpleNamespace
DEVICE = SimpleNamespace(type="cpu")
def table(rows):
    return str([list(row.values()) for row in rows])
def report(name, rows, directory):
    result = {"benchmark": name, "machine": {"device": "a CPU"}, "rows": rows}
    if directory is not None:
        (directory / f"{name}.json").write_text(json.dumps(result))
    return ""
""",
    "benchmarks/shapes.py": "SHAPES = {'small': {}, 'large': {}}\n",
    "benchmarks/bench_toy.py": """
from pathlib import Path
import pytest
import seal_engine
@pytest.mark.parametrize("shape", ["small"])
def test_toy(record, shape):
    with Path("turns").open("a") as file:
        file.write(f"{seal_engine.MS:g}")
    for size in (1, 2):
        record(shape=shape, size=size, who="ours", ms=size * seal_engine.MS)
    record(shape=shape, who="ours, by the second", tokens_per_s=8 / seal_engine.MS)
    record(shape=shape, who="nothing measured")
""",
    "benchmarks/bench_untested.py": "",
    "tests/test_toy.py": "import seal_engine\ndef test_toy():\n    assert seal_engine.GOOD\n",
}


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A repository with one benchmark, whose package then became four times faster."""
    root = tmp_path / "a checkout"
    for name, text in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    shutil.copy(BENCHMARKS / "conftest.py", root / "benchmarks")
    git(root, "init", "-q")
    git(root, "add", "-A")
    git(root, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "--no-verify", "-m", "slow")
    (root / "seal_engine/__init__.py").write_text("MS = 2.0\nGOOD = True\n")
    monkeypatch.setattr(verbs_bench, "ROOT", root)
    return root


def git(root, *arguments):
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_the_machine_the_table_and_a_line_of_json(checkout, tmp_path, capsys):
    assert main(["bench", "toy", "--record", str(tmp_path / "new" / "kept")]) == 0
    machine, table, line = capsys.readouterr().out.splitlines()
    assert machine == "bench_toy_cpu: a CPU"
    assert table.startswith("[['small', 1, 'ours', 2.0], ['small', 2, 'ours', 4.0]")
    (result,) = json.loads(line)["benchmarks"]
    assert result == json.loads((tmp_path / "new/kept/bench_toy_cpu.json").read_text())


def test_two_revisions(checkout, capsys):
    """Rows alike in their texts are told apart by their order; what was not measured is left out."""
    assert main(["bench", "toy", "--compare", "HEAD", "--json"]) == 0
    (result,) = json.loads(capsys.readouterr().out)["benchmarks"]
    assert result["compared_with"] == git(checkout, "rev-parse", "HEAD")[0]
    assert [list(row.values()) for row in result["rows"]] == [
        ["small", 1, "ours", 8.0, 2.0, 4.0],
        ["small", 2, "ours", 16.0, 4.0, 4.0],
        ["small", "ours, by the second", 1.0, 4.0, 4.0],
    ]
    assert (checkout / "turns").read_text() == "8228"
    assert list(result["rows"][0]) == ["shape", "size", "who", "ms, HEAD", "ms, here", "times_faster"]
    assert len(git(checkout, "worktree", "list")) == 1


def test_a_worktree_goes_when_interrupted(checkout):
    trees = []

    def interrupted():
        with verbs_bench.worktree("HEAD") as tree:
            trees.append((tree, (tree / "benchmarks/bench_toy.py").exists()))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    ((tree, was_there),) = trees
    assert was_there
    assert not tree.exists()
    assert len(git(checkout, "worktree", "list")) == 1


def test_nothing_is_measured_when_tests_fail(checkout, capsys):
    (checkout / "seal_engine/__init__.py").write_text("MS = 2.0\nGOOD = False\n")
    assert main(["bench", "toy"]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("seal-engine: nothing is measured, as tests fail: FAILED tests/test_toy.py::test_toy")
    assert printed.err.count("\n") == 1


def test_other_packages_than_those_asked_for_are_refused(checkout, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(verbs_bench.InputError, match=r"--tree .*elsewhere: seal_engine is imported from"):
        verbs_bench.measure("toy", [], tmp_path / "elsewhere", tmp_path)


MISTAKES = {
    "benchmark": (["fly"], "bench: found 'fly'; accepted: one of ['toy', 'untested']"),
    "no tests": (["untested"], "bench untested: found 'no tests'; accepted: test_untested.py in tests"),
    "passages": (["toy", "--passages", "0"], "--passages: found 0; accepted: an integer >= 1"),
    "record": (["toy", "--record", __file__], f"--record: found {__file__!r}; accepted: a directory"),
    "revision": (["toy", "--compare", "--all"], "--all: unknown flag"),
    "no revision": (["toy", "--compare", "v9"], "--compare: found 'v9'; accepted: a git revision of"),
    "shape": (["toy", "--shape", "huge"], "bench toy: --shape: found 'huge'; accepted: one of ['large', 'small']"),
    "no case": (["toy", "--shape", "large"], "bench toy: found no case with --shape=large"),
}


@pytest.mark.parametrize("label", MISTAKES)
def test_mistakes(checkout, label, capsys):
    arguments, message = MISTAKES[label]
    assert main(["bench", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"seal-engine: {message}")
    assert printed.err.count("\n") == 1


def test_it_needs_a_checkout(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(verbs_bench, "ROOT", tmp_path)
    assert main(["bench"]) == 2
    assert "accepted: a checkout of the repository" in capsys.readouterr().err


def test_every_benchmark_of_the_repository_has_its_tests():
    """They run before anything is measured; a benchmark whose tests moved once could not be run at all."""
    for file in sorted(BENCHMARKS.glob("bench_*.py")):
        for test in verbs_bench.tests_of(file.stem.removeprefix("bench_")):
            assert (BENCHMARKS.parent / test).is_file()
