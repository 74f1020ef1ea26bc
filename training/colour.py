"""Teach the built-in model a colour that it has never seen: a LoRA, in minutes on a CPU.

    python -m training.colour lilac.safetensors [--colour lilac --steps 600]
    python -m opensora_core evaluate --lora lilac.safetensors --colour lilac

The clips are those of Open-Sora Video Dataset's *lilac shapes (built in)*, and the file is what ComfyUI's Save LoRA writes: ComfyUI's own
Train LoRA does the same in template 33.
"""

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize
from tqdm import trange

from opensora_core.checkpoint.load import load_transformer
from opensora_core.evaluation import world
from opensora_core.evaluation.clips import quantised
from opensora_core.evaluation.prompts import lesson
from opensora_core.pipeline import OpenSoraPipeline
from opensora_core.run.request import SamplingOptions

from .transformer import plain_attention

SHIFT = 5.73  # of the training sigmas, as ComfyUI's trainer has it


class Change(nn.Module):
    """What a LoRA adds to a weight [out, in]."""

    def __init__(self, weight: Tensor, rank: int):
        super().__init__()
        self.down = nn.Parameter(torch.randn(rank, weight.shape[1]) * weight.shape[1] ** -0.5)
        self.up = nn.Parameter(torch.zeros(weight.shape[0], rank))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.up @ self.down


def encoded(pipe: OpenSoraPipeline, colour: str) -> tuple[Tensor, Tensor, Tensor]:
    """Latents [N, 16, 5, 8, 8] of the lesson's clips, and T5's and CLIP's answers to their captions."""
    scenes = lesson(colour)
    with torch.no_grad():
        latents = torch.cat([pipe.vae.encode(quantised(scene.render()), [None]) for scene in scenes])
        texts = [
            (scene.caption, "", SamplingOptions(fps=world.FPS, motion_score=scene.motion_score) if scene.caption else None)
            for scene in scenes
        ]
        sides = [prompt.condition.positive for prompt in pipe.encode_prompts(texts)]
    # Clones: what inference mode made takes no part in gradients.
    return latents.clone(), *(torch.cat([side[name] for side in sides]).clone() for name in ("context", "y"))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="the LoRA, a .safetensors file")
    parser.add_argument("--colour", default="lilac", choices=tuple(world.TAUGHT))
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rate", type=float, default=4e-3)
    args = parser.parse_args(arguments)
    torch.manual_seed(0)
    pipe = OpenSoraPipeline.from_pretrained("small")
    latents, context, y = encoded(pipe, args.colour)
    network = load_transformer(pipe.files.dit, torch.float32).requires_grad_(False)
    for block in network.blocks():
        block.attention = plain_attention
    changes = {name: Change(layer.weight, args.rank) for name, layer in network.named_modules() if isinstance(layer, nn.Linear)}
    for name, change in changes.items():
        parametrize.register_parametrization(network.get_submodule(name), "weight", change)
    optimizer = torch.optim.AdamW([parameter for change in changes.values() for parameter in change.parameters()], args.rate)
    for _ in trange(args.steps, unit="step"):
        rows = torch.randperm(len(latents))[: args.batch]
        noise, t = torch.randn_like(latents[rows]), torch.rand(len(rows))
        sigma = SHIFT * t / (1 + (SHIFT - 1) * t)
        mix = sigma[:, None, None, None, None]
        velocity = network(torch.lerp(latents[rows], noise, mix), sigma, context[rows], y[rows])
        loss = (mix * (velocity - (noise - latents[rows]))).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    parts = {f"{name}.lora_{part}.weight": getattr(change, part) for name, change in changes.items() for part in ("up", "down")}
    save_file({f"diffusion_model.{name}": parameter.detach().contiguous() for name, parameter in parts.items()}, args.out)


if __name__ == "__main__":
    main()
