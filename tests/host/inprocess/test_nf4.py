"""nf4 in the host: the library's numbers, the host's own moving and freeing, and sentences for what cannot be done. Without bitsandbytes
only the sentence that names it is tested."""

import gc
import sys
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file

FILE = "Open_Sora_v2.safetensors"
SHAPE = (1, 16, 2, 6, 8)


@pytest.fixture(autouse=True)
def nothing_else_loaded():
    import comfy.model_management

    comfy.model_management.unload_all_models()
    yield
    comfy.model_management.unload_all_models()


@pytest.fixture
def bitsandbytes():
    pytest.importorskip("bitsandbytes")


@pytest.fixture
def load(run_node, bitsandbytes):
    return lambda **options: run_node("OpenSoraModelLoader", model_name=FILE, precision="nf4", **options)[0]


@pytest.fixture
def load_clip(run_node, bitsandbytes):
    names = {"t5_name": "t5xxl.safetensors", "clip_l_name": "clip_l.safetensors"}
    return lambda: run_node("OpenSoraTextEncoderLoader", **names, precision="nf4", device="auto")[0]


@pytest.fixture
def sample(run_node, conditioning):
    def run(model):
        given = {"positive": conditioning(1), "negative": conditioning(2), "latent": {"samples": torch.zeros(SHAPE)}, "seed": 3, "steps": 2}
        return run_node("OpenSoraRectifiedFlowSampler", model=model, **given, text_guidance=7.5, image_guidance=3.0)[0]["samples"]

    return run


@torch.inference_mode()
def forward(network, dtype=torch.float32, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    x, cond = (torch.randn(1, channels, *SHAPE[2:], generator=generator).to(dtype) for channels in (16, 17))
    context, pooled = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((1, 12, 64), (1, 64)))
    if scale == 1.0:
        return network(x, torch.tensor([0.7]), context, pooled, cond, None)
    return network(torch.cat((x, cond), 1), torch.tensor([0.7 * scale]), context, pooled)


def test_the_librarys_forward(load, pack, base, relative_error):
    path = base / "models/diffusion_models" / FILE
    library = pack("opensora_core.checkpoint.load").load_transformer(path, torch.float32, precision="nf4")
    model = load()
    held = {name: module for name, module in model.model.diffusion_model.named_modules() if getattr(module, "form", None) is not None}
    assert sorted(held) == sorted(name for name, module in library.named_modules() if getattr(module, "form", None) is not None) != []
    for name, module in held.items():
        ours = library.get_submodule(name)
        assert torch.equal(module.weight, ours.weight) and torch.equal(module.weight_scale, ours.weight_scale), name
    assert relative_error(forward(model.model.diffusion_model, scale=1000.0), forward(library)) < 1e-6
    plain = pack("opensora_core.checkpoint.load").load_transformer(path, torch.float32)
    assert relative_error(forward(library), forward(plain)) > 1e-3


def test_t5_is_the_librarys(load_clip, pack, base, relative_error):
    text = pack("nodes.host.text")
    clip = load_clip()
    held = [module for module in clip.cond_stage_model.t5xxl.modules() if getattr(module, "form", None) is not None]
    assert len(held) == 2 * 7  # blocks, linear layers of each
    assert not [module for module in clip.cond_stage_model.clip_l.modules() if getattr(module, "form", None) is not None]
    state, (ids,) = load_file(base / "models/text_encoders/t5xxl.safetensors"), text.exact_tokens(clip.tokenizer, "a red cat")[0]["t5xxl"]
    library = _library_t5(pack, state)
    with torch.inference_mode():
        expected = library(input_ids=torch.tensor([[token for token, _ in ids]])).last_hidden_state
        found = text.encode(clip, "a red cat")[0][0][0]
    assert relative_error(found.float(), expected.float()) < 1e-5


def _library_t5(pack, state):
    """The transformers library's T5 with the same weights brought to nf4 and back by the core's format."""
    import transformers

    form = pack("opensora_core.checkpoint.quantised").NF4()
    sizes = {"d_model": 64, "d_kv": 64, "num_heads": 2, "d_ff": 128, "num_layers": 2, "feed_forward_proj": "gated-gelu"}
    model = transformers.T5EncoderModel(transformers.T5Config(vocab_size=32128, **sizes)).train(False)
    linear = (".q.weight", ".k.weight", ".v.weight", ".o.weight", ".wi_0.weight", ".wi_1.weight", ".wo.weight")
    for key, tensor in state.items():
        if key.endswith(linear):
            state[key] = form.dequantise(*form.quantise(tensor), tuple(tensor.shape), torch.float32)
    model.load_state_dict({key: tensor.float() for key, tensor in state.items()}, strict=False)
    return model


def test_an_offload_mode_never_changes_the_result(load, sample, run_node):
    model = load()
    expected = sample(model)
    size = model.model_size()
    for mode, most in (("minimal", 0.003), ("budget", 0.5), ("resident", 1), ("auto", 1)):
        copy = run_node("OpenSoraOffload", model=model, mode=mode, budget_gib=size / 2 / 2**30)[0]
        assert torch.equal(sample(copy), expected), mode
        assert copy.loaded_size() <= most * size
    assert not model.is_dynamic() and not model.clone().is_dynamic()


