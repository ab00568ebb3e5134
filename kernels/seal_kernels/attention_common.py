"""What attention.py and paged_attention.py share: a step of the softmax, and settings and arguments of launches."""

import math
from typing import Any

import torch

from seal_kernels.dispatch import LaunchConfig, block_size, tl, triton

LOG2_E = math.log2(math.e)  # the kernels' exponentials are powers of two


@triton.jit
def online_softmax(m_i, score, scale2, MAY_SEE_NOTHING: tl.constexpr):
    """(p, alpha, m_i) of one more block of keys: p = 2^(score - m_i), the factor alpha that rescales the sums made with
    the last m_i, and the largest score m_i so far."""
    m_new = tl.maximum(m_i, tl.max(score, axis=1) * scale2)  # [BM]
    base = m_new
    if MAY_SEE_NOTHING:
        base = tl.where(m_new == float("-inf"), 0.0, m_new)  # a query that sees no key so far
    p = tl.math.exp2(score * scale2 - base[:, None])  # [BM, BN]
    alpha = tl.math.exp2(m_i - base)  # [BM]
    return p, alpha, m_new


def _tiles(M: int, N: int, num_warps: int, num_stages: int) -> LaunchConfig:
    """A program has M queries (for a prefill, pairs of a query and a head) and takes N keys at a time."""
    return LaunchConfig({"BLOCK_M": M, "BLOCK_N": N}, num_warps, num_stages)


# For heads of up to 64, 128 and 256 elements: tiles as large as they can be without spilling registers. float32 takes
# no tensor cores, so as to be exact: its blocks are held and multiplied in registers. "prefill" has more stages than
# "forward": the number of a cache block is loaded some stages before its keys are.
_FLOAT32 = {
    "forward": (_tiles(32, 32, 4, 1), _tiles(32, 32, 8, 1), _tiles(16, 16, 8, 1)),
    "dkdv": (_tiles(32, 32, 8, 1), _tiles(16, 32, 8, 1), _tiles(16, 16, 8, 1)),
    "dq": (_tiles(32, 32, 8, 1), _tiles(16, 32, 8, 1), _tiles(32, 32, 16, 1)),
    "prefill": (_tiles(32, 32, 4, 1), _tiles(32, 32, 8, 1), _tiles(32, 32, 16, 1)),
}
_AMPERE = {
    "forward": (_tiles(128, 64, 8, 3), _tiles(128, 32, 8, 2), _tiles(64, 32, 8, 2)),
    "dkdv": (_tiles(64, 128, 8, 2), _tiles(64, 64, 8, 2), _tiles(32, 64, 8, 2)),
    "dq": (_tiles(128, 64, 8, 2), _tiles(64, 64, 8, 2), _tiles(64, 32, 8, 2)),
    "prefill": (_tiles(128, 64, 8, 3), _tiles(64, 64, 8, 3), _tiles(64, 32, 8, 3)),
}
# Hopper's matrix instructions take 64 rows for each 4 warps. Most sequences of an inner loop are shorter than that: on
# an H100, tiles of 64 queries (of 128: 55 tokens take 1.6 times as long, 2048 tokens 0.87 times) and, for dk and dv, of
# 32 queries and 64 keys (of 64 and 128: 1.2 and 0.96 times).
_HOPPER = {
    "forward": (_tiles(64, 64, 4, 2), _tiles(64, 64, 4, 2), _tiles(128, 32, 8, 2)),
    "dkdv": (_tiles(32, 64, 4, 1), _tiles(32, 64, 4, 2), _tiles(32, 32, 8, 2)),  # 256 elements would spill in 64 rows
    "dq": (_tiles(64, 64, 4, 2), _tiles(64, 32, 4, 2), _tiles(64, 32, 8, 2)),
    "prefill": (_tiles(128, 64, 8, 5), _tiles(128, 64, 8, 5), _tiles(64, 32, 8, 3)),
}


def head_block(E: int) -> int:
    """BLOCK_E, the width of a tile that covers heads of E elements."""
    return max(16, block_size(E))


def launch_config(
    kernel_name: str, E: int, dtype: torch.dtype, capability: tuple[int, int] = (0, 0), group: int = 1
) -> LaunchConfig:
    """Settings of a kernel: "forward", "delta", "dkdv" and "dq" of attention.py, "write", "prefill", "decode" and
    "combine" of paged_attention.py. group: query heads per key head. BLOCK_E, head_block(E), is no setting."""
    block, is_float32 = head_block(E), dtype == torch.float32
    if kernel_name == "delta":
        return LaunchConfig({"BLOCK_M": 4096 // block}, num_warps=4)
    if kernel_name == "write":
        return LaunchConfig({"BLOCK_R": 4096 // block}, num_warps=4)
    if kernel_name == "combine":
        return LaunchConfig({"BLOCK_S": 16}, num_warps=2)
    if kernel_name == "decode":
        heads, keys = max(16, block_size(group)), 32 if block > 128 else 64
        blocks = {"BLOCK_G": heads, "BLOCK_N": keys // 2 if is_float32 else keys}
        return LaunchConfig(blocks, num_warps=min(heads // 4, 16), num_stages=1 if is_float32 else 5)
    if is_float32:
        up_to_64, up_to_128, up_to_256 = _FLOAT32[kernel_name]
    elif capability >= (9, 0):
        up_to_64, up_to_128, up_to_256 = _HOPPER[kernel_name]
    else:
        up_to_64, up_to_128, up_to_256 = _AMPERE[kernel_name]
    if block <= 64:
        return up_to_64
    return up_to_128 if block <= 128 else up_to_256


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device; a stand-in where there is none (the interpreter)."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


def common_arguments(E: int, group: int, scale: float, window: int | None) -> dict[str, Any]:
    """Arguments of every kernel that makes scores. group: query heads per key head."""
    sizes = {"group": group, "window": window or 0, "scale2": scale * LOG2_E}
    return sizes | {"HAS_WINDOW": window is not None, "E": E, "BLOCK_E": head_block(E)}
