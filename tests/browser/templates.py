"""The workflows that people open, one row each: a graph, what of it becomes one node, what is said beside it, in which order.

A file's name is the sentence that the template browser shows. Every row that is not `open` puts three boxes on the canvas: a note, one node
that shows what a person changes, and Save Video; the stages stand inside that node in groups.
"""

from dataclasses import dataclass, field

import cogvideox_workflows as cogvideox
import flux_workflows as flux
import graphs
import high_compression_workflows as high
import longer_workflows as longer
import open_sora_1_workflows as first
import reference_workflows as reference

from demo import run

HUB = "https://huggingface.co/hpcai-tech/Open-Sora-v2"
HIGH_HUB = "https://huggingface.co/hpcai-tech/Open-Sora-v2-Video-DC-AE"
ENCODERS = "https://huggingface.co/comfyanonymous/flux_text_encoders"
COGVIDEOX_2B, COGVIDEOX = "https://huggingface.co/zai-org/CogVideoX-2b", "https://huggingface.co/Kijai/CogVideoX-comfy"
# file -> (folder under models, size, repository, address)
FILES = {
    "Open_Sora_v2.safetensors": ("diffusion_models", "23.8 GB", f"{HUB}/resolve/main/Open_Sora_v2.safetensors"),
    "hunyuan_vae.safetensors": ("vae", "493 MB", f"{HUB}/resolve/main/hunyuan_vae.safetensors"),
    "t5xxl_fp16.safetensors": ("text_encoders", "9.8 GB", f"{ENCODERS}/resolve/main/t5xxl_fp16.safetensors"),
    "clip_l.safetensors": ("text_encoders", "246 MB", f"{ENCODERS}/resolve/main/clip_l.safetensors"),
    high.DIT: ("diffusion_models", "23.8 GB", f"{HIGH_HUB}/resolve/main/{high.DIT}"),
    high.VAE: ("vae", "0.9 GB", f"{HIGH_HUB}/resolve/main/{high.VAE}"),
    cogvideox.T2V_2B: ("diffusion_models", "3.4 GB", f"{COGVIDEOX_2B}/resolve/main/transformer/{cogvideox.T2V_2B}"),
    cogvideox.T2V: ("diffusion_models", "11.1 GB", f"{COGVIDEOX}/resolve/main/{cogvideox.T2V}"),
    cogvideox.I2V: ("diffusion_models", "11.1 GB", f"{COGVIDEOX}/resolve/main/{cogvideox.I2V}"),
    cogvideox.VAE: ("vae", "431 MB", f"{COGVIDEOX}/resolve/main/{cogvideox.VAE}"),
    **{
        f"{name}.safetensors": (folder, size, f"https://huggingface.co/hpcai-tech/{name}/resolve/main/model.safetensors")
        for folder, size, names in (
            ("diffusion_models", "4.8 GB", ("OpenSora-STDiT-v3", "OpenSora-STDiT-v4", "OpenSora-STDiT-v4-i2v")),
            ("vae", "1.6 GB", ("OpenSora-VAE-v1.2",)),
            ("vae", "518 MB", ("OpenSora-VAE-v1.3",)),
        )
        for name in names
    },
    "flux1-dev.safetensors": (
        "diffusion_models", "23.8 GB", "https://huggingface.co/Comfy-Org/flux1-dev/resolve/main/flux1-dev.safetensors",
    ),
    "ae.safetensors": (
        "vae", "335 MB", "https://huggingface.co/Comfy-Org/Lumina_Image_2.0_Repackaged/resolve/main/split_files/vae/ae.safetensors",
    ),
}  # fmt: skip
DERIVED = "its card says Apache-2.0; perhaps a derivative of FLUX.1-dev, which is non-commercial"
_COGVIDEOX = (
    "Model: CogVideoX License, free for research; commercial use needs a registration. VAE: Apache-2.0.",
    "模型:CogVideoX 许可,研究免费,商用需登记;VAE:Apache-2.0。",
)
LICENCES = {
    cogvideox.T2V_2B: ("Model and VAE: Apache-2.0.", "模型与 VAE:Apache-2.0。"),
    **dict.fromkeys((cogvideox.T2V, cogvideox.I2V), _COGVIDEOX),
    "Open_Sora_v2.safetensors": (f"Model: {DERIVED}.", "模型:卡片写 Apache-2.0,可能是非商用的 FLUX.1-dev 的衍生品。"),
    high.DIT: (f"Model: {DERIVED}. VAE: see its card.", "模型:卡片写 Apache-2.0,可能是非商用的 FLUX.1-dev 的衍生品;VAE 见其卡片。"),
    "hunyuan_vae.safetensors": (
        "VAE: Tencent Hunyuan Community, not for the European Union, the United Kingdom and South Korea.",
        "VAE:腾讯混元社区许可,不适用于欧盟、英国和韩国。",
    ),
    "OpenSora-STDiT-v3.safetensors": ("Model and VAE: Apache-2.0.", "模型与 VAE:Apache-2.0。"),
    **dict.fromkeys(
        ("OpenSora-STDiT-v4.safetensors", "OpenSora-STDiT-v4-i2v.safetensors"),
        ("Model and VAE: their cards name no licence, the code's is Apache-2.0.", "模型与 VAE:卡片未注明许可,代码为 Apache-2.0。"),
    ),
    "flux1-dev.safetensors": ("Flux.1 dev: non-commercial; schnell: Apache-2.0.", "Flux.1 dev:非商用;schnell:Apache-2.0。"),
}
RELEASED = ("Open_Sora_v2.safetensors", "t5xxl_fp16.safetensors", "clip_l.safetensors", "hunyuan_vae.safetensors")
NO_FILES = (
    "**Nothing to download.** *small (built in)* comes with the pack, in every loader.",
    "**无需下载。** 每个加载节点里的 *small (built in)* 随本插件提供。",
)
FILE_WIDGETS = (("1", "model_name"), ("2", "t5_name"), ("2", "clip_l_name"), ("3", "vae_name"))
TEXT_WIDGETS = (
    ("4", "prompt"), ("4", "negative_prompt"), ("5", "resolution"), ("5", "aspect_ratio"), ("5", "length"), ("4", "motion_score"),
    ("6", "seed"), ("6", "steps"),
)  # fmt: skip
FIRST_WIDGETS = (
    ("4", "prompt"), ("4", "negative_prompt"), ("5", "size"), ("5", "aspect_ratio"), ("5", "length"), ("4", "aesthetic_score"), ("4", "camera_motion"),
    ("6", "seed"),
)  # fmt: skip
SMALL_WIDGETS = (("4", "prompt"), ("5", "length"), ("4", "motion_score"), ("6", "seed"), ("6", "steps"))
MAKE, RESULT, LOAD = "2 What to make 要做什么", "3 Result 结果", "1 Files 文件"


