"""The published knowledge round as lengths in tokens: what bench_seal_round.py replays with random tokens.

    python benchmarks/seal_round.py RESULT.json ...

makes the trace from result files as SEAL writes them. The one that the package ships (seal_engine/forecast) is of
SEAL's own rank_iter0.json: 50 passages, 5 self-edits of each. Self-edits are cut as for training, the passage last;
questions are those of the shipped template.

Tokens are characters over CHARACTERS_A_TOKEN, rounded up, as the round's own tokenizer (Qwen2.5's) is not needed here.
The constant is chosen: it gives 427 tokens a self-edit, and 3.2 million for the round's 750 inner loops of 10 epochs,
which is what is known of it.
"""

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from seal_engine.domains.knowledge.results import Article, select
from seal_engine.domains.knowledge.seal_files import read_result
from seal_engine.domains.knowledge.self_edits import split
from seal_engine.domains.templating import fill, read_template

CHARACTERS_A_TOKEN = 4.6
REPEATS, EPOCHS = 3, 10  # adapters of a self-edit, and passes over its sequences
TRACE = Path(__file__).parents[1] / "seal_engine/forecast/published_round.json"


@dataclass(frozen=True)
class Lengths:
    """Tokens of a passage's prompt, of itself, of its self-edits (as sampled, as trained on) and of its questions."""

    prompt: int
    passage: int
    completions: list[int]
    sequences: list[list[int]]  # of each self-edit
    questions: list[int]
    kept: int  # the number of the self-edit that the policy is trained on

    @property
    def training_tokens(self) -> int:
        """Of all the passage's inner loops, all epochs together."""
        return REPEATS * EPOCHS * sum(map(sum, self.sequences))


def tokens(text: str) -> int:
    """About how many tokens a text has; at least one."""
    return max(1, math.ceil(len(text) / CHARACTERS_A_TOKEN))


def lengths(article: Article, kept: str, split_newlines: bool) -> Lengths:
    """Those of an article; kept: the text of the self-edit that the policy is trained on."""
    template = read_template("", "question_template.txt")
    texts = [judged.text for judged in article.completions]
    asked = [q.question for q in article.completions[0].questions if q.rep == 0]
    return Lengths(
        tokens(article.prompt),
        tokens(article.context),
        [tokens(text) for text in texts],
        [[tokens(s) for s in split(text, article.title, article.context, split_newlines)] for text in texts],
        [tokens(fill(template, {"title": article.title, "question": question})) for question in asked],
        texts.index(kept),
    )


def read_trace(file: Path = TRACE) -> list[Lengths]:
    """The passages of a trace."""
    return [Lengths(**fields) for fields in json.loads(file.read_text())]


def typical(trace: Sequence[Lengths], count: int) -> list[Lengths]:
    """`count` passages that stand for all: sorted by training tokens, the middle one of each of as many equal parts."""
    ordered = sorted(trace, key=lambda passage: passage.training_tokens)
    return [ordered[(2 * i + 1) * len(ordered) // (2 * count)] for i in range(count)]


def main(files: Sequence[str]) -> None:
    """Make the trace of result files, and print what it comes to."""
    made = []
    for file in files:
        result = read_result(file)
        kept = {row["prompt"]: row["completion"] for row in select(result)}
        made += [lengths(article, kept[article.prompt], result.split_newlines) for article in result.articles]
    rows = ",\n".join(json.dumps(asdict(passage), separators=(",", ":")) for passage in made)
    TRACE.write_text(f"[\n{rows}\n]\n")
    sequences = [n for passage in made for own in passage.sequences for n in own]
    edits = sum(len(passage.completions) for passage in made)
    print(f"{TRACE}: {TRACE.stat().st_size} bytes")
    print(f"{len(made)} passages, {edits} self-edits, {sum(len(passage.questions) for passage in made)} questions")
    print(f"a self-edit: {len(sequences) / edits:.1f} sequences, {sum(sequences) / edits:.0f} tokens")
    print(f"{REPEATS * edits} inner loops: {sum(passage.training_tokens for passage in made)} tokens")


if __name__ == "__main__":
    if not sys.argv[1:]:
        sys.exit("usage: python benchmarks/seal_round.py RESULT.json ...")
    main(sys.argv[1:])
