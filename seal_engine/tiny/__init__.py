"""The miniature that ships with the engine: a small world, a model of a million parameters, and the recipe for it."""

from pathlib import Path

MODEL = Path(__file__).parent / "model"  # a Hugging Face checkpoint, made by `pretrain.train_tiny`
