"""What a video needs in given settings: device memory stage by stage, and RAM.

Peaks come from footprint.py, what streams from residency.py, the tiles of a decode from the decode policy itself
(decode.py). Figures are what is needed at least: an allocator may hold more in reserve. Sizes in bytes.
"""

from dataclasses import dataclass, replace

from .. import choices
from ..errors import OpenSoraError, check_choice
from ..geometry import Tiling, Workload
from ..sampling.guidance import PICTURES, Guidance, num_forwards
from ..sampling.plan import Averaged, StepPlan
from . import footprint
from .decode import MARGIN, Ladder
from .footprint import ModelSizes, Weights
from .residency import GIB, Residency, at_least, at_most, least_bytes, residency_in_mode

# Assumed, not counted: what libraries take for themselves.
CONTEXT_BYTES = GIB // 2  # CUDA's context and loaded kernels, outside torch's allocator
MATRIX_BYTES = 64 * 2**20  # cuBLAS and cuBLASLt workspaces (32 MiB each on the largest cards)
PROCESS_BYTES = {"cuda": 2 * GIB}  # Python, torch and its libraries in RAM, with CUDA's
PROCESS_BYTES_CPU = 3 * GIB // 4


@dataclass(frozen=True)
class Memory:
    """What there is to work with, in bytes.

    device: "cuda", "mps", "cpu". name: of the device, for people and for measured times. free, total: of the device's memory; on the CPU the same
    as RAM. ram_free, ram_total: of main memory.
    """

    device: str
    name: str
    free: int
    total: int
    ram_free: int
    ram_total: int

    def __post_init__(self):
        if min(self.free, self.total, self.ram_free, self.ram_total) < 0:
            raise OpenSoraError(f"An amount of memory cannot be negative: {self}.")


@dataclass(frozen=True)
class Settings:
    """How to run; the words are those of choices.py. budget_gib: for the offload mode budget."""

    precision: str = choices.AUTO
    offload: str = choices.AUTO
    budget_gib: float = choices.DEFAULT_BUDGET_GIB
    decode_policy: str = choices.AUTO

    def __post_init__(self):
        check_choice("precision", self.precision, choices.PRECISIONS)
        check_choice("offload", self.offload, choices.OFFLOADS)
        check_choice("decode_policy", self.decode_policy, choices.POLICIES)

    def words(self) -> str:
        budget = f" {self.budget_gib:g} GiB" if self.offload == choices.BUDGET else ""
        return f"precision {self.precision}, offload {self.offload}{budget}, decode {self.decode_policy}"


@dataclass(frozen=True)
class Request(Workload):
    """A video to plan for.

    has_given: whether pictures or a clip are given. tiling: of encode and decode. guidance: which passes the steps take.
    speed: exact, or a plan of steps, and then num_steps is the model's own number, which it is of.
    """

    has_given: bool = False
    settings: Settings = Settings()
    tiling: Tiling = Tiling()
    guidance: Guidance = Guidance()
    speed: str = choices.EXACT

    @property
    def forwards(self) -> int:
        """Passes of the transformer, each guidance pass counted."""
        guidance, num_steps = self.guidance, self.num_steps
        if self.speed != choices.EXACT:  # of the plan that is used where none is calibrated; a calibrated one has as many points
            points = StepPlan.uncalibrated(self.speed, num_steps).points
            guidance = Averaged(guidance, [1 - step / num_steps for step in range(num_steps + 1)], points)
            num_steps = len(points) - 1
        return num_forwards(guidance, num_steps, self.latent_extent[0], PICTURES if self.has_given else None)

    def words(self) -> str:
        how, of = f"{self.num_steps} steps", ""
        if self.speed != choices.EXACT:
            how, of = f"speed {self.speed}", f" of {replace(self, speed=choices.EXACT).forwards}"
        how += ", with reference picture" if self.has_given else ", text to video"
        return f"{self.width}x{self.height} (width x height), {self.num_frames} frames, {how}: {self.forwards}{of} forwards"


@dataclass(frozen=True)
class Item:
    name: str
    num_bytes: int
    note: str = ""


@dataclass(frozen=True)
class Stage:
    """A part of the work, and everything that is in memory at its peak."""

    name: str
    items: tuple[Item, ...]

    @property
    def num_bytes(self) -> int:
        return sum(item.num_bytes for item in self.items)

    def lines(self) -> list[str]:
        head = f"  {self.name:<11} {at_least(self.num_bytes):>6}"
        return [head, *(f"    {at_least(i.num_bytes):>7}  {i.name}{f' ({i.note})' if i.note else ''}" for i in self.items if i.num_bytes)]


@dataclass(frozen=True)
class Estimate:
    """What one choice of settings needs.

    settings: with precision, offload and budget decided. tiling: of the decode. stages: of device memory. ram: of main memory.
    streamed_bytes: of the transformer's mapped file, read in every forward; the system keeps them in RAM if there is room, is_cached: whether it is so.
    least: (stage, bytes) with one block of weights on the device at a time, however slow.
    problems: why it does not fit, in sentences; empty if it fits. notes: what to know about it.
    """

    settings: Settings
    tiling: Tiling
    stages: tuple[Stage, ...]
    ram: Stage
    streamed_bytes: int
    is_cached: bool = True
    least: tuple[tuple[str, int], ...] = ()
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        return not self.problems