@dataclass(frozen=True)
class Template:
    """A workflow file.

    Attributes:
        parts: group title -> node ids: the stages, in the order in which they run.
        seen: (node, widget[, name]) of what is shown on the one node, one widget for those of one name; empty = the stages stand on the canvas.
        said: what the note says, in English and in Chinese.
        needs: names of FILES.
        outside: columns of what stays on the canvas behind the one node.
        blueprint: the name of a blueprint that is the one node alone, in both languages: the front-end's search reads nothing else of it.
        is_part: no template, the blueprint alone.
    """

    name: str
    graph: dict
    parts: dict[str, list[list[str]]]
    seen: tuple = ()
    said: tuple[str, str] = ("", "")
    needs: tuple[str, ...] = RELEASED
    title: str = "Open-Sora Text to Video"
    outputs: tuple[str, ...] = ("video",)
    outside: tuple[tuple[str, ...], ...] = (("9",),)
    muted: tuple[str, ...] = ()
    blueprint: str = ""
    describes: str = ""
    aliases: tuple[str, ...] = ()
    app: bool = False
    is_part: bool = False
    inputs: dict[str, str] = field(default_factory=dict)

    @property
    def columns(self) -> list[list[str]]:
        """Each stage's nodes in columns, from left to right: a node stands right of all that it takes anything from."""
        return [column for stage in self.parts.values() for column in self._stage(sum(stage, []))]

    def _stage(self, ids: list[str]) -> list[list[str]]:
        def depth(number: str) -> int:
            sources = {value[0] for value in self.graph[number]["inputs"].values() if isinstance(value, list)}
            return max((depth(source) + 1 for source in sources & set(ids)), default=0)

        depths = {number: depth(number) for number in ids}
        return [[number for number in ids if depths[number] == at] for at in sorted(set(depths.values()))]

    @property
    def groups(self) -> dict[str, list[str]]:
        return {title: sum(columns, []) for title, columns in self.parts.items()} if self.seen else {}

    @property
    def note(self) -> str:
        if self.is_part:
            return ""
        tree = [f"- {folder}\n{rows}" for folder in dict.fromkeys(FILES[name][0] for name in self.needs) if (rows := self._rows(folder))]
        files = "\n".join(["**ComfyUI/models**", *tree]) if tree else ""
        english, chinese = (" ".join(LICENCES[name][at] for name in self.needs if name in LICENCES) for at in (0, 1))
        about = (f"{english} A reading, not advice.", f"{chinese}仅为阅读所得,并非建议。") if tree else NO_FILES
        return "\n\n".join(filter(None, [self.said[0], files, about[0], "---", self.said[1], about[1]])) + "\n"

    def _rows(self, folder: str) -> str:
        rows = [f"  - [{name}]({FILES[name][2]}), {FILES[name][1]}" for name in self.needs if FILES[name][0] == folder]
        return "\n".join(rows)

    @property
    def note_height(self) -> int:
        return 420 if self.needs else 300

    @property
    def models(self) -> dict[str, list[dict]]:
        """By loader, where the front-end may fetch its files."""
        found = {}
        for number, node in self.graph.items():
            named = [value for value in node["inputs"].values() if isinstance(value, str) and value in FILES]
            if named and "Loader" in node["class_type"]:
                found[number] = [{"name": name, "url": FILES[name][2], "directory": FILES[name][0]} for name in named]
        return found

    @property
    def whole(self) -> dict | None:
        if not self.seen:
            return None
        return {
            "inside": [number for column in self.columns for number in column],
            "title": self.title,
            "description": self.describes or self.said[0].split("\n")[0],
            "aliases": list(self.aliases),
            "promoted": [list(one) for one in self.seen],
            "inputs": self.inputs,
            "outputs": list(self.outputs),
            "canvas": [] if self.is_part else [["about"], ["whole"], *map(list, self.outside)],
            "shown": [number for column in self.outside for number in column],
            "app": self.app,
        }


