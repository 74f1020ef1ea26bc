"""Prompts, tokens and the two text encoders: equal to the transformers library's on the same files, in every form a file has."""

import dataclasses
import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from opensora_core.encoders import tokens
from opensora_core.encoders.clip import load_clip
from opensora_core.encoders.t5 import load_t5
from opensora_core.errors import CheckpointError, OpenSoraError
from opensora_core.families.table import DEFAULT
from opensora_core.memory.footprint import sizes_of_files
from opensora_core.text.prompt import decorate
from opensora_core.text.recipe import CLIP, T5, Said

T5_FOLDER = "google/t5-v1_1-xxl"
CLIP_FOLDER = "openai/clip-vit-large-patch14"
TEXTS = ["", "raining, sea. 24 FPS. 4 motion score.", "naïve café (word:1.3)  so\n北京 🐈", "a red cat, " * 90, "stop</s>here <extra_id_3>"]
FP32 = torch.float32


# Prompts


@pytest.mark.parametrize(
    ("prompt", "options", "expected"),
    [
        ("raining, sea", {}, "raining, sea. 24 FPS. 4 motion score."),
        ("A cat. 24 FPS.", {}, "A cat. 24 FPS. 4 motion score."),
        ("x 24 FPS", {}, "x 24 FPS. 4 motion score."),
        ('Ends with quote."', {}, 'Ends with quote.". 24 FPS. 4 motion score.'),
        ("\n a cat \t", {"fps": 16, "motion_score": 15}, "a cat. 16 FPS. 15 motion score."),
        ("24 FPS. a cat", {}, "24 FPS. a cat. 24 FPS. 4 motion score."),
        ("a cat.", {"fps": 0}, "a cat. 4 motion score."),
        ("a cat", {"motion_score": None}, "a cat. 24 FPS."),
        ("a cat", {"fps": None, "motion_score": 0}, "a cat."),
        ("", {}, ". 24 FPS. 4 motion score."),
    ],
)
def test_decorate(prompt, options, expected):
    assert decorate(prompt, **options) == expected


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"fps": -1}, "Use 1, the nearest: fps=-1.*from 1 to 120"),
        ({"fps": 23.976}, "Use 24, the nearest"),
        ({"motion_score": 16}, "Use 15, the nearest: motion_score=16.*from 1 to 15"),
        ({"motion_score": float("nan")}, "motion_score"),
        ({"motion_score": float("inf")}, "Use 15, the nearest"),
    ],
)
def test_decorate_refuses(options, words):
    with pytest.raises(OpenSoraError, match=words):
        decorate("a cat", **options)


def test_tokens_are_padded_or_cut_before_the_last():
    tokenizer = tokens.Tokenizer(T5, lambda text: list(map(int, text)), pad=0, end=1, size=10, length=3, folder=None)
    assert dataclasses.replace(tokenizer, length=5).fitted("561") == ([5, 6, 1, 0, 0], "")
    assert tokenizer.fitted("561") == ([5, 6, 1], "")
    ids, sentence = tokenizer.fitted("56781")
    assert ids == [5, 6, 1] and "2 tokens longer than the 3 that T5 reads" in sentence


# Encoders


@pytest.fixture(scope="module")
def t5(tiny_checkpoint):
    return load_t5(tiny_checkpoint / "t5xxl.safetensors", FP32, "cpu")


@pytest.fixture(scope="module")
def clip(tiny_checkpoint):
    return load_clip(tiny_checkpoint / "clip_l.safetensors", FP32, "cpu")


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


def padded(tokenizer, length):
    return tokenizer(TEXTS, truncation=True, max_length=length, padding="max_length", return_tensors="pt")["input_ids"]


def test_t5_equals_transformers(tiny_checkpoint, t5, transformers):
    folder = tiny_checkpoint / T5_FOLDER
    tokenizer = transformers.T5TokenizerFast.from_pretrained(folder, local_files_only=True)
    model = transformers.T5EncoderModel.from_pretrained(folder, local_files_only=True).float().train(False)
    ids = t5.tokenize(TEXTS)
    assert torch.equal(ids[:-1], padded(tokenizer, 512)[:-1])  # fast tokenizers differ around special tokens: next test
    with torch.no_grad():
        assert torch.equal(t5.encode(TEXTS), model(input_ids=ids).last_hidden_state)


