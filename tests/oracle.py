"""Small random checkpoints written by Transformers, and Transformers' own answers on them: the truth of the tests."""

from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

BASE = {
    "vocab_size": 1009,
    "hidden_size": 48,
    "intermediate_size": 100,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
}
# head_dim 40. Parameters as wide as BASE's would make float32 itself wrong by 1e-5 at this size.
ODD_HEADS = {"hidden_size": 280, "num_attention_heads": 7, "num_key_value_heads": 1, "initializer_range": 0.08}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
# name: (configuration class, what differs from BASE)
MODELS = {
    "llama": (transformers.LlamaConfig, {}),
    "llama-odd-heads": (transformers.LlamaConfig, ODD_HEADS),
    "llama-biases-tied": (
        transformers.LlamaConfig,
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "llama-linear": (
        transformers.LlamaConfig,
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0}},
    ),
    "llama-llama3": (
        transformers.LlamaConfig,
        {"rope_parameters": LLAMA3, "head_dim": 20, "tie_word_embeddings": True},
    ),
    "llama-yarn": (transformers.LlamaConfig, {"rope_parameters": YARN, "head_dim": 40}),
    "llama-yarn-options": (
        transformers.LlamaConfig,
        {
            "rope_parameters": {
                **YARN,
                "beta_fast": 16.0,
                "beta_slow": 2.0,
                "truncate": False,
                "attention_factor": 1.3,
            }
        },
    ),
    "mistral": (transformers.MistralConfig, {"sliding_window": None, "num_key_value_heads": 3}),
    "mistral-window": (transformers.MistralConfig, {"sliding_window": 7, "head_dim": 16}),
    "qwen2": (
        transformers.Qwen2Config,
        {**ODD_HEADS, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    ),
    "qwen2-window": (
        transformers.Qwen2Config,
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1, "tie_word_embeddings": True},
    ),
    "qwen2-yarn": (transformers.Qwen2Config, {"rope_parameters": YARN}),
    "qwen3": (transformers.Qwen3Config, {"head_dim": 40, "num_key_value_heads": 1}),
    "qwen3-biases-window": (
        transformers.Qwen3Config,
        {
            "head_dim": 16,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 9,
            "max_window_layers": 2,
        },
    ),
}


def make_model(name: str, **changes) -> transformers.PreTrainedModel:
    """A random float32 model whose norms and biases are random too. changes: to its configuration."""
    cls, own = MODELS[name]
    torch.manual_seed(0)
    config = cls(**{**BASE, **own, **changes})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for parameter_name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            centre = 1.0 if "norm" in parameter_name else 0.0
            parameter.data.normal_(centre, 0.2)
    return model.requires_grad_(False)


def save(model: transformers.PreTrainedModel, directory: Path, **kwargs) -> Path:
    model.save_pretrained(directory, **kwargs)
    return directory


def load(directory: Path, dtype: torch.dtype) -> transformers.PreTrainedModel:
    """As Transformers loads it in dtype: its rotary frequencies stay float32, which `.to(dtype)` would round."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="eager")
    return model.eval().requires_grad_(False)


def sequences(lengths: list[int], vocab_size: int = 1009, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab_size, (n,), generator=generator).tolist() for n in lengths]


def logits(model: transformers.PreTrainedModel, batch: list[list[int]]) -> list[Tensor]:
    """Each sequence by itself, no padding: list of [n, V]."""
    with torch.no_grad():
        return [model(input_ids=torch.tensor([ids])).logits[0] for ids in batch]


def embedding_gradients(model: transformers.PreTrainedModel, batch: list[list[int]]) -> Tensor:
    """Gradient of the summed next-token loss with respect to the embeddings' output, [T, D]."""
    gradients = []
    for ids in batch:
        embeddings = model.get_input_embeddings()(torch.tensor(ids)).detach().requires_grad_()
        predicted = model(inputs_embeds=embeddings[None]).logits[0, :-1]
        wide = predicted.to(torch.promote_types(predicted.dtype, torch.float32))
        loss = torch.nn.functional.cross_entropy(wide, torch.tensor(ids[1:], dtype=torch.long), reduction="sum")
        gradients.append(torch.autograd.grad(loss, embeddings)[0])
    return torch.cat(gradients)


def train_alone(
    directory: Path, adapter_directory: Path, job, sequences: list[tuple[list[int], list[int]]], dtype=None
):
    """One job as PEFT and torch train it: per-step losses, and the adapter's parameters by PEFT's names.

    AdamW, clipping, schedule and accumulation as Hugging Face's Trainer has them; sequences in the given order, one at
    a time (the mean over an optimizer step's target tokens does not depend on padding).
    """
    from peft import PeftModel
    from transformers import get_scheduler

    base = load(directory, dtype or torch.float32)
    model = PeftModel.from_pretrained(base, adapter_directory, is_trainable=True).eval()  # eval: no dropout
    parameters = [p for p in model.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.data = parameter.data.to(
            torch.promote_types(parameter.dtype, torch.float32)
        )  # float32 masters, as PEFT keeps them under a 16-bit base
    decay = job.weight_decay
    optimizer = torch.optim.AdamW(parameters, job.learning_rate, job.betas, job.eps, decay, foreach=False)
    a_step = job.batch_size * job.gradient_accumulation_steps
    steps_an_epoch = -(-len(sequences) // a_step)
    name = "constant_with_warmup" if job.lr_scheduler == "constant" else job.lr_scheduler
    total = steps_an_epoch * job.num_epochs
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=job.warmup_steps, num_training_steps=total)
    losses = []
    for _ in range(job.num_epochs):
        for first in range(0, len(sequences), a_step):
            members = sequences[first : first + a_step]
            count = sum(sum(mask[1:]) for _, mask in members)
            step_loss = 0.0
            for ids, mask in members:
                logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
                logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
                targets = torch.where(torch.tensor(mask[1:], dtype=torch.bool), torch.tensor(ids[1:]), -100)
                loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum") / count
                loss.backward()
                step_loss += loss.item()
            if job.max_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(parameters, job.max_grad_norm, foreach=False)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            losses.append(step_loss)
    named = {n.replace(".default", ""): p.detach() for n, p in model.named_parameters() if p.requires_grad}
    return losses, named
