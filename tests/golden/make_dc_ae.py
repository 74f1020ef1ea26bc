"""Record golden numbers of the high-compression variant, as make_golden.py does of the rest: python tests/golden/make_dc_ae.py"""

import os
import tempfile

import make_golden as common
import refenv
import torch
from PIL import Image

CHANNELS = 8
WIDTHS = (8, 8, 16, 32, 32, 32)
DEPTHS = {"encoder": (2, 1, 1, 1, 1, 1), "decoder": (1, 2, 1, 1, 1, 1)}
TRANSFORMER = {
    **common.COMMON, **common.OPEN_SORA, "in_channels": CHANNELS, "patch_size": 1, "hidden_size": 64, "num_heads": 2, "depth": 1,
    "depth_single_blocks": 1,
}  # fmt: skip

CASES = {
    # name: (latent frames, height, width), (spatial, temporal), tile in pixels, in frames, keep every n-th pixel
    "whole": ((2, 2, 3), (False, False), 256, 32, 3),
    "image": ((1, 3, 2), (False, False), 256, 32, 3),
    "spatial": ((2, 7, 5), (True, False), 128, 16, 9),  # tile starts 0, 3, 6: a sliver of one latent
    "temporal": ((8, 2, 1), (False, True), 128, 16, 5),  # starts 0, 3, 6
    "temporal_one": ((7, 1, 2), (False, True), 128, 16, 5),  # the last tile has one latent, decoded as a picture
    "both": ((5, 5, 4), (True, True), 128, 16, 9),
    "released_tiles": ((9, 9, 2), (True, True), 256, 32, 17),  # starts 0, 6 in time and space
}
RUNS = {
    # name: cond_type, frames, (height, width)
    "t2v": ("t2v", 8, (64, 96)),
    "head": ("i2v_head", 12, (96, 64)),
    "loop": ("i2v_loop", 16, (64, 64)),
    "image": ("t2v", 1, (64, 64)),
    "tiled": ("i2v_head", 36, (288, 32)),
}


def autoencoder(seed=23):
    from opensora.models.dc_ae.models.dc_ae import DCAE, DCAEConfig, DecoderConfig, EncoderConfig

    blocks = ["ResBlock"] * 3 + ["EViTS5_GLU"] * 3
    shared = {"in_channels": 3, "latent_channels": CHANNELS, "block_type": blocks, "width_list": WIDTHS, "norm": "rms3d", "is_video": True}
    steps = [False, False, False, True, True, False]
    encoder = EncoderConfig(**shared, depth_list=DEPTHS["encoder"], downsample_block_type="Conv", temporal_downsample=steps)
    decoder = DecoderConfig(
        **shared, depth_list=DEPTHS["decoder"], upsample_block_type="InterpolateConv", act="silu", out_norm="rms3d", temporal_upsample=steps
    )
    config = DCAEConfig(latent_channels=CHANNELS, time_compression_ratio=4, encoder=encoder, decoder=decoder)
    model = DCAE(config)
    model.decoder.disc_off_grad_ckpt = False  # as opensora.models.dc_ae.ae_model_zoo.DC_AE sets it
    return common.fill(model, seed)


def set_tiling(model, spatial, temporal, size, frames):
    model.use_spatial_tiling, model.use_temporal_tiling = spatial, temporal
    model.spatial_tile_size, model.temporal_tile_size = size, frames
    model.spatial_tile_latent_size, model.temporal_tile_latent_size = size // 32, frames // 4


