import pytest
import torch

from compare import DEVICE, DTYPES, relative_error, run
from gates import SM, compiles, gate
from seal_kernels.dispatch import INTERPRET
from seal_kernels.linear import frozen_linear
from seal_kernels.quantized_linear import (
    KINDS,
    NF4,
    QuantizedWeight,
    WeightFormat,
    dequantize_kernel,
    launch_config,
    quantized_linear,
    quantized_linear_kernel,
    quantized_linear_ref,
)

FORMATS = [WeightFormat("int8"), WeightFormat("fp8"), WeightFormat("fp8", 128), WeightFormat("nf4", 64)]
names = lambda form: f"{form.kind}-{form.group or 'row'}"  # noqa: E731


def random_weight(form: WeightFormat, O: int, I: int, dtype: torch.dtype) -> QuantizedWeight:
    """Every code that there is, but for NaN, and scales that bfloat16 holds."""
    weight = QuantizedWeight.empty(form, O, I, dtype, DEVICE)
    codes = (
        torch.randint(-127, 128, weight.codes.shape)
        if form.kind == "int8"
        else torch.randint(0, 256, weight.codes.shape)
    )
    if form.kind == "fp8":
        codes[(codes & 0x7F) == 0x7F] = 3
    weight.codes.copy_(codes)
    weight.scales.copy_((torch.rand(weight.scales.shape) + 0.5).bfloat16() / (100 if form.kind == "int8" else 1))
    return weight


def decoded_by_hand(weight: QuantizedWeight) -> torch.Tensor:
    """W [O, I] float64 from the formats' definitions, a bit at a time."""
    codes, (O, I) = weight.codes.cpu().int(), weight.shape
    if weight.format.kind == "nf4":
        numbers = torch.stack([codes >> 4, codes & 15], 2).view(O, -1)[:, :I]
        codes = torch.tensor(NF4, dtype=torch.float64)[numbers.long()]
    elif weight.format.kind == "fp8":
        exponent, mantissa = (codes >> 3) & 15, (codes & 7).double()
        magnitude = torch.where(exponent > 0, (8 + mantissa) * 2.0 ** (exponent - 10), mantissa * 2.0**-9)
        codes = torch.where(codes > 127, -magnitude, magnitude)
    groups = torch.arange(I) // (weight.format.group or I)
    return codes.double() * weight.scales.cpu().double()[:, groups]


