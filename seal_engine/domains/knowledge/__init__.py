"""Learning new facts from a passage."""
