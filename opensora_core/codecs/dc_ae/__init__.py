"""The Video DC-AE of the high-compression variant of Open-Sora 2.0: 4 frames and 32x32 pixels to one latent of 128 channels."""
