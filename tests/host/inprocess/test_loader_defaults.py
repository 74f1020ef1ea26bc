"""What a new loader begins with: a file that really is what its slot needs, else the built-in model; headers are read once."""

import os
import shutil

import pytest

SLOTS = {
    "OpenSoraModelLoader": ("model_name", "diffusion_models", "Open_Sora_v2.safetensors"),
    "OpenSoraVAELoader": ("vae_name", "vae", "hunyuan_vae.safetensors"),
    "OpenSoraTextEncoderLoader": ("t5_name", "text_encoders", "t5xxl.safetensors"),
}


def first(name: str) -> str:
    """What the host shows in a new node."""
    import nodes

    widget, *_ = SLOTS.get(name, ("clip_l_name",))
    return next(item for item in nodes.NODE_CLASS_MAPPINGS[name].define_schema().inputs if item.id == widget).options[0]


@pytest.fixture
def others(base):
    """Files that come first in the alphabet and are something else: put(folder, name, source)."""
    made = []

    def put(folder: str, name: str, source=None) -> str:
        path = base / "models" / folder / name
        path.touch() if source is None else shutil.copy(source, path)
        made.append(path)
        return name

    yield put
    for path in made:
        path.unlink(missing_ok=True)


@pytest.fixture(autouse=True)
def _only_those(base, tmp_path):
    """What tests of other models left in these folders is away meanwhile."""
    known = {right for _, _, right in SLOTS.values()} | {"clip_l.safetensors"}
    away = {}
    for folder in ("diffusion_models", "vae", "text_encoders"):
        for path in (base / "models" / folder).iterdir():
            if path.name not in known:
                away[path] = tmp_path / f"{len(away)}"
                path.rename(away[path])
    yield
    for path, place in away.items():
        place.rename(path)


@pytest.mark.parametrize("name", SLOTS)
def test_the_first_choice_is_what_the_slot_needs(name, others, base):
    _, folder, right = SLOTS[name]
    wrong = (
        base
        / "models"
        / ("vae" if folder != "vae" else "text_encoders")
        / ("hunyuan_vae.safetensors" if folder != "vae" else "clip_l.safetensors")
    )
    others(folder, "0_other.safetensors", wrong)
    others(folder, "0_empty.safetensors")
    others(folder, "0_old.ckpt")
    assert first(name) == right


def test_without_one_it_is_the_built_in_model(others, base, pack):
    paths = pack("nodes.host.paths")
    right = base / "models" / "vae" / "hunyuan_vae.safetensors"
    away = right.with_suffix(".away")
    right.rename(away)
    try:
        others("vae", "0_other.safetensors", base / "models" / "text_encoders" / "clip_l.safetensors")
        names = paths.choices("vae", "vae")
        assert names[0] == paths.SMALL and "0_other.safetensors" in names
    finally:
        away.rename(right)


def test_a_header_is_read_once_until_the_file_changes(others, base, pack, monkeypatch):
    paths = pack("nodes.host.paths")
    read, real = [], paths.read_header
    monkeypatch.setattr(paths, "read_header", lambda path: read.append(str(path)) or real(path))
    others("vae", "0_mine.safetensors", base / "models" / "text_encoders" / "clip_l.safetensors")
    mine = str(base / "models" / "vae" / "0_mine.safetensors")
    for _ in range(3):
        assert first("OpenSoraVAELoader") == "hunyuan_vae.safetensors"
    assert read.count(mine) == 1
    shutil.copy(base / "models" / "vae" / "hunyuan_vae.safetensors", mine)
    os.utime(mine, ns=(10**18, 10**18))
    assert first("OpenSoraVAELoader") == "0_mine.safetensors" and read.count(mine) == 2
