"""Record golden numbers of CogVideoX from diffusers 0.42.1: python tests/golden/make_cogvideox.py [networks vae schedules runs seeded manifests]

Runs where diffusers is installed; no line of it is here. Its classes are built small, filled by formula (formula.py), as the inputs
are, and called in fp32 on a CPU; of results, values spread over the tensor are kept. Nothing has to be drawn again to use a golden.
"""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import diffusers
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXDPMScheduler, CogVideoXTransformer3DModel
from diffusers.pipelines import CogVideoXImageToVideoPipeline, CogVideoXPipeline
from formula import fill, numbers, sample
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent

ORIGIN = f"huggingface/diffusers {diffusers.__version__}"
RELEASED = {
    "2b": {"num_attention_heads": 30, "num_layers": 30},
    "5b": {"num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True},
    "5b_i2v": {
        "num_attention_heads": 48, "num_layers": 42, "in_channels": 32, "use_rotary_positional_embeddings": True,
        "use_learned_positional_embeddings": True,
    },
    "1.5_5b": {
        "num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True, "patch_size_t": 2, "patch_bias": False,
        "sample_height": 300, "sample_width": 300, "sample_frames": 81,
    },
    "1.5_5b_i2v": {
        "num_attention_heads": 48, "num_layers": 42, "in_channels": 32, "use_rotary_positional_embeddings": True, "patch_size_t": 2,
        "patch_bias": False, "sample_height": 300, "sample_width": 300, "sample_frames": 81, "ofs_embed_dim": 512,
    },
}  # fmt: skip
SMALL = {"attention_head_dim": 16, "num_layers": 2, "time_embed_dim": 32, "text_embed_dim": 24}
SMALL_OF = {
    "2b": {},
    "5b": {"num_attention_heads": 3},
    "5b_i2v": {"num_attention_heads": 2, "num_layers": 1},
    "1.5_5b": {"num_attention_heads": 2},
}
SMALL_OF["1.5_5b_i2v"] = {"num_attention_heads": 2, "ofs_embed_dim": 32}
SIZES = {
    # network: latent (frames, height, width) of each case
    "2b": [(1, 60, 90), (3, 10, 14), (1, 8, 6)],
    "5b": [(2, 60, 90), (3, 10, 14), (2, 20, 12), (1, 2, 2), (1, 96, 170)],
    "5b_i2v": [(13, 60, 90), (3, 60, 90)],
    "1.5_5b": [(2, 96, 170), (4, 10, 14)],
    "1.5_5b_i2v": [(2, 96, 170), (4, 10, 14), (2, 34, 22)],
}
TEXT_ROWS = 226  # of the tables; models without are given fewer
VAE = {"block_out_channels": (8, 16, 16, 32), "norm_num_groups": 2, "layers_per_block": 1}
ENCODED, DECODED = (1, 5, 9, 49, 81), (1, 3, 13, 21, 41)
SCHEDULE = {
    "beta_schedule": "scaled_linear", "clip_sample": False, "prediction_type": "v_prediction", "timestep_spacing": "trailing",
    "rescale_betas_zero_snr": True,
}  # fmt: skip
STEPS = range(10, 61)
RUNS = {
    # name: network, frames, (height, width), solver, steps, dynamic guidance
    "2b": ("2b", 9, (48, 80), "ddim", 10, False),
    "5b": ("5b", 9, (80, 48), "dpm", 10, True),
    "5b_i2v": ("5b_i2v", 9, (480, 720), "dpm", 3, True),
    "1.5_5b": ("1.5_5b", 9, (48, 80), "dpm", 12, True),
    "1.5_5b_i2v": ("1.5_5b_i2v", 17, (48, 80), "ddim", 10, False),
}


def save(name, tensors, calls, **extra):
    metadata = {"origin": ORIGIN, "calls": calls, **{k: json.dumps(v) for k, v in extra.items()}}
    path = HERE / f"{name}.safetensors"
    save_file({k: v.detach().clone().contiguous() for k, v in tensors.items()}, path, metadata)
    path.chmod(0o644)


def network(name, **change):
    return fill(CogVideoXTransformer3DModel(**{**RELEASED[name], **SMALL, **SMALL_OF[name], **change}))


def keep_table(model, frames):
    """What SAT does of the learned positions for a shorter clip, which diffusers would replace by computed ones: the first of them."""
    embed = model.patch_embed
    embed.sample_frames = 4 * (frames - 1) + 1
    embed.pos_embedding = embed.pos_embedding[:, : TEXT_ROWS + frames * 30 * 45]


def rotary(model, size):
    if not model.config.use_rotary_positional_embeddings:
        return None
    holder = SimpleNamespace(vae_scale_factor_spatial=8, transformer=model)
    frames, height, width = size
    return CogVideoXPipeline._prepare_rotary_positional_embeddings(holder, 8 * height, 8 * width, frames, "cpu")


def lora():
    """The 5B's second case with a LoRA of the official trainer's four layers, rank 4, without alphas, by PEFT."""
    model, key, state = network("5b"), "5b.1", {}
    for index in range(SMALL["num_layers"]):
        for layer in ("to_q", "to_k", "to_v", "to_out.0"):
            stem = f"transformer_blocks.{index}.attn1.{layer}"
            for side, shape in (("A", (4, 48)), ("B", (48, 4))):
                state[f"{stem}.lora_{side}.weight"] = numbers(shape, f"{stem}.{side}") / 4
    model.load_lora_adapter(state, prefix=None)
    size = SIZES["5b"][1]
    x, context = numbers((1, 16, *size), f"{key}.x"), numbers((1, 7, SMALL["text_embed_dim"]), f"{key}.context")
    with torch.no_grad():
        v = model(x.transpose(1, 2), context, torch.tensor([999 - 137]), image_rotary_emb=rotary(model, size), return_dict=False)[0]
    return sample(v.transpose(1, 2))


def make_networks():
    tensors, cases = {}, {}
    for name, sizes in SIZES.items():
        for index, size in enumerate(sizes):
            model, key = network(name), f"{name}.{index}"
            rows = TEXT_ROWS if name in ("2b", "5b_i2v") else 7
            if name == "5b_i2v":
                keep_table(model, size[0])
            channels = model.config.in_channels
            x, context = numbers((1, channels, *size), f"{key}.x"), numbers((1, rows, SMALL["text_embed_dim"]), f"{key}.context")
            timestep = torch.tensor([999 - 137 * index])
            ofs = torch.full((1,), 2.0) if model.config.ofs_embed_dim else None
            with torch.no_grad():
                v = model(x.transpose(1, 2), context, timestep, ofs=ofs, image_rotary_emb=rotary(model, size), return_dict=False)[0]
            tensors[key] = sample(v.transpose(1, 2))
            cases[key] = {"size": size, "rows": rows, "timestep": timestep.item(), "network": name}
    tensors["lora"] = lora()
    small = {name: {key: list(value.shape) for key, value in network(name).state_dict().items()} for name in SIZES}
    save(
        "cogvideox", tensors, "CogVideoXTransformer3DModel.forward; formula.numbers by '<case>.x' and '.context'", cases=cases, shapes=small
    )


def autoencoder():
    return fill(AutoencoderKLCogVideoX(**VAE))


def make_vae():
    model, tensors = autoencoder(), {}
    with torch.no_grad():
        for frames in ENCODED:
            pixels = numbers((1, 3, frames, 24, 16), f"encode.{frames}") / 2
            tensors[f"encode.{frames}"] = sample(model._encode(pixels))
        for frames in DECODED:
            tensors[f"decode.{frames}"] = sample(model.decode(numbers((1, 16, frames, 2, 3), f"decode.{frames}")).sample)
    shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
    save("cogvideox_vae", tensors, "AutoencoderKLCogVideoX._encode and .decode; formula.numbers by the case", shapes=shapes)


class Noise:
    """randn_tensor by formula: the n-th draw of a run."""

    def __init__(self, name):
        self.name, self.count = name, 0

    def __call__(self, shape, **_):
        self.count += 1
        return numbers(shape, f"{self.name}.{self.count}")


def scheduler(solver, shift):
    return (CogVideoXDDIMScheduler if solver == "ddim" else CogVideoXDPMScheduler)(**SCHEDULE, snr_shift_scale=shift)


def velocity(x, t):
    return torch.sin(3 * x + t / 100)


def walk(solver, shift, steps):
    made, x, noise, old = scheduler(solver, shift), numbers((8,), "walk"), Noise(f"walk.{steps}"), None
    made.set_timesteps(steps)
    times = made.timesteps.tolist()
    with patch("diffusers.schedulers.scheduling_dpm_cogvideox.randn_tensor", noise):
        for i, t in enumerate(times):
            v = velocity(x, t)
            if solver == "ddim":
                x = made.step(v, t, x, return_dict=False)[0]
            else:
                x, old = made.step(v, old, t, times[i - 1] if i else None, x, return_dict=False)
    return times, x, noise.count


def make_schedules():
    tensors, times, draws = {}, {}, {}
    for solver in ("ddim", "dpm"):
        for shift in (1.0, 3.0):
            found = [walk(solver, shift, steps) for steps in STEPS]
            tensors[f"{solver}.{shift:.0f}"] = torch.stack([x for _, x, _ in found])
            times = {steps: listed for steps, (listed, _, _) in zip(STEPS, found, strict=True)}
            draws = {steps: count for steps, (_, _, count) in zip(STEPS, found, strict=True)}
    for shift in (1.0, 3.0):
        tensors[f"alphas.{shift:.0f}"] = scheduler("ddim", shift).alphas_cumprod
    save(
        "cogvideox_schedules",
        tensors,
        "v = sin(3x + t / 100) from numbers((8,), 'walk'); noise 'walk.<steps>.<draw>'",
        times=times,
        draws=draws,
    )


def make_runs():
    tensors, cases = {}, {}
    vae = autoencoder()
    for name, (which, frames, (height, width), solver, steps, dynamic) in RUNS.items():
        shift, has_image, padded = (3.0 if which == "2b" else 1.0), which.endswith("i2v"), which.startswith("1.5")
        model, latent_frames = network(which), (frames - 1) // 4 + 1
        if which == "5b_i2v":
            keep_table(model, latent_frames)
        scale = 1.15258426 if which == "2b" else 0.7
        vae.register_to_config(scaling_factor=scale, invert_scale_latents=which == "1.5_5b_i2v")
        pipeline = CogVideoXImageToVideoPipeline if has_image else CogVideoXPipeline
        pipe = pipeline(tokenizer=None, text_encoder=None, vae=vae, transformer=model, scheduler=scheduler(solver, shift))
        pipe.set_progress_bar_config(disable=True)
        shape = (1, latent_frames + latent_frames % 2 * padded, 16, height // 8, width // 8)
        text = [numbers((1, TEXT_ROWS, SMALL["text_embed_dim"]), f"{name}.{word}") for word in ("prompt", "negative")]
        given = {"image": numbers((1, 3, height, width), f"{name}.image").clamp(-1, 1) / 2 + 0.5} if has_image else {}
        noise = Noise(f"run.{name}")
        with (
            patch("diffusers.schedulers.scheduling_dpm_cogvideox.randn_tensor", noise),
            patch("diffusers.models.autoencoders.vae.randn_tensor", noise),
        ):
            found = pipe(
                **given, height=height, width=width, num_frames=frames, num_inference_steps=steps, guidance_scale=6.0, use_dynamic_cfg=dynamic,
                prompt_embeds=text[0], negative_prompt_embeds=text[1], latents=numbers(shape, f"{name}.noise"), output_type="latent",
            ).frames  # fmt: skip
        kept = found[:, latent_frames % 2 * padded :]
        tensors[f"{name}.latents"] = sample(kept.transpose(1, 2))
        tensors[f"{name}.pixels"] = sample(pipe.decode_latents(kept[..., :6, :10]).detach())
        cases[name] = {
            "network": which, "frames": frames, "size": (height, width), "solver": solver, "steps": steps, "dynamic": dynamic, "scale": scale,
            "shift": shift, "draws": noise.count,
        }  # fmt: skip
    save("cogvideox_runs", tensors, "the pipelines' calls, latents given; noise 'run.<name>.<draw>'", cases=cases)


def make_seeded():
    """A picture's video from a generator alone, which gives the posterior's noise, the run's beginning and DPM's steps."""
    which, frames, (height, width), steps, seed = "1.5_5b_i2v", 17, (48, 80), 4, 11
    vae = autoencoder()
    vae.register_to_config(scaling_factor=0.7, invert_scale_latents=True)
    parts = {"vae": vae, "transformer": network(which), "scheduler": scheduler("dpm", 1.0)}
    pipe = CogVideoXImageToVideoPipeline(tokenizer=None, text_encoder=None, **parts)
    picture = numbers((height, width, 3), "seeded.image").clamp(-1, 1).add(1).mul(127.5).round() / 255
    text = [numbers((1, TEXT_ROWS, SMALL["text_embed_dim"]), f"seeded.{word}") for word in ("prompt", "negative")]
    found = pipe(
        image=picture.permute(2, 0, 1)[None], height=height, width=width, num_frames=frames, num_inference_steps=steps, guidance_scale=6.0,
        use_dynamic_cfg=True, prompt_embeds=text[0], negative_prompt_embeds=text[1], generator=torch.Generator().manual_seed(seed),
        output_type="latent",
    ).frames  # fmt: skip
    case = {"network": which, "frames": frames, "steps": steps, "seed": seed}
    save("cogvideox_seeded", {"latents": sample(found[:, 1:].transpose(1, 2))}, "CogVideoXImageToVideoPipeline.__call__", case=case)


def make_manifests():
    """Shapes of every tensor of the released models; of blocks, which are all alike, those of the first."""
    found = {}
    with torch.device("meta"):
        for name, config in RELEASED.items():
            state = {key: list(value.shape) for key, value in CogVideoXTransformer3DModel(**config).state_dict().items()}
            first = {key: shape for key, shape in state.items() if key.startswith("transformer_blocks.0.")}
            alike = {re.sub(r"\.0\.", f".{i}.", key, count=1): v for i in range(config["num_layers"]) for key, v in first.items()}
            others = {key: shape for key, shape in state.items() if not key.startswith("transformer_blocks.")}
            assert state == alike | others
            found[name] = {"blocks": config["num_layers"], "block": first, "others": others}
        vae = {key: list(value.shape) for key, value in AutoencoderKLCogVideoX().state_dict().items()}
    content = json.dumps({"origin": ORIGIN, "transformers": found, "vae": vae}, separators=(",", ":")).replace('],"', '],\n"')
    (HERE / "cogvideox_manifests.json").write_text(content + "\n")


if __name__ == "__main__":
    makers = {
        "networks": make_networks,
        "vae": make_vae,
        "schedules": make_schedules,
        "runs": make_runs,
        "seeded": make_seeded,
        "manifests": make_manifests,
    }
    for chosen in sys.argv[1:] or makers:
        makers[chosen]()
