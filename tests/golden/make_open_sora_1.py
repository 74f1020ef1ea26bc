"""Record golden numbers of Open-Sora 1.0 to 1.3 from the reference at each tag: python tests/golden/make_open_sora_1.py

OPENSORA_REF names a git repository of hpcaitech/Open-Sora with its tags, and PYTHONPATH holds `refenv` and its stand-ins by formula
(mmengine). Every tag is unpacked into a temporary folder and run in a process of its own. No line of the reference is here; its
classes are built small, filled with seeded random values (open_sora_1_cases.py) and called in fp32 on a CPU.
"""

import importlib.machinery
import importlib.util
import json
import os
import random
import subprocess
import sys
import tempfile
import types
from pathlib import Path

HERE = Path(__file__).resolve().parent
TAGS = {"1.0": "v1.0.0", "1.1": "v1.1.0", "1.2": "v1.2.0", "1.3": "v1.3"}
# Packages whose own __init__ would import everything: their modules are imported one by one.
BARE = {f"opensora{rest}" for rest in ("", ".models", ".models.stdit", ".models.vae", ".models.text_encoder", ".datasets", ".schedulers")}


class BarePackages:
    def __init__(self, root):
        self.root = root

    def find_spec(self, name, path=None, target=None):
        if name not in BARE:
            return None
        spec = importlib.machinery.ModuleSpec(name, self, is_package=True)
        spec.submodule_search_locations = [str(self.root.joinpath(*name.split(".")))]
        return spec

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        if module.__name__ == "opensora.datasets":
            module.IMG_FPS, module.save_sample = 120, None


def block_diagonal_attention(q, k, v, p=0.0, attn_bias=None):
    """xformers.ops.memory_efficient_attention over [1, L, H, D] by its formula: each sample sees its own keys."""
    import torch

    queries, keys = attn_bias
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    parts = zip(q.split(queries, 2), k.split(keys, 2), v.split(keys, 2), strict=True)
    return torch.cat([(a @ b.transpose(-1, -2) * a.shape[-1] ** -0.5).softmax(-1) @ c for a, b, c in parts], 2).transpose(1, 2).contiguous()


def declare_operators():
    """torchvision built for another torch has no operators, and cannot be imported without their names; none is called."""
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


def activate(root):
    global operators
    operators = declare_operators()
    import diffusers  # noqa: F401  first, so that its own probes see the real machine
    import refenv
    import timm.layers
    import transformers  # noqa: F401

    missing = [name for name in (*refenv.PLACEHOLDERS, "matplotlib", "av") if importlib.util.find_spec(name) is None]
    sys.meta_path.append(refenv._Finder(missing))
    refenv._torchvision_video()
    ops = types.ModuleType("xformers.ops")
    ops.memory_efficient_attention = block_diagonal_attention
    mask = types.SimpleNamespace(from_seqlens=lambda queries, keys: (list(queries), list(keys)))
    ops.fmha = types.SimpleNamespace(BlockDiagonalMask=mask)
    typing = types.ModuleType("beartype.typing")
    typing.__dict__.update({name: getattr(__import__("typing"), name) for name in ("Literal", "Optional", "Union")})
    beartype = types.ModuleType("beartype")
    beartype.beartype = lambda function: function
    layers = types.ModuleType("timm.models.layers")
    layers.DropPath = timm.layers.DropPath
    xformers = types.ModuleType("xformers")
    xformers.ops = ops
    runner = types.ModuleType("mmengine.runner")
    runner.set_random_seed = None  # a script imports it
    board = types.ModuleType("torch.utils.tensorboard")
    board.SummaryWriter = None
    for module in (runner, board, xformers, ops, beartype, typing, layers):
        sys.modules[module.__name__] = module
    sys.meta_path.insert(0, BarePackages(root))
    sys.dont_write_bytecode = True
    sys.path.insert(0, str(root))


# ------------------------------------------------------------------ networks


def network(version, sizes):
    if version == "1.0":
        from opensora.models.stdit.stdit import STDiT

        return STDiT(mlp_ratio=4.0, **sizes)
    if version == "1.1":
        from opensora.models.stdit.stdit2 import STDiT2, STDiT2Config

        return STDiT2(STDiT2Config(**sizes))
    from opensora.models.stdit.stdit3 import STDiT3, STDiT3Config

    return STDiT3(STDiT3Config(**sizes))


def fill(model):
    import open_sora_1_cases as cases

    shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
    state = cases.random_weights({name: shape for name, shape in shapes.items() if not name.startswith("pos_embed")})
    model.load_state_dict(state, strict=False)
    return model.train(False), shapes


