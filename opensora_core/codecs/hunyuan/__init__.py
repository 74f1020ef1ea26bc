"""The causal 3D VAE: frames to latents and back, whole or in upstream's overlapping tiles."""
