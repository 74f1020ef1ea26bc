"""What the host tells the front-end of this pack: schemas as recorded, translations, help pages and workflows."""

import urllib.parse
import urllib.request

import pytest

from demo import comfy, help_pages, host_record

RECORD = host_record.read()
OURS = [name for name in RECORD["nodes"] if name.startswith("OpenSora")]


@pytest.fixture(scope="module")
def live(server) -> dict:
    return host_record.from_host(server)


def without_files(info: dict) -> dict:
    """A node's description with the lists of the user's files emptied, which differ from machine to machine."""
    for section in info["input"].values():
        for name, spec in section.items():
            if name in host_record.FILE_LISTS:
                spec[:] = [spec[0], {key: value for key, value in spec[1].items() if key != "options"}]
    return info


def fetch(server, path: str) -> str:
    with urllib.request.urlopen(server.url + path, timeout=30) as reply:
        return reply.read().decode()


def test_the_record_lists_every_node_of_ours(live):
    assert [name for name in live["nodes"] if name.startswith("OpenSora")] == OURS


@pytest.mark.parametrize("node_id", OURS)
def test_node_is_as_recorded(node_id, live):
    assert without_files(live["nodes"][node_id]) == without_files(RECORD["nodes"][node_id]), "run `make record`"


@pytest.mark.parametrize("node_id", host_record.STOCK_NODES)
def test_stock_node_is_as_recorded(node_id, live):
    if live["host_version"] != RECORD["host_version"]:
        pytest.skip(f"the record is of ComfyUI {RECORD['host_version']}, this is {live['host_version']}")
    now, then = (host_record.schema_of(source["nodes"][node_id]) for source in (live, RECORD))
    assert [item["name"] for item in now["inputs"]] == [item["name"] for item in then["inputs"]]
    assert now["outputs"] == then["outputs"]


@pytest.mark.parametrize("language", list(help_pages.WORDS))
def test_translations_reach_the_front_end(server, language):
    served = server.get("/i18n")[language]
    for node_id, text in help_pages.texts(language).items():
        assert served["nodeDefs"][node_id] == text
    assert language == "en" or served["nodeCategories"]


@pytest.mark.parametrize("node_id", OURS)
@pytest.mark.parametrize("language", list(help_pages.WORDS))
def test_help_page_is_where_the_front_end_looks(server, node_id, language):
    path = help_pages.page_path(node_id, language)
    url = f"/extensions/{comfy.PACK_FOLDER}/docs/{path.relative_to(help_pages.DOCS).as_posix()}"
    assert fetch(server, url) == path.read_text(encoding="utf-8")


def check_templates(server) -> None:
    """Every template that is listed is served, with its card; in the order of their numbers, whatever the disk's is."""
    names = sorted(path.stem for path in (comfy.PACK / "workflows").glob("*.json"))
    assert server.get("/workflow_templates")[comfy.PACK_FOLDER] == server.get("/api/workflow_templates")[comfy.PACK_FOLDER] == names
    for name in names:
        address = f"/api/workflow_templates/{comfy.PACK_FOLDER}/{urllib.parse.quote(name)}"
        assert server.get(f"{address}.json")["version"] == 0.4
        with urllib.request.urlopen(f"{server.url}{address}.jpg", timeout=30) as card:
            assert card.status == 200


def test_workflows_are_offered_as_templates(server):
    check_templates(server)


def test_a_checkout_serves_all_that_the_published_archive_does(installation, tmp_path, server):
    """Most people clone: then tests, benchmarks and the rest lie in custom_nodes too, and the host goes by the names of folders."""
    with comfy.Server(installation, tmp_path, is_published=False) as cloned:
        assert (tmp_path / "custom_nodes" / comfy.PACK_FOLDER / "tests").is_dir()
        check_templates(cloned)
        assert cloned.get("/i18n") == server.get("/i18n") and cloned.get("/extensions") == server.get("/extensions")
        assert set(cloned.get("/object_info")) == set(server.get("/object_info"))
        subgraphs = cloned.get("/global_subgraphs").values()
        assert {one["name"] for one in subgraphs} == {one["name"] for one in server.get("/global_subgraphs").values()}
