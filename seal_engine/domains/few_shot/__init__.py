"""Solving new puzzles (ARC) from a few examples."""
