"""Offload modes on the host's own loading: the same numbers, the bytes they promise, and sentences where they cannot."""

import re

import pytest
import torch

SHAPE = (1, 16, 2, 6, 8)
FILE = "Open_Sora_v2.safetensors"
GIB = 2**30


@pytest.fixture
def load(run_node):
    """A fresh MODEL through our loader: load(precision="auto", offload="auto", budget_gib=8.0)."""

    def make(precision="auto", **options):
        return run_node("OpenSoraModelLoader", model_name=FILE, precision=precision, **options)[0]

    return make


@pytest.fixture
def sample(run_node, conditioning):
    """Two steps of the one-node sampler: unscaled latents."""

    def run(model):
        given = {"positive": conditioning(1), "negative": conditioning(2), "latent": {"samples": torch.zeros(SHAPE)}, "seed": 3, "steps": 2}
        return run_node("OpenSoraRectifiedFlowSampler", model=model, **given, text_guidance=7.5, image_guidance=3.0)[0]["samples"]

    return run


@pytest.fixture
def offload(run_node):
    def node(model, mode, budget_gib=8.0):
        return run_node("OpenSoraOffload", model=model, mode=mode, budget_gib=budget_gib)[0]

    return node


@pytest.fixture(autouse=True)
def nothing_else_loaded():
    import comfy.model_management

    comfy.model_management.unload_all_models()
    yield
    comfy.model_management.unload_all_models()


def stays(model) -> list[str]:
    """Linear layers whose weights were put on the device for good."""
    modules = model.model.diffusion_model.named_modules()
    return [name for name, module in modules if getattr(module, "comfy_patched_weights", False) and hasattr(module, "weight")]


def half(model) -> float:
    return model.model_size() / 2 / GIB


@pytest.mark.parametrize("precision", ["auto", "bf16", "fp8_e4m3fn", "int8"])
def test_a_mode_never_changes_the_result(precision, load, sample, offload):
    expected = sample(load(precision))
    model = load(precision)
    for mode in ("minimal", "budget", "resident", "auto", "budget", "minimal"):
        assert torch.equal(sample(offload(model, mode, half(model))), expected), mode


def test_every_weight_of_ours_can_stay_behind(load):
    # The host leaves what has no cast of its own where it is, which a GPU could not compute with.
    for name, module in load().model.named_modules():
        if next(module.parameters(recurse=False), None) is not None:
            assert hasattr(module, "comfy_cast_weights"), name


def test_a_mode_bounds_what_is_loaded(load, sample, offload):
    model = load()
    size = model.model_size()
    sample(model)
    assert model.loaded_size() == size
    for mode, least, most in (
        ("budget", 0.3, 0.5),
        ("minimal", 0, 0.001),
        ("budget", 0.3, 0.5),
        ("resident", 1, 1),
        ("minimal", 0, 0.001),
        ("auto", 1, 1),
    ):
        copy = offload(model, mode, half(model))
        sample(copy)
        assert least * size <= copy.loaded_size() <= most * size, mode
        assert bool(stays(copy)) == (mode != "minimal")


def test_the_host_may_load_less_than_a_budget(load, offload):
    copy = offload(load(), "budget", 1.0)
    third = copy.model_size() / 3
    copy.partially_load(copy.load_device, third)
    assert 0 < copy.loaded_size() <= third
    copy.detach()
    assert copy.loaded_size() == 0


def test_the_loader_has_the_modes_too(load, sample):
    expected = sample(load())
    model = load(offload="minimal")
    assert torch.equal(sample(model), expected) and model.loaded_size() == 0
    model = load(offload="budget", budget_gib=load().model_size() / 2 / GIB)
    assert torch.equal(sample(model), expected) and 0 < model.loaded_size() <= model.model_size() / 2


def test_stock_models_and_copies_keep_their_mode(model, sample, offload, run_node, pack):
    bounded = offload(model, "minimal")
    (shifted,) = run_node("ModelSamplingSD3", model=bounded, shift=3.0)
    mode_of = pack("nodes.host.offload").offload_of
    assert (mode_of(model), mode_of(bounded), mode_of(shifted), mode_of(shifted.clone())) == ("auto", "minimal", "minimal", "minimal")
    sample(shifted)
    assert shifted.loaded_size() == 0
    assert mode_of(offload(shifted, "auto")) == "auto"
    assert mode_of(shifted.clone(force_deepcopy=True)) == "minimal"