def _text(graph: dict, **more) -> dict:
    """The stages of text to video."""
    return {"graph": graph, "parts": {LOAD: [["1", "2", "3"]], MAKE: [["4", "5"]], RESULT: [["6", "7", "8"]]}, **more}


def _image(graph: dict, pictures: tuple[str, ...] = ("10",), **more) -> dict:
    """The stages of a video that begins with something that is given."""
    parts = {LOAD: [["1", "2", "3"]], MAKE: [[*pictures], ["4", "5", "11"]], RESULT: [["6", "7", "8"]]}
    return {"graph": graph, "parts": parts, "title": "Open-Sora Image to Video", **more}


def _planned(graph: dict, given: list[list[str]] = (), seen: list[tuple] = ()) -> dict:
    """The stages of a video whose settings come from Open-Sora Preflight. One widget names the model for the plan and for the loader."""
    return {
        "graph": graph,
        "parts": {LOAD: [["31", "5", "30", "1", "2", "3"]], MAKE: [["4"], *given], RESULT: [["6", "7", "8"]]},
        "seen": (*seen, *TEXT_WIDGETS[:4], ("31", "value", "length"), *TEXT_WIDGETS[5:], ("30", "model_name"), *FILE_WIDGETS),
        "title": "Open-Sora Image to Video, planned" if given else "Open-Sora Text to Video, planned",
    }


TEXT_ALIASES = ("text to video", "t2v", "文生视频", "文本生成视频")
IMAGE_ALIASES = ("image to video", "i2v", "图生视频", "图片生成视频")
_SIZES = "129 frames at 24 FPS are 5.4 seconds; *length* takes seconds (5s) too."
_SIZES_ZH = "129 帧、24 FPS 为 5.4 秒;*length* 也可写秒数(5s)。"


