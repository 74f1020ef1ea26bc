"""Record golden numbers from the Open-Sora 2.0 reference: python tests/golden/make_golden.py [transformer vae sampler ...]

Runs only where the reference does: OPENSORA_REF names a checkout of hpcaitech/Open-Sora at COMMIT, and PYTHONPATH
holds `refenv`, stand-ins by formula for the GPU packages it imports (flash-attn, liger-kernel, mmengine). No line of
the reference is here; its classes are built small, filled with seeded random values and called in fp32 on a CPU.

Weights are cut to bfloat16 with four mantissa bits before the reference sees them, and stored as bfloat16: nothing
is lost, and the files pack to a quarter of fp32. Nothing has to be drawn again to use a golden: weights, inputs and
outputs are all in the files.
"""

import itertools
import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import refenv  # stand-ins, outside this repository
import torch
from PIL import Image
from safetensors.torch import save_file

COMMIT = "7ad6a96a135feb81f755c84fb391818718f6beb2"
HERE = Path(__file__).resolve().parent
LATENT_CHANNELS = 16
CONTEXT = VECTOR = 64
TEXT_TOKENS = 12
COMMON = {
    "cache_dir": None, "from_pretrained": None, "in_channels": 64, "vec_in_dim": VECTOR, "context_in_dim": CONTEXT,
    "mlp_ratio": 4.0, "axes_dim": [4, 14, 14], "theta": 10000, "qkv_bias": True, "patch_size": 2,
}  # fmt: skip
OPEN_SORA = {
    "hidden_size": 96, "num_heads": 3, "depth": 2, "depth_single_blocks": 3, "guidance_embed": False,
    "cond_embed": True, "fused_qkv": False, "use_liger_rope": True,
}  # fmt: skip
FLUX = {
    "hidden_size": 64, "num_heads": 2, "depth": 1, "depth_single_blocks": 1, "guidance_embed": True,
    "cond_embed": False, "fused_qkv": True, "use_liger_rope": False,
}  # fmt: skip
SMALL_TILES = {"tile_sample_min_size": 64, "tile_latent_min_size": 8, "tile_sample_min_tsize": 16, "tile_latent_min_tsize": 4}


def save(name, tensors, calls, **extra):
    metadata = {"origin": f"hpcaitech/Open-Sora@{COMMIT}", "calls": calls, **{k: json.dumps(v) for k, v in extra.items()}}
    path = HERE / f"{name}.safetensors"
    save_file({k: v.detach().clone().contiguous() for k, v in tensors.items()}, path, metadata)
    path.chmod(0o644)


