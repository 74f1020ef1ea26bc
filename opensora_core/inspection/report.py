"""What a weights file or folder is, in words (`report`), and a first contact with real weights (`check`).

`check` is made to be pasted into a bug report: file names without folders, versions, every key, shape and
dtype against the released files, one double and one single block and one VAE frame computed. It maps the
file and touches only the tensors it runs: about 1 GB of the 24 GB transformer.
"""

import platform
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import safetensors
import torch
from torch import Tensor

from .. import __version__
from ..checkpoint.detect import Identity, identify
from ..checkpoint.files import SHARD, Header, as_one, bytes_text, find_weights, last_rows, network_files, quantisation, read_header
from ..checkpoint.formats import LayerFormat, stored_formats
from ..checkpoint.load import Comparison, compare, fill, load_vae
from ..checkpoint.lora_keys import describe_lora
from ..checkpoint.quantised import QuantisedOperations
from ..choices import dtype_word
from ..encoders.clip import clip_manifest, clip_names, clip_sizes
from ..encoders.t5 import t5_manifest, t5_names, t5_sizes
from ..errors import CheckpointError, OpenSoraError
from ..families.table import DEFAULT, codecs_of
from ..ops import TorchOperations
from ..shapes import Layout, Manifest, bare_shapes
from ..text.recipe import CLIP

# What a folder needs, by slot.
_NEEDED = {"transformer": "the transformer", "vae": "the video VAE", "t5": "the T5 encoder", "clip": "the CLIP-L text encoder"}
_SEARCH_DEPTH = 3  # a hub folder keeps its encoders at <owner>/<name>/
# Of a trial: patches along each side of the one latent frame, tokens of text, and sides of a VAE's picture.
_GRID, _TEXT_TOKENS, _PIXELS = 4, 8, 64


@dataclass(frozen=True)
class Check:
    """Text of a check, and whether everything that was looked at is in order."""

    text: str
    passed: bool


class Compared(NamedTuple):
    """A file against what its own sizes imply and against the released one of its kind, whose dtype is `dtype`."""

    own: Comparison
    released: Comparison
    dtype: str
    is_released_size: bool


@dataclass(frozen=True)
class FolderPart:
    """One model on disk: a file, or shards read as one. `error` is a sentence, instead of a header, where it cannot be read."""

    name: str
    header: Header | None
    error: str = ""
    num_files: int = 1

    @cached_property
    def identity(self) -> Identity:
        return identify(self.header.shapes)

    @cached_property
    def form(self) -> str | None:
        """How it is quantised, as its keys look; None if it is not."""
        return quantisation(self.header)

    @cached_property
    def formats(self) -> dict[str, LayerFormat] | None:
        """The quantised layers of a transformer or of T5, empty if there are none; None where the library does not read it."""
        if self.form is None:
            return {}
        is_read = self.identity.kind == "t5" or (self.identity.family is not None and not self.identity.layout.is_recut)
        try:
            return stored_formats(self.header, self.identity.prefix) if is_read else None
        except CheckpointError:
            return None

    @cached_property
    def compared(self) -> Compared | None:
        """How its tensors compare with a whole file's; None where there is nothing to compare with. Raises a CheckpointError for impossible sizes."""
        identity, clip = self.identity, (clip_names, clip_sizes, clip_manifest)
        encoders = {"t5": (t5_names, t5_sizes, t5_manifest), "clip_text": clip, "clip_full": clip}
        if row := identity.row:
            found, dtype = bare_shapes(self.header.shapes, identity.prefix), row.dtype
            sizes = identity.config if identity.config in row.also_released else row.released
            own, released = identity.manifest(), row.manifest(sizes, identity.layout)
        elif identity.kind in encoders:
            names, sizes, manifest = encoders[identity.kind]
            found = {name: self.header.tensors[key].shape for key, name in names(self.header.shapes, identity.prefix).items()}
            own, released, dtype = manifest(sizes(found)), manifest(), "F32"
        else:
            return None
        against = (_compare(found, expected, self.form, identity.layout) for expected in (own, released))
        return Compared(*against, dtype, own == released)


def report(path: str | Path) -> str:
    """Say what a file or folder holds, whether it is whole, and how it differs from the released files.

    path: a weights file, or a folder such as the hub repository's, searched three levels deep.
    """
    path = Path(path)
    if not path.is_dir():
        return "\n".join(_describe(_network(path)))
    components = list(_components(path))
    if not components:
        name = path.resolve().name or path
        raise CheckpointError(f"{name} holds no weights file ({_SEARCH_DEPTH} levels searched); choose another folder.")
    blocks = [_describe(part) if part.header else [part.error] for part in components]
    return "\n\n".join("\n".join(lines) for lines in (*blocks, [_folder_sentence(components)]))


