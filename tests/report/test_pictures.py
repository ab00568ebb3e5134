"""The pictures of a report: SVG whose structure says what it shows, with values on hover and colours of the theme."""

import re
from xml.etree import ElementTree

import pytest

from seal_engine.report import plots
from seal_engine.report.data import Pairs
from seal_engine.svg import STYLE, THEME, axis_step, num_shared_words, spread, standalone

SVG = "{http://www.w3.org/2000/svg}"
WHOLE = {"self-edits": {0: {0: 0.2, 1: 0.4}, 1: {0: 0.5, 1: 0.7}}}
BASELINES = {"no adapter": {0: 0.1, 1: 0.1}}
SEEDS = {"self-edits": 2, "no adapter": 2}


def parsed(svg):
    """The picture's elements; it is well-formed XML."""
    return list(ElementTree.fromstring(standalone(svg)).iter())


def lines_of(svg):
    """What is written in the picture, without what is shown on hover."""
    return [(e.text or "") + "".join(child.tail or "" for child in e) for e in parsed(svg) if e.tag == f"{SVG}text"]


def dots(svg, look):
    """Hover texts of the circles with these classes."""
    found = [e for e in parsed(svg) if e.tag == f"{SVG}circle" and set(look.split()) <= set(e.get("class").split())]
    return [e.findtext(f"{SVG}title") for e in found]


def test_accuracy_has_its_values_at_points_and_on_hover():
    svg = plots.accuracy(WHOLE, BASELINES, SEEDS)
    texts = lines_of(svg)
    for shown in ("30.0", "60.0", "60.0 self-edits", "10.0 no adapter", "before", "round 1"):
        assert shown in texts
    assert dots(svg, "f-blue line") == [
        "before any round: 30.0%, mean of 2 seeds, sd 14.1", "after round 1: 60.0%, mean of 2 seeds, sd 14.1",
    ]  # fmt: skip
    assert "seed 1, after round 1: 70.0%" in dots(svg, "f-blue")
    assert not dots(svg, "f-paper")
    assert 'aria-label="Accuracy on held-out contexts by round, in percent: self-edits: 30.0%, 60.0%' in svg


def test_a_mean_over_fewer_seeds_than_there_will_be_is_hollow_and_its_line_dashed():
    """Two of three seeds have finished round 1, all three have been measured before."""
    partial = {"self-edits": {0: {0: 0.2, 1: 0.4, 2: 0.3}, 1: {0: 0.5, 1: 0.7}}}
    svg = plots.accuracy(partial, {}, {"self-edits": 3})
    assert dots(svg, "f-paper s-blue") == ["after round 1: 60.0%, of 2 of 3 seeds so far"]
    assert dots(svg, "f-blue line") == ["before any round: 30.0%, mean of 3 seeds, sd 10.0"]
    assert any("s-blue dash" in (e.get("class") or "") for e in parsed(svg))
    assert not any("s-blue dash" in (e.get("class") or "") for e in parsed(plots.accuracy(WHOLE, {}, SEEDS)))


@pytest.mark.parametrize("highest", ["self-edits", "rewards shuffled"])
def test_values_stand_on_the_side_where_their_line_is(highest):
    """The line that ends highest has its values above its points, the other one below, whichever is drawn first."""
    ends = {"self-edits": 0.4, "rewards shuffled": 0.4} | {highest: 0.5}
    written = {name: {0: {0: 0.2}, 1: {0: end}} for name, end in ends.items()}
    svg = plots.accuracy(written, {}, dict.fromkeys(written, 1))
    values = {e.text: float(e.get("y")) for e in parsed(svg) if e.tag == f"{SVG}text" and e.text in ("50.0", "40.0")}
    points = sorted(float(e.get("cy")) for e in parsed(svg) if e.tag == f"{SVG}circle")
    assert values["50.0"] < points[0] < points[1] < values["40.0"]


def test_contexts_are_better_worse_or_the_same():
    pairs = Pairs(2, [0], {"held out a": 0.2, "held out b": 0.6, "held out c": 0.5},
                  {"held out a": 0.8, "held out b": 0.4, "held out c": 0.5}, 0)  # fmt: skip
    svg = plots.contexts(pairs)
    texts = lines_of(svg)
    assert {"1 better", "1 worse", "1 the same", "a", "b", "c"} <= set(texts)  # without what all names begin with
    assert dots(svg, "f-blue") == ["held out a: 20.0% to 80.0%"]
    assert dots(svg, "f-orange") == ["held out b: 60.0% to 40.0%"]