def all_of() -> list[Template]:
    """Every template, in the order of the browser."""
    text, image = graphs.text_to_video, graphs.image_to_video
    small_text, small_image = run.WORKFLOWS.values()
    seen, picture = (*TEXT_WIDGETS, *FILE_WIDGETS), (("10", "image", "picture"), *TEXT_WIDGETS, *FILE_WIDGETS)
    high_files = (high.DIT, *RELEASED[1:3], high.VAE)
    flux_files = (*RELEASED, "flux1-dev.safetensors", "ae.safetensors")
    made = [
        Template(
            "01 Text to video, no download", **_text(graphs.with_the_built_in_model(text("256px"), small_text)), seen=SMALL_WIDGETS, needs=(),
            said=(
                "Press **Run**: 17 frames of 64 x 64 in seconds, on a processor too.\n\nThe built-in model knows one small world: *a* red, green, blue, "
                "yellow, purple or white *circle, square or triangle moving* left, right, up or down *on a* black, gray, white or blue *background*.",
                "点击**运行**:几秒钟生成 17 帧 64 x 64 的视频,CPU 也可以。\n\n内置模型只认识一个小世界:彩色的圆、方块或三角形在纯色背景上移动(提示词用英文)。",
            ),
        ),
        Template(
            "02 Image to video, no download", **_image(graphs.picture_to_video_built_in(small_image), ("10", "12", "13")), needs=(),
            seen=(*SMALL_WIDGETS[:1], ("10", "color", "background colour"), ("12", "color", "square's colour"), *SMALL_WIDGETS[1:]),
            said=(
                "Press **Run**: stock nodes inside draw a coloured square, 64 x 64, and the built-in model moves it.\n\nChange the direction in the prompt, "
                "or picture and prompt together.",
                "点击**运行**:内部的标准节点画一个彩色方块(64 x 64),内置模型让它移动。\n\n可改提示词里的方向,或同时改图片和提示词。",
            ),
        ),
        Template(
            "03 Text to video, 256px", **_text(text("256px")), seen=seen, blueprint="Open-Sora Text to Video 文生视频", aliases=TEXT_ALIASES,
            describes="Text to video with Open-Sora 2.0 in one node: loaders, prompt, size, sampling and decode.",
            said=(
                f"A prompt becomes a video of 336 x 192: the quickest way to try one. {_SIZES}\n\nOne flowing description of subject, movement, place, light and "
                "camera works best. 50 steps take 80 forwards.",
                f"由提示词生成 336 x 192 的视频,最快的试验方式。{_SIZES_ZH}\n\n用一段连贯的话描述主体、动作、地点、光线和镜头。",
            ),
        ),
        Template(
            "04 Image to video, 256px", **_image(image("256px")), seen=picture, blueprint="Open-Sora Image to Video 图生视频", aliases=IMAGE_ALIASES,
            describes="Image to video with Open-Sora 2.0 in one node: the picture becomes the first frame.",
            said=(
                f"Your picture becomes the first frame and is kept as it is. {_SIZES}\n\nDescribe what moves, not only what is seen.",
                f"图片成为第一帧,保持原样。{_SIZES_ZH}\n\n请描述会动的内容,而不只是画面。",
            ),
        ),
        Template(
            "05 Text to video, 768px", **_text(text("768px")), seen=seen,
            said=(
                "A video of 1024 x 576: each forward works on nine times the tokens of 256px. Find prompt and seed there first.\n\nMemory is short? Open the "
                "node: decode *policy* low_memory, or an fp8 file.",
                "1024 x 576 的视频:计算量约为 256px 的九倍,请先在 256px 找到提示词和种子。\n\n显存不足:进入节点,将解码 *policy* 设为 low_memory,或用 fp8 文件。",
            ),
        ),
        Template(
            "06 Image to video, 768px", **_image(image("768px")), seen=picture,
            said=(
                "Your picture becomes the first frame of a video of 1024 x 576. Try picture, prompt and seed at 256px first.",
                "图片成为 1024 x 576 视频的第一帧。请先在 256px 试好图片、提示词和种子。",
            ),
        ),
        Template(
            "07 Flux picture to video", graph=flux.in_one_node(text("256px")), title="Open-Sora Flux to Video", needs=flux_files,
            parts={LOAD: [["20", "21"], ["1", "2", "3"]], MAKE: [["10"]], RESULT: [["8"]]},
            seen=(
                *((("10", name)) for name in ("prompt", "resolution", "aspect_ratio", "length", "seed", "image_seed", "steps", "image_steps")),
                ("20", "unet_name", "flux model"), ("21", "vae_name", "flux vae"), *FILE_WIDGETS,
            ),
            said=(
                "Flux draws the first frame, Open-Sora moves it: how Open-Sora 2.0 is best used.\n\n*image_seed* keeps a picture that you like while *seed* makes "
                "new videos of it (-1: the same as seed). Flux schnell works as well.",
                "Flux 画第一帧,Open-Sora 让它动起来:这是 Open-Sora 2.0 的最佳用法。\n\n*image_seed* 固定喜欢的图片,*seed* 换新视频(-1:与 seed 相同)。",
            ),
        ),
        Template(
            "08 First and last frame", **_image(reference.between_pictures(text("256px")), ("10", "12")) | {"title": "Open-Sora First and Last Frame"},
            blueprint="Open-Sora First and Last Frame 首尾帧", aliases=("first and last frame", "first last frame", "loop", "首尾帧", "循环视频"),
            describes="A video between two pictures with Open-Sora 2.0 in one node; the same picture twice makes a loop.",
            seen=(("10", "image", "first frame"), ("12", "image", "last frame"), *TEXT_WIDGETS[:2], *TEXT_WIDGETS[2:3], *TEXT_WIDGETS[4:], *FILE_WIDGETS),
            said=(
                "The video begins and ends with your pictures; the same one twice makes a loop. It takes the first picture's shape.",
                "视频以两张图片开始和结束;同一张用两次即为循环。画面形状取自第一张。",
            ),
        ),
        Template(
            "09 Extend a video", **_image(reference.extended_clip(text("256px")), ("12", "10")) | {"title": "Open-Sora Extend Video"},
            blueprint="Open-Sora Extend Video 视频续写", aliases=("extend video", "video to video", "continue", "视频续写", "视频延长"),
            describes="Goes on from a clip with Open-Sora 2.0 in one node: its last 33 frames begin a new video.",
            seen=(("12", "image", "picture"), ("11", "direction"), *TEXT_WIDGETS, *FILE_WIDGETS),
            said=(
                "The last 33 frames of a clip begin a new video. Here the clip is a picture held for 33 frames: open the node and put *Load Video* in place of "
                "*Clip*.\n\nExperimental: the model may not have been trained for it.",
                "以一段视频的最后 33 帧开始新视频。这里的片段是一张静止图片:进入节点,用 *Load Video* 替换 *Clip*。\n\n实验性功能。",
            ),
        ),
        Template(
            "10 Long video", graph=longer.continued(text("256px")), title="Open-Sora Long Video", blueprint="Open-Sora Long Video 长视频",
            aliases=("long video", "extend", "continue video", "长视频"),
            describes="A longer video with Open-Sora 2.0 in one node, segment by segment, with a prompt for each.",
            parts={LOAD: [["1", "2", "3"]], MAKE: [["4", "5"]], RESULT: [["6"], ["10"], ["8"]]},
            seen=(*TEXT_WIDGETS[:1], ("10", "prompts", "later prompts"), *TEXT_WIDGETS[2:5], ("10", "segments"), *TEXT_WIDGETS[6:], *FILE_WIDGETS),
            said=(
                "A first clip, then one segment more for each line of *later prompts*: 129, 225, 321 frames. Every finished segment is kept in the output folder.\n\n"
                "Experimental: the model may not have been trained for it.",
                "先生成第一段,再按 *later prompts* 每行续一段:129、225、321 帧。每段完成后都会保存。\n\n实验性功能。",
            ),
        ),
        Template(
            "11 A video for each line", graph=graphs.a_video_for_each_line(), title="Open-Sora Prompt List to Video", outputs=("video", "file name"),
            parts={LOAD: [["1", "2", "3"]], MAKE: [["10"], ["4", "5"]], RESULT: [["6", "7", "8"]]},
            seen=(("10", "prompts"), *TEXT_WIDGETS[2:], *FILE_WIDGETS),
            said=(
                "One prompt per line; each becomes a file of its own. A line that begins with # is left out.\n\nThe videos of one run are in RAM until the last is done.",
                "每行一个提示词,各自成为一个文件;以 # 开头的行会跳过。\n\n同一次运行的视频在全部完成前都在内存中。",
            ),
        ),
        Template(
            "12 Drafts, then promote one", graph=longer.draft_then_promote(text("256px")), title="Open-Sora Drafts and Promotion",
            outputs=("drafts", "promoted video"), outside=(("9", "40"),), muted=("40",),
            parts={LOAD: [["1", "2", "3"]], "2 Drafts 草稿": [["4", "5"], ["6"], ["7", "20", "8"]],
                   "3 The chosen one 选中的一个": [["30", "31", "32"], ["33", "34", "35", "36"], ["37"], ["38", "39"]]},
            seen=(*TEXT_WIDGETS[:1], ("5", "batch_size", "drafts"), ("5", "aspect_ratio"), ("5", "length"), ("6", "seed"), ("6", "speed"),
                  ("30", "batch_index", "chosen draft"), ("33", "step", "keep until step"), *FILE_WIDGETS),
            said=(
                "1. **Run**: four drafts side by side, numbered, at *draft* speed (9 steps).\n"
                "2. Write the number into *chosen draft*.\n3. Un-mute *Save the promoted video* (Ctrl+M) and run "
                "again: that draft is finished at 768px.\n\nAn earlier *keep until step* changes more.",
                "1. **运行**:四个带编号的草稿(*draft* 速度,9 步)。\n"
                "2. 把编号写入 *chosen draft*。\n3. 取消静音 *Save the promoted video*(Ctrl+M)再运行:该草稿以 768px 完成。",
            ),
        ),
        Template(
            "13 Low VRAM, planned before the run", **_planned(graphs.planned_before_the_run(text("256px"))),
            said=(
                "*Open-Sora Preflight*, inside, counts what this video needs on your card and sets precision, offload and decode by it; what does not fit at all is "
                "said before anything is loaded.",
                "内部的 *Open-Sora Preflight* 先计算显存需求,并据此设置精度、卸载和解码;放不下时在加载之前就会说明。",
            ),
        ),
        Template(
            "14 High compression, text to video", **_text(high.high_compression(text("768px"), "open-sora-high-compression")), seen=seen, needs=high_files,
            said=(
                "The variant with the Video DC-AE: a quarter of the tokens, faster and less good. 128 frames of 1024 x 576; lengths are multiples of 4, sides "
                "multiples of 32.",
                "高压缩版(Video DC-AE):标记数约四分之一,更快但质量较低。长度为 4 的倍数,边长为 32 的倍数。",
            ),
        ),
        Template(
            "15 High compression, image to video", **_image(high.high_compression(image("768px"), "open-sora-high-compression-i2v")), seen=picture,
            needs=high_files,
            said=(
                "The picture becomes the first latent, four frames, of 128 frames of 1024 x 576. Lengths are multiples of 4, sides multiples of 32.",
                "图片成为第一个潜变量(四帧)。长度为 4 的倍数,边长为 32 的倍数。",
            ),
        ),
        Template(
            "16 The stages, shown openly", graph=text("256px"), seen=(), parts={LOAD: [["1", "2", "3"]], MAKE: [["4", "5"]], RESULT: [["6", "7", "8", "9"]]},
            said=(
                "Text to video with its stages on the canvas, so that any of them can be exchanged: a LoRA or patch behind the loader, a picture behind the "
                "prompt, another decode. Select several and press Ctrl+G to group, or make one node of them.",
                "文生视频的各个步骤直接放在画布上,可逐个替换:加载器之后接 LoRA 或补丁,提示词之后接图片,或换解码方式。",
            ),
        ),
        Template(
            "17 Flux to video in parts", graph=flux.in_parts(text("256px")), title="Open-Sora Flux to Video in Parts", needs=flux_files,
            outputs=("video",),
            parts={LOAD: [["20", "21", "1", "2", "3"]], "2 Picture: Flux 图片": [["33", "22", "23", "24", "29"], ["25", "26", "27", "28", "30"], ["31", "32"]],
                   "3 Video: Open-Sora 视频": [["4", "5"], ["11", "6"], ["7", "8"]]},
            seen=(("33", "value", "prompt"), ("5", "resolution"), ("5", "aspect_ratio"), ("5", "length"), ("27", "noise_seed", "picture seed"),
                  ("6", "seed", "video seed"), ("6", "steps"), ("20", "unet_name", "flux model"), ("21", "vae_name", "flux vae"), *FILE_WIDGETS),
            said=(
                "As 07, of ComfyUI's own Flux nodes: open the node to put another image model, an upscaler or a ControlNet before *start_image*.",
                "同 07,使用 ComfyUI 自带的 Flux 节点:进入节点即可换图像模型,或接放大、ControlNet。",
            ),
        ),
        Template(
            "18 Any sampler, any sigmas", graph=graphs.text_to_video_in_parts(), title="Open-Sora Text to Video in Parts",
            parts={LOAD: [["1", "2", "3"]], MAKE: [["4", "5"]], RESULT: [["10", "12", "13", "11", "6", "7", "8"]]},
            seen=(*TEXT_WIDGETS[:6], ("12", "noise_seed", "seed"), ("10", "steps"), ("13", "sampler_name"), *FILE_WIDGETS),
            said=(
                "As 03, of ComfyUI's own SamplerCustomAdvanced: open the node to put in another sampler, other sigmas, or noise of your own.",
                "同 03,使用 ComfyUI 自带的 SamplerCustomAdvanced:进入节点即可换采样器、sigmas 或噪声。",
            ),
        ),
        Template(
            "19 Fast, text to video", **_text(graphs.at_speed(text("256px"), "fast")), seen=(*TEXT_WIDGETS[:-1], ("6", "speed"), *FILE_WIDGETS),
            said=(
                "As 03 in 12 steps in place of 50, each with the mean guidance of the released steps that it stands for. *balanced* takes 20, *draft* 9, *exact* all "
                "50.\n\nSubject and movement are those of the exact video; fine detail differs.",
                "同 03,但只用 12 步(原为 50 步),每步取其所代表的原步骤的平均引导。*balanced* 为 20 步,*draft* 为 9 步,*exact* 为全部 50 步。"
                "\n\n主体与动作相同,细节有别。",
            ),
        ),
        Template(
            "25 Balanced, image to video, 768px", **_image(graphs.at_speed(image("768px"), "balanced")),
            seen=(*picture[: -len(FILE_WIDGETS) - 1], ("6", "speed"), *FILE_WIDGETS),
            said=(
                "As 06 in 20 steps in place of 50: less than half of the time, near to the exact video. Try prompt and seed with *fast* or *draft*, then run *exact* "
                "once.",
                "同 06,但只用 20 步(原为 50 步):时间不到一半,结果接近。可先用 *fast* 或 *draft* 试,再用 *exact* 生成一次。",
            ),
        ),
        Template(
            "26 Low VRAM, image to video", **_planned(graphs.planned_before_the_run(image("256px")), [["10", "11"]], [("10", "image", "picture")]),
            said=(
                "As 04, with *Open-Sora Preflight* before everything: it counts what this video needs on your card and sets precision, offload and decode by it.",
                "同 04,但先由 *Open-Sora Preflight* 计算显存需求,并据此设置精度、卸载和解码。",
            ),
        ),
    ]  # fmt: skip
    return [*made, *_apps(made), *_of_version_1(), _teaching(small_text), *_cogvideox()]


