"""T5 and CLIP, from files to hidden states."""
