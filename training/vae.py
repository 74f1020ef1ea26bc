"""Train the small VAE: the HunyuanVideo layout at small widths, on clips of the synthetic world.

    python -m training.vae [--folder training/runs/small --crop-steps 4000 --steps 7000]

Small crops first, for most of the learning at a fifth of the cost, then whole clips. At the end the latents' mean and spread are
folded into quant_conv and post_quant_conv (training/export.py), so that the released scale stays true.
"""

import argparse
import random
from pathlib import Path

import torch
from torch import nn

from opensora_core.codecs.hunyuan.config import VAEConfig
from opensora_core.codecs.hunyuan.layers import CausalConv3d, Downsample, ResnetBlock, Upsample
from opensora_core.codecs.hunyuan.model import CausalVAE
from opensora_core.evaluation import world

from .muon import Muon
from .state import Run, learning_rate, set_learning_rate

CONFIG = VAEConfig(latent_channels=16, widths=(16, 32, 48, 48), layers=1)
KL_WEIGHT = 5e-4
ADAM_SHARE = 0.15  # of the rate, for biases and norms
CROP, CROP_FRAMES = 32, 9


def initialise(model: CausalVAE) -> CausalVAE:
    """Near-identity: residual branches start almost silent, resampling starts as averaging and repetition."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, (nn.Conv3d, nn.Linear)):
            fan_in = module.weight[0].numel()
            module.weight.data = torch.randn(module.weight.shape, generator=generator) / fan_in**0.5
            module.bias.data.zero_()
        elif isinstance(module, nn.GroupNorm):
            module.weight.data.fill_(1)
            module.bias.data.zero_()
    for module in model.modules():
        if isinstance(module, ResnetBlock):
            module.conv2.conv.weight.data.mul_(0.1)
        elif isinstance(module, (Downsample, Upsample)):
            _start_as_identity(module.conv)
    return model


def _start_as_identity(conv: CausalConv3d) -> None:
    weight = conv.conv.weight.data.mul_(0.3)
    channels = torch.arange(weight.shape[0])
    weight[channels, channels, -1, 1, 1] += 0.8  # the present frame: causal kernels end with it


def batch(step: int, size: int, whole: bool) -> torch.Tensor:
    """Clips of a step, [size, 3, T, H, W] in -1..1; the same for the same step, on any machine.

    Crops are cut around the object, where there is something to learn. One batch of whole clips in six is of single
    pictures instead, as image-to-video encodes them: they cost a tenth, so there are four times as many.
    """
    rng = random.Random(step)
    seen, _ = world.split()
    single = whole and rng.random() < 1 / 6
    clips = []
    for _ in range(size * 4 if single else size):
        scene = world.draw(rng, seen, anywhere=0.5)
        clip = scene.render()
        if single:
            clip = clip[:1]
        elif not whole:
            first = rng.randrange(world.NUM_FRAMES - CROP_FRAMES + 1)
            top, left = (_crop(rng, centre) for centre in scene.centre(first + CROP_FRAMES // 2))
            clip = clip[first : first + CROP_FRAMES, top : top + CROP, left : left + CROP]
        clips.append(clip.permute(3, 0, 1, 2) * 2 - 1)
    return torch.stack(clips)


def _crop(rng: random.Random, centre: float) -> int:
    """Where a crop begins along one axis: the object's centre is in it or near it."""
    return min(max(0, round(centre + rng.uniform(-1, 1) * CROP * 0.6 - CROP / 2)), world.SIZE - CROP)


def loss_of(model: CausalVAE, pixels: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, dict[str, float]]:
    with torch.autocast(pixels.device.type, torch.bfloat16):
        mean, logvar = (part.float() for part in model.encode(pixels).moments())
        noise = torch.randn(mean.shape, generator=generator).to(mean.device)
        decoded = model.decode(mean + noise * (0.5 * logvar).exp()).float()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    error = decoded - pixels
    loss = error.abs().mean() + 2 * error.square().mean() + KL_WEIGHT * kl
    mse = error.detach().square().mean() / 4  # of values in 0..1
    return loss, {"loss": loss.item(), "psnr": -10 * mse.log10().item(), "kl": kl.item()}


def trained_vae(folder: str | Path) -> CausalVAE:
    """The VAE of a run's folder, as far as it has been trained."""
    model = CausalVAE(CONFIG)
    model.load_state_dict(torch.load(Path(folder) / "vae.pt", weights_only=True, map_location="cpu")["model"])
    return model.requires_grad_(False)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", default="training/runs/small")
    parser.add_argument("--crop-steps", type=int, default=2800)
    parser.add_argument("--steps", type=int, default=3900, help="of both phases together")
    parser.add_argument("--batch", type=int, default=8, help="crops per step; whole clips come in a third as many")
    parser.add_argument("--rate", type=float, default=2e-2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    model = initialise(CausalVAE(CONFIG)).to(args.device)
    muon = Muon([p for p in model.parameters() if p.ndim > 1], lr=args.rate)
    adam = torch.optim.Adam([p for p in model.parameters() if p.ndim == 1], lr=args.rate * ADAM_SHARE, betas=(0.9, 0.98))
    run = Run(args.folder, "vae", {"model": model, "muon": muon, "adam": adam})
    for step in run.steps(args.steps):
        whole = step >= args.crop_steps
        rate = learning_rate(step, args.steps, args.rate, warmup=50)
        set_learning_rate(muon, rate)
        set_learning_rate(adam, rate * ADAM_SHARE)
        pixels = batch(step, args.batch // 3 if whole else args.batch, whole).to(args.device)
        loss, figures = loss_of(model, pixels, torch.Generator().manual_seed(step))
        model.zero_grad(set_to_none=True)
        loss.backward()
        muon.step()
        adam.step()
        if step % 50 == 0:
            run.progress(args.steps, **figures)


if __name__ == "__main__":
    main()
