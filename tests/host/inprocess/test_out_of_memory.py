"""Memory that runs out while sampling: the run goes on with less and says so, or ends in one sentence and leaves nothing behind."""

import types
import weakref

import pytest
import torch

SHAPE = (1, 16, 3, 6, 8)  # 9 frames of 48x64
STEPS = 5
ALWAYS = range(10**6)


@pytest.fixture
def lines(pack, monkeypatch):
    """What people were shown above the level of progress: [(line, node id)]."""
    notice, shown = pack("nodes.host.notice"), []
    monkeypatch.setattr(notice, "show", lambda text, node_id, level=30: shown.append((text, node_id)) if level >= 30 else None)
    return shown


@pytest.fixture
def one_by_one(monkeypatch):
    """Makes the host run every pass on its own, as with no memory to spare."""
    import comfy.model_patcher

    return lambda: monkeypatch.setattr(comfy.model_patcher.ModelPatcher, "get_free_memory", lambda self, device: 0)


def failing(model, at, error=torch.OutOfMemoryError, before=lambda x: None):
    """A copy of a MODEL whose forwards numbered in `at` (from 0) raise, after half their work: (model, rows of every forward)."""
    import comfy.patcher_extension

    rows = []

    def wrapper(executor, x, *args, **kwargs):
        rows.append(x.shape[0])
        before(x)
        result = executor(x, *args, **kwargs)
        if len(rows) - 1 in at:
            raise error("Tried to allocate 2.00 GiB")
        return result

    model = model.clone()
    model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "failing", wrapper)
    return model, rows


def with_picture(conditioning):
    latents, mask = torch.zeros(SHAPE), torch.ones(SHAPE[0], 1, *SHAPE[2:])
    latents[:, :, 0], mask[:, :, 0] = torch.randn(SHAPE[:2] + SHAPE[3:], generator=torch.Generator().manual_seed(5)), 0
    return [[context, {**values, "concat_latent_image": latents, "concat_mask": mask}] for context, values in conditioning]


def make_guider(run_node, model, positive, negative, **changes):
    model, sigmas = run_node("OpenSoraScheduler", model=model, latent={"samples": torch.zeros(SHAPE)}, steps=STEPS, shift=0.0)
    settings = {"text_guidance": 7.5, "image_guidance": 3.0, **changes}
    return run_node("OpenSoraGuider", model=model, positive=positive, negative=negative, **settings)[0], sigmas


def run_guider(run_node, guider, sigmas, sampler="euler"):
    noise, sampler = run_node("RandomNoise", noise_seed=3)[0], run_node("KSamplerSelect", sampler_name=sampler)[0]
    latent = {"samples": torch.zeros(SHAPE)}
    return run_node("SamplerCustomAdvanced", noise=noise, guider=guider, sampler=sampler, sigmas=sigmas, latent_image=latent)[0]["samples"]


def in_parts(run_node, model, positive, negative, **changes):
    return run_guider(run_node, *make_guider(run_node, model, positive, negative, **changes))


def in_one(run_node, model, positive, negative, **changes):
    settings = {"seed": 3, "steps": STEPS, "text_guidance": 7.5, "image_guidance": 3.0, **changes}
    latent = {"samples": torch.zeros(SHAPE)}
    return run_node("OpenSoraRectifiedFlowSampler", model=model, positive=positive, negative=negative, latent=latent, **settings)[0][
        "samples"
    ]


both_nodes = pytest.mark.parametrize("sample", [in_one, in_parts], ids=["sampler", "guider"])


@both_nodes
def test_the_passes_then_run_one_after_another(sample, run_node, model, conditioning, lines, relative_error):
    texts = with_picture(conditioning(1)), with_picture(conditioning(2))
    expected = sample(run_node, model, *texts)
    broken, rows = failing(model, at=[2])
    found = sample(run_node, broken, *texts)
    assert rows == [3, 3, 3, *[1] * 9], "the third step begins again, and only that"
    assert relative_error(found, expected) < 5e-6
    assert len(lines) == 1 and "one after another" in lines[0][0]


