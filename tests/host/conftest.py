"""Tests against a real ComfyUI: over HTTP and its websocket, and inside its own interpreter (inprocess/).

Everything is skipped, with one line, where no ComfyUI is found (demo/comfy.py says where it is looked for).
"""

import os
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
INPROCESS = HERE / "inprocess"

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
    from demo import comfy
    from tests.golden import host_files

    base = tmp_path_factory.mktemp("host")
    comfy.prepare_base(base)
    host_files.lay_out(base, tiny_checkpoint, tmp_path_factory.mktemp("flux"))
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
        "PYTEST_ADDOPTS": "",  # what was asked of the tests around these
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