def estimate(request: Request, settings: Settings, model: ModelSizes, memory: Memory) -> Estimate:
    """What a video needs in these settings, whose precision is decided."""
    need = Stages(request, settings, model, memory)
    decode, tiling, note = need.decode()
    stages = [need.text(), *([need.image()] if request.has_given else []), need.sampling(), decode]
    ram, streamed = need.ram(stages), need.transformer_residency.copied_bytes if need.transformer.is_mapped else 0
    is_cached = memory.device == "cpu" or streamed == 0 or streamed + need.process_bytes <= memory.ram_free
    notes = [note] if note else []
    if not is_cached:
        notes.append(
            f"{at_least(streamed)} GiB of the transformer's file are copied to the device in every forward and RAM has not room for them: "
            "they are read from disk each time."
        )
    short = [stage for stage in stages if stage.num_bytes > memory.free]
    problems = [f"{stage.name}: {at_least(stage.num_bytes)} GiB needed, {at_most(memory.free)} GiB free." for stage in short]
    if memory.device != "cpu" and ram.num_bytes > memory.ram_free:
        problems.append(f"RAM: {at_least(ram.num_bytes)} GiB needed, {at_most(memory.ram_free)} GiB free.")
    return Estimate(settings, tiling, tuple(stages), ram, streamed, is_cached, need.least(stages), tuple(problems), tuple(notes))


def with_margin(num_bytes: int) -> int:
    """What to leave free on a device for work that was counted to take so many bytes: room for what libraries take for themselves."""
    return int(MARGIN * num_bytes) + MATRIX_BYTES


