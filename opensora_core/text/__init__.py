"""Prompts: the sentences Open-Sora adds to them, and the two text encoders of the command line."""