def test_t5_ids(t5):
    ids = t5.tokenize(TEXTS)
    assert ids.shape == (5, 512) and ids.dtype == torch.int64
    assert ids[0].tolist() == [1] + [0] * 511
    assert ids[3, -1] == 1 and (ids[3] != 0).all()  # cut at 512, end-of-text kept
    piece = t5.tokenizer.ids
    # As the reference's slow tokenizer: a special token in the text is itself, and its neighbours are words of their own.
    assert piece("stop</s>here") == [*piece("stop"), *piece("here")]
    assert piece("<extra_id_3>") == [t5.tokenizer.size + 96, 1]
    assert piece("a  b\n ﬁre ") == piece("a b fire")  # the model's own normalisation


def retold(folder, target, **settings):
    """A copy of a tokenizer's folder with other settings in tokenizer_config.json; None takes one out."""
    shutil.copytree(folder, target)
    path = target / "tokenizer_config.json"
    told = json.loads(path.read_text()) | settings
    path.write_text(json.dumps({name: value for name, value in told.items() if value is not None}))
    return target


@pytest.mark.parametrize(
    ("said", "length"), [(32, 32), (None, 512), (10**30, 512), (1e30, 512), (4096, 512), (0, 512), (-5, 512), ("x", 512)]
)
@pytest.mark.parametrize("file", ["spiece.model", "tokenizer.json"])
def test_t5_reads_as_many_tokens_as_its_tokenizer_says(tiny_checkpoint, tmp_path, said, length, file):
    folder = retold(tiny_checkpoint / T5_FOLDER, tmp_path / "t5_tokenizer", model_max_length=said)
    (folder / ({"spiece.model", "tokenizer.json"} - {file}).pop()).unlink()
    assert tokens.read_tokenizer(T5, folder).length == tokens.text_length(T5, folder) == length


def test_short_texts(tiny_checkpoint, tmp_path, caplog):
    retold(tiny_checkpoint / T5_FOLDER, tmp_path / "t5", model_max_length=32)
    t5 = load_t5(tiny_checkpoint / "t5xxl.safetensors", FP32, "cpu", tokenizers=tmp_path / "t5")
    ids = t5.tokenize(TEXTS)
    assert ids.shape == (5, 32) and ids[3, -1] == 1
    assert ids[1, :31].tolist() == load_t5(tiny_checkpoint / "t5xxl.safetensors", FP32, "cpu").tokenize(TEXTS)[1, :31].tolist()
    assert "longer than the 32 that T5 reads" in caplog.text
    assert t5.encode(TEXTS[:2]).shape == (2, 32, 64)
    assert sizes_of_files(t5=tiny_checkpoint / "t5xxl.safetensors").text.length == 512


@pytest.mark.parametrize("file", ["spiece.model", "tokenizer.json"])
def test_either_file_of_t5_reads_alike(tiny_checkpoint, tmp_path, file):
    folder = shutil.copytree(tiny_checkpoint / T5_FOLDER, tmp_path / "t5")
    (folder / ({"spiece.model", "tokenizer.json"} - {file}).pop()).unlink()
    piece = tokens.read_tokenizer(T5, folder).ids
    assert piece("red</s>") == piece("red") and piece("</s>") == piece("") == [1]  # one end
    assert piece("stop</s>here") == [*piece("stop"), *piece("here")]
    for control in ("\x01", "\x0b", "\x1b", "\x7f"):
        assert piece(f"the re{control}d fox{control}") == piece("the red fox")
    for space in ("\t", "\n", "\r\n", "\x0c", "\u3000", "  "):
        assert piece(f"{space}the{space}red fox{space}") == piece("the red fox")


def test_clip_reads_typography_as_plain_text(clip):
    assert torch.equal(
        clip.tokenize(["the circle\u2019s \u201cred\u201d \uff25\uff24\uff27\uff25"]), clip.tokenize(['the circle\'s "red" edge'])
    )


