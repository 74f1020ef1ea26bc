"""The pipeline that the command line's model and machine options ask for."""

import os
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch

from ..choices import AUTO, BUDGET, DEFAULT_BUDGET_GIB, torch_dtype
from ..errors import OpenSoraError
from ..family import Clip
from ..memory.component import resolve_device
from ..pipeline import OpenSoraPipeline
from ..run.files import whole_vae
from .options import PARTS, EvaluateOptions, RunOptions
from .output import say

T = TypeVar("T")


def with_usual(options: T, usual: Clip) -> T:
    """The options with a model's own numbers where a person said none."""
    own = {"fps": int(usual.fps), "num_steps": usual.num_steps, "guidance": usual.scales[0], "guidance_img": (*usual.scales, 1.0)[1]}
    return replace(options, **{name: value for name, value in own.items() if getattr(options, name, value) is None})


def pipeline(options: RunOptions | EvaluateOptions) -> OpenSoraPipeline:
    """A pipeline of which no weight is read yet."""
    if options.ckpt_path_vae2d is not None:
        vae = options.ckpt_path_vae2d if options.vae is None else whole_vae(options.vae, options.ckpt_path_vae2d)
        if vae == Path(options.vae or "").expanduser():
            say(f"--ckpt-path-vae2d is not read: {vae.name} holds that VAE too")
        options = replace(options, vae=vae)
    device, dtype = resolve_device(device_of(options.device)), torch_dtype(options.dtype)
    parts = {part: getattr(options, part) for part in PARTS}
    missing = [f"--{part}" for part, path in parts.items() if path is None and part != "clip"]
    how = {"torch_dtype": dtype, "precision": options.precision, "tokenizers": options.tokenizers}
    if all(path is None for path in parts.values()):
        made = OpenSoraPipeline.from_pretrained("small" if options.model is None else options.model, **how)
    elif options.model is not None:
        raise OpenSoraError("Give either --model or the four parts --dit, --vae, --t5 and --clip, not both.")
    elif missing:
        raise OpenSoraError(f"A model of files needs all four parts (three where CLIP is not read); give {' and '.join(missing)} too.")
    else:
        made = OpenSoraPipeline.from_files(**parts, **how)
    if options.lora is None and options.lora_strength != 1:
        raise OpenSoraError(f"--lora-strength {options.lora_strength:g} is that of no LoRA; add --lora FILE.")
    budget_gib = DEFAULT_BUDGET_GIB if options.budget_gib is None and options.offload == BUDGET else options.budget_gib
    made.enable_offload(options.offload, budget_gib, device)
    made.vae.policy = options.decode_policy
    if options.attention != AUTO:
        made.use_attention(options.attention)
    if options.compile:
        made.compile()
    if options.plans is not None:
        made.use_plans(options.plans)
    if options.lora is not None:
        made.load_lora(options.lora, options.lora_strength)
        say(f"{made.lora_notes[-1]} (strength {options.lora_strength:g})")
    return made


def device_of(named: str) -> str:
    """The device to use: under torchrun, auto is the GPU of the process's own number."""
    rank, count = os.environ.get("LOCAL_RANK", ""), torch.cuda.device_count()
    return f"cuda:{int(rank) % count}" if named == AUTO and rank.isdecimal() and count else named
