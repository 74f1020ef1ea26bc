"""The text nodes inside a host: tokens and values are the transformers library's on the same tokenizer and weight files."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import comfy.sd as comfy_sd
import pytest
import torch
from comfy.text_encoders.sd3_clip import SD3ClipModel
from safetensors.torch import load_file, save_file

TEXTS = [
    "",
    "raining, sea. 24 FPS. 4 motion score.",
    "a (cat:1.3), [a {dog}], \\(literal\\) embedding:none  two  spaces\nand a line",
    "naïve café 北京 🐈",
    "a red cat, " * 250,
]


def relative(found, expected):
    return float((found.float() - expected.float()).norm() / expected.float().norm())


@pytest.fixture(scope="module")
def text(pack):
    return pack("nodes.host.text")


@pytest.fixture(scope="module")
def folder(base):
    return base / "models" / "text_encoders"


@pytest.fixture(scope="module")
def files(folder):
    return str(folder / "t5xxl.safetensors"), str(folder / "clip_l.safetensors")


@pytest.fixture(scope="module")
def clip(text, files):
    return text.load_text_encoders(*files)


@pytest.fixture(scope="module")
def reference(folder):
    """text -> (T5 ids, CLIP ids, T5 states, CLIP pooled) by the transformers library, on the host's tokenizer files and the tiny weights."""
    import transformers

    host = Path(comfy_sd.__file__).parent
    t5_tokens = transformers.T5TokenizerFast.from_pretrained(host / "text_encoders" / "t5_tokenizer")
    clip_tokens = transformers.CLIPTokenizer.from_pretrained(host / "sd1_tokenizer")
    sizes = {"d_model": 64, "d_kv": 64, "num_heads": 2, "d_ff": 128, "num_layers": 2, "feed_forward_proj": "gated-gelu"}
    t5 = transformers.T5EncoderModel(transformers.T5Config(vocab_size=32128, **sizes)).train(False)
    t5.load_state_dict(fp32(folder / "t5xxl.safetensors"), strict=False)
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 1, "num_hidden_layers": 2}
    config = transformers.CLIPTextConfig(vocab_size=49408, bos_token_id=49406, eos_token_id=49407, pad_token_id=49407, **sizes)
    encoder = transformers.CLIPTextModel(config).train(False)
    weights = {key: value for key, value in fp32(folder / "clip_l.safetensors").items() if key.startswith("text_model.")}
    bare = {key.removeprefix("text_model."): value for key, value in weights.items()}
    encoder.load_state_dict(bare if "embeddings.token_embedding.weight" in encoder.state_dict() else weights)  # transformers 5, 4

    @torch.inference_mode()
    def encode(prompt):
        padded = {"truncation": True, "padding": "max_length", "return_tensors": "pt"}
        ids = t5_tokens(prompt, max_length=512, **padded).input_ids, clip_tokens(prompt, max_length=77, **padded).input_ids
        return *ids, t5(input_ids=ids[0]).last_hidden_state, encoder(input_ids=ids[1]).pooler_output

    return encode


def fp32(path):
    return {key: value.float() for key, value in load_file(path).items()}


@pytest.mark.parametrize("prompt", TEXTS, ids=range(len(TEXTS)))
def test_tokens_and_values_are_the_librarys(text, clip, reference, prompt):
    t5_ids, clip_ids, states, pooled = reference(prompt)
    tokens, note = text.exact_tokens(clip.tokenizer, prompt)
    assert [token for token, _ in tokens["t5xxl"][0]] == t5_ids[0].tolist()
    assert [token for token, _ in tokens["l"][0]] == clip_ids[0].tolist()
    assert bool(note) == (len(prompt) > 2000)
    with torch.inference_mode():
        [[found, values]], _ = text.encode(clip, prompt)
        [[stock, stock_values]] = clip.encode_from_tokens_scheduled(clip.tokenize(prompt))  # what CLIPTextEncode does
    assert found.shape == (1, 512, 64) and values["pooled_output"].shape == (1, 64)
    assert relative(found, states) < 1e-5 and relative(values["pooled_output"], pooled) < 1e-5
    assert torch.equal(stock, found) and torch.equal(stock_values["pooled_output"], values["pooled_output"])


