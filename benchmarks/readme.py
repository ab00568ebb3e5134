"""Figures of README.md and docs/benchmarks.md, from recorded results: python benchmarks/readme.py writes them anew.

A block between `<!-- NAME -->` and `<!-- end -->` is the text of the function NAME. Outside of blocks the pages have no
measured figures. A test holds both.
"""

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from readme_forgetting import (
    forgetting,
    forgetting_by_age,
    forgetting_long,
    forgetting_routing,
    forgetting_short,
    forgetting_system,
)
from readme_gpu import forecast_round, h100_graphs, h100_kernels, h100_round, h100_scaling
from readme_sampling import busy_core, decode, profile, sample
from readme_tinker import tinker, tinker_recipes
from tables import DETAILS, ROOT, SEEDS, Row, percent, pick, prose, rate, read, source, table

BLOCK = re.compile(r"<!-- (?P<name>[a-z0-9_]+) -->\n(?P<text>.*?)<!-- end -->\n", re.DOTALL)


def demo(name: str, task: str, last: str) -> str:
    """Accuracy of every method in a demo; the last line in bold."""
    rows, machine = read(name)
    own = [row for row in rows if row["task"] == task and row["rewards"] == "own"]
    whole = pick(own, method="the whole run")
    lines = []
    for row in own:
        if row is not whole:
            cells = [row["method"], percent(row["accuracy"]), percent(row["sd"])]
            lines.append([f"**{cell}**" for cell in cells[:2]] + cells[2:] if row["method"] == last else cells)
    blind = pick(rows, task=task, rewards="shuffled", method=last)
    text = (
        f"Three seeds, mean and standard deviation: {whole['adapters']:,} inner loops on {whole['tokens']:,} tokens, "
        f"and the rest, in {whole['seconds']:.0f} s on two cores. With rewards shuffled among self-edits it ends at "
        f"{percent(blind['accuracy'])} (sd {percent(blind['sd'])})."
    )
    return table(("method", "accuracy (%)", "sd"), lines) + prose(text) + source(name, machine)


def demo_knowledge() -> str:
    """The demo."""
    return demo("bench_demo_cpu", "knowledge", "self-edits, after round 2")


def demos() -> str:
    """The demo, and the one with a real language model, side by side."""
    rows, machine = read("bench_demo_cpu")
    real, on = read("bench_demo_real_cpu")
    small, large = ({row["method"]: row for row in own if row["rewards"] == "own"} for own in (rows, real))
    (whole, what), last = (found.pop("the whole run") for found in (small, large)), "self-edits, after round 2"
    names, lines = sorted(dict.fromkeys([*small, *large]), key=lambda name: name.startswith("self-edits")), []
    for name in names:
        cells = [percent(small[name][key]) for key in ("accuracy", "sd")] if name in small else ["", ""]
        cells += [percent(large[name]["accuracy"]), percent(1.96 * large[name]["se"])] if name in large else ["", ""]
        lines.append([f"**{name}**", f"**{cells[0]}**", *cells[1:]] if name == last else [name, *cells])
    blind = pick(rows, rewards="shuffled", method=last)
    text = (
        f"Miniature: mean and sd of three seeds, {whole['adapters']:,} inner loops on {whole['tokens']:,} tokens, and "
        f"the rest, in {whole['seconds']:.0f} s on two cores. With rewards shuffled it ends at "
        f"{percent(blind['accuracy'])} (sd {percent(blind['sd'])}). SmolLM2: {SEEDS[what['seeds']]} seeds, 95% "
        f"intervals over passages, {what['cpu_seconds'] / 60 / what['seeds']:.0f} CPU minutes each; "
        f"{_change(real)}"
    )
    heads = ("method", "miniature (%)", "sd", "SmolLM2-135M (%)", "95%: ±")
    files = "`bench_demo_cpu.json` and `bench_demo_real_cpu.json` of `benchmarks/results`"
    where = ", ".join(dict.fromkeys(own[key] for key in ("device", "date") for own in (machine, on)))
    return table(heads, lines) + prose(text) + prose(f"Recorded in {files} ({where}); commands: {DETAILS}.")


