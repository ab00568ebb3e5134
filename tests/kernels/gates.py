"""Compiles kernels ahead of time for GPUs that are not here, and reads what the compiler made of them.

Each test_<kernel>.py lists its kernels' arguments as they are launched and calls `gate`. Runs without a GPU; skipped
under TRITON_INTERPRET=1, where kernels are not compilable objects.
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from seal_kernels.dispatch import INTERPRET

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
SM = sorted(SHARED_LIMIT)
GATE_DTYPES = [torch.float32, torch.bfloat16]
ATTENTION_CASES = [  # E, sm, window, dtype
    pytest.param(128, 80, None, torch.float32, id="128-sm80-float32"),
    pytest.param(256, 90, 1024, torch.float32, id="256-sm90-window-float32"),
    pytest.param(64, 100, None, torch.float32, id="64-sm100-float32"),
    pytest.param(128, 80, None, torch.bfloat16, id="128-sm80-bfloat16"),
    pytest.param(64, 90, None, torch.bfloat16, id="64-sm90-bfloat16"),
    pytest.param(128, 90, None, torch.bfloat16, id="128-sm90-bfloat16"),
    pytest.param(256, 90, 1024, torch.bfloat16, id="256-sm90-window-bfloat16"),
    pytest.param(128, 100, None, torch.bfloat16, id="128-sm100-bfloat16"),
]
TRITON_NAMES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.uint8: "u8",
    torch.int8: "i8",
}

compiles = pytest.mark.skipif(INTERPRET, reason="compile gates need compilable kernels: run without TRITON_INTERPRET")


@dataclass(frozen=True)
class Compiled:
    registers: int
    stack: int  # bytes; spilled registers appear here
    shared: int  # bytes
    sass: str


def compile_kernel(kernel, sm: int, args: dict, disassemble: bool = False) -> Compiled:
    """Compile `kernel` for compute capability sm / 10 as the launch `kernel[grid](**args)` would.

    args: a torch.dtype stands for a pointer to that dtype (aligned to 16 bytes), an int or float for a scalar of
    that type (an int divisible by 16 is specialised so, as the launcher does), a constexpr for itself; `num_warps`
    and `num_stages` are options. disassemble: fill `sass` too, which takes as long as compiling.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    args = dict(args)
    options = {k: args.pop(k) for k in ("num_warps", "num_stages", "maxnreg") if k in args}
    signature, constexprs, attrs = {}, {}, {}
    for i, param in enumerate(kernel.params):
        value = args.pop(param.name)
        if param.is_constexpr or value is None or value is True or value is False:
            signature[param.name] = "constexpr"
            constexprs[(i,)] = value
        elif isinstance(value, torch.dtype):
            signature[param.name] = "*" + TRITON_NAMES[value]
            attrs[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, int):
            signature[param.name] = "i32"
            if value == 1:
                signature[param.name], constexprs[(i,)] = "constexpr", 1
            elif value % 16 == 0:
                attrs[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[param.name] = "fp32"
    assert not args, f"{kernel.__name__} has no arguments {sorted(args)}"
    source = ASTSource(kernel, signature, constexprs, attrs)
    compiled = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)
    usage = _cuobjdump(compiled, "-res-usage")
    registers, stack = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK"))  # pyright: ignore
    return Compiled(registers, stack, compiled.metadata.shared, _cuobjdump(compiled, "-sass") if disassemble else "")


def _cuobjdump(compiled, option: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        return subprocess.run([tool, option, cubin.name], capture_output=True, text=True, check=True).stdout


def gate(kernel, sm: int, args: dict, hopper_matrix: bool = False, disassemble: bool = False) -> Compiled:
    """Assert that the kernel builds for sm, does not spill, and fits shared memory.

    hopper_matrix: on sm_90 it must also use the Hopper matrix instructions (HGMMA) and no slower ones (HMMA).
    """
    made = compile_kernel(kernel, sm, args, disassemble or (hopper_matrix and sm == 90))
    if sm == 90 and torch.bfloat16 in args.values():
        # Triton turns arguments that are 1 into constants of another type: one token, one head must build as well.
        constants = {param.name for param in kernel.params if param.is_constexpr} | {"num_warps", "num_stages"}
        ones = {k: 1 if type(v) is int and k not in constants else v for k, v in args.items()}
        compile_kernel(kernel, sm, ones)
    assert made.stack == 0, f"sm_{sm}: {made.stack} bytes of stack: registers spill"
    assert made.shared <= SHARED_LIMIT[sm], f"sm_{sm}: {made.shared} bytes of shared memory"
    if hopper_matrix and sm == 90:
        assert "HGMMA" in made.sass, "sm_90: no HGMMA instruction"
        assert not re.search(r"\bHMMA", made.sass), "sm_90: some products take the slower HMMA instructions"
    return made
