"""Train the small transformer together with its two text encoders, on the latents of training/data.py.

    python -m training.transformer [--folder training/runs/small --steps 9900]

Rectified flow: the network reads (1 - sigma) * latents + sigma * noise and is asked for noise - latents. A part of the clips is
given pictures or the last latents of a clip before, as the pipeline gives them; a part loses its text, for guidance.
`--steps` may be raised or lowered when a run is continued: the rate is constant until the last quarter.
"""

import argparse
import copy
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from opensora_core.networks.mmdit.config import OPEN_SORA_2, TransformerConfig
from opensora_core.networks.mmdit.model import MMDiT

from . import tokenizers
from .data import CLIP, LONG, Clips, is_long, mistake, read, scene, text_of
from .muon import Muon
from .state import Run, set_learning_rate
from .text import CLIP_SIZES, T5_SIZES, TextEncoders, untrained

CONFIG = TransformerConfig(
    **{
        **OPEN_SORA_2.__dict__,
        **{"hidden_size": 160, "num_heads": 5, "mlp_hidden_size": 640, "depth": 2, "depth_single_blocks": 4},
        **{"context_in_dim": T5_SIZES["d_model"], "vec_in_dim": CLIP_SIZES["hidden_size"]},
    }
)
SHIFT = 2.5  # of the training sigmas; sampling 64x64, 17 frames shifts by 1.96. Layout and motion are decided at high sigmas
WITHOUT_TEXT = 0.1
LEAST_WEIGHT = 0.2  # in the loss, of channels that the VAE does not use
AVERAGE = 0.998  # of the weights that are shipped
ADAM_SHARE = 0.1  # Adam's rate as a share of Muon's
# What a clip is given, and how often. "go on" is a window's first latents; long clips are always given them.
GIVEN = {"nothing": 0.56, "first": 0.24, "last": 0.07, "both": 0.08, "go on": 0.05}
# From here on pictures are given more often, and some captions are wrong in a word, as captions of real videos are: a model that
# has learnt to doubt them follows a prompt fully only with guidance, which is what guidance is for.
LATER = 2491
GIVEN_LATER = {"nothing": 0.46, "first": 0.24, "last": 0.12, "both": 0.12, "go on": 0.06}
MISTAKEN = 0.2
# And from here on last pictures as often as first ones: a clip that has to end in one is the hardest of what is given.
LAST_LATER = 5600
GIVEN_LAST_LATER = {"nothing": 0.38, "first": 0.18, "last": 0.2, "both": 0.18, "go on": 0.06}
MOST_CONTEXT = 3  # latent frames of "go on"


@dataclass
class Batch:
    """latents [B, 16, 5, 8, 8], cond [B, 17, 5, 8, 8] fp32; ids of both encoders; every tensor on the device."""

    latents: Tensor
    cond: Tensor
    t5_ids: Tensor
    clip_ids: Tensor


class Networks(nn.Module):
    """What is trained together."""

    def __init__(self, text: TextEncoders):
        super().__init__()
        self.transformer = MMDiT(CONFIG, attention=plain_attention)
        initialise(self.transformer)
        self.t5, self.clip = text.t5.model, text.clip.model
        self.train(False)  # the encoders come with dropout; gradients flow all the same
        self.end = text.clip.tokenizer.end
        self.register_buffer("weights", torch.ones(CONFIG.in_channels))  # of the channels, in the loss

    def velocity(self, batch: Batch, noisy: Tensor, sigma: Tensor) -> Tensor:
        context = self.t5(input_ids=batch.t5_ids).last_hidden_state
        hidden = self.clip(input_ids=batch.clip_ids).last_hidden_state
        first_end = (batch.clip_ids == self.end).int().argmax(-1)
        y = hidden[torch.arange(len(hidden), device=hidden.device), first_end]
        return self.transformer(noisy, sigma, context, y, batch.cond)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, transformer_options: dict) -> Tensor:
    """Softmax attention written out: at this size, with gradients, a CPU does it faster than the fused one. q, k, v: [B, H, L, D]."""
    weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
    return (weights.to(v.dtype) @ v).transpose(1, 2).flatten(2)


