"""The causal 3D VAE: frames to latents and back, whole or in the reference's overlapping tiles."""
