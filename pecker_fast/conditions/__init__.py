"""What to forget, what to draw in its place, what to keep: classes and prompts."""
