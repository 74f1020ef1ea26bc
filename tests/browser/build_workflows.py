"""Makes workflows/*.json, their pictures and subgraphs/*.json (blueprints) with the real front-end: `make workflows`.

What is made stands in templates.py. The front-end turns it into the form that files have, so that slots and widget values are its own.
"""

import json
import re
import sys
import tempfile
import uuid
from pathlib import Path

import templates

from demo import comfy, front_end, host_record

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS, BLUEPRINTS = ROOT / "workflows", ROOT / "subgraphs"


def jobs() -> list[dict]:
    """One request to the front-end for every template (front_end.mjs, build)."""
    return [_job(one) for one in templates.all_of()]


def blueprint_jobs() -> list[dict]:
    """As jobs, for the parts of graphs that are blueprints and no template."""
    return [_job(one) for one in templates.parts()]


def _job(one: templates.Template) -> dict:
    info = host_record.read()
    seeds = {
        number: {"control_after_generate": "fixed"} for number, node in one.graph.items() if {"seed", "noise_seed"} & set(node["inputs"])
    }
    rates = {
        number: {"fps": 24} for number, node in one.graph.items() if node["class_type"] == "CreateVideo"
    }  # beneath the wire, should it be cut
    request = {
        "name": one.name,
        "api": one.graph,
        "columns": one.columns,
        "groups": one.groups,
        "notes": {"about": {"title": "About", "text": one.note, "size": [420, one.note_height]}} if one.note else {},
        "widgets": rates | seeds,
        "models": one.models,
        "muted": one.muted,
        "stamp": {
            "cnr_id": "open-sora",
            "version": _version(),
            "host_version": info["host_version"],
            "ours": [node for node in info["nodes"] if node.startswith("OpenSora")],
        },
    }
    return request | {"whole": one.whole} if one.whole else request


def _version() -> str:
    lines = (ROOT / "pyproject.toml").read_text().splitlines()
    return next(line.split('"')[1] for line in lines if line.startswith("version ="))


def main(names: list[str]) -> int:
    """Make the templates whose names begin as one of the names, or all."""
    installation, lacking = comfy.find(), front_end.missing()
    if installation is None or lacking:
        print(lacking or "No ComfyUI found; set COMFYUI_PATH to a checkout.", file=sys.stderr)
        return 2
    asked = {one.name: one for one in (*templates.all_of(), *templates.parts())}
    asked = {name: one for name, one in asked.items() if not names or any(name.startswith(word) for word in names)}
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        host_record.lay_out_stand_ins(base)
        with comfy.Server(installation, base) as server:
            made = front_end.build(server.url, [_job(one) for one in asked.values()])
    for name, one in asked.items():
        if not one.is_part:
            _write(WORKFLOWS / f"{name}{'.app' if one.app else ''}.json", made[name]["workflow"])
        if one.blueprint:
            blueprint = made[name]["blueprint"]
            blueprint["nodes"][0]["title"] = blueprint["definitions"]["subgraphs"][0]["name"] = one.blueprint
            _write(BLUEPRINTS / f"{one.blueprint}.json", blueprint)
    return 0


def _write(path: Path, content: dict) -> None:
    path.write_text(steady(json.dumps(content, indent=1, ensure_ascii=False), path.stem) + "\n", encoding="utf-8")
    print(path.relative_to(ROOT))


def steady(text: str, name: str) -> str:
    """The same with ids that are not new each time: the n-th of a blueprint is always the same."""
    found = list(dict.fromkeys(re.findall(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", text)))
    for number, was in enumerate(found):
        text = text.replace(was, str(uuid.uuid5(uuid.NAMESPACE_OID, f"open-sora {name} {number}")))
    return text


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