def test_weights_follow_the_input(load, conditioning):
    """A layer that stayed behind brings its weight to where its input is."""
    model = load().model.diffusion_model
    layer = next(module for module in model.modules() if getattr(module, "form", None) is not None)

    class Elsewhere(torch.Tensor):
        moves = []

        def to(self, *args, **options):
            self.moves.append(args[0])
            return self.as_subclass(torch.Tensor)

    layer.weight = torch.nn.Parameter(layer.weight.detach().as_subclass(Elsewhere), requires_grad=False)
    with torch.inference_mode():
        layer(torch.zeros(1, layer.in_features))
    assert Elsewhere.moves == [torch.device("cpu")]


def test_it_dies_with_its_last_user(load, load_clip, sample, caplog):
    import comfy.model_management

    model, clip = load(), load_clip()
    sample(model)
    clip.encode_from_tokens(clip.tokenize("a cat"))
    gone = [weakref.ref(model.model), weakref.ref(clip.cond_stage_model)]
    comfy.model_management.unload_all_models()
    assert model.loaded_size() == 0
    del model, clip
    gc.collect()
    assert [ref() for ref in gone] == [None, None]
    comfy.model_management.cleanup_models_gc()
    assert not [record for record in caplog.records if "memory leak" in record.getMessage()]


def test_what_would_take_bytes_for_numbers_is_refused(load, load_clip, run_node, base, weights):
    import comfy.hooks
    import comfy.sd
    import comfy_extras.nodes_model_merging as merging

    layer = next(key.removesuffix(".weight") for key in weights if "q_proj.weight" in key)
    rows, columns = weights[f"{layer}.weight"].shape
    lora = {f"diffusion_model.{layer}.lora_A.weight": torch.ones(1, columns), f"diffusion_model.{layer}.lora_B.weight": torch.ones(rows, 1)}
    save_file(lora, base / "models/loras/nf4.safetensors")
    model = load()
    offloaded = run_node("OpenSoraOffload", model=model, mode="minimal", budget_gib=1.0)[0]
    for one in (model, model.clone(), offloaded):
        for node in ("OpenSoraLoraLoader", "LoraLoaderModelOnly"):
            name = {"strength": 1.0} if node == "OpenSoraLoraLoader" else {"strength_model": 1.0}
            with pytest.raises(ValueError, match="precision auto.*nf4 take no LoRA"):
                run_node(node, model=one, lora_name="nf4.safetensors", **name)
    with pytest.raises(ValueError, match="nf4 take no LoRA"):
        model.add_hook_patches(comfy.hooks.WeightHook(), lora)
    with pytest.raises(ValueError, match="not saved"):
        comfy.sd.save_checkpoint(str(base / "output/nf4.safetensors"), model)
    assert not (base / "output/nf4.safetensors").exists()
    with pytest.raises(ValueError, match="not merged"):
        merging.ModelMergeSimple().merge(load(), model, 0.5)
    with pytest.raises(ValueError, match="take no LoRA"):
        load_clip().add_patches({"t5xxl.transformer.shared.weight": ("diff", (torch.zeros(1),))})


def test_a_copy_of_its_own(load, sample):
    """What the host makes for several devices, and for hooks."""
    model = load()
    expected, copy = sample(model), model.clone(force_deepcopy=True)
    assert copy.model is not model.model
    assert torch.equal(sample(copy), expected)
    with pytest.raises(ValueError, match="take no LoRA"):
        copy.add_patches({})


def test_the_listing_says_nf4(load, load_clip, run_node, pack):
    model, clip = load(), load_clip()
    report = run_node("OpenSoraLoadedModels", unload="none")[0]
    assert report.count("nf4") == 2, report
    small = model.model_size()
    assert small < 0.9 * run_node("OpenSoraModelLoader", model_name=FILE, precision="auto")[0].model_size()
    assert clip.patcher.model_size()


def test_files_that_are_quantised_already(load, run_node, base, weights):
    folder = base / "models/diffusion_models"
    save_file({key: value.to(torch.float8_e4m3fn) for key, value in weights.items()}, folder / "nf4_plain8.safetensors")
    with pytest.raises(ValueError, match="bf16 file for nf4: .* stored in float8 already"):
        run_node("OpenSoraModelLoader", model_name="nf4_plain8.safetensors", precision="nf4")


@pytest.mark.parametrize("kind", ["model", "clip"])
def test_without_bitsandbytes(kind, run_node, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "bitsandbytes"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    with pytest.raises(ValueError, match=r"pip install bitsandbytes.*precision 'nf4' computes with the bitsandbytes library"):
        if kind == "model":
            run_node("OpenSoraModelLoader", model_name=FILE, precision="nf4")
        else:
            run_node(
                "OpenSoraTextEncoderLoader", t5_name="t5xxl.safetensors", clip_l_name="clip_l.safetensors", precision="nf4", device="cpu"
            )
