"""`colours`: what turns a VAE's latents into the colours of a preview, kept beside the VAE, where ComfyUI's previews look (nodes/host/preview.py)."""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, interpolate, pad

from ..checkpoint.load import open_model
from ..geometry import Grid
from ..names import complete_or_absent
from ..run.parts import open_vae
from .options import DONE, ColoursOptions
from .output import check_writable, report_path
from .progress import Bar

SUFFIX = ".colours.json"
PICTURES, SECONDS = 48, 60  # pictures that are encoded; after so long a time no more are, if there are enough
_FRAMES = 9  # of a still clip, or as near as the VAE counts
_PATTERNS = (2, 3, 5, 8, 13, 21)  # colours across a picture


def run(options: ColoursOptions) -> int:
    """Fit and keep; the file's path goes to standard output."""
    path = Path(options.vae).expanduser()
    _, identity = open_model(path, "vae")
    named = path / "vae" if path.is_dir() else path
    target = report_path("--out", options.out) if options.out else named.with_name(named.stem + SUFFIX)
    check_writable(target.parent, target.name)
    factors, bias, error = fit(open_vae(path, options.device).encode, identity.config.grid)
    held = {"codec": identity.kind, "factors": factors, "bias": bias, "error": round(error, 4)}
    with complete_or_absent(target) as partial:
        partial.write_text(json.dumps(held) + "\n", encoding="utf-8")
    sys.stderr.write(f"root mean square error {error:.3f} of -1..1\n")
    sys.stdout.write(f"{target}\n")
    return DONE


@torch.inference_mode()
def fit(encode: Callable[[Tensor], Tensor], grid: Grid) -> tuple[list, list, float]:
    """Least squares from each latent pixel of still clips to the mean colour of the pixels that it stands for.

    encode: images [T, H, W, 3] in 0..1 -> latents [1, C, t, h, w] in the transformer's scale.
    Returns factors [C, 3] and bias [3] that give -1..1, rounded, and the root mean square error on pictures that were kept apart.
    """
    draw = torch.Generator().manual_seed(0)
    side, frames = max(8 * grid.space, 128), grid.frames.nearest(_FRAMES)
    pairs, began = [], time.monotonic()  # of each picture: latents, each with a one behind it, [places, C + 1], and colours [places, 3]
    for number in Bar(range(PICTURES), unit="picture"):
        colours = _PATTERNS[number % len(_PATTERNS)]  # of fields, sharp or running into each other
        fields = ((torch.rand(1, 3, colours, colours, generator=draw) - 0.5) * 1.6 + 0.5).clamp(0, 1)
        picture = interpolate(fields, (side, side), mode="nearest" if torch.rand((), generator=draw) < 0.5 else "bilinear")[0]
        latents = encode(picture.movedim(0, -1).expand(frames, side, side, 3)).cpu()[0]
        colour = adaptive_avg_pool2d(picture * 2 - 1, latents.shape[-2:])[:, None].expand(-1, latents.shape[1], -1, -1)
        pairs.append((pad(latents.flatten(1).T.double(), (0, 1), value=1), colour.flatten(1).T.double()))
        if time.monotonic() - began > SECONDS and len(pairs) * len(pairs[0][0]) > 4 * len(latents):
            break
    apart = max(1, len(pairs) // 8)
    x, y = map(torch.stack, zip(*pairs, strict=True))
    solution = torch.linalg.lstsq(x[apart:].flatten(0, 1), y[apart:].flatten(0, 1)).solution
    error = (x[:apart] @ solution - y[:apart]).square().mean().sqrt()
    *factors, bias = torch.round(solution, decimals=5).tolist()
    return factors, bias, float(error)
