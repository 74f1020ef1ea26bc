"""Finds a ComfyUI, starts it with this pack on a base directory of its own, and runs graphs in it over HTTP.

Standard library only, so that any Python can drive the host, whose own environment it starts the server with.
Used by the demo, by the tests against the host and by the scripts that make and check the workflow files.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from dataclasses import dataclass
from pathlib import Path

PACK = Path(__file__).resolve().parents[1]
PACK_FOLDER = "open-sora"  # the name under custom_nodes, as the registry would install it
VIRTUAL_NODES = {"Note", "MarkdownNote"}  # exist on the canvas only
INSIDE_IN, INSIDE_OUT = -10, -20  # the ids that a subgraph gives its own inputs and outputs
MUTED = 2  # a node's mode in a workflow file: never run
DYNAMIC_COMBO = "COMFY_DYNAMICCOMBO_V3"
WIDGET_TYPES = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", DYNAMIC_COMBO}


class HostError(RuntimeError):
    """The host did not start, refused a graph, or a node of it failed; the text is the host's own."""


@dataclass(frozen=True)
class Installation:
    """A ComfyUI checkout and the interpreter that has its requirements."""

    root: Path
    python: Path


def find() -> Installation | None:
    """The ComfyUI to use: $COMFYUI_PATH, else the one this checkout lies in, else one beside it or in the home folder."""
    named = os.environ.get("COMFYUI_PATH")
    if named:
        root = Path(named).expanduser().resolve()
        if not _is_comfyui(root):
            raise HostError(f"COMFYUI_PATH={named} is not a ComfyUI checkout: it has no main.py and comfy_api folder.")
        return Installation(root, _python_of(root))
    beside, home = PACK.parent, Path.home()
    for root in (beside.parent, beside / "ComfyUI", home / "ComfyUI", home / "comfy" / "ComfyUI"):
        if _is_comfyui(root):
            return Installation(root, _python_of(root))
    return None


def _is_comfyui(root: Path) -> bool:
    return (root / "main.py").is_file() and (root / "comfy_api").is_dir()


def _python_of(root: Path) -> Path:
    named = os.environ.get("COMFYUI_PYTHON")
    if named:
        return Path(named).expanduser()
    scripts = ("Scripts/python.exe",) if os.name == "nt" else ("bin/python",)
    portable = (root.parent / "python_embeded" / "python.exe",)
    for python in (*(root / env / script for env in (".venv", "venv") for script in scripts), *portable):
        if python.is_file():
            return python
    return Path(sys.executable)


