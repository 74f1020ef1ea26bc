"""The prompt helper with a tiny random text model of the kind that the host's Generate Text takes, and what is asked of it."""

import pytest
import torch

SIZES = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1}


@pytest.fixture(scope="module")
def writer():
    """A host CLIP of a Qwen3 text model: the released tokenizer and two small layers of random weights."""
    import comfy.sd
    import comfy.supported_models_base
    import comfy.text_encoders.z_image as qwen

    torch.manual_seed(0)
    target = comfy.supported_models_base.ClipTarget(qwen.ZImageTokenizer, qwen.te())
    clip = comfy.sd.CLIP(target, model_options={"qwen3_4b_model_config": SIZES}, parameters=10**7)
    for part in clip.cond_stage_model.parameters():
        torch.nn.init.normal_(part, std=0.05)
    return clip


def given(**changed) -> dict:
    return {"prompt": "风筝", "kind": "text to video", "seed": 1, "max_length": 16, "temperature": 0.7, **changed}


def test_a_random_text_model_writes(writer, run_node):
    one, again, other = (run_node("OpenSoraPromptHelper", clip=writer, **given(seed=seed)) for seed in (1, 1, 2))
    assert one == again and one[0] != other[0] and isinstance(one[0], str) and 1 <= one[1] <= 15
    likeliest = [run_node("OpenSoraPromptHelper", clip=writer, **given(seed=seed, temperature=0.0)) for seed in (1, 2)]
    assert likeliest[0] == likeliest[1]


def test_what_is_asked_is_the_question_in_the_models_own_template(writer, run_node, pack, monkeypatch):
    asked = {}
    monkeypatch.setattr(writer, "generate", lambda tokens, **settings: asked.update(tokens=tokens, settings=settings) or [1])
    monkeypatch.setattr(writer, "decode", lambda ids: "A red kite climbs.\nMotion score: 9")
    assert run_node("OpenSoraPromptHelper", clip=writer, **given()) == ("A red kite climbs.", 9)
    text = writer.tokenizer.qwen3_4b.tokenizer.decode([token for token, _ in asked["tokens"]["qwen3_4b"][0]])
    question = pack("opensora_core.text.refine").asked("风筝", "text to video")
    assert text == f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    assert {name: asked["settings"][name] for name in ("do_sample", "seed", "max_length", "temperature")} == {
        "do_sample": True,
        "seed": 1,
        "max_length": 16,
        "temperature": 0.7,
    }


@pytest.mark.parametrize("sees", [True, False])
def test_a_picture_is_shown_to_a_model_that_sees(sees, writer, run_node, monkeypatch):
    asked = {}
    monkeypatch.setattr(writer, "tokenize", lambda text, **media: asked.update(text=text, **media) or {})
    monkeypatch.setattr(writer, "generate", lambda tokens, **settings: [1])
    monkeypatch.setattr(writer, "decode", lambda ids: "It climbs.")
    if sees:
        network = writer.cond_stage_model.qwen3_4b.transformer
        monkeypatch.setattr(type(network), "preprocess_embed", lambda self, *a: None, raising=False)
    picture = torch.rand(3, 8, 8, 3)
    assert run_node("OpenSoraPromptHelper", clip=writer, image=picture, **given(prompt="", kind="image to video")) == ("It climbs.", 4)
    assert (asked["image"] is not None) == sees and ("do not see the picture" in asked["text"]) == (not sees)
    assert not sees or asked["image"].shape == (1, 8, 8, 3)


def test_a_clip_that_reads_alone_is_one_sentence(run_node, pack):
    clip = run_node(
        "OpenSoraTextEncoderLoader", t5_name="t5xxl.safetensors", clip_l_name="clip_l.safetensors", precision="auto", device="auto"
    )[0]
    with pytest.raises(pack("opensora_core.errors").OpenSoraError, match="CLIPLoader.*reads prompts and writes none"):
        run_node("OpenSoraPromptHelper", clip=clip, **given())


def test_edited_text_asks_no_model(run_node):
    import nodes

    assert run_node("OpenSoraPromptHelper", clip=None, **given(edited=" A kite. ")) == ("A kite.", 4)
    node = nodes.NODE_CLASS_MAPPINGS["OpenSoraPromptHelper"]
    assert node.check_lazy_status(**given(edited="A kite.")) == [] and node.check_lazy_status(**given()) == ["clip"]


def test_an_empty_prompt_is_said(writer, run_node, pack):
    with pytest.raises(pack("opensora_core.errors").OpenSoraError, match="the prompt is empty"):
        run_node("OpenSoraPromptHelper", clip=writer, **given(prompt=" "))
