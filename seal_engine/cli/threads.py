"""How OpenMP's threads wait for each other, which is read once, when torch is loaded.

Between two parallel regions threads spin for milliseconds, as if no other process needed the core. Beside a busy
process the engine is then 17 to 50 times slower; docs/decisions.md has the measurements.
"""

import os
import time
from pathlib import Path

# Turns of a loop. Some 10 microseconds, as long as the pause between two small kernels, cost little beside others; on a
# machine without others ten times as long costs less, and a process that comes later costs a factor of 4, not of 17.
SPIN_COUNT_BESIDE_OTHERS = 1_000
SPIN_COUNT_ALONE = 10_000
WAIT_VARIABLES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


def limit_spinning() -> None:
    """Let waiting threads sleep after a short spin, unless the user has set one of WAIT_VARIABLES."""
    if not any(name in os.environ for name in WAIT_VARIABLES):
        count = SPIN_COUNT_BESIDE_OTHERS if others_need_cores() else SPIN_COUNT_ALONE
        os.environ["GOMP_SPINCOUNT"] = str(count)


def others_need_cores(samples: int = 5, pause: float = 0.002) -> bool:
    """Whether other threads than this one leave fewer cores idle than this process may use, in most samples.

    Linux counts the threads that run or could run now, on all cores of the machine. False where it does not say.
    """
    cores, usable = os.cpu_count() or 1, len(os.sched_getaffinity(0))
    crowded = 0
    for _ in range(samples):
        try:
            running = int(Path("/proc/loadavg").read_text().split()[3].split("/")[0])
        except (OSError, ValueError, IndexError):
            return False
        crowded += cores - (running - 1) < usable
        time.sleep(pause)
    return crowded > samples // 2
