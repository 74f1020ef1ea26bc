"""Small models of Open-Sora 1.0 to 1.3 and what they are given, for tests/golden/make_open_sora_1.py and the tests alike.

Weights and inputs come from numpy's frozen RandomState, so that the golden file holds the reference's answers alone.
"""

import numpy
import torch

# Constructor arguments by the reference's names.
COMMON = {
    "hidden_size": 48,
    "num_heads": 2,
    "depth": 2,
    "caption_channels": 16,
    "model_max_length": 8,
    "in_channels": 4,
    "class_dropout_prob": 0.0,
}
NETWORKS = {
    "1.0": {**COMMON, "hidden_size": 144, "input_size": (3, 8, 8), "space_scale": 0.125, "time_scale": 1.0},
    "1.1": {**COMMON, "qk_norm": True, "input_sq_size": 512},
    "1.2": {**COMMON, "qk_norm": True},
    "1.3": {**COMMON, "in_channels": 16, "qk_norm": True, "kernel_size": (8, 8, -1), "use_spatial_rope": True},
}
TEXT_MASK = [[1, 1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0, 0, 0]]
# name: version, latent [T, H, W], size in pixels, frames, timestep, edit of each row ([] = none), given frames (1.3).
FORWARDS = {
    "1.0": ("1.0", (3, 8, 8), (64, 64), 3, 431.0, [], None),
    "1.1_odd": ("1.1", (3, 5, 7), (45, 61), 3, 610.0, [], None),
    "1.1_masked": ("1.1", (3, 5, 7), (45, 61), 3, 610.0, [[0.0, 1.0, 0.4], [1.0, 0.9, 0.7]], None),
    "1.1_picture": ("1.1", (1, 4, 6), (32, 48), 1, 12.0, [], None),
    "1.2_odd": ("1.2", (5, 5, 7), (45, 61), 17, 610.3, [], None),
    "1.2_masked": ("1.2", (5, 4, 3), (32, 24), 17, 610.3, [[0.0, 1.0, 0.4, 0.62, 1.0], [1.0, 0.9, 0.7, 0.0, 0.5]], None),
    "1.2_picture": ("1.2", (1, 9, 6), (72, 48), 1, 987.5, [], None),
    "1.3_windows": ("1.3", (3, 19, 23), (150, 180), 17, 610.3, [], None),
    "1.3_masked": ("1.3", (5, 7, 5), (56, 40), 17, 610.3, [[0.0, 1.0, 0.4, 0.62, 1.0], [1.0, 0.9, 0.7, 0.0, 0.5]], None),
    "1.3_given": ("1.3", (5, 18, 6), (144, 48), 17, 610.3, [], [0, 4]),
    "1.3_picture": ("1.3", (1, 17, 17), (136, 136), 1, 40.0, [], None),
}

PICTURE_VAE = {"block_out_channels": (32, 32, 64, 64), "layers_per_block": 1, "latent_channels": 4}
TEMPORAL_VAE = {"filters": 32, "num_res_blocks": 1, "channel_multipliers": (1, 1, 1, 2)}
CAUSAL_VAE = {"ch": 32, "ch_mult": [1, 1, 2, 2], "num_res_blocks": 1, "z_channels": 16}
# name: which, frames, height, width. 20 and 19 end within a piece.
CLIPS = {
    "kl_clip": ("kl", 5, 16, 24),
    "1.2_picture": ("1.2", 1, 16, 24),
    "1.2_piece": ("1.2", 17, 16, 8),
    "1.2_pieces": ("1.2", 34, 8, 16),
    "1.2_ragged": ("1.2", 20, 16, 16),
    "1.3_picture": ("1.3", 1, 16, 24),
    "1.3_piece": ("1.3", 17, 16, 8),
    "1.3_pieces": ("1.3", 33, 8, 16),
    "1.3_ragged": ("1.3", 21, 16, 16),
    "1.3_odd": ("1.3", 17, 13, 22),
}

# Sizes and frames of recorded schedules: (version, height, width, frames, steps, type).
SCHEDULES = [
    ("1.2", 240, 426, 51, 30, "fp32"), ("1.2", 720, 1280, 102, 30, "fp32"), ("1.2", 720, 1280, 1, 30, "fp32"), ("1.2", 480, 854, 51, 30, "bf16"),
    ("1.2", 144, 256, 1, 7, "bf16"), ("1.3", 360, 640, 113, 30, "fp32"), ("1.3", 720, 1280, 113, 30, "bf16"), ("1.3", 352, 652, 1, 30, "fp32"),
]  # fmt: skip


