"""Recipes of tinker-cookbook 0.6.1, unchanged, against a server of this engine: docs/tinker.md has the results.

    python benchmarks/tinker_recipes.py CHECKPOINT DIRECTORY [RECIPE ...] [--record DIR]

serves the checkpoint, runs each recipe for 20 steps in a process of its own, as users start it, and prints a figure for
each step; --record keeps them in a JSON file. Recipes know models and data sets by name, and their libraries take a
directory of that name first: DIRECTORY gets such directories, with a link to the checkpoint and with stand-ins for the
data. `rl_loop` goes on from `sl_loop`, `rl_basic` from `sl_basic`, whose model also is the teacher of
`on_policy_distillation`.
"""

import argparse
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import measure

NAME = "Qwen/Qwen3-8B-Base"
RENDERER = "role_colon"  # the cookbook's own choice for that name; needs no special tokens
SUFFIX = " Provide a numerical answer without units, written inside \\boxed{}."  # which RL recipes add to questions
QUESTION = "Which digit is it?"
DIGITS = 4  # chats answer with one of them by chance; of the question to reward, the answer is the last
CHATS = "160 chats whose answer is a digit by chance, boxed"
ONE_QUESTION = "one question, whose answer is one of the four digits"
GSM8K = "configs:\n- config_name: main\n  data_files:\n" + "".join(
    f"  - split: {split}\n    path: {split}.jsonl\n" for split in ("train", "test")
)


@dataclass(frozen=True)
class Recipe:
    """A recipe as it is started. figure: the column of its metrics that shows what it learns, and what that is."""

    module: str
    data: str
    step: str  # how much of the data
    figure: str
    meaning: str
    options: dict[str, Any]
    checkpoints: dict[str, str] = field(default_factory=dict)  # option -> the field of sl_basic's last checkpoint
    log_path: str | None = None  # of a recipe whose checkpoint this one finds there; None: one of its own


RECIPES = {
    "sl_loop": Recipe(
        "sl_loop",
        CHATS,
        "8",
        "train_mean_nll",
        "nats a token",
        dict(batch_size=8, lora_rank=16, learning_rate=3e-4),
    ),
    "rl_loop": Recipe(
        "rl_loop",
        ONE_QUESTION,
        "2 x 8",
        "reward/total",
        "reward",
        dict(batch_size=2, group_size=8, max_steps=40, max_tokens=16, lora_rank=16, learning_rate=2e-4)
        | dict(loss_fn="importance_sampling"),
        log_path="sl_loop",
    ),
    "sl_basic": Recipe(
        "sl_basic",
        CHATS,
        "8",
        "train_mean_nll",
        "nats a token",
        {
            "dataset_builder": "tinker_cookbook.recipes.chat_sl.chat_datasets:NoRobotsBuilder",
            "dataset_builder.common_config.model_name_for_tokenizer": NAME,
            "dataset_builder.common_config.renderer_name": RENDERER,
            "dataset_builder.common_config.max_length": 512,
            "dataset_builder.common_config.batch_size": 8,
            "lora_rank": 16,
            "learning_rate": 3e-4,
        },
    ),
    "rl_basic": Recipe(
        "rl_basic",
        ONE_QUESTION,
        "2 x 8",
        "env/all/reward/total",
        "reward",
        {
            "dataset_builder": "tinker_cookbook.recipes.math_rl.math_env:Gsm8kDatasetBuilder",
            "dataset_builder.model_name_for_tokenizer": NAME,
            "dataset_builder.renderer_name": RENDERER,
            "dataset_builder.batch_size": 2,
            "dataset_builder.group_size": 8,
            "max_tokens": 16,
            "max_steps": 20,
            "lora_rank": 16,
            "learning_rate": 2e-4,
        },
        {"load_checkpoint_path": "state_path"},
    ),
    "on_policy_distillation": Recipe(
        "distillation.on_policy_distillation",
        "the questions of the chats",
        "4 x 4",
        "teacher_kl",
        "divergence from the teacher, nats a token",
        dict(dataset="tulu3", groups_per_batch=4, group_size=4, max_tokens=16, max_steps=20)
        | dict(teacher_model=NAME, lora_rank=16, learning_rate=5e-4),
        {"teacher_checkpoint": "sampler_path"},
    ),
    "dpo": Recipe(
        "preference.dpo.train",
        "160 sums, answered or not",
        "4 pairs",
        "dpo_loss",
        "loss",
        dict(dataset="hhh", batch_size=4, max_steps=20, learning_rate=1e-4),
    ),
}