def record_networks(version, out, info):
    import open_sora_1_cases as cases
    import torch

    model, info["shapes"] = fill(network(version, cases.NETWORKS[version]))
    mask = torch.tensor(cases.TEXT_MASK)
    for name, (of, extent, size, frames, time, edit, given) in cases.FORWARDS.items():
        if of != version:
            continue
        channels = cases.NETWORKS[version]["in_channels"]
        x = cases.random((2, channels, *extent), 1)
        timestep = torch.tensor([time, time])
        y = cases.random((2, 1, 8, 16), 2)
        values = {"mask": mask}
        if version != "1.0":
            height, width = (torch.tensor([float(side)] * 2) for side in size)
            values |= {"height": height, "width": width, "fps": torch.tensor([24.0 if frames > 1 else 120.0] * 2)}
            values |= {"num_frames": torch.tensor([float(frames)] * 2), "ar": height / width}
        if edit:
            values["x_mask"] = torch.tensor(edit) * 1000 >= timestep[:, None]
        if given:
            where = torch.zeros_like(x)
            where[:, :, given] = 1
            null = model.y_embedder.y_embedding.expand(2, 1, -1, -1)
            values |= {"cond": cases.random(x.shape, 3) * where, "cond_mask": where, "mask_index": given, "y_null": null}
        found = model(x, timestep, y, **values)
        if version in ("1.2", "1.3"):  # the other half is not used; of 16 channels every fifth will do
            found = found[:, : channels : 5 if channels == 16 else 1]
        out[f"forward.{name}"] = found


def record_manifest(version, info):
    import open_sora_1_cases as cases
    import torch

    sizes = {**cases.NETWORKS[version], "hidden_size": 1152, "num_heads": 16, "depth": 28, "caption_channels": 4096}
    sizes["model_max_length"] = {"1.0": 120, "1.1": 200}.get(version, 300)
    if version == "1.0":
        sizes |= {"input_size": (16, 32, 32), "space_scale": 0.5}
    linspace = torch.linspace
    torch.linspace = lambda *values: linspace(*values, device="cpu")  # drop rates are read while the module is built
    with torch.device("meta"):
        model = network(version, sizes)
    torch.linspace = linspace
    info["manifest"] = cases.folded({name: list(value.shape) for name, value in model.state_dict().items()})


def record_tables(out):
    """bf16, as the released 1.3 has them: the module and all its tables are cast."""
    import torch
    from opensora.models.layers.blocks import PositionEmbedding2D
    from opensora.models.layers.rotary_embedding_torch import RotaryEmbedding

    x = torch.zeros(1, dtype=torch.bfloat16)
    out["tables.position"] = PositionEmbedding2D(48).to(torch.bfloat16)(x, 45, 80, 1.9, 60)[0, ::37]
    rope = RotaryEmbedding(dim=24, cache_if_possible=False).to(torch.bfloat16)
    q = torch.eye(24, dtype=torch.bfloat16)[::2, None].expand(12, 35, 24).unsqueeze(0)
    out["tables.rope"] = rope.rotate_queries_or_keys(q, scale=1.9)[0]


# ------------------------------------------------------------------ autoencoders


