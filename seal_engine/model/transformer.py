"""The transformer: one forward over a packed token stream, for training and for sampling.

The base is frozen: no parameter requires a gradient, so a backward pass costs as much as a forward pass (2N FLOPs a
token each), and activations are saved only where an operation needs them. Projections that share their input are one
matrix: q/k/v, and gate/up. Everything about the batch is an argument; the model holds parameters and nothing else.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from seal_engine.model.adapter_layout import ProjectionGroup
from seal_engine.model.config import ModelConfig
from seal_engine.model.devices import configure_allocator
from seal_engine.model.lora_batch import LoraBatch
from seal_engine.types import PackedBatch, PagedBatch
from seal_kernels.attention import attention
from seal_kernels.contiguous_attention import contiguous_attention
from seal_kernels.cross_entropy import soft_target_logprobs, token_logprobs
from seal_kernels.linear import INVARIANT_ROWS, FrozenWeight, frozen_linear
from seal_kernels.lora import lora_linear
from seal_kernels.packed import allow_packing, can_pack, fuses_swiglu, multiplies_bfloat16, num_copies, packed_swiglu
from seal_kernels.paged_attention import paged_attention, write_kv
from seal_kernels.quantized_linear import QuantizedWeight, WeightFormat
from seal_kernels.rms_norm import add_rms_norm, rms_norm
from seal_kernels.rotary import rotary
from seal_kernels.swiglu import swiglu

# Nothing here draws from torch's generators (dropout has its own hash), so their states need not be kept.
_checkpoint = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)


@dataclass(frozen=True)
class Layer:
    """Parameters of one decoder layer."""

    input_norm: Tensor  # [D]
    qkv: FrozenWeight  # [(H + 2 K) E, D]
    qkv_bias: Tensor | None  # [(H + 2 K) E]
    q_norm: Tensor | None  # [E]
    k_norm: Tensor | None  # [E]
    o: FrozenWeight  # [D, H E]
    o_bias: Tensor | None  # [D]
    post_attention_norm: Tensor  # [D]
    gate_up: FrozenWeight  # [2 F, D]
    gate_up_bias: Tensor | None  # [2 F]
    down: FrozenWeight  # [D, F]
    down_bias: Tensor | None  # [D]
    window: int | None  # tokens a query sees, itself included; None: all before it


class Model:
    """Parameters in `dtype` on `device`, and the forward pass.

    The residual stream is in `compute_dtype`: the parameters' dtype on a GPU, float32 on a CPU (seal_kernels.linear).
    Cached K/V and what lies between the two products of an MLP are in `product_dtype`: bfloat16 on a CPU, too, where
    its products round to that. So is what other products read and write, where no gradient is wanted.
    """

    def __init__(
        self, config: ModelConfig, dtype: torch.dtype, device: torch.device, quantization: WeightFormat | None = None
    ):
        """Allocates uninitialised parameters; `named_tensors` gives the views to fill. quantization: of the linears."""
        configure_allocator(device)
        self.version = 0  # rises with every change of the parameters
        self.batch_invariant = False  # whether a token's results do not depend on the other sequences of its batch

        def empty(*shape: int) -> Tensor:
            return torch.empty(*shape, dtype=dtype, device=device)

        def linear(outputs: int, inputs: int) -> FrozenWeight:
            if quantization is None:
                return empty(outputs, inputs)
            return QuantizedWeight.empty(quantization, outputs, inputs, dtype, device)

        def optional(wanted: bool, *shape: int) -> Tensor | None:
            return empty(*shape) if wanted else None

        c, D, F, E = config, config.hidden_size, config.intermediate_size, config.head_dim
        qkv_size = c.query_size + 2 * c.key_value_size
        self.config = config
        self.quantization = quantization
        self.dtype = dtype
        self.device = device
        self.compute_dtype = torch.float32 if device.type == "cpu" else dtype
        rounds = dtype == torch.bfloat16 and multiplies_bfloat16()
        self.product_dtype = dtype if rounds else self.compute_dtype
        self.embed = empty(c.vocab_size, D)  # [V, D]
        self.layers = [
            Layer(
                input_norm=empty(D),
                qkv=linear(qkv_size, D),
                qkv_bias=optional(c.qkv_bias, qkv_size),
                q_norm=optional(c.qk_norm, E),
                k_norm=optional(c.qk_norm, E),
                o=linear(D, c.query_size),
                o_bias=optional(c.o_bias, D),
                post_attention_norm=empty(D),
                gate_up=linear(2 * F, D),
                gate_up_bias=optional(c.mlp_bias, 2 * F),
                down=linear(D, F),
                down_bias=optional(c.mlp_bias, D),
                window=window,
            )
            for window in c.windows
        ]
        self.norm = empty(D)
        self.lm_head = self.embed if c.tie_word_embeddings else empty(c.vocab_size, D)  # [V, D]
        self.inverse_frequencies = c.rope.inverse_frequencies(E).to(device)  # [E / 2] float32

    def allow_packing(self) -> None:
        """Let a CPU's products use packed copies of the large matrices where they are faster: packed_bytes of memory.

        A copy is made when it is first used.
        """
        for layer in self.layers:
            allow_packing(layer.gate_up, gated=True)
            for matrix in (layer.qkv, layer.o, layer.down):
                allow_packing(matrix)
        allow_packing(self.lm_head)

    @property
    def packed_bytes(self) -> int:
        """The memory of packed copies of all matrices that packing serves, on this device."""
        linears = chain.from_iterable([layer.qkv, layer.o, layer.gate_up, layer.down] for layer in self.layers)
        copies = [*((matrix, num_copies(self.dtype)) for matrix in linears), (self.lm_head, 1)]
        return sum(matrix.nbytes * count for matrix, count in copies if can_pack(matrix))

    def named_tensors(self) -> Iterator[tuple[str, Any]]:
        """(Hugging Face name, view of the parameter: a Tensor, or a QuantizedWeight). A tied lm_head is not listed."""
        c, F = self.config, self.config.intermediate_size
        qkv_sizes = [c.query_size, c.key_value_size, c.key_value_size]
        yield "model.embed_tokens.weight", self.embed
        for i, layer in enumerate(self.layers):
            attention_modules = zip(("q_proj", "k_proj", "v_proj"), layer.qkv.split(qkv_sizes), strict=True)
            modules: dict[str, Any] = {f"self_attn.{name}.weight": view for name, view in attention_modules}
            if layer.qkv_bias is not None:
                views = zip(("q_proj", "k_proj", "v_proj"), layer.qkv_bias.split(qkv_sizes), strict=True)
                modules |= {f"self_attn.{name}.bias": view for name, view in views}
            modules["self_attn.o_proj.weight"] = layer.o
            modules["mlp.gate_proj.weight"], modules["mlp.up_proj.weight"] = layer.gate_up.split([F, F])
            if layer.gate_up_bias is not None:
                modules["mlp.gate_proj.bias"], modules["mlp.up_proj.bias"] = layer.gate_up_bias.split(F)
            modules["mlp.down_proj.weight"] = layer.down
            modules["input_layernorm.weight"] = layer.input_norm
            modules["post_attention_layernorm.weight"] = layer.post_attention_norm
            optional = {
                "self_attn.o_proj.bias": layer.o_bias,
                "self_attn.q_norm.weight": layer.q_norm,
                "self_attn.k_norm.weight": layer.k_norm,
                "mlp.down_proj.bias": layer.down_bias,
            }
            modules |= {name: view for name, view in optional.items() if view is not None}
            for name, view in modules.items():
                yield f"model.layers.{i}.{name}", view
        yield "model.norm.weight", self.norm
        if not self.config.tie_word_embeddings:
            yield "lm_head.weight", self.lm_head

    def embeddings(self, token_ids: Tensor) -> Tensor:
        """token_ids [T] -> [T, D] in compute_dtype."""
        return self.embed[token_ids].to(self.compute_dtype)

    def hidden_states(
        self,
        batch: PackedBatch | PagedBatch,
        lora: LoraBatch | None = None,
        embeddings: Tensor | None = None,
        recompute: str = "none",
    ) -> Tensor:
        """Normed hidden states of the last layer, [T, D] in compute_dtype: what the lm_head multiplies.

        lora: which tokens belong to which adapter; backward adds to the adapters' gradients.
        embeddings: [T, D] in compute_dtype, in place of the token embeddings (gradients flow back to them).
        recompute: what backward computes again instead of keeping it: "none", "mlp" (each layer's MLP) or "layer".
        """
        x = self.embeddings(batch.token_ids) if embeddings is None else embeddings
        eps = self.config.rms_norm_eps
        rotation = self._rotation(batch.positions)
        sums: Tensor | None = None  # the residual stream, to which x is still to be added
        for i in range(len(self.layers)):
            step = partial(self._layer, i, batch, rotation, lora, recompute)
            if recompute == "layer":
                x, sums = _checkpoint(step, x, sums)
            else:
                x, sums = step(x, sums)
        dtype = self.compute_dtype
        return rms_norm(x, self.norm, eps, dtype) if sums is None else add_rms_norm(x, sums, self.norm, eps, dtype)[0]

    @property
    def _normed_dtype(self) -> torch.dtype:
        """What products that read a norm read and write. In training, low-rank updates meet what is not rounded."""
        return self.compute_dtype if torch.is_grad_enabled() else self.product_dtype

    def _layer(
        self,
        i: int,
        batch: PackedBatch | PagedBatch,
        rotation: tuple[Tensor, Tensor],
        lora: LoraBatch | None,
        recompute: str,
        x: Tensor,
        residual: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """One layer: (what it adds, what it adds it to), both [T, D]; residual None before the first."""
        layer, eps, dtype = self.layers[i], self.config.rms_norm_eps, self._normed_dtype
        if residual is None:
            normed, residual = rms_norm(x, layer.input_norm, eps, dtype), x
        else:
            normed, residual = add_rms_norm(x, residual, layer.input_norm, eps, dtype)
        x = self._attention(i, normed, batch, rotation, lora)
        normed, residual = add_rms_norm(x, residual, layer.post_attention_norm, eps, dtype)
        return self._mlp(i, lora, normed, recompute == "mlp"), residual

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [N, D] -> [N, V] float32, which no product rounds to fewer bits: as in `token_logprobs`."""
        return frozen_linear(hidden, self.lm_head, None, self.batch_invariant, torch.float32)

    def token_logprobs(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """log p(targets[n] | hidden[n]), [N] float32, for hidden [N, D] and targets [N] int64; differentiable."""
        if not self.batch_invariant:
            return token_logprobs(hidden, self.lm_head, targets)
        padding = (-len(targets) % INVARIANT_ROWS,)
        hidden = torch.cat([hidden, hidden.new_zeros(*padding, hidden.shape[1])])
        targets = torch.cat([targets, targets.new_zeros(padding)])
        tiles = zip(hidden.split(INVARIANT_ROWS), targets.split(INVARIANT_ROWS), strict=True)
        return torch.cat([token_logprobs(h, self.lm_head, t) for h, t in tiles])[: len(targets) - padding[0]]

    def soft_target_logprobs(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """(sums [N], log-probabilities [N, K]) of ids [N, K] under weights [N, K]; the sums are differentiable."""
        if not self.batch_invariant or not len(ids):
            return soft_target_logprobs(hidden, self.lm_head, ids, weights)
        padding = (0, 0, 0, -len(ids) % INVARIANT_ROWS)
        padded = [torch.nn.functional.pad(x, padding).split(INVARIANT_ROWS) for x in (hidden, ids, weights)]
        tiles = [soft_target_logprobs(h, self.lm_head, i, w) for h, i, w in zip(*padded, strict=True)]
        return torch.cat([s for s, _ in tiles])[: len(ids)], torch.cat([p for _, p in tiles])[: len(ids)]

    def _rotation(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions [T] -> cos, sin [T, E / 2], float32."""
        angles = positions[:, None] * self.inverse_frequencies
        scale = self.config.rope.attention_factor
        cos, sin = angles.cos(), angles.sin()
        return (cos, sin) if scale == 1 else (cos * scale, sin * scale)

    def _attention(
        self,
        i: int,
        x: Tensor,
        batch: PackedBatch | PagedBatch,
        rotation: tuple[Tensor, Tensor],
        lora: LoraBatch | None,
    ) -> Tensor:
        c, layer, T, E = self.config, self.layers[i], len(x), self.config.head_dim
        qkv = self._project(x, layer.qkv, layer.qkv_bias, lora, i, ProjectionGroup.QKV)  # [T, (H + 2 K) E]
        heads = qkv.view(T, -1, E)  # [T, H + 2 K, E]
        q, k, v = heads.split([c.num_attention_heads, c.num_key_value_heads, c.num_key_value_heads], dim=1)
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = rms_norm(q, layer.q_norm, c.rms_norm_eps), rms_norm(k, layer.k_norm, c.rms_norm_eps)
        q, k = rotary(q, k, *rotation)
        window, batch_invariant = layer.window, self.batch_invariant
        if isinstance(batch, PackedBatch):
            lengths = batch.cu_seqlens, batch.max_seqlen
            out = attention(q, k, v, *lengths, window=window, batch_invariant=batch_invariant)  # [T, H, E]
        else:
            out = self._paged_attention(i, q, k, v, batch)
        return self._project(out.view(T, -1), layer.o, layer.o_bias, lora, i, ProjectionGroup.O)

    def _paged_attention(self, i: int, q: Tensor, k: Tensor, v: Tensor, batch: PagedBatch) -> Tensor:
        """[T, H, E]; the K/V of all tokens are written on the way."""
        decoded = [(rows.tokens, contiguous_attention(q, k, v, i, rows)) for rows in batch.decoding]
        if decoded and decoded[0][0] is None:  # these are all rows
            return decoded[0][1]
        if sum(len(part) for _, part in decoded) == len(q):
            out = q.new_empty(q.shape)
        else:
            keys, values = batch.keys[i], batch.values[i]
            write_kv(k, v, keys, values, batch.slot_mapping)
            places = batch.block_tables, batch.cu_seqlens, batch.context_lens, batch.max_query, batch.max_context
            options = {"batch_invariant": self.batch_invariant, "shared": batch.shared}
            out = paged_attention(q, keys, values, *places, window=self.layers[i].window, **options)
        for tokens, part in decoded:
            assert tokens is not None, "only one arena has all rows"
            out.index_copy_(0, tokens, part)
        return out

    def _mlp(self, i: int, lora: LoraBatch | None, x: Tensor, recompute: bool) -> Tensor:
        activate, down = partial(self._activate, i, lora), partial(self._down, i, lora, dtype=x.dtype)
        if not recompute:
            return down(activate(x))
        # A frozen product keeps nothing for backward and need not be made again; one with an adapter keeps its input.
        if lora is not None and (i, ProjectionGroup.DOWN) in lora.groups:
            return _checkpoint(lambda x: down(activate(x)), x)
        return down(_checkpoint(activate, x))

    def _activate(self, i: int, lora: LoraBatch | None, x: Tensor) -> Tensor:
        group, weight, bias = ProjectionGroup.GATE_UP, self.layers[i].gate_up, self.layers[i].gate_up_bias
        unadapted = lora is None or (lora.observe is None and (i, group) not in lora.groups)
        may_fuse = unadapted and not self.batch_invariant and not torch.is_grad_enabled()
        if may_fuse and isinstance(weight, Tensor) and fuses_swiglu(x, weight):
            return packed_swiglu(x, weight, bias)
        gate_up = self._project(x, weight, bias, lora, i, group, self.product_dtype)  # [T, 2 F]
        return swiglu(gate_up, batch_invariant=self.batch_invariant)  # [T, F]

    def _down(self, i: int, lora: LoraBatch | None, activated: Tensor, dtype: torch.dtype) -> Tensor:
        layer = self.layers[i]
        return self._project(activated, layer.down, layer.down_bias, lora, i, ProjectionGroup.DOWN, dtype)

    def _project(
        self,
        x: Tensor,
        weight: FrozenWeight,
        bias: Tensor | None,
        lora: LoraBatch | None,
        layer: int,
        group: ProjectionGroup,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """The product with a group's matrix, with its adapters if it has any, in dtype or x's."""
        if lora is not None and lora.observe is not None:
            lora.observe(layer, group, x)
        if lora is None or (layer, group) not in lora.groups:
            return frozen_linear(x, weight, bias, self.batch_invariant, dtype)
        return lora_linear(x, weight, bias, lora.groups[layer, group], lora.anchor, self.batch_invariant, dtype)
