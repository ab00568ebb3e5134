"""What a checkpoint and its adapters are, and one forward pass over packed tokens."""