def make_autoencoder():
    model = autoencoder()
    generator = torch.Generator().manual_seed(24)
    tensors, cases = {}, {}
    for name, ((frames, height, width), switches, size, length, stride) in CASES.items():
        set_tiling(model, *switches, size, length)
        latents = torch.randn(1, CHANNELS, frames, height, width, generator=generator)
        shape = (1, 3, 4 * frames if frames > 1 else 1, 4 * height, 4 * width)
        blocks = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        pixels = blocks.repeat_interleave(8, -1).repeat_interleave(8, -2).float() / 127.5 - 1
        encoded, decoded = model.encode(pixels), model.decode(latents)
        kept = {"latents": latents, "blocks": blocks, "encoded": encoded, "decoded": decoded[..., ::stride, ::stride]}
        tensors.update({f"{name}.{k}": v for k, v in kept.items()})
        cases[name] = {
            "tile_size": size * switches[0], "temporal_tile": length * switches[1], "stride": stride,
            "decoded_shape": list(decoded.shape), "decoded_mean": decoded.double().mean().item(),
        }  # fmt: skip
    common.save("dc_ae_weights", common.weights(model), "opensora.models.dc_ae.models.dc_ae.DCAE")
    calls = "DCAE.encode and .decode, no scaling factor; pixels = blocks repeated 8x8, / 127.5 - 1; decoded keeps every stride-th pixel"
    common.save("dc_ae", tensors, calls, cases=cases)


class Watched(torch.nn.Module):
    """The autoencoder, and the latents that it was given to decode."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def encode(self, pixels):
        return self.model.encode(pixels)

    def decode(self, latents):
        self.latents = latents.clone()
        return self.model.decode(latents)


def make_runs():
    from opensora.utils.sampling import SamplingOption, get_noise, prepare_api

    os.environ["AE_SPATIAL_COMPRESSION"] = "32"
    vae = Watched(autoencoder())
    set_tiling(vae.model, True, True, 256, 32)
    model = common.transformer(22, **TRANSFORMER)
    generator = torch.Generator().manual_seed(25)
    blocks = torch.randint(0, 256, (2, 9, 11, 3), generator=generator, dtype=torch.uint8)
    pictures = blocks.repeat_interleave(8, 1).repeat_interleave(8, 2).numpy()
    context = torch.randn(2, common.TEXT_TOKENS, common.CONTEXT, generator=generator)
    y = torch.randn(2, common.VECTOR, generator=generator)
    rows = [0, 1, 1]
    tensors = {"blocks": blocks, "context": context, "y": y}
    run = prepare_api(model, vae, lambda *_, **__: context[rows], lambda _: y[rows], {})
    with tempfile.TemporaryDirectory() as folder:
        paths = [f"{folder}/{name}.png" for name in ("first", "last")]
        for path, picture in zip(paths, pictures, strict=True):
            Image.fromarray(picture).save(path)
        for name, (cond_type, frames, (height, width)) in RUNS.items():
            option = SamplingOption(
                width=width, height=height, num_frames=frames, num_steps=12, guidance=common.TEXT_GUIDANCE, text_osci=True,
                guidance_img=common.IMAGE_GUIDANCE, image_osci=True, scale_temporal_osci=True, temporal_reduction=4,
                is_causal_vae=True, seed=7,
            )  # fmt: skip
            given = {} if cond_type == "t2v" else {"ref": [";".join(paths[: 2 if cond_type == "i2v_loop" else 1])]}
            pixels = run(option, cond_type=cond_type, text=["a"], channel=CHANNELS, patch_size=1, **given)
            length = (frames - 1) // 4 + 1
            noise = get_noise(1, height, width, length, "cpu", torch.float32, 7, patch_size=1, channel=CHANNELS)
            kept = {"noise": noise, "latents": vae.latents, "pixels": pixels[..., ::5, ::5]}
            tensors.update({f"{name}.{k}": v for k, v in kept.items()})
    common.save("dc_ae_transformer_weights", common.weights(model), "opensora.models.mmdit.model.MMDiTModel", config=TRANSFORMER)
    calls = (
        "prepare_api with patch_size=1 and AE_SPATIAL_COMPRESSION=32; pictures = blocks repeated 8x8; rows of context: prompt, negative; "
    )
    common.save("dc_ae_runs", tensors, calls + "every fifth pixel", runs=RUNS)


if __name__ == "__main__":
    refenv.activate()
    if refenv.reference_commit() != common.COMMIT:
        raise SystemExit(f"OPENSORA_REF is at {refenv.reference_commit()}; the goldens come from {common.COMMIT}.")
    torch.set_num_threads(1)
    with torch.no_grad():
        make_autoencoder()
        make_runs()