def save_json(name, calls, values):
    content = {"origin": f"hpcaitech/Open-Sora@{COMMIT}", "calls": calls, **values}
    (HERE / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")


def fill(model, seed):
    """Seeded weights loud enough that a wrong layout shows: logits of several units, no zero or unit parameter left."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        value = torch.randn(parameter.shape, generator=generator)
        if name.endswith("_norm.scale"):  # q and k: logits scale with the product
            value = 1.6 + 0.5 * value
        elif parameter.ndim == 1 and name.endswith("weight"):  # group norms
            value = 1 + 0.3 * value
        elif parameter.ndim == 1:
            value = 0.2 * value
        else:
            loud = 1.6 if ".to_q." in name or ".to_k." in name else 1.0
            value = value * loud / parameter[0].numel() ** 0.5
        if name.startswith("final_layer.linear"):
            value = 0.4 * value  # the sampler integrates this: keep it from amplifying rounding
        parameter.data.copy_((value.bfloat16().view(torch.int16) & ~7).view(torch.bfloat16).float())
    return model.train(False)


def weights(model):
    return {k: v.bfloat16() for k, v in model.state_dict().items()}


def transformer(seed, **changes):
    from opensora.models.mmdit.model import Flux

    return fill(Flux(device_map="cpu", torch_dtype=torch.float32, **{**COMMON, **changes}), seed)


def ids(frames, rows, columns, batch):
    grid = torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in (frames, rows, columns)), indexing="ij")
    return torch.stack(grid, -1).reshape(1, -1, 3).repeat(batch, 1, 1)


def forward_case(model, generator, shape, with_cond, guidance=None):
    """Inputs and the reference's output of one call, in latent layout [B, C, T, H, W]."""
    from opensora.utils.sampling import pack, unpack

    batch, _, frames, height, width = shape
    draw = lambda *size: torch.randn(*size, generator=generator)  # noqa: E731
    case = {"x": draw(*shape), "context": draw(batch, TEXT_TOKENS, CONTEXT), "y": draw(batch, VECTOR)}
    case["timestep"] = torch.tensor([0.996453, 0.3126])[:batch]
    if with_cond:
        mask = (torch.arange(frames) == 0).float().reshape(1, 1, -1, 1, 1).expand(batch, 1, -1, height, width)
        case["cond"] = torch.cat((mask, mask * draw(*shape)), dim=1)
    if guidance is not None:
        case["guidance"] = torch.tensor(guidance)
    out = model(
        img=pack(case["x"]), img_ids=ids(frames, height // 2, width // 2, batch), txt=case["context"],
        txt_ids=torch.zeros(batch, TEXT_TOKENS, 3), timesteps=case["timestep"], y_vec=case["y"],
        cond=pack(case["cond"]) if with_cond else None, guidance=case.get("guidance"),
    )  # fmt: skip
    case["output"] = unpack(out, 8 * height, 8 * width, frames)
    return case


def make_transformer():
    call = "opensora.models.mmdit.model.MMDiTModel.forward (eager, fp32)"
    generator = torch.Generator().manual_seed(11)
    released = transformer(1, **OPEN_SORA)
    save("transformer_weights", weights(released), call, config={**COMMON, **OPEN_SORA})
    save("transformer", forward_case(released, generator, (2, LATENT_CHANNELS, 3, 6, 10), True), call)
    both = {**FLUX, "cond_embed": True}
    fused = transformer(2, **both)
    save("fused_weights", weights(fused), call, config={**COMMON, **both})
    flux = transformer(2, **FLUX)
    flux.load_state_dict({k: v for k, v in fused.state_dict().items() if not k.startswith("cond_in.")})
    conditioned = transformer(2, **{**both, "guidance_embed": False})
    conditioned.load_state_dict({k: v for k, v in fused.state_dict().items() if not k.startswith("guidance_in.")})
    shape = (2, LATENT_CHANNELS, 2, 10, 6)
    save("fused_guidance", forward_case(flux, generator, shape, False, [4.0, 1.5]), call)
    save("fused_cond", forward_case(conditioned, generator, shape, True), call)


# The whole sampling path, from noise and text embeddings to latents, with the reference's own loop.

SAMPLES = {
    # name: cond_type, frames, (height, width), batch, (text oscillation, image oscillation, temporal ramp), flow shift
    "t2v": ("t2v", 9, (48, 80), 1, (True, True, True), None),
    "t2v_plain": ("t2v", 13, (80, 48), 1, (False, False, False), 4.0),
    "t2v_image": ("t2v", 1, (48, 48), 1, (True, True, True), None),
    "head": ("i2v_head", 9, (48, 80), 1, (True, True, True), None),
    "head_text_steady": ("i2v_head", 13, (48, 48), 1, (False, True, True), None),
    "head_image_steady": ("i2v_head", 9, (80, 48), 1, (True, False, True), None),
    "head_no_ramp": ("i2v_head", 9, (48, 80), 1, (True, True, False), 1.7),
    "head_batch": ("i2v_head", 9, (48, 48), 2, (True, True, True), None),
    "tail": ("i2v_tail", 9, (48, 80), 1, (True, True, True), None),
    "tail_plain": ("i2v_tail", 13, (48, 48), 1, (False, False, False), None),
    "loop": ("i2v_loop", 17, (48, 48), 1, (True, True, True), None),
    "loop_no_ramp": ("i2v_loop", 9, (80, 48), 1, (False, True, False), None),
    "v2v_head": ("v2v_head", 41, (32, 48), 1, (True, True, True), None),
    # Only added to at the end: what comes before keeps the numbers it was drawn with.
    "v2v_tail": ("v2v_tail", 45, (48, 32), 1, (True, True, True), None),
    "v2v_head_batch": ("v2v_head", 37, (32, 32), 2, (True, True, True), None),
    "v2v_head_easy": ("v2v_head_easy", 69, (32, 32), 1, (False, True, True), None),
    "v2v_tail_easy": ("v2v_tail_easy", 73, (32, 32), 1, (True, False, True), 2.3),
    "tail_batch": ("i2v_tail", 9, (48, 48), 2, (True, True, True), None),
    "loop_batch": ("i2v_loop", 13, (48, 80), 2, (True, True, True), None),
}
STEPS, TEXT_GUIDANCE, IMAGE_GUIDANCE = 14, 7.5, 3.0


class RecordedAutoencoder(torch.nn.Module):
    """Hands out the next prepared latents instead of encoding, and decodes to the latents themselves."""

    def __init__(self, latents):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))
        self.remaining = list(latents)

    def encode(self, pixels):
        return self.remaining.pop(0)

    def decode(self, latents):
        return latents.clone()