def test_sentinels_that_a_tokenizer_does_not_have_are_words(tiny_checkpoint, tmp_path):
    folder = retold(tiny_checkpoint / T5_FOLDER, tmp_path / "t5", extra_ids=0)
    tokenizer = tokens.read_tokenizer(T5, folder)
    assert max(tokenizer.ids("<extra_id_3>")) < tokenizer.size
    assert tokenizer.ids("stop</s>here") == [*tokenizer.ids("stop"), *tokenizer.ids("here")]


def test_clip_equals_transformers(tiny_checkpoint, clip, transformers):
    folder = tiny_checkpoint / CLIP_FOLDER
    tokenizer = transformers.CLIPTokenizerFast.from_pretrained(folder, local_files_only=True)
    model = transformers.CLIPTextModel.from_pretrained(folder, local_files_only=True).float().train(False)
    ids = clip.tokenize(TEXTS)
    assert torch.equal(ids, padded(tokenizer, 77))
    assert ids[0].tolist() == [49406] + [49407] * 76
    assert ids[3, -1] == 49407 and (ids[3, 1:-1] < 49406).all()
    with torch.no_grad():
        assert torch.equal(clip.encode(TEXTS), model(input_ids=ids).pooler_output)


def test_clip_pools_the_first_end_of_text(clip):
    """What follows it cannot matter, and what stands before it must."""
    cut, longer, other = clip.encode(["a red cat", "a red cat<|endoftext|> and a dog", "a dog"])
    assert torch.equal(cut, longer)
    assert not torch.allclose(cut, other)


def test_padding_is_attended(t5):
    """No mask: the padded sequence gives other features than the bare one."""
    ids = t5.tokenize(["a red cat"])
    length = int((ids != 0).sum())
    with torch.no_grad():
        bare = t5.model(input_ids=ids[:, :length]).last_hidden_state
    assert not torch.allclose(t5.encode(["a red cat"])[:, :length], bare, atol=1e-2)


def test_both_as_the_transformer_wants_them(t5, clip):
    context, pooled = (encoder.encode(["a cat", ""]) for encoder in (t5, clip))
    assert context.shape == (2, 512, 64) and pooled.shape == (2, 64)
    assert context.dtype == pooled.dtype == FP32 and not context.requires_grad
    assert torch.equal(context[:1], t5.encode(["a cat"])) and torch.equal(pooled[1:], clip.encode([""]))


@pytest.mark.parametrize("has_mask", [False, True])
def test_a_recipe_says_how_many_tokens_are_read_and_whether_padding_is_hidden(has_mask, tiny_checkpoint, transformers):
    """As the earlier models (300 tokens, a mask) and CogVideoX (226, none) read prompts."""
    recipe = dataclasses.replace(DEFAULT.text, encoders=(T5,), length=30, has_mask=has_mask)
    folder = tiny_checkpoint / T5_FOLDER
    t5 = load_t5(folder, FP32, "cpu").follow(recipe)
    tokenizer = transformers.T5TokenizerFast.from_pretrained(folder, local_files_only=True)
    model = transformers.T5EncoderModel.from_pretrained(folder, local_files_only=True).float().train(False)
    texts = ["", "a red cat", "a red cat, " * 90]
    expected = tokenizer(texts, truncation=True, max_length=30, padding="max_length", return_tensors="pt")
    ids = t5.tokenize(texts)
    assert torch.equal(ids, expected["input_ids"])
    mask = t5.mask(ids)
    assert torch.equal(mask, expected["attention_mask"]) if has_mask else mask is None
    with torch.no_grad():
        states = model(**expected) if has_mask else model(input_ids=ids)
    assert torch.equal(t5.encode(texts), states.last_hidden_state)


def test_the_recipe_of_2_0():
    assert DEFAULT.text.words("raining, sea", Said(24, 4)) == "raining, sea. 24 FPS. 4 motion score."
    assert DEFAULT.text.words("raining, sea", Said()) == "raining, sea."
    text = DEFAULT.text
    assert (text.encoders, text.length, text.has_mask, text.negative) == ((T5, CLIP), 512, False, "")


def test_a_cut_prompt_is_told(t5, clip, caplog):
    with caplog.at_level(logging.INFO, "opensora_core"):
        t5.tokenize([TEXTS[3]])
        clip.tokenize([TEXTS[3]])
        t5.tokenize(["a cat"])
    assert [(r.levelname, "T5" in r.message) for r in caplog.records] == [("WARNING", True), ("INFO", False)]


