"""A quantised base on a CUDA device that is pretended: the kernels of decoding and of large passes, beside the CPU."""

import pytest
import torch

from compare import relative_error
from gpu.pretended_cuda import PretendedCuda
from gpu.test_pretended_cuda import make_model
from seal_engine import Engine, LoraConfig, SamplingParams
from seal_engine.model.quantize import FORMATS, encode
from seal_engine.model.transformer import Model
from seal_engine.training.jobs import Datum
from seal_kernels.dispatch import INTERPRET
from seal_kernels.quantized_linear import FUSED_ROWS, QuantizedWeight

pytestmark = [
    pytest.mark.skipif(not INTERPRET, reason="kernels run in Triton's interpreter: TRITON_INTERPRET=1"),
    pytest.mark.xdist_group("pretended CUDA, quantised"),  # one process has the device
]


@pytest.fixture(scope="module")
def device():
    with PretendedCuda() as device:
        yield device


def quantized_engine(where: str, quantize: str) -> Engine:
    """The same codes on either device."""
    floats = make_model(1, "cpu")
    model = Model(floats.config, torch.float32, torch.device(where), FORMATS[quantize])
    for (_, tensor), (_, values) in zip(model.named_tensors(), floats.named_tensors(), strict=True):
        if isinstance(tensor, QuantizedWeight):
            codes, scales = encode(values, FORMATS[quantize])
            tensor.codes.copy_(codes)
            tensor.scales.copy_(scales)
        else:
            tensor.copy_(values)
    return Engine(model)


@pytest.mark.parametrize("quantize", ["int8", "nf4"])
def test_generation_and_gradients_equal_the_cpus(device, quantize):
    """In float32, where only the order of sums differs. A training pass of more rows than the fused product takes."""
    ids = torch.randint(5, (FUSED_ROWS + 1,), generator=torch.Generator().manual_seed(1)).tolist()
    outcomes = []
    for where in ("cpu", "cuda"):
        engine = quantized_engine(where, quantize)
        adapter = engine.create_adapter(LoraConfig(r=4, target_modules="all-linear"))
        adapter.params.copy_(torch.randn(adapter.params.shape, generator=torch.Generator().manual_seed(0)) / 10)
        params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True, logprobs=0)
        outputs = engine.generate([ids[:5], ids[5:8]], params, [adapter, None], progress=False)
        engine.forward_backward([Datum(adapter, ids)])
        completions = [output.outputs[0] for output in outputs]
        logprobs = torch.tensor([completion.logprobs for completion in completions])
        outcomes.append(([completion.token_ids for completion in completions], logprobs, adapter.grads))
    (tokens, logprobs, grads), (gpu_tokens, gpu_logprobs, gpu_grads) = outcomes
    assert gpu_tokens == tokens
    assert relative_error(gpu_logprobs, logprobs) < 1e-5
    assert relative_error(gpu_grads, grads) < 1e-5
