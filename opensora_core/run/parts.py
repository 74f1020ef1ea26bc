"""The networks of a model's files, and of Flux's, as one pipeline uses them: read when they are first needed, changed in no other pipeline; a VAE alone.

Where they live between uses is the business of memory/component.py; that two pipelines over the same files and options hold the same
weights, that of memory/loaded.py.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.detect import identify, require
from ..checkpoint.files import read_network
from ..checkpoint.load import check_precision, load_decoder, load_transformer, load_vae
from ..checkpoint.lora import merge_lora
from ..encoders.clip import load_clip
from ..encoders.t5 import load_t5
from ..families.table import codec_for
from ..memory.component import Component, Placement, resolve_device
from ..memory.decode import VideoVAE
from ..memory.loaded import SHARED, own_structure
from ..ops import attention
from ..parallel import Group
from ..sampling.plan import fingerprint_of
from .files import PLANS, ModelFiles, check_files, check_picture_files, whole_vae
from .kernels import compile_blocks


class Networks:
    """Transformer, VAE and both text encoders.

    placement: where and how they compute; the pipeline may change it, and then calls `release`.
    quantised: the quantised precision that the large layers of the transformer and of T5 are read in, if one was asked for.

    Attributes:
        transformer, vae, t5, clip: see component.Component.at_work. video_vae: clips in and out of the VAE, see memory/decode.py.
        keep_loaded, keep_encoded: keep networks, and encoded prompts, when no pipeline uses them, within the limits of memory/loaded.py.
        is_compiled: whether the transformer's blocks are compiled as it is read. fingerprint: of it once it was read, see sampling/plan.py.
        attention: what its blocks attend by, of ops.py's form. loras: (path, strength) of what is merged into it as it is read, in turn.
        plan_folders: where calibrated plans are.
    """

    def __init__(self, files: ModelFiles, placement: Placement, quantised: str | None):
        self.files, self.placement, self.quantised = files, placement, quantised
        self.keep_loaded = self.keep_encoded = False
        self.fingerprint, self.plan_folders = "", (PLANS,)
        self.attention, self.is_compiled = attention, False
        self.loras: list[tuple[Path, float]] = []
        self._is_checked = False
        self.transformer = Component(self._read_transformer, placement, is_main=True)
        self.t5 = Component(self._read_t5, placement, is_kept=False)
        self.clip = Component(self._read_clip, placement, is_kept=False)
        self.vae = Component(self._read_vae, placement)
        self.video_vae = VideoVAE(self.vae, placement)

    @property
    def group(self) -> Group | None:
        return self.video_vae.group

    @property
    def options(self) -> dict[str, str]:
        """What changes their weights, and so what they compute."""
        return _options(self.placement.dtype, self.placement.device, self.quantised)

    def check_files(self) -> None:
        """Compare the parts by their headers, and the precision with the transformer's, and find the tokenizers, once."""
        if not self._is_checked:
            check_files(self.files)
            if self.quantised is not None:
                check_precision(self.files.dit, self.quantised)
            self._is_checked = True

    def use_attention(self, function: Callable) -> None:
        """Let the transformer's blocks compute attention by another function of ops.py's form."""
        self.attention = function
        self.transformer.release()

    def release(self) -> None:
        """Forget all networks; the next use reads them again."""
        for component in (self.transformer, self.vae, self.t5, self.clip):
            component.release()

    def _read_transformer(self, dtype: torch.dtype, device: torch.device) -> Any:
        model = self._read("transformer", self.files.dit, partial(load_transformer, precision=self.quantised), dtype, device)
        self.fingerprint = fingerprint_of(model.named_parameters())
        for block in model.blocks():
            block.attention = self.attention
        for path, strength in self.loras:
            merge_lora(model, path, strength)
        if self.is_compiled:
            compile_blocks(model.blocks())
        return model

    def _read_vae(self, dtype: torch.dtype, device: torch.device) -> Any:
        vae = self._read("vae", self.files.vae, load_vae, dtype, device)
        vae.config = codec_for(self.files.family, vae.config)
        return vae

    def _read_t5(self, dtype: torch.dtype, device: torch.device) -> Any:
        read = partial(load_t5, tokenizers=self.files.tokenizers, precision=self.quantised)
        return self._read("t5", self.files.t5, read, dtype, device).follow(self.files.family.text)

    def _read_clip(self, dtype: torch.dtype, device: torch.device) -> Any:
        return self._read("clip", self.files.clip, partial(load_clip, tokenizers=self.files.tokenizers), dtype, device)

    def _read(self, kind: str, path: Path, read: Callable, dtype: torch.dtype, device: torch.device) -> Any:
        options = _options(dtype, device, self.quantised)
        if kind in ("t5", "clip") and self.files.tokenizers is not None:
            options["tokenizers"] = str(self.files.tokenizers)
        return _shared(kind, path, options, partial(read, path, dtype, device), self.keep_loaded)


