"""Make a video for each row of a table on several ComfyUI servers, over ComfyUI's own HTTP API. Python 3.10 or newer, no other package.

    python comfy_queue.py --graph graph.json --csv rows.csv --out videos --server http://gpu1:8188 --server http://gpu2:8188

graph.json: a workflow as *Export (API)* of ComfyUI saves it, with {{column}} where a row's cell goes: "text": "{{prompt}}",
"seed": "{{seed}}" (a text that is nothing but {{column}} becomes a number where the cell is one).

Each server has one row at a time; a row that fails is tried on another, three times in all; a server that does not answer is left alone for a
minute. Files go to OUT/0001_NAME, so that the same command goes on where it was stopped. --metrics 9400 serves throughput, failures and queue
lengths as Prometheus text at http://THIS_MACHINE:9400/metrics; --metrics FILE keeps them in a file.
"""

import argparse
import csv
import http.client
import json
import re
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

TRIES, REST, LOOK_AGAIN = 3, 60.0, 1.0  # of a row; seconds without a server that does not answer; seconds between looks
ANSWER_WITHIN = 30.0  # seconds, one HTTP request
_CELL, _NUMBER = re.compile(r"\{\{([^{}]+)\}\}"), re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?")


class Failed(Exception):
    """The server ran the graph, or refused it, and said why."""


class Metrics:
    """Counts as Prometheus reads them. path: of a file to keep them in, if there is one."""

    HELP = {
        "open_sora_videos_total": ("counter", "rows finished"),
        "open_sora_failures_total": ("counter", "tries of a row that failed"),
        "open_sora_seconds_total": ("counter", "seconds that finished rows took"),
        "open_sora_rows_waiting": ("gauge", "rows that no server has yet"),
        "open_sora_queue_length": ("gauge", "prompts that run or wait on a server, of anybody; -1: it does not answer"),
    }

    def __init__(self, path: Path | None = None):
        self._values, self._lock, self._path = {}, threading.Lock(), path

    def add(self, name: str, value: float, **labels: str) -> None:
        with self._lock:
            key = name, tuple(labels.items())
            self._values[key] = self._values.get(key, 0.0) + value

    def set(self, name: str, value: float, **labels: str) -> None:
        with self._lock:
            self._values[name, tuple(labels.items())] = value

    def text(self) -> str:
        lines = []
        with self._lock:
            for name, (kind, about) in self.HELP.items():
                lines += [f"# HELP {name} {about}", f"# TYPE {name} {kind}"]
                for (found, labels), value in self._values.items():
                    if found == name:
                        inside = ",".join(f"{label}={json.dumps(text)}" for label, text in labels)
                        lines.append(f"{name}{{{inside}}} {value:.15g}" if inside else f"{name} {value:.15g}")
        return "\n".join(lines) + "\n"

    def keep(self) -> None:
        """Write them into the file, whole at every moment."""
        if self._path is not None:
            _written(self._path, self.text().encode()).replace(self._path)

    def serve(self, port: int) -> ThreadingHTTPServer:
        metrics = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                content = metrics.text().encode()
                self.send_response(200)
                self.send_header("Content-Type", "text/plain; version=0.0.4")
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *said):
                pass

        server = ThreadingHTTPServer(("", port), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return server


class Server:
    """One ComfyUI. Raises OSError where it does not answer, Failed where it answers no."""

    def __init__(self, url: str):
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:  # a port that is no number raises by itself
            raise ValueError(f"--server {url} is not of the form http://HOST:PORT")
        self.url, self._client = url.rstrip("/"), uuid.uuid4().hex

    def ask(self, path: str, body: dict | None = None) -> bytes:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=ANSWER_WITHIN) as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            if error.code in (502, 503, 504):  # of what stands before a server that is away
                raise
            raise Failed(error.read().decode(errors="replace")[:400]) from error
        except http.client.HTTPException as error:  # it went away within its answer
            raise OSError(f"{type(error).__name__}: {error}") from error

    def queue_length(self) -> int:
        found = json.loads(self.ask("/queue"))
        return len(found["queue_running"]) + len(found["queue_pending"])

    def run(self, graph: dict) -> list[dict]:
        """Run a graph to its end: the files that it saved, previews left out, as /view names them."""
        prompt_id = json.loads(self.ask("/prompt", {"prompt": graph, "client_id": self._client}))["prompt_id"]
        while True:
            found = json.loads(self.ask(f"/history/{prompt_id}")).get(prompt_id)
            if found is not None and found.get("status", {}).get("completed") is False:
                raise Failed(_why(found["status"]))
            if found is not None:
                lists = [kind for output in found["outputs"].values() for kind in output.values() if isinstance(kind, list)]
                return [file for files in lists for file in files if isinstance(file, dict) and file.get("type") == "output"]
            if prompt_id not in self.ask("/queue").decode() and prompt_id not in self.ask(f"/history/{prompt_id}").decode():
                raise OSError("the server has forgotten the row; was it started anew?")
            time.sleep(LOOK_AGAIN)

    def file(self, named: dict) -> bytes:
        return self.ask("/view?" + urllib.parse.urlencode({key: named.get(key, "") for key in ("filename", "subfolder", "type")}))