def test_time_has_the_seconds_of_every_part():
    seconds = {"round 1": {"writing": 30.0, "training and asking": 90.0, "policy update": 0.0, "the rest": 0.0}}
    svg = plots.time(seconds, {"round 1": None})
    hovers = [e.findtext(f"{SVG}title") for e in parsed(svg) if e.tag == f"{SVG}rect"]
    assert [hover for hover in hovers if hover] == [
        "round 1, writing: 0.5 minutes", "round 1, training and asking: 1.5 minutes",
    ]  # fmt: skip
    svg = plots.time(seconds, {"round 1": 180.0})
    assert "round 1: 3 minutes of CPU time" in [e.findtext(f"{SVG}title") for e in parsed(svg)]
    assert "CPU time of this process, 1.5 cores on average" in lines_of(svg)


def test_losses_go_through_medians():
    """Of three curves of lengths 2, 2 and 1: medians 3 and 2 (the short one is stretched); panels have their own scale,
    so the adapters' spread does not flatten the policy's line."""
    svg = plots.losses({"round 1": [(9.0, 1.0), (3.0, 2.0), (2.5,)]}, {"round 1": [(0.3, 0.2)]})
    hovers = [e.findtext(f"{SVG}title") for e in parsed(svg) if e.tag == f"{SVG}polyline"]
    assert hovers == ["round 1: 3 to 2, median of 3", "round 1: 0.3 to 0.2, median of 1"]
    texts = lines_of(svg)
    assert {"2.00 round 1", "0.20 round 1", "8", "0.3"} <= set(texts)


def test_losses_of_a_round_that_goes_on_are_dashed():
    """Its median is of fewer adapters than there will be; the round before has all of them."""
    adapters = {"round 1": [(9.0, 1.0)], "round 2": [(9.0, 2.0)]}
    svg = plots.losses(adapters, {"round 1": [(0.3, 0.2)]}, ["round 2"])
    dashed = [e for e in parsed(svg) if e.tag == f"{SVG}polyline" and "dash" in e.get("class")]
    assert [e.findtext(f"{SVG}title") for e in dashed] == ["round 2: 9 to 2, median of 1 so far"]


def contrast(one, other):
    """WCAG's contrast ratio of two colours."""

    def luminance(colour):
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_colours_can_be_told_from_what_they_stand_on(scheme):
    """WCAG AA: 4.5 for text, on paper and on what lies behind texts; 3 for marks. Every colour has both themes."""
    themes = [dict(re.findall(r"--([\w-]+): (#\w{6})", part)) for part in THEME.split("@media")]
    assert themes[0].keys() == themes[1].keys() == set(re.findall(r"var\(--([\w-]+)\)", STYLE)) | {"wash", "mark"}
    theme = themes[scheme]
    for behind in ("paper", "wash"):
        for text in ("ink", "muted", "blue", "orange", "gold-text"):
            assert contrast(theme[text], theme[behind]) >= 4.5, (text, behind)
    assert contrast(theme["ink"], theme["mark"]) >= 4.5
    for mark in ("blue", "orange", "gold", "grey"):
        assert contrast(theme[mark], theme["paper"]) >= 3, mark


def test_colours_are_the_theme_s_alone():
    """Whoever shows the picture may be in dark: a fixed colour would be a slab there."""
    shown = [plots.accuracy(WHOLE, BASELINES, SEEDS), plots.contexts(Pairs(1, [0], {"a": 0.2}, {"a": 0.8}, 0))]
    for svg in [*shown, plots.losses({"round 1": [(0.3, 0.2)]}, {})]:
        assert not re.search(r"#[0-9a-fA-F]{3,6}\b|rgb|white|black", svg)


def test_names_that_would_overlap_are_moved_apart():
    assert spread([10, 11, 50], 5, 0, 100) == [10, 15, 50]
    assert spread([98, 99], 5, 0, 100) == [95, 100]
    assert spread([], 5, 0, 100) == []


def test_axes_have_round_steps():
    assert [axis_step(largest) for largest in (100, 60, 7, 0.3)] == [20, 10, 2, 0.05]


def test_words_that_all_names_begin_with():
    assert num_shared_words(["held out 1 Ann", "held out 2 Ann"]) == 2
    assert num_shared_words(["held out", "held out"]) == 1
    assert num_shared_words(["a", "b"]) == 0
