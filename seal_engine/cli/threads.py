"""How OpenMP's threads wait for each other, which is read once, when torch is loaded.

Between two parallel regions threads spin for milliseconds, as if no other process needed the core. Beside a busy
process the engine is then 17 to 50 times slower; docs/decisions.md has the measurements.
"""

import os

SPIN_COUNT = 1000  # some 10 microseconds: as long as the pause between two small kernels
WAIT_VARIABLES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


def limit_spinning() -> None:
    """Let waiting threads sleep after a short spin, unless the user has set one of WAIT_VARIABLES."""
    if not any(name in os.environ for name in WAIT_VARIABLES):
        os.environ["GOMP_SPINCOUNT"] = str(SPIN_COUNT)