def _change(rows: Sequence[Row]) -> str:
    """What a round with a real language model changes, beside the same with rewards shuffled."""
    own, blind = (pick(rows, rewards=rewards, method="the whole run") for rewards in ("own", "shuffled"))
    interval = "{change_low:+.1f} to {change_high:+.1f}".format
    return (
        f"a round changes it by {own['change']:+.1f} points (95%: {interval(**own)}; rewards shuffled: "
        f"{blind['change']:+.1f}, {interval(**blind)}): {own['conclusion'].rpartition(': ')[2]}"
    )


def demo_few_shot() -> str:
    """The other demo."""
    return demo("bench_demo_few_shot_cpu", "few-shot", "self-edits, after round 3")


def demo_real() -> str:
    """The demo with a real language model."""
    rows, machine = read("bench_demo_real_cpu")
    lines = []
    whole, blind = (pick(rows, rewards=rewards, method="the whole run") for rewards in ("own", "shuffled"))
    for row in rows:
        shuffled = row["rewards"] == "shuffled"
        if row in (whole, blind) or (shuffled and row["method"] != "self-edits, after round 1"):
            continue
        name = f"{row['method']}, rewards shuffled" if shuffled else row["method"]
        each = ", ".join(map(percent, row["accuracies"]))
        cells = [name, percent(row["accuracy"]), percent(1.96 * row["se"]), each]
        lines.append([*cells, f"{row['steps']:.0f}", f"{row['tokens']:,.0f}"])
    text = (
        f"Means of {SEEDS[whole['seeds']]} seeds, intervals over passages (each the mean of its seeds): "
        f"{whole['adapters']:,} inner loops on {whole['tokens']:,} tokens, and the rest, in "
        f"{whole['cpu_seconds']:,.0f} s of CPU time, {whole['seconds']:,.0f} s by the clock."
    )
    heads = ("method", "accuracy (%)", "95%: ±", "of each seed", "steps", "tokens trained on")
    said = "".join(map(prose, (text, whole["conclusion"], blind["conclusion"])))
    return table(heads, lines) + said + source("bench_demo_real_cpu", machine)


def quantization() -> str:
    """What quantised bases lose."""
    rows, machine = read("bench_quantize_cpu")
    lines = []
    for row in (row for row in rows if "weight_error_percent" in row):
        cells = [row["weight_error_percent"], row["logits_error_percent"], row["perplexity_percent"]]
        shown = [f"{cell:.2f}" for cell in (*cells, row["largest_loss_difference_percent"])]
        shown += [f"{row['greedy_tokens_alike_of_32']:.0f}", f"{row['mebibytes']:.0f}", f"{row['planned_to_held']:.3f}"]
        lines.append([row["format"], *shown])
    heads = ("format", "weights: error (%)", "logits: error (%)", "perplexity (%)", "losses from bfloat16's (%)",
             "greedy tokens alike of 32", "MiB", "planned / held")  # fmt: skip
    return table(heads, lines) + source("bench_quantize_cpu", machine)


def quantized_speed() -> str:
    """Tokens a second of quantised bases on a CPU."""
    rows, _ = read("bench_quantize_cpu")
    decoded = [row for row in rows if row.get("what") == "decoding"]
    lines = []
    for name in dict.fromkeys(row["format"] for row in decoded):
        cells = [f"{pick(decoded, format=name, rows=count)['tokens_per_s']:.1f}" for count in (1, 8)]
        trained = [row["tokens_per_s"] for row in rows if row.get("what") == "training" and row["format"] == name]
        lines.append([name, *cells, *map(rate, trained), *[""] * (1 - len(trained))])
    return table(("format", "decoding, 1 row", "8 rows", "training, 8 adapters"), lines)