def _teaching(wish: run.Wish) -> Template:
    """Train LoRA on a lesson that comes with the pack."""
    return Template(
        "33 Teach it a colour, no download", graphs.taught_a_colour(wish),
        {LOAD: [["1", "2", "3"]], "2 Lesson 课程": [["5", "10", "11", "12", "13", "14"]], RESULT: [["4", "6", "16", "7", "17", "18", "8"]]},
        (("4", "prompt"), ("12", "steps"), ("12", "learning_rate"), ("10", "folder", "lesson"), ("6", "seed"), ("16", "seed")), needs=(),
        title="Open-Sora Teach a Colour",
        said=(
            "Press **Run**: in ten minutes on a processor the built-in model learns *charcoal*, a word and a colour of shapes that its training has not. "
            "Left before, right after, of one prompt and noise.\n\nThe LoRA is saved in output/loras. python -m opensora_core evaluate --lora FILE --colour charcoal "
            "says what was learned, and lost. A folder of your own clips in *lesson* teaches that.",
            "点击**运行**:在 CPU 上用约十分钟,内置模型学会训练中从未有过的颜色 *charcoal*(炭黑)。左为学习前,右为学习后,提示词与噪声相同。\n\nLoRA 保存在 output/loras;"
            "python -m opensora_core evaluate --lora FILE --colour charcoal 说明学会了多少、忘了多少。*lesson* 也可选自己的视频文件夹。",
        ),
    )  # fmt: skip


