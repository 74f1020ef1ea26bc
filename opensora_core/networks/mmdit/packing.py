"""Latents to tokens and back: token order t, h, w; inside a token channel slowest, then patch row, patch column."""

from einops import rearrange
from torch import Tensor

from ...errors import OpenSoraError


def pack(latents: Tensor, patch_size: int) -> Tensor:
    """[B, C, T, H, W] -> [B, T * H/p * W/p, C * p * p].

    Raises:
        OpenSoraError: H or W is not a multiple of the patch.
    Source: hpcaitech/Open-Sora@7ad6a96a opensora/utils/sampling.py, pack.
    """
    height, width = latents.shape[-2:]
    if height % patch_size or width % patch_size:
        raise OpenSoraError(
            f"A latent of {height}x{width} cannot be cut into patches of {patch_size}; both sides must be multiples of {patch_size} "
            f"(in pixels: multiples of {8 * patch_size})."
        )
    return rearrange(latents, "b c t (h ph) (w pw) -> b (t h w) (c ph pw)", ph=patch_size, pw=patch_size)


def unpack(tokens: Tensor, latent_frames: int, latent_height: int, latent_width: int, patch_size: int) -> Tensor:
    """Exact inverse of pack: [B, L, C * p * p] -> [B, C, T, H, W]."""
    return rearrange(
        tokens,
        "b (t h w) (c ph pw) -> b c t (h ph) (w pw)",
        t=latent_frames,
        h=latent_height // patch_size,
        w=latent_width // patch_size,
        ph=patch_size,
        pw=patch_size,
    )