def model() -> str:
    """Forward and backward beside Transformers."""
    rows, machine = read("bench_model_cpu")
    lines = []
    for dtype in ("float32", "bfloat16"):
        theirs, ours = (pick(rows, dtype=dtype, who=who) for who in ("transformers", "seal_engine"))
        lines.append(
            [dtype, f"{rate(theirs['tokens_per_s'])} tokens/s", f"{rate(ours['tokens_per_s'])} tokens/s",
             f"{ours['times_faster']:.1f}", f"{ours['percent_of_matrix_rate']:.0f}%"]
        )  # fmt: skip
    heads = ("dtype", "Transformers", "seal_engine", "times faster", "share of the matrix rate")
    return table(heads, lines) + source("bench_model_cpu", machine)


def train() -> str:
    """Training beside PEFT, on two CPUs."""
    return "\n".join(map(_train, ("bench_train_cpu", "bench_train_cpu_amx")))


def _train(name: str) -> str:
    rows, machine = read(name)
    lines = []
    for ours in (row for row in rows if row["who"] == "seal_engine"):
        case = {name: ours[name] for name in ("shape", "dtype", "adapters", "rank", "projections")}
        peft, padded = (pick(rows, who=who, **case) for who in ("peft", "peft, padded to 2048"))
        what = "q and v" if case["projections"] == 2 else "seven projections"
        lines.append(
            [f"{case['shape']} {case['dtype']}, {case['adapters']} of rank {case['rank']}, {what}",
             f"{rate(ours['tokens_per_s'])} tokens/s", rate(peft["tokens_per_s"]),
             f"{peft['seal_engine_times_faster']:.1f}", f"{padded['seal_engine_times_faster']:.0f}",
             f"{ours['percent_of_matrix_rate']:.0f}%"]
        )  # fmt: skip
    heads = ("base, adapters", "seal_engine", "PEFT", "times faster", "than PEFT, padded", "share of the matrix rate")
    return table(heads, lines) + source(name, machine, " -k '97m or smollm2'")


def scaling() -> str:
    """Throughput with many adapters, of one adapter's."""
    rows, machine = read("bench_scaling_cpu")
    counts, lines = (8, 64, 128, 256, 512), []
    cases = (("2m", 8, 2), ("2m", 32, 2), ("2m", 8, 7), ("2m", 32, 7), ("97m", 8, 2), ("97m", 32, 7))
    for shape, rank, projections in cases:
        own = [row for row in rows if (row["shape"], row["rank"], row["projections"]) == (shape, rank, projections)]
        found = {row["adapters"]: row["of_one_adapter"] for row in own}
        what = "q and v" if projections == 2 else "seven"
        cells = [f"{found[count]:.2f}" if count in found else "" for count in counts]
        lines.append([f"{shape}, rank {rank}, {what}, {own[0]['tokens_a_step']:,}", *cells])
    heads = ("shape, adapters, tokens a step", *map(str, counts))
    return table(heads, lines) + source("bench_scaling_cpu", machine)


def seal_round() -> str:
    """A round of the published knowledge task, by part."""
    rows, machine = read("bench_seal_round_cpu")
    cases = dict.fromkeys((row["shape"], row["dtype"], row["passages"]) for row in rows)
    lines = []
    for shape, dtype, passages in cases:
        own = [row for row in rows if (row["shape"], row["dtype"], row["passages"]) == (shape, dtype, passages)]
        taken = {row["part"]: row["seconds"] * row["percent_stolen"] for row in own if "percent_stolen" in row}
        taken["round"] = sum(taken.values())
        for part in ("sampling", "training", "asking", "updating", "round"):
            found = {row["who"]: row for row in own if row["part"] == part}
            ours, floor = found["seal_engine"], found["floor"]
            alone, padded = found["peft, one at a time"], found["peft, padded to 2048"]
            many = f"{passages} passage{'s' * (passages > 1)}"
            cells = [
                f"{shape} {dtype}, {many}" if part == "sampling" else "",
                part,
                f"{ours['seconds']:.3g} s",
                f"{taken[part] / ours['seconds']:.0f}%",
                f"{ours['percent_of_floor']:.0f}%" + (f" ({floor['limit']})" if "limit" in floor else ""),
                f"{alone['seal_engine_times_faster']:.1f}",
                f"{padded['seal_engine_times_faster']:.1f}",
            ]
            lines.append([f"**{cell}**" if cell else "" for cell in cells] if part == "round" else cells)
    heads = ("base", "part", "seal_engine", "taken by others", "share of its floor", "times faster than PEFT",
             "than PEFT, padded")  # fmt: skip
    return table(heads, lines) + source("bench_seal_round_cpu", machine)


