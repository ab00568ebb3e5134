"""One round of SEAL (arXiv 2506.10943, algorithm 1) in one flat file, over the engine's public verbs alone.

    C, tau    a context, here a passage about an invented person, and the questions on it
    SE        a self-edit, the notes that the policy writes about C; each line is a training sequence
    theta     the policy: the shipped model and, after the update, an adapter on top of it
    theta'    an adapter trained on one self-edit (the inner loop)
    r         the reward of a self-edit: the share of tau that theta' answers rightly without seeing C

ReST^EM: sample self-edits, reward each, fine-tune the policy on the best one of each context. The rewards of held-out
contexts before and after show what that taught. Takes about 20 seconds on two cores.

Run it with: python examples/02_seal_round.py
"""

from statistics import fmean

from seal_engine import Adapter, Engine, LoraConfig, SamplingParams, TrainJob, TrainSequence
from seal_engine.domains.knowledge.grading import exact_match
from seal_engine.tiny import MODEL
from seal_engine.tiny.world import QUESTION_PROMPT, SELF_EDIT_PROMPT, World, WorldPassage

CONTEXTS, SELF_EDITS = 24, 5
INNER_LORA = LoraConfig(r=16, lora_alpha=64, target_modules=("q_proj", "v_proj"))
POLICY_LORA = LoraConfig(r=32, lora_alpha=64, target_modules="all-linear")


def prompt_of(passage: WorldPassage) -> str:
    """The prompt that the policy continues with a self-edit."""
    return SELF_EDIT_PROMPT.format(title=passage.title, context=passage.context)


def sample_self_edits(
    engine: Engine, policy: Adapter | None, passages: list[WorldPassage], seed: int
) -> list[tuple[WorldPassage, str, list[int]]]:
    """SE ~ theta(. | C): SELF_EDITS samples for each passage, as (passage, text, token ids)."""
    params = [SamplingParams(n=SELF_EDITS, max_tokens=110, seed=seed + i) for i in range(len(passages))]
    outputs = engine.generate([prompt_of(passage) for passage in passages], params, policy, progress=False)
    return [
        (passage, sample.text, sample.token_ids)
        for passage, output in zip(passages, outputs, strict=True)
        for sample in output.outputs
    ]


def rewards_of(engine: Engine, self_edits: list[tuple[WorldPassage, str, list[int]]]) -> list[float]:
    """r for each self-edit: theta' <- SFT(theta, SE), then Ans ~ theta'(. | tau). All of them train at once."""
    jobs = [
        TrainJob(
            text.strip().splitlines()[:10] or [passage.title],
            INNER_LORA,
            learning_rate=1e-2,
            num_epochs=8,
            batch_size=5,
            append_eos=True,
        )
        for passage, text, _ in self_edits
    ]
    results = engine.train(jobs, progress=False)
    prompts, adapters, answers = [], [], []
    for (passage, _, _), result in zip(self_edits, results, strict=True):
        for question in passage.questions:
            prompts.append(QUESTION_PROMPT.format(question=question.question))
            adapters.append(result.adapter)
            answers.append(question.answer)
    outputs = engine.generate(prompts, SamplingParams(temperature=0, max_tokens=6, stop="\n"), adapters, progress=False)
    right = [exact_match(o.outputs[0].text, answer) for o, answer in zip(outputs, answers, strict=True)]
    count = len(right) // len(self_edits)
    return [fmean(right[i : i + count]) for i in range(0, len(right), count)]


def main() -> tuple[float, float]:
    """One round; returns the mean reward of held-out self-edits before and after it."""
    engine = Engine.from_pretrained(MODEL, dtype="float32")
    world = World()
    train, held_out = world.passages("train", CONTEXTS, seed=0), world.passages("heldout", CONTEXTS, seed=0)
    before = fmean(rewards_of(engine, sample_self_edits(engine, None, held_out, seed=1000)))
    print(f"mean reward on held-out passages before the round: {before:.2f}")

    # E-step: self-edits of every context, and their rewards.
    self_edits = sample_self_edits(engine, None, train, seed=0)
    rewards = rewards_of(engine, self_edits)
    print(f"{len(self_edits)} self-edits, mean reward {fmean(rewards):.2f}")

    # M-step: fine-tune the policy on the best self-edit of each context that taught at least half of the answers.
    sequences = []
    for first in range(0, len(self_edits), SELF_EDITS):
        best = max(range(first, first + SELF_EDITS), key=lambda i: rewards[i])
        if rewards[best] >= 0.5:
            passage, _, token_ids = self_edits[best]
            prompt = engine.tokenizer.encode(prompt_of(passage))
            mask = [0] * len(prompt) + [1] * len(token_ids)
            sequences.append(TrainSequence([*prompt, *token_ids], mask))
    job = TrainJob(sequences, POLICY_LORA, learning_rate=1e-3, num_epochs=4, batch_size=4)
    (update,) = engine.train([job], progress=False)
    print(f"policy fine-tuned on {len(sequences)} self-edits")

    after = fmean(rewards_of(engine, sample_self_edits(engine, update.adapter, held_out, seed=1000)))
    print(f"mean reward on held-out passages after the round: {after:.2f}")
    return before, after


if __name__ == "__main__":
    main()
