"""Fixtures inside the host's interpreter: the host set up on the CPU, the pack loaded as the host loads it, small models.

Run by tests/host/test_inprocess.py, which sets OPEN_SORA_TEST_HOST, OPEN_SORA_TEST_CHECKPOINT, OPEN_SORA_TEST_SMALL and OPEN_SORA_TEST_BASE.
"""

import asyncio
import gc
import importlib
import importlib.util
import os
import shutil
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))  # for in_core
PACK = Path(__file__).resolve().parents[3]
NAME = "open_sora_pack"  # a package name that is neither the host's nor ours
CHECKPOINT = Path(os.environ.get("OPEN_SORA_TEST_CHECKPOINT", "."))
FOLDERS = {"Open_Sora_v2": "diffusion_models", "hunyuan_vae": "vae", "t5xxl": "text_encoders", "clip_l": "text_encoders"}


def _start_host() -> None:
    """Import the host on the CPU, on a base directory of its own, with its stock nodes and none of a user's."""
    root, base = os.environ["OPEN_SORA_TEST_HOST"], Path(os.environ["OPEN_SORA_TEST_BASE"])
    for stem, folder in FOLDERS.items():
        (base / "models" / folder).mkdir(parents=True, exist_ok=True)
        shutil.copy(CHECKPOINT / f"{stem}.safetensors", base / "models" / folder)
    for folder in ("models/loras", "input", "output", "user"):
        (base / folder).mkdir(parents=True, exist_ok=True)
    sys.path.insert(0, root)
    import comfy.options

    comfy.options.enable_args_parsing(False)
    from comfy.cli_args import args

    args.cpu, args.base_directory, args.disable_api_nodes = True, str(base), True
    args.use_pytorch_cross_attention = True  # what a GPU uses; the server of the HTTP tests has the CPU's own choice
    import nodes

    asyncio.run(nodes.init_extra_nodes(init_custom_nodes=False, init_api_nodes=False))
    spec = importlib.util.spec_from_file_location(NAME, PACK / "__init__.py", submodule_search_locations=[str(PACK)])
    module = sys.modules[NAME] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    asyncio.run(_load_pack(module, nodes))


async def _load_pack(module, nodes) -> None:
    extension = await module.comfy_entrypoint()
    await extension.on_load()
    for node in await extension.get_node_list():
        nodes.NODE_CLASS_MAPPINGS[node.GET_SCHEMA().node_id] = node


def pytest_sessionstart(session):
    _start_host()


@pytest.fixture(scope="module", autouse=True)
def _nothing_left_loaded():
    """Every file begins with no model loaded. An exception that a test holds keeps the MODEL copies of its frames in a cycle; collected
    together, the host cannot hand their entry to the MODEL they are copies of, and reports it at the next load."""
    import comfy.model_management

    yield
    comfy.model_management.unload_all_models()
    gc.collect()


@pytest.fixture(scope="session")
def base() -> Path:
    """The host's base directory: put files under base/models/..."""
    return Path(os.environ["OPEN_SORA_TEST_BASE"])


@pytest.fixture
def small(pack, monkeypatch) -> Path:
    """A model of the built-in one's sizes, with random weights, in its place: its folder."""
    folder = Path(os.environ["OPEN_SORA_TEST_SMALL"])
    monkeypatch.setattr(pack("opensora_core.run.files"), "SMALL", folder)
    return folder


@pytest.fixture(scope="session")
def pack():
    """A module of the pack by its path: pack("nodes.host.model"), pack("opensora_core.errors")."""
    return lambda path: importlib.import_module(f"{NAME}.{path}")


@pytest.fixture(scope="session")
def run_node():
    """Run a node, stock or ours, by id: run_node("UNETLoader", unet_name=..., weight_dtype="default") -> tuple of its outputs."""
    import torch

    import nodes

    def run(node_id: str, **inputs) -> tuple:
        node = nodes.NODE_CLASS_MAPPINGS[node_id]
        with torch.inference_mode():
            if hasattr(node, "EXECUTE_NORMALIZED"):
                output = node.PREPARE_CLASS_CLONE(None).EXECUTE_NORMALIZED(**inputs)  # as the host does: hidden values, here none
                return tuple(output.args or ())
            return tuple(getattr(node(), node.FUNCTION)(**inputs))

    return run


@pytest.fixture(scope="session")
def model(run_node):
    """The small Open-Sora MODEL, from the stock loader, in fp32. Clone before patching (every stock node does)."""
    return run_node("UNETLoader", unet_name="Open_Sora_v2.safetensors", weight_dtype="default")[0]


@pytest.fixture(scope="session")
def weights() -> dict:
    """The small transformer's tensors under the released file's names."""
    from safetensors.torch import load_file

    return load_file(CHECKPOINT / "Open_Sora_v2.safetensors")


@pytest.fixture(scope="session")
def conditioning():
    """CONDITIONING of random text for the small model: conditioning(seed) -> [[context, {"pooled_output": ...}]]."""
    import torch

    def make(seed: int, batch: int = 1, tokens: int = 12) -> list:
        generator = torch.Generator().manual_seed(seed)
        context = torch.randn(batch, tokens, 64, generator=generator)
        return [[context, {"pooled_output": torch.randn(batch, 64, generator=generator)}]]

    return make


@pytest.fixture(scope="session")
def relative_error():
    """Largest absolute difference as a share of the expected tensor's largest value; infinite where anything is not a number."""
    import torch

    def measure(found, expected) -> float:
        assert found.shape == expected.shape, f"{list(found.shape)}, expected {list(expected.shape)}"
        if not torch.isfinite(found).all():
            return float("inf")
        return ((found.double() - expected.double()).abs().max() / expected.double().abs().max()).item()

    return measure
