"""What a video begins and ends with: reference pictures laid into the conditioning."""

import node_helpers
from comfy_api.latest import io

from ..opensora_core import geometry
from ..opensora_core.config import HUNYUAN_VAE
from ..opensora_core.errors import OpenSoraError
from ..opensora_core.sampling.conditioning import FITS, fit_image, image_condition
from .host import clips
from .host.vae import check_latent_shape, vae_config


class OpenSoraImageToVideo(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="OpenSoraImageToVideo",
            display_name="Open-Sora Image to Video",
            category="Open-Sora/conditioning",
            description="Gives the video its first frame, its last frame, or both. Each picture is encoded on its own, as the model was trained.",
            search_aliases=["open sora i2v", "image to video", "first frame", "last frame", "start image", "loop"],
            inputs=[
                io.Conditioning.Input("positive", tooltip="The encoded prompt; it is copied, never changed."),
                io.Conditioning.Input("negative", tooltip="The encoded negative prompt; it is copied, never changed."),
                io.Vae.Input("vae", tooltip="The HunyuanVideo VAE, from Open-Sora Load VAE or Load VAE."),
                io.Latent.Input("latent", tooltip="The clip to make, at least 5 frames; it says how large the pictures must be."),
                io.Image.Input(
                    "start_image",
                    optional=True,
                    tooltip="The first frame. One picture for all videos of the batch, or one for each. None = free.",
                ),
                io.Image.Input(
                    "end_image",
                    optional=True,
                    tooltip="The last frame. One picture for all videos of the batch, or one for each. None = free.",
                ),
                io.Combo.Input(
                    "fit",
                    options=list(FITS),
                    default=FITS[0],
                    tooltip="How a picture of another shape is fitted: crop = cover and cut the middle, as in training; pad = black bars; stretch.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive", tooltip="The prompt with the pictures, for a sampler or guider."),
                io.Conditioning.Output(display_name="negative", tooltip="The negative prompt with the same pictures."),
                io.Latent.Output(display_name="latent", tooltip="The clip that was given, unchanged."),
            ],
        )

    @classmethod
    def execute(cls, positive, negative, vae, latent, start_image=None, end_image=None, fit=FITS[0]) -> io.NodeOutput:
        shape = _check(vae, latent["samples"], start_image, end_image)
        size = shape[3] * geometry.SPACE_COMPRESSION, shape[4] * geometry.SPACE_COMPRESSION
        head, tail = (
            None if pictures is None else clips.encode_pictures(vae, fit_image(pictures[..., :3], *size, fit))
            for pictures in (start_image, end_image)
        )
        condition = image_condition(shape, head=head, tail=tail)
        # The host's own keys, in its convention: 1 = to be generated. Its context windows and stock image nodes read them too.
        values = {"concat_latent_image": condition.latents, "concat_mask": 1 - condition.mask}
        given = (node_helpers.conditioning_set_values(conditioning, values) for conditioning in (positive, negative))
        return io.NodeOutput(*given, latent)


def _check(vae, samples, start_image, end_image) -> tuple[int, ...]:
    """Everything that can be wrong, before anything is encoded; returns the clip's latent shape."""
    if start_image is None and end_image is None:
        raise OpenSoraError(
            "Image to video needs a start_image, an end_image or both; for none, connect the prompts to the sampler directly."
        )
    shape = check_latent_shape(tuple(samples.shape), HUNYUAN_VAE.latent_channels)
    geometry.check_size(*(side * geometry.SPACE_COMPRESSION for side in shape[3:]))
    given = [(name, image) for name, image in (("start_image", start_image), ("end_image", end_image)) if image is not None]
    if shape[2] <= len(given):
        frames = geometry.pixel_frames(shape[2])
        raise OpenSoraError(
            f"This clip has {frames} frame(s), all given by {len(given)} picture(s); use at least {4 * len(given) + 1} frames."
        )
    for name, image in given:
        if image.ndim != 4 or image.shape[-1] not in (3, 4) or 0 in image.shape:
            raise OpenSoraError(f"{name} is {list(image.shape)}; an IMAGE is [pictures, height, width, 3].")
        if image.shape[0] not in (1, shape[0]):
            raise OpenSoraError(f"{name} holds {image.shape[0]} pictures for a batch of {shape[0]} videos; give 1 or {shape[0]}.")
    channels = vae_config(vae).latent_channels
    if channels != shape[1]:
        raise OpenSoraError(f"This VAE has {channels} latent channels and the clip {shape[1]}; use the HunyuanVideo VAE.")
    return shape
