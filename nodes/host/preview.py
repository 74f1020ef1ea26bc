"""The whole clip, moving, while it is sampled: a small animated picture for web/js, made beside the run and at next to no cost of it.

The host's own preview shows the first latent frame and stays. Colours are the host's factors for a model's latents, the built-in model's own (fitted by
benchmarks/latent_colours.py), those that `python -m opensora_core colours` keeps beside a VAE, or none: grey, rather than false colours.
"""

import io
import threading
import time
from collections.abc import Callable
from pathlib import Path

import folder_paths
import torch
from comfy.cli_args import LatentPreviewMethod, args
from PIL import Image, ImageOps
from server import PromptServer
from torch import Tensor

from ...opensora_core.readers import read_json
from ...opensora_core.run import files as model_files
from . import notice

EVENT = "open_sora.preview"
SHARE = 1 / 50  # of the run's time that previews may take, at most
SIDE, MILLISECONDS = 256, 125
FIRST_COST = 0.01  # seconds for each latent frame that the first one is taken to cost (benchmarks/preview_cost.py)

_told_off: list[str] = []  # the node that said, once while the host runs, where previews are switched on
_shown: dict = {}  # what was sent last of the run that goes on
pages: set[str] = set()  # clients whose page has web/js: any other would complain of an event that it does not know


def watching(model, callback: Callable | None) -> Callable | None:
    """The callback of a sampling run, which shows the clip as well as doing what it did.

    model: the run's MODEL (a patcher). callback: (step, denoised [B, C, T, h, w] in the model's scale, x, number of steps), or None.
    """
    server, node_id = getattr(PromptServer, "instance", None), notice.executing_node()
    if server is None or node_id is None:
        return callback
    _shown.clear()
    if args.preview_method == LatentPreviewMethod.NoPreviews:
        if not _told_off:
            _told_off.append(node_id)
            _send(server, node_id, off=True)
            notice.logger.info("Open-Sora: no preview while sampling; switch it on in Settings, Comfy, Execution, Live preview method.")
        return callback
    show = Preview(colours(model), lambda picture, step, steps: _send(server, node_id, image=picture, step=step, steps=steps))

    def both(step: int, denoised: Tensor, x: Tensor, steps: int) -> None:
        if callback is not None:
            callback(step, denoised, x, steps)
        if server.client_id in pages:
            show.offer(denoised, step + 1, steps)

    return both


class Preview:
    """Makes pictures of clips that are offered, on a thread of its own, never two at once, within SHARE of the time that has passed.

    colours: (factors [3, C], bias [3]), or None for grey. send: takes (WebP, step, number of steps), on that thread.
    """

    def __init__(self, colours: tuple[Tensor, Tensor] | None, send: Callable):
        self.colours, self.send = colours, send
        self.began, self.spent, self.last = time.monotonic(), 0.0, 0.0  # seconds
        self.at_work: threading.Thread | None = None

    def offer(self, denoised: Tensor, step: int, steps: int) -> None:
        """A clip [B, C, T, h, w], of which the first is shown if there is time for it."""
        cost = 2 * (self.last or FIRST_COST * denoised.shape[2])  # up to twice the last one's where the processor is busy
        is_time = self.spent + cost <= SHARE * (time.monotonic() - self.began)
        if is_time and denoised.ndim == 5 and not (self.at_work and self.at_work.is_alive()):
            self.at_work = threading.Thread(target=self._make, args=(denoised[:1], step, steps), name="open-sora-preview", daemon=True)
            self.at_work.start()

    def _make(self, denoised: Tensor, step: int, steps: int) -> None:
        began = time.monotonic()
        try:
            with torch.inference_mode():
                self.send(moving_picture(frames_of(denoised, self.colours)), step, steps)
        except (RuntimeError, OSError, ValueError, TypeError) as error:  # a preview never ends a run
            notice.logger.debug("Open-Sora: no preview: %s", error)
        self.last = time.monotonic() - began
        self.spent += self.last