def initialise(model: MMDiT) -> None:
    """Blocks start as the identity (zero modulation) and the prediction at zero (arXiv 2212.09748)."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.data.fill_(1)
        elif parameter.ndim == 1 or "_mod.lin" in name or "modulation" in name.lower() or name.startswith("final_layer.linear"):
            parameter.data.zero_()
        else:
            parameter.data = torch.randn(parameter.shape, generator=generator) * parameter.shape[1] ** -0.5


class Sampler:
    """Batches by step: the same for the same step, on any machine."""

    def __init__(self, clips: Clips, text: TextEncoders, device: str):
        self.clips, self.device = clips, device
        scenes = [scene(index) for index in range(len(clips.whole))]
        texts = [text_of(of) for of in scenes]
        mistaken = [text_of(mistake(of, random.Random(index))) for index, of in enumerate(scenes)]
        distinct = sorted({*texts, *mistaken}) + [""]
        self.t5_ids, self.clip_ids = text.t5.tokenize(distinct), text.clip.tokenize(distinct)
        row_of = {text: row for row, text in enumerate(distinct)}
        self.rows, self.mistaken = [row_of[text] for text in texts], [row_of[text] for text in mistaken]
        self.empty = len(distinct) - 1

    def batch(self, step: int, size: int) -> Batch:
        rng = random.Random(step)
        indices = [rng.randrange(len(self.clips.whole)) for _ in range(size)]
        given = GIVEN_LAST_LATER if step >= LAST_LATER else GIVEN_LATER if step >= LATER else GIVEN
        latents, cond = zip(*(self._one(rng, index, given) for index in indices), strict=True)
        rows = [self._text(rng, index, MISTAKEN if step >= LATER else 0.0) for index in indices]
        tensors = (torch.stack(latents), torch.stack(cond), self.t5_ids[rows], self.clip_ids[rows])
        return Batch(*(tensor.to(self.device) for tensor in tensors))

    def _text(self, rng: random.Random, index: int, mistaken: float) -> int:
        if rng.random() < WITHOUT_TEXT:
            return self.empty
        return self.mistaken[index] if rng.random() < mistaken else self.rows[index]

    def _one(self, rng: random.Random, index: int, shares: dict[str, float]) -> tuple[Tensor, Tensor]:
        begin = rng.randint(1, LONG - CLIP) if is_long(index) else 0
        latents = self.clips.whole[index, :, begin : begin + CLIP].float()
        cond = latents.new_zeros(17, *latents.shape[1:])
        given = "go on" if begin else rng.choices(list(shares), list(shares.values()))[0]
        if given == "go on":
            count = rng.randint(1, MOST_CONTEXT)
            cond[0, :count], cond[1:, :count] = 1, latents[:, :count]
        for name, at in (("first", 0), ("last", -1)):
            if given in (name, "both"):
                cond[0, at], cond[1:, at] = 1, getattr(self.clips, name)[index].float()
        return latents, cond


def loss_of(networks: Networks, batch: Batch, generator: torch.Generator) -> Tensor:
    size, device = len(batch.latents), batch.latents.device
    # Sigmas are spread evenly over a batch: less noise in the gradient than by chance.
    t = (torch.arange(size) + torch.rand(size, generator=generator)) / size
    sigma = (SHIFT * t / (1 + (SHIFT - 1) * t)).to(device)
    noise = torch.randn(batch.latents.shape, generator=generator).to(device)
    mix = sigma[:, None, None, None, None]
    with torch.autocast(device.type, torch.bfloat16):
        velocity = networks.velocity(batch, torch.lerp(batch.latents, noise, mix), sigma)
    error = (velocity.float() - (noise - batch.latents)).square()
    return (error * networks.weights.view(1, -1, 1, 1, 1)).mean()


def learning_rate(step: int, total: int, peak: float, warmup: int = 50) -> float:
    """Linear warm-up, constant, and over the last quarter down to a fiftieth."""
    return peak * min(1.0, (step + 1) / warmup, 0.02 + 0.98 * 4 * (1 - step / total))


def optimisers(networks: Networks, rate: float) -> list[tuple[torch.optim.Optimizer, float]]:
    """Muon for the matrices inside the blocks, Adam for the rest, and each one's rate."""
    inner, outer = [], []
    for name, parameter in networks.named_parameters():
        is_inner = name.startswith(("transformer.double_blocks", "transformer.single_blocks")) and parameter.ndim == 2
        (inner if is_inner else outer).append(parameter)
    return [(Muon(inner, rate), rate), (torch.optim.Adam(outer, rate * ADAM_SHARE, betas=(0.9, 0.98)), rate * ADAM_SHARE)]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", default="training/runs/small")
    parser.add_argument("--steps", type=int, default=9900)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--rate", type=float, default=2e-2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)  # transformers initialises its encoders from the global generator
    text = untrained(tokenizers.write(Path(args.folder) / "tokenizers"))
    networks = Networks(text).to(args.device)
    average = copy.deepcopy(networks)
    optimizers = optimisers(networks, args.rate)
    parts = {"networks": networks, "average": average, "muon": optimizers[0][0], "adam": optimizers[1][0]}
    run = Run(args.folder, "transformer", parts)
    clips = read(args.folder)
    sampler = Sampler(clips, text, args.device)
    networks.weights.copy_(clips.whole[:1000, :, :CLIP].float().std((0, 2, 3, 4)).clamp(LEAST_WEIGHT, 1))
    smooth = None
    for step in run.steps(args.steps):
        share = learning_rate(step, args.steps, 1.0)
        loss = loss_of(networks, sampler.batch(step, args.batch), torch.Generator().manual_seed(step))
        networks.zero_grad(set_to_none=True)
        loss.backward()
        for optimizer, rate in optimizers:
            set_learning_rate(optimizer, rate * share)
            optimizer.step()
        keep = min(AVERAGE, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(networks.parameters()), 1 - keep)
        smooth = loss.item() if smooth is None else 0.98 * smooth + 0.02 * loss.item()
        if step % 25 == 0:
            run.progress(args.steps, loss=smooth)


if __name__ == "__main__":
    main()
