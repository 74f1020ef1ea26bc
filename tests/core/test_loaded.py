"""The shared loaded-model cache: one copy of what is the same, nothing held against anyone's will, nothing left by a failure."""

import gc
import os
import shutil
import subprocess
import sys
import threading
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from demo.tiny import TRANSFORMER
from opensora_core.checkpoint import files
from opensora_core.checkpoint.load import load_transformer
from opensora_core.errors import CheckpointError, OpenSoraError
from opensora_core.families import table
from opensora_core.memory.loaded import EncodedPrompts, LoadedModels, own_structure
from opensora_core.pipeline import OpenSoraPipeline
from opensora_core.run import files as model_files, parts as networks, text

CALL = {"height": 32, "width": 32, "num_frames": 1, "num_inference_steps": 1, "seed": 3}


class Model:
    """Anything that can be held weakly: a host's patcher, say."""

    def __init__(self, mib=1):
        self.mib = mib


def size(model):
    return model.mib * 2**20


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"first")
    return path


@pytest.fixture
def cache():
    return LoadedModels()


@pytest.fixture
def shared(monkeypatch):
    """Caches of their own for the pipelines of one test."""
    cache, prompts = LoadedModels(), EncodedPrompts()
    monkeypatch.setattr(networks, "SHARED", cache)
    monkeypatch.setattr(text, "PROMPTS", prompts)
    return cache


def get(cache, path, load=Model, keep=False, **options):
    return cache.get("transformer", path, options, load, size, keep)


def refuse():
    raise AssertionError("this would be loaded twice")


def test_the_same_file_with_the_same_options_is_one_object(cache, file, tmp_path):
    model = get(cache, file, dtype="bf16")
    (tmp_path / "link.safetensors").symlink_to(file)
    assert get(cache, file, refuse, dtype="bf16") is model
    assert get(cache, str(file), refuse, dtype="bf16") is model
    assert get(cache, tmp_path / "link.safetensors", refuse, dtype="bf16") is model
    assert get(cache, file, dtype="fp32") is not model
    assert cache.get("lora", file, {"dtype": "bf16"}, Model, size) is not model


def test_it_lives_as_long_as_someone_uses_it(cache, file):
    model = get(cache, file)
    assert [entry.num_bytes for entry in cache.listing()] == [2**20]
    del model
    gc.collect()
    assert cache.listing() == []
    assert get(cache, file).mib == 1


def test_kept_up_to_a_limit_the_least_recently_used_given_up_first(tmp_path):
    cache, paths = LoadedModels(keep_limit_gib=3 / 1024), []
    for name in "abcd":
        paths.append(tmp_path / name)
        paths[-1].write_text(name)
    for path in paths[:3]:
        get(cache, path, keep=True)
    get(cache, paths[0], refuse)  # used again, with or without keep
    get(cache, paths[3], keep=True)
    gc.collect()
    assert {entry.key.file.name for entry in cache.listing()} == {"a", "c", "d"}
    assert all(entry.is_kept for entry in cache.listing())
    cache.keep_up_to(1 / 1024)
    gc.collect()
    assert [entry.key.file.name for entry in cache.listing()] == ["d"]
    cache.release()
    gc.collect()
    assert cache.listing() == []


def test_what_is_loaded_already_is_kept_too_and_given_up_before_what_was(tmp_path):
    cache, models = LoadedModels(keep_limit_gib=1), []
    for name in "abc":
        (tmp_path / name).write_text(name)
    models = [
        cache.get(kind, tmp_path / name, {}, Model, size, kind == "kept") for kind, name in (("kept", "a"), ("t5", "b"), ("vae", "c"))
    ]
    cache.keep_up_to(2 / 1024, ("kept", "t5"))
    assert cache.kept() == [models[1], models[0]]
    assert (cache.give_up_oldest(), cache.give_up_oldest(), cache.give_up_oldest()) == ("b", "a", None)
    for limit in (-1, float("nan"), float("inf")):
        with pytest.raises(OpenSoraError, match="not an amount"):
            cache.keep_up_to(limit, ("t5",))
        assert cache.kept() == []


def test_larger_than_the_limit_is_not_kept_and_a_limit_is_an_amount(file):
    cache = LoadedModels(keep_limit_gib=1 / 1024)
    model = get(cache, file, lambda: Model(2), keep=True)
    assert [entry.is_kept for entry in cache.listing()] == [False]
    del model
    gc.collect()
    assert cache.listing() == []
    for limit in (-1, float("nan"), float("inf")):
        with pytest.raises(OpenSoraError, match="not an amount"):
            cache.keep_up_to(limit)


