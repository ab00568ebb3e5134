"""What sampling was measured to do on a CPU, and where time goes there: blocks of docs/benchmarks.md."""

from tables import pick, prose, rate, read, source, table


def sample() -> str:
    """Sampling beside Transformers and PEFT."""
    rows, machine = read("bench_sample_cpu")
    theirs = {0: "Transformers, its best batch size", 32: "PEFT, switching adapters"}
    lines = []
    for ours in (row for row in rows if row["who"] == "seal_engine" and row.get("than_the_best_of_the_baseline")):
        case = {name: ours[name] for name in ("shape", "dtype", "adapters", "requests")}
        others = [row for row in rows if row is not ours and all(row.get(name) == case[name] for name in case)]
        best = max(row["tokens_per_s"] for row in others)
        lines.append(
            [f"{case['shape']} {case['dtype']}", str(case["adapters"]), f"{rate(ours['tokens_per_s'])} tokens/s",
             f"{rate(best)} ({theirs[case['adapters']]})", f"{ours['than_the_best_of_the_baseline']:.1f}"]
        )  # fmt: skip
    more = []
    for shape in ("2m", "97m"):
        own = [pick(rows, shape=shape, requests=64, adapters=count)["percent_on_top"] for count in (1, 8, 64)]
        more.append(f"{', '.join(f'{value:.0f}' for value in own)}% on the {shape} shape")
    return (
        table(("base", "adapters", "seal_engine", "the other", "times faster"), lines)
        + prose(f"64 prompts at once take longer with 1, 8 and 64 distinct adapters by {', and '.join(more)}.")
        + source("bench_sample_cpu", machine)
    )


def decode() -> str:
    """Greedy sampling at equal batch sizes beside Transformers, on two CPUs."""
    return "\n".join(map(_decode, ("bench_decode_cpu", "bench_decode_cpu_amx")))


def _decode(name: str) -> str:
    rows, machine = read(name)
    ours = [row for row in rows if row["who"] == "seal_engine"]
    counts = sorted({row["rows"] for row in ours})
    lines = []
    for shape, dtype in dict.fromkeys((row["shape"], row["dtype"]) for row in ours):
        own = {row["rows"]: row for row in ours if (row["shape"], row["dtype"]) == (shape, dtype)}
        cells = [f"{rate(row['tokens_per_s'])} ({row['times_faster']:.2f})" for row in own.values()]
        shown = dict(zip(own, cells, strict=True))
        lines.append([f"{shape} {dtype}", *(shown.get(count, "") for count in counts)])
    heads = ("base", *(f"{count} row{'s' * (count > 1)}" for count in counts))
    return table(heads, lines) + source(name, machine)


def busy_core() -> str:
    """Training and sampling beside a busy process on one of the cores."""
    rows, machine = read("bench_neighbour_cpu")
    lines = [
        [f"{row['shape']} {row['dtype']}", row["busy_process"],
         f"{rate(row['training_tokens_per_s'])} ({row['training_share_of_quiet']:.2f})",
         f"{rate(row['sampled_tokens_per_s'])} ({row['sampling_share_of_quiet']:.2f})"]
        for row in rows
    ]  # fmt: skip
    heads = ("base", "a busy process", "trained tokens/s", "sampled tokens/s")
    return table(heads, lines) + source("bench_neighbour_cpu", machine)


def profile() -> str:
    """Where a CPU's time goes in training and decoding, before and after."""
    (before, _), (rows, machine) = read("bench_profile_cpu_before"), read("bench_profile_cpu")
    cases = dict.fromkeys((row["what"], row["dtype"]) for row in rows)
    lines = []
    for kind in dict.fromkeys(row["kind"] for row in rows):
        cells = []
        for what, dtype in cases:
            then, now = (pick(found, what=what, dtype=dtype, kind=kind) for found in (before, rows))
            digits = 0 if now["ms"] + then["ms"] > 100 else 1
            cells.append(f"{then['ms']:,.{digits}f} → {now['ms']:,.{digits}f} ({100 * now['share']:.0f}%)")
        lines.append([kind, *cells])
    heads = ("ms a step", *(f"{what}, {dtype}" for what, dtype in cases))
    return table(heads, lines) + source("bench_profile_cpu", machine)