def frames_of(latents: Tensor, colours: tuple[Tensor, Tensor] | None) -> Tensor:
    """Latents [1, C, T, h, w] as pictures [T, h, w, 3], uint8 on the CPU."""
    x = latents[0].movedim(0, -1).float()
    if colours is None:
        grey = x.mean(-1, keepdim=True)
        x = ((grey - grey.mean()) / (2 * grey.std() + 1e-6)).expand(*x.shape[:-1], 3)
    else:
        x = torch.nn.functional.linear(x, *(part.to(x) for part in colours))
    return ((x + 1) * 127.5).clamp(0, 255).to("cpu", torch.uint8)


def moving_picture(frames: Tensor) -> bytes:
    """An animated WebP of frames [T, h, w, 3], enlarged until the longer side is SIDE."""
    pictures = (Image.fromarray(frame.numpy()) for frame in frames)
    first, *others = (ImageOps.contain(picture, (SIDE, SIDE), Image.Resampling.BILINEAR) for picture in pictures)
    file = io.BytesIO()
    first.save(file, "WEBP", save_all=True, append_images=others, duration=MILLISECONDS, loop=0, quality=60, method=0)
    return file.getvalue()


def colours(model) -> tuple[Tensor, Tensor] | None:
    """(factors [3, C], bias [3]) that make -1..1 of a MODEL's latents; None where nobody knows them."""
    form, made = model.model.latent_format, getattr(model, "cached_patcher_init", None)
    held = {"factors": getattr(form, "latent_rgb_factors", None), "bias": getattr(form, "latent_rgb_factors_bias", None)}
    if made and made[1] and str(made[1][0]) == str(model_files.SMALL / "Open_Sora_v2.safetensors"):
        held = read_json(model_files.SMALL / "latent_colours.json")
    elif held["factors"] is None:
        held = _kept_colours(getattr(getattr(model.model, "family", None), "codecs", ()), getattr(form, "latent_channels", 0))
    if held["factors"] is None or getattr(form, "latent_rgb_factors_reshape", None) is not None:
        return None
    return torch.tensor(held["factors"], dtype=torch.float32).T, torch.tensor(held["bias"] or [0, 0, 0], dtype=torch.float32)


def _kept_colours(kinds: tuple[str, ...], channels: int) -> dict:
    """What commands/colours.py kept last, beside the VAEs of the host, for a VAE of the kinds that a model was trained with."""
    files = [file for folder in folder_paths.get_folder_paths("vae") for file in Path(folder).rglob("*.colours.json")]
    for file in sorted(files, key=lambda file: file.stat().st_mtime, reverse=True):
        try:
            held = read_json(file)
            shapes = torch.tensor(held["factors"]).shape, torch.tensor(held["bias"]).shape
            if held["codec"] in kinds and shapes == ((channels, 3), (3,)):
                return held
        except (KeyError, ValueError, TypeError, RuntimeError) as error:  # torch's own and OpenSoraError, which is a ValueError
            notice.logger.debug("Open-Sora: %s holds no colours: %s", file.name, error)
    return {"factors": None}


def now(page: str) -> dict:
    """What a page is told that opens anew while a clip is sampled for it: the last picture, as it was sent; empty where none is."""
    server = PromptServer.instance
    return {"preview": dict(_shown)} if _shown and server.client_id == page and server.last_node_id == _shown["node"] else {}


def _send(server, node_id: str, image: bytes = b"", **more) -> None:
    message = {"node": notice.shown_on(node_id), "image": image.decode("latin-1"), **more}  # a character for each byte: it is sent as JSON
    if message["node"] != server.last_node_id:
        return  # the run was over before its picture was made: no page would take it away
    if image:
        _shown.update(message)
    if server.client_id in pages:
        server.send_sync(EVENT, message, server.client_id)