def _why(status: dict) -> str:
    said = [about.get("exception_message", "").strip() for kind, about in status.get("messages", ()) if kind == "execution_error"]
    return " ".join(said) or "the graph was interrupted"


def filled(graph, row: dict):
    """A graph with a row's cells in the place of {{column}}."""
    if isinstance(graph, dict):
        return {key: filled(value, row) for key, value in graph.items()}
    if isinstance(graph, list):
        return [filled(value, row) for value in graph]
    if not isinstance(graph, str):
        return graph
    text = _CELL.sub(lambda found: row[found[1].strip()], graph)
    return json.loads(text) if _CELL.fullmatch(graph) and _NUMBER.fullmatch(text) else text


def _written(path: Path, content: bytes) -> Path:
    """A hidden file beside `path` that can take its place."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(content)
    return partial


class Work:
    """Rows on their way through the servers."""

    def __init__(self, graph: dict, rows: list[dict], out: Path, metrics: Metrics):
        self._graph, self._out, self._metrics = graph, out, metrics
        self.failed: dict[int, str] = {}
        # (number, row, servers that failed at it)
        self._waiting = [(number, row, []) for number, row in enumerate(rows, 1) if not list(out.glob(f"{number:04d}_*"))]
        self._left, self._lock, self._there = len(self._waiting), threading.Lock(), set()

    def run(self, servers: list[Server]) -> None:
        self._there = set(servers)
        threads = [threading.Thread(target=self._serve, args=(server,), daemon=True) for server in servers]
        for thread in threads:
            thread.start()
        while self._left and any(thread.is_alive() for thread in threads):
            self.look(servers)
            time.sleep(LOOK_AGAIN)
        self.look(servers)

    def look(self, servers: list[Server]) -> None:
        self._metrics.set("open_sora_rows_waiting", len(self._waiting))
        for server in servers:
            try:
                length = server.queue_length()
            except (OSError, Failed, ValueError, KeyError):
                length = -1
            self._metrics.set("open_sora_queue_length", length, server=server.url)
        self._metrics.keep()

    def _take(self, server: Server) -> tuple[int, dict, list[Server]] | None:
        """The next row for a server: one that it failed at only where no other is there that has not."""
        with self._lock:
            for place, (_, _, tried) in enumerate(self._waiting):
                if server not in tried or not self._there.difference(tried):
                    return self._waiting.pop(place)
        return None

    def _serve(self, server: Server) -> None:
        while self._left:
            if (taken := self._take(server)) is None:
                time.sleep(LOOK_AGAIN)
                continue
            number, row, tried = taken
            begun = time.monotonic()
            try:
                named = server.run(filled(self._graph, row))
                if not named:
                    raise Failed("the graph made no file; it needs a node that saves one")
                files = [(one["filename"], server.file(one)) for one in named]
            except OSError as error:  # rows are not lost to a server that is away
                self._there.discard(server)
                self._again(server, number, row, tried, error)
                _rest_unless(lambda: not self._left)
                self._there.add(server)
                continue
            except Exception as error:  # noqa: BLE001 - whatever it is, the row goes to another server
                self._again(server, number, row, [*tried, server], error)
                continue
            try:
                self._keep(number, files)
            except OSError as error:  # of this machine, which no server can mend
                self._fail(number, f"its files cannot be kept: {error}")
                continue
            self._metrics.add("open_sora_videos_total", 1, server=server.url)
            self._metrics.add("open_sora_seconds_total", time.monotonic() - begun, server=server.url)
            self._one_less()

    def _keep(self, number: int, files: list[tuple[str, bytes]]) -> None:
        """Write a row's files, all of them before the first has its name, by which the row counts as finished."""
        partials: dict[Path, Path] = {}
        for name, content in files:
            path = self._out / f"{number:04d}_{Path(name).name}"
            while path in partials:  # of the same name in another folder of the server
                path = path.with_stem(f"{path.stem}_1")
            partials[path] = _written(path, content)
        for path, partial in partials.items():
            partial.replace(path)
            with suppress(BrokenPipeError):  # whoever read the paths is gone
                print(path, flush=True)

    def _again(self, server: Server, number: int, row: dict, tried: list[Server], error: Exception) -> None:
        """Put a row back, or give it up. tried: who failed at it."""
        self._metrics.add("open_sora_failures_total", 1, server=server.url)
        why = f"{server.url}: {error}"
        print(f"row {number}: {why}", file=sys.stderr, flush=True)
        if len(tried) >= TRIES:
            self._fail(number, why)
        else:
            with self._lock:
                self._waiting.append((number, row, tried))

    def _fail(self, number: int, why: str) -> None:
        self.failed[number] = why
        self._one_less()

    def _one_less(self) -> None:
        with self._lock:
            self._left -= 1