@both_nodes
def test_then_the_weights_wait_in_ram(sample, run_node, model, conditioning, lines, one_by_one, monkeypatch):
    import comfy.model_patcher

    one_by_one()
    texts = with_picture(conditioning(1)), with_picture(conditioning(2))
    expected = sample(run_node, model, *texts)
    unload, unloads = comfy.model_patcher.ModelPatcher.partially_unload, []

    def counted(self, device_to, memory_to_free=0, force_patch_weights=False):
        before = self.loaded_size()
        unload(self, device_to, memory_to_free, force_patch_weights)
        unloads.append((before, self.loaded_size()))

    monkeypatch.setattr(comfy.model_patcher.ModelPatcher, "partially_unload", counted)
    broken, _ = failing(model, at=[4, 7])
    found = sample(run_node, broken, *texts)
    assert torch.equal(found, expected), "at the same batching a run that went on with less is the same bit for bit"
    assert [("one after another" in line, "wait in RAM" in line) for line, _ in lines] == [(True, False), (False, True)]
    assert len(unloads) == 1 and unloads[0][1] < unloads[0][0] / 100, "all but what the host never unloads"


def test_from_the_first_forward_it_is_the_run_without_batches(run_node, model, conditioning, lines, one_by_one):
    texts = conditioning(1), conditioning(2)
    broken, rows = failing(model, at=[0])
    found = in_parts(run_node, broken, *texts)
    assert rows == [2, *[1] * 2 * STEPS]
    one_by_one()
    assert torch.equal(found, in_parts(run_node, model, *texts))


def test_every_run_has_its_own_fallback(run_node, model, conditioning, lines):
    broken, rows = failing(model, at=[1])
    guider, sigmas = make_guider(run_node, broken, conditioning(1), conditioning(2))
    run_guider(run_node, guider, sigmas)
    del rows[:]
    run_guider(run_node, guider, sigmas)
    assert rows == [2, 2, *[1] * 2 * (STEPS - 1)], "the second run of a cached GUIDER begins in batches again"
    assert len(lines) == 2


def test_solvers_that_copy_the_options_keep_the_fallback(run_node, model, conditioning, lines):
    # euler_cfg_pp gives every evaluation options of its own making.
    broken, rows = failing(model, at=[1])
    run_guider(run_node, *make_guider(run_node, broken, conditioning(1), conditioning(2)), sampler="euler_cfg_pp")
    assert len(lines) == 1 and set(rows[2:]) == {1}


def test_a_step_of_one_pass_has_none_to_split(run_node, model, conditioning, lines):
    texts = conditioning(1), conditioning(2)
    expected = in_one(run_node, model, *texts, text_guidance=1.0)
    broken, rows = failing(model, at=[1])
    assert torch.equal(in_one(run_node, broken, *texts, text_guidance=1.0), expected)
    assert len(rows) == STEPS + 1
    assert len(lines) == 1 and "wait in RAM" in lines[0][0]


PATCHES = {
    "EasyCache": {"reuse_threshold": 0.5, "start_percent": 0.05, "end_percent": 0.95, "verbose": False},
    "ContextWindowsManual": {
        "context_length": 2, "context_overlap": 1, "context_schedule": "standard_static", "context_stride": 1, "closed_loop": False,
        "fuse_method": "pyramid", "dim": 2, "freenoise": False,
    },
    "SkipLayerGuidanceDiT": {
        "double_layers": "0", "single_layers": "0", "scale": 3.0, "start_percent": 0.0, "end_percent": 1.0, "rescaling_scale": 0.0,
    },
}  # fmt: skip


