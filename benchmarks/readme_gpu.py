"""What was measured on a GPU, and what is forecast for one: blocks of docs/benchmarks.md."""

import json

from tables import RESULTS, pick, prose, rate, read, source, table


def h100_round() -> str:
    """Ten passages of the published round on a GPU, by part, beside what had been forecast for them."""
    rows, machine = read("bench_seal_round_cuda")
    forecast = json.loads((RESULTS / "forecast_ten_passages_h100.json").read_text())["seconds"]
    lines = []
    for part in ("sampling", "training", "asking", "updating", "round"):
        of_part = {row["who"]: row for row in rows if row["part"] == part}
        ours, floor = of_part["seal_engine"], of_part["floor"]
        faster = [of_part.get(who) for who in ("peft, one at a time", "peft, padded to 2048")]
        cells = [
            part, f"{ours['seconds']:.3g} s", f"{forecast[part]:.3g} s", f"{floor['seconds']:.3g} s",
            f"{ours['percent_of_floor']:.0f}%" + (f" ({floor['limit']})" if "limit" in floor else ""),
            *("" if row is None else f"{row['seal_engine_times_faster']:.1f}" for row in faster),
        ]  # fmt: skip
        lines.append([f"**{cell}**" if cell else "" for cell in cells] if part == "round" else cells)
    heads = ("part", "seal_engine", "forecast before", "floor", "share of its floor", "times faster than PEFT",
             "than PEFT, padded")  # fmt: skip
    whole = pick(rows, part="round", who="floor")
    rates = (
        f"{whole['matrix_tflops']:.0f} TFLOP/s and {whole['copy_gb_per_s']:,.0f} GB/s were measured in the same run."
    )
    return table(heads, lines) + prose(rates) + source("bench_seal_round_cuda", machine, " --passages 10")


def h100_scaling() -> str:
    """Throughput with many adapters on a GPU, of one adapter's."""
    rows, machine = read("bench_scaling_cuda")
    counts, lines = (8, 64, 128, 256, 512), []
    for rank, projections in dict.fromkeys((row["rank"], row["projections"]) for row in rows):
        own = [row for row in rows if (row["rank"], row["projections"]) == (rank, projections)]
        found = {row["adapters"]: row["of_one_adapter"] for row in own}
        cells = [f"{found[count]:.2f}" if count in found else "" for count in counts]
        lines.append([f"rank {rank}, q and v", f"{rate(own[0]['tokens_per_s'])}", *cells])
    heads = ("adapters", "tokens/s of one", *map(str, counts))
    return table(heads, lines) + source("bench_scaling_cuda", machine)


def h100_graphs() -> str:
    """Small training passes on a GPU, launched kernel by kernel and as graphs."""
    rows, machine = read("bench_pass_graph_cuda")
    lines = []
    for graphs in (row for row in rows if row["who"] == "graphs"):
        same = {name: graphs[name] for name in ("shape", "tokens_a_pass")}
        launched = pick(rows, **same, who="launched")
        cells = (f"{row['ms_a_pass']:.1f} ms" for row in (launched, graphs))
        lines.append([f"{graphs['shape']}, {graphs['tokens_a_pass']} tokens", *cells, f"{graphs['times_faster']:.1f}"])
    heads = ("base, tokens a pass", "launched", "as graphs, captures included", "times faster")
    return table(heads, lines) + source("bench_pass_graph_cuda", machine)


def h100_kernels() -> str:
    """Each kernel on a GPU beside its floor and beside torch."""
    lines = []
    for name in ("attention", "paged_attention", "cross_entropy", "sampling", "rms_norm", "swiglu", "rotary"):
        rows, machine = read(f"bench_{name}_cuda")
        for ours in (row for row in rows if row["who"] == "seal_kernels"):
            torch = pick(rows, case=ours["case"], who="torch")
            floor = f"{ours['percent_of_floor']:.0f}% ({ours['limit']})"
            faster = f"{torch['us'] / ours['us']:.1f}"
            lines.append([f"{name}: {ours['case']}", f"{ours['us']:,.0f} us", floor, faster])
    rows, machine = read("bench_lora_cuda")
    for ours in (row for row in rows if row["who"] == "low-rank" and row["rank"] == 32):
        whole, loop = (
            pick(rows, **{name: ours[name] for name in ("case", "adapters", "rank")}, who=who)
            for who in ("whole", "loop")
        )
        what = f"lora, {ours['adapters']} adapters: {ours['case']}, with the frozen product, forward and backward"
        floor = f"{whole['percent_of_floor']:.0f}% ({whole['limit']})"
        lines.append([what, f"{whole['us']:,.0f} us", floor, f"{loop['us'] / whole['us']:.1f}"])
    heads = (
        "kernel and case",
        "seal_kernels",
        "share of its floor",
        "times faster than torch, or than a loop in torch",
    )
    where = f"{machine['device']}, torch {machine['torch']}, {machine['date']}, commit {machine['commit']}"
    command = "\n```\nbash benchmarks/gpu.sh benchmarks/results kernels\n```\n"
    return table(heads, lines) + prose(f"Recorded in `benchmarks/results/bench_*_cuda.json` ({where}) by") + command


def forecast_round() -> str:
    """The forecast of a published round on two GPUs."""
    records = [json.loads((RESULTS / f"forecast_round_{gpu}.json").read_text()) for gpu in ("h100", "h200")]
    rows = [{(row["part"], row["what"]): row for row in record["rows"]} for record in records]
    lines = []
    for key in dict.fromkeys(key for of_gpu in rows for key in of_gpu):
        part, what = key
        cells = [part if not what else "", what]
        for of_gpu in rows:
            row = of_gpu.get(key, {"seconds": 0.0, "floor_seconds": 0.0, "limit": ""})
            share = f"{100 * row['seconds'] / of_gpu['round', '']['seconds']:.0f}%"
            floor = f"{row['floor_seconds']:.2f} s" if row["floor_seconds"] else ""  # else nothing counts for it
            cells += [f"{row['seconds']:.1f} s, {share}", floor, row["limit"]]
        lines.append([f"**{cell}**" if cell else "" for cell in cells] if part == "round" else cells)
    heads = ["part", "", "H100, share", "floor", "limited by", "H200, share", "floor", "limited by"]
    again = {"none": "nothing", "mlp": "the MLPs", "layer": "the layers"}
    texts = [
        f"On an {gpu} the Trainer recomputes {again[record['recompute']]} and has at most "
        f"{record['adapters_resident']} adapters in training ({record['adapters_planned']} fit by the plan), "
        f"{record['adapters_offloaded']} move to host memory and back; {record['kv_blocks']:,} blocks of K/V fit."
        for gpu, record in zip(("H100", "H200"), records, strict=True)
    ]
    made = f"`benchmarks/results/forecast_round_*.json` ({records[0]['date']}, commit {records[0]['commit']})"
    passes = f"{records[0]['training_passes']} training passes and {records[0]['sampling_steps']:,} sampling steps."
    return (
        table(heads, lines)
        + prose(" ".join([passes, *texts]))
        + prose(f"Recorded in {made} by")
        + "\n```\n.venv/bin/python benchmarks/forecast_round.py\n```\n"
    )
