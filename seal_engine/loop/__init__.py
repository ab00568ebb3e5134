"""SEAL, whatever the task: the inner loop, the outer loop, and what a run has done so far."""
