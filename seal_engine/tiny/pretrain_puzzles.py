"""Makes the puzzle miniature: a Llama of under a million parameters, trained from scratch on puzzles of known rules.

First on puzzles that change nothing: copying a grid cell by cell is what all else is built on, and beside other rules
it is learned late. Then on known rules, and on directives for them, all of the menu equally likely.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from seal_engine.domains.few_shot.arc import Task
from seal_engine.tiny.pretrain import END, Llama, Packer, Recipe, optimise, save
from seal_engine.tiny.puzzles import AREAS, MOVES, NO_CHANGE, Puzzles, Rule, text_form, write_directive

# A token is a colour with what follows it; the rest of the text is cut around choices, numbers and signs.
PIECES = r"\d+\.\d+(?:e-\d+)?|\d(?:, |\], \[|\]\])?|\[\[| -> |true|false|\n"
SIZES = ((2, 2), (2, 3), (3, 2), (3, 6), (6, 3), (4, 4))  # beside 3 x 3
SMALL = 9  # cells; of puzzles with larger grids fewer fit in a row

SHAPE = Recipe(vocab_size=512, rows=24, row_length=128)  # of the model and its rows; the optimizer's settings


@dataclass(frozen=True)
class PuzzleRecipe:
    """Everything that decides the model."""

    model: Recipe = SHAPE
    copy_steps: int = 150  # of `steps`, the first: puzzles that change nothing
    steps: int = 1250
    learning_rate: float = 3e-3  # after the model's `warmup_steps`, then cosine to zero
    directives: float = 0.12  # of the documents
    three_by_three: float = 0.85  # of the puzzles
    random_weight: float = 0.1  # of the loss on what cannot be known: inputs, and the first output
    tokenizer_documents: int = 4000


@dataclass(frozen=True)
class Document:
    """Texts, each with the weight of the loss on its tokens."""

    parts: tuple[tuple[str, float], ...]

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(text for text, _ in self.parts)


def documents(puzzles: Puzzles, rng: random.Random, recipe: PuzzleRecipe, copying: bool = False) -> Iterator[Any]:
    """Endless Documents; copying: those of the first steps."""
    form = text_form()
    while True:
        if not copying and rng.random() < recipe.directives:
            task = puzzles.puzzle(known_rule(puzzles, rng), rng, palette=rng.randint(3, 5))
            yield Document(((form.self_edit_prompt(task), 0.0), (write_directive(rng).to_json(), 1.0)))
            continue
        task, parts = known_puzzle(puzzles, rng, recipe, copying), []
        for i, example in enumerate((*task.train, *task.tests)):
            assert example.output is not None
            parts.append((form.question(example.input), recipe.random_weight))
            parts.append((form.answer(example.output), 1.0 if i else recipe.random_weight))
        yield Document(tuple(parts))


def known_rule(puzzles: Puzzles, rng: random.Random, copying: bool = False) -> Rule:
    """A rule for pretraining."""
    kind = rng.random()
    if copying or kind < 0.05:
        return Rule(None, "all", NO_CHANGE)
    if kind < 0.15:
        return Rule(rng.choice(MOVES), "all", NO_CHANGE)
    area = "all" if kind < 0.45 else rng.choice(("top", "left")) if kind < 0.95 else rng.choice(AREAS)
    return Rule(None, area, rng.choice(puzzles.known))


def known_puzzle(puzzles: Puzzles, rng: random.Random, recipe: PuzzleRecipe, copying: bool = False) -> Task:
    """A puzzle of such a rule, as long as fits in a row."""
    size = (3, 3) if rng.random() < recipe.three_by_three else rng.choice(SIZES)
    fewest, most = (2, 4) if size[0] * size[1] <= SMALL else (1, 2)
    rule = known_rule(puzzles, rng, copying)
    return puzzles.puzzle(rule, rng, rng.randint(fewest, most), size, rng.randint(3, 6))


def train_tokenizer(texts: Iterator[str], recipe: PuzzleRecipe) -> tokenizers.Tokenizer:
    """A byte-level BPE tokenizer: any text can be encoded, and a colour is one token with the sign after it."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    pieces = pre_tokenizers.Split(Regex(PIECES), "isolated")
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pieces, letters])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.model.vocab_size,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


class PuzzlePacker(Packer):
    """Documents as rows of tokens, with the weight of each token's loss."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, recipe: Recipe):
        self.tokenizer, self.recipe = tokenizer, recipe
        self.end: int = tokenizer.encode(END).ids[0]

    def tokens(self, document: Any) -> tuple[list[int], list[float]]:
        """A document's tokens, the end among them, and their weights. Parts are encoded apart, as they are sampled."""
        ids, weights = [], []
        for text, weight in document.parts:
            own = self.tokenizer.encode(text).ids
            ids += own
            weights += [weight] * len(own)
        return [*ids, self.end], [*weights, 1.0]


def train_puzzle_model(out: Path, recipe: PuzzleRecipe = PuzzleRecipe(), progress: bool = True) -> dict:
    """Train the model and write it to `out`, a new or empty directory, as a Hugging Face checkpoint.

    Returns what was measured: steps, tokens, and the mean loss of the last 50 steps.
    """
    shape = recipe.model
    puzzles, rng = Puzzles(shape.seed), random.Random(shape.seed)
    source, copies = documents(puzzles, rng, recipe), documents(puzzles, rng, recipe, copying=True)
    tokenizer = train_tokenizer((document.text for document in islice(source, recipe.tokenizer_documents)), recipe)
    torch.manual_seed(shape.seed)
    model = Llama(shape, tokenizer.get_vocab_size())
    sources = [(recipe.copy_steps, copies), (recipe.steps - recipe.copy_steps, source)]
    report = optimise(model, PuzzlePacker(tokenizer, shape), sources, shape, recipe.learning_rate, progress)
    save(out, shape, model, tokenizer)
    return report