@pytest.mark.parametrize("patch", PATCHES)
def test_stock_patches_do_not_see_what_failed(patch, run_node, model, conditioning, lines, one_by_one):
    one_by_one()
    texts = with_picture(conditioning(1)), with_picture(conditioning(2))
    patched = run_node(patch, model=model, **PATCHES[patch])[0]
    expected = in_parts(run_node, patched, *texts)
    assert not torch.equal(expected, in_parts(run_node, model, *texts)), "the patch does something"
    broken, _ = failing(patched, at=[1, 4])
    assert torch.equal(in_parts(run_node, broken, *texts), expected)
    assert len(lines) == 2


def test_other_models_leave_the_device_and_ours_stays(run_node, model, conditioning, lines):
    import comfy.model_management

    (vae,) = run_node("OpenSoraVAELoader", vae_name="hunyuan_vae.safetensors")
    seen = []

    def before(x):
        loaded = comfy.model_management.loaded_models()
        seen.append((any(vae.patcher.is_clone(one) for one in loaded), any(model.is_clone(one) for one in loaded)))
        if len(seen) == 1:
            comfy.model_management.load_models_gpu([vae.patcher])

    broken, _ = failing(model, at=[1, 2], before=before)
    in_parts(run_node, broken, conditioning(1), conditioning(2))
    assert seen[1] == (True, True), "the other model is there when memory runs out"
    assert set(seen[3:]) == {(False, True)}, "and gone afterwards, where ours is not"


@both_nodes
def test_for_good_it_is_one_sentence_and_the_next_run_works(sample, run_node, model, conditioning, lines, pack):
    import comfy.model_management

    texts = with_picture(conditioning(1)), with_picture(conditioning(2))
    expected = sample(run_node, model, *texts)
    inputs, broken_at = [], set(ALWAYS[3:100])
    broken, rows = failing(model, at=broken_at, before=lambda x: inputs.append(weakref.ref(x)))
    with pytest.raises(pack("opensora_core.errors").OpenSoraError) as caught:
        sample(run_node, broken, *texts)
    assert rows == [3, 3, 3, 3, 1, 1], "as it was, one pass at a time, and with the weights in RAM: once each"
    assert [reference() for reference in inputs] == [None] * 6, "nothing of the failed run is held, not even by what was raised"
    sentence = str(caught.value)
    for part in ("9 frames of 48x64", "one pass at a time and the weights waiting in RAM", "GiB free", "fewer frames or a smaller size"):
        assert part in sentence
    assert "\n" not in sentence and sentence.count(". ") == 0 and caught.value.__cause__ is caught.value.__context__ is None
    assert len(lines) == 2
    assert not any(model.is_clone(loaded) for loaded in comfy.model_management.loaded_models()), (
        "the device is left empty for what comes next"
    )
    broken_at.clear()
    assert torch.equal(sample(run_node, broken, *texts), expected), "the same MODEL works again"
    assert len(lines) == 2


def test_a_guider_that_failed_is_as_it_was(run_node, model, conditioning, lines, pack):
    broken_at = set(ALWAYS[:100])
    broken, _ = failing(model, at=broken_at)
    guider, sigmas = make_guider(run_node, broken, conditioning(1), conditioning(2))
    before = dict(vars(guider))
    for _ in range(2):
        with pytest.raises(pack("opensora_core.errors").OpenSoraError, match="ran out of memory"):
            run_guider(run_node, guider, sigmas)
    assert {name: id(value) for name, value in vars(guider).items()} == {name: id(value) for name, value in before.items()}
    broken_at.clear()
    assert torch.equal(run_guider(run_node, guider, sigmas), in_parts(run_node, model, conditioning(1), conditioning(2)))


def test_a_model_that_cannot_even_load(run_node, model, conditioning, lines, pack, monkeypatch):
    import comfy.model_management

    def load(*args, **kwargs):
        raise torch.OutOfMemoryError("Tried to allocate 20.00 GiB")

    monkeypatch.setattr(comfy.model_management, "load_models_gpu", load)
    with pytest.raises(
        pack("opensora_core.errors").OpenSoraError, match="use offload minimal, or a precision.*out of memory; beside "
    ) as caught:
        in_one(run_node, model, conditioning(1), conditioning(2))
    assert "also with" not in str(caught.value) and not lines


