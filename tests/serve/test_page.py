"""The page, in a browser that runs its script, and the numbers for Prometheus."""

import re
import shutil
import subprocess

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from seal_cases import Driver
from serving import running

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def rendered(url, profile):
    """The page's DOM after two seconds of its script."""
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}", "--dump-dom"]
    done = subprocess.run(
        [*command, "--virtual-time-budget=2500", url], capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout


@pytest.mark.skipif(BROWSER is None, reason="there is no chromium on this machine")
def test_the_page_shows_what_runs(server, tmp_path):
    """Model, adapters with rank, targets, version and bytes, counters with their rates; and no error."""
    httpx.post(f"{server.url}/v1/completions", json={"model": "ann", "prompt": "A", "max_tokens": 5})
    dom = rendered(server.url, tmp_path)
    text = re.sub(r"<[^>]+>", "|", re.sub(r"<script>.*</script>|<style>.*</style>", "", dom, flags=re.DOTALL))
    assert server.service.names.base_names[0] in text
    assert "accepting requests on cpu" in text
    for name, served in server.service.names.served.items():
        config = served.adapter.config
        row = f"|{name}||{config.r}||all-linear||{served.adapter.version}||{served.adapter.nbytes:,}|"
        assert row in text
    sampled = server.service.worker.sampler.tokens_done
    assert re.search(rf"\|tokens sampled\|\|{sampled:,}\|\|\d+\|", text)  # the rate: since the first look


@pytest.mark.skipif(BROWSER is None, reason="there is no chromium on this machine")
def test_names_are_text_on_the_page(engine, adapters, tmp_path):
    """An adapter's name is a client's: as markup it would be a script in the browser of whoever looks."""
    _, directory = adapters["ann"]
    with running(engine, "--adapter", f"<img onerror>={directory}") as server:
        dom = rendered(server.url, tmp_path)
    assert "&lt;img onerror" in dom
    assert "<img" not in dom


def test_the_numbers(engine):
    """/stats and /metrics say the same, and what was done."""
    with running(engine, "--seal-port", "0") as server:
        body = {"prompt": "What does Ann collect? " * 8, "max_tokens": 4, "ignore_eos": True}
        for _ in range(2):
            httpx.post(f"{server.url}/v1/completions", json=body)
        driver = Driver(server.seal.port, 60)
        driver.ask(
            {"train_sequences": ["A b c"], "eval_questions": [{"question": "A?", "answer": "b"}], "finetune_epochs": 2}
        )  # fmt: skip
        driver.close()
        stats = httpx.get(f"{server.url}/stats").json()
        counts = stats["counts"]
        sampler, trainer = server.service.worker.sampler, server.service.worker.trainer
        assert trainer is not None
        assert counts["sampled_tokens"] == sampler.tokens_done > 8
        assert counts["trained_tokens"] == trainer.tokens_done == 2 * len(engine.tokenizer.encode("A b c"))
        assert counts["reused_tokens"] >= 16  # the second prompt's full blocks
        assert counts["requests_open"] == counts["jobs_open"] == counts["cache_blocks_in_use"] == 0
        assert counts["training_passes"] == 2
        assert 0 < stats["step_seconds"]["p50"] <= stats["step_seconds"]["p95"]
        assert stats["seal_requests"] == []
        metrics = httpx.get(f"{server.url}/metrics").text
    values = {
        sample.name: sample.value
        for family in text_string_to_metric_families(metrics)
        for sample in family.samples
        if not sample.labels
    }
    for name in ("sampled_tokens", "computed_tokens", "reused_tokens", "trained_tokens", "training_passes"):
        assert values[f"seal_engine_{name}_total"] == counts[name]
    for name in ("requests_open", "jobs_open", "cache_blocks", "adapters"):
        assert values[f"seal_engine_{name}"] == counts[name]