@pytest.mark.parametrize("form", FORMATS, ids=names)
@pytest.mark.parametrize(
    ("T", "I", "O"),
    [
        pytest.param(1, 64, 8, id="one row"),
        pytest.param(5, 192, 40, id="few rows"),
        pytest.param(33, 200, 72, id="blocks cut at the end of a row"),
        pytest.param(70, 130, 33, id="odd numbers of outputs"),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantized_linear_equals_reference(form, T, I, O, dtype):
    """The truth is float64 arithmetic on the codes. float32 within 1e-5; 16 bits round x, W, y and dx, once each."""
    torch.manual_seed(0)
    weight = random_weight(form, O, I, dtype)
    x, dy, bias = (torch.randn(*shape).to(DEVICE, dtype) for shape in ((T, I), (T, O), (O,)))
    y, dx = run(lambda x: quantized_linear(x, weight, bias), [x], [dy])
    assert (y.dtype, dx.dtype) == (dtype, dtype)
    truth = decoded_by_hand(weight)
    bound = {torch.float32: 1e-5, torch.float16: 2**-9, torch.bfloat16: 2**-6}[dtype]
    assert relative_error(y, x.cpu().double() @ truth.T + bias.cpu().double()) < bound
    assert relative_error(dx, dy.cpu().double() @ truth) < bound
    assert (
        relative_error(quantized_linear_ref(x.double(), weight, bias), x.cpu().double() @ truth.T + bias.cpu()) < bound
    )


@pytest.mark.parametrize("form", FORMATS, ids=names)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_and_backward_multiply_by_the_same_numbers(form, dtype):
    """Rows of the identity read W out of either product: bit for bit the same, and `dequantize` says which.

    A scale per output is applied after the product, rounded once more in 16 bits.
    """
    torch.manual_seed(1)
    weight = random_weight(form, 48, 136, dtype)
    by_inputs = run(
        lambda x: quantized_linear(x, weight),
        [torch.eye(136, device=DEVICE, dtype=dtype)],
        [torch.zeros(136, 48, device=DEVICE)],
    )[0].T
    by_outputs = run(
        lambda x: quantized_linear(x, weight),
        [torch.zeros(48, 136, device=DEVICE, dtype=dtype)],
        [torch.eye(48, device=DEVICE)],
    )[1]
    bound = 1e-7 if dtype == torch.float32 else 2**-8 if weight.scales_outputs else 1e-9
    assert relative_error(by_inputs, weight.dequantize()) < bound
    assert relative_error(by_outputs, weight.dequantize()) < bound


@pytest.mark.skipif(DEVICE.type == "cuda" or INTERPRET, reason="a promise of the CPU")
@pytest.mark.parametrize("form", FORMATS, ids=names)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_batch_invariant_rows_bits_depend_on_the_row_alone(form, dtype):
    torch.manual_seed(2)
    weight = random_weight(form, 1009, 576, dtype)
    x, dy = torch.randn(200, 576), torch.randn(200, 1009)

    def both(rows):
        return run(lambda x: quantized_linear(x, weight, None, batch_invariant=True), [x[rows]], [dy[rows]])

    y, dx = both(slice(None))
    for rows in (slice(7, 8), slice(3, 23), slice(100, 189)):
        y_part, dx_part = both(rows)
        assert torch.equal(y_part, y[rows])
        assert torch.equal(dx_part, dx[rows])


def test_rows_are_split_as_a_tensors_are():
    weight = random_weight(WeightFormat("nf4", 64), 24, 128, torch.float32)
    parts = weight.split([8, 16])
    assert [part.shape for part in parts] == [(8, 128), (16, 128)]
    assert torch.equal(torch.cat([part.dequantize() for part in parts]), weight.dequantize())


@pytest.mark.parametrize("form", FORMATS, ids=names)
def test_bytes(form):
    """int8 has a byte and 4 per row, fp8 in blocks of 128 a 32nd more, nf4 half a byte and a 16th."""
    weight = QuantizedWeight.empty(form, 256, 512, torch.bfloat16, DEVICE)
    per_weight = {
        ("int8", None): 1 + 4 / 512,
        ("fp8", None): 1 + 4 / 512,
        ("fp8", 128): 1 + 4 / 128,
        ("nf4", 64): 0.5 + 4 / 64,
    }
    assert weight.nbytes == form.nbytes(256, 512) == 256 * 512 * per_weight[form]


def test_no_rows_and_wrong_shapes():
    weight = random_weight(WeightFormat("int8"), 8, 64, torch.float32)
    assert frozen_linear(torch.zeros(0, 64, device=DEVICE), weight).shape == (0, 8)
    with pytest.raises(ValueError, match="weight is"):
        quantized_linear(torch.zeros(2, 3, device=DEVICE), weight)


@compiles
@pytest.mark.parametrize(("sm", "dtype"), [(80, torch.float32), *((sm, torch.bfloat16) for sm in SM)])
@pytest.mark.parametrize("form", FORMATS, ids=names)
def test_compile_gate(sm, form, dtype):
    """A projection of a 7B model, for decoding 16 sequences."""
    group = form.group or 3584
    sizes = {"O": 18944, "I": 3584, "G": 3584 // group, "group": group, "stride_codes": 3584}
    constants = {"KIND": KINDS.index(form.kind), "GROUPED": form.group is not None}
    pointers = {
        "codes_ptr": torch.int8 if form.kind == "int8" else torch.uint8,
        "scales_ptr": torch.float32,
        "table_ptr": torch.float32,
    }
    options = launch_config("dequantize", dtype).options()
    gate(dequantize_kernel, sm, {**pointers, "out_ptr": dtype, **sizes, **constants, **options})
    options = launch_config("product", dtype).options()
    args = {"x_ptr": dtype, **pointers, "y_ptr": dtype, "T": 16, **sizes, "stride_x": 3584}
    gate(quantized_linear_kernel, sm, {**args, **constants, **options})
