"""What a round of the knowledge task should take on a GPU: a forecast, to be held against a run."""