def _cogvideox() -> list[Template]:
    """CogVideoX, with settings from a plan; in its own size, length and numbers."""
    text, image = graphs.text_to_video, graphs.image_to_video
    seen = (("4", "prompt"), ("4", "negative_prompt"), ("31", "value", "length"), ("6", "seed"), ("30", "model_name"), *FILE_WIDGETS)
    stages = {LOAD: [["31", "30", "1", "12", "2", "3"]], MAKE: [["4", "5"]], RESULT: [["6", "7", "8"]]}
    encoder = ("t5xxl_fp16.safetensors", cogvideox.VAE)
    planned = (
        "*Open-Sora Preflight*, inside, counts what this video needs on your card and sets precision, offload and decode by it; where the decode must be in tiles "
        "it says so.",
        "内部的 *Open-Sora Preflight* 先计算显存需求,并据此设置精度、卸载和解码;需要分块解码时会说明。",
    )
    return [
        Template(
            "40 CogVideoX 2B, text to video in 8 GB", cogvideox.cogvideox(text("256px"), cogvideox.T2V_2B, "cogvideox-2b"), stages, seen,
            said=(
                f"49 frames of 720 x 480 at 8 FPS. {planned[0]}\n\nEnglish prompts; long, flowing captions work best.",
                f"49 帧、720 x 480、8 FPS。{planned[1]}\n\n提示词用英文,长而连贯的描述效果最好。",
            ),
            needs=(cogvideox.T2V_2B, *encoder), title="CogVideoX Text to Video", aliases=("cogvideox", *TEXT_ALIASES),
        ),
        Template(
            "41 CogVideoX 1.5, text to video", cogvideox.cogvideox(text("256px"), cogvideox.T2V, "cogvideox-1.5"), stages, seen,
            said=(
                f"81 frames of 1360 x 768 at 16 FPS; lengths are 16k+1, to 161. {planned[0]}",
                f"81 帧、1360 x 768、16 FPS;长度为 16k+1,最长 161。{planned[1]}",
            ),
            needs=(cogvideox.T2V, *encoder), title="CogVideoX Text to Video", aliases=("cogvideox", *TEXT_ALIASES),
        ),
        Template(
            "42 CogVideoX 1.5, image to video", cogvideox.cogvideox(image("256px"), cogvideox.I2V, "cogvideox-1.5-i2v"),
            {**stages, MAKE: [["10"], ["4", "5", "11"]]}, (("10", "image", "picture"), *seen),
            said=(
                f"The video begins with your picture: 81 frames of 1360 x 768 at 16 FPS. {planned[0]}\n\nAnother shape: size *custom* in *Open-Sora Empty Latent* "
                "and the same in Preflight, with a short side of 768.",
                f"视频以图片开始:81 帧、1360 x 768、16 FPS。{planned[1]}\n\n其他形状:在 *Open-Sora Empty Latent* 选 custom,并在 Preflight 填同样的尺寸,短边 768。",
            ),
            needs=(cogvideox.I2V, *encoder), title="CogVideoX Image to Video", aliases=("cogvideox", *IMAGE_ALIASES),
        ),
    ]  # fmt: skip


