"""The core VAE on the host's VAE socket.

The host's own HunyuanVideo VAE is another function than upstream's once there is more than one
frame: its middle attention sees later frames, and it normalises in slices of a few frames. This one runs
upstream's function, spatially tiled as upstream ships it, from every stock node. A stock VAE is
made exact only for the length of one of our own calls (`exact_codec`).
"""

import os
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from functools import cache, partial

import comfy.ldm.models.autoencoder
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.utils
import torch
from comfy_execution.graph import DynamicPrompt
from comfy_execution.graph_utils import is_link
from torch import Tensor

from ...opensora_core.checkpoint import detect
from ...opensora_core.checkpoint.files import Halves, read_network
from ...opensora_core.checkpoint.load import check_keys, open_codec
from ...opensora_core.choices import EXACT
from ...opensora_core.codecs.codec import CodecConfig, Encoded
from ...opensora_core.codecs.hunyuan.config import VAEConfig
from ...opensora_core.codecs.hunyuan.layers import frame_causal_attention
from ...opensora_core.codecs.tiling import tiled_decode, tiled_encode
from ...opensora_core.errors import OpenSoraError
from ...opensora_core.families.table import DEFAULT, FAMILIES, codec_of, codecs_of
from ...opensora_core.family import Part
from ...opensora_core.geometry import CAUSAL, HIGH_COMPRESSION, Grid, Tiling
from ...opensora_core.memory.decode import HOME, MARGIN, Ladder, decode_bytes, encode_bytes, tile_decode_bytes, tile_encode_bytes, walk
from ...opensora_core.run.finite import again_words, is_finite, not_numbers
from . import kept, notice, selftest
from .out_of_memory import unless_out_of_memory
from .paths import VAE, load_tensors, model_file


def _words(grid: Grid) -> tuple[str, str]:
    """The names, for a model's grid, of the VAE that makes its latents and of the node that makes an empty one."""
    own = {CAUSAL: "Open-Sora Empty Latent Video", HIGH_COMPRESSION: "Open-Sora Empty Latent (High Compression)"}
    row = next(family for family in FAMILIES if family.grid == grid and family.slot == DEFAULT.slot)
    title = codecs_of(row)[0].title + (" of the high-compression variant" if grid == HIGH_COMPRESSION else "")
    return title, own.get(grid, "Open-Sora Empty Latent")