def media(folder, cond_type):
    """A reference path of the kind the mode reads; what it shows does not matter, RecordedAutoencoder encodes it."""
    if cond_type.startswith("v2v"):
        path = Path(folder) / "clip.mp4"
        with open(path, "wb") as file:
            np.save(file, np.zeros((65 if cond_type.endswith("easy") else 33, 32, 48, 3), np.uint8))
        return str(path)
    path = Path(folder) / "picture.png"
    Image.new("RGB", (48, 48)).save(path)
    return f"{path};{path}" if cond_type == "i2v_loop" else str(path)


def sample_case(model, embeddings, name, generator, folder):
    from opensora.utils.sampling import SamplingOption, get_noise, get_schedule, prepare_api

    cond_type, frames, (height, width), batch, (text, image, ramp), flow_shift = SAMPLES[name]
    latent_frames = (frames - 1) // 4 + 1
    length = {"t2v": 0, "i2v": 1, "v2v": 17 if cond_type.endswith("easy") else 9}[cond_type[:3]]
    per_item = 2 if cond_type == "i2v_loop" else int(length > 0)
    shape = (1, LATENT_CHANNELS, length, height // 8, width // 8)
    references = [torch.randn(shape, generator=generator) for _ in range(batch * per_item)]
    option = SamplingOption(
        width=width, height=height, num_frames=frames, num_steps=STEPS, guidance=TEXT_GUIDANCE, text_osci=text,
        guidance_img=IMAGE_GUIDANCE, image_osci=image, scale_temporal_osci=ramp, temporal_reduction=4,
        is_causal_vae=True, flow_shift=flow_shift, seed=7,
    )  # fmt: skip
    rows = list(range(batch)) + [-1] * 2 * batch  # positive prompts, then the negative one twice
    run = prepare_api(
        model, RecordedAutoencoder(references), lambda *_, **__: embeddings["context"][rows], lambda _: embeddings["y"][rows], {}
    )
    given = {"ref": [media(folder, cond_type)] * batch} if per_item else {}
    latents = run(option, cond_type=cond_type, text=["a"] * batch, channel=64, **given)
    tensors = {"noise": get_noise(batch, height, width, latent_frames, "cpu", torch.float32, 7), "latents": latents}
    if references:
        tensors["references"] = torch.cat(references)
    tokens = height * width // 256
    tensors["sigmas"] = torch.tensor(get_schedule(STEPS, tokens, latent_frames, shift_alpha=flow_shift))
    flags = {"cond_type": cond_type, "text_oscillation": text, "image_oscillation": image, "temporal_ramp": ramp, "flow_shift": flow_shift}
    return tensors, flags


def make_sampler():
    model = transformer(1, **OPEN_SORA)
    generator = torch.Generator().manual_seed(12)
    embeddings = {  # rows: two prompts, then the negative prompt
        "context": torch.randn(3, TEXT_TOKENS, CONTEXT, generator=generator),
        "y": torch.randn(3, VECTOR, generator=generator),
    }
    tensors, cases = dict(embeddings), {}
    with tempfile.TemporaryDirectory() as folder:
        for name in SAMPLES:
            found, cases[name] = sample_case(model, embeddings, name, generator, folder)
            tensors.update({f"{name}.{k}": v for k, v in found.items()})
    settings = {"num_steps": STEPS, "text": TEXT_GUIDANCE, "image": IMAGE_GUIDANCE}
    call = "opensora.utils.sampling.prepare_api: noise, schedule, condition, I2VDenoiser.denoise, replacement of conditioned frames"
    save("sampler", tensors, f"{call}; weights: transformer_weights", cases=cases, settings=settings)


def make_generate():
    """One video from pictures and embeddings to pixels, every stage the reference's: fit, encode, sample, replace, decode."""
    from opensora.utils.sampling import SamplingOption, get_noise, prepare_api

    vae = autoencoder()
    vae.enable_spatial_tiling()
    generator = torch.Generator().manual_seed(15)
    blocks = torch.randint(0, 256, (2, 9, 11, 3), generator=generator, dtype=torch.uint8)
    pictures = blocks.repeat_interleave(8, 1).repeat_interleave(8, 2).numpy()
    context, y = (torch.randn(2, *size, generator=generator) for size in ((TEXT_TOKENS, CONTEXT), (VECTOR,)))
    rows = [0, 1, 1]
    option = SamplingOption(
        width=80, height=48, num_frames=9, num_steps=12, guidance=TEXT_GUIDANCE, text_osci=True, guidance_img=IMAGE_GUIDANCE,
        image_osci=True, scale_temporal_osci=True, temporal_reduction=4, is_causal_vae=True, seed=7,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        paths = [f"{folder}/{name}.png" for name in ("first", "last")]
        for path, picture in zip(paths, pictures, strict=True):
            Image.fromarray(picture).save(path)
        run = prepare_api(transformer(1, **OPEN_SORA), vae, lambda *_, **__: context[rows], lambda _: y[rows], {})
        torch.manual_seed(7)  # pictures are encoded with noise from the global generator, the first one first
        pixels = run(option, cond_type="i2v_loop", text=["a"], channel=64, ref=[";".join(paths)])
    torch.manual_seed(7)
    tensors = {
        "blocks": blocks, "context": context, "y": y, "noise": get_noise(1, 48, 80, 3, "cpu", torch.float32, 7),
        "posterior_noise": torch.cat([torch.randn(1, LATENT_CHANNELS, 1, 6, 10) for _ in range(2)]), "pixels": pixels[..., ::3, ::3],
    }  # fmt: skip
    call = "opensora.utils.sampling.prepare_api with its VAE, i2v_loop; weights: transformer_weights, vae_weights; "
    save("generate", tensors, call + "pictures = blocks repeated 8x8; rows of context: prompt, negative; every third pixel")


PICTURE_STEPS, PICTURE_GUIDANCE = 6, 4.0


def picture_autoencoder():
    from opensora.models.vae.autoencoder_2d import AutoEncoderFlux

    sizes = {"resolution": 32, "ch": 32, "ch_mult": [1, 1, 1, 2], "num_res_blocks": 1, "z_channels": LATENT_CHANNELS}
    return fill(AutoEncoderFlux(None, device_map="cpu", torch_dtype=torch.float32, **sizes), 5)


def make_flux():
    """The picture of text to picture to video: noise, schedule, distilled Euler steps, decode; weights of the transformer: fused_weights."""
    from opensora.utils.inference import modify_option_to_t2i
    from opensora.utils.sampling import SamplingOption, get_noise, get_schedule, prepare_api

    fused = transformer(2, **{**FLUX, "cond_embed": True})
    model = transformer(2, **FLUX)
    model.load_state_dict({k: v for k, v in fused.state_dict().items() if not k.startswith("cond_in.")})
    vae = picture_autoencoder()
    generator = torch.Generator().manual_seed(16)
    context, y = torch.randn(1, TEXT_TOKENS, CONTEXT, generator=generator), torch.randn(1, VECTOR, generator=generator)
    tensors, sizes = {"context": context, "y": y}, {}
    video = SamplingOption(resolution="256px", num_frames=9, num_steps=PICTURE_STEPS, guidance=TEXT_GUIDANCE, seed=9)
    for ratio in ("16:9", "3:2", "1:2.39", "1:1"):  # the sizes that are asked for; drawn small below
        video.aspect_ratio = ratio
        asked = modify_option_to_t2i(video, distilled=True, img_resolution="768px")
        sizes[ratio] = [asked.height, asked.width]
    option = modify_option_to_t2i(video, distilled=True, img_resolution="768px")
    option.height, option.width = 48, 80
    run = prepare_api(model, vae, lambda *_, **__: context, lambda _: y, {})
    tensors["pixels"] = run(option, "t2v", seed=9, text=["a"], channel=64)
    latents_only = prepare_api(model, RecordedAutoencoder([]), lambda *_, **__: context, lambda _: y, {})
    tensors["latents"] = latents_only(option, "t2v", seed=9, text=["a"], channel=64)
    tensors["noise"] = get_noise(1, 48, 80, 1, "cpu", torch.float32, 9)
    tensors["sigmas"] = torch.tensor(get_schedule(PICTURE_STEPS, 15, 1))
    decoder = {k: v for k, v in weights(vae).items() if k.startswith("decoder.")}
    save("flux_vae_weights", decoder, "opensora.models.vae.autoencoder_2d.AutoEncoderFlux, the decoder")
    call = "prepare_api with DistilledDenoiser, and its options by modify_option_to_t2i"
    settings = {"num_steps": PICTURE_STEPS, "guidance": option.guidance, "seed": 9}
    save("flux", tensors, f"{call}; weights: fused_weights without cond_in, flux_vae_weights", settings=settings, sizes=sizes)


def make_generate_clip():
    """A clip extended backwards, from its frames and embeddings to pixels: v2v_tail, fitted as the reference fits clips."""
    from opensora.utils.sampling import SamplingOption, get_noise, prepare_api

    vae = autoencoder()
    vae.enable_spatial_tiling()
    generator = torch.Generator().manual_seed(16)
    blocks = torch.randint(0, 256, (33, 6, 5, 3), generator=generator, dtype=torch.uint8)
    clip = blocks.repeat_interleave(8, 1).repeat_interleave(8, 2).numpy()
    context, y = (torch.randn(2, *size, generator=generator) for size in ((TEXT_TOKENS, CONTEXT), (VECTOR,)))
    rows = [0, 1, 1]
    option = SamplingOption(
        width=32, height=32, num_frames=37, num_steps=12, guidance=TEXT_GUIDANCE, text_osci=True, guidance_img=IMAGE_GUIDANCE,
        image_osci=True, scale_temporal_osci=True, temporal_reduction=4, is_causal_vae=True, seed=7,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        with open(path, "wb") as file:
            np.save(file, clip)
        run = prepare_api(transformer(1, **OPEN_SORA), vae, lambda *_, **__: context[rows], lambda _: y[rows], {})
        torch.manual_seed(7)
        pixels = run(option, cond_type="v2v_tail", text=["a"], channel=64, ref=[str(path)])
    torch.manual_seed(7)
    tensors = {
        "blocks": blocks, "context": context, "y": y, "noise": get_noise(1, 32, 32, 10, "cpu", torch.float32, 7),
        "posterior_noise": torch.randn(1, LATENT_CHANNELS, 9, 4, 4), "pixels": pixels[..., ::3, ::3],
    }  # fmt: skip
    call = "opensora.utils.sampling.prepare_api with its VAE, v2v_tail; weights: transformer_weights, vae_weights; "
    save("generate_clip", tensors, call + "clip = blocks repeated 8x8; rows of context: prompt, negative; every third pixel")


# The VAE.


def autoencoder():
    from opensora.models.hunyuan_vae.autoencoder_kl_causal_3d import CausalVAE3D_HUNYUAN

    widths = {"block_out_channels": (16, 32, 32, 32), "layers_per_block": 2, "norm_num_groups": 4, "latent_channels": LATENT_CHANNELS}
    return fill(CausalVAE3D_HUNYUAN(device_map="cpu", torch_dtype=torch.float32, **widths), 3)


def set_tiling(vae, spatial, temporal, small):
    sizes = SMALL_TILES if small else {k: v * 4 for k, v in SMALL_TILES.items()}  # the reference's own: 256 px, 64 frames
    for name, value in sizes.items():
        setattr(vae, name, value)
    vae.enable_spatial_tiling(spatial)
    vae.enable_temporal_tiling(temporal)


VAE_CASES = {
    # name: (latent frames, latent height, latent width), (spatial, temporal), small tiles, keep every n-th pixel
    "whole": ((3, 4, 6), (False, False), True, 1),
    "image": ((1, 6, 4), (False, False), True, 1),
    "spatial": ((2, 13, 9), (True, False), True, 3),  # tile starts 0, 6, 12: a sliver of one latent, and of three
    "temporal": ((8, 4, 2), (False, True), True, 3),  # starts 0, 3, 6: the last tile adds one latent
    "temporal_empty": ((7, 2, 4), (False, True), True, 3),  # the last tile is one latent, dropped again
    "both": ((6, 7, 9), (True, True), True, 3),
    "released_tiles": ((2, 24, 42), (True, False), False, 7),  # 192x336, the 256px 16:9 size
}


def make_vae():
    vae = autoencoder()
    generator = torch.Generator().manual_seed(13)
    tensors, cases = {}, {}
    for name, ((frames, height, width), (spatial, temporal), small, stride) in VAE_CASES.items():
        set_tiling(vae, spatial, temporal, small)
        latents = torch.randn(1, LATENT_CHANNELS, frames, height, width, generator=generator)
        # A still is what gets encoded at the released tile size, as an image-to-video reference is.
        num_frames = 1 if name == "released_tiles" else 4 * frames - 3
        bytes_ = torch.randint(0, 256, (1, 3, num_frames, height, width), generator=generator, dtype=torch.uint8)
        pixels = bytes_.repeat_interleave(8, -1).repeat_interleave(8, -2)  # large blocks: cheap to store, sharp edges
        with torch.no_grad():
            _, posterior = vae.encode(pixels.float() / 127.5 - 1, sample_posterior=False, return_posterior=True)
            decoded = vae.decode(latents)
        kept = {"latents": latents, "blocks": bytes_, "moments": posterior.parameters, "decoded": decoded[..., ::stride, ::stride]}
        tensors.update({f"{name}.{k}": v for k, v in kept.items()})
        cases[name] = {
            "spatial": spatial, "temporal": temporal, "tile_size": 64 if small else 256, "temporal_tile": 16 if small else 64,
            "stride": stride, "decoded_shape": list(decoded.shape), "decoded_mean": decoded.double().mean().item(),
        }  # fmt: skip
    tensors.update(posterior_case(generator))
    save("vae_weights", weights(vae), "opensora.models.hunyuan_vae.autoencoder_kl_causal_3d.AutoencoderKLCausal3D")
    call = "AutoencoderKLCausal3D.encode (posterior parameters) and .decode (model latents, divided by 0.476986 inside)"
    save("vae", tensors, f"{call}; pixels = blocks repeated 8x8, / 127.5 - 1; decoded keeps every stride-th pixel", cases=cases)


def posterior_case(generator):
    from opensora.models.hunyuan_vae.vae import DiagonalGaussianDistribution

    moments = torch.randn(1, 2 * LATENT_CHANNELS, 1, 2, 3, generator=generator) * 4
    moments[:, -2:] *= 20  # beyond the clamp on both sides
    posterior = DiagonalGaussianDistribution(moments)
    torch.manual_seed(5)
    sample = posterior.sample()
    torch.manual_seed(5)
    return {
        "posterior.moments": moments, "posterior.mean": posterior.mean, "posterior.logvar": posterior.logvar,
        "posterior.noise": torch.randn(posterior.mean.shape), "posterior.sample": sample,
    }  # fmt: skip


# Numbers without a network.


def make_geometry():
    from opensora.datasets.aspect import get_aspect_ratios_dict, get_num_pexels_from_name
    from opensora.utils.inference import add_fps_info_to_text, add_motion_score_to_text
    from opensora.utils.sampling import get_oscillation_gs, get_schedule

    schedules = [
        {"num_steps": n, "tokens_per_frame": s, "latent_frames": t, "flow_shift": a, "sigmas": get_schedule(n, s, t, shift_alpha=a)}
        for n, s, t, a in (
            (50, 252, 33, None), (50, 2304, 33, None), (50, 2304, 1, None), (50, 576, 32, None), (30, 256, 33, None),
            (14, 15, 3, None), (1, 252, 1, None), (20, 252, 33, 3.0), (10, 4096, 17, None), (25, 2304, 33, 1.0),
        )
    ]  # fmt: skip
    sizes = {}
    for name, training, compression in itertools.product(
        ("256px", "360p", "480p", "512px", "720p", "768px", "1024px", "1080px", "1080p"), (False, True), (16, 32)
    ):
        os.environ["AE_SPATIAL_COMPRESSION"] = str(compression)
        table = get_aspect_ratios_dict(get_num_pexels_from_name(name), training=training)
        sizes[f"{name} {'training' if training else 'inference'} {compression}"] = table
    del os.environ["AE_SPATIAL_COMPRESSION"]
    texts = [
        "raining, sea", "A cat. 24 FPS.", "x 24 FPS", 'Ends with quote."', "  spaces around \n", "", ".", "Done!", "a. 8 FPS", "a 12 FPS..",
        "shot at 24 FPS. by night", "A cat. 24 fps.", "two\nlines", "…", "一只猫。", "24 FPS.", "A cat. 4 motion score.", "a x24 FPS.",
    ]  # fmt: skip
    prompts = [[text, fps, score, add_motion_score_to_text(add_fps_info_to_text([text], fps), score)[0]]
               for text in texts for fps, score in ((24, "4"), (16, 7))]  # fmt: skip
    prompts += [[text, 24, None, add_fps_info_to_text([text], 24)[0]] for text in texts]
    oscillation = {n: [get_oscillation_gs(7.5, i) for i in range(n)] for n in (5, 11, 14, 30, 50)}
    values = {
        "schedules": schedules, "sizes": sizes, "resize_crop": resize_crops(), "prompts": prompts, "oscillation": oscillation,
        "masks": condition_masks(),
    }  # fmt: skip
    calls = "get_schedule, get_aspect_ratios_dict, resize_crop_to_fill, add_fps_info_to_text, add_motion_score_to_text, "
    save_json("geometry", calls + "get_oscillation_gs, prepare_inference_condition", values)
    make_conditions()


class Ruler:
    """Stands where a PIL picture is expected, and notes the size it is scaled to."""

    def __init__(self, height, width):
        self.size = (width, height)

    def resize(self, size, resample):
        width, height = self.scaled = size
        return np.arange(height, dtype=np.int32)[:, None] * 65536 + np.arange(width, dtype=np.int32)


def resize_crops():
    from opensora.datasets.utils import resize_crop_to_fill

    sources = ((1080, 1920), (720, 1280), (512, 512), (1000, 667), (333, 777), (64, 4000), (193, 337), (192, 336), (31, 47), (2160, 3841))
    targets = ((192, 336), (336, 192), (576, 1024), (768, 768), (256, 256), (160, 384))
    found = []
    for source, target in itertools.product(sources, targets):
        ruler = Ruler(*source)
        corner = resize_crop_to_fill(ruler, target).getpixel((0, 0))
        found.append([*source, *target, ruler.scaled[1], ruler.scaled[0], corner // 65536, corner % 65536])
    return found


COND_TYPES = ("t2v", "i2v_head", "i2v_tail", "i2v_loop", "v2v_head", "v2v_tail", "v2v_head_easy", "v2v_tail_easy")


def condition(cond_type, latent_frames, references):
    """Mask and masked reference of one item; references: [1, C, length, H, W] latents."""
    from opensora.utils.inference import prepare_inference_condition

    noise = torch.zeros(1, *references.shape[1:2], latent_frames, *references.shape[3:])
    given = [[references[0]] * 2] if cond_type != "t2v" else [None]
    return prepare_inference_condition(noise, cond_type, ref_list=given, causal=True)


def condition_masks():
    found = []
    for cond_type, frames in itertools.product(COND_TYPES, (1, 2, 3, 9, 17, 18, 33)):
        span = 17 if cond_type.endswith("easy") else 9 if cond_type.startswith("v2v") else 1
        if frames > 1 and span > frames:
            continue  # the reference fails on a shape there
        masks, _ = condition(cond_type, frames, torch.ones(1, 1, span, 2, 2))
        found.append([cond_type, frames, masks[0, 0, :, 0, 0].int().tolist()])
    return found


def make_conditions():
    """The packed condition the network reads, and the picture and clip resizing in front of it."""
    from opensora.datasets.utils import read_from_path
    from opensora.utils.sampling import pack

    generator = torch.Generator().manual_seed(14)
    tensors = {}
    for cond_type in COND_TYPES:
        frames = 18 if cond_type.endswith("easy") else 11 if cond_type.startswith("v2v") else 3
        span = 17 if cond_type.endswith("easy") else 9 if cond_type.startswith("v2v") else 1
        references = torch.randn(1, LATENT_CHANNELS, span, 2, 4, generator=generator)
        masks, masked = condition(cond_type, frames, references)
        tensors[f"{cond_type}.references"] = references
        tensors[f"{cond_type}.packed"] = pack(torch.cat((masks, masked), dim=1))
    clip = torch.randint(0, 256, (2, 50, 70, 3), generator=generator, dtype=torch.uint8)
    tensors["fit.source"] = clip
    with tempfile.TemporaryDirectory() as folder:
        Image.fromarray(clip[0].numpy()).save(Path(folder) / "a.png")
        with open(Path(folder) / "a.mp4", "wb") as file:
            np.save(file, clip.numpy())
        for size in ((24, 40), (48, 24), (52, 72)):
            for kind, name in (("image", "a.png"), ("video", "a.mp4")):
                tensors[f"fit.{kind}.{size[0]}x{size[1]}"] = read_from_path(str(Path(folder) / name), size, transform_name="resize_crop")
    call = "prepare_inference_condition and pack; opensora.datasets.utils.read_from_path(resize_crop), [3, T, H, W] in -1..1"
    save("conditions", tensors, call)


MAKERS = {
    "transformer": make_transformer, "vae": make_vae, "sampler": make_sampler, "generate": make_generate, "geometry": make_geometry,
    "flux": make_flux, "generate_clip": make_generate_clip,
}  # fmt: skip

if __name__ == "__main__":
    refenv.activate()
    if refenv.reference_commit() != COMMIT:
        raise SystemExit(f"OPENSORA_REF is at {refenv.reference_commit()}; the goldens come from {COMMIT}.")
    torch.set_num_threads(1)
    for wanted in sys.argv[1:] or MAKERS:
        with torch.no_grad():
            MAKERS[wanted]()