# Every form of the files


def as_embed_tokens(state):
    return {"encoder.embed_tokens.weight" if name == "shared.weight" else name: tensor for name, tensor in state.items()}


def as_both_names(state):
    return state | {"encoder.embed_tokens.weight": state["shared.weight"].clone()}


def as_whole_t5(state):
    return state | {
        "decoder.block.0.layer.0.SelfAttention.q.weight": torch.zeros(128, 64).half(),
        "lm_head.weight": torch.zeros(9, 64).half(),
    }


def as_old_clip(state):
    return state | {"text_model.embeddings.position_ids": torch.arange(77)[None]}


def as_flat_clip(state):
    return {name.removeprefix("text_model."): tensor for name, tensor in state.items()}


def as_whole_clip(state):
    vision = {"vision_model.embeddings.patch_embedding.weight": torch.zeros(8, 3, 2, 2), "visual_projection.weight": torch.zeros(8, 8)}
    return state | vision


@pytest.fixture
def rewritten(tiny_checkpoint, tmp_path):
    """A copy of one of the small single files with its tensors changed; tokenizers are named by the caller."""

    def rewrite(name, change):
        path = tmp_path / name
        save_file(change(load_file(tiny_checkpoint / name)), path)
        return path

    return rewrite


@pytest.mark.parametrize("form", [as_embed_tokens, as_both_names, as_whole_t5])
def test_forms_of_t5(form, rewritten, tiny_checkpoint, t5, caplog):
    other = load_t5(rewritten("t5xxl.safetensors", form), FP32, "cpu", tokenizers=tiny_checkpoint)
    assert torch.equal(other.encode(["a cat"]), t5.encode(["a cat"]))
    assert not caplog.records
    names = dict(other.model.named_parameters(remove_duplicate=False))
    assert names["shared.weight"] is names["encoder.embed_tokens.weight"]


@pytest.mark.parametrize("form", [as_old_clip, as_flat_clip, as_whole_clip])
def test_forms_of_clip(form, rewritten, tiny_checkpoint, clip, caplog):
    other = load_clip(rewritten("clip_l.safetensors", form), FP32, "cpu", tokenizers=tiny_checkpoint)
    assert torch.equal(other.encode(["a cat"]), clip.encode(["a cat"]))
    assert not caplog.records


def test_hub_folders_equal_single_files(tiny_checkpoint, t5, clip):
    folders = load_t5(tiny_checkpoint / T5_FOLDER, FP32, "cpu"), load_clip(tiny_checkpoint / CLIP_FOLDER, FP32, "cpu")
    assert torch.equal(folders[0].encode(TEXTS), t5.encode(TEXTS))
    assert torch.equal(folders[1].encode(TEXTS), clip.encode(TEXTS))


def test_sharded_safetensors_folder(tiny_checkpoint, tmp_path, t5):
    state = load_file(tiny_checkpoint / "t5xxl.safetensors")
    shard = {name: f"model-0000{1 + ('block.1' in name)}-of-00002.safetensors" for name in state}
    for file in set(shard.values()):
        save_file({name: tensor for name, tensor in state.items() if shard[name] == file}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shard}))
    loaded = load_t5(tmp_path, FP32, "cpu", tokenizers=tiny_checkpoint)
    assert torch.equal(loaded.encode(["a cat"]), t5.encode(["a cat"]))
    (tmp_path / shard["shared.weight"]).unlink()
    with pytest.raises(CheckpointError, match="lacks 1 of its 2 weight files, the first: model-00001"):
        load_t5(tmp_path, FP32, "cpu", tokenizers=tiny_checkpoint)


def fp8(tensor, scale=1.0):
    return (tensor.float() / scale).to(torch.float8_e4m3fn)


def is_linear(name):
    return name.endswith(("q.weight", "k.weight", "v.weight", "o.weight", "wi_0.weight", "wi_1.weight", "wo.weight"))