@pytest.mark.parametrize("first", ["lora", "offload"])
def test_lora_in_every_mode(first, load, sample, offload, run_node, base, weights, relative_error):
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    layers = [key.removesuffix(".weight") for key in weights if "q_proj.weight" in key or "linear2.weight" in key]
    tensors = {}
    for layer in layers:
        rows, columns = weights[f"{layer}.weight"].shape
        tensors[f"base_model.model.{layer}.lora_A.weight"] = torch.randn(4, columns, generator=generator) * 0.1
        tensors[f"base_model.model.{layer}.lora_B.weight"] = torch.randn(rows, 4, generator=generator) * 0.1
    save_file(tensors, base / "models/loras/offload.safetensors")

    def with_lora(model):
        return run_node("OpenSoraLoraLoader", model=model, lora_name="offload.safetensors", strength=1.0)[0]

    plain = load()
    expected, without = sample(with_lora(plain)), sample(plain)
    assert relative_error(without, expected) > 1e-3
    for mode in ("budget", "minimal"):
        model = load()
        budget = half(model)
        model = offload(with_lora(model), mode, budget) if first == "lora" else with_lora(offload(model, mode, budget))
        assert relative_error(sample(model), expected) < 2e-5, mode
        assert model.loaded_size() < 0.6 * model.model_size()
    assert torch.equal(sample(plain), without)


def test_unloading_frees_a_bounded_model(load, sample, offload, caplog):
    import gc
    import weakref

    import comfy.model_management

    model = load()
    bounded = offload(model, "budget", half(model))
    sample(bounded)
    network = weakref.ref(model.model)
    comfy.model_management.unload_model_and_clones(bounded)
    assert bounded.loaded_size() == 0 and not stays(bounded)
    sample(bounded)
    del model, bounded
    gc.collect()
    assert network() is None
    comfy.model_management.cleanup_models_gc()
    assert not [record for record in caplog.records if "memory leak" in record.getMessage()]


@pytest.mark.parametrize("budget", [0, -1.0, float("nan"), float("inf")])
def test_a_budget_is_an_amount(budget, load, offload):
    with pytest.raises(ValueError, match="is not an amount of memory"):
        offload(load(), "budget", budget)


def test_a_budget_larger_than_the_device(load, offload, monkeypatch):
    import comfy.model_management

    monkeypatch.setattr(comfy.model_management, "get_total_memory", lambda device: 8 * GIB)
    offload(load(), "budget", 8.0)
    with pytest.raises(ValueError, match=r"a budget of 9 GiB is larger than the device, which has 8 GiB"):
        offload(load(), "budget", 9.0)


def test_an_unknown_mode_and_another_model(load, offload, pack):
    with pytest.raises(ValueError, match="Use one of auto, resident, budget, minimal"):
        offload(load(), "streamed")
    with pytest.raises(ValueError, match="not one of this pack's"):
        offload(object(), "auto")


def test_resident_is_refused_before_loading_where_it_can_never_fit(load, offload, monkeypatch):
    import comfy.model_management

    monkeypatch.setattr(comfy.model_management, "get_total_memory", lambda device: 2**16)
    with pytest.raises(ValueError, match=r"Offload resident needs 0\.\d+ GiB for the weights and the device has 0\.00006"):
        offload(load(), "resident")


def test_resident_is_refused_while_loading_and_leaves_nothing_behind(load, sample, offload, monkeypatch):
    import comfy.model_management

    model = load()
    expected = sample(offload(model, "budget", half(model)))
    resident = offload(model, "resident")
    with monkeypatch.context() as patch:
        patch.setattr(comfy.model_management, "is_device_cpu", lambda device: False)
        patch.setattr(comfy.model_management, "get_free_memory", lambda device: 1000.0)
        with pytest.raises(ValueError, match="the device has free"):
            resident.partially_load(resident.load_device, 0)
    assert model.loaded_size() == 0
    assert torch.equal(sample(model), expected)


