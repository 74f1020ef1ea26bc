"""The house's shape: which room may import which, what the published archive may hold, what an import may cost."""

import ast
import re
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pathspec
import pytest

ROOT = Path(__file__).resolve().parents[2]
CORE = ROOT / "opensora_core"
NODES = ROOT / "nodes"

# What the library may import besides the standard library; all of it is named in pyproject.toml.
LIBRARIES = {
    "PIL", "accelerate", "bitsandbytes", "einops", "flash_attn", "imageio_ffmpeg", "numpy", "safetensors", "sageattention", "scenedetect",
    "sentencepiece", "tokenizers", "torch", "tqdm", "transformers",
}  # fmt: skip
# The host's public face and its two small helpers, open to every node, and its insides, which only nodes/host may know.
HOST_API = {"comfy_api", "folder_paths", "node_helpers"}
HOST_MODULES = {
    "comfy", "comfy_aimdo", "comfy_execution", "comfy_extras", "comfy_kitchen", "execution", "latent_preview", "nodes", "psutil",
    "server",
}  # fmt: skip
# room -> the rooms of opensora_core it may import. A room is a folder, or a module at the root.
# errors <- geometry, shapes, text, ops <- networks | codecs | sampling (siblings, never each other) and family <- families <- checkpoint
# <- encoders <- memory <- run <- pipeline <- commands, inspection, evaluation <- cli. media stands beside memory.
MAY_IMPORT = {
    "choices": set(),
    "errors": set(),
    "names": {"errors"},
    "readers": {"errors"},
    "geometry": {"errors"},
    "shapes": {"errors"},
    "ops": {"errors"},
    "parallel": {"errors"},
    "text": {"errors"},
    "networks": {"errors", "geometry", "ops", "shapes"},
    "codecs": {"errors", "geometry", "ops", "shapes"},
    "sampling": {"errors", "geometry"},
    "family": {"errors", "geometry", "sampling", "shapes", "text"},
    "families": {"codecs", "errors", "family", "geometry", "networks", "sampling", "shapes", "text"},
    "checkpoint": {"readers", "names", "errors", "families", "family", "ops", "shapes"},
    "encoders": {"readers", "checkpoint", "families", "errors", "shapes", "text"},
    "memory": {
        "readers",
        "names",
        "checkpoint",
        "codecs",
        "encoders",
        "errors",
        "families",
        "family",
        "geometry",
        "parallel",
        "sampling",
        "shapes",
        "text",
    },  # fmt: skip
    "media": {"readers", "names", "errors", "geometry", "sampling"},
    "run": {
        "readers",
        "names",
        "checkpoint",
        "codecs",
        "encoders",
        "errors",
        "families",
        "family",
        "geometry",
        "media",
        "memory",
        "ops",
        "parallel",
        "sampling",
        "shapes",
        "text",
    },  # fmt: skip
    "pipeline": {"codecs", "names", "errors", "geometry", "media", "memory", "ops", "parallel", "run", "sampling"},
    "inspection": {"checkpoint", "encoders", "errors", "families", "family", "ops", "shapes", "text"},
}
EDGE_ROOMS = {"cli", "commands", "evaluation", "__main__", "__init__"}  # they put the rooms together and may import any

# Import roots and calls that the registry's scan flags, or that this project promises not to make.
FORBIDDEN_IMPORTS = {
    "aiohttp", "asyncio.subprocess", "base64", "cryptography", "ctypes", "dill", "ftplib", "http", "httpx", "huggingface_hub", "importlib",
    "marshal", "multiprocessing", "pickle", "pip", "requests", "runpy", "shelve", "smtplib", "socket", "ssl", "subprocess", "urllib",
    "urllib3", "websocket", "websockets", "zlib",
}  # fmt: skip
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "execfile"}
FORBIDDEN_METHODS = {"eval", "exec", "popen", "import_module", "spawn", "b64decode"}
FORBIDDEN_TEXT = re.compile(r"\b(subprocess|importlib|urllib|requests\.\w|socket\.\w|pickle\.\w|os\.system|eval\(|exec\()")
FORBIDDEN_TEXT_JS = re.compile(r"\b(eval\(|new Function\(|fetch\(|XMLHttpRequest|WebSocket|atob\()|https?://")
BLOB = re.compile(r"[A-Za-z0-9+/=]{160,}")
MACHINE_PATH = re.compile(r"(?<![\w.~/])/(?:work|farm|root|home|Users|mnt)/[\w.-]+|\b[A-Z]:\\\\?(?:Users|work)\b")


