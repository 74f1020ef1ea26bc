"""Text to picture with Flux.1, the first half of text to picture to video."""