def few_shot() -> str:
    """The inner loops of the few-shot task beside PEFT."""
    rows, machine = read("bench_few_shot_cpu")
    lines = []
    for ours in (row for row in rows if row["who"] == "seal_engine"):
        bare, trainer = (pick(rows, base=ours["base"], lora=ours["lora"], who=who) for who in ("peft", "peft, Trainer"))
        lines.append(
            [f"{ours['base']}, {ours['lora']} (rank {ours['rank']})", f"{rate(ours['training_tokens_per_s'])} tokens/s",
             f"{bare['training_times_faster']:.1f}", f"{bare['asking_times_faster']:.1f}",
             f"{bare['together_times_faster']:.1f}", f"{trainer['training_times_faster']:.1f}",
             f"{trainer['together_times_faster']:.1f}"]
        )  # fmt: skip
    heads = ("base, adapters", "training", "times faster than PEFT", "in asking", "together", "training, than Trainer",
             "together, than Trainer")  # fmt: skip
    return table(heads, lines) + source("bench_few_shot_cpu", machine)


def speed() -> str:
    """The main comparisons in one small table."""
    rows, machine = read("bench_seal_round_cpu")
    samples, on = read("bench_sample_cpu")
    lines = []
    for shape, dtype in dict.fromkeys((row["shape"], row["dtype"]) for row in rows):
        whole = {r["who"]: r for r in rows if (r["shape"], r["dtype"], r["part"]) == (shape, dtype, "round")}
        factors = [whole[who]["seal_engine_times_faster"] for who in ("peft, one at a time", "peft, padded to 2048")]
        what = f"a round of the knowledge task, 5 passages, {shape} {dtype}"
        lines.append([what, f"{whole['seal_engine']['seconds']:.3g} s", *(f"{factor:.1f}" for factor in factors)])
    ours = pick(samples, shape="97m", requests=256, adapters=32, who="seal_engine")
    faster = f"{ours['than_the_best_of_the_baseline']:.1f}"
    what = f"sampling with 32 adapters in one batch, 97m {ours['dtype']}"
    lines.append([what, f"{rate(ours['tokens_per_s'])} tokens/s", faster, ""])
    on_gpu, gpu = read("bench_seal_round_cuda")
    for part, what in (("training", "150 adapters at once"), ("sampling", "50 completions at once")):
        ours, alone, padded = (row for row in on_gpu if row["part"] == part and row["who"] != "floor")
        factors = [f"{row['seal_engine_times_faster']:.1f}" for row in (alone, padded)]
        line = [f"{part} in a round of 10 passages, {ours['shape']} {ours['dtype']}, {what}", *factors]
        lines.append([line[0] + ", H100", f"{ours['seconds']:.3g} s", *line[1:]])
    scaling, _ = read("bench_scaling_cuda")
    many = pick(scaling, rank=8, adapters=512)
    what = "512 adapters of rank 8 trained at once, qwen2.5-7b bfloat16, 8,192 tokens a pass, H100"
    share = f"{rate(many['tokens_per_s'])} tokens/s: {100 * many['of_one_adapter']:.0f}% of one adapter's"
    lines.append([what, share, "", ""])
    heads = ("two CPU cores; one H100", "seal_engine", "times faster than PEFT", "than PEFT, padded as published")
    files = "`bench_seal_round_*.json` and `bench_sample_cpu.json`"
    where = (f"{own['device'].removesuffix(', 2 threads')}, {own['date']}" for own in (machine, on, gpu))
    where = "; ".join(dict.fromkeys(where))
    return table(heads, lines) + prose(f"Recorded in {files} ({where}); meaning: {DETAILS}.")


