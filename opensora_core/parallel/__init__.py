"""Several processes that make one video together, each on a GPU of its own."""
