"""A real language model of 135M parameters learns real passages: its task, its passages and its prompts."""
