"""Tests against a real ComfyUI: over HTTP and its websocket, and inside its own interpreter (inprocess/).

Everything is skipped, with one line, where no ComfyUI is found (demo/comfy.py says where it is looked for).
"""

import os
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
INPROCESS = HERE / "inprocess"
MODEL_FOLDERS = {
    "Open_Sora_v2.safetensors": "diffusion_models",
    "hunyuan_vae.safetensors": "vae",
    "t5xxl.safetensors": "text_encoders",
    "clip_l.safetensors": "text_encoders",
}
# Of the high-compression variant: recorded small weights, and where they stand for the released files.
HIGH_COMPRESSION = {
    "dc_ae_transformer_weights.safetensors": "diffusion_models/Open_Sora_v2_Video_DC_AE.safetensors",
    "dc_ae_weights.safetensors": "vae/F32T4C128_AE.safetensors",
}

COGVIDEOX = {  # as templates name them
    "2b": "diffusion_pytorch_model.safetensors",
    "1.5_5b": "CogVideoX_1_5_5b_T2V_bf16.safetensors",
    "1.5_5b_i2v": "CogVideoX_1_5_5b_I2V_bf16.safetensors",
}

collect_ignore = ["inprocess"]  # these import the host, so the host's interpreter collects them (fixture `inprocess_results`)


ABSENT = "no ComfyUI found: tests/host did not run (README.md, Tests)"


def pytest_collection_modifyitems(config, items):
    from demo import comfy

    ours = [item for item in items if HERE in item.path.parents]
    for item in ours:
        item.add_marker(pytest.mark.host)
    needing = [item for item in ours if "installation" in item.fixturenames]
    if needing and comfy.find() is None:
        # One line for all: pytest would print one for each test.
        needing[0].add_marker(pytest.mark.skip(reason=ABSENT))
        config.hook.pytest_deselected(items=needing[1:])
        items[:] = [item for item in items if item not in needing[1:]]


@pytest.fixture(scope="session")
def installation():
    """The ComfyUI to test against. No test of this folder that needs one runs without it."""
    from demo import comfy

    return comfy.find() or pytest.skip(ABSENT)


@pytest.fixture(scope="session")
def host_base(installation, tiny_checkpoint, tmp_path_factory) -> Path:
    """A base directory for the host: this pack under custom_nodes and random checkpoints in models/, Flux too."""
    from demo import comfy, tiny_flux
    from tests.golden import cogvideox_files, open_sora_1_files

    base = tmp_path_factory.mktemp("host")
    comfy.prepare_base(base)
    for name, folder in MODEL_FOLDERS.items():
        shutil.copy(tiny_checkpoint / name, base / "models" / folder / name)
    for name, place in HIGH_COMPRESSION.items():
        shutil.copy(HERE.parent / "golden" / name, base / "models" / place)
    for version, name, part in (
        ("1.2", "STDiT-v3", "shapes"), ("1.2", "VAE-v1.2", "vae_shapes"), ("1.3", "STDiT-v4", "shapes"), ("1.3", "STDiT-v4-i2v", "shapes"),
        ("1.3", "VAE-v1.3", "vae_shapes"),
    ):  # fmt: skip
        place = base / "models" / ("vae" if part == "vae_shapes" else "diffusion_models") / f"OpenSora-{name}.safetensors"
        save_file(open_sora_1_files.weights(version, part), place)
    save_file(open_sora_1_files.t5_weights(), base / "models" / "text_encoders" / "t5_1.safetensors")
    for name, file in COGVIDEOX.items():
        save_file(cogvideox_files.network(name).state_dict(), base / "models" / "diffusion_models" / file)
    save_file(cogvideox_files.vae().state_dict(), base / "models" / "vae" / "cogvideox_vae_bf16.safetensors")
    save_file(cogvideox_files.t5(), base / "models" / "text_encoders" / "t5_cogvideox.safetensors")
    for schnell in (True, False):
        for path in tiny_flux.write(tmp_path_factory.mktemp("flux"), schnell=schnell):
            shutil.copy(path, base / "models" / ("vae" if path.stem == "ae" else "diffusion_models"))
    return base


@pytest.fixture(scope="session")
def server(installation, host_base, small_checkpoint):
    """A running host on this machine, for the whole session: server.run(graph), server.get(path), server.log, server.base.

    In place of the built-in model it has one of the same sizes with random weights.
    """
    from demo import comfy

    with comfy.Server(installation, host_base, ("--cpu", "--preview-method", "latent2rgb")) as running:
        # Starting writes the pack anew; weights are read when a graph runs.
        pack = host_base / "custom_nodes" / comfy.PACK_FOLDER
        shutil.copytree(small_checkpoint, pack / "opensora_core" / "assets" / "small", dirs_exist_ok=True)
        yield running


@pytest.fixture
def listen(server):
    """Run a graph and hear what a front-end would: listen(graph) -> demo.listener.Events. `on_message` may act meanwhile."""
    from demo.listener import Listener

    def run(graph: dict, seconds: float = 120, on_message=None):
        with Listener(server.url) as listener:
            listener.on_message = on_message
            return listener.run(server, graph, seconds)

    return run


@pytest.fixture(scope="session")
def inprocess_results(request, installation, tiny_checkpoint, small_checkpoint, tmp_path_factory) -> dict[str, list[tuple[str, str]]]:
    """Outcome of every test in the chosen files of inprocess/, run once by the host's interpreter: file name -> [(test, "" or what failed)]."""
    chosen = [item.callspec.params["name"] for item in request.session.items if "inprocess_results" in item.fixturenames]
    folder = tmp_path_factory.mktemp("inprocess")
    report = folder / "report.xml"
    environment = {
        **os.environ,
        "OPEN_SORA_TEST_HOST": str(installation.root),
        "OPEN_SORA_TEST_CHECKPOINT": str(tiny_checkpoint),
        "OPEN_SORA_TEST_SMALL": str(small_checkpoint),
        "OPEN_SORA_TEST_BASE": str(folder / "base"),
    }
    command = [str(installation.python), "-m", "pytest", *(str(INPROCESS / f"{name}.py") for name in chosen), "-q", "-c", str(INPROCESS / "pytest.ini"),
               f"--rootdir={INPROCESS}", f"--confcutdir={INPROCESS}", "-p", "no:cacheprovider", f"--junitxml={report}"]  # fmt: skip
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if not report.is_file():
        pytest.fail(f"{' '.join(command)}\n{result.stdout[-6000:]}\n{result.stderr[-3000:]}", pytrace=False)
    outcomes: dict[str, list[tuple[str, str]]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        failures = [element.text or element.get("message", "") for kind in ("failure", "error") for element in case.iter(kind)]
        outcomes.setdefault(case.get("classname").split(".")[-1], []).append((case.get("name"), "\n".join(failures)))
    return outcomes