def random(shape, seed):
    return torch.from_numpy(numpy.random.RandomState(seed).standard_normal(tuple(shape)).astype(numpy.float32))


def random_weights(shapes):
    """A tensor for every name: loud enough that a wrong layout shows."""
    state = {}
    for name, shape in sorted(shapes.items()):
        seed = sum((place + 1) * ord(letter) for place, letter in enumerate(name))
        value = random(shape, seed)
        if name == "rope.freqs":
            value = 1 / 10000 ** (torch.arange(0, 2 * shape[0], 2) / (2 * shape[0]))
        elif len(shape) == 1 and name.endswith("weight"):
            value = 1 + 0.3 * value
        elif len(shape) == 1:
            value = 0.2 * value
        elif name.endswith(("weight", "y_embedding")):
            value = value / value[0].numel() ** 0.5
        else:
            value = 0.4 * value
        state[name] = value
    return state


def pattern(name):
    """A key with its block's number as *, and the number: blocks are alike."""
    parts = name.split(".")
    return (".".join([parts[0], "*", *parts[2:]]), int(parts[1])) if parts[0].endswith("blocks") else (name, 0)


def folded(shapes):
    """Every key once for all blocks: {pattern: [count, *shape]}."""
    table = {}
    for name, shape in shapes.items():
        key, _ = pattern(name)
        entry = table.setdefault(key, [0, *shape])
        assert entry[1:] == list(shape), name
        entry[0] += 1
    return table


# ------------------------------------------------------------------ runs

# Of the small networks: (latent [T, H, W], size in pixels, frames, steps, guidance).
RUNS = {
    "1.2": ((5, 4, 3), (32, 24), 17, 6, 7.0), "1.3": ((5, 9, 4), (72, 32), 17, 13, 7.5), "1.0": ((3, 8, 8), (64, 64), 3, 7, 7.0),
    "1.1": ((3, 4, 3), (32, 24), 3, 7, 7.0),
}  # fmt: skip
EDITS = {"1.1": [[0.0, 1.0, 0.53], [1.0, 0.29, 0.0]], "1.2": [[0.0, 1.0, 0.4, 0.83, 1.0], [1.0, 0.9, 0.7, 0.0, 0.5]]}
TEXT = (2, 8, 16)


class Draws:
    """Stands in for every noise that is drawn: the n-th is the same for all."""

    def __init__(self):
        self.count = 0

    def __call__(self, like, **_):
        self.count += 1
        return random(like.shape, 1000 + self.count)


# ------------------------------------------------------------------ masks, prompts

# (strategy, lengths of the references, loop), of 15 latent frames.
STRATEGIES = [
    ("0", [1], 0), ("0;0,1,0,-1,1", [1, 1], 0), ("0,0,0,0,1;0,0,0,-1,1", [1], 0), ("0,0,0,0,15,0.4", [20], 0), ("0,0,-5,0,5", [15], 0),
    ("0,0,-5,0,5;1,0,-5,0,5,0.0", [15], 1), ("0,0,3,7,30,0.25", [12], 0), ("0,0,-2,-3,4,0.5", [7], 0), ("0,0,13,12,2,1", [15], 0), ("2", [1], 0),
    ("0,1,0,4,3;0,0,8,10,5,0.7", [13, 4], 0), ("0,0,0,8,1,0.1", [1], 0), ("0,0,0,0,15,0", [1], 0),
]  # fmt: skip
STRATEGIES_1_1 = [
    ("0", [1], 0), ("0,0,0,0,15", [1], 0), ("0;0,1,0,-1,1", [1, 1], 0), ("0,0,0,0,15,0.4", [20], 0), ("0,0,-4,0,4", [15], 0),
    ("1,0,-4,0,4,0.3", [15], 1), ("0,0,3,7,8,0.25", [12], 0),
]  # fmt: skip
PROMPTS = ["a red fox", "a red fox aesthetic score: 5.0.", "a fox. The motion strength is low.", "a fox camera motion: pan left.", ""]
SAID = [(None, None, None), (6.5, None, None), (3.9, 0.4, "pan left"), (4.2, 1, "zoom in"), (5.2, 4.99, None), (5.9, 10, "static"), (6.4, 19, None),
        (7, 20, "tilt up"), (4.9, 5, None)]  # fmt: skip
