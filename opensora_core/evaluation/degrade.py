"""What a VAE may leave of a clip: blur and noise, to try the computer vision on before it judges anything."""

import torch
import torch.nn.functional as F
from torch import Tensor

# (blur in pixels, noise): none, either, both, and worse than any VAE that is worth judging. About 38, 28, 27 and 25 dB.
DEGREES = ((0.0, 0.0), (1.0, 0.0), (0.0, 0.04), (1.2, 0.04), (1.5, 0.05))

_REACH = 5  # pixels; three standard deviations of the widest blur


def degraded(clip: Tensor, blur: float, noise: float, seed: int) -> Tensor:
    """A Gaussian blur within frames, noise on every value, 8 bits: [T, H, W, 3] uint8.

    clip: [T, H, W, 3] in 0..1. blur, noise: standard deviations, in pixels and in units of the range.
    """
    frames, height, width, _ = clip.shape
    if blur:
        taps = torch.exp(-torch.arange(-_REACH, _REACH + 1.0).square() / (2 * blur**2))
        taps = taps / taps.sum()
        planes = F.pad(clip.permute(0, 3, 1, 2).reshape(-1, 1, height, width), (_REACH,) * 4, mode="replicate")
        planes = F.conv2d(F.conv2d(planes, taps.view(1, 1, -1, 1)), taps.view(1, 1, 1, -1))
        clip = planes.view(frames, 3, height, width).permute(0, 2, 3, 1)
    clip = clip + noise * torch.randn(clip.shape, generator=torch.Generator().manual_seed(seed))
    return (clip.clamp(0, 1) * 255).round().to(torch.uint8)