def test_typography_is_mended_for_clip_and_left_for_t5(text, clip):
    """The ids are those of the reference's tokenizers on the released files."""

    def ids(prompt, name):
        row = [token for token, _ in text.exact_tokens(clip.tokenizer, prompt)[0][name][0]]
        return row[: row.index(row[-1]) if name == "l" else row.index(1) + 1]

    assert ids("the circle\u2019s edge", "l") == [49406, 518, 7117, 568, 5461]
    assert ids("a \u201cred\u201d circle", "l") == ids('a "red" circle', "l")
    assert ids("the circle\u2019s edge", "t5xxl") != ids("the circle's edge", "t5xxl")
    assert ids("red</s>", "t5xxl") == ids("red", "t5xxl") == [1131, 1]
    assert ids("re\x01d", "t5xxl") == [1131, 1]


def test_the_hosts_own_clip_is_exact_through_our_encoder(text, files, clip):
    """A CLIP from the host's loader (DualCLIPLoader type flux calls this) reads "(word:1.3)" as a weight; ours takes it literally."""
    options = {
        **text._t5_overrides(text.read_encoder(files[0])),
        **text._clip_overrides(text.read_encoder(files[1])),
        "dtype": torch.float16,
    }
    stock = comfy_sd.load_clip(list(files), clip_type=comfy_sd.CLIPType.FLUX, model_options=options)
    prompt = TEXTS[2]
    with torch.inference_mode():
        [[ours, values]], _ = text.encode(clip, prompt)
        [[found, found_values]], _ = text.encode(stock, prompt)
        [[plain, _]] = stock.encode_from_tokens_scheduled(stock.tokenize(prompt))
    assert torch.equal(ours, found) and torch.equal(values["pooled_output"], found_values["pooled_output"])
    assert plain.shape != ours.shape  # the host's own recipe: 256 tokens


def test_released_sizes_need_no_overrides(pack, text):
    identify = pack("opensora_core.checkpoint.detect").identify
    shapes = pack("opensora_core.encoders.t5").t5_manifest(), pack("opensora_core.encoders.clip").clip_manifest()
    t5, clip_l = (
        text.EncoderFile("file", identify(each), {name: torch.empty(shape, device="meta") for name, shape in each.items()})
        for each in shapes
    )
    assert text.sort_files(clip_l, t5) == (t5, clip_l)
    assert text._t5_overrides(t5) == text._clip_overrides(clip_l) == {}


@pytest.mark.parametrize(
    ("t5", "clip_l", "known", "expected"),
    [
        (torch.float16, torch.float16, True, torch.float16),
        (torch.bfloat16, torch.float16, True, torch.float16),  # the host keeps T5 as stored
        (torch.float8_e4m3fn, torch.float16, True, torch.float16),
        (torch.float32, torch.float16, True, torch.float32),
        (torch.bfloat16, torch.float16, False, torch.float32),  # one type for both: neither may be rounded
        (torch.float32, torch.float32, False, torch.float32),
    ],
)
def test_neither_encoder_is_rounded(text, t5, clip_l, known, expected):
    t5_state = {"encoder.final_layer_norm.weight": torch.zeros(1, dtype=t5)}
    if known:
        t5_state["encoder.block.23.layer.1.DenseReluDense.wi_1.weight"] = torch.zeros(1)
    assert text._load_dtype(t5_state, {"text_model.final_layer_norm.weight": torch.zeros(1, dtype=clip_l)}) == expected


def test_word_ids_for_nodes_that_ask(clip):
    tokens = clip.tokenize("a cat", return_word_ids=True)
    assert len(tokens["t5xxl"][0]) == 512 and len(tokens["t5xxl"][0][0]) == 3
    assert clip.clone().tokenizer is clip.tokenizer


def test_node(text, clip, run_node):
    inputs = {"clip": clip, "prompt": "raining, sea", "negative_prompt": ""}
    positive, negative, encoded = run_node("OpenSoraT5TextEncode", **inputs, motion_score=4, fps=24)
    *_, plain = run_node("OpenSoraT5TextEncode", **inputs, motion_score=0, fps=0)
    assert encoded == "raining, sea. 24 FPS. 4 motion score." and plain == "raining, sea."
    with torch.inference_mode():
        assert torch.equal(positive[0][0], text.encode(clip, encoded)[0][0][0])
        assert torch.equal(negative[0][0], text.encode(clip, "")[0][0][0])


def test_a_cut_prompt_is_said_once_and_nothing_else_is_logged(clip, run_node, caplog):
    run_node("OpenSoraT5TextEncode", clip=clip, prompt=TEXTS[-1], negative_prompt="", motion_score=4, fps=24)
    [record] = [record for record in caplog.records if record.levelname == "WARNING"]
    assert "tokens longer than the 512 that T5 reads" in record.getMessage()


