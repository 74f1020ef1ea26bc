"""A small CogVideoX by formula, in diffusers' layout: the networks of the goldens, with a T5 of their width."""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from demo.tiny import random_weights
from opensora_core.codecs import cogvideox as codec
from opensora_core.encoders.t5 import T5Sizes, t5_manifest
from opensora_core.networks.cogvideox import layout
from opensora_core.networks.cogvideox.config import CogVideoXConfig
from opensora_core.networks.cogvideox.model import CogVideoX
from tests.golden.formula import fill
from training.tokenizers import T5Recipe, write_t5

HERE = Path(__file__).resolve().parent
WIDTH = 24  # of the text that the networks read
SHARDS = 2


def shapes(name, key="shapes"):
    with safe_open(HERE / f"{name}.safetensors", "pt") as file:
        return json.loads(file.metadata()[key])


def network(name):
    return fill(CogVideoX(CogVideoXConfig.of(shapes("cogvideox")[name])))


def vae():
    return fill(codec.CogVideoXVAE(codec.CogVideoXVAEConfig.of(shapes("cogvideox_vae"))))


def t5():
    sizes = T5Sizes(d_model=WIDTH, d_ff=48, num_layers=2, num_heads=2, d_kv=16)
    return random_weights(t5_manifest(sizes), torch.Generator().manual_seed(0))


def in_layout(state, kept):
    """A network's tensors as another layout keeps them: what its convert takes apart is put together."""
    made = {}
    for key, shape in kept.manifest({name: tuple(tensor.shape) for name, tensor in state.items()}).items():
        marked = torch.arange(shape[0], dtype=torch.float64).reshape(-1, *[1] * (len(shape) - 1)).expand(shape)
        made[key] = torch.empty(shape)
        for name, part in kept.convert(key, marked, None):
            made[key][part.reshape(part.shape[0], -1)[:, 0].long()] = state[name]
    return made


def sat(state):
    """What a file of SAT's checkpoint holds."""
    return {"module": {f"model.diffusion_model.{key}": tensor for key, tensor in in_layout(state, layout.SAT).items()}, "iteration": 1000}


def write(folder, name):
    """The folder of one of the five: its transformer in shards with their index."""
    folder = Path(folder)
    for part in ("transformer", "vae", "text_encoder", "tokenizer"):
        (folder / part).mkdir(parents=True)
    state = network(name).state_dict()
    names = [f"diffusion_pytorch_model-{shard + 1:05d}-of-{SHARDS:05d}.safetensors" for shard in range(SHARDS)]
    places = {key: names[index * SHARDS // len(state)] for index, key in enumerate(state)}
    for file in names:
        save_file({key: tensor for key, tensor in state.items() if places[key] == file}, folder / "transformer" / file)
    index = folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    save_file(vae().state_dict(), folder / "vae" / "diffusion_pytorch_model.safetensors")
    save_file(t5(), folder / "text_encoder" / "model.safetensors")
    write_t5(folder / "tokenizer", ["a red kite over the sea, raining"], T5Recipe(512, sentinels=100, capitals=False))
    return folder