def _rest_unless(is_over) -> None:
    until = time.monotonic() + REST
    while time.monotonic() < until and not is_over():
        time.sleep(min(LOOK_AGAIN, REST))


def _read(graph_path: Path, csv_path: Path) -> tuple[dict, list[dict]]:
    """A graph and the rows, without those that hold nothing. Raises a ValueError for what no server could run."""
    try:
        graph = json.loads(graph_path.read_text(encoding="utf-8"))
        with csv_path.open(newline="", encoding="utf-8-sig") as file:
            rows = [{key.strip(): (value or "").strip() for key, value in row.items() if key} for row in csv.DictReader(file)]
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{graph_path} or {csv_path} cannot be read: {error}") from error
    rows = [row for row in rows if any(row.values())]
    if not isinstance(graph, dict) or not all(isinstance(node, dict) and "class_type" in node for node in graph.values()):
        raise ValueError(f"{graph_path} is not in ComfyUI's API form; save it with Export (API)")
    missing = {name.strip() for name in _CELL.findall(json.dumps(graph, ensure_ascii=False))} - set(rows[0] if rows else ())
    if not rows or missing:
        raise ValueError(f"{csv_path} has no {'row' if not rows else 'column ' + ', '.join(sorted(missing))}")
    return graph, rows


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--graph", required=True, type=Path, help="a workflow in ComfyUI's API form, with {{column}} in it")
    parser.add_argument("--csv", required=True, type=Path, help="a table whose first row names the columns")
    parser.add_argument("--out", required=True, type=Path, help="the folder to write to")
    parser.add_argument("--server", required=True, action="append", help="http://HOST:PORT of a ComfyUI; may be repeated")
    parser.add_argument("--metrics", help="a port to serve Prometheus text on, or a file to keep it in")
    args = parser.parse_args(arguments)
    is_port, served = bool(args.metrics) and args.metrics.isdecimal(), None
    metrics = Metrics(None if is_port or not args.metrics else Path(args.metrics))
    try:
        servers, (graph, rows) = [Server(url) for url in args.server], _read(args.graph, args.csv)
        args.out.mkdir(parents=True, exist_ok=True)
        served = metrics.serve(int(args.metrics)) if is_port else None
        work = Work(graph, rows, args.out, metrics)
        work.run(servers)
    except (OSError, OverflowError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on with the rows that are not finished", file=sys.stderr)
        return 130
    finally:
        if served is not None:
            served.shutdown()
    for number, why in sorted(work.failed.items()):
        print(f"row {number} failed: {why}", file=sys.stderr)
    return 1 if work.failed else 0


if __name__ == "__main__":
    sys.exit(main())