class PictureNetworks:
    """Flux.1 from its own files: the transformer that draws a picture, and the decoder of its autoencoder. No weight is read until they are used.

    dit: the transformer's file, dev or schnell. vae: the picture autoencoder's. quantised: as of Networks, or None.
    placement: where and how they compute; shared with a pipeline.
    """

    def __init__(self, dit: str | Path, vae: str | Path, placement: Placement, quantised: str | None = None):
        self.dit, self.vae = Path(dit).expanduser(), Path(vae).expanduser()
        self.config = check_picture_files(self.dit, self.vae)
        self.placement, self.quantised = placement, quantised
        read = partial(load_transformer, slot="flux", precision=quantised)
        self.transformer = Component(partial(self._read, "flux", self.dit, read), placement, is_main=True, is_kept=False)
        self.decoder = Component(partial(self._read, "flux_vae", self.vae, load_decoder), placement, is_kept=False)

    def release(self) -> None:
        """Give up both networks; the next picture reads them again."""
        self.transformer.release()
        self.decoder.release()

    def _read(self, kind: str, path: Path, read: Callable, dtype: torch.dtype, device: torch.device) -> Any:
        return _shared(kind, path, _options(dtype, device, self.quantised), partial(read, path, dtype, device))


def open_vae(path: str | Path = "small", device: str | torch.device = "cpu", torch_dtype: torch.dtype | None = None) -> VideoVAE:
    """A VAE to encode and decode with: `open_vae("hunyuan_vae.safetensors").decode(latents)`. It is read at the first use.

    `.encode(images [T, H, W, 3] in 0..1)` gives latents in the transformer's scale, `.decode(latents)` frames in 0..1; what else it can,
    memory/decode.py says.

    path: a VAE's file, its folder or its shards; a picture autoencoder's (ae.safetensors) too, for clips of one frame; "small" for the built-in
    model's. device: "auto", "cuda", "mps", "cpu". torch_dtype: None = bf16 on an accelerator, fp32 on the CPU.
    """
    file = ModelFiles.in_folder("small").vae if str(path) == "small" else whole_vae(path)
    header = read_network(file)
    identity = identify(header.shapes)
    slot = require(identity, "flux_vae" if identity.slot == "flux_vae" else "vae", header.name).slot
    placement = Placement(resolve_device(device), torch_dtype)
    return VideoVAE(Component(partial(load_vae, file, slot=slot), placement), placement)


def _shared(kind: str, path: Path, options: dict[str, str], read: Callable[[], Any], keep: bool = False) -> Any:
    """A network of our own over weights that every pipeline of these files and options shares."""
    return own_structure(SHARED.get(kind, path, options, read, keep=keep))


def _options(dtype: torch.dtype, device: torch.device, quantised: str | None) -> dict[str, str]:
    return {"dtype": str(dtype).removeprefix("torch."), "device": str(device), "precision": quantised or "as stored"}
