"""Fills the lists of inputs and outputs in the help pages, and docs/NODES.md's table of nodes, from the recorded schemas and the translations.

    python -m demo.help_pages [--check]

web/docs/<NodeId>.md (English) and web/docs/<NodeId>/zh.md are written by hand except for what stands between the markers,
so that a tooltip is written once: in locales/en/nodeDefs.json, which the nodes read too, and in locales/zh/nodeDefs.json. What a node costs and what goes wrong with it
stand in help_facts.json: {costs, errors: {name: [what is said, cure, the same two in Chinese]}, nodes: {node: {cost, errors}}}.
"""

import argparse
import json
import re
import sys
from pathlib import Path

from . import comfy, host_record

DOCS = comfy.PACK / "web" / "docs"
FACTS = Path(__file__).with_name("help_facts.json")
WORDS = {
    "en": {
        "inputs": "Inputs",
        "outputs": "Outputs",
        "default": "default",
        "optional": "optional",
        "on": "on",
        "off": "off",
        "node": "node",
        "what": "what it does",
        "use": "The node in use",
        "cost": "Time and memory",
        "errors": "When it goes wrong",
    },
    "zh": {
        "inputs": "输入",
        "outputs": "输出",
        "default": "默认",
        "optional": "可选",
        "on": "开",
        "off": "关",
        "node": "节点",
        "what": "作用",
        "use": "使用示例",
        "cost": "时间与内存",
        "errors": "常见问题",
    },
}
LISTS = {"en": "docs/NODES.md", "zh": "docs/NODES.zh.md"}


def texts(language: str) -> dict:
    """locales/<language>/nodeDefs.json."""
    return json.loads((comfy.PACK / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))


def page_path(node_id: str, language: str) -> Path:
    """Where the front-end looks for a node's help; English is what it falls back to."""
    return DOCS / f"{node_id}.md" if language == "en" else DOCS / node_id / f"{language}.md"


def inputs_list(info: dict, words: dict, text: dict) -> str:
    """The inputs as a list: the help panel is too narrow for a table of four columns."""
    lines = [f"**{words['inputs']}**", ""]
    for item in host_record.schema_of(info)["inputs"]:
        kind = " / ".join(str(choice) for choice in item["choices"]) if item["choices"] else item["type"]
        facts = [kind] + ([words["optional"]] if item["optional"] else [])
        if item["default"] is not None:
            facts.append(f"{words['default']} {_default(item, words)}")
        lines.append(_line(item["name"], facts, text["inputs"].get(item["name"])))
    return "\n".join(lines)


def _line(name: str, facts: list[str], described: dict | None) -> str:
    described = described or {"name": name, "tooltip": ""}
    label = f"`{name}`" + (f" {described['name']}" if described["name"] != name else "")
    return f"- {label} ({', '.join(facts)}): {described['tooltip']}"


def _default(item: dict, words: dict) -> str:
    if isinstance(item["default"], bool):
        return words["on" if item["default"] else "off"]
    return str(item["default"]) or '""'


def outputs_list(info: dict, words: dict, text: dict) -> str:
    lines = [f"**{words['outputs']}**", ""]
    for number, (kind, name) in enumerate(host_record.schema_of(info)["outputs"]):
        lines.append(_line(name, [kind], text["outputs"].get(str(number))))
    return "\n".join(lines)


def facts(node_id: str, language: str) -> dict[str, str]:
    """What a page says of a node by marker: its picture, its cost, and what goes wrong most often with the cures."""
    held, words, is_chinese = json.loads(FACTS.read_text(encoding="utf-8")), WORDS[language], language == "zh"
    of_node = held["nodes"][node_id]
    cost = of_node["cost"] if isinstance(of_node["cost"], list) else held["costs"][of_node["cost"]]
    errors = [("" if is_chinese else " ").join(held["errors"][name][2 * is_chinese :][:2]) for name in of_node["errors"]]
    return {
        "picture": f"![{words['use']}](pictures/{node_id}.webp)",  # read from the folder of the pages, whatever the page
        "cost": f"## {words['cost']}\n\n{cost[is_chinese]}",
        "errors": "\n".join([f"## {words['errors']}", "", *(f"- {line}" for line in errors)]),
    }


def nodes_table(nodes: dict, language: str) -> str:
    """The list of nodes in docs/NODES.md."""
    words, translated = WORDS[language], texts(language)
    rows = [f"| {words['node']} | {words['what']} |", "|---|---|"]
    for name in nodes:
        if name.startswith("OpenSora"):
            page = "../" + page_path(name, language).relative_to(comfy.PACK).as_posix()
            rows.append(f"| [{translated[name]['display_name']}]({page}) | {translated[name]['description']} |")
    return "\n".join(rows)


def between(text: str, marker: str, table: str) -> str:
    """`text` with the lines between the two markers of this name replaced."""
    pattern = re.compile(f"(<!-- {marker}:begin -->\n).*?(<!-- {marker}:end -->)", re.S)
    if not pattern.search(text):
        raise ValueError(f"no {marker} markers")
    return pattern.sub(lambda found: f"{found[1]}{table}\n{found[2]}" if table else found[0], text)


def pages() -> dict[Path, str]:
    """Every page as it should read now."""
    nodes = host_record.read()["nodes"]
    made = {}
    for language, words in WORDS.items():
        translated = texts(language)
        for name, info in nodes.items():
            if name.startswith("OpenSora"):
                path = page_path(name, language)
                text = between(path.read_text(encoding="utf-8"), "inputs", inputs_list(info, words, translated[name]))
                text = between(text, "outputs", outputs_list(info, words, translated[name]))
                for marker, said in facts(name, language).items():
                    text = between(text, marker, said)
                made[path] = text
                if path.parent == DOCS:  # the front-end asks for the page of its own language first, English too
                    made[DOCS / name / f"{language}.md"] = text
        readme = comfy.PACK / LISTS[language]
        made[readme] = between(readme.read_text(encoding="utf-8"), "nodes", nodes_table(nodes, language))
    return made


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m demo.help_pages")
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a page is out of date")
    check = parser.parse_args().check
    stale = [path for path, text in pages().items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    for path in stale:
        print(path.relative_to(comfy.PACK))
        if not check:
            path.write_text(pages()[path], encoding="utf-8")
    return int(bool(stale) and check)


if __name__ == "__main__":
    sys.exit(main())
