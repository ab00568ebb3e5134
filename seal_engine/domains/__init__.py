"""What a self-adapting model is trained and judged on."""