@pytest.mark.parametrize("suffix", [None, "scale_weight", "weight_scale"])
def test_fp8_is_kept_as_it_is_stored(suffix, rewritten, tiny_checkpoint, t5):
    scale = 1.0 if suffix is None else 0.0123

    def quantise(state):
        out = {name: fp8(tensor, scale) if is_linear(name) else tensor for name, tensor in state.items()}
        if suffix:
            layers = [name.removesuffix(".weight") for name in state if is_linear(name)]
            out |= {f"{layer}.{suffix}": torch.tensor(scale) for layer in layers} | {
                f"{layer}.scale_input": torch.tensor(1.0) for layer in layers
            }
            out["scaled_fp8"] = torch.zeros(0, dtype=torch.float8_e4m3fn)
        return out

    loaded = load_t5(rewritten("t5xxl.safetensors", quantise), FP32, "cpu", tokenizers=tiny_checkpoint)
    reference = t5.model.state_dict()
    for name, parameter in loaded.model.named_parameters():
        if is_linear(name):
            assert parameter.dtype == torch.int8
            restored = loaded.model.get_submodule(name.removesuffix(".weight")).dequantised()
            assert torch.equal(restored, fp8(reference[name], scale).float() * torch.tensor(scale)), name
        elif not name.endswith("_scale"):
            assert parameter.dtype == FP32 and torch.equal(parameter, reference[name]), name
    # Computed as if the weights had been cast up.
    expected = load_t5(rewritten("t5xxl.safetensors", lambda state: state), FP32, "cpu", tokenizers=tiny_checkpoint)
    for name, parameter in expected.model.named_parameters():
        if is_linear(name):
            parameter.data = fp8(parameter, scale).float() * torch.tensor(scale)
    texts = ["a red circle", "the quick brown fox"]
    assert torch.equal(loaded.encode(texts), expected.encode(texts))


@pytest.mark.parametrize(("precision", "bound"), [("fp8_e4m3fn", 0.06), ("int8", 0.03), ("nf4", 0.25)])
@pytest.mark.parametrize("dtype", [FP32, torch.bfloat16, torch.float16])
def test_t5_is_quantised_as_it_is_read(precision, bound, dtype, tiny_checkpoint, t5):
    loaded = load_t5(tiny_checkpoint / "t5xxl.safetensors", dtype, "cpu", tiny_checkpoint, precision)
    kept = {name for name, parameter in loaded.model.named_parameters() if parameter.dtype == torch.int8}
    # transformers keeps each feed-forward output in fp32 where the rest is fp16, because it overflows.
    assert kept == {
        name for name in t5.model.state_dict() if is_linear(name) and not (dtype == torch.float16 and name.endswith("wo.weight"))
    }
    texts = ["a red circle", "the quick brown fox"]
    found, expected = loaded.encode(texts), t5.encode(texts)
    assert found.dtype == dtype and found.shape == expected.shape
    assert 1e-3 < ((found.float() - expected).norm() / expected.norm()).item() < bound


def test_an_int8_file_of_comfyui_is_read(rewritten, tiny_checkpoint, t5):
    from opensora_core.checkpoint.quantised import Int8

    note = torch.tensor(list(b'{"format": "int8_tensorwise"}'), dtype=torch.uint8)

    def quantise(state):
        for name in [name for name in state if is_linear(name)]:
            layer = name.removesuffix(".weight")
            state[name], state[f"{layer}.weight_scale"] = Int8().quantise(state[name])
            state[f"{layer}.comfy_quant"] = note.clone()
        return state

    loaded = load_t5(rewritten("t5xxl.safetensors", quantise), FP32, "cpu", tiny_checkpoint)
    found, expected = loaded.encode(["a red circle"]), t5.encode(["a red circle"])
    assert 1e-4 < ((found - expected).norm() / expected.norm()).item() < 0.02


def test_other_quantisation_is_refused(rewritten, tiny_checkpoint):
    def quantise(state):
        # As 4-bit files hold them: packed, so of another shape as well.
        return {
            name: tensor.to(torch.uint8).flatten()[::2, None].contiguous() if is_linear(name) else tensor for name, tensor in state.items()
        }

    with pytest.raises(CheckpointError, match="stored as U8: of quantised text encoders only fp8 ones and ComfyUI's int8 ones"):
        load_t5(rewritten("t5xxl.safetensors", quantise), FP32, "cpu", tokenizers=tiny_checkpoint)


