"""In Triton's interpreter: bfloat16 as a GPU computes it, and twice the speed."""

from seal_kernels.dispatch import INTERPRET

if INTERPRET:
    from gpu import interpreter_bfloat16, interpreter_speed

    interpreter_bfloat16.install()
    interpreter_speed.install()
