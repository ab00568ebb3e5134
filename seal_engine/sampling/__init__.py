"""Requests to completions, over a paged K/V cache."""
