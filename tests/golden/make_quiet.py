"""Record goldens in which small terms count: python tests/golden/make_quiet.py, as make_golden.py runs.

Inputs near zero show the epsilon of a norm, bfloat16 shows where numbers are rounded, quiet latents show the shift of an autoencoder: a
mistake of 1e-6 to 1e-4 that loud goldens hide. The weights are make_golden.py's, some of them scaled by a power of two, which loses nothing.
"""

import refenv
import torch
from make_golden import (
    LATENT_CHANNELS,
    OPEN_SORA,
    TEXT_TOKENS,
    forward_case,
    picture_autoencoder,
    save,
    transformer,
)

QUIET = 2.0**-10


def scaled(model, names, factor=QUIET):
    """The model with some of its parameters scaled: those whose name contains one of `names`."""
    for name, parameter in model.named_parameters():
        if any(part in name for part in names):
            parameter.data.mul_(factor)
    return model


EMBEDDERS = ("img_in.", "txt_in.", "cond_in.")
QUERIES_AND_KEYS = ("q_proj.", "k_proj.")


def make_transformer():
    generator, shape = torch.Generator().manual_seed(21), (2, LATENT_CHANNELS, 2, 6, 4)
    call = "opensora.models.mmdit.model.MMDiTModel.forward (eager, fp32); transformer_weights with "
    near_zero = scaled(transformer(1, **OPEN_SORA), EMBEDDERS)
    save("quiet_embedders", forward_case(near_zero, generator, shape, True), f"{call}{', '.join(EMBEDDERS)} times 2**-10")
    small = scaled(transformer(1, **OPEN_SORA), QUERIES_AND_KEYS)
    save("quiet_queries", forward_case(small, generator, shape, True), f"{call}{', '.join(QUERIES_AND_KEYS)} times 2**-10")


def make_bfloat16():
    """A forward in bfloat16, at a timestep that bfloat16 has not."""
    from opensora.utils.sampling import pack, unpack

    generator, (batch, frames, height, width) = torch.Generator().manual_seed(22), (1, 2, 6, 4)
    model = transformer(1, **OPEN_SORA).bfloat16()
    draw = lambda *size: torch.randn(*size, generator=generator).bfloat16()  # noqa: E731
    case = {"x": draw(batch, LATENT_CHANNELS, frames, height, width), "context": draw(batch, TEXT_TOKENS, 64), "y": draw(batch, 64)}
    case["timestep"] = torch.tensor([0.9979])
    case["cond"] = torch.zeros(batch, LATENT_CHANNELS + 1, frames, height, width, dtype=torch.bfloat16)
    grid = torch.stack(torch.meshgrid(*(torch.arange(n) for n in (frames, height // 2, width // 2)), indexing="ij"), -1)
    out = model(
        img=pack(case["x"]), img_ids=grid.reshape(1, -1, 3).float(), txt=case["context"], txt_ids=torch.zeros(1, TEXT_TOKENS, 3),
        timesteps=case["timestep"].bfloat16(), y_vec=case["y"], cond=pack(case["cond"]), guidance=None,
    )  # fmt: skip
    case["output"] = unpack(out, 8 * height, 8 * width, frames)
    save("bfloat16", case, "opensora.models.mmdit.model.MMDiTModel.forward (eager, bfloat16); weights: transformer_weights")


def make_bfloat16_run():
    """Latents kept in bfloat16 between steps, with a network of one multiplication, so that only the solver rounds."""
    from opensora.utils.sampling import I2VDenoiser, get_schedule, pack, unpack

    frames, height, width, steps = 9, 32, 48, 14
    latent = (1, LATENT_CHANNELS, (frames - 1) // 4 + 1, height // 8, width // 8)
    start = torch.randn(latent, generator=torch.Generator().manual_seed(23)).bfloat16()
    factors = torch.tensor([0.71, 0.53, 0.53]).bfloat16()

    def network(img, timesteps, **unused):
        return img * factors[:, None, None] * timesteps[:, None, None]

    sigmas = get_schedule(steps, height * width // 256, latent[2])
    img = I2VDenoiser().denoise(
        network, img=pack(start).repeat(3, 1, 1), timesteps=sigmas, guidance=7.5, guidance_img=3.0, masks=torch.zeros(1, 1, *latent[2:]),
        masked_ref=torch.zeros(latent), sigma_min=0.0, text_osci=True, image_osci=True, scale_temporal_osci=True,
    )  # fmt: skip
    tensors = {"noise": start, "sigmas": torch.tensor(sigmas), "factors": factors, "latents": unpack(img, height, width, latent[2])}
    save("bfloat16_run", tensors, "opensora.utils.sampling.I2VDenoiser.denoise, latents in bfloat16; network: latents * factor * timestep")


def make_picture():
    vae = picture_autoencoder()
    latents = QUIET * torch.randn(1, LATENT_CHANNELS, 1, 6, 10, generator=torch.Generator().manual_seed(24))
    call = "opensora.models.vae.autoencoder_2d.AutoEncoderFlux.decode; weights: flux_vae_weights"
    tensors = {"latents": latents, "shifted": vae.decode(latents)}
    tensors["quiet"] = scaled(vae, ("decoder.conv_in.",)).decode(latents)
    save("flux_quiet", tensors, f"{call}, and for `quiet` its decoder.conv_in times 2**-10")


if __name__ == "__main__":
    refenv.activate()
    torch.set_num_threads(1)
    with torch.no_grad():
        make_transformer()
        make_bfloat16()
        make_bfloat16_run()
        make_picture()
