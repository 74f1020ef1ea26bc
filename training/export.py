"""Writes trained networks as the files of the small model: the official formats and key names, fp16, laid out as the hub repository.

    python -m training.export DIRECTORY --folder training/runs/small     what was trained
    python -m training.export DIRECTORY --random [--seed N]              random weights of the same sizes, to develop with

The latents' mean and spread are folded into the VAE's quant_conv and post_quant_conv, so that LATENT_SCALE times its latents has
zero mean and unit spread, as the released model's users expect.
"""

import argparse
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from opensora_core.checkpoint.load import load_transformer, load_vae
from opensora_core.codecs.hunyuan.config import LATENT_SCALE
from opensora_core.codecs.hunyuan.model import CausalVAE
from opensora_core.encoders.clip import load_clip
from opensora_core.encoders.t5 import load_t5
from opensora_core.networks.mmdit.layout import file_name
from opensora_core.networks.mmdit.model import MMDiT
from opensora_core.run.files import ModelFiles, check_files

from . import tokenizers
from .text import CLIP_SIZES, T5_SIZES, clip_config, t5_config, untrained
from .tokenizers import CLIP_FOLDER, T5_FOLDER, write_json
from .vae import CONFIG as VAE_CONFIG

LARGEST_BYTES = 12_000_000  # of the whole folder


@dataclass(frozen=True)
class LatentStatistics:
    """Of a VAE's posterior means over many clips, channel by channel: mean and std, [C] fp32."""

    mean: Tensor
    std: Tensor


@torch.no_grad()
def latent_statistics(vae: CausalVAE, batches: Iterable[Tensor]) -> LatentStatistics:
    """Mean and standard deviation of a VAE's latents.

    Args:
        batches: clips [B, 3, T, H, W] in -1..1, on the VAE's device.
    """
    count, total, squares = 0, 0.0, 0.0
    for pixels in batches:
        mean, _ = vae.encode(pixels).moments()
        values = mean.double().transpose(0, 1).flatten(1)
        count, total, squares = count + values.shape[1], total + values.sum(1), squares + values.square().sum(1)
    mean = total / count
    return LatentStatistics(mean.float(), (squares / count - mean.square()).sqrt().float())


def fold_latents(weights: dict[str, Tensor], latents: LatentStatistics) -> dict[str, Tensor]:
    """A VAE's weights whose latents are (z - mean) / (std * LATENT_SCALE) of what they were, and that decodes these to the same frames.

    Args:
        weights: of a CausalVAE, by name; not changed.
    """
    mean, spread = latents.mean.double(), latents.std.double() * LATENT_SCALE
    folded = {name: tensor.double() for name, tensor in weights.items() if name.startswith(("quant_conv.", "post_quant_conv."))}
    ones, zeros = torch.ones_like(spread), torch.zeros_like(spread)
    # The second half are log variances, which a factor moves by twice its logarithm.
    factor, shift = torch.cat((1 / spread, ones)), torch.cat((-mean / spread, zeros - 2 * spread.log()))
    folded["quant_conv.weight"] = folded["quant_conv.weight"] * factor[:, None, None, None, None]
    folded["quant_conv.bias"] = folded["quant_conv.bias"] * factor + shift
    kernel = folded["post_quant_conv.weight"]
    folded["post_quant_conv.bias"] = folded["post_quant_conv.bias"] + kernel.flatten(1) @ mean
    folded["post_quant_conv.weight"] = kernel * spread[None, :, None, None, None]
    return {name: folded[name].to(tensor.dtype) if name in folded else tensor for name, tensor in weights.items()}


