"""Where weights and activations live, what they take, and what is done when it is too much."""
