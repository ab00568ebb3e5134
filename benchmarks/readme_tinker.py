"""What the Tinker API was measured to do: blocks of docs/serve.md and docs/tinker.md."""

from tables import pick, rate, read, recorded, source, table


def tinker() -> str:
    """The Tinker API: 32 tenants together, and what the wire adds."""
    rows, machine = read("bench_tinker_cpu")
    lines = [
        [f"{row['what']} of {row['tenants']} models, together and one after the other",
         f"{row['together_ms']:.1f} and {row['one_by_one_ms']:.1f} ms each, {row['ratio']:.1f} times as fast together; "
         f"in Python, without the wire, together {row['engine_ms']:.1f} ms: {row['most']:.1f} times is the most"]
        for row in rows if "ratio" in row
    ]  # fmt: skip
    python, http, sdk = (pick(rows, what=f"optim_step, {way}")["ms"] for way in ("Python", "HTTP", "SDK"))
    lines.append(["a step of AdamW on next to nothing, in Python, over HTTP, and through the SDK",
                  f"{python:.2f}, {http:.1f} and {sdk:.1f} ms"])  # fmt: skip
    info = [row for row in rows if row["what"] == "get_info, HTTP"]
    lines.append(["`get_info` over HTTP, one client and 16", " and ".join(rate(row["requests_per_s"]) for row in info)
                  + " requests/s"])  # fmt: skip
    return table(("what", "measured"), lines) + source("bench_tinker_cpu", machine)


def tinker_recipes() -> str:
    """Recipes of the cookbook, by what their metrics say of the first step and of the last five."""
    rows, machine = read("tinker_recipes_cpu")
    lines = [
        [f"`{row['recipe']}`", row["data"], f"{len(row['by_step'])} of {row['step']}", row["figure"],
         f"{row['by_step'][0]:.2f}", f"{sum(row['by_step'][-5:]) / 5:.2f}"]
        for row in rows
    ]  # fmt: skip
    heads = ("recipe of 0.6.1", "data", "steps", "figure", "first step", "mean of the last five")
    command = "python benchmarks/tinker_recipes.py CHECKPOINT DIRECTORY --record benchmarks/results"
    return table(heads, lines) + recorded("tinker_recipes_cpu", machine, command)