class Watermark:
    """Stands in for dynamic VRAM's allocator, which needs a GPU."""

    def __init__(self):
        self.calls = []

    def set_watermark(self, size):
        self.calls.append(("at most", size))

    def set_watermark_limit(self, size):
        self.calls.append(("at least", size))


def test_dynamic_memory_is_given_a_watermark(load, offload, monkeypatch):
    import comfy.model_patcher

    model = load()
    model.model.dynamic_vbars = {model.load_device: Watermark()}
    monkeypatch.setattr(comfy.model_patcher.ModelPatcher, "is_dynamic", lambda self: True)
    for mode in ("budget", "minimal", "resident", "auto"):
        offload(model, mode, 2.0).partially_load(model.load_device, 1e32)
    assert model.model.dynamic_vbars[model.load_device].calls == [("at most", 2 * GIB), ("at most", 0), ("at least", model.model_size())]


def test_dynamic_memorys_allocator_still_has_these_calls():
    from comfy_aimdo.model_vbar import ModelVBAR

    assert callable(ModelVBAR.set_watermark) and callable(ModelVBAR.set_watermark_limit)


@pytest.fixture
def quantize(run_node, base):
    """Run the node; whatever it wrote is gone after the test."""
    folder = base / "models/diffusion_models"
    before = set(folder.iterdir())
    yield lambda name, form="fp8_e4m3fn", source=FILE: run_node("OpenSoraQuantize", model_name=source, format=form, file_name=name)[0]
    for path in set(folder.iterdir()) - before:
        path.unlink()


@pytest.mark.parametrize("form", ["fp8_e4m3fn", "int8"])
def test_a_quantised_file_is_what_the_precision_is(form, quantize, base, load, sample, run_node, relative_error):
    import folder_paths

    assert f"{form}, " in quantize(f"small_{form}", form)  # the ending is added
    name = f"small_{form}.safetensors"
    assert (base / "models/diffusion_models" / name).is_file()
    assert name in folder_paths.get_filename_list("diffusion_models")
    (ours,) = run_node("OpenSoraModelLoader", model_name=name, precision="auto")
    (stock,) = run_node("UNETLoader", unet_name=name, weight_dtype="default")
    found = sample(ours)
    assert torch.equal(found, sample(stock))
    assert relative_error(found, sample(load(form))) < 1e-2
    assert 1e-4 < relative_error(found, sample(load())) < 0.3


@pytest.mark.parametrize(
    "name",
    ["../outside.safetensors", "/tmp/outside.safetensors", "sub/new.safetensors", "..\\new.safetensors", "C:\\new.safetensors", "C:new.safetensors",
     "", " ", ".", "..", ".hidden.safetensors", "a\nb.safetensors", "a/../b.safetensors", "./new.safetensors", "new.safetensors/"],
)  # fmt: skip
def test_quantised_files_go_into_their_folder_only(name, quantize, base):
    before = sorted(base.rglob("*"))
    with pytest.raises(ValueError, match="is not a file name"):
        quantize(name)
    assert sorted(base.rglob("*")) == before


def test_a_file_is_never_overwritten(quantize, base):
    content = (base / "models/diffusion_models" / FILE).read_bytes()
    for name in (FILE, FILE.removesuffix(".safetensors")):
        with pytest.raises(ValueError, match="already, which is not overwritten"):
            quantize(name)
    assert (base / "models/diffusion_models" / FILE).read_bytes() == content


def test_another_ending_or_source_is_refused(quantize, base):
    with pytest.raises(ValueError, match="should end in .safetensors"):
        quantize("new.gguf")
    with pytest.raises(ValueError, match="is not inside models/diffusion_models"):
        quantize("new", source="../vae/hunyuan_vae.safetensors")
    quantize("once")
    with pytest.raises(ValueError, match="already quantised"):
        quantize("twice", source="once.safetensors")


def test_an_interrupt_leaves_no_file(quantize, base, monkeypatch):
    import comfy.model_management

    calls = []

    def interrupt():
        calls.append(1)
        if len(calls) == 20:
            raise comfy.model_management.InterruptProcessingException

    monkeypatch.setattr(comfy.model_management, "throw_exception_if_processing_interrupted", interrupt)
    before = sorted((base / "models/diffusion_models").iterdir())
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        quantize("half")
    assert sorted((base / "models/diffusion_models").iterdir()) == before