def test_loader_node(run_node, clip):
    (found,) = run_node(
        "OpenSoraTextEncoderLoader", t5_name="t5xxl.safetensors", clip_l_name="clip_l.safetensors", precision="auto", device="auto"
    )
    (stock,) = run_node("CLIPTextEncode", clip=found, text="a cat")
    positive, *_ = run_node("OpenSoraT5TextEncode", clip=clip, prompt="a cat.", negative_prompt="", motion_score=0, fps=0)
    assert not torch.equal(stock[0][0], positive[0][0])  # the full stop
    (stock,) = run_node("CLIPTextEncode", clip=found, text="a cat.")
    assert torch.equal(stock[0][0], positive[0][0])


@pytest.mark.parametrize("swap", [False, True], ids=["as named", "the other way round"])
def test_loader_takes_the_files_in_either_order(text, files, clip, swap):
    t5, clip_l = files
    found = text.load_text_encoders(clip_l, t5) if swap else text.load_text_encoders(t5, clip_l)
    with torch.inference_mode():
        assert torch.equal(text.encode(found, "a cat")[0][0][0], text.encode(clip, "a cat")[0][0][0])


@pytest.mark.parametrize(
    ("precision", "least", "most"), [("auto", 0, 1e-5), ("bf16", 1e-4, 2e-2), ("fp8_e4m3fn", 1e-3, 1e-1), ("int8", 1e-4, 5e-2)]
)
def test_precisions(text, files, reference, precision, least, most):
    found = text.load_text_encoders(*files, precision, "cpu")
    *_, states, pooled = reference("a cat")
    with torch.inference_mode():
        [[context, values]], _ = text.encode(found, "a cat")
    assert least <= relative(context, states) < most
    assert relative(values["pooled_output"], pooled) < (2e-2 if precision == "bf16" else 1e-5)
    assert found.patcher.load_device == torch.device("cpu")


def test_a_reload_for_clones_is_the_same_encoder(text, files, clip):
    load, arguments = clip.patcher.cached_patcher_init
    again = load(*arguments, disable_dynamic=True)
    ours = clip.cond_stage_model.state_dict()
    assert all(torch.equal(tensor, ours[key]) for key, tensor in again.model.state_dict().items())


def test_a_clip_l_of_longer_position_table(text, files, tmp_path):
    weights = load_file(files[1])
    key = "text_model.embeddings.position_embedding.weight"
    weights[key] = torch.cat([weights[key], torch.zeros(248 - 77, 64, dtype=weights[key].dtype)])
    save_file(weights, tmp_path / "long.safetensors")
    found = text.load_text_encoders(files[0], str(tmp_path / "long.safetensors"))
    assert len(text.exact_tokens(found.tokenizer, "a cat")[0]["l"][0]) == 248
    with torch.inference_mode():
        assert text.encode(found, "a cat")[0][0][1]["pooled_output"].shape == (1, 64)


def test_files_that_are_no_text_encoders(text, files, base, tmp_path):
    t5, clip_l = files
    error = text.CheckpointError
    with pytest.raises(error, match=r"Give a T5.*hunyuan_vae.safetensors is a HunyuanVideo-layout VAE.*VAE slot"):
        text.load_text_encoders(str(base / "models" / "vae" / "hunyuan_vae.safetensors"), clip_l)
    with pytest.raises(error, match=r"Give a T5.*clip_l.safetensors is a CLIP text encoder"):
        text.load_text_encoders(clip_l, clip_l)
    with pytest.raises(error, match=r"Give CLIP-L.*t5xxl.safetensors is a T5 encoder"):
        text.load_text_encoders(t5, t5)
    weights = load_file(t5)
    del weights["encoder.block.1.layer.1.DenseReluDense.wo.weight"]
    save_file(weights, tmp_path / "t5_without.safetensors")
    with pytest.raises(error, match=r"t5_without.safetensors.*not whole.*1 missing \(encoder.block.1.layer.1.DenseReluDense.wo.weight\)"):
        text.load_text_encoders(str(tmp_path / "t5_without.safetensors"), clip_l)
    weights = load_file(t5)
    weights["shared.weight"] = weights["shared.weight"][:500]
    save_file(weights, tmp_path / "words.safetensors")
    with pytest.raises(error, match="words.safetensors.*with a vocabulary of 500; ComfyUI's tokenizer is the released one, of 32,128"):
        text.load_text_encoders(str(tmp_path / "words.safetensors"), clip_l)
    weights = {key: tensor for key, tensor in load_file(clip_l).items() if ".layers.1." not in key}
    save_file(weights, tmp_path / "layer.safetensors")
    with pytest.raises(error, match=r"layer.safetensors is a CLIP text encoder.*without text_model.encoder.layers.1.mlp.fc1.weight"):
        text.load_text_encoders(t5, str(tmp_path / "layer.safetensors"))
    shutil.copy(t5, tmp_path / "cut.safetensors")
    with open(tmp_path / "cut.safetensors", "r+b") as file:
        file.truncate(1_000_000)
    with pytest.raises(error, match=r"cut.safetensors is truncated"):
        text.load_text_encoders(str(tmp_path / "cut.safetensors"), clip_l)
    scaled = text.read_encoder(t5)
    text._set_precision(scaled, text.read_encoder(clip_l), "fp8_e4m3fn")
    save_file(scaled.state, tmp_path / "t5_scaled.safetensors")
    with pytest.raises(error, match="Use precision auto.*already quantised"):
        text.load_text_encoders(str(tmp_path / "t5_scaled.safetensors"), clip_l, "bf16")
    assert text.load_text_encoders(str(tmp_path / "t5_scaled.safetensors"), clip_l)


