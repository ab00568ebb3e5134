"""The pages in a headless Chromium, at the widths of a desk and of a telephone, in light and in dark.

Without a browser on this machine these tests are skipped; what the pages consist of is tested elsewhere.
"""

from dataclasses import replace
from pathlib import Path

import pytest
from browser import CHROMIUM, Browser
from toy_runs import CONFIG, ReportDomain, make_run

from seal_engine.domains.knowledge.context_texts import write_contexts
from seal_engine.domains.knowledge.passages import Passage, Question
from seal_engine.loop.ledger import Ledger
from seal_engine.report.compare import compare, write_comparison
from seal_engine.report.page import write_report

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine to look at pages with"),
    pytest.mark.xdist_group("browser"),
]
RESULTS = Path(__file__).parents[2] / "benchmarks/results"
LOOKS = [(width, scheme) for width in (1300, 400) for scheme in ("light", "dark")]
# Every text's contrast with what is behind it by WCAG; texts of less than 4.5 (3 if they are large) are returned.
CONTRASTS = """(() => {
  const parse = colour => { const [r, g, b, a] = colour.match(/[\\d.]+/g).map(Number); return [r, g, b, a ?? 1]; };
  const linear = c => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const luminance = c => 0.2126 * linear(c[0]) + 0.7152 * linear(c[1]) + 0.0722 * linear(c[2]);
  const behind = element => {
    for (let e = element; e; e = e.parentElement) {
      const colour = parse(getComputedStyle(e).backgroundColor);
      if (colour[3] > 0) return colour;
    }
    return [255, 255, 255, 1];
  };
  document.querySelectorAll('details').forEach(fold => fold.open = true);
  const poor = [], texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const element = texts.currentNode.parentElement, style = getComputedStyle(element);
    if (!texts.currentNode.data.trim() || ['SCRIPT', 'title', 'OPTION'].includes(element.tagName)) continue;
    const colour = parse(element instanceof SVGElement ? style.fill : style.color);
    const [low, high] = [luminance(colour), luminance(behind(element))].sort((a, b) => a - b);
    const large = parseFloat(style.fontSize) >= 24;
    if ((high + 0.05) / (low + 0.05) < (large ? 3 : 4.5)) poor.push(texts.currentNode.data.trim().slice(0, 40));
  }
  return [...new Set(poor)];
})()"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


def made(directory, config=CONFIG, domain=None, lines=None):
    """The page of a run whose contexts have passages."""
    make_run(directory, config, domain, lines)
    with Ledger.read(directory) as ledger:
        names = {edit.context for edit in ledger.self_edits()}
    questions = tuple(Question(f"question {i} about a thing?", "right") for i in range(6))
    write_contexts({name: Passage("Ann", f"A good fact about {name}. " * 9, questions) for name in names}, directory)
    return write_report(directory)


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Name -> page."""
    home = tmp_path_factory.mktemp("pages")
    wrong = ReportDomain(5)
    wrong.grade_one = lambda answer: 0.0
    small = replace(CONFIG, contexts=5, seeds=(0, 1))
    found = {
        "finished": made(home / "finished"),
        "mid-run": made(home / "mid-run", small, ReportDomain(5), lines="round 2: mean reward"),
        "all-zero": made(home / "all-zero", small, wrong),
    }
    compared = compare([home / "finished", home / "mid-run"])
    return found | {"comparison": write_comparison(compared, home / "compare.html")}


@pytest.mark.parametrize(("width", "scheme"), LOOKS, ids=lambda value: str(value))
@pytest.mark.parametrize("name", ["finished", "mid-run", "all-zero", "comparison"])
def test_pages_fit_and_can_be_read(browser, pages, name, width, scheme):
    """Nothing is wider than the window but in a box that scrolls; the browser has nothing to complain of."""
    browser.open(pages[name], width, scheme)
    assert browser.evaluate(CONTRASTS) == []  # which opens all folds
    assert browser.evaluate("document.documentElement.scrollWidth") == width
    assert browser.complaints() == []
    paper = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(255, 255, 255)") == (scheme == "light")