def check(path: str | Path) -> Check:
    """Compare a file or folder with the released files and run one block of each kind and one VAE frame.

    Never raises for a bad file: what is wrong with it is the report. In a folder, files that Open-Sora 2.0
    does not use are named and left alone.
    """
    path = Path(path)
    try:
        components = list(_components(path)) if path.is_dir() else [_network(path)]
    except CheckpointError:
        components = [_component(path.name, [path])]
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "no GPU"
    libraries = f"opensora_core {__version__}, torch {torch.__version__}, safetensors {safetensors.__version__}"
    lines = [f"{libraries}, Python {platform.python_version()}, {platform.system()} {platform.machine()}, {device}"]
    verdicts = []
    for part in components:
        passed, text = _check_component(part)
        if passed is not None:
            verdicts.append(passed)
        lines += ["", *text]
    lines += ["", _folder_sentence(components)] if path.is_dir() else [""]
    passed = bool(verdicts) and all(verdicts)
    nothing = "" if verdicts else ", nothing that Open-Sora 2.0 uses was found"
    sizes = (part.compared.is_released_size for part in components if passed and part.compared is not None)
    other = "" if all(sizes) else ", of another size than the released model"
    return Check("\n".join([*lines, f"verdict: {'PASS' if passed else 'FAIL'}{other}{nothing}"]), passed)


def _components(folder: Path) -> Iterator[FolderPart]:
    shards: dict[tuple[str, int, str], list[Path]] = {}
    for path in _weight_files(folder, _SEARCH_DEPTH):
        if match := SHARD.fullmatch(path.name):
            stem, _, total, suffix = match.groups()
            shards.setdefault((str(path.parent.relative_to(folder) / stem), int(total), suffix), []).append(path)
            continue
        yield _component(path.relative_to(folder).as_posix(), [path])
    for (stem, total, suffix), paths in shards.items():
        name = f"{Path(stem).as_posix()}{suffix} in {total} parts"
        if len(paths) < total:
            yield FolderPart(name, None, f"{name}: {total - len(paths)} of them are missing; download them.")
        else:
            yield _component(name, paths)


def _network(path: Path) -> FolderPart:
    """A file, or the network that it is a part or the index of."""
    files = network_files(path)
    if len(files) == 1:
        return FolderPart(path.name, read_header(files[0]))
    match = SHARD.fullmatch(path.name)
    what = f"part {int(match[2])} of {int(match[3])}" if match else f"the index of {len(files)} parts"
    return FolderPart(f"{path.name} ({what})", as_one(path, [read_header(file) for file in files]), num_files=len(files))


def _component(name: str, paths: list[Path]) -> FolderPart:
    try:
        return FolderPart(name, as_one(paths[0], [read_header(path) for path in paths]), num_files=len(paths))
    except CheckpointError as error:
        sentence = str(error).replace(str(paths[0]), paths[0].name)  # a pasted report shows no folders of its owner
        return FolderPart(name, None, sentence if name in sentence else f"{name}: {sentence}")


def _weight_files(folder: Path, depth: int) -> Iterator[Path]:
    yield from find_weights(folder)
    if depth > 1:
        for inner in sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")):
            yield from _weight_files(inner, depth - 1)


def _describe(part: FolderPart) -> list[str]:
    header, identity = part.header, part.identity
    place = f", {identity.place}" if identity.place else ""
    total, shares = max(1, header.num_parameters), header.dtypes
    dtypes = ", ".join(name if len(shares) == 1 else f"{name} {100 * count / total:.1f} %" for name, count in shares.items())
    size = f"{len(header.tensors):,} tensors, {header.num_parameters:,} parameters, {bytes_text(header.num_bytes)}, {dtypes}"
    lines = [f"{part.name}: {identity.title}{place}", _line("size", size)]
    if identity.prefix:
        lines.append(_line("prefix", f"every key of it begins with {identity.prefix}"))
    if part.form:
        lines.append(_line("quantised", _form_text(part)))
    if identity.config:
        lines.append(_line("model", identity.config.words()))
    if identity.kind == "lora":
        lines.append(_line("layers", describe_lora(header.shapes, header.metadata)))
    if part.compared:
        own, released, dtype, _ = part.compared
        lines.append(_line("complete" if own.complete else "INCOMPLETE", own.sentence()))
        lines.append(_line("released", _released_text(released, header, dtype)))
    return lines