def test_half_precisions_equal_transformers(tiny_checkpoint, transformers):
    """bfloat16 throughout; float16 keeps the feed-forward output layers in float32, as the library does."""
    folder, read = tiny_checkpoint / T5_FOLDER, transformers.T5EncoderModel.from_pretrained
    libraries = {
        torch.bfloat16: read(folder, local_files_only=True).bfloat16(),
        torch.float16: read(folder, local_files_only=True, torch_dtype=torch.float16),
    }
    for dtype, model in libraries.items():
        ours = load_t5(folder, dtype, "cpu")
        dtypes = {name: parameter.dtype for name, parameter in ours.model.named_parameters()}
        assert dtypes == {name: parameter.dtype for name, parameter in model.named_parameters()}
        with torch.no_grad():
            expected = model.train(False)(input_ids=ours.tokenize(["a cat"])).last_hidden_state
        assert torch.equal(ours.encode(["a cat"]), expected)


# Wrong files


def without(name):
    return lambda state: {key: tensor for key, tensor in state.items() if key != name}


def widened(state):
    return state | {"encoder.block.1.layer.0.SelfAttention.q.weight": torch.zeros(64, 64)}


def as_umt5(state):
    return state | {"encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight": torch.zeros(32, 2)}


def as_t5_1_0(state):
    return {name.replace("wi_0", "wi"): tensor for name, tensor in state.items()}


def as_t5_base(state):
    return state | {"shared.weight": torch.zeros(32128, 768), "encoder.final_layer_norm.weight": torch.zeros(768)}


def as_clip_g(state):
    return state | {"text_model.embeddings.token_embedding.weight": torch.zeros(49408, 1280, dtype=torch.float16)}


def as_long_clip(state):
    return state | {"text_model.embeddings.position_embedding.weight": torch.zeros(248, 64)}


@pytest.mark.parametrize(
    ("load", "name", "change", "words"),
    [
        (load_t5, "t5xxl.safetensors", as_umt5, "T5 v1.1 XXL.*UMT5.*Wan"),
        (load_t5, "t5xxl.safetensors", as_t5_1_0, "T5 1.0"),
        (load_t5, "t5xxl.safetensors", as_t5_base, "T5 base .width 768."),
        (
            load_t5,
            "t5xxl.safetensors",
            without("encoder.final_layer_norm.weight"),
            r"Download the file again.*of 21 tensors: 1 missing \(encoder.final_layer_norm",
        ),
        (load_t5, "t5xxl.safetensors", without("shared.weight"), "lacks the table shared.weight"),
        (load_t5, "t5xxl.safetensors", widened, r"q.weight \[64, 64\], expected \[128, 64\]"),
        (load_t5, "clip_l.safetensors", dict, "Give a T5.*a CLIP text encoder"),
        (load_clip, "t5xxl.safetensors", dict, "Give CLIP-L.*a T5 encoder"),
        (load_clip, "clip_l.safetensors", as_clip_g, "CLIP-G"),
        (load_clip, "clip_l.safetensors", as_long_clip, "248 positions"),
        (load_clip, "clip_l.safetensors", without("text_model.final_layer_norm.bias"), "of 36 tensors: 1 missing"),
        (load_clip, "hunyuan_vae.safetensors", dict, "VAE"),
    ],
)
def test_wrong_files(load, name, change, words, rewritten, tiny_checkpoint):
    with pytest.raises(CheckpointError, match=words):
        load(rewritten(name, change), FP32, "cpu", tokenizers=tiny_checkpoint)


def test_truncated_and_absent_files(tiny_checkpoint, tmp_path):
    path = tmp_path / "t5xxl.safetensors"
    path.write_bytes((tiny_checkpoint / path.name).read_bytes()[:-100])
    for wrong in (path, tmp_path / "absent.safetensors", tmp_path):
        with pytest.raises(CheckpointError):
            load_t5(wrong, FP32, "cpu", tokenizers=tiny_checkpoint)


def test_unknown_tensors_are_named_once(rewritten, tiny_checkpoint, caplog):
    path = rewritten("clip_l.safetensors", lambda state: state | {"surprise.weight": torch.zeros(2)})
    load_clip(path, FP32, "cpu", tokenizers=tiny_checkpoint)
    assert [record.levelname for record in caplog.records] == ["WARNING"] and "surprise.weight" in caplog.text


# Where tokenizers are