def test_loaders_of_one_file_share_its_weights(load, run_node, sample):
    first, second = load(), load(offload="minimal")
    assert first.model is second.model and first is not second
    assert load("bf16").model is not first.model
    expected = sample(first)
    assert torch.equal(sample(second), expected) and torch.equal(sample(first), expected)
    names = {"t5_name": "t5xxl.safetensors", "clip_l_name": "clip_l.safetensors", "precision": "auto", "device": "auto"}
    clips = [run_node("OpenSoraTextEncoderLoader", **names)[0] for _ in range(2)]
    assert clips[0].cond_stage_model is clips[1].cond_stage_model
    other = run_node("OpenSoraTextEncoderLoader", **{**names, "precision": "bf16"})[0]
    assert other.cond_stage_model is not clips[0].cond_stage_model
    vaes = [run_node("OpenSoraVAELoader", vae_name="hunyuan_vae.safetensors")[0] for _ in range(2)]
    assert vaes[0].first_stage_model is vaes[1].first_stage_model


def test_a_shared_model_lives_as_long_as_it_is_used(load):
    import gc
    import weakref

    model = load("bf16")
    network, copy = weakref.ref(model.model), model.clone()
    del model
    gc.collect()
    assert load("bf16").model is network() is copy.model
    del copy
    gc.collect()
    assert network() is None