def test_resident_weights_stay(run_node, model, conditioning, lines, pack):
    resident, _ = pack("nodes.host.offload").apply_offload(model, "resident", 1.0)
    broken, rows = failing(resident, at=ALWAYS)
    with pytest.raises(pack("opensora_core.errors").OpenSoraError, match="offload auto instead of resident"):
        in_one(run_node, broken, conditioning(1), conditioning(2))
    assert rows == [2, 1] and len(lines) == 1


@both_nodes
def test_a_cancelled_run_is_no_lack_of_memory(sample, run_node, model, conditioning, lines):
    import comfy.model_management

    broken, rows = failing(model, at=[1], error=comfy.model_management.InterruptProcessingException)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sample(run_node, broken, conditioning(1), conditioning(2))
    assert len(rows) == 2 and not lines


def test_cancelled_while_memory_runs_out(run_node, model, conditioning, lines):
    import comfy.model_management

    def error(text):
        comfy.model_management.interrupt_current_processing()
        return torch.OutOfMemoryError(text)

    broken, rows = failing(model, at=[1], error=error)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        in_one(run_node, broken, conditioning(1), conditioning(2))
    assert len(rows) == 2 and not lines, "the evaluation is not tried again"


@both_nodes
def test_another_failure_is_passed_on(sample, run_node, model, conditioning, lines):
    broken, rows = failing(model, at=[1], error=RuntimeError)
    with pytest.raises(RuntimeError, match="Tried to allocate"):
        sample(run_node, broken, conditioning(1), conditioning(2))
    assert len(rows) == 2 and not lines


def test_with_several_gpus_an_evaluation_is_not_tried_again(pack):
    calls = []

    def passes(conds):
        calls.append(conds)
        raise torch.OutOfMemoryError("no")

    fallback = pack("nodes.host.out_of_memory").Fallback(calls.append)
    with pytest.raises(torch.OutOfMemoryError):
        fallback.predict(passes, [[{}], [{}]], None, [], {"multigpu_clones": {}})
    assert len(calls) == 1


@both_nodes
def test_the_line_is_on_the_node_that_samples(sample, run_node, model, conditioning, monkeypatch, caplog):
    from comfy_execution.utils import CurrentNodeContext
    from server import PromptServer

    texts = []
    server = types.SimpleNamespace(
        send_progress_text=lambda text, node_id, page: texts.append((text, node_id)),
        send_sync=lambda *_: None,
        client_id=None,
        last_node_id=None,
    )
    monkeypatch.setattr(PromptServer, "instance", server, raising=False)
    broken, _ = failing(model, at=[1])
    with CurrentNodeContext("prompt", "25:24"):
        sample(run_node, broken, conditioning(1), conditioning(2))
    if sample is in_parts:  # the one-node sampler is told its id by the host, here none
        assert [(node_id, "Ran out of memory" in text) for text, node_id in texts] == [("25:24", True), ("25", True)]
    assert sum("Ran out of memory" in record.getMessage() and record.levelname == "WARNING" for record in caplog.records) == 1


def test_progress_does_not_wipe_the_line(run_node, model, conditioning, pack, monkeypatch):
    shown = []
    monkeypatch.setattr(pack("nodes.host.notice"), "show", lambda text, node_id, level=30: shown.append(text))
    broken, _ = failing(model, at=[1])
    in_one(run_node, broken, conditioning(1), conditioning(2))
    steps = [text for text in shown if text.startswith(("Step ", "Done in "))]
    assert ["Ran out of memory" in text for text in steps] == [False, *[True] * (STEPS - 1)]


# The host's own queue, with both nodes in one graph.


