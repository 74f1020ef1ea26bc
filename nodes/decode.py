"""From latents to frames and back, through the VAE that Open-Sora was trained with."""

from comfy_api.latest import io

from ..opensora_core.choices import POSTERIORS, SAMPLE
from ..opensora_core.codecs.tiling import check_tiling
from ..opensora_core.errors import check_choice
from ..opensora_core.geometry import WHOLE_CLIP, Tiling
from .host import clips, inputs, notice, paths, shared, vae as vae_files
from .host.node import Node
from .host.vae import clip_shape

FOLDER = "vae"

_TILE_SIZE = {"default": Tiling.tile_size, "min": 0, "max": 4096, "step": 32}
_VAE_TOOLTIP = "The HunyuanVideo VAE, from Open-Sora Load VAE or Load VAE; a stock one is made exact for this node only."
_OVERLAP = {"default": Tiling.overlap, "min": 0.0, "max": 0.5, "step": 0.0625}


def _tile_inputs() -> list:
    return [
        io.Int.Input(
            "tile_size",
            **_TILE_SIZE,
            tooltip="Side of a tile in pixels. 256 is the reference's; smaller saves memory, 0 = no tiles.",
        ),
        io.Float.Input(
            "overlap",
            **_OVERLAP,
            tooltip="Share of a tile that its neighbour repeats and blends. 0.25 is the reference's; 0 = none.",
        ),
    ]


class OpenSoraVAELoader(Node):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="OpenSoraVAELoader",
            display_name="Open-Sora Load VAE",
            category="Open-Sora/loaders",
            description="Loads the HunyuanVideo VAE so that clips are encoded and decoded exactly as Open-Sora does, by stock VAE nodes too.",
            search_aliases=["open sora vae", "hunyuan vae", "vae loader"],
            inputs=[
                io.Combo.Input(
                    "vae_name",
                    options=paths.choices(FOLDER, "vae"),
                    tooltip="The video VAE in models/vae: hunyuan_vae.safetensors from the Open-Sora repository.",
                )
            ],
            outputs=[io.Vae.Output(display_name="vae", tooltip="The VAE; stock VAEDecode and VAEEncode are exact for clips with it.")],
        )

    @classmethod
    def validate_inputs(cls, vae_name=None):
        # The host runs this node when its VAE is first needed, after sampling.
        return inputs.problems(vae_name=inputs.problem(lambda name: vae_files.check_file(paths.model_file(FOLDER, name)), vae_name))

    @classmethod
    def fingerprint_inputs(cls, vae_name):
        return paths.stamp(FOLDER, vae_name)

    @classmethod
    def execute(cls, vae_name) -> io.NodeOutput:
        return io.NodeOutput(shared.shared_vae(paths.model_file(FOLDER, vae_name)))


class OpenSoraTiledVAEDecode(Node):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="OpenSoraTiledVAEDecode",
            display_name="Open-Sora Tiled VAE Decode",
            category="Open-Sora/vae",
            description="Decodes a video in overlapping tiles, with the reference's sizes and blending by default, and says so when memory forces another way.",
            search_aliases=["open sora decode", "vae decode", "tiled decode", "latent to video"],
            inputs=[
                inputs.vae(_VAE_TOOLTIP),
                io.Latent.Input("latent", tooltip="The finished clip."),
                *_tile_inputs(),
                io.Int.Input(
                    "temporal_tile",
                    default=Tiling.temporal_tile,
                    min=-4,  # a step, so that the widget counts in fours from 0
                    max=1024,
                    step=4,
                    advanced=True,
                    tooltip="Length of a tile in frames. 0 = as the model's makers decode: the whole clip at once, the high-compression variant 32 frames; "
                    "below 0 = the whole clip with any model; 64 = the reference's own temporal tile.",
                ),
                inputs.policy(),
            ],
            outputs=[io.Image.Output(display_name="images", tooltip="The frames, 0..1; videos of a batch follow one another.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, tile_size=None, temporal_tile=None):
        return _tiling_problems(tile_size=tile_size, temporal_tile=_frames_of_tile(temporal_tile or 0))

    @classmethod
    def execute(cls, vae, latent, tile_size, overlap, temporal_tile, policy) -> io.NodeOutput:
        tiling = Tiling(tile_size, overlap, _frames_of_tile(temporal_tile))
        report = _reporter(cls.hidden.unique_id)
        clip_shape(vae, latent)
        return io.NodeOutput(clips.decode(vae, latent["samples"], tiling, policy, report))


class OpenSoraTiledVAEEncode(Node):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="OpenSoraTiledVAEEncode",
            display_name="Open-Sora Tiled VAE Encode",
            category="Open-Sora/vae",
            description="Encodes frames as one clip in overlapping tiles, with the reference's sizes and blending by default.",
            search_aliases=["open sora encode", "vae encode", "tiled encode", "video to latent"],
            inputs=[
                inputs.vae(_VAE_TOOLTIP),
                io.Image.Input("image", tooltip="The frames of one clip: 4k+1 of them (1, 5, 9, …), sides multiples of 16 pixels."),
                *_tile_inputs(),
                inputs.choice(
                    "posterior",
                    POSTERIORS,
                    advanced=True,
                    tooltip="mode = the most likely latent, the same every time; sample = drawn with the seed, as the reference does.",
                ),
                io.Int.Input(
                    "seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, advanced=True, tooltip="Seed of posterior sample; not used by mode."
                ),
            ],
            outputs=[io.Latent.Output(display_name="latent", tooltip="The clip's latent: [1, 16, latent frames, height / 8, width / 8].")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, tile_size=None):
        return _tiling_problems(tile_size=tile_size)

    @classmethod
    def execute(cls, vae, image, tile_size, overlap, posterior, seed) -> io.NodeOutput:
        check_choice("posterior", posterior, POSTERIORS)
        seed = seed if posterior == SAMPLE else None
        samples = clips.encode(vae, image, Tiling(tile_size, overlap), seed, _reporter(cls.hidden.unique_id))
        return io.NodeOutput({"samples": samples})


def _frames_of_tile(temporal_tile: int) -> int:
    return max(temporal_tile, WHOLE_CLIP)


def _tiling_problems(**sizes: int | None) -> dict[str, str]:
    """What is wrong with each size of a tile, taken alone."""
    alone = {"tile_size": 0, "temporal_tile": 0}
    return inputs.problems(**{name: inputs.problem(check_tiling, Tiling(**{**alone, name: size or 0})) for name, size in sizes.items()})


def _reporter(node_id: str | None):
    return lambda line: notice.show(line, node_id)