class Server:
    """A running host. Use as a context manager; `base` gets models/, input/, output/ and custom_nodes/ and is left behind.

    is_published: the pack is installed as the registry has it; else as a checkout is, with all that lies in it.
    """

    def __init__(self, installation: Installation, base: Path, extra_arguments: tuple[str, ...] = ("--cpu",), is_published: bool = True):
        self.installation = installation
        self.base = base.resolve()
        self.extra_arguments, self.is_published = extra_arguments, is_published
        self.log_path = self.base / "host.log"
        self.url = ""
        self._process = None

    def __enter__(self) -> "Server":
        prepare_base(self.base, self.is_published)
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        command = [
            str(self.installation.python), "main.py", "--port", str(port), "--base-directory", str(self.base),
            "--database-url", "sqlite:///:memory:", "--disable-api-nodes", "--disable-auto-launch",
            "--disable-all-custom-nodes", "--whitelist-custom-nodes", PACK_FOLDER, *self.extra_arguments,
        ]  # fmt: skip
        with open(self.log_path, "wb") as log:
            self._process = subprocess.Popen(command, cwd=self.installation.root, stdout=log, stderr=subprocess.STDOUT)
        try:
            self._wait_until_ready(seconds=180)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *exception) -> None:
        self.stop()

    def stop(self) -> None:
        if self._process and self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    @property
    def log(self) -> str:
        return self.log_path.read_text(encoding="utf-8", errors="replace")

    def _wait_until_ready(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self._process.poll() is not None:
                break
            try:
                self.get("/system_stats")
                return
            except OSError:
                time.sleep(0.3)
        raise HostError(f"ComfyUI at {self.installation.root} did not start:\n{self.log[-3000:]}")

    def get(self, path: str):
        """The parsed JSON at a path of the server."""
        with urllib.request.urlopen(self.url + path, timeout=60) as reply:
            return json.loads(reply.read())

    def post(self, path: str, body: dict) -> dict:
        """Send JSON; the parsed JSON of the reply, or {} where it is empty. A refusal is a HostError with the host's reasons."""
        data = json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                text = reply.read()
        except urllib.error.HTTPError as refusal:
            raise HostError(refusal.read().decode(errors="replace")) from refusal
        return json.loads(text) if text else {}

    def run(self, graph: dict, seconds: float = 600) -> dict:
        """Run a graph in API form to its end.

        Returns:
            node id -> what that node put into the history (files of a save node, text of a preview).
        Raises:
            HostError: the host refused the graph, a node failed, or it took longer than `seconds`.
        """
        prompt_id = self.post("/prompt", {"prompt": graph, "client_id": uuid.uuid4().hex})["prompt_id"]
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            entry = self.get(f"/history/{prompt_id}").get(prompt_id)
            if entry and entry["status"]["status_str"] == "error":
                details = [data for name, data in entry["status"]["messages"] if name == "execution_error"]
                raise HostError("; ".join(f"{d['node_type']}: {d['exception_message'].strip()}" for d in details) or str(entry["status"]))
            if entry and entry["status"]["completed"]:
                return entry["outputs"]
            if self._process.poll() is not None:
                raise HostError(f"ComfyUI ended while it ran a graph:\n{self.log[-3000:]}")
            time.sleep(0.2)
        self.post("/interrupt", {})
        raise HostError(f"The graph did not finish in {seconds:.0f} s.")

    def files(self, outputs: dict) -> list[Path]:
        """The files that the save nodes of a finished run wrote."""
        items = [item for output in outputs.values() for group in output.values() if isinstance(group, list) for item in group]
        entries = [item for item in items if isinstance(item, dict) and item.get("type") == "output"]
        return [self.base / "output" / entry.get("subfolder", "") / entry["filename"] for entry in entries]


def prepare_base(base: Path, is_published: bool = True) -> None:
    """A base directory with the model folders that this pack reads from and the pack under custom_nodes, as it is published or cloned."""
    for folder in ("diffusion_models", "text_encoders", "vae", "loras"):
        (base / "models" / folder).mkdir(parents=True, exist_ok=True)
    for folder in ("input", "output", "user", "custom_nodes"):
        (base / folder).mkdir(parents=True, exist_ok=True)
    pack = base / "custom_nodes" / PACK_FOLDER
    if pack.is_symlink():
        pack.unlink()  # never what it leads to
    shutil.rmtree(pack, ignore_errors=True)
    left_out = set(_plain_names(".gitignore")) | set(unpublished_names() if is_published else [])

    def ignore(folder: str, names: list[str]) -> list[str]:
        at_the_top = Path(folder) == PACK
        return [name for name in names if name == "__pycache__" or (at_the_top and (name in left_out or name.startswith(".")))]

    shutil.copytree(PACK, pack, ignore=ignore)


def unpublished_names() -> list[str]:
    """What lies at the top of this checkout and stays out of the published archive (.comfyignore names nothing deeper)."""
    return _plain_names(".comfyignore")


def _plain_names(ignore_file: str) -> list[str]:
    lines = (PACK / ignore_file).read_text(encoding="utf-8").splitlines()
    return [line.rstrip("/") for line in lines if line and not line.startswith("#")]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def to_api(workflow: dict, object_info: dict, with_muted: bool = False) -> dict:
    """A workflow file (UI form) as the graph that POST /prompt takes; what stands inside a node "14" has ids such as "14:3".

    Args:
        workflow: the parsed file.
        object_info: the host's description of the nodes it uses.
        with_muted: muted nodes too, as once a person un-mutes them. Only nodes that nothing is connected behind are muted in our files.
    """
    inside = {one["id"]: one for one in workflow.get("definitions", {}).get("subgraphs", [])}
    links = {link[0]: (link[1], link[2]) for link in workflow["links"]}
    graph = {}

    def source(number: int, slot: int) -> list:
        """Where a link from an output on the canvas really begins."""
        one = inside.get(by_id[number]["type"])
        if one is None:
            return [str(number), slot]
        link = next(link for link in one["links"] if link["target_id"] == INSIDE_OUT and link["target_slot"] == slot)
        return [f"{number}:{link['origin_id']}", link["origin_slot"]]

    def take(node: dict, name: str, linked: dict) -> None:
        inputs = dict(named_values(node, object_info[node["type"]])) | linked
        graph[name] = {"class_type": node["type"], "inputs": inputs, "_meta": {"title": node.get("title", node["type"])}}

    by_id = {node["id"]: node for node in workflow["nodes"]}
    for node in workflow["nodes"]:
        if node["type"] in VIRTUAL_NODES or (node.get("mode") == MUTED and not with_muted):
            continue
        linked = {slot["name"]: source(*links[slot["link"]]) for slot in node.get("inputs", []) if slot.get("link") is not None}
        one = inside.get(node["type"])
        if one is None:
            take(node, str(node["id"]), linked)
            continue
        given = [linked.get(slot["name"], node.get("widgets_values_named", {}).get(slot["name"])) for slot in one["inputs"]]
        begins = {link["id"]: (link["origin_id"], link["origin_slot"]) for link in one["links"]}
        for part in one["nodes"]:
            arriving = {slot["name"]: begins[slot["link"]] for slot in part.get("inputs", []) if slot.get("link") is not None}
            values = {
                name: given[slot] if number == INSIDE_IN else [f"{node['id']}:{number}", slot] for name, (number, slot) in arriving.items()
            }
            take(part, f"{node['id']}:{part['id']}", values)
    return graph


def named_values(node: dict, info: dict) -> list[tuple[str, object]]:
    """(input name, value) of a node's widgets. Files hold them by position, with one more after a seed and after an upload.

    Raises:
        HostError: the node has more or fewer values than widgets.
    """
    values = list(node.get("widgets_values") or [])
    named = _take_values(values, info["input"], node["type"])
    if values:
        raise HostError(f"{node['type']} has {len(values)} more widget values than widgets: {values}")
    return named


def _take_values(values: list, sections: dict, where: str, prefix: str = "") -> list[tuple[str, object]]:
    named = []
    for name, kind, options in widgets(sections):
        if not values and name in sections.get("optional", {}) and "default" in options:
            named.append((prefix + name, options["default"]))  # an input that is newer than the file, as the front-end fills it
            continue
        if not values:
            raise HostError(f"{where} has no value for its widget {prefix}{name}")
        named.append((prefix + name, values.pop(0)))
        if has_control(name, kind, options) or options.get("image_upload") or options.get("video_upload"):
            values.pop(0)
        if kind == DYNAMIC_COMBO:  # the chosen option brings widgets of its own, named "combo.widget"
            chosen = [option for option in options["options"] if option["key"] == named[-1][1]]
            if not chosen:
                raise HostError(f"{where} does not offer {prefix}{name}={named[-1][1]!r}")
            named += _take_values(values, chosen[0]["inputs"], where, f"{prefix}{name}.")
    return named


def widgets(sections: dict) -> list[tuple[str, str, dict]]:
    """(name, type, options) of the inputs that have a widget, in the host's order."""
    found = []
    for section in ("required", "optional"):
        for name, spec in sections.get(section, {}).items():
            kind, options = spec[0], (spec[1] if len(spec) > 1 else {})
            kind = "COMBO" if isinstance(kind, list) else kind
            if kind in WIDGET_TYPES and not options.get("forceInput"):
                found.append((name, kind, options))
    return found


def has_control(name: str, kind: str, options: dict) -> bool:
    """Whether the front-end puts a second value ("fixed", "randomize") behind this widget."""
    return kind == "INT" and (name in ("seed", "noise_seed") or bool(options.get("control_after_generate")))