@pytest.mark.parametrize("width", [1300, 400])
def test_writing_in_pictures_is_large_enough(browser, pages, width):
    """At least 8 pixels on a telephone, and nothing that is written leaves its picture by more than a letter."""
    browser.open(pages["finished"], width)
    texts = "[...document.querySelectorAll('svg text')]"
    scale = "e.ownerSVGElement.getScreenCTM().a"
    sizes = browser.evaluate(f"{texts}.map(e => parseFloat(getComputedStyle(e).fontSize) * {scale})")
    assert min(sizes) >= 8
    outside = f"""{texts}.filter(e => {{
      const own = e.getBoundingClientRect(), all = e.ownerSVGElement.getBoundingClientRect();
      return own.left < all.left - 8 || own.right > all.right + 8; }}).map(e => e.textContent)"""
    assert browser.evaluate(outside) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("file", sorted(RESULTS.glob("*.svg")), ids=lambda file: file.stem)
def test_pictures_of_readme_are_whole_and_follow_the_theme(browser, file, scheme):
    """As an image at most 830 pixels wide, GitHub's column: no text is cut off, none is smaller than 11 pixels, and
    text and paper have the colours of the scheme: also in a page of the other one, text can be read."""
    browser.open(file, 830, scheme)
    texts = "[...document.querySelectorAll('text')]"
    edges = (
        f"{texts}.filter(e => e.getBBox().x < -1 || e.getBBox().x + e.getBBox().width > svg.viewBox.baseVal.width + 1)"
    )
    assert browser.evaluate(f"(svg => {edges}.map(e => e.textContent))(document.documentElement)") == []
    sizes = f"{texts}.map(e => parseFloat(getComputedStyle(e).fontSize) * e.getScreenCTM().a)"
    assert min(browser.evaluate(sizes)) >= 11
    title = browser.evaluate("getComputedStyle(document.querySelector('text.bold')).fill")
    paper = browser.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    on_paper = {"light": ("rgb(27, 31, 36)", "rgb(255, 255, 255)"), "dark": ("rgb(230, 237, 243)", "rgb(18, 22, 28)")}
    assert (title, paper) == on_paper[scheme]


def test_findings_are_said(browser, pages):
    """By the first line: what was learned, that it is only so far, or that nothing was."""
    said = {}
    for name in pages:
        browser.open(pages[name], 1300)
        said[name] = browser.evaluate("document.querySelector('h1').textContent")
    assert said["finished"].startswith("Reward taught the writer: ")
    assert said["mid-run"].endswith(" so far")
    assert said["all-zero"].startswith("Nothing was learned: all ")


def test_the_worst_self_edit_of_a_round_is_found(browser, pages):
    """By order, by words and by rewards; without the script the filter is not there, and all self-edits are."""
    browser.open(pages["finished"], 1300)
    rewards = "[...document.querySelector('.edits').children].filter(e => !e.hidden).map(e => +e.dataset.reward)"
    whole = browser.evaluate(rewards)
    assert whole == sorted(whole, reverse=True)

    def choose(name, value):
        chosen = f"document.querySelector('#filter [name={name}]')"
        browser.evaluate(f"{chosen}.value = {value!r}; {chosen}.dispatchEvent(new Event('input', {{bubbles: true}}))")

    choose("order", "lowest")
    assert browser.evaluate(rewards) == sorted(whole)
    choose("least", "30")
    choose("most", "50")
    between = browser.evaluate(rewards)
    assert between == sorted(reward for reward in whole if 30 <= reward <= 50)
    assert 0 < len(between) < len(whole)
    count = browser.evaluate("document.querySelector('.edits').parentElement.querySelector('.count').textContent")
    assert count == f", {len(between)} shown"
    choose("least", "")
    choose("most", "")
    choose("words", "TRAIN 7: history")
    assert browser.evaluate(rewards) == sorted(browser.evaluate(rewards))
    shown = browser.evaluate("[...document.querySelectorAll('.edit:not([hidden]) summary')].map(e => e.textContent)")
    assert shown
    assert all("train 7: History" in text for text in shown)
    browser.call("Emulation.setScriptExecutionDisabled", value=True)
    browser.open(pages["finished"], 1300)
    browser.call("Emulation.setScriptExecutionDisabled", value=False)
    assert browser.evaluate("document.getElementById('filter').hidden")
    assert browser.evaluate(rewards) == whole


def test_a_dot_leads_to_its_self_edit(browser, pages):
    """The folds around it open by themselves, as browsers do where a link leads into one."""
    browser.open(pages["finished"], 1300)
    link = "document.querySelector('svg a')"
    anchor = browser.evaluate(f"{link}.getAttribute('href')")
    hover = browser.evaluate(f"{link}.textContent")
    browser.evaluate(f"location.hash = '{anchor}'")
    place = f"document.querySelector('{anchor}')"
    assert browser.evaluate(f"{place}.checkVisibility()")
    assert browser.evaluate(f"{place}.parentElement.dataset.context") in hover