def _of_version_1() -> list[Template]:
    """The templates of Open-Sora 1.2 and 1.3, whose files are saved under the names of their repositories."""
    parts = {LOAD: [["1", "2", "3"]], MAKE: [["4", "5"]], RESULT: [["20", "6"], ["7", "8"]]}
    given = {LOAD: [["1", "2", "3"]], MAKE: [["10"], ["4", "5", "11"]], RESULT: [["20", "6"], ["7", "8"]]}
    files = {version: (transformer, first.T5, vae) for version, (transformer, vae) in first.FILES.items()}
    pictures = (first.PICTURES_1_3, *files["1.3"][1:])
    seen, picture = (*FIRST_WIDGETS, *FILE_WIDGETS[:2], *FILE_WIDGETS[3:]), ("10", "image", "picture")
    saved = "Save each *model.safetensors* under the name below."
    saved_zh = "请将各 *model.safetensors* 以下列名称保存。"

    def text(version: str, size: str, length: str) -> dict:
        return first.text_to_video(version, graphs.TEXT_PROMPT, size, length)

    def image(version: str, size: str, length: str, transformer: str = "") -> dict:
        return first.image_to_video(first.text_to_video(version, graphs.IMAGE_PROMPT, size, length), transformer)

    return [
        Template(
            "27 Open-Sora 1.2, text to video, 720p", graph=text("1.2", "720p", "4s"), parts=parts, needs=files["1.2"], seen=seen,
            title="Open-Sora 1.2 Text to Video",
            said=(
                f"1280 x 720, 102 frames, 1.2 billion parameters: 16 seconds (*length* 16s) fit 24 GB, 240p 6 GB. {saved}",
                f"1280 x 720、102 帧,12 亿参数:24 GB 可生成 16 秒(*length* 16s),240p 只需 6 GB。{saved_zh}",
            ),
        ),
        Template(
            "28 Open-Sora 1.2, image to video", graph=image("1.2", "240p", "4s"), parts=given, needs=files["1.2"],
            seen=(picture, *seen), title="Open-Sora 1.2 Image to Video",
            said=(
                f"The picture is the first frame; it is held at every step. 426 x 240, 102 frames. {saved}",
                f"图片为第一帧,每一步都保持。426 x 240、102 帧。{saved_zh}",
            ),
        ),
        Template(
            "29 Open-Sora 1.3, text to video, 720p", graph=text("1.3", "720p", "113"), parts=parts, needs=files["1.3"], seen=seen,
            title="Open-Sora 1.3 Text to Video",
            said=(
                f"1280 x 720, 113 frames. *aesthetic_score* and *camera_motion* become sentences of the prompt. {saved}",
                f"1280 x 720、113 帧。*aesthetic_score* 与 *camera_motion* 会写入提示词。{saved_zh}",
            ),
        ),
        Template(
            "30 Open-Sora 1.3, image to video", graph=image("1.3", "360p", "113", first.PICTURES_1_3), parts=given, needs=pictures,
            seen=(picture, *seen), title="Open-Sora 1.3 Image to Video",
            said=(f"The picture is read beside the noise, with image guidance 5. 640 x 360, 113 frames. {saved}",
                  f"图片与噪声一同输入,图像引导为 5。640 x 360、113 帧。{saved_zh}"),
        ),
        Template(
            "31 Open-Sora 1.2, mask strategy", graph=first.masked(text("1.2", "240p", "4s")), needs=files["1.2"],
            parts=given | {MAKE: [["10", "12"], ["4", "5", "11"]]},
            seen=(picture, ("12", "image", "second picture"), ("11", "strategy"), *seen), title="Open-Sora 1.2 Mask Strategy",
            said=(
                "*strategy* lays the pictures into the video: loop, reference, its start, the video's start, length, edit; all counted in latent frames. "
                f"{first.BETWEEN}: from the first picture to the second. {saved}",
                f"*strategy* 将图片放入视频:loop,reference,reference start,target start,length,edit,以 Latent 帧计。{first.BETWEEN}:从第一张到第二张。{saved_zh}",
            ),
        ),
        Template(
            "32 Open-Sora 1.2, endless video", graph=first.endless(text("1.2", "240p", "4s"), longer.LATER_PROMPTS), needs=files["1.2"],
            parts={LOAD: [["1", "2", "3"]], MAKE: [["4", "5"]], RESULT: [["20", "6"], ["10"], ["8"]]}, title="Open-Sora 1.2 Endless Video",
            seen=(*seen[:1], ("10", "prompts", "later prompts"), *seen[1:5], ("10", "segments"), *seen[5:]),
            said=(
                f"Clip after clip: each begins with the last 17 frames of the one before, decoded and encoded again, and is kept as soon as it is made. {saved}",
                f"逐段生成:每段以上一段的最后 17 帧(解码后再编码)开始,完成即保存。{saved_zh}",
            ),
        ),
    ]  # fmt: skip


