"""Videos, pictures and latents on disk."""