def write_stand_ins(directory: Path, checkpoint: Path, seed: int = 0) -> None:
    """A model and data sets below a directory, by the names that the recipes ask for."""
    (directory / NAME).parent.mkdir(parents=True)
    (directory / NAME).symlink_to(checkpoint.resolve())
    rng = random.Random(seed)
    chats = [_chat(f"\\boxed{{{rng.randint(1, DIGITS)}}}") for _ in range(160)]
    _write(directory / "HuggingFaceH4/no_robots/train.jsonl", chats)
    _write(directory / "HuggingFaceH4/no_robots/test.jsonl", chats[:8])
    _write(directory / "allenai/tulu-3-sft-mixture/train.jsonl", chats)
    rows = [{"question": QUESTION, "answer": f"It is the last.\n#### {DIGITS}"}] * 640
    _write(directory / "openai/gsm8k/train.jsonl", rows)
    _write(directory / "openai/gsm8k/test.jsonl", rows[:8])
    (directory / "openai/gsm8k/README.md").write_text(f"---\n{GSM8K}---\n")
    pairs = [_pair(rng.randint(1, 9), rng.randint(1, 9)) for _ in range(160)]
    _write(directory / "Anthropic/hh-rlhf/train.jsonl", pairs)
    _write(directory / "Anthropic/hh-rlhf/test.jsonl", pairs[:8])


def _chat(answer: str) -> dict[str, Any]:
    user, assistant = {"role": "user", "content": QUESTION + SUFFIX}, {"role": "assistant", "content": answer}
    return {"messages": [user, assistant]}


def _pair(a: int, b: int) -> dict[str, str]:
    """A sum, once right and once not."""
    prompt = f"\n\nHuman: How much is {a} + {b}?\n\nAssistant:"
    return {"chosen": f"{prompt} It is {a + b}.", "rejected": f"{prompt} I do not know."}


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")


def run(name: str, directory: Path, url: str, **changes: Any) -> list[float]:
    """The figure of each step of a recipe, in a directory with stand-ins; changes: of its options. RuntimeError if the
    recipe fails."""
    recipe = RECIPES[name]
    log = directory / "runs" / (recipe.log_path or name)
    options = {"model_name": NAME, "log_path": log, **recipe.options, **changes}
    for option, checkpoint in recipe.checkpoints.items():
        lines = (directory / "runs/sl_basic/checkpoints.jsonl").read_text().splitlines()
        options[option] = json.loads(lines[-1])[checkpoint]
    module = f"tinker_cookbook.recipes.{recipe.module}"
    environment = {
        **os.environ, "TINKER_BASE_URL": url, "TINKER_API_KEY": "tml-local", "TINKER_TELEMETRY": "0",
        "HF_HOME": str(directory / "hub"), "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    process = subprocess.run(
        [sys.executable, "-m", module, *(f"{key}={value}" for key, value in options.items())],
        cwd=directory, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    if process.returncode != 0:
        raise RuntimeError(f"{name}: {process.stderr[-3000:]}")
    rows = [json.loads(line) for line in (log / "metrics.jsonl").read_text().splitlines()]
    return [row[recipe.figure] for row in rows if recipe.figure in row]


@contextmanager
def _server(directory: Path) -> Iterator[str]:
    """A server of the directory's model, as users start it: its address."""
    command = [sys.executable, "-m", "seal_engine", "serve", "--model", NAME, "--port", "0", "--json", "--quiet"]
    process = subprocess.Popen(command, cwd=directory, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())["url"]
    finally:
        process.terminate()
        process.wait(60)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("directory", type=Path, help="a new one")
    parser.add_argument("recipes", nargs="*", default=list(RECIPES), metavar="RECIPE", help=f"of {list(RECIPES)}")
    parser.add_argument("--record", type=Path, metavar="DIR", help="write a JSON file to DIR")
    options = parser.parse_args()
    write_stand_ins(options.directory, options.checkpoint)
    rows = []
    with _server(options.directory) as url:
        for name in options.recipes:
            recipe, figures = RECIPES[name], run(name, options.directory.resolve(), url)
            row = dict(recipe=recipe.module, data=recipe.data, step=recipe.step, figure=recipe.meaning)
            rows.append({**row, "by_step": [float(f"{figure:.3g}") for figure in figures]})
            print(f"{name}: {recipe.figure}: {' '.join(f'{figure:.3g}' for figure in figures)}", flush=True)
    print(measure.report(f"tinker_recipes_{measure.DEVICE.type}", rows, options.record))


if __name__ == "__main__":
    main()