def serve() -> str:
    """The server: what HTTP adds, a mixed load, sampling beside training, SEAL's drivers, memory."""
    rows, machine = read("bench_serve_cpu")
    http, load, memory = (pick(rows, what=what) for what in ("completions of 64 tokens", "mixed load", "memory"))
    alone, beside = (row for row in rows if row["what"] == "a token of one of 16 streams")
    lines = [
        [f"{http['requests']} completions of 64 tokens, {http['clients']} clients, beside Engine.generate",
         f"{rate(http['served_tokens_per_s'])} and {rate(http['tokens_per_s'])} tokens/s: "
         f"{http['percent_on_top']:.1f}% more time"],
        ["rows of its steps; more time a request, and all that a server takes which computes nothing",
         f"{http['rows_per_step']:.1f} of {http['clients']}; {http['ms_on_top']:.2f} and {http['canned_ms']:.2f} ms"],
        [f"{load['requests']:,} mixed requests, {load['clients']} clients, adapters loaded and unloaded "
         f"{load['adapters_loaded_meanwhile']} times",
         f"{load['seconds']:.1f} s, {load['wrong_answers']} wrong answers, {load['server_errors']} responses of 5xx"],
        ["from one token to the next of 16 streams, median and p95",
         f"{alone['p50_ms']:.1f} and {alone['p95_ms']:.1f} ms"],
        ["the same while 8 SEAL requests train", f"{beside['p50_ms']:.1f} and {beside['p95_ms']:.1f} ms, beside "
         f"{rate(beside['trained_tokens_per_s'])} trained tokens/s"],
    ]  # fmt: skip
    for seal in (row for row in rows if row["what"] == "SEAL requests"):
        lines.append(
            [f"{seal['requests']} published self-edits cut to {seal['letters']} letters a sequence, 1 and 8 drivers",
             f"{seal['one_driver_seconds']:.1f} and {seal['eight_drivers_seconds']:.1f} s, a ratio of "
             f"{seal['ratio']:.2f}; all numbers equal in {seal['same_numbers']}"]
        )  # fmt: skip
    lines.append(
        [f"resident memory, before and after {memory['requests']:,} requests and {memory['adapters']} adapters",
         f"{memory['before_MiB']:.0f} and {memory['after_MiB']:.0f} MiB: {memory['percent_more']:.1f}% more"]
    )  # fmt: skip
    return table(("what", "measured"), lines) + source("bench_serve_cpu", machine)


def cluster_workers() -> str:
    """Real workers beside the model, and what goes between them and the driver."""
    rows, machine = read("bench_cluster_cpu")
    line, real = pick(rows, what="line through batches"), [row for row in rows if row["what"] == "real workers"]
    lines = []
    for row in real:
        traffic = [""] * 3
        if "messages_per_trial" in row:
            bytes_per_trial = row["bytes_sent_per_trial"] + row["bytes_received_per_trial"]
            batches = f"{row['batches_per_trial'] * row['trials']:.0f}"
            traffic = [batches, f"{row['messages_per_trial']:.2f}", f"{bytes_per_trial:,.0f}"]
        seconds = [f"{row['seconds']:.2f}", f"{row['predicted_seconds']:.2f}"]
        lines.append([str(row["workers"] or "no Ray"), *seconds, *traffic])
    heads = ("workers", "seconds", "by the model", "batches", "messages per trial", "bytes per trial")
    driver, update = (pick(rows, what=what) for what in ("the driver, per batch", "broadcast and merge of an update"))
    alone = pick(rows, what="a trial by itself")
    text = prose(
        f"{real[0]['trials']} trials of the miniature on {real[0]['cores']} cores, workers of one thread each. A batch "
        f"of k trials takes one worker {1e3 * line['per_batch_seconds']:.0f} + {1e3 * line['per_trial_seconds']:.0f} k "
        f"ms, a trial by itself {1e3 * alone['seconds']:.0f} ms, the longest of 32 "
        f"{1e3 * alone['longest_seconds']:.0f} ms; a batch takes the driver {driver['send_ms']:.2f} ms to send and "
        f"{driver['receive_ms']:.2f} ms to receive; an update of "
        f"{update['mib']:.1f} MiB is sent and merged in {1e3 * update['seconds']:.0f} ms."
    )
    return table(heads, lines) + text + source("bench_cluster_cpu", machine)


