"""Makes the miniature model: a Llama of a million parameters, trained from scratch on the world's documents.

Three stages, each of which is needed. Documents of random words that occur twice teach copying; without them, reading
never appears. Then passages of fresh facts with questions or notes teach reading and writing; all styles of notes are
equally likely. Last, single lines about a few people whose facts never change are mixed in: so the model learns that
what was said of a person in one line is asked for in another.
"""

import json
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

import tokenizers
import torch
from safetensors.torch import save_file
from tokenizers import decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

from seal_engine.files import complete_directory
from seal_engine.progress import reporting
from seal_engine.tiny.world import (
    LAST,
    READING_PROMPT,
    SELF_EDIT_PROMPT,
    STYLES,
    VALUES,
    Passage,
    World,
    question_line,
    write,
)

END = "<|end|>"
COPIED = (*LAST, *VALUES)  # the words of stage 1: no first names, so that no one held out is named by chance


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the model."""

    seed: int = 0
    vocab_size: int = 1280  # at most
    layers: int = 4
    hidden: int = 128
    heads: int = 4
    intermediate: int = 352
    rope_theta: float = 10000.0
    copy_steps: int = 400  # stage 1
    copied_words: tuple[int, int] = (4, 24)  # fewest and most in a document
    reading_steps: int = 350  # stage 2
    keeping_steps: int = 1250  # stage 3
    keeping_share: float = 0.85  # of stage 3's documents: short ones about people kept in the weights
    described_share: float = 0.1  # of those: passages
    rows: int = 24  # a step
    row_length: int = 128  # tokens; every document fits
    learning_rate: float = 2e-3  # after `warmup_steps`, then cosine to zero
    warmup_steps: int = 50
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.05
    max_grad_norm: float = 1.0
    passage_weight: float = 0.1  # of the loss on a passage's tokens, which are random facts
    value_weight: float = 3.0  # on values that were copied from a passage

    @property
    def steps(self) -> int:
        """Optimizer steps in all."""
        return self.copy_steps + self.reading_steps + self.keeping_steps


@dataclass(frozen=True)
class Document:
    """What one training document says. The passage is read more than learned; values in the body are copied from it."""

    passage: str
    body: str


def documents(world: World, rng: random.Random, stage: int, recipe: Recipe) -> Iterator[Document]:
    """Endless documents of a stage, 1 to 3."""
    while True:
        if stage == 1:
            text = " ".join(rng.choices(COPIED, k=rng.randint(*recipe.copied_words)))
            yield Document(f"{text}\n", text)
        elif stage == 3 and rng.random() < recipe.keeping_share:
            yield Document("", _kept(world, rng, recipe))
        else:
            yield _fresh(world, rng)


def _kept(world: World, rng: random.Random, recipe: Recipe) -> str:
    """A line about someone told of, or the passage on someone described."""
    if rng.random() < recipe.described_share:
        return rng.choice(world.described).context
    person = rng.choice(world.told)
    fact = rng.choice(person.facts)
    kind = rng.randrange(5)
    if kind < 3:
        return question_line(person.title, fact, kind)
    return (fact.relation.statement, fact.relation.reverse)[kind - 3].format(who=person.title, value=fact.value)


def _fresh(world: World, rng: random.Random) -> Document:
    """A passage of facts drawn now, with questions or with notes in some style."""
    passage = world.passage(rng.choice(world.train), rng)
    if rng.random() < 0.5:
        facts = rng.sample(passage.facts, len(passage.facts))
        lines = "\n".join(question_line(passage.title, fact, rng.randrange(3)) for fact in facts)
        return Document(READING_PROMPT.format(title=passage.title, context=passage.context, question=""), lines)
    prompt = SELF_EDIT_PROMPT.format(title=passage.title, context=passage.context)
    return Document(prompt, write(rng.choice(STYLES), passage, rng))


def train_tokenizer(world: World, rng: random.Random, recipe: Recipe) -> tokenizers.Tokenizer:
    """A byte-level BPE tokenizer of the world's text: any text can be encoded, and the world's words are one token."""
    texts = []
    for stage in (1, 2, 3):
        texts += [doc.passage + doc.body for doc in islice(documents(world, rng, stage, recipe), 3000)]
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocab_size,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


class Layer(nn.Module):
    """Attention and SwiGLU, each behind an RMS norm. Names are those of Hugging Face's Llama."""

    def __init__(self, recipe: Recipe):
        super().__init__()
        D, self.heads = recipe.hidden, recipe.heads
        self.input_layernorm = nn.RMSNorm(D, eps=1e-5)
        self.self_attn = nn.ModuleDict({f"{name}_proj": nn.Linear(D, D, bias=False) for name in "qkvo"})
        self.post_attention_layernorm = nn.RMSNorm(D, eps=1e-5)
        self.mlp = nn.ModuleDict(
            {
                "gate_proj": nn.Linear(D, recipe.intermediate, bias=False),
                "up_proj": nn.Linear(D, recipe.intermediate, bias=False),
                "down_proj": nn.Linear(recipe.intermediate, D, bias=False),
            }
        )

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        """x [S, L, D]; cos, sin [L, E]; mask [S, 1, L, L], true where a token may look."""
        h = self.input_layernorm(x)
        q, k, v = (self.self_attn[f"{name}_proj"](h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for name in "qkv")
        with torch.autocast("cpu", enabled=False):  # its backward is slower in bfloat16
            q, k, v = rotate(q.float(), cos, sin), rotate(k.float(), cos, sin), v.float()
            mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.self_attn["o_proj"](mixed.transpose(1, 2).flatten(2))
        h = self.post_attention_layernorm(x)
        return x + self.mlp["down_proj"](nn.functional.silu(self.mlp["gate_proj"](h)) * self.mlp["up_proj"](h))


class Llama(nn.Module):
    """The model in training, over rows of several documents each. Its output projection is its embedding."""

    frequencies: Tensor  # [E / 2] float32, radians a position

    def __init__(self, recipe: Recipe, vocab_size: int):
        super().__init__()
        self.embed_tokens = nn.Embedding(vocab_size, recipe.hidden)
        self.layers = nn.ModuleList(Layer(recipe) for _ in range(recipe.layers))
        self.norm = nn.RMSNorm(recipe.hidden, eps=1e-5)
        E = recipe.hidden // recipe.heads
        self.register_buffer("frequencies", recipe.rope_theta ** (-torch.arange(0, E, 2) / E), persistent=False)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=recipe.hidden**-0.5)

    def forward(self, tokens: Tensor, doc: Tensor) -> Tensor:
        """tokens, doc [S, L] int64: hidden states [S, L, D]. Tokens see earlier tokens of their own document only."""
        angles = torch.outer(torch.arange(tokens.shape[1]), self.frequencies).repeat(1, 2)
        mask = (doc[:, :, None] == doc[:, None, :]).tril()[:, None]
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x, angles.cos(), angles.sin(), mask)
        return self.norm(x)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, x [..., L, E]: feature i turns with i + E / 2."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