PARTS = ["a fox", "|0|a fox|2| a bear ", "|0| a |1| b |3| c"]
COND_TYPES = [
    ("v2v_head", [15]),
    ("v2v_head", [3]),
    ("i2v_head", [1]),
    ("i2v_tail", [15]),
    ("i2v_tail", [1]),
    ("i2v_loop", [1, 1]),
    ("i2v_loop", [15]),
]


def reference_latents(lengths):
    """References [1, t, 1, 1] whose frames say which they are: 100 * reference + frame + 1."""
    return [(100.0 * which + torch.arange(length) + 1).view(1, length, 1, 1) for which, length in enumerate(lengths)]


# ------------------------------------------------------------------ captions

_SCENES = [
    "A red fox runs over fresh snow, slow motion", "Two old men play chess in a park; pigeons watch them", "a close-up of a tea cup, steam rises",
    "The CAMERA pans across the skyline of a city at night", "An origami crane unfolds itself - then flies away", "waves, rocks, sea foam...",
    "a child's drawing comes to life", "\"Hello\", says the robot", "'Tis the season of falling leaves", "a train (steam) crosses a bridge",
    "portrait of a woman with silver hair, 35mm film", "a cat_and_a_dog_on_a_red_sofa", "time-lapse-of-a-growing-seed-in-the-dark",
]  # fmt: skip
_NOISE = [
    "https://example.com/watch?v=abc", "www.example.org/page", "see example.co.uk now", "http:example.net", "mail me@example.com", "@somebody",
    "<b>bold</b>", "<br/>", "<p>first</p> <p>second", "a < b and c > d", "&amp; &lt;tag&gt;", "&quot;quoted&quot;", "&#39;s", "&eacute;clair", "&foo; bar",
    "<!-- hidden -->", "<script>alert(1)</script>", "<style>p {color: red}</style>", "<a href='x'>link</a>", "<person>", "<ruby>漢<rt>kan</rt></ruby>",
    "东京 street", "カメラ", "㊗ party", "naïve café", "ﬁne ﬂow", "ＦＵＬＬ　ｗｉｄｔｈ", "soft\u00adhyphen", "zero\u200bwidth", "a – b — c ― d", "wait…",
    "“curly” ‘quotes’ „low‟", "«guillemets»", "192.168.10.1", "at 12:45 ", "line\\nbreak", "line\nbreak", "#12", "#1234", "#123456", "12345678",
    "picture.jpg", "clip.mp4 image", "\"\"\"", "....", "***SALE***", "(c) 2024 ©", "~tilde~", "a | b \\ c / d", " . ", "jc6640", "ab12cd", "12ab34",
    "worldwide free shipping", "free download", "click for more", "click on this", "page 12", "j2d1a2a", "1920x1080", "10.5×20", "3х4", "word : word",
    "one,two.three/four", "100% sure", "50%25 off", "a+b", "%c3%a9t%c3%a9", "%zz", "\ufeffmarked", "e\u0301clair", "crÃ¨me brÃ»lÃ©e", "itâ€™s", "30 fps.",
    "aesthetic score: 6.5.", "motion score: 3.2.", "x\u00a0y", "tab\tbed", "\x07bell", "ŉ ǆ ĳ", "½ cup", "&nbsp;", "_lead", "tail_", "-", "- dash",
    "<div>  </div>", "<pre>  two  </pre>", "a<b", "<", ">", "&", "</b>", "<i>open", "<![CDATA[data]]>", "<?php echo 1 ?>", "<!doctype html>", "emoji 🎉🦊",
]  # fmt: skip


def captions():
    """300 prompts, each with something to clean."""
    source = numpy.random.RandomState(3)
    found = []
    for place in range(300):
        words = [_SCENES[source.randint(len(_SCENES))]]
        for _ in range(1 + place % 4):
            noise = _NOISE[(place + source.randint(7)) % len(_NOISE)] if source.rand() < 0.7 else _NOISE[source.randint(len(_NOISE))]
            glue = ("", " ", " ", ", ")[source.randint(4)]
            words = [*words, glue, noise] if source.rand() < 0.7 else [noise, glue, *words]
        found.append("".join(words))
    return found