def test_other_clips_are_refused(text, files):
    clip_l = text.read_encoder(files[1])
    sd15 = comfy_sd.load_text_encoder_state_dicts([clip_l.state], model_options=text._clip_overrides(clip_l))
    sd3 = SimpleNamespace(cond_stage_model=SD3ClipModel(clip_l=False, clip_g=False, t5=False))
    for found, name in ((sd15, "SD1ClipModel"), (sd3, "SD3ClipModel"), (None, "no text encoder")):
        with pytest.raises(text.OpenSoraError, match=f"type flux: this CLIP holds .*{name}.*T5-XXL and CLIP-L together"):
            text.encode(found, "a cat")


def encode_node(run_node, clip, prompt, keep=True):
    inputs = {"clip": clip, "prompt": prompt, "negative_prompt": "", "motion_score": 0, "fps": 0, "keep_encoded": keep}
    return run_node("OpenSoraT5TextEncode", **inputs)[:2]


@pytest.fixture
def encoded(clip, pack, monkeypatch):
    """The texts that the encoders were asked for from now on; nothing is kept before or after."""
    texts, encode = [], pack("nodes.host.text").encode
    monkeypatch.setattr(pack("nodes.host.text"), "encode", lambda clip, text, *recipe: (texts.append(text), encode(clip, text, *recipe))[1])
    pack("opensora_core.memory.loaded").PROMPTS.clear()
    yield texts
    pack("opensora_core.memory.loaded").PROMPTS.clear()


def test_a_kept_prompt_needs_no_encoder(encoded, clip, run_node, pack):
    (first, _), (again, _) = encode_node(run_node, clip, "a kept cat."), encode_node(run_node, clip.clone(), "a kept cat.")
    assert encoded == ["a kept cat.", ""]
    assert torch.equal(first[0][0], again[0][0]) and torch.equal(first[0][1]["pooled_output"], again[0][1]["pooled_output"])
    again[0][1]["pooled_output"] = None  # what a later node does to its conditioning stays with it
    assert encode_node(run_node, clip, "a kept cat.")[0][0][1]["pooled_output"] is not None
    encode_node(run_node, clip, "another cat.")
    encode_node(run_node, clip, "a kept cat.", keep=False)
    assert encoded[2:] == ["another cat.", "a kept cat.", ""]


def test_other_encoders_are_asked_anew(encoded, clip, text, files, run_node):
    encode_node(run_node, clip, "a kept cat.")
    encode_node(run_node, text.load_text_encoders(*files, "bf16"), "a kept cat.")
    assert encoded == ["a kept cat.", ""] * 2
    fresh = text.load_text_encoders(*files)
    encode_node(run_node, fresh, "a kept cat.")  # the same files in the same way
    assert encoded == ["a kept cat.", ""] * 2
    key = next(key for key in fresh.patcher.model.state_dict() if key.endswith("weight"))
    assert fresh.patcher.add_patches({key: (torch.zeros_like(fresh.patcher.model.state_dict()[key]),)}) == [key]
    encode_node(run_node, fresh, "a kept cat.")
    assert encoded == ["a kept cat.", ""] * 3
    (skipping,) = run_node("CLIPSetLastLayer", clip=clip, stop_at_clip_layer=-2)
    encode_node(run_node, skipping, "a kept cat.")
    assert encoded == ["a kept cat.", ""] * 4


def test_a_clip_that_does_not_say_its_files_is_encoded_each_time(encoded, text, files, run_node, caplog):
    clip = text.load_text_encoders(*files)
    clip.patcher.cached_patcher_init = None
    for _ in range(2):
        encode_node(run_node, clip, "a cat.")
    assert len(encoded) == 4
    assert "does not say which files" in caplog.text