class Packer:
    """Documents as rows of tokens, with the weight of each token's loss."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, recipe: Recipe):
        self.tokenizer, self.recipe = tokenizer, recipe
        self.end = tokenizer.token_to_id(END)
        self.values = {token for value in VALUES for token in tokenizer.encode(f" {value}").ids}

    def tokens(self, document: Document) -> tuple[list[int], list[float]]:
        """A document's tokens, the end among them, and their weights."""
        passage = self.tokenizer.encode(document.passage).ids
        body = [*self.tokenizer.encode(document.body).ids, self.end]
        copied = self.recipe.value_weight if passage else 1.0
        weights = [copied if token in self.values else 1.0 for token in body]
        return passage + body, [self.recipe.passage_weight] * len(passage) + weights

    def batch(self, source: Iterator[Document]) -> tuple[Tensor, Tensor, Tensor]:
        """tokens, documents' numbers, weights: each [rows, row_length]. Padding is a document of its own, weight 0."""
        recipe = self.recipe
        weights = torch.zeros(recipe.rows, recipe.row_length)
        tokens, doc = torch.zeros_like(weights, dtype=torch.int64), torch.zeros_like(weights, dtype=torch.int64)
        used = [0] * recipe.rows
        for number, document in enumerate(source, 1):
            ids, importance = self.tokens(document)
            row = next((r for r in range(recipe.rows) if used[r] + len(ids) <= recipe.row_length), None)
            if row is None:
                break
            place = slice(used[row], used[row] + len(ids))
            tokens[row, place], weights[row, place] = torch.tensor(ids), torch.tensor(importance)
            doc[row, place] = number
            weights[row, used[row]] = 0.0  # nothing predicts a document's first token
            used[row] += len(ids)
        return tokens, doc, weights


