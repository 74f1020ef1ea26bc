"""From latents to frames and back, through the VAE that Open-Sora was trained with; and frames on one sheet."""

from comfy_api.latest import io

from ..opensora_core.choices import POSTERIORS, SAMPLE
from ..opensora_core.codecs.tiling import check_tiling
from ..opensora_core.errors import OpenSoraError
from ..opensora_core.geometry import WHOLE_CLIP, Tiling
from ..opensora_core.media.contact_sheet import contact_sheet
from ..opensora_core.sampling.solvers import MAX_SEED
from .host import clips, inputs, paths, shared, vae as vae_files
from .host.node import Node
from .host.vae import clip_shape

FOLDER = "vae"


class OpenSoraVAELoader(Node, category="loaders", outputs={"vae": io.Vae}, hidden=()):
    takes = [inputs.files("vae_name", lambda: paths.choices(FOLDER, "vae"))]

    @classmethod
    def validate_inputs(cls, vae_name=None):
        # The host runs this node when its VAE is first needed, after sampling.
        return {"vae_name": inputs.problem(lambda name: vae_files.check_file(paths.model_file(FOLDER, name)), vae_name)}

    @classmethod
    def fingerprint_inputs(cls, vae_name):
        return paths.stamp(FOLDER, vae_name)

    @classmethod
    def execute(cls, vae_name) -> io.NodeOutput:
        return io.NodeOutput(shared.shared_vae(paths.model_file(FOLDER, vae_name)))


class OpenSoraTiledVAEDecode(Node, category="vae", outputs={"images": io.Image}):
    takes = [
        *inputs.of("vae", "latent", "tile_size", "overlap"),
        # From -4, a step, so that the widget counts in fours from 0.
        io.Int.Input("temporal_tile", default=Tiling.temporal_tile, min=-4, max=1024, step=4, advanced=True),
        *inputs.of("policy"),
    ]

    @classmethod
    def validate_inputs(cls, tile_size=None, temporal_tile=None):
        return _tiling_problems(tile_size=tile_size, temporal_tile=_frames_of_tile(temporal_tile or 0))

    @classmethod
    def execute(cls, vae, latent, tile_size, overlap, temporal_tile, policy) -> io.NodeOutput:
        tiling = Tiling(tile_size, overlap, _frames_of_tile(temporal_tile))
        clip_shape(vae, latent)
        return io.NodeOutput(clips.decode(vae, latent["samples"], tiling, policy, cls.show))


class OpenSoraTiledVAEEncode(Node, category="vae", outputs={"latent": io.Latent}):
    takes = [
        *inputs.of("vae", "image", "tile_size", "overlap"),
        inputs.choice("posterior", POSTERIORS, advanced=True),
        io.Int.Input("seed", default=0, min=0, max=MAX_SEED, advanced=True),
    ]

    @classmethod
    def validate_inputs(cls, tile_size=None):
        return _tiling_problems(tile_size=tile_size)

    @classmethod
    def execute(cls, vae, image, tile_size, overlap, posterior, seed) -> io.NodeOutput:
        seed = seed if posterior == SAMPLE else None
        return io.NodeOutput({"samples": clips.encode(vae, image, Tiling(tile_size, overlap), seed, cls.show)})


def _frames_of_tile(temporal_tile: int) -> int:
    return max(temporal_tile, WHOLE_CLIP)


def _tiling_problems(**sizes: int | None) -> dict[str, str]:
    """What is wrong with each size of a tile, taken alone."""
    alone = {"tile_size": 0, "temporal_tile": 0}
    return {name: inputs.problem(check_tiling, Tiling(**{**alone, name: size or 0})) for name, size in sizes.items()}


class OpenSoraContactSheet(Node, category="video", outputs={"sheet": io.Image}, hidden=()):
    takes = [
        *inputs.of("images", "latent"),
        io.Int.Input("columns", default=0, min=0, max=16),
        io.Boolean.Input("numbers", default=True),
    ]

    @classmethod
    def execute(cls, images, latent, columns, numbers) -> io.NodeOutput:
        number = latent["samples"].shape[0]
        if images.ndim != 4 or images.shape[-1] < 3 or images.shape[0] % number:
            raise OpenSoraError(
                f"{list(images.shape)} is not the frames of {number} videos of one length; connect the decode of the same latent."
            )
        videos = images[..., :3].reshape(number, -1, *images.shape[1:3], 3)
        return io.NodeOutput(contact_sheet(videos, columns, [str(index) for index in range(number)] if numbers else None))
