"""The Open-Sora 2.0 transformer (a Flux-style MMDiT over video latents)."""