class VAENetwork:
    """A mix-in that stands before a codec: the methods the host calls, which are upstream's tiled function, with progress and interruption."""

    device = None  # in place of the core's property: the host's patcher writes here where it has put the weights

    def decode_tile(self, latents: Tensor, home: torch.device | None = None) -> Tensor:
        """The codec's own decode, without tiling; [B, C, t, h, w] -> [B, 3, T, H, W]."""
        return super().decode(latents, home)

    def encode_tile(self, pixels: Tensor) -> Encoded:
        """The codec's own encode, without tiling."""
        return super().encode(pixels)

    def encode(self, pixels: Tensor) -> Tensor:
        """[B, 3, T, H, W] in -1..1 -> the posterior's mode, [B, C, t, h, w]."""
        return self._encode(pixels, self.config.cut(Tiling()))

    def decode(self, latents: Tensor, free_bytes: Callable[[], float] | None = None) -> Tensor:
        """[B, C, t, h, w] -> [B, 3, T, H, W]; what the device has no room for is parked in main memory, which changes no frame.

        Args:
            free_bytes: what the latents' device has, as the host counts it for this model.

        Raises:
            torch.OutOfMemoryError: neither way fits. The host answers with `decode_tiled`.
        """
        device, node_id = latents.device, notice.executing_node()
        free = free_bytes or partial(comfy.model_management.get_free_memory, device)
        ram = partial(ram_for_parking, device)
        ladder = Ladder(self.config, tuple(latents.shape), latents.element_size(), lambda: int(free()), ram)
        result_of = walk(ladder.attempts(EXACT, Tiling()), lambda line: notice.show(line, node_id), unless_out_of_memory)
        return result_of(partial(self._decode, latents))

    def encode_tiled(
        self, pixels: Tensor, tile_x: int = 256, tile_y: int = 256, overlap: int = 64, tile_t: int = 0, overlap_t: int = 0
    ) -> Tensor:
        """Encode in tiles of the caller's size (pixels and frames). `overlap_t` is upstream's share of a tile, whatever is asked."""
        size = min(tile_x, tile_y)
        return self._encode(pixels, Tiling(size, overlap / size, tile_t or self.config.short_tile))

    def decode_tiled(
        self, latents: Tensor, tile_x: int = 32, tile_y: int = 32, overlap: int = 8, tile_t: int = 0, overlap_t: int = 0
    ) -> Tensor:
        """Decode in tiles of the caller's size (latent pixels and frames). The host calls it without `tile_t` after a
        whole-clip decode ran out of memory; then, and only then, time is tiled as upstream's temporal tiling does."""
        grid, size = self.config.grid, min(tile_x, tile_y)
        return self._decode(latents, Tiling(size * grid.space, overlap / size, tile_t * grid.frames.time or self.config.short_tile))

    def _encode(self, pixels: Tensor, tiling: Tiling) -> Tensor:
        return tiled_encode(self.encode_tile, pixels, tiling, TileProgress(), grid=self.config.grid).mode()

    def _decode(self, latents: Tensor, tiling: Tiling) -> Tensor:
        place = comfy.model_management.intermediate_device(), comfy.model_management.intermediate_dtype()

        # Tiles leave the card as they are made; joining them needs no GPU and a whole clip of pixels would fill it.
        return tiled_decode(lambda *tile: self.decode_tile(*tile).to(*place), latents, tiling, TileProgress(), grid=self.config.grid)


@cache
def _network_class(codec: type) -> type:
    return type(VAENetwork.__name__, (VAENetwork, codec), {})