@pytest.mark.parametrize("kept", [False, True])
def test_a_replaced_file_is_loaded_anew_and_the_old_one_forgotten(file, kept):
    cache = LoadedModels(keep_limit_gib=1)
    old = get(cache, file, keep=kept)
    file.write_bytes(b"second, longer")
    new = get(cache, file)
    assert new is not old
    assert [entry.key.file.parts[0][1] for entry in cache.listing()] == [len(b"second, longer")]
    # The same size, another time.
    os.utime(file, ns=(1, 1))
    assert get(cache, file) is not new


def test_a_file_that_changes_while_it_is_read_is_not_remembered(cache, file):
    def load():
        file.write_bytes(b"while it is read")
        return Model()

    model = get(cache, file, load)
    assert model is not None and cache.listing() == []
    assert get(cache, file) is not model


def test_a_failed_load_leaves_nothing(cache, file):
    def fail():
        raise CheckpointError("damaged")

    with pytest.raises(CheckpointError, match="damaged"):
        get(cache, file, fail)
    assert cache.listing() == [] and not cache._gates and not cache._sizes
    assert isinstance(get(cache, file), Model)
    with pytest.raises(CheckpointError, match="cannot be found"):
        get(cache, file.with_name("absent"), refuse)


def together(number, work):
    """Results of `work()` in threads that begin at the same time; exceptions are results too."""
    barrier, results = threading.Barrier(number), []

    def run():
        barrier.wait()
        try:
            results.append(work())
        except CheckpointError as error:
            results.append(error)

    threads = [threading.Thread(target=run) for _ in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    return results


def test_threads_that_ask_at_the_same_time_load_once(cache, file):
    calls = []

    def load():
        calls.append(threading.get_ident())
        threading.Event().wait(0.05)
        return Model()

    results = together(6, lambda: get(cache, file, load))
    assert len(calls) == 1 and len({id(model) for model in results}) == 1
    assert not cache._gates


def test_when_one_thread_fails_the_next_tries_itself(cache, file):
    calls = []

    def load():
        calls.append(1)
        threading.Event().wait(0.02)
        if len(calls) == 1:
            raise CheckpointError("once")
        return Model()

    results = together(4, lambda: get(cache, file, load))
    assert len(calls) == 2 and sum(isinstance(result, CheckpointError) for result in results) == 1
    assert len({id(result) for result in results if isinstance(result, Model)}) == 1


def test_another_file_is_not_held_up_by_one_that_is_loading(cache, tmp_path):
    for name in "ab":
        (tmp_path / name).write_text(name)
    begun, release = threading.Event(), threading.Event()

    def slow():
        begun.set()
        assert release.wait(20)
        return Model()

    thread = threading.Thread(target=lambda: get(cache, tmp_path / "a", slow))
    thread.start()
    assert begun.wait(20)
    get(cache, tmp_path / "b")  # would wait for ever if one lock were held while loading
    assert cache.listing() == []
    release.set()
    thread.join(20)


def test_the_listing_says_what_and_how_large(cache, file):
    module = nn.Linear(8, 4, dtype=torch.bfloat16)
    module.again = module.weight  # one weight under two names counts once
    kept = cache.get("transformer", file, {"precision": "as stored"}, lambda: module)
    (entry,) = cache.listing()
    assert kept is module and entry.num_bytes == 2 * (32 + 4)
    assert (entry.key.kind, entry.key.file.name, entry.key.options) == ("transformer", "model.safetensors", (("precision", "as stored"),))


class OpenCount:
    """How often a file of a folder is opened: by Python, which says so to audit hooks, and by safetensors, which does not."""

    def __init__(self, folder, monkeypatch):
        self.folder, self.count, self.on = str(folder), 0, False
        real = files.safe_open

        def counted(path, *args, **kwargs):
            self.count += self.on
            return real(path, *args, **kwargs)

        monkeypatch.setattr(files, "safe_open", counted)
        sys.addaudithook(self._hook)

    def _hook(self, event, args):
        if self.on and event == "open" and isinstance(args[0], (str, os.PathLike)) and str(args[0]).startswith(self.folder):
            self.count += 1

    def __enter__(self):
        self.count, self.on = 0, True
        return self

    def __exit__(self, *error):
        self.on = False


def weights_of(component):
    network = component._network
    return {name: tensor.data_ptr() for name, tensor in getattr(network, "model", network).named_parameters()}


def test_a_second_pipeline_opens_no_file_and_has_the_same_weights(tiny_checkpoint, shared, monkeypatch):
    opens = OpenCount(tiny_checkpoint, monkeypatch)
    first, second = (OpenSoraPipeline.from_pretrained(tiny_checkpoint) for _ in range(2))
    with opens:
        made = first("a cat", **CALL)
    assert opens.count > 4
    with opens:
        again = second("a cat", **CALL)
    assert opens.count == 0
    assert torch.equal(made.latents, again.latents)
    for name in ("transformer", "vae", "t5", "clip"):
        own = weights_of(getattr(first._networks, name))
        assert own and own == weights_of(getattr(second._networks, name))
    assert {entry.key.kind for entry in shared.listing()} == {"transformer", "vae", "t5", "clip"}
    del first, made
    gc.collect()
    assert len(shared.listing()) == 4
    del second, again
    gc.collect()
    assert shared.listing() == []


def test_other_options_are_other_weights(tiny_checkpoint, shared):
    first = OpenSoraPipeline.from_pretrained(tiny_checkpoint)
    second = OpenSoraPipeline.from_pretrained(tiny_checkpoint, precision="bf16")
    cat = first.encode_prompt("a cat")
    first(cat, **CALL)
    second(cat, **CALL)
    assert weights_of(first._networks.transformer) != weights_of(second._networks.transformer)


def test_keep_loaded_outlives_the_pipeline_within_the_limit(tiny_checkpoint, shared):
    shared.keep_up_to(1)
    pipe = OpenSoraPipeline.from_pretrained(tiny_checkpoint)
    pipe.keep_loaded = True
    pipe("a cat", **CALL)
    del pipe
    gc.collect()
    assert len(shared.listing()) == 4
    shared.keep_up_to(0)
    gc.collect()
    assert shared.listing() == []


def test_what_one_pipeline_does_to_its_network_leaves_the_other_as_it_was(tiny_checkpoint, tmp_path, shared):
    layer = "single_blocks.0.q_proj"
    hidden = TRANSFORMER.hidden_size
    save_file(
        {f"{layer}.lora_A.weight": torch.ones(1, hidden), f"{layer}.lora_B.weight": torch.ones(hidden, 1)}, tmp_path / "lora.safetensors"
    )
    plain, patched = (OpenSoraPipeline.from_pretrained(tiny_checkpoint) for _ in range(2))
    cat = plain.encode_prompt("a cat")
    before = plain(cat, **CALL).latents
    patched.load_lora(tmp_path / "lora.safetensors")
    patched.enable_attention_slicing()
    changed = patched(cat, **CALL).latents
    assert not torch.equal(before, changed)
    assert torch.equal(before, plain(cat, **CALL).latents)
    own, other = weights_of(plain._networks.transformer), weights_of(patched._networks.transformer)
    assert {name for name in own if own[name] != other[name]} == {f"{layer}.weight"}


def test_a_kept_prompt_needs_no_encoder(tiny_checkpoint, shared, monkeypatch):
    first, second = (OpenSoraPipeline.from_pretrained(tiny_checkpoint) for _ in range(2))
    first.keep_encoded = second.keep_encoded = True
    expected = first.encode_prompt("a cat", "blurry")
    del first
    gc.collect()
    encodings = []
    monkeypatch.setattr(second._networks.t5, "_read", lambda *args: encodings.append(args) or refuse())
    found = second.encode_prompt("a cat", "blurry")
    for side, parts in vars(expected.condition).items():
        again = vars(found.condition)[side]
        assert again.keys() == parts.keys() and all(torch.equal(part, again[name]) for name, part in parts.items())
    with pytest.raises(AssertionError, match="loaded twice"):
        second.encode_prompt("a dog", "blurry")
    assert len(encodings) == 1


def test_encoded_prompts_are_bounded_and_known_by_text_encoder_and_options(file, tmp_path):
    prompts, calls = EncodedPrompts(limit_bytes=3 * 400), []
    other = shutil.copy(file, tmp_path / "other.safetensors")

    def encoded(text, path=file, size=100, **options):
        def encode(missing):
            assert missing == [(text, "")]
            calls.append(text)
            return [{"context": [torch.zeros(size)]}]

        return prompts.get([(text, "")], (path,), options, encode)[0]

    first = encoded("a")
    assert encoded("a") is first and calls == ["a"]
    encoded("a", other)
    encoded("a", precision="int8")
    assert calls == ["a", "a", "a"] and prompts.num_bytes == 1200
    encoded("a")  # used last: stays
    encoded("b")
    assert len(prompts) == 3 and encoded("a") is first
    file.write_bytes(b"another encoder")
    assert encoded("a") is not first
    encoded("too large for all of it", size=10_000)
    assert prompts.num_bytes == 0
    prompts.clear()
    assert len(prompts) == 0


def test_of_several_prompts_those_that_are_not_kept_are_encoded_together(file):
    prompts, calls = EncodedPrompts(), []

    def encode(missing):
        calls.append(missing)
        return [torch.tensor(ord(text)) for text in missing]

    prompts.get(["b"], (file,), {}, encode)
    found = prompts.get(["a", "b", "c", "a"], (file,), {}, encode)
    assert calls == [["b"], ["a", "c"]] and [chr(value) for value in found] == ["a", "b", "c", "a"]


def test_a_check_is_made_once_for_the_same_files(tiny_checkpoint, tmp_path, monkeypatch):
    folder, opened, real = shutil.copytree(tiny_checkpoint, tmp_path / "model"), [], model_files.open_model
    monkeypatch.setattr(model_files, "open_model", lambda path, slot: opened.append(slot) or real(path, slot))
    for _ in range(2):
        model_files.check_files(model_files.ModelFiles.in_folder(folder))
    assert opened == ["transformer", "vae"]
    whole, vae = (folder / "hunyuan_vae.safetensors").read_bytes(), folder / "hunyuan_vae.safetensors"
    vae.write_bytes(whole[:1000])
    for _ in range(2):
        with pytest.raises(CheckpointError):
            model_files.check_files(model_files.ModelFiles.in_folder(folder))
    vae.write_bytes(whole)
    model_files.check_files(model_files.ModelFiles.in_folder(folder))
    assert opened == 4 * ["transformer", "vae"]


def test_a_structure_of_ones_own(tiny_checkpoint):
    source = load_transformer(tiny_checkpoint / "Open_Sora_v2.safetensors", torch.float32)
    mine = own_structure(source)
    inputs = [torch.ones(1, 16, 1, 4, 4), torch.tensor([0.5]), torch.ones(1, 8, 64), torch.ones(1, 64)]
    assert torch.equal(source(*inputs), mine(*inputs))
    assert {name: id(p) for name, p in source.named_parameters()} == {name: id(p) for name, p in mine.named_parameters()}
    before = source(*inputs)
    mine.img_in.weight = nn.Parameter(torch.zeros_like(mine.img_in.weight), requires_grad=False)
    mine.register_forward_pre_hook(lambda *args: None)
    mine.double_blocks.append(nn.Identity())
    assert torch.equal(source(*inputs), before) and not source._forward_pre_hooks
    assert len(source.double_blocks) == TRANSFORMER.depth
    assert not any(part in list(source.modules()) for part in mine.modules())


MEMORY = """
import sys, threading, time, torch
from opensora_core.checkpoint.load import load_transformer

def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))

load_transformer(sys.argv[2])  # what importing and a first load take once is not the weights'
peak, done = 0, threading.Event()
def watch():
    global peak
    while not done.is_set():
        peak = max(peak, anonymous())
        time.sleep(0.001)

before = anonymous()
thread = threading.Thread(target=watch)
thread.start()
model = load_transformer(sys.argv[1], getattr(torch, sys.argv[3]))
done.set()
thread.join()
print(max(peak, anonymous()) - before, sum(p.nbytes for p in model.parameters()))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux's account of anonymous memory")
@pytest.mark.parametrize(("dtype", "most"), [("bfloat16", 0.1), ("float32", 1.1)])
def test_loading_maps_the_file(tmp_path, tiny_checkpoint, write_hole, dtype, most):
    """Unconverted weights take no anonymous memory; converted ones no more than what is kept."""
    sizes = {"hidden_size": 1024, "num_heads": 8, "mlp_hidden_size": 4096, "depth": 2, "depth_single_blocks": 5}
    depth = sizes if dtype == "bfloat16" else sizes | {"depth": 1, "depth_single_blocks": 2}
    path = write_hole(tmp_path / "large.safetensors", table.manifest(replace(TRANSFORMER, **depth)))
    command = [sys.executable, "-c", MEMORY, str(path), str(tiny_checkpoint / "Open_Sora_v2.safetensors"), dtype]
    result = subprocess.run(command, capture_output=True, text=True, cwd=files.__file__.rsplit("opensora_core", 1)[0])
    assert result.returncode == 0, result.stderr
    anonymous, kept = map(int, result.stdout.split())
    assert kept > 250e6
    assert anonymous <= most * kept
