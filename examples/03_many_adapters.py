"""200 different adapters trained at once over one base, and sampled in one batch; one of them checked alone.

Every job has its own data, rank, learning rate and number of epochs. In deterministic mode an adapter does not depend
on its company: number 123 trained among 200 equals number 123 trained alone, bit for bit.

Run it with: python examples/03_many_adapters.py
"""

from time import perf_counter

import torch

from seal_engine import Engine, LoraConfig, SamplingParams, TrainJob
from seal_engine.tiny import MODEL

COUNT, CHECKED = 200, 123
QUESTION = "What colour does Ann Lee wear?"
COLOURS = ("orange", "purple", "green", "yellow", "red")


def job(i: int) -> TrainJob:
    """The i-th job: the colour of the i-th coat, said twice."""
    return TrainJob(
        [f"{QUESTION} {COLOURS[i % len(COLOURS)]}", f"What colour is the coat? {COLOURS[i % len(COLOURS)]}"],
        LoraConfig(r=(2, 4, 8, 16)[i % 4], lora_alpha=16, target_modules=("q_proj", "v_proj")),
        learning_rate=(1e-2, 2e-2)[i % 2],
        num_epochs=5 + i % 3,
        seed=i,
    )


def main() -> bool:
    """Train, sample, check; returns whether the adapter is the same alone."""
    engine = Engine.from_pretrained(MODEL, dtype="float32", deterministic=True)
    start = perf_counter()
    results = engine.train([job(i) for i in range(COUNT)], progress=False)
    steps = sum(result.num_steps for result in results)
    print(f"{COUNT} adapters, {steps} optimizer steps in {perf_counter() - start:.1f} s")

    greedy = SamplingParams(temperature=0, max_tokens=1)
    outputs = engine.generate([QUESTION] * COUNT, greedy, [result.adapter for result in results], progress=False)
    right = sum(o.outputs[0].text.strip() == COLOURS[i % len(COLOURS)] for i, o in enumerate(outputs))
    print(f"{QUESTION} {right} of {COUNT} adapters give the colour that they were trained on")

    (alone,) = engine.train([job(CHECKED)], progress=False)
    same = (
        torch.equal(alone.adapter.params, results[CHECKED].adapter.params) and alone.losses == results[CHECKED].losses
    )
    print(f"trained alone it is {'the same, bit for bit' if same else 'different'}")
    return same


if __name__ == "__main__":
    main()