def _form_text(part: FolderPart) -> str:
    """How a file is quantised, with the formats of its layers where they are known, and who reads it."""
    counts = Counter(layer_format.form.name for layer_format in (part.formats or {}).values())
    known = " and ".join(f"{name} in {count} layer{'s' * (count > 1)}" for name, count in counts.items())
    reader = "ComfyUI's loaders may read it"
    if part.identity.family is not None or part.identity.kind == "t5":
        reader = "read here and by ComfyUI's loaders" if part.formats else f"not read here; {reader}"
    return f"{part.form} ({known}); {reader}" if known else f"{part.form}; {reader}"


def _line(label: str, text: str) -> str:
    return f"  {label:<11} {text}"


def _compare(found: Manifest, expected: Manifest, form: str | None, layout: Layout) -> Comparison:
    result = compare(found, expected, layout)
    if form is None:
        return result
    # A quantiser changes the shape of matrices and lays scales beside them; names and vectors still count.
    layers = {key.rpartition(".")[0] for key in expected}
    extra = tuple(key for key in result.extra if key != "scaled_fp8" and layers.isdisjoint(accumulate(key.split(".")[:-1], "{}.{}".format)))
    return replace(result, extra=extra, misshaped={key: pair for key, pair in result.misshaped.items() if len(pair[1]) < 2})


def _released_text(result: Comparison, header: Header, dtype: str) -> str:
    stored = next(iter(header.dtypes), "none")
    dtype_text = f"dtype {stored}" + (" as released" if stored == dtype else f" (released: {dtype})")
    if result.same:
        return f"every key and shape as in the released file, {dtype_text}"
    if result.misshaped:  # listing every tensor of a smaller model would say nothing
        return f"not the released size ({len(result.misshaped)} of {result.expected} tensors have another shape), {dtype_text}"
    return f"differs from the released file; {result.sentence()}; {dtype_text}"


def _folder_sentence(components: list[FolderPart]) -> str:
    found = [part.identity for part in components if part.header]
    slots = {identity.slot for identity in found}
    if slots == {"lora"}:
        return "This folder is a LoRA."
    families = [identity.family for identity in found if identity.slot == "transformer"]
    codecs = [identity.row for identity in found if identity.slot == "vae"]
    if families and codecs and not any(codec.kind in family.codecs for family in families for codec in codecs):
        wanted = codecs_of(families[0])[0].title
        return f"The transformer and the VAE of this folder are not of one model; {families[0].title} works on the latents of {wanted}."
    family = families[0] if families else DEFAULT
    model = family.title.removeprefix("the ").partition(" transformer")[0]
    lacking = [name for slot, name in _NEEDED.items() if slot not in slots and (slot != "clip" or CLIP in family.text.encoders)]
    return f"For {model} this folder lacks {', '.join(lacking)}." if lacking else f"This folder has every part of {model}."


def _check_component(part: FolderPart) -> tuple[bool | None, list[str]]:
    """Whether it passed (None: no part of Open-Sora 2.0) and the lines about it."""
    if part.header is None:
        return False, [part.error, _line("FAIL", "cannot be read")]
    header, identity = part.header, part.identity
    try:
        lines = _describe(part)
    except CheckpointError as error:  # sizes that cannot be
        return False, [f"{part.name}: {error}", _line("FAIL", "cannot be read")]
    if part.compared is None:
        return None, lines
    own, released, *_ = part.compared
    if not own.complete:
        return False, [*lines, _line("FAIL", "incomplete")]
    if released.missing and not released.misshaped:
        return False, [*lines, _line("FAIL", f"like the released file, but {len(released.missing)} tensors are missing")]
    if part.formats is None:
        return True, [*lines, _line("run", "not run: a quantised form that is not read here")]
    zero = identity.family.zero_at_first if identity.family else ()
    if part.num_files == 1 and len(holes := _holes(header, tuple(identity.prefix + key for key in zero))) > 1:
        return False, [*lines, _line("FAIL", f"{len(holes)} matrices end in zeros or NaN ({', '.join(holes[:3])}): a download with holes")]
    try:
        trial = _try_vae(header) if identity.slot == "vae" else None
        if identity.family is not None:
            trial = _try_blocks(header, identity, part.formats)
    except (OpenSoraError, RuntimeError) as error:
        return False, [*lines, _line("FAIL", f"did not run: {error}")]
    if trial is None:
        return True, lines
    is_finite, told = trial
    return is_finite, [*lines, *told, *([] if is_finite else [_line("FAIL", "NaN or infinite values")])]


