"""What turns frames into latents and back: one folder, or file, a kind of autoencoder."""
