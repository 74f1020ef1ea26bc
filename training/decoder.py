"""Go on training the small VAE's decoder alone, on latents as image to video leaves them; the latents themselves stay as they are.

    python -m training.decoder [--folder training/runs/small --steps 3900]

The encoder never sees a picture inside a clip, but image to video puts the latent of a single picture in the place of a clip's
first or last one. Here the decoder learns to show that picture there: first among the latents of true clips, then also among
those that the transformer samples (training/samples.py), which are never quite where the picture is.
"""

import argparse
import random

import torch
from torch import Tensor

from opensora_core.codecs.hunyuan.model import CausalVAE
from opensora_core.evaluation import world

from . import samples
from .muon import Muon
from .samples import Samples
from .state import Run, learning_rate, set_learning_rate
from .vae import ADAM_SHARE, trained_vae

GIVEN = {"nothing": 0.4, "first": 0.2, "last": 0.2, "both": 0.2}
NOISE = 0.1  # largest standard deviation added to latents
SAMPLED_LATER = 700  # from here on every second step is on sampled latents
# From here on two of three are, and a last picture is given among sampled latents alone, as it is in use: among a true clip's, which
# agree with it, the decoder learns to go by the latent before.
ALONE_LATER, GIVEN_LATER = 1900, {"nothing": 0.7, "first": 0.3}
ENDS, ENDS_LATER = 0.2, 0.5  # weight of a clip's two ends in the loss, beside that of the whole


def batch(step: int, size: int) -> tuple[Tensor, str]:
    """Clips [size, 3, 17, 64, 64] in -1..1, and what is given of them."""
    rng = random.Random(2 * 10**9 + step)
    seen, _ = world.split()
    clips = [world.draw(rng, seen).render().movedim(-1, 0) * 2 - 1 for _ in range(size)]
    given = GIVEN_LATER if step >= ALONE_LATER else GIVEN
    return torch.stack(clips), rng.choices(list(given), list(given.values()))[0]


def is_sampled(step: int) -> bool:
    """Whether a step is on sampled latents."""
    return bool(step % 3 if step >= ALONE_LATER else step % 2 if step >= SAMPLED_LATER else 0)


@torch.no_grad()
def latents_of(vae: CausalVAE, pixels: Tensor, given: str, generator: torch.Generator) -> Tensor:
    """What the decoder is asked to decode: a clip's latents, a little off, with those of single pictures in their places."""
    latents, _ = vae.encode(pixels).moments()
    noise = torch.randn(latents.shape, generator=generator) * torch.rand(len(latents), 1, 1, 1, 1, generator=generator)
    latents = latents + NOISE * noise.to(latents)
    for name, at in (("first", 0), ("last", -1)):
        if given in (name, "both"):
            frame = pixels[:, :, :1] if name == "first" else pixels[:, :, -1:]
            latents[:, :, at] = vae.encode(frame).moments()[0][:, :, 0]
    return latents


def sampled_batch(sampled: Samples, step: int, size: int) -> tuple[Tensor, Tensor]:
    """Latents [size, 16, 5, 8, 8] of clips that were sampled, and what is to be shown of them, [size, 3, 17, 64, 64] in -1..1."""
    indices = random.Random(step).sample(range(len(sampled.latents)), size)
    return sampled.latents[indices].float(), sampled.frames[indices].movedim(-1, 1).float() / 127.5 - 1


def loss_of(vae: CausalVAE, step: int, size: int, device: str, sampled: Samples | None = None) -> tuple[Tensor, dict[str, float]]:
    """sampled: what steps from SAMPLED_LATER on need."""
    with torch.autocast(torch.device(device).type, torch.bfloat16):
        if is_sampled(step):
            latents, pixels = (part.to(device) for part in sampled_batch(sampled, step, size))
        else:
            pixels, given = batch(step, size)
            pixels = pixels.to(device)
            latents = latents_of(vae, pixels, given, torch.Generator().manual_seed(step))
        error = vae.decode(latents).float() - pixels
    loss = _loss(error) + (ENDS_LATER if step >= SAMPLED_LATER else ENDS) * _loss(error[:, :, [0, -1]])
    psnr = -10 * (error[:, :, -1].detach().square().mean() / 4).log10().item()
    return loss, {"loss": loss.item(), "last_frame_psnr": psnr}


def _loss(error: Tensor) -> Tensor:
    return error.abs().mean() + 2 * error.square().mean()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", default="training/runs/small")
    parser.add_argument("--steps", type=int, default=3900)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    model = trained_vae(args.folder).to(args.device)
    decoding = [*model.decoder.parameters(), *model.post_quant_conv.parameters()]
    for parameter in decoding:
        parameter.requires_grad_(True)
    muon = Muon([p for p in decoding if p.ndim > 1], lr=args.rate)
    adam = torch.optim.Adam([p for p in decoding if p.ndim == 1], lr=args.rate * ADAM_SHARE, betas=(0.9, 0.98))
    run = Run(args.folder, "decoder", {"vae": model, "muon": muon, "adam": adam})
    sampled = samples.read(args.folder)
    for step in run.steps(args.steps):
        rate = learning_rate(step, args.steps, args.rate, warmup=50)
        set_learning_rate(muon, rate)
        set_learning_rate(adam, rate * ADAM_SHARE)
        loss, figures = loss_of(model, step, args.batch, args.device, sampled)
        model.zero_grad(set_to_none=True)
        loss.backward()
        muon.step()
        adam.step()
        if step % 25 == 0:
            run.progress(args.steps, **figures)


if __name__ == "__main__":
    main()
