"""The words that a person chooses between, and what they are called in torch. Each stands here once; no torch, no model, no file."""

AUTO = "auto"

# What networks compute in; and what the large weights of transformer and T5 may be held in instead.
FP32, BF16 = DTYPES = ("fp32", "bf16")
FP8, INT8, NF4 = QUANTISED = ("fp8_e4m3fn", "int8", "nf4")
PRECISIONS = (AUTO, *DTYPES, *QUANTISED)
FILE_FORMATS = (FP8, INT8)  # that `quantize` writes

# Where weights are while a network works, see memory/component.py.
RESIDENT, BUDGET, MINIMAL = "resident", "budget", "minimal"
OFFLOADS = (AUTO, RESIDENT, BUDGET, MINIMAL)
EVERYTHING = "everything"  # all networks on the device at once: a pipeline whose offload was not enabled
DEFAULT_BUDGET_GIB = 8.0

EXACT, LOW_MEMORY = "exact", "low_memory"
POLICIES = (AUTO, EXACT, LOW_MEMORY)  # how latents are decoded, see memory/decode.py
BALANCED, FAST, DRAFT = "balanced", "fast", "draft"
SPEEDS = (EXACT, BALANCED, FAST, DRAFT)  # how many of the released steps are computed, see sampling/plan.py

SDPA, SLICED, CUDNN, SAGE, FLASH = "sdpa", "sliced", "cudnn", "sage", "flash"
ATTENTIONS = (AUTO, SDPA, SLICED, CUDNN, SAGE, FLASH)  # see run/kernels.py
MODE, SAMPLE = POSTERIORS = ("mode", "sample")
CPU, GPU = NOISE_DEVICES = ("cpu", "gpu")
CROP, PAD, STRETCH = FITS = ("crop", "pad", "stretch")
SOLVERS = (AUTO, "euler", "ddim", "dpm")  # auto: the model's own
CONSTANT, RELEASED, BY_INDEX = "constant", "released", "by index"  # how guidance goes over the steps, see sampling/guidance.py
CURVES = (AUTO, CONSTANT, RELEASED, BY_INDEX)
DIFFUSERS = "diffusers"  # as that library computes it, where the authors' own code, or the mathematics, says otherwise
SCRIPTS = "scripts"  # loops as upstream's scripts make them, faults included
CONDITION_SCALES = (AUTO, "1.0", DIFFUSERS)  # what a CogVideoX model's picture is multiplied by
ENCODED, ZERO = "encoded", "zero"
UNCONDITIONALS = (AUTO, ENCODED, ZERO)  # what the unconditional pass reads: the negative prompt, or nothing at all
FORWARDS, BACKWARDS = DIRECTIONS = ("forwards", "backwards")

OPEN_SORA, FLUX = "open-sora", "flux"
PICTURE_SCHEDULES = (AUTO, OPEN_SORA, FLUX)  # how the steps of a drawn picture are spaced; auto: as its model was made for

# What a video begins or ends with, in upstream's words. `easy`: more of the clip is given.
COND_TYPES = ("t2v", "i2v_head", "i2v_tail", "i2v_loop", "v2v_head", "v2v_tail", "v2v_head_easy", "v2v_tail_easy")

_TORCH_NAMES = {FP32: "float32", BF16: "bfloat16", "fp16": "float16"}


def torch_dtype(word: str):
    """The torch.dtype of "fp32" or "bf16"; None for a word that is no dtype, such as auto or nf4."""
    import torch

    return getattr(torch, _TORCH_NAMES[word]) if word in _TORCH_NAMES else None


def dtype_word(dtype) -> str:
    """What a torch.dtype is called here: "fp32"; torch's name for one that has no word."""
    name = str(dtype).removeprefix("torch.")
    return next((word for word, of_torch in _TORCH_NAMES.items() if of_torch == name), name)