def _holes(header: Header, zero: tuple[str, ...]) -> list[str]:
    """Matrices whose last row holds nothing, but for those that are zero in start weights. Reads one row per tensor.

    A downloader that reserves a file's whole size leaves such holes when it stops, and no length gives it away.
    """
    plain = {key: info for key, info in header.tensors.items() if info.dtype in ("F32", "F16", "BF16") and key not in zero}
    matrices = [key for key, info in plain.items() if len(info.shape) > 1 and info.num_elements]
    return [key for key, row in last_rows(header, matrices) if not (row.isfinite().all() and row.any())]


def _try_blocks(header: Header, identity: Identity, formats: Mapping[str, LayerFormat]) -> tuple[bool, list[str]]:
    """Run a network of its first block of each kind on noise: whether every number was finite, and lines about it. formats: as FolderPart's."""
    config = identity.config.with_blocks(1)
    # Nothing here computes in fp16, whose range such a model's activations leave; its weights are exact in fp32.
    dtype = torch.float32 if header.compute_dtype is torch.float16 else header.compute_dtype
    started = time.perf_counter()
    model = identity.row.build(config, QuantisedOperations if formats else TorchOperations, dtype=dtype, device="meta")
    layers = dict(model.named_modules())
    formats = {layer: layer_format for layer, layer_format in formats.items() if layer in layers}
    for layer, layer_format in formats.items():
        layers[layer].keep_in(layer_format.form)
    fill(model, header, identity.convert, "cpu", formats)
    side = _GRID * config.patch_size
    inputs = identity.family.example(config, (1, config.in_channels, 1, side, side), _TEXT_TOKENS, dtype, "cpu")
    for seed, tensor in enumerate(tensor for tensor in inputs.values() if tensor.ndim > 1):
        tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed)))
    with torch.inference_mode():
        velocity = model(**inputs)
    what = f"{config.words()}, {_GRID**2} + {_TEXT_TOKENS} tokens"
    seconds = time.perf_counter() - started
    lines = [_line("run", f"{what}, {dtype_word(dtype)} on cpu, {seconds:.1f} s: {_statistics(velocity)}")]
    # The layers outside the blocks read the inputs.
    plain = {name: layer.weight for name, layer in model.named_children() if hasattr(layer, "weight") and name not in formats}
    lines += [_line("weights", f"{name}: {_statistics(weight)}") for name, weight in plain.items()]
    lines += [_line("note", f"{name} is all zero: start weights, what it reads has no effect") for name in plain if not plain[name].any()]
    return bool(velocity.isfinite().all()), lines


def _try_vae(header: Header) -> tuple[bool, list[str]]:
    """Encode and decode one frame of a smooth test picture, in fp32: as _try_blocks; errors as load_vae's."""
    started = time.perf_counter()
    vae = load_vae(header.path, dtype=torch.float32)
    ramp = torch.linspace(-0.8, 0.8, _PIXELS)
    across, down = torch.meshgrid(ramp, ramp, indexing="xy")
    picture = torch.stack((across, down, 0.8 * torch.sin(4 * (across + down))))[None, :, None]
    with torch.inference_mode():
        latents = vae.encode(picture).mode()
        again = vae.decode(latents)
    error = (again - picture).pow(2).mean().clamp_min(1e-12)
    psnr = 10 * torch.log10(4.0 / error).item()  # the picture's range is 2 wide
    seconds = time.perf_counter() - started
    lines = [
        _line("run", f"one {_PIXELS}x{_PIXELS} frame, fp32 on cpu, {seconds:.1f} s: reconstructed at {psnr:.1f} dB"),
        _line("latents", f"{vae.config.latents.words()}: {_statistics(vae.config.latents.to_model(latents))}"),
    ]
    return bool(latents.isfinite().all() and again.isfinite().all()), lines


def _statistics(tensor: Tensor) -> str:
    values = tensor.float()
    finite = "finite" if values.isfinite().all() else "NOT FINITE"
    return f"{finite}, mean {values.mean():.4g}, std {values.std():.4g}, largest {values.abs().max():.4g}"
