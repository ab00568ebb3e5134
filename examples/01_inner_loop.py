"""One inner loop of SEAL by hand: sample self-edits, train an adapter on each, question each adapter.

Run it with: python examples/01_inner_loop.py
"""

from seal_engine import Engine, LoraConfig, SamplingParams, TrainJob
from seal_engine.domains.knowledge.grading import exact_match
from seal_engine.tiny import MODEL
from seal_engine.tiny.world import QUESTION_PROMPT, SELF_EDIT_PROMPT, World

engine = Engine.from_pretrained(MODEL, dtype="float32")
(passage,) = World().passages("heldout", 1, seed=0)
print(passage.context)

prompt = SELF_EDIT_PROMPT.format(title=passage.title, context=passage.context)
written = engine.generate([prompt], SamplingParams(n=8, temperature=0.7, max_tokens=110, seed=0))[0]
self_edits = [sample.text.strip().splitlines() for sample in written.outputs]

lora = LoraConfig(r=16, lora_alpha=32, target_modules=("q_proj", "v_proj"))
jobs = [TrainJob(lines, lora, learning_rate=3e-3, num_epochs=8, append_eos=True) for lines in self_edits]
results = engine.train(jobs)  # eight adapters at once

questions = [QUESTION_PROMPT.format(question=q.question) for q in passage.questions]
for lines, result in zip(self_edits, results, strict=True):
    greedy = SamplingParams(temperature=0, max_tokens=6, stop="\n")
    answers = engine.generate(questions, greedy, adapters=result.adapter)
    right = [exact_match(a.outputs[0].text, q.answer) for a, q in zip(answers, passage.questions, strict=True)]
    print(f"{sum(right):.0f} of {len(right)}: {' / '.join(lines)}")
