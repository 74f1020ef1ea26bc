"""A short prompt becomes the description that the models were trained on: what is asked of a text model, what is read of its answer, and the
command line with a tiny random causal model."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from opensora_core.cli import main
from opensora_core.commands import refine
from opensora_core.errors import OpenSoraError
from opensora_core.media.recipe import recipe_of
from opensora_core.text.refine import IMAGE, KINDS, TEXT, answered, asked

SHORT = ["--num-frames", "5", "--num-steps", "1", "--seed", "3", "--device", "cpu"]
ANSWER = "Caption: A view of a red kite that climbs over wet dunes.\nMotion score: 9"


@pytest.fixture(scope="module")
def writer(tmp_path_factory) -> Path:
    """A folder of a causal model that transformers reads: a letter is a token, the weights are random."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("writer")
    letters = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab={**letters, "<end>": 256}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")
    fast.chat_template = "{% for message in messages %}user: {{ message.content }}\nassistant: {% endfor %}"
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 8192}
    LlamaForCausalLM(LlamaConfig(vocab_size=257, eos_token_id=256, pad_token_id=256, **sizes)).save_pretrained(folder)
    return folder


@pytest.fixture
def answering(monkeypatch) -> list[str]:
    """What the causal model is asked; it answers ANSWER."""
    from transformers import AutoTokenizer, LlamaForCausalLM

    questions = []

    def generate(self, ids, **settings):
        tokenizer = AutoTokenizer.from_pretrained(self.name_or_path)
        questions.append(tokenizer.decode(ids[0]))
        assert settings["do_sample"] is False
        return torch.cat((ids, tokenizer(ANSWER, return_tensors="pt").input_ids), 1)

    monkeypatch.setattr(LlamaForCausalLM, "generate", generate)
    return questions


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_asked_holds_the_request_and_every_rule(kind):
    question = asked("  一只红色风筝 {0} ", kind)
    assert question.endswith("\nRequest: 一只红色风筝 {0}")
    for word in ("English", "one paragraph", "Motion score: N", "No cuts", "80 to 120 words"):
        assert word in question


def test_pictures_are_described_only_where_they_are_seen():
    blind, seeing = asked("", IMAGE), asked("", IMAGE, sees_picture=True)
    assert "first frame" in blind and "do not see the picture" in blind and "Request: (none)" in blind
    assert "true to what you see" in seeing and "do not see" not in seeing
    assert "picture" not in asked("a kite", TEXT).replace("words in the picture", "")


@pytest.mark.parametrize(
    "answer, expected",
    [
        (ANSWER, ("A view of a red kite that climbs over wet dunes.", 9)),
        ('<think>\nMotion score: 2? no\n</think>\n"A fox\nruns."\n\n**Motion score: 12**\n', ("A fox runs.", 12)),
        ("```\nA fox runs.\n```\nMotion Score = 99", ("A fox runs.", 15)),
        ("A fox sleeps. 1 motion score.", ("A fox sleeps.", 1)),
        ("**Video description:** A fox sleeps.\nMotion score: **0**", ("A fox sleeps.", 1)),
        ("A fox runs.", ("A fox runs.", 4)),
        ("<think>it never ends", ("a fox", 4)),
        ("", ("a fox", 4)),
        ("\0 Motion score: 3", ("a fox", 3)),
    ],
)
def test_what_is_read_of_an_answer(answer, expected):
    assert answered(answer, " a fox ") == expected


