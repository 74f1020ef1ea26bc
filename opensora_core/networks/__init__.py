"""One folder a network; none imports another."""