class OpenSoraVAE(selftest.base(comfy.sd, "VAE")):
    """A host VAE that holds the core network. Every attribute that the host's constructor sets is set here (a test compares)."""

    def __init__(self, network: VAENetwork, config: CodecConfig, device: torch.device, dtype: torch.dtype, patcher):
        self.config = config
        self.first_stage_model = network
        self.patcher = patcher
        self.device = device
        self.vae_dtype = dtype
        self.output_device = comfy.model_management.intermediate_device()
        self.working_dtypes = [torch.bfloat16, torch.float16, torch.float32]
        self.latent_channels = config.latents.channels
        self.latent_dim = 3
        self.output_channels = config.in_channels
        time, space = config.grid.frames.time, config.grid.space
        self.upscale_ratio = (lambda frames: max(0, config.grid.pixel_frames(frames)), space, space)
        self.downscale_ratio = (lambda frames: max(0, (frames + time - 1) // time), space, space)
        self.upscale_index_formula = self.downscale_index_formula = (time, space, space)
        self.process_input = lambda image: image * 2.0 - 1.0
        self.process_output = lambda image: image.add_(1.0).div_(2.0).clamp_(0.0, 1.0)
        self.handles_tiling = True
        self.crop_input = True
        self.disable_offload = self.not_video = False
        self.pad_channel_value = self.extra_1d_channel = self.format_encoded = self.size = None
        self.audio_sample_rate = 44100
        self.model_size()

    def decode(self, samples_in, vae_options=None):
        """The host's; it asks for what an exact decode takes, and the network makes do with what is there then."""
        free = partial(self.patcher.get_free_memory, self.device)
        images = super().decode(samples_in, {**(vae_options or {}), "free_bytes": free})
        if is_finite(images) or not is_finite(samples_in):
            return images
        if (wider := in_float32(self)) is None:
            raise OpenSoraError(f"{not_numbers('Decoding', self.vae_dtype, narrow_words(self))} {kept.keep(samples_in, 'finished')}")
        notice.show(again_words("Decoding", self.vae_dtype), notice.executing_node())
        return wider.decode(samples_in, vae_options)

    def decode_tiled(self, samples, tile_x=None, tile_y=None, overlap=None, tile_t=None, overlap_t=None):
        """The host's, after making room for the caller's tiles: the estimate that it asks for can only be of upstream's."""
        videos, _, *sizes = check_latent_shape(tuple(samples.shape), self.config)
        self._make_room(decode_bytes, videos, sizes, (tile_t and tile_t + 1, tile_y, tile_x))
        return super().decode_tiled(samples, tile_x, tile_y, overlap, tile_t, overlap_t)

    def encode_tiled(self, pixel_samples, tile_x=None, tile_y=None, overlap=None, tile_t=None, overlap_t=None):
        """The host's, after making room for the caller's tiles; pixel_samples [T, H, W, 3]."""
        self._make_room(encode_bytes, 1, pixel_samples.shape[-4:-1], (tile_t and tile_t + 1, tile_y, tile_x))
        return super().encode_tiled(pixel_samples, tile_x, tile_y, overlap, tile_t, overlap_t)

    def _make_room(self, need: Callable, videos: int, sizes: Sequence[int], limits: tuple[int | None, ...]) -> None:
        """need: (sizes of the codec, those of a tile, bytes of a number) -> bytes. A tile has each size, or its limit where that is smaller."""
        tile = tuple(min(size, limit or size) for size, limit in zip(sizes, limits, strict=True))
        num_bytes = videos * need(self.config, tile, self.vae_dtype.itemsize)
        comfy.model_management.load_models_gpu([self.patcher], memory_required=int(MARGIN * num_bytes))

    def memory_used_decode(self, shape, dtype: torch.dtype) -> int:
        shape = (1, *check_latent_shape(shape, self.config)[1:])  # per video: the host multiplies
        return int(MARGIN * tile_decode_bytes(self.config, shape, self.config.cut(Tiling()), dtype.itemsize))

    def memory_used_encode(self, shape, dtype: torch.dtype) -> int:
        return int(MARGIN * tile_encode_bytes(self.config, shape, self.config.cut(Tiling()), dtype.itemsize))


class TileProgress:
    """The host's progress bar, one step per tile, and a stop between tiles when a person interrupts.

    Args:
        clips: how many clips are tiled one after the other under one bar.
    """

    def __init__(self, clips: int = 1):
        self.clips, self.finished, self.bar = clips, 0, None

    def __call__(self, done: int, total: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        if self.bar is None:
            self.bar = comfy.utils.ProgressBar(total * self.clips)
        self.bar.update_absolute(self.finished * total + done, total * self.clips)
        if done == total:
            self.finished += 1


def check_file(path: str | Halves) -> detect.Identity:
    """What a VAE file is, by its header alone; what it holds besides is named in a warning.

    Raises:
        CheckpointError: the file is something else, quantised, damaged or not whole.
    """
    header, identity = open_codec(path, "vae")
    check_keys(header, identity)
    return identity


def load_vae(path: str, device: torch.device | None = None, disable_dynamic: bool = False, dtype: torch.dtype | None = None) -> OpenSoraVAE:
    """Load a HunyuanVideo-layout VAE or Video DC-AE file of any width; errors as check_file's. dtype: None = the host's choice."""
    identity = check_file(path)
    state, _ = load_tensors(path)
    state = dict(pair for key, tensor in state.items() for pair in identity.convert(key, tensor))
    vae = _build(identity.config, state, device or comfy.model_management.vae_device(), disable_dynamic, dtype)
    vae.patcher.cached_patcher_init = (load_vae_patcher, (path, device))
    return vae


def load_vae_patcher(path: str, device: torch.device | None = None, disable_dynamic: bool = False):
    """The patcher of a fresh copy, for the host's multi-GPU clones."""
    return load_vae(path, device, disable_dynamic).patcher


def in_float32(vae) -> OpenSoraVAE | None:
    """The VAE of the same file in fp32; None where it computes so already, or does not say which file it is from."""
    loader = None if vae.vae_dtype == torch.float32 else vae.patcher.cached_patcher_init
    path = loader[1][0] if loader else None
    if not (isinstance(path, Halves) or isinstance(path, str) and os.path.isfile(path)):
        return None
    try:
        return load_vae(path, vae.device, dtype=torch.float32)
    except OpenSoraError:  # a checkpoint with more in it than the VAE
        return None


def narrow_words(vae) -> str:
    """What to say of the likely cause where a VAE's answer is not made of numbers."""
    if vae.vae_dtype == torch.float16:
        return "fp16, which is too narrow for this VAE (start ComfyUI without --fp16-vae), or a damaged file"
    return "a damaged VAE file (python -m opensora_core inspect FILE looks at it)"


def ram_for_parking(device: torch.device) -> int:
    """Main memory that a decode on a device may park activations in."""
    return 0 if comfy.model_management.is_device_cpu(device) else comfy.model_management.get_free_memory(HOME)


def vae_config(vae) -> CodecConfig:
    """Sizes of a VAE that can be used with Open-Sora: ours, or the host's HunyuanVideo VAE.

    Raises:
        OpenSoraError: any other VAE.
    """
    network = getattr(vae, "first_stage_model", None)
    if isinstance(network, VAENetwork):
        return vae.config
    channels, dimensions = getattr(vae, "latent_channels", None), getattr(vae, "latent_dim", None)
    is_of_the_host = isinstance(network, comfy.ldm.models.autoencoder.AutoencodingEngineLegacy) and dimensions == 3
    halves = (getattr(network, "encoder", None), getattr(network, "decoder", None))
    if not is_of_the_host or not all(hasattr(half, "carried") for half in halves) or network.encoder.time_compress != 4:
        found = "nothing" if network is None else f"{type(network).__name__} ({channels} latent channels, {dimensions}D)"
        raise OpenSoraError(
            f"This VAE holds {found}; Open-Sora 2.0 needs the HunyuanVideo VAE (16 latent channels, 3D): "
            "use Open-Sora Load VAE or Load VAE with hunyuan_vae.safetensors."
        )
    encoder, _ = halves
    return VAEConfig(channels, tuple(encoder.ch * multiple for multiple in encoder.in_ch_mult[1:]), encoder.num_res_blocks)


@contextmanager
def exact_codec(vae):
    """(encode, decode) of one tile as codecs.codec.Codec has them, whoever owns the weights: upstream's function.

    A stock VAE is exact inside the block and as it was after it.
    """
    network = vae.first_stage_model
    if isinstance(network, VAENetwork):
        yield network.encode_tile, network.decode_tile
        return
    halves = (network.encoder, network.decoder)
    before = [(half.carried, half.mid.attn_1.optimized_attention) for half in halves]
    try:
        for half in halves:
            half.carried = False  # else the host works in slices of time, with GroupNorm statistics of their own
            half.mid.attn_1.optimized_attention = _frame_causal_attention
        yield (lambda pixels: Encoded(network.quant_conv(network.encoder(pixels)))), network.decode
    finally:
        for half, (carried, attention) in zip(halves, before, strict=True):
            half.carried, half.mid.attn_1.optimized_attention = carried, attention


CODECS_KEY = "open_sora_codecs"  # of a LATENT: kinds of codec of the model that it is of


def clip_shape(vae, latent: dict) -> tuple[int, ...]:
    """[videos, channels, latent frames, rows, columns] of a LATENT that a VAE takes, and that is of a model on its latents, or one sentence."""
    shape = check_latent_shape(tuple(latent["samples"].shape), vae_config(vae))
    check_pair(vae, latent.get(CODECS_KEY))
    return shape


def check_pair(vae, codecs: Sequence[str] | None) -> None:
    """Raise an OpenSoraError unless a VAE is of a kind whose latents a model works on. codecs: of the model's row; None = not known."""
    _check_row(codec_of(vae_config(vae)), codecs, "This VAE")


def _check_row(row: Part, codecs: Sequence[str] | None, what: str) -> None:
    if codecs and row.kind not in codecs:
        own = next(codecs_of(family)[0].title for family in FAMILIES if family.codecs == tuple(codecs))
        raise OpenSoraError(f"{what} is {row.title}, and the model works on the latents of {own}; load {own} with Open-Sora Load VAE.")


def check_decoders(graph: DynamicPrompt | None, node_id: str, codecs: Sequence[str]) -> None:
    """Raise an OpenSoraError, before a node samples, where its latents go to a node whose VAE is of another model's, by the file that its loader names.

    Latents are followed through nodes without a VAE. What no file name tells, the node that decodes says: then the latents are there, and kept.
    """
    nodes = {name: graph.get_node(name)["inputs"] for name in graph.all_node_ids()} if graph else {}
    links = [(value[0], name) for name, inputs in nodes.items() for value in inputs.values() if is_link(value)]
    followed, ahead = set(), [node_id]
    while ahead:
        followed.add(name := ahead.pop())
        users = [user for source, user in links if source == name and user not in followed]
        ahead += [user for user in users if "vae" not in nodes[user]]
        for user in users:
            loader = nodes[user].get("vae")
            file = nodes.get(loader[0], {}).get("vae_name") if is_link(loader) else None
            if isinstance(file, str) and any(source == user for source, _ in links) and (row := _row_of_file(file)):
                _check_row(row, codecs, file)


def _row_of_file(name: str) -> Part | None:
    """The row of a VAE's file in models/vae; None where it cannot be told."""
    try:
        identity = detect.identify(read_network(model_file(VAE, name)).shapes)
    except OpenSoraError:
        return None
    return identity.row if identity.slot == "vae" else None


def check_latent_shape(shape, config: CodecConfig) -> tuple[int, int, int, int, int]:
    """(videos, channels, latent frames, latent height, latent width) of a LATENT that a VAE takes, or one sentence."""
    grid, channels = config.grid, config.latents.channels
    if len(shape) == 5 and shape[1] == channels and 0 not in shape:
        return tuple(shape)
    # Five dimensions are a video's, of another model or variant.
    wanted = f"the VAE given, {_words(grid)[0]}, works on" if len(shape) == 5 and 0 not in shape else "a video latent is"
    raise OpenSoraError(f"Connect another LATENT. This LATENT is {list(shape)}; {wanted} {latent_words(grid, channels)}.")


def latent_words(grid: Grid, channels: int) -> str:
    """The shape of a variant's latents, and the node that makes them, for a sentence."""
    return f"[videos, {channels}, latent frames, height / {grid.space}, width / {grid.space}], as {_words(grid)[1]} makes it"


def _build(config: CodecConfig, state: dict, device: torch.device, disable_dynamic: bool, dtype: torch.dtype | None = None) -> OpenSoraVAE:
    management = comfy.model_management
    dtype = dtype or management.vae_dtype(device, [torch.bfloat16, torch.float16, torch.float32])
    network = _network_class(codec_of(config).build)(config, operations=comfy.ops.disable_weight_init, dtype=dtype).train(False)
    management.archive_model_dtypes(network)
    # By attribute: the host swaps CoreModelPatcher for its dynamic one at start.
    patcher_class = comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    patcher = patcher_class(network, load_device=device, offload_device=management.vae_offload_device())
    state = {key: tensor.to(dtype) for key, tensor in state.items()}  # stays mapped where it is of that type already
    # Not strict: with dynamic memory the host's layers have no weights to compare until now; the file was compared already.
    network.load_state_dict(state, strict=False, assign=patcher.is_dynamic())
    return OpenSoraVAE(network, config, device, dtype, patcher)


def _frame_causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The core's frame-causal attention in the shape of the host's attention block; q, k, v and result: [B, C, T, H, W], one head."""
    tokens = (x.flatten(3).permute(0, 2, 3, 1).contiguous() for x in (q, k, v))
    return frame_causal_attention(*tokens).permute(0, 3, 1, 2).reshape(q.shape)