@pytest.fixture
def bare_home(tmp_path, monkeypatch):
    """Encoders without tokenizers, on a machine where no ComfyUI is found."""
    monkeypatch.setattr(tokens.Path, "home", lambda: tmp_path)
    monkeypatch.setattr(tokens, "__file__", str(tmp_path / "site-packages" / "tokens.py"))
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    models = tmp_path / "models"
    models.mkdir()
    return models


def comfyui(root, tiny_checkpoint):
    """The part of a ComfyUI that holds tokenizers."""
    for source, place in ((T5_FOLDER, "text_encoders/t5_tokenizer"), (CLIP_FOLDER, "sd1_tokenizer")):
        ignored = shutil.ignore_patterns("*.bin", "*.safetensors", "spiece.model")  # a ComfyUI has tokenizer.json alone
        shutil.copytree(tiny_checkpoint / source, root / "comfy" / place, ignore=ignored)


def test_tokenizers_of_a_comfyui(bare_home, tiny_checkpoint, tmp_path, monkeypatch, t5, clip):
    path = shutil.copy(tiny_checkpoint / "t5xxl.safetensors", bare_home)
    with pytest.raises(
        CheckpointError, match="^Put spiece.model.*--tokenizers.*COMFYUI_PATH.*no T5 tokenizer was found for t5xxl.safetensors"
    ):
        load_t5(path, FP32, "cpu")
    with pytest.raises(CheckpointError, match="vocab.json and merges.txt.*no CLIP tokenizer"):
        load_clip(shutil.copy(tiny_checkpoint / "clip_l.safetensors", bare_home), FP32, "cpu")
    comfyui(tmp_path / "elsewhere", tiny_checkpoint)
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path / "elsewhere"))
    loaded = load_t5(path, FP32, "cpu")
    assert loaded.tokenizer.folder.parts[-3:] == ("comfy", "text_encoders", "t5_tokenizer")
    assert torch.equal(loaded.tokenize(TEXTS[:2]), t5.tokenize(TEXTS[:2]))
    assert loaded.tokenizer.size == t5.tokenizer.size
    other = load_clip(bare_home / "clip_l.safetensors", FP32, "cpu")
    assert torch.equal(other.tokenize(TEXTS), clip.tokenize(TEXTS))


@pytest.mark.parametrize("place", ["comfy/ComfyUI", "."])
def test_a_comfyui_is_found_at_home_or_around_the_models(place, bare_home, tiny_checkpoint, tmp_path):
    comfyui(tmp_path / place, tiny_checkpoint)
    encoder = bare_home / "text_encoders" / "t5xxl.safetensors"
    assert tokens.find_tokenizer(T5, encoder) == tmp_path / place / "comfy" / "text_encoders" / "t5_tokenizer"
    assert tokens.find_tokenizer(CLIP, encoder).name == "sd1_tokenizer"


def test_a_named_folder_is_the_only_one_searched(tiny_checkpoint, tmp_path):
    encoder = tiny_checkpoint / "t5xxl.safetensors"
    assert tokens.find_tokenizer(T5, encoder) == tiny_checkpoint / T5_FOLDER
    assert tokens.find_tokenizer(T5, encoder, tiny_checkpoint / T5_FOLDER) == tiny_checkpoint / T5_FOLDER
    for folder in (tmp_path, tiny_checkpoint / CLIP_FOLDER):
        with pytest.raises(CheckpointError, match="here is no T5 tokenizer in"):
            tokens.find_tokenizer(T5, encoder, folder)


def test_damaged_or_foreign_tokenizers(tiny_checkpoint, tmp_path, rewritten):
    (tmp_path / "spiece.model").write_bytes(b"not a model")
    with pytest.raises(CheckpointError, match="T5 tokenizer in .* cannot be read"):
        load_t5(tiny_checkpoint / "t5xxl.safetensors", FP32, "cpu", tokenizers=tmp_path)
    path = rewritten("clip_l.safetensors", lambda s: s | {"text_model.embeddings.token_embedding.weight": torch.zeros(300, 64)})
    with pytest.raises(CheckpointError, match="has 49408 tokens and clip_l.safetensors has 300"):
        load_clip(path, FP32, "cpu", tokenizers=tiny_checkpoint)