@pytest.mark.parametrize("has_picture", [False, True])
def test_the_description_is_what_is_made(has_picture, writer, answering, tiny_checkpoint, tmp_path, capsys):
    given = []
    if has_picture:
        from PIL import Image

        Image.new("RGB", (64, 64), (200, 40, 40)).save(tmp_path / "first.png")
        given = ["--ref", str(tmp_path / "first.png")]
    size = ["--width", "48", "--height", "32", "--model", str(tiny_checkpoint)]
    out = tmp_path / "kite.mp4"
    refine = ["--refine-prompt", "--refine-model", str(writer)]
    assert main(["generate", "--prompt", "风筝", *given, *refine, *size, *SHORT, "--out", str(out)]) == 0
    assert answering == [f"user: {asked('风筝', IMAGE if has_picture else TEXT)}\nassistant: "]
    said = capsys.readouterr().err
    assert "A view of a red kite that climbs over wet dunes. (motion score 9)" in said
    assert out.with_suffix(".txt").read_text(encoding="utf-8").strip().endswith("wet dunes. 24 FPS. 9 motion score.")
    recipe = recipe_of(out)
    assert (recipe["prompt"], recipe["request"], recipe["settings"]["motion_score"]) == (answered(ANSWER, "")[0], "风筝", 9)
    assert str(writer) not in json.dumps(recipe) and "refine_prompt" not in recipe["settings"]


def test_a_motion_score_that_a_person_said_stays(writer, answering, tiny_checkpoint, tmp_path):
    more = ["--width", "48", "--height", "32", "--model", str(tiny_checkpoint), "--motion-score", "2", *SHORT]
    out = tmp_path / "kite.mp4"
    assert main(["generate", "--prompt", "kite", "--refine-prompt", "--refine-model", str(writer), *more, "--out", str(out)]) == 0
    assert recipe_of(out)["settings"]["motion_score"] == 2


def test_rows_are_described_once_and_not_again(writer, answering, tiny_checkpoint, tmp_path):
    (tmp_path / "list.csv").write_text("prompt,motion_score\nkite,\nfox,7\nkite,\n", encoding="utf-8")
    more = ["--width", "48", "--height", "32", "--model", str(tiny_checkpoint), *SHORT, "--out", str(tmp_path / "out")]
    command = ["generate", "--csv", str(tmp_path / "list.csv"), "--refine-prompt", "--refine-model", str(writer), *more]
    assert main(command) == 0
    assert len(answering) == 2, "a question for each prompt"
    videos = sorted((tmp_path / "out").glob("*.mp4"))
    assert [video.name for video in videos] == ["0001_kite.mp4", "0002_fox.mp4", "0003_kite.mp4"]
    assert [recipe_of(video)["settings"]["motion_score"] for video in videos] == [9, 7, 9]
    assert main(command) == 0 and len(answering) == 2


def test_a_random_model_runs_to_its_end(writer, tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("opensora_core.commands.refine._MOST_TOKENS", 12)
    more = ["--width", "48", "--height", "32", "--model", str(tiny_checkpoint), *SHORT, "--out", str(tmp_path / "a.mp4")]
    assert main(["generate", "--prompt", "kite", "--refine-prompt", "--refine-model", str(writer), *more]) == 0


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--refine-prompt"], "Add --refine-model DIR"),
        (["--refine-model", "x"], "Add --refine-prompt"),
        (["--refine-prompt", "--refine-model", "nowhere"], "no config.json in it"),
    ],
)
def test_what_does_not_go_together_is_said(words, sentence, capsys):
    assert main(["generate", "--prompt", "kite", *words]) == 2
    assert sentence in capsys.readouterr().err


def test_a_folder_of_another_model_is_said(writer, tmp_path, capsys):
    for file in writer.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text('{"model_type": "nonsense"}')
    assert main(["generate", "--prompt", "kite", *SHORT, "--refine-prompt", "--refine-model", str(tmp_path), "--out", str(tmp_path)]) == 2
    assert "cannot be read as a causal model" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", '{"model_type": ["llama"]}', '{"model_type": "llama", "hidden_size": {}}', "\0"])
def test_a_damaged_folder_is_one_sentence(writer, tmp_path, text):
    for file in writer.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(OpenSoraError, match="cannot be read as a causal model"):
        refine._answers({("kite", TEXT)}, str(tmp_path), "cpu")


def test_a_text_model_that_is_not_whole_is_refused(writer, tmp_path):
    for file in writer.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    state = load_file(tmp_path / "model.safetensors")
    del state["model.norm.weight"]
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(OpenSoraError, match=r"its files lack 1 tensors, the first is model\.norm\.weight"):
        refine._answers({("kite", TEXT)}, str(tmp_path), "cpu")