def export(
    transformer: MMDiT, vae: CausalVAE, t5: nn.Module, clip: nn.Module, directory: str | Path, latents: LatentStatistics | None = None
) -> Path:
    """Write the four networks and their tokenizers, read them back, and return the folder.

    Args:
        t5, clip: transformers' T5EncoderModel and CLIPTextModel, as text.untrained makes them.
        latents: to fold into the VAE; the transformer was trained on (z - mean) / std. None = the VAE's latents are so already.

    Raises:
        ValueError: a weight that fp16 cannot hold, or files that are too large together.
    """
    directory = tokenizers.write(directory)
    _save(directory / "Open_Sora_v2.safetensors", {file_name(name): tensor for name, tensor in transformer.state_dict().items()})
    vae_weights = vae.state_dict()
    _save(directory / "hunyuan_vae.safetensors", fold_latents(vae_weights, latents) if latents else vae_weights)
    _save(directory / T5_FOLDER / "model.safetensors", _t5_weights(t5, directory))
    write_json(
        directory / T5_FOLDER / "config.json", t5_config({name: getattr(t5.config, name) for name in T5_SIZES}, t5.config.vocab_size)
    )
    _save(directory / CLIP_FOLDER / "model.safetensors", _clip_weights(clip))
    ids = {name: getattr(clip.config, name) for name in ("bos_token_id", "pad_token_id", "eos_token_id")}
    sizes = {name: getattr(clip.config, name) for name in CLIP_SIZES}
    write_json(directory / CLIP_FOLDER / "config.json", clip_config(sizes, clip.config.vocab_size, ids))
    check(directory)
    return directory


def check(directory: Path) -> int:
    """Read a folder of the small model as its users do, and return its size in bytes.

    Raises:
        CheckpointError: a file is not what it should be.
        ValueError: the files are too large together.
    """
    files = ModelFiles.in_folder(directory)
    check_files(files)
    for read, path in ((load_transformer, files.dit), (load_vae, files.vae), (load_t5, files.t5), (load_clip, files.clip)):
        read(path, torch.float32, "cpu")
    size = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    if size > LARGEST_BYTES:
        raise ValueError(f"{directory} has {size:,} bytes; at most {LARGEST_BYTES:,} go into the package.")
    return size


def random_networks(directory: Path, seed: int) -> tuple[MMDiT, CausalVAE, nn.Module, nn.Module]:
    """Transformer, VAE, T5 and CLIP of the small model's sizes with lively random weights (see demo/tiny.py), and their tokenizers in `directory`."""
    from demo import tiny

    from .transformer import CONFIG  # which itself imports this module

    torch.manual_seed(seed)  # the library's encoders initialise themselves
    generator = torch.Generator().manual_seed(seed)
    text = untrained(tokenizers.write(directory))
    with torch.device("meta"):
        transformer, vae = MMDiT(CONFIG), CausalVAE(VAE_CONFIG)
    weights = tiny.transformer_weights(generator, CONFIG)
    transformer.load_state_dict({name: weights[file_name(name)] for name in transformer.state_dict()}, assign=True)
    vae.load_state_dict(tiny.vae_weights(generator, VAE_CONFIG), assign=True)
    return transformer, vae, text.t5.model, text.clip.model


def _t5_weights(t5: nn.Module, directory: Path) -> dict[str, Tensor]:
    weights = {name: tensor for name, tensor in t5.state_dict().items() if name != "encoder.embed_tokens.weight"}  # shared.weight again
    table = weights["shared.weight"].clone()
    for other, word in tokenizers.spellings(directory / T5_FOLDER).items():
        table[other] = table[word]
    return weights | {"shared.weight": table}


def _clip_weights(clip: nn.Module) -> dict[str, Tensor]:
    """Under the names of CLIP's files, whatever the library calls them."""
    names = {name: f"text_model.{name.removeprefix('text_model.')}" for name in clip.state_dict() if not name.endswith("position_ids")}
    return {names[name]: tensor for name, tensor in clip.state_dict().items() if name in names}


def _save(path: Path, weights: dict[str, Tensor]) -> None:
    halves = {name: tensor.detach().to("cpu", torch.float16).contiguous() for name, tensor in weights.items()}
    unfit = [name for name, tensor in halves.items() if not torch.isfinite(tensor).all()]
    if unfit:
        raise ValueError(f"{path.name}: fp16 cannot hold {', '.join(unfit[:5])}.")
    save_file(halves, path, metadata={"format": "pt"})
    path.chmod(0o644)  # the library writes files that only their owner reads


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--folder", default="training/runs/small", help="of the trained states (default training/runs/small)")
    parser.add_argument("--random", action="store_true", help="random weights in place of trained ones")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights")
    args = parser.parse_args(arguments)
    if args.random:
        networks, latents = random_networks(args.directory, args.seed), None
    else:
        from .finished import trained  # which itself imports this module

        networks, latents = trained(args.folder)
    export(*networks, args.directory, latents)
    print(f"{args.directory}: {check(args.directory):,} bytes")


if __name__ == "__main__":
    main()