@pytest.mark.parametrize(
    ("cut", "says"),
    [
        (lambda size: size // 2, "is truncated: .* bytes are missing"),
        (lambda size: 100, "is truncated inside its header"),
        (lambda size: 0, "is empty"),
    ],
    ids=["half", "in its header", "empty"],
)
def test_a_half_written_quantised_file_is_one_sentence_in_every_node(quantize, base, run_node, pack, cut, says):
    folder = base / "models/diffusion_models"
    quantize("whole.safetensors", "int8")
    whole, half = (folder / f"{name}.safetensors" for name in ("whole", "half"))
    half.write_bytes(whole.read_bytes()[: cut(whole.stat().st_size)])
    whole.unlink()
    plan = {"width": 64, "height": 48, "num_frames": 5, "precision": "auto", "offload": "auto"}
    before = run_node("OpenSoraLoadedModels", unload="none")[0]
    try:
        for node, inputs in (
            ("OpenSoraModelLoader", {"precision": "auto"}),
            ("OpenSoraPreflight", plan),
            ("OpenSoraQuantize", {"format": "int8", "file_name": "anew.safetensors"}),
        ):
            with pytest.raises(
                pack("opensora_core.errors").CheckpointError, match=f"^Download the file again[.:] half.safetensors {says}"
            ) as error:
                run_node(node, model_name=half.name, **inputs)
            assert "\n" not in str(error.value)
        assert not (folder / "anew.safetensors").exists()
        assert run_node("OpenSoraLoadedModels", unload="none")[0] == before
    finally:
        half.unlink()


def test_an_unknown_format_or_precision_is_one_sentence(quantize, load, pack):
    """The host refuses what its lists do not have; a node of another pack may call all the same."""
    error = pack("opensora_core.errors").OpenSoraError
    with pytest.raises(error, match="Use one of fp8_e4m3fn, int8"):
        quantize("x.safetensors", "q4_k")
    with pytest.raises(error, match="Use one of auto, fp32, bf16, fp8_e4m3fn, int8, nf4"):
        load("q4_k")


def test_a_replaced_file_is_another_model(base, weights, run_node):
    from safetensors.torch import save_file

    path = base / "models/diffusion_models/shared.safetensors"
    save_file(weights, path)
    before = run_node("OpenSoraModelLoader", model_name=path.name, precision="auto")[0]
    assert run_node("OpenSoraModelLoader", model_name=path.name, precision="auto")[0].model is before.model
    save_file({key: tensor.float() for key, tensor in weights.items()}, path)
    after = run_node("OpenSoraModelLoader", model_name=path.name, precision="auto")[0]
    assert after.model is not before.model
    path.unlink()


def test_what_is_loaded_is_shown_and_unloaded(load, sample, offload, run_node):
    model = load()
    bounded = offload(model, "budget", half(model))
    (idle,) = run_node("OpenSoraLoadedModels", unload="none")
    assert re.search(rf"^model: {FILE} \(OpenSora2Model\), float32, 0\.0044\d? GiB, all in RAM$", idle, re.M)
    sample(bounded)
    (vae,) = run_node("OpenSoraVAELoader", vae_name="hunyuan_vae.safetensors")
    (report,) = run_node("OpenSoraLoadedModels", unload="VAE", any=model)
    assert "\nThere was no VAE to unload.\n" in report and "\nVAE: hunyuan_vae.safetensors (VAENetwork)" in report
    assert bounded.loaded_size() > 0
    (report,) = run_node("OpenSoraLoadedModels", unload="model")
    assert "\nUnloaded: OpenSora2Model." in report and bounded.loaded_size() == 0
    sample(model)
    assert "\nUnloaded: " in run_node("OpenSoraLoadedModels", unload="everything")[0]
    assert model.loaded_size() == 0
    del vae


def test_a_model_at_work_is_not_unloaded(load, sample, run_node):
    model = load()
    sample(model)
    model.pre_run()
    with pytest.raises(ValueError, match="is sampling at this moment"):
        run_node("OpenSoraLoadedModels", unload="everything")
    assert model.loaded_size() > 0
    model.cleanup()
    assert "Unloaded" in run_node("OpenSoraLoadedModels", unload="everything")[0]


def test_lines_say_where_weights_are(pack):
    entry = pack("nodes.host.shared").Entry("model", "OpenSora2Model", ("a.safetensors",), "cuda:0", 8 * GIB, 3 * GIB, "bfloat16")
    assert entry.line() == "model: a.safetensors (OpenSora2Model), bfloat16, 8 GiB, 3 GiB on cuda:0, 5 GiB in RAM"


@pytest.fixture
def machine(pack, monkeypatch):
    """A card of so many GiB in a machine of so many: machine(gpu, ram)."""
    estimate = pack("opensora_core.memory.estimate")

    def make(gpu, ram=64):
        memory = estimate.Memory("cuda", "a card", gpu * GIB, gpu * GIB, ram * GIB, ram * GIB)
        monkeypatch.setattr(pack("nodes.host.planning"), "host_memory", lambda: memory)

    return make


@pytest.fixture
def preflight(run_node, pack, monkeypatch):
    """The node, on the released sizes: preflight(width, height, frames, precision, offload) -> report, precision, offload, policy."""
    sizes = pack("opensora_core.memory.footprint").ModelSizes()
    monkeypatch.setattr(pack("nodes.host.planning"), "sizes_of_files", lambda path: sizes)

    def run(width=336, height=192, frames=129, precision="auto", offload="auto", name=FILE):
        return run_node(
            "OpenSoraPreflight", width=width, height=height, num_frames=frames, model_name=name, precision=precision, offload=offload
        )

    return run


def test_preflight_on_a_large_card_changes_nothing(machine, preflight):
    machine(80, 128)
    report, *settings = preflight()
    assert settings == ["auto", "auto", "auto"]
    assert "This fits" in report and "not measured here" in report
    for stage in ("text", "sampling", "decode", "RAM"):
        assert re.search(rf"^  {stage} +\d", report, re.M)


@pytest.mark.parametrize("is_dynamic", [False, True])
def test_preflight_says_what_a_host_without_dynamic_memory_reads_into_ram(machine, preflight, monkeypatch, is_dynamic):
    import comfy.memory_management

    machine(24, 64)
    monkeypatch.setattr(comfy.memory_management, "aimdo_enabled", is_dynamic)
    assert ("of the transformer into RAM" in preflight()[0]) == (not is_dynamic)


def test_preflight_recommends_what_fits_and_the_loader_takes_it(machine, preflight, load, run_node):
    machine(24, 64)
    report, *settings = preflight(width=1024, height=576, offload="resident")
    assert "This does not fit" in report
    precision, mode, policy = settings
    assert (precision, mode) != ("auto", "resident")
    load(precision, offload=mode)
    assert policy in ("auto", "exact", "low_memory")
    machine(8, 16)
    assert preflight()[1] in ("fp8_e4m3fn", "int8", "auto")


def test_preflight_stops_what_cannot_fit_with_the_nearest_that_can(machine, preflight):
    machine(1, 16)
    with pytest.raises(ValueError, match=r"64x64 .*33 frames.*does not fit on a card \(GiB needed: text .*, sampling .*\): .*GiB free"):
        preflight(width=64, height=64, frames=33)


def test_a_quantised_file_is_recommended_as_it_is(machine, preflight, pack, monkeypatch, load):
    sizes = pack("opensora_core.memory.footprint").ModelSizes(stored="int8")
    monkeypatch.setattr(pack("nodes.host.planning"), "sizes_of_files", lambda path: sizes)
    machine(8, 16)
    assert preflight()[1] == "auto"


def test_preflight_reads_the_file_and_this_machine(run_node):
    report, *settings = run_node("OpenSoraPreflight", width=64, height=48, num_frames=5, model_name=FILE, precision="auto", offload="auto")
    assert report.splitlines()[1].startswith(f"{FILE}: 64x48 (width x height), 5 frames") and "On the CPU" in report
    assert settings == ["auto", "auto", "auto"]
    with pytest.raises(ValueError, match="Use 5 or 9"):
        run_node("OpenSoraPreflight", width=64, height=48, num_frames=6, model_name=FILE, precision="auto", offload="auto")


def test_what_the_host_has_loaded_counts_as_free(pack, load, sample, monkeypatch):
    import comfy.model_management

    planning, estimate = pack("nodes.host.planning"), pack("opensora_core.memory.estimate")
    model = load()
    sample(model)
    free = 10 * GIB
    monkeypatch.setattr(planning, "memory_of", lambda device: estimate.Memory("cuda", "a card", free, 12 * GIB, GIB, GIB))
    reserved = comfy.model_management.extra_reserved_memory()
    assert planning.host_memory().free == free + model.model_size() - reserved
    comfy.model_management.unload_all_models()
    assert planning.host_memory().free == free - reserved


def test_the_hosts_dynamic_patcher_can_be_bounded(load, offload, monkeypatch, pack):
    """Its class as it is, without its allocator: that needs a GPU."""
    import comfy.model_patcher
    import comfy_aimdo.host_buffer

    class Buffer:
        size = 0

        def __init__(self, *sizes):
            pass

    monkeypatch.setattr(comfy_aimdo.host_buffer, "HostBuffer", Buffer)
    loaded = load()
    device = torch.device("meta")  # any that is not the CPU, for which the class gives another
    dynamic = comfy.model_patcher.ModelPatcherDynamic(loaded.model, device, torch.device("cpu"))
    dynamic.cached_patcher_init = loaded.cached_patcher_init
    monkeypatch.setattr("comfy.model_management.get_total_memory", lambda device: 24 * GIB)
    bounded = offload(dynamic, "budget", 2.0)
    for copy in (bounded, bounded.clone()):
        assert copy.is_dynamic() and isinstance(copy, comfy.model_patcher.ModelPatcherDynamic)
        assert pack("nodes.host.offload").offload_of(copy) == "budget"
    asked = []
    monkeypatch.setattr(comfy.model_patcher.ModelPatcherDynamic, "load", lambda self, *given, **options: asked.append(given))
    loaded.model.dynamic_vbars = {device: Watermark()}
    loaded.model.dynamic_vbars[device].loaded_size = lambda: 0
    bounded.partially_load(device, 1e32)
    assert asked and loaded.model.dynamic_vbars[device].calls == [("at most", 2 * GIB)]
    loaded.model.dynamic_vbars = {}
    plain = bounded.clone(disable_dynamic=True)  # for compilation and hooks
    assert not plain.is_dynamic() and pack("nodes.host.offload").offload_of(plain) == "budget"
    assert isinstance(plain, pack("nodes.host.offload").Bounded)
    monkeypatch.setattr(comfy.model_patcher.ModelPatcherDynamic, "__del__", lambda self: None)