class Stages:
    """The stages of one video in one choice of settings."""

    def __init__(self, request: Request, settings: Settings, model: ModelSizes, memory: Memory):
        self.request, self.settings, self.model, self.memory = request, settings, model, memory
        self.process_bytes = PROCESS_BYTES.get(memory.device, PROCESS_BYTES_CPU)
        self.context_bytes = CONTEXT_BYTES if memory.device == "cuda" else 0
        self.latent_shape = request.latent_shape(model.transformer.in_channels)
        # The VAE and CLIP are never quantised.
        self.plain = settings.precision if settings.precision not in choices.QUANTISED else choices.BF16
        # A precision asked for by name holds for T5 too; a quantised transformer file says nothing of T5.
        is_as_stored = request.settings.precision == choices.AUTO and settings.precision == model.stored
        self.text_precision = self.plain if is_as_stored else settings.precision
        if model.stored_text in choices.QUANTISED:
            self.text_precision = model.stored_text
        self.t5, self.clip_bytes = footprint.text_weights(model.text, self.text_precision, model.stored_text)
        self.transformer = footprint.transformer_weights(model.transformer, settings.precision, model.stored, model.groups)
        one, rest = footprint.sampling_peak(model.transformer, settings.precision, self.latent_shape, request.has_given, model.text.length)
        work = Item("activations of one forward", one, "fused attention, one pass at a time"), Item("latents, predictions, prompt", rest)
        self._beside_transformer = (*work, *self._libraries())
        self.transformer_residency = self._residency(self.transformer, one + rest)
        # The transformer during the other stages: it stays on the device only if everything does.
        staying = self.transformer.sizes.total if settings.offload == choices.RESIDENT else 0
        self.staying = Item("transformer's weights", staying, "resident")
        self.parked_bytes = 0  # in main memory; known after `decode`
        self.num_values = 3 * request.num_frames * request.height * request.width  # of the finished frames

    @property
    def beside_transformer(self) -> int:
        """Bytes that sampling takes on the device without any weights."""
        return sum(item.num_bytes for item in self._beside_transformer)

    def text(self) -> Stage:
        encoding = footprint.text_peak(self.model.text, self.text_precision)
        residency = self._residency(self.t5, encoding)
        weights = Item("T5's weights", residency.device_bytes, f"{self.text_precision}, {_residency_words(residency)}")
        work = Item("encoding two prompts", encoding, f"CLIP, {at_least(self.clip_bytes)} GiB, follows T5" if self.clip_bytes else "")
        return Stage("text", (weights, self.staying, work, *self._libraries()))

    def image(self) -> Stage:
        request, vae = self.request, self.model.vae
        shape = (1, vae.in_channels, 1, request.height, request.width)
        tile, rest = footprint.tiled_peak(vae, self.plain, shape, request.tiling, is_decode=False)
        weights = Item("VAE's weights", footprint.vae_weights(vae, self.plain), self.plain)
        work = Item("encoding a tile", tile), Item("picture", rest)
        return Stage("image", (self.staying, weights, *work, *self._libraries(tile)))

    def sampling(self) -> Stage:
        residency = self.transformer_residency
        buffers = residency.num_buffers * residency.buffer_bytes
        words = f"{self.settings.precision}, {_residency_words(residency)}"
        stay = Item("transformer's weights that stay", residency.device_bytes - buffers, words)
        streamed = Item("buffers for streamed blocks", buffers, f"{at_least(residency.copied_bytes)} GiB copied in every forward")
        return Stage("sampling", (stay, streamed, *self._beside_transformer))

    def decode(self) -> tuple[Stage, Tiling, str | None]:
        """The stage, the tiles that the decode policy takes in what is free, and its line."""
        vae, request, staying = self.model.vae, self.request, self.staying
        weights = footprint.vae_weights(vae, self.plain)
        itemsize = 4 if self.plain == choices.FP32 else 2
        free = self.memory.free - staying.num_bytes - weights - self.num_values * itemsize - self.context_bytes
        ram = max(0, self.memory.ram_free - self.ram([]).num_bytes) if self.memory.device != "cpu" else 0
        ladder = Ladder(vae, self.latent_shape, itemsize, lambda: max(0, free), lambda: ram)
        tiling, note = next(ladder.attempts(self.settings.decode_policy, request.tiling))
        if tiling.parked:  # the finished frames stay in main memory too
            tile, rest = ladder.tile_bytes(tiling), 0
            self.parked_bytes = ladder.tile_bytes(replace(tiling, parked=False))
        else:
            tile, rest = footprint.tiled_peak(vae, self.plain, self.latent_shape, tiling)
        work = Item("decoding a tile", tile, _tiling_words(tiling, request)), Item("finished frames, seams, latents", rest)
        items = staying, Item("VAE's weights", weights, self.plain), *work, *self._libraries(tile)
        return Stage("decode", items), tiling, note

    def least(self, stages: list[Stage]) -> tuple[tuple[str, int], ...]:
        """The stages with one block of weights at a time."""
        saved = {"sampling": self.transformer_residency.device_bytes - least_bytes(self.transformer.sizes, choices.MINIMAL)}
        saved["text"] = stages[0].items[0].num_bytes - least_bytes(self.t5.sizes, choices.MINIMAL) + self.staying.num_bytes
        saved["image"] = saved["decode"] = self.staying.num_bytes
        return tuple((stage.name, stage.num_bytes - saved[stage.name]) for stage in stages)

    def ram(self, stages: list[Stage]) -> Stage:
        """Main memory that must be there. Pages of mapped files are not counted: the system drops them when it needs them."""
        process = Item("Python, torch and their libraries", self.process_bytes, "assumed")
        frames = Item("finished frames", self.num_values, "8 bits a channel")
        if self.memory.device == "cpu":
            largest = max(stages, key=lambda stage: stage.num_bytes)
            return Stage("RAM", (process, Item(f"the stage {largest.name}", largest.num_bytes), frames))
        # What was converted on reading is nobody's file; resident weights are on the device only.
        networks = {"transformer": self.transformer, "T5": self.t5} if self.settings.offload != choices.RESIDENT else {}
        converted = {name: weights.sizes.total for name, weights in networks.items() if not weights.is_mapped}
        name = max(converted, key=converted.get, default="")
        parked = Item("activations of the decode", self.parked_bytes)
        return Stage("RAM", (process, Item(f"the {name}'s weights, converted on reading", converted.get(name, 0)), frames, parked))

    def _residency(self, weights: Weights, work_bytes: int) -> Residency:
        """Where weights live, as the pipeline decides it (memory/component.py)."""
        settings, memory = self.settings, self.memory
        room = memory.free - self.context_bytes - with_margin(work_bytes) if memory.device == "cuda" else None
        return residency_in_mode(weights.sizes, settings.offload, settings.budget_gib, room, is_main=weights is self.transformer)

    def _libraries(self, convolved: int = 0) -> tuple[Item, ...]:
        """Workspaces of libraries: assumed, since they are not ours to count."""
        if self.memory.device != "cuda":
            return ()
        share = int((MARGIN - 1) * convolved)
        what = f"convolutions: {MARGIN - 1:.0%} of a tile" if convolved else f"cuBLAS {MATRIX_BYTES // 2**20} MiB"
        note = f"CUDA context {at_least(CONTEXT_BYTES)} GiB; {what}"
        return (Item("libraries' own, not counted but assumed", self.context_bytes + (share or MATRIX_BYTES), note),)


def _residency_words(residency: Residency) -> str:
    if not residency.streamed:
        return "all of them"
    return f"{len(residency.sizes.blocks) - len(residency.streamed)} of {len(residency.sizes.blocks)} blocks stay"


def _tiling_words(tiling: Tiling, request: Request) -> str:
    space = f"{tiling.tile_size} pixels" if tiling.tile_size else "whole pictures"
    if tiling.parked:
        space += ", activations in main memory"
    if 0 < tiling.temporal_tile < request.num_frames:
        return f"{space}, {tiling.temporal_tile} frames at a time"
    exact = ": exact" if (tiling.tile_size, tiling.overlap) == (Tiling().tile_size, Tiling().overlap) else ""
    return f"{space}, all {request.num_frames} frames{exact}"