@pytest.fixture
def queue(model, conditioning, monkeypatch):
    """Runs a graph as the host's queue does: queue(graph, at) -> (status messages by event, texts on nodes). Forwards `at` fail."""
    import execution
    from server import PromptServer

    import nodes

    class Inputs:
        """A MODEL that fails as the test says, and CONDITIONING."""

        RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL", "CONDITIONING", "CONDITIONING"), "make", "test"
        failures: set = set()

        @classmethod
        def INPUT_TYPES(cls):
            return {"required": {}}

        def make(self):
            return failing(model, at=self.failures)[0], conditioning(1), conditioning(2)

    texts = []
    server = types.SimpleNamespace(
        client_id=None, last_node_id=None, last_prompt_id=None, send_sync=lambda *args: None,
        send_progress_text=lambda text, node_id, page: texts.append((node_id, text)),
    )  # fmt: skip
    monkeypatch.setattr(PromptServer, "instance", server, raising=False)
    monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, "TestInputs", Inputs)
    executor = execution.PromptExecutor(server, cache_args={"lru": 0, "ram": 0, "ram_inactive": 0})

    def run(graph: dict, at) -> tuple[dict, list]:
        del texts[:]
        Inputs.failures.clear()
        Inputs.failures.update(at)
        executor.execute(graph, "prompt", {}, ["save"])
        return dict(executor.status_messages), list(texts)

    return run


def graph(kind: str, seed: int) -> dict:
    settings = {"text_guidance": 7.5, "image_guidance": 3.0}
    texts = {"positive": ["inputs", 1], "negative": ["inputs", 2]}
    nodes = {
        "inputs": {"class_type": "TestInputs", "inputs": {}},
        "latent": {"class_type": "EmptyHunyuanLatentVideo", "inputs": {"width": 64, "height": 48, "length": 9, "batch_size": 1}},
        "save": {"class_type": "SaveLatent", "inputs": {"samples": ["sample", 0], "filename_prefix": "out_of_memory"}},
    }
    if kind == "sampler":
        given = {**settings, **texts, "model": ["inputs", 0], "latent": ["latent", 0], "seed": seed, "steps": STEPS}
        return {**nodes, "sample": {"class_type": "OpenSoraRectifiedFlowSampler", "inputs": given}}
    parts = {"noise": ["noise", 0], "guider": ["guider", 0], "sampler": ["euler", 0], "sigmas": ["schedule", 1]}
    return {
        **nodes,
        "schedule": {
            "class_type": "OpenSoraScheduler",
            "inputs": {"model": ["inputs", 0], "latent": ["latent", 0], "steps": STEPS, "shift": 0.0},
        },
        "guider": {"class_type": "OpenSoraGuider", "inputs": {**settings, **texts, "model": ["schedule", 0]}},
        "noise": {"class_type": "RandomNoise", "inputs": {"noise_seed": seed}},
        "euler": {"class_type": "KSamplerSelect", "inputs": {"sampler_name": "euler"}},
        "sample": {"class_type": "SamplerCustomAdvanced", "inputs": {**parts, "latent_image": ["latent", 0]}},
    }


@pytest.mark.parametrize("kind", ["sampler", "guider"])
def test_the_queue_goes_on(kind, queue):
    events, texts = queue(graph(kind, seed=1), at=[1])
    assert "execution_success" in events
    assert [node for node, text in texts if text.startswith("Ran out of memory")] == ["sample"]
    events, texts = queue(graph(kind, seed=2), at=ALWAYS[:200])
    assert events["execution_error"]["node_id"] == "sample"
    message = events["execution_error"]["exception_message"].strip()
    assert ": sampling 9 frames of 48x64 (height x width) ran out of memory, also with one pass at a time" in message
    assert "\n" not in message, "the host adds no advice of its own"
    events, texts = queue(graph(kind, seed=3), at=[])
    assert "execution_success" in events and not any("Ran out of memory" in text for _, text in texts)