APPS = {"03": "Text to video", "04": "Image to video", "07": "Flux picture to video", "10": "Long video", "11": "A video for each line"}


def _apps(made: list[Template]) -> list[Template]:
    """The same as forms with a large player (the front-end's App mode)."""
    from dataclasses import replace

    by_number = {one.name[:2]: one for one in made}
    return [
        replace(
            by_number[number],
            name=f"{20 + at} App, {title[0].lower()}{title[1:]}",
            app=True,
            blueprint="",
            seen=by_number[number].seen[: -len(FILE_WIDGETS)],
        )
        for at, (number, title) in enumerate(APPS.items())
    ]


def parts() -> list[Template]:
    """Parts of graphs that are blueprints and no template of their own."""
    promotion = longer.draft_then_promote(graphs.text_to_video("256px"))
    return [
        Template(
            "Open-Sora 2 Promote Draft", promotion, {RESULT: [["30", "31", "32"], ["33", "34", "35", "36"], ["37", "38"]]}, longer.PROMOTION_WIDGETS,
            title="Open-Sora 2 Promote Draft", describes=longer.PROMOTION_TEXT, outputs=("images",), inputs={"samples": "drafts"},
            blueprint="Open-Sora 2 Promote Draft 草稿", is_part=True, aliases=("promote draft", "upscale video", "草稿"),
        ),
        Template(
            "Open-Sora 2 Flux to Video", flux.in_parts(graphs.text_to_video("256px")), {RESULT: [list(column) for column in flux.CHAIN]}, flux.CHAIN_WIDGETS,
            title="Open-Sora 2 Flux to Video", describes=flux.CHAIN_TEXT, outputs=("picture", "fps", "video frames"),
            inputs={"model": "flux_model", "vae": "flux_vae", "model_1": "model", "vae_1": "vae"},
            blueprint="Open-Sora 2 Flux to Video 文生图生视频", is_part=True, aliases=("flux to video", "t2i2v", *TEXT_ALIASES),
        ),
    ]  # fmt: skip
