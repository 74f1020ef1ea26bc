"""Weight files: what a file is, whether it is whole, and how it becomes a model."""