def train_tiny(out: Path, recipe: Recipe = Recipe(), progress: bool = True) -> dict:
    """Train the model and write it to `out`, a new or empty directory, as a Hugging Face checkpoint.

    Returns what was measured: steps, tokens, the mean loss of the last 50 steps, and `reading`, the share of questions
    about 100 passages on held-out people that it answers with the passage before it.
    """
    world, rng = World(recipe.seed), random.Random(recipe.seed)
    tokenizer = train_tokenizer(world, rng, recipe)
    torch.manual_seed(recipe.seed)
    model = Llama(recipe, tokenizer.get_vocab_size())
    stages = enumerate((recipe.copy_steps, recipe.reading_steps, recipe.keeping_steps), 1)
    sources = [(steps, documents(world, rng, stage, recipe)) for stage, steps in stages]
    report = optimise(model, Packer(tokenizer, recipe), sources, recipe, recipe.learning_rate, progress)
    save(out, recipe, model, tokenizer)
    return report | {"reading": reading(model, tokenizer, world.passages("heldout", 100, seed=0))}


def optimise(
    model: Llama,
    packer: Packer,
    sources: Sequence[tuple[int, Iterator[Any]]],
    recipe: Recipe,
    learning_rate: float,
    progress: bool,
) -> dict[str, float]:
    """Train the model for some steps on the documents of each source in turn; AdamW, warm-up, then cosine to zero.

    Returns the steps, the tokens, and the mean loss of the last 50 steps.
    """
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=recipe.betas, weight_decay=recipe.weight_decay
    )
    total = sum(steps for steps, _ in sources)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / recipe.warmup_steps) * (1 + math.cos(math.pi * step / total)) / 2
    )
    num_tokens, losses = 0, []
    with reporting(total, "step", "Pretraining", progress) as report:
        for stage, (steps, source) in enumerate(sources, 1):
            for _ in range(steps):
                tokens, doc, weights = packer.batch(source)
                loss = mean_loss(model, tokens, doc, weights)
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
                optimizer.step()
                schedule.step()
                num_tokens += int((doc > 0).sum())
                losses.append(loss.item())
                report(len(losses), f"stage {stage}, loss {fmean(losses[-50:]):.3f}")
    return {"steps": total, "tokens": num_tokens, "loss": fmean(losses[-50:])}


def mean_loss(model: Llama, tokens: Tensor, doc: Tensor, weights: Tensor) -> Tensor:
    """The weighted mean of the tokens' cross-entropies, each token predicted from those before it in its document."""
    targets = weights[:, 1:] > 0
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(tokens, doc)[:, :-1][targets] @ model.embed_tokens.weight.T
    losses = nn.functional.cross_entropy(logits.float(), tokens[:, 1:][targets], reduction="none")
    return losses @ weights[:, 1:][targets] / weights[:, 1:].sum()


@torch.no_grad()
def reading(model: Llama, tokenizer: tokenizers.Tokenizer, passages: Sequence[Passage]) -> float:
    """The share of the passages' questions that are answered rightly with the passage in the prompt."""
    right = []
    for passage in passages:
        for question in passage.questions:
            prompt = READING_PROMPT.format(title=passage.title, context=passage.context, question=question.question)
            tokens = torch.tensor([tokenizer.encode(prompt).ids])
            logits = model(tokens, torch.ones_like(tokens))[0, -1] @ model.embed_tokens.weight.T
            right.append(tokenizer.encode(f" {question.answer}").ids == [int(logits.argmax())])
    return fmean(right)


def save(out: Path, recipe: Recipe, model: Llama, tokenizer: tokenizers.Tokenizer) -> None:
    """Write a Hugging Face checkpoint, bfloat16: all of it or nothing."""
    end = tokenizer.token_to_id(END)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": recipe.hidden,
        "intermediate_size": recipe.intermediate,
        "num_hidden_layers": recipe.layers,
        "num_attention_heads": recipe.heads,
        "num_key_value_heads": recipe.heads,
        "head_dim": recipe.hidden // recipe.heads,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,  # longer than any training document: real passages have more bytes
        "rms_norm_eps": 1e-5,
        "rope_theta": recipe.rope_theta,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": None,
        "eos_token_id": end,
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
    }
    texts = {
        "config.json": config,
        "generation_config.json": {"eos_token_id": end, "pad_token_id": end},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": END,
            "pad_token": END,
            "model_max_length": 512,
            "clean_up_tokenization_spaces": False,
        },
    }
    with complete_directory(out) as directory:
        for name, value in texts.items():
            (directory / name).write_text(json.dumps(value, indent=2) + "\n", "utf-8")
        tokenizer.save(str(directory / "tokenizer.json"))
        tensors = {f"model.{name}": tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})
