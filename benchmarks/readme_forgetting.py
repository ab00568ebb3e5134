"""What is kept of one edit after another: blocks of docs/forgetting.md, and README's."""

from tables import Row, percent, pick, prose, read, source, table


def forgetting() -> str:
    """What every method keeps, with self-edits that the policy writes, which no edit touches."""
    return _forgetting("policy")


def forgetting_short() -> str:
    """What three ways to keep edits keep."""
    rows, _ = read("bench_continual_cpu")
    learned, kept = (
        [f"{100 * pick(rows, case='policy', method=method)[name]:.0f}" for method in ("merge", "consolidate", "bank")]
        for name in ("learned", "kept")
    )
    return prose(
        f"Merged one after another, edits destroy each other (`demo continual`): {learned[0]}% just after each, "
        f"{kept[0]}% after all eight. Where updates spare what is known {kept[1]} of {learned[1]} stay, in a bank of "
        f"adapters {kept[2]} of {learned[2]} ([13 methods](docs/forgetting.md)):"
    )


def forgetting_system() -> str:
    """The same with self-edits that the current system writes, as published."""
    return _forgetting("system")


def _forgetting(case: str) -> str:
    rows, _ = read("bench_continual_cpu")
    own = [row for row in rows if row["case"] == case]
    merge, lines = pick(own, method="merge"), []
    for row in own[:-1]:
        probes = [
            percent(row[name]) if row.get(name) is not None else "" for name in ("reading", "knowledge", "writing")
        ]
        if row["method"] == "untrained":
            lines.append(["untrained", "", percent(row["kept"]), "", "", *probes, "", ""])
            continue
        scores = [percent(row[name]) for name in ("learned", "kept")]
        over = [_interval(row, "over_merge"), _interval(row, "over_joint")]
        cost = f"{row['tokens'] / merge['tokens']:.2f}"
        lines.append([row["method"], *scores, *over, *probes, f"{row['kl']:.3f}", cost])
    heads = ("method", "learned", "kept", "over merge", "over joint", "reading", "knew", "writing", "KL", "tokens")
    return table(heads, lines)


def _interval(row: Row, name: str) -> str:
    if name not in row:
        return ""
    mean, low, high = (100 * row[key] for key in (name, f"{name}_low", f"{name}_high"))
    return f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"


def forgetting_routing() -> str:
    """Where the bank's questions go, and what the run took."""
    rows, machine = read("bench_continual_cpu")
    bank = pick(rows, case="policy", method="bank")
    kinds = {"with the title": "routed", "with its first word alone": "routed by first word",
             "without the title": "routed without title", "of no edit, to none": "routed to none"}  # fmt: skip
    lines = [[kind, percent(bank[name])] for kind, name in kinds.items()]
    return table(("questions", "routed rightly (%)"), lines) + source("bench_continual_cpu", machine)


def forgetting_by_age() -> str:
    """Gain over the untrained model by edits since, beside the paper's."""
    rows, _ = read("bench_continual_cpu")
    paper = [10.7, 5.2, -2.6, -6.6, -6.9, -10.0, -12.4, -14.2]
    lines = [["merge in the paper (Qwen2.5-7B, SQuAD)", *(f"{gain:+.1f}" for gain in paper)]]
    for case, method in (("system", "merge"), ("policy", "merge"), ("policy", "null-space"), ("policy", "consolidate"),
                         ("policy", "bank")):  # fmt: skip
        ages = pick(rows, case=case, method=method)["ages"]
        lines.append([f"{method} here, self-edits by the {case}", *(f"{100 * gain:+.1f}" for gain in ages)])
    matrix = (
        "In the paper's matrix accuracy is 41.5 just after an edit, 30.7 before any, and after all eight, by passage, "
        "18.9 21.9 16.4 23.7 22.1 27.5 33.5 34.0: 24.7 on average."
    )
    return table(("edits since", *map(str, range(8))), lines) + prose(matrix)


def forgetting_long() -> str:
    """Sequences of 32 passages, and all sequences at once beside one after another."""
    rows, _ = read("bench_continual_cpu")
    long = [row for row in rows if row["case"] == "long"]
    lines = []
    for row in long[:-1]:
        if row["method"] == "untrained":
            continue
        ages = [f"{100 * row['ages'][age]:+.1f}" for age in (0, 8, 16, 31)]
        probes = [percent(row[name]) for name in ("reading", "knowledge")]
        lines.append([row["method"], percent(row["learned"]), percent(row["kept"]), *ages, *probes])
    heads = ("method", "learned", "kept", "gain at age 0", "8", "16", "31", "reading", "knew")
    speed = [row for row in rows if row["case"] == "side by side"]
    text = ""
    for row in speed:
        text = prose(
            f"All at once: {row['sequences']} sequences of {row['passages']} passages with four methods, "
            f"{row['adapters_at_once']} adapters trained at once, took {row['seconds']:.0f} s in one process, and "
            f"{row['seconds_one_at_a_time']:.0f} s one sequence after another: {row['times_faster']:.1f} times as fast."
        )
    bank = pick(long, method="bank")
    routed = prose(
        f"With 32 edits {percent(bank['routed'])}% of the bank's questions reach their edit, and "
        f"{percent(bank['routed to none'])}% of those of no edit reach none."
    )
    return table(heads, lines) + routed + text