def record_kl(out, info):
    import open_sora_1_cases as cases
    import torch
    from diffusers import AutoencoderKL

    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    model, info["kl_shapes"] = fill(AutoencoderKL(**blocks, **cases.PICTURE_VAE))
    for name, (which, frames, height, width) in cases.CLIPS.items():
        if which == "kl":
            pixels = cases.random((frames, 3, height, width), 4)
            out[f"vae.{name}.moments"] = model.encode(pixels).latent_dist.parameters
            out[f"vae.{name}.pixels"] = model.decode(cases.random((frames, 4, height // 8, width // 8), 5)).sample
    with torch.device("meta"):
        full = AutoencoderKL(**blocks, block_out_channels=(128, 256, 512, 512), layers_per_block=2)
    info["kl_manifest"] = {name: list(value.shape) for name, value in full.state_dict().items()}
    return model


def record_temporal(out, info):
    import open_sora_1_cases as cases
    import torch
    from opensora.models.vae import vae as pipeline
    from opensora.models.vae.vae_temporal import VAE_Temporal, VAE_Temporal_SD

    class Spatial(pipeline.VideoAutoencoderKL):
        def __init__(self):  # the reference's own reads a folder
            torch.nn.Module.__init__(self)
            self.module, self.out_channels, self.patch_size, self.micro_batch_size = picture, 4, (1, 8, 8), 4

    picture = record_kl(out, info)
    temporal = VAE_Temporal(
        in_out_channels=4, latent_embed_dim=4, embed_dim=4, temporal_downsample=(False, True, True), **cases.TEMPORAL_VAE
    )
    pipeline.build_module = lambda module, _: module
    numbers = {"shift": (-0.10, 0.34, 0.27, 0.98), "scale": (3.85, 2.32, 2.33, 3.06), "micro_frame_size": 17}
    config = pipeline.VideoAutoencoderPipelineConfig(**numbers)
    config.vae_2d, config.vae_temporal = Spatial(), temporal
    model = pipeline.VideoAutoencoderPipeline(config)
    buffers = {name: getattr(model, name).clone() for name in ("scale", "shift")}
    model, info["vae_shapes"] = fill(model)
    for name, value in buffers.items():
        getattr(model, name).copy_(value)
    record_clips("1.2", model, out)
    with torch.device("meta"):
        info["vae_manifest"] = {f"temporal_vae.{name}": list(value.shape) for name, value in VAE_Temporal_SD().state_dict().items()}


def record_causal(out, info):
    import open_sora_1_cases as cases
    import torch
    from opensora.models.vae_v1_3.decoder import VideoDecoder
    from opensora.models.vae_v1_3.encoder import VideoEncoder
    from opensora.models.vae_v1_3.vae import OpenSoraVAE_V1_3_Pipline, OpenSoraVAE_V1_3_PiplineConfig

    def build(sizes):
        common = {"in_channels": 3, "out_ch": 3, "micro_batch_size_2d": 4, **sizes}
        halves = {"encoder": {"type": "VideoEncoder", "double_z": True, **common}, "decoder": {"type": "VideoDecoder", **common}}
        numbers = {"micro_batch_size": 1, "micro_frame_size": 17, "temporal_overlap": True, "normalization": "video"}
        return OpenSoraVAE_V1_3_Pipline(OpenSoraVAE_V1_3_PiplineConfig(**halves), **numbers)

    assert VideoEncoder and VideoDecoder
    model, info["vae_shapes"] = fill(build(cases.CAUSAL_VAE))
    record_clips("1.3", model, out)
    with torch.device("meta"):
        full = build({"ch": 128, "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "z_channels": 16})
    info["vae_manifest"] = {name: list(value.shape) for name, value in full.state_dict().items()}


def record_clips(version, model, out):
    import open_sora_1_cases as cases
    import torch

    for name, (which, frames, height, width) in cases.CLIPS.items():
        if which == version:
            torch.manual_seed(0)
            latents = model.encode(cases.random((1, 3, frames, height, width), 4))
            out[f"vae.{name}.latents"] = latents
            given = cases.random(latents.shape, 5)
            out[f"vae.{name}.pixels"] = model.decode(given, num_frames=frames)[..., ::2, ::2]


# ------------------------------------------------------------------ schedules and runs


class TextEncoder:
    """Answers with seeded features: the prompt's, and the null caption of the network."""

    def __init__(self, model):
        self.model = model

    def tokenize_fn(self, prompts):
        return {}

    def encode(self, *_, **__):
        import open_sora_1_cases as cases
        import torch

        return {"y": cases.random(cases.TEXT, 2)[:, None], "mask": torch.tensor(cases.TEXT_MASK)}

    def null(self, n):
        return self.model.y_embedder.y_embedding[None].repeat(n, 1, 1)[:, None]


def run_inputs(version):
    import open_sora_1_cases as cases
    import torch

    extent, size, frames, steps, scale = cases.RUNS[version]
    model, _ = fill(network(version, cases.NETWORKS[version]))
    height, width = (torch.tensor([float(side)] * 2) for side in size)
    values = {"height": height, "width": width, "fps": torch.tensor([24.0] * 2), "num_frames": torch.tensor([float(frames)] * 2)}
    z = cases.random((2, cases.NETWORKS[version]["in_channels"], *extent), 7)
    return model, values | {"ar": height / width}, z, steps, scale


def record_flow_runs(version, out, info):
    import open_sora_1_cases as cases
    import torch
    from opensora.schedulers.rf import RFLOW

    if version == "1.2":
        from opensora.schedulers.rf.rectified_flow import timestep_transform
    else:
        from opensora.schedulers.rf.time_sampler import timestep_transform
    for place, (of, height, width, frames, steps, kind) in enumerate(cases.SCHEDULES):
        if of == version:
            dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[kind]
            sizes = {"height": height, "width": width, "num_frames": frames}
            sizes = {name: torch.tensor([value], dtype=dtype) for name, value in sizes.items()}
            times = [torch.tensor([(1.0 - step / steps) * 1000]) for step in range(steps)]
            out[f"schedule.{place}"] = torch.cat([timestep_transform(t, sizes, num_timesteps=1000) for t in times])
    model, values, z, steps, scale = run_inputs(version)
    common = {"prompts": ["a", "b"], "device": "cpu", "progress": False}

    def run(name, scheduler, **extra):
        torch.randn_like = cases.Draws()
        out[f"run.{name}"] = scheduler.sample(model, TextEncoder(model), z.clone(), additional_args=dict(values), **common, **extra)

    if version == "1.2":
        scheduler = RFLOW(num_sampling_steps=steps, cfg_scale=scale, use_timestep_transform=True)
        run("1.2", scheduler)
        run("1.2_masked", scheduler, mask=torch.tensor(cases.EDITS["1.2"]))
        return
    numbers = {"num_sampling_steps": steps, "cfg_scale": scale, "use_timestep_transform": True}
    run("1.3", RFLOW(**numbers, use_oscillation_guidance=True, use_flaw_fix=True))
    where = torch.zeros_like(z)
    where[:, :, [0, 4]] = 1
    given = {"z_cond": cases.random(z.shape, 8), "z_cond_mask": where, "mask_index": [0, 4], "use_sdedit": True, "image_cfg_scale": 5.0}
    swing = {"use_oscillation_guidance_for_text": True, "use_oscillation_guidance_for_image": True}
    repeat, TextEncoder.null = TextEncoder.null, lambda self, n: repeat(self, 1).expand(n, -1, -1, -1)

    class Once(torch.nn.Module):  # the script repeats the null caption once too often for a batch of two
        def forward(self, x, t, y_null, **more):
            return inner(x, t, y_null=y_null[: len(x)], **more)

    inner, model = model, Once()
    model.y_embedder = inner.y_embedder
    run("1.3_given", RFLOW(**numbers, scale_image_weight=True), **given, **swing)
    run("1.3_plain", RFLOW(**numbers, scale_image_weight=True), **{**given, "use_sdedit": False})


def record_ddpm(version, out):
    import open_sora_1_cases as cases
    import torch
    from opensora.schedulers.iddpm import IDDPM, gaussian_diffusion as diffusion

    if version == "1.1":
        diffusion.GaussianDiffusion.__init__.__kwdefaults__["device"] = "cpu"
    names = {"betas": "betas", "clean": "alphas_cumprod", "least_log_variance": "posterior_log_variance_clipped"}
    names |= {"mean_of_clean": "posterior_mean_coef1", "mean_of_noisy": "posterior_mean_coef2"}
    for steps in (7, 100):
        scheduler = IDDPM(num_sampling_steps=steps, cfg_scale=7.0)
        out[f"ddpm.{version}.{steps}.timesteps"] = torch.tensor(scheduler.timestep_map)
        for ours, theirs in names.items():
            out[f"ddpm.{version}.{steps}.{ours}"] = torch.as_tensor(getattr(scheduler, theirs))
    model, values, z, steps, scale = run_inputs(version)
    numbers = {"num_sampling_steps": steps, "cfg_scale": scale} | ({"cfg_channel": 3} if version == "1.1" else {})

    def run(name, **extra):
        torch.randn_like = cases.Draws()
        more = {"additional_args": dict(values)} if version == "1.1" else {"additional_args": None}
        scheduler = IDDPM(**numbers)
        if version == "1.0":
            found = sample_1_0(scheduler, model, z)
        else:
            found = scheduler.sample(model, TextEncoder(model), z.clone(), ["a", "b"], "cpu", **more, **extra)
        out[f"run.{name}"] = found

    run(version)
    if version == "1.1":
        run("1.1_masked", mask=torch.tensor(cases.EDITS["1.1"]))


def sample_1_0(scheduler, model, z):
    """IDDPM.sample of 1.0 draws its own noise on the device; here it is given."""
    import torch

    normal, torch.randn = torch.randn, lambda *shape, **_: z.clone()
    try:
        return scheduler.sample(model, TextEncoder(model), z.shape[1:], ["a", "b"], "cpu")
    finally:
        torch.randn = normal


# ------------------------------------------------------------------ masks, prompts, sizes


def record_words(version, info):
    import open_sora_1_cases as cases
    import torch

    if version == "1.1":
        spec = importlib.util.spec_from_file_location("long", Path(sys.path[0]) / "scripts" / "inference-long.py")
        script = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(script)
        strategies = cases.STRATEGIES_1_1
    else:
        from opensora.utils import inference_utils as script

        strategies = cases.STRATEGIES
    info["masks"] = []
    for text, lengths, loop in strategies:
        z = -torch.ones(1, 1, 15, 1, 1)
        extra = {"align": 5} if version == "1.2" else {}
        mask = script.apply_mask_strategy(z, [cases.reference_latents(lengths)], [text], loop, **extra)
        info["masks"].append([z.flatten().tolist(), mask.flatten().tolist()])
    if version == "1.1":
        return
    info["scores"] = [script.append_score_to_prompts(cases.PROMPTS, *said) for said in cases.SAID]
    merged = [script.merge_prompt(*script.split_prompt(prompt)) for prompt in cases.PARTS]
    info["loops"] = [[script.extract_prompts_loop([prompt], loop)[0] for loop in range(5)] for prompt in merged]
    if version == "1.3":
        _, strategy = script.append_generated(None, torch.zeros(1, 1), [["a"]], ["0"], 1, 5, 0.0, is_latent=True)
        info["appended"] = strategy[0]
        shape = (1, 1, 15, 1, 1)
        info["conds"] = []
        for name, lengths in cases.COND_TYPES:
            ref, index = script.prep_ref_and_mask(name, 5, [cases.reference_latents(lengths)], shape, 1, "cpu", torch.float32)
            info["conds"].append([ref.flatten().tolist(), sorted(index)])
        before = torch.arange(15.0).view(shape) - 20
        args = (5, before, [cases.reference_latents([1, 1])], shape, True, "cpu", torch.float32)
        info["cond_loops"] = {}
        for name in ("v2v_head", "i2v_head", "i2v_tail", "i2v_loop"):
            ref, index = script.prep_ref_and_update_mask_in_loop(name, *args)
            info["cond_loops"][name] = [ref.flatten().tolist(), sorted(index)]


def record_sizes(version, info):
    from opensora.datasets import aspect

    info["sizes"] = {
        name: {key: list(size) for key, size in table.items()} for name, (_, table) in aspect.ASPECT_RATIOS.items() if "_16d" not in name
    }
    if version != "1.1":
        names = [name for name in aspect.ASPECT_RATIOS if name[-1] in "pk" or name.endswith("_16d")]
        info["named_sizes"] = {}
        for name in names:
            table = aspect.ASPECT_RATIOS[name][1]
            info["named_sizes"][name] = {key: list(table[two]) for key, two in aspect.ASPECT_RATIO_MAP.items() if two in table}
        info["lengths"] = {name: aspect.get_num_frames(name) for name in aspect.NUM_FRAMES_MAP}


def record_captions(info):
    import open_sora_1_cases as cases
    from opensora.models.text_encoder.t5 import text_preprocessing

    info["captions"] = [text_preprocessing(text) for text in cases.captions()]


def one_version(version, root, target):
    import torch
    from safetensors.torch import save_file

    torch.set_grad_enabled(False)
    activate(Path(root))
    out, info = {}, {}
    record_networks(version, out, info)
    record_manifest(version, info)
    if version == "1.2":
        record_temporal(out, info)
        record_captions(info)
    if version == "1.3":
        record_tables(out)
        record_causal(out, info)
    if version != "1.0":
        record_words(version, info)
        record_sizes(version, info)
    if version in ("1.2", "1.3"):
        record_flow_runs(version, out, info)
    else:
        record_ddpm(version, out)
    save_file({name: value.detach().clone().contiguous() for name, value in out.items()}, target, {"info": json.dumps(info)})


def everything():
    from safetensors import safe_open
    from safetensors.torch import save_file

    repository, tensors, infos, commits = os.environ["OPENSORA_REF"], {}, {}, {}
    for version, tag in TAGS.items():
        with tempfile.TemporaryDirectory() as folder:
            archive = subprocess.run(
                ["git", "-C", repository, "archive", tag, "opensora", "scripts"], check=True, capture_output=True
            ).stdout
            subprocess.run(["tar", "x", "-C", folder], input=archive, check=True)
            target = os.path.join(folder, "golden.safetensors")
            subprocess.run([sys.executable, __file__, version, folder, target], check=True)
            with safe_open(target, "pt") as file:
                infos[version] = json.loads(file.metadata()["info"])
                tensors |= {key: file.get_tensor(key) for key in file.keys()}
        words = subprocess.run(["git", "-C", repository, "rev-list", "-n1", tag], check=True, capture_output=True, text=True)
        commits[version] = words.stdout.strip()
    path = HERE / "open_sora_1.safetensors"
    save_file(tensors, path, {"origin": "hpcaitech/Open-Sora", "commits": json.dumps(commits), "info": json.dumps(infos)})
    path.chmod(0o644)


if __name__ == "__main__":
    random.seed(0)
    one_version(*sys.argv[1:]) if len(sys.argv) > 1 else everything()