def cluster_simulated() -> str:
    """Efficiency of simulated workers, and what bounds it where batches cost something by themselves."""
    rows, _ = read("bench_cluster_cpu")
    lines = []
    for workers in sorted({row["workers"] for row in rows if row["what"] == "simulated"}):
        single, batches = (
            pick(rows, what="simulated", workers=workers, trials_taken=kind) for kind in ("one by one", "in batches")
        )
        cells = [f"{single['seconds']:.2f}", *(percent(single[name]) for name in ("efficiency", "attainable"))]
        cells += [f"{batches['seconds']:.2f}"]
        cells += [percent(batches[name]) for name in ("efficiency", "attainable", "first_round")]
        lines.append([str(workers), *cells])
    heads = ("seconds", "efficiency (%)", "attainable (%)")
    first, second = ((f"{kind}: {heads[0]}", *heads[1:]) for kind in ("one by one", "in batches"))
    line, driver = pick(rows, what="line through batches"), pick(rows, what="the driver, per batch")
    a, send = line["per_batch_seconds"], driver["send_ms"] / 1e3
    work = pick(rows, what="simulated", workers=1, trials_taken="in batches")["seconds"] - a
    used = lambda w: (a + work) / (w * a + work + w**2 * send)  # noqa: E731
    most = max(w for w in range(1, 1000) if used(w) >= 0.9)
    text = prose(
        f"In batches, 32 workers have {work:.1f} s of work, {1e3 * work / 32:.0f} ms each, beside a = {1e3 * a:.0f} ms "
        f"and W s = {32e3 * send:.0f} ms. So {percent(used(32))}% is attainable with one batch each, "
        f"{percent((a + work) / (64 * a + work + 32**2 * send))}% with two; 90% is attainable up to {most} workers."
    )
    return table(("workers", *first, *second, "first round (%)"), lines) + text


def cluster_kills() -> str:
    """The demo whose workers and driver are killed."""
    rows, machine = read("bench_kills_cpu")
    one, killed = rows
    assert killed["same_table"]
    assert killed["same_ledger"]
    text = prose(
        f"The miniature's demo (3 seeds, {killed['steps']} recorded steps, {killed['trials']} trials, deterministic) "
        f"on {killed['workers']} workers, with SIGKILL for a worker at {killed['worker_kills']} random moments and for "
        f"the driver at {killed['driver_kills']}, has the table of a run on one worker, digit for digit, and the same "
        f"ledger. It took {killed['seconds']:.0f} s, the run on one worker {one['seconds']:.0f} s, on two cores."
    )
    return text + source("bench_kills_cpu", machine)


PAGES: dict[Path, dict[str, Callable[[], str]]] = {
    ROOT / page: {function.__name__: function for function in functions}
    for page, functions in {
        "README.md": (demos, forgetting_short, speed),
        "docs/benchmarks.md": (
            demo_knowledge,
            demo_few_shot,
            demo_real,
            seal_round,
            h100_round,
            h100_scaling,
            h100_graphs,
            h100_kernels,
            forecast_round,
            few_shot,
            model,
            train,
            scaling,
            sample,
            decode,
            profile,
            busy_core,
        ),
        "docs/quantization.md": (quantization, quantized_speed),
        "docs/serve.md": (serve, tinker),
        "docs/tinker.md": (tinker_recipes,),
        "docs/scaling.md": (cluster_kills, cluster_workers, cluster_simulated),
        "docs/forgetting.md": (forgetting, forgetting_system, forgetting_routing, forgetting_by_age, forgetting_long),
    }.items()
}


def render(page: Path) -> str:
    """The page with all its blocks written anew. KeyError for a block of no such name."""
    blocks = PAGES[page]
    return BLOCK.sub(
        lambda match: f"<!-- {match['name']} -->\n{blocks[match['name']]()}<!-- end -->\n", page.read_text()
    )


if __name__ == "__main__":
    changed = []
    for page in PAGES:
        new = render(page)
        if new != page.read_text():
            page.write_text(new)
            changed.append(page.name)
    sys.exit(f"{', '.join(changed)} changed" if changed else None)
