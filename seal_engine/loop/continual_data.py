"""What the methods of the continual experiment share: texts of the untrained model, and what it predicts.

The untrained model (the base, with its policy) is the teacher throughout: no edit has touched it.
"""

from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor

from seal_engine.engine import Engine
from seal_engine.loop.continual_config import ContinualConfig
from seal_engine.loop.domain import Prompt
from seal_engine.loop.null_space import Covariances, input_covariances
from seal_engine.loop.retrieval import BM25, Cosine, Router
from seal_engine.model.adapters import Adapter
from seal_engine.training.jobs import TrainSequence
from seal_engine.types import LoraConfig, PackedBatch

TEACHER_SEQUENCES = 32  # whose logits are held at once
BACKGROUND = 1024  # texts of the base that a router knows: half make words rare, half choose the threshold


class SharedTexts:
    """Texts and predictions of the untrained model, for one seed."""

    def __init__(
        self,
        engine: Engine,
        config: ContinualConfig,
        seed: int,
        samples: Sequence[Sequence[int]],
        prompt: Callable[[str], Prompt],
    ):
        """samples: token ids of texts that the base wrote, to train on. prompt: as Domain.prompt."""
        self.engine, self.config, self.seed = engine, config, seed
        self.samples = [list(ids) for ids in samples]
        self.prompt = prompt

    def token_ids(self, sequences: Sequence) -> list[list[int]]:
        """Token ids of training sequences: texts, ids or TrainSequence."""
        plain = [s.token_ids if isinstance(s, TrainSequence) else s for s in sequences]
        return self.engine.inputs.sequences(plain)

    @cached_property
    def rehearsal(self) -> list[TrainSequence]:
        """The base's texts that have an end, all of them if none has, with its own predictions as soft targets."""
        ends = self.engine.stop_token_ids
        whole = [ids for ids in self.samples if ids[-1] in ends] or self.samples
        return self.soft_targets([([], ids) for ids in whole])

    @cached_property
    def covariances(self) -> Covariances:
        """Of the inputs of the model's projections, over the base's texts."""
        return input_covariances(self.engine, self.samples, self.null_space_lora)

    @property
    def null_space_lora(self) -> LoraConfig:
        """The shape of an update in the null space."""
        return LoraConfig(
            self.config.null_space_rank, self.config.null_space_rank, target_modules=self.config.null_space_targets
        )

    def distil(self, context: str, sequences: Sequence) -> list[TrainSequence]:
        """A self-edit's sequences, with what the base predicts for them after the context's prompt as soft targets."""
        prompt = self.engine.inputs.token_ids(self.prompt(context), "prompt")
        longest = self.engine.config.max_position_embeddings - len(prompt)
        return self.soft_targets([(prompt, ids[: max(2, longest)]) for ids in self.token_ids(sequences)])

    @torch.no_grad()
    def soft_targets(self, texts: Sequence[tuple[list[int], list[int]]]) -> list[TrainSequence]:
        """Each text, without what stands before it, with the base's top K predictions after both; they sum to 1."""
        made: list[TrainSequence] = []
        K = min(self.config.distil_top_k, self.engine.config.vocab_size)
        for first in range(0, len(texts), TEACHER_SEQUENCES):
            some = texts[first : first + TEACHER_SEQUENCES]
            for (before, ids), logits in zip(some, self.engine.logits([b + i for b, i in some]), strict=True):
                # Row i predicts token i + 1; a text's first token is no target, as nothing may stand before it.
                top = logits[len(before) : len(before) + len(ids) - 1].softmax(-1).topk(K, dim=-1)
                weights = top.values / top.values.sum(-1, keepdim=True)
                rows = torch.zeros(1, K), weights.cpu()
                target_ids = torch.cat([torch.zeros(1, K, dtype=torch.int64), top.indices.cpu()])
                made.append(TrainSequence(ids, None, target_ids.tolist(), torch.cat(rows).tolist()))
        return made

    def losses(self, systems: Sequence[Adapter | None], sequences: Sequence) -> list[float]:
        """The mean loss per token of the sequences under each system; all are scored in one call."""
        ids = [s for s in self.token_ids(sequences) if len(s) > 1]
        adapters = [system for system in systems for _ in ids]
        logprobs = self.engine.score(ids * len(systems), adapters)
        return [float(-torch.cat(logprobs[i * len(ids) : (i + 1) * len(ids)]).mean()) for i in range(len(systems))]

    def router(self) -> Router:
        """An empty router of the configured kind."""
        return Router(self._retriever, self._background[1::2])

    @cached_property
    def _background(self) -> list[str]:
        return [self.engine.tokenizer.decode(ids, skip_special_tokens=True) for ids in self.samples[:BACKGROUND]]

    @cached_property
    def _retriever(self) -> BM25 | Cosine:
        background = self._background[::2]
        return BM25(background) if self.config.retriever == "bm25" else Cosine(background, self._embed)

    @torch.no_grad()
    def _embed(self, texts: Sequence[str]) -> Tensor:
        """Mean hidden state of the base's last layer for each text, [n, D]."""
        model, vectors = self.engine.model, []
        for ids in self.token_ids(texts):
            batch = PackedBatch.pack([ids], model.device)
            vectors.append(model.hidden_states(batch).float().mean(0).cpu())
        return torch.stack(vectors)


def divergence(engine: Engine, adapters: Sequence[Adapter | None], texts: Sequence[Sequence[int]]) -> list[float]:
    """KL(base || adapter) in nats per token, over the texts, for each adapter."""
    sums, tokens = [0.0] * len(adapters), sum(map(len, texts))
    for first in range(0, len(texts), TEACHER_SEQUENCES):
        some = texts[first : first + TEACHER_SEQUENCES]
        base = [logits.log_softmax(-1) for logits in engine.logits(some)]
        for i, adapter in enumerate(adapters):
            if adapter is not None:
                for own, truth in zip(engine.logits(some, adapter), base, strict=True):
                    sums[i] += float((truth.exp() * (truth - own.log_softmax(-1))).sum())
    return [total / tokens for total in sums]