@lru_cache
def tracked_files() -> tuple[str, ...]:
    """Files git tracks or would track; a downloaded archive without git history has nothing to compare."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if result.returncode:
        pytest.skip("not a git checkout")
    return tuple(sorted({line for line in result.stdout.splitlines() if (ROOT / line).is_file()}))


@lru_cache
def published_files() -> tuple[str, ...]:
    """What the registry's archive holds: tracked files less .comfyignore (gitignore syntax)."""
    ignore = pathspec.PathSpec.from_lines("gitignore", (ROOT / ".comfyignore").read_text().splitlines())
    return tuple(name for name in tracked_files() if not ignore.match_file(name))


@lru_cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(path: Path, package_root: Path) -> list[tuple[str, bool]]:
    """(dotted target, is_relative) of every import in a file, at any depth. Relative ones are resolved below package_root."""
    package = list(path.relative_to(package_root).parent.parts)
    found = []
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            found += [(alias.name, False) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.append((node.module, False))
        elif isinstance(node, ast.ImportFrom):
            assert node.level - 1 <= len(package), f"{path}:{node.lineno} reaches out of the package"
            base = package[: len(package) - node.level + 1] + (node.module.split(".") if node.module else [])
            found += [(".".join([*base, alias.name]), True) for alias in node.names]
    return found


def python_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.py") if "__pycache__" not in path.parts)


def core_room(path: Path) -> str:
    return path.relative_to(CORE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", python_files(CORE), ids=lambda p: str(p.relative_to(ROOT)))
def test_the_library_imports_only_its_libraries_and_the_rooms_below(path):
    room = core_room(path)
    assert room in MAY_IMPORT or room in EDGE_ROOMS, f"{room} is a new room: say in this test what it may import"
    for target, is_relative in imports(path, CORE):
        root = target.split(".")[0]
        if is_relative:
            names_room = (CORE / root).is_dir() or (CORE / f"{root}.py").is_file()
            if names_room and root != room and room not in EDGE_ROOMS:
                may = root == "choices" or root in MAY_IMPORT[room]
                assert may, f"{path.relative_to(ROOT)} imports {target}: {room} stands below {root}"
        else:
            assert root in LIBRARIES or root in sys.stdlib_module_names, f"{path.relative_to(ROOT)} imports {target}"
            assert root != "opensora_core", "imports inside the library are relative: inside the pack it has another name"


@pytest.mark.parametrize("path", python_files(NODES), ids=lambda p: str(p.relative_to(ROOT)))
def test_nodes_know_the_library_and_the_host_room_but_not_each_other(path):
    in_host_room = "host" in path.relative_to(NODES).parts
    for target, is_relative in imports(path, ROOT):
        parts = target.split(".")
        if not is_relative:
            allowed = HOST_API | LIBRARIES | set(sys.stdlib_module_names) | (HOST_MODULES if in_host_room else set())
            assert parts[0] in allowed, f"{path.relative_to(ROOT)} imports {target}; host modules belong in nodes/host"
        elif parts[0] == "nodes":
            is_list = path == NODES / "__init__.py"
            assert is_list or parts[1:2] == ["host"], f"{path.relative_to(ROOT)} imports {target}: nodes never import each other"
            assert not (in_host_room and parts[1:2] != ["host"]), f"{path.relative_to(ROOT)} imports {target}: the host room stands below"
        else:
            assert parts[0] == "opensora_core", f"{path.relative_to(ROOT)} imports {target}"


def test_nothing_imports_the_command_line_and_only_it_imports_evaluation():
    """cli is the top floor; evaluation is imported by it alone, so that a run does not need it. Parsed arguments go no further than the door."""
    for path in python_files(CORE):
        rooms = {target.split(".")[0] for target, is_relative in imports(path, CORE) if is_relative}
        assert "cli" not in rooms or path == CORE / "__main__.py", path
        assert "evaluation" not in rooms or core_room(path) in ("cli", "evaluation"), path
        if "Namespace" in path.read_text(encoding="utf-8"):
            assert path in (CORE / "cli.py", CORE / "commands" / "options.py"), path


def test_the_pack_root_holds_the_entry_point_and_nothing_of_the_host():
    tree = parse(ROOT / "__init__.py")
    top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert all((node.module if isinstance(node, ast.ImportFrom) else node.names[0].name) in sys.stdlib_module_names for node in top)
    names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    assert "comfy_entrypoint" in names


def test_a_host_without_what_the_nodes_import_gets_a_sentence():
    # Here there is no host at all, which is as old as one can be.
    code = (
        "import asyncio, importlib.util, sys\n"
        "sys.modules['comfy_api'] = None\n"
        "spec = importlib.util.spec_from_file_location('pack', '__init__.py', submodule_search_locations=['.'])\n"
        "sys.modules['pack'] = pack = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(pack)\n"
        "try:\n"
        "    asyncio.run(pack.comfy_entrypoint())\n"
        "except ImportError as error:\n"
        "    print(pack.NEEDED, error)\n"
    )
    needed, _, sentence = run_python(code).partition(" ")
    assert f'requires-comfyui = ">={needed}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f"needs ComfyUI {needed} or newer" in sentence and "comfy_api" in sentence


@pytest.mark.parametrize("name", ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"])
def test_no_module_carries_the_old_node_mapping(name):
    # With it, even empty, the host takes the old branch and never calls comfy_entrypoint.
    for path in [ROOT / "__init__.py", *python_files(NODES), *python_files(CORE)]:
        assert not any(isinstance(node, ast.Name) and node.id == name for node in ast.walk(parse(path))), path


def run_python(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_importing_the_library_loads_nothing_heavy():
    code = "import sys, opensora_core; print(sorted(m for m in ('torch', 'numpy', 'transformers', 'PIL') if m in sys.modules))"
    assert run_python(code).strip() == "[]"


def test_the_command_line_s_parser_needs_nothing_heavy():
    code = (
        "import sys, time; before = time.process_time(); import opensora_core.cli; seconds = time.process_time() - before\n"
        "print(sorted(m for m in ('torch', 'numpy', 'transformers', 'PIL') if m in sys.modules), seconds)"
    )
    runs = [run_python(code).rpartition(" ") for _ in range(3)]
    assert {heavy for heavy, _, _ in runs} == {"[]"} and min(float(seconds) for _, _, seconds in runs) < 0.15


def test_the_plain_modules_work_without_torch():
    code = (
        "import sys; sys.modules['torch'] = None; sys.modules['numpy'] = None\n"
        "import opensora_core.choices, opensora_core.errors, opensora_core.geometry, opensora_core.networks.mmdit.config, opensora_core.text.prompt\n"
        "assert opensora_core.geometry.CAUSAL.latent_frames(129) == 33"
    )
    run_python(code)


def test_importing_every_room_loads_no_optional_library_and_starts_no_device():
    modules = [".".join(p.relative_to(ROOT).with_suffix("").parts) for p in python_files(CORE) if p.name != "__init__.py"]
    heavy = ("transformers", "accelerate", "bitsandbytes", "imageio_ffmpeg", "diffusers", "comfy")
    code = (
        f"import sys\n{chr(10).join('import ' + m for m in modules)}\nimport torch\n"
        f"print([m for m in {heavy!r} if m in sys.modules], torch.cuda.is_initialized())"
    )
    assert run_python(code).strip() == "[] False"


def test_the_archive_leaves_the_workshop_out():
    names = published_files()
    workshop = ("tests/", "benchmarks/", "demo/", "training/", ".ci/", "Makefile")
    assert not [name for name in names if name.startswith(workshop)]
    for needed in ("__init__.py", "pyproject.toml", "requirements.txt", "LICENSE", "README.md", "opensora_core/__init__.py"):
        assert needed in names
    assert sum((ROOT / name).stat().st_size for name in names) < 40 * 2**20


def test_what_stays_out_is_named_at_the_top():
    # demo/comfy.py reads the file so: the host of the demo and of the tests runs what a user gets.
    from demo.comfy import unpublished_names

    for name in unpublished_names():
        assert not set(name) & set("*?[]!/"), f".comfyignore: {name} is no plain name at the top"
        assert not [file for file in published_files() if file == name or file.startswith(name + "/")]


def published(suffix: str) -> list[str]:
    return [name for name in published_files() if name.endswith(suffix)]


def scan_findings(tree: ast.Module) -> list[str]:
    """What the registry's scan, or our own promise, would object to in one published module."""
    findings = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            is_relative = isinstance(node, ast.ImportFrom) and node.level
            bad = [name for name in names if not is_relative and name.split(".")[0] in FORBIDDEN_IMPORTS]
            findings += [f"line {node.lineno}: import {name}" for name in bad]
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and node.func.id in FORBIDDEN_CALLS:
                findings.append(f"line {node.lineno}: {node.func.id}()")
            if isinstance(node.func, ast.Attribute) and node.func.attr in FORBIDDEN_METHODS:
                findings.append(f"line {node.lineno}: .{node.func.attr}()")
            if ast.unparse(node.func) == "os.system":
                findings.append(f"line {node.lineno}: os.system()")
            if ast.unparse(node.func) == "torch.load" and "weights_only=True" not in ast.unparse(node):
                findings.append(f"line {node.lineno}: torch.load without weights_only=True")
    return findings


def test_the_archive_holds_nothing_the_registry_scans_for():
    findings = {}
    for name in published(".py"):
        text = (ROOT / name).read_text(encoding="utf-8")
        found = scan_findings(parse(ROOT / name)) + FORBIDDEN_TEXT.findall(text) + BLOB.findall(text)
        if found:
            findings[name] = found
    for name in published(".js"):
        found = FORBIDDEN_TEXT_JS.findall((ROOT / name).read_text(encoding="utf-8"))
        if found:
            findings[name] = found
    assert not findings


@pytest.mark.parametrize(
    "code",
    [
        "import subprocess", "from urllib import request", "import importlib.util", "eval('1')", "model.eval()", "os.system('x')",
        "torch.load(path)", "def f():\n    import pickle", "__import__('x')",
    ],
)  # fmt: skip
def test_the_scan_sees_what_it_looks_for(code):
    assert scan_findings(ast.parse(code))


def test_no_path_of_one_machine_in_any_file():
    for name in tracked_files():
        path = ROOT / name
        if path.suffix in {".py", ".md", ".json", ".toml", ".txt", ".js", ".cfg", ".yml", ".yaml", ""}:
            found = MACHINE_PATH.findall(path.read_text(encoding="utf-8", errors="ignore"))
            assert not found, f"{name}: {found}"


def test_every_folder_of_the_library_is_a_package():
    # setuptools takes folders; one without __init__.py would still be found, but not by every tool.
    for folder in {path.parent for path in python_files(CORE)}:
        assert (folder / "__init__.py").is_file(), f"{folder.relative_to(ROOT)} has no __init__.py"


def test_requirements_name_only_what_the_host_does_not_bring():
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line.strip()]
    names = [re.split(r"[<>=!~; \[]", line)[0] for line in lines]
    assert names == ["accelerate", "imageio-ffmpeg", "bitsandbytes"]
    assert all(re.match(r"[\w-]+>=[\d.]+(; .*)?$", line) for line in lines), "lower bounds only, no pins, no options"
    project = (ROOT / "pyproject.toml").read_text().replace("'", '"')
    for line in lines:
        assert line.replace("'", '"') in project, f"{line} differs from pyproject.toml"


def test_one_version_everywhere():
    import opensora_core

    project = (ROOT / "pyproject.toml").read_text()
    assert f'version = "{opensora_core.__version__}"' in project
    assert re.search(r'^name = "open-sora"$', project, re.M)


# Where a model may be known: elsewhere its row says what is true of it, so that a new model is new files and rows.
KNOWS_MODELS = (
    "opensora_core/families/",
    "opensora_core/networks/",
    "opensora_core/codecs/",
    "opensora_core/geometry/",
    "nodes/host/families.py",
)


def model_findings(tree: ast.Module, kinds: set[str], sizes: set[str]) -> list[str]:
    """Where a module branches on a model: its word, its codec's configuration, or how its frames are counted."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and node.value in kinds:
            found.append(f"line {node.lineno}: {node.value!r}")
        if isinstance(node, ast.Attribute) and node.attr == "is_causal":
            found.append(f"line {node.lineno}: is_causal")
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance":
            names = {name.id for name in ast.walk(node.args[1]) if isinstance(name, ast.Name)}
            found += [f"line {node.lineno}: isinstance of {name}" for name in sorted(names & sizes)]
    return found


def test_no_room_but_the_families_knows_a_model():
    from opensora_core.families.table import CODECS, FAMILIES

    rows = (*FAMILIES, *CODECS)
    kinds, sizes = {row.kind for row in rows}, {type(row.released).__name__ for row in rows}
    assert len(kinds) == len(rows) and kinds >= {"open_sora_2", "hunyuan_vae"}
    assert model_findings(ast.parse("isinstance(c, (int, DCAEConfig))\ng.is_causal\nk == 'dc_ae'"), kinds, sizes) != []
    findings = {}
    for path in [*python_files(CORE), *python_files(NODES)]:
        name = path.relative_to(ROOT).as_posix()
        if not name.startswith(KNOWS_MODELS) and (found := model_findings(parse(path), kinds, sizes)):
            findings[name] = found
    assert not findings


@pytest.mark.parametrize("path", [*python_files(CORE), *python_files(NODES)], ids=lambda p: str(p.relative_to(ROOT)))
def test_rows_are_asked_for_through_the_table_and_networks_are_strangers(path):
    name = path.relative_to(ROOT).as_posix()
    for target, is_relative in imports(path, ROOT):
        parts = target.removeprefix("opensora_core.").split(".")
        if is_relative and parts[0] == "families" and not name.startswith("opensora_core/families/"):
            row_file = ".".join(parts[:2])
            assert row_file == "families.table", f"{name} imports {target}: ask families.table"
            assert not (
                parts[2:] and parts[2].isupper() and parts[2] not in ("FAMILIES", "CODECS", "DEFAULT", "PAINTER") and parts[1] == "table"
            ), target
        if is_relative and parts[0] == "networks" and name.startswith("opensora_core/networks/"):
            assert parts[1] == name.split("/")[2].removesuffix(".py"), f"{name} imports {target}: no network knows another"


MAX_FUNCTION_LINES = 65


def test_functions_fit_a_screen():
    long = []
    for name in published(".py"):
        for node in ast.walk(parse(ROOT / name)):
            # A schema is a table of sockets; its length is the node's number of inputs.
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name != "define_schema":
                lines = node.end_lineno - node.lineno + 1
                if lines > MAX_FUNCTION_LINES:
                    long.append(f"{name}:{node.lineno} {node.name} has {lines} lines")
    assert not long
