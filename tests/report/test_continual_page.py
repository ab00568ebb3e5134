"""The page, table and pictures of the continual experiment, from a result that is written by hand."""

from types import SimpleNamespace

from seal_engine.loop.continual_results import ContinualResult, MethodResult, interval, table
from seal_engine.report.continual_page import continual_page
from seal_engine.report.continual_plots import draw_continual

MATRIX = [[0.0, 0.2], [0.8, None], [0.4, 0.6]]


def method(name, **fields):
    values = dict(
        name=name, matrices=[MATRIX, MATRIX], learned=0.7, kept=0.5, transfer=-0.4, ages=[0.6, 0.4],
        over_merge=(0.25, 0.1, 0.4), over_joint=None, probes={"reading": 1.0, "knowledge": 0.5, "writing": None},
        kl=0.125, routing={}, tokens=300, bytes_kept=2048.0, factor=1.0,
    )  # fmt: skip
    return MethodResult(**values | fields)


UNTRAINED = {"accuracy": 0.1, "reading": 1.0, "knowledge": 1.0, "writing": 0.5}
RESULT = ContinualResult(
    [method("merge", tokens=200), method("bank", routing={"routed": 0.75})], UNTRAINED, 2, 2, 8,
    {"training": 40.0, "everything": 61.0}, {"training": None, "everything": 90.0},
)  # fmt: skip


CONFIG = {"seeds": [0], "methods": ["merge", "bank"]}
LEDGER = SimpleNamespace(started="2026-11-25T12:00:00.000+00:00", config=CONFIG)


def test_the_table_has_percent_and_multiples_of_merge():
    lines = table(RESULT).splitlines()
    assert lines[1].split() == ["untrained", "10.0", "100.0", "100.0", "50.0", "0"]
    assert lines[2].split()[:4] == ["merge", "70.0", "50.0", "-40.0"]
    assert lines[3].split()[-3:] == ["50.0", "0.125", "1.50x"]
    assert lines[4] == "bank: routed: 75.0"
    assert interval((0.25, 0.1, 0.4)) == "+25.0 (+10.0 to +40.0)"
    assert interval(None) == ""


def test_the_page_shows_measures_and_probes():
    page = continual_page(LEDGER, RESULT, {}, "<p>settings</p>")
    for shown in ("+25.0 (+10.0 to +40.0)", "routed 75.0", "0.125", "<p>settings</p>"):
        assert shown in page
    assert "the untrained model has 10.0" in page
    assert "<h1>After 2 edits merge keeps 50%</h1>" in page


def test_cpu_time_stands_beside_wall_time():
    """61 seconds of the clock in which this process used 90 of its cores'; a run of an earlier version has none."""
    page = continual_page(LEDGER, RESULT, {}, "")
    assert '<td>training</td><td class="n">40 s</td><td class="n">-</td>' in page
    assert '<td>everything</td><td class="n">1 min 1 s</td><td class="n">1 min 30 s</td>' in page


def test_pictures_have_their_values_on_hover_and_change_with_what_they_show():
    """A single scale of colour: a matrix twice as high has another picture."""
    first, again = draw_continual(RESULT.methods), draw_continual(RESULT.methods)
    assert first == again
    assert set(first) == {"forgetting", "age", "cost"}
    for name, hover in (
        ("forgetting", "merge, passage 1, after 1 edits: 80%"),
        ("forgetting", "bank, passage 2, untrained: 20%"),
        ("age", "merge, 1 edits since: +40.0 points"),
    ):
        assert f"<title>{hover}</title>" in first[name]
    assert ">0.2</text>" in first["cost"]
    assert ">0.3</text>" in first["cost"]
    half = [[None if cell is None else cell / 2 for cell in row] for row in MATRIX]
    other = draw_continual([method("merge", matrices=[half])])
    assert other["forgetting"] != first["forgetting"]
    page = continual_page(LEDGER, RESULT, first, "")
    assert page.count("<svg") == 3


def test_a_run_without_a_measured_step_has_no_pictures():
    assert draw_continual([method("merge", kept=None)]) == {}
