"""What a front-end hears while a graph runs: the host's websocket, read with the standard library.

Just enough of RFC 6455 for one client on this machine: a handshake, unmasked frames from the server, no extensions.
"""

import base64
import json
import os
import socket
import struct
import time
import uuid
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from .comfy import HostError, Server

TEXT, BINARY, CLOSE, PING = 1, 2, 8, 9
PREVIEW, NODE_TEXT = 1, 3  # the host's kinds of binary message: 4 bytes big-endian, then its content


@dataclass
class Events:
    """One run as heard.

    Attributes:
        messages: (type, data) of every JSON message, in order.
        previews: pictures (JPEG or PNG bytes).
        texts: (node id, line) that nodes showed while running.
        outputs: node id -> what it put into the history.
        error: the host's description of a failed node, or None.
        interrupted: the run was stopped.
    """

    messages: list[tuple[str, dict]] = field(default_factory=list)
    previews: list[bytes] = field(default_factory=list)
    texts: list[tuple[str, str]] = field(default_factory=list)
    outputs: dict[str, dict] = field(default_factory=dict)
    error: dict | None = None
    interrupted: bool = False

    def progress(self, node_id: str) -> list[tuple[int, int]]:
        """(value, maximum) of a node's progress bar, in order."""
        found = [data for kind, data in self.messages if kind == "progress" and data.get("node") == node_id]
        return [(int(data["value"]), int(data["max"])) for data in found]


class Listener:
    """A websocket to a host. `on_message(kind, data)` may be set to act while a graph runs (to interrupt it)."""

    def __init__(self, url: str):
        self.client_id = uuid.uuid4().hex
        self.address = urlsplit(url)
        self.on_message = None

    def __enter__(self) -> "Listener":
        self._socket = socket.create_connection((self.address.hostname, self.address.port), timeout=30)
        key = base64.b64encode(os.urandom(16)).decode()
        request = (
            f"GET /ws?clientId={self.client_id} HTTP/1.1", f"Host: {self.address.netloc}", "Upgrade: websocket", "Connection: Upgrade",
            f"Sec-WebSocket-Key: {key}", "Sec-WebSocket-Version: 13", "", "",
        )  # fmt: skip
        self._socket.sendall("\r\n".join(request).encode())
        self._file = self._socket.makefile("rb")
        if b" 101 " not in self._file.readline():
            raise HostError("The host refused the websocket.")
        while self._file.readline().strip():
            pass
        return self

    def __exit__(self, *exception) -> None:
        self._file.close()
        self._socket.close()

    def run(self, server: Server, graph: dict, seconds: float = 120) -> Events:
        """Run a graph (API form) to its end, failed or not, and return what was heard.

        Raises:
            HostError: the host refused the graph, or it took too long.
        """
        events, end = Events(), time.monotonic() + seconds
        prompt_id = server.post("/prompt", {"prompt": graph, "client_id": self.client_id})["prompt_id"]
        while time.monotonic() < end:
            kind, payload = self._frame()
            if kind == BINARY:
                _take_binary(events, payload)
            elif kind == TEXT:
                message = json.loads(payload)
                name, data = message["type"], message["data"]
                events.messages.append((name, data))
                if self.on_message is not None:
                    self.on_message(name, data)
                if data.get("prompt_id") == prompt_id and _take(events, name, data):
                    return events
        raise HostError(f"The graph did not finish in {seconds:.0f} s.")

    def _frame(self) -> tuple[int, bytes]:
        """(kind, payload) of the next message, its parts joined."""
        kind, payload, is_last = 0, b"", False
        while not is_last:
            first, second = self._read(2)
            length = second & 0x7F
            if length > 125:
                length = int.from_bytes(self._read(2 if length == 126 else 8), "big")
            kind, payload, is_last = kind or first & 0x0F, payload + self._read(length), bool(first & 0x80)
        if kind == PING:
            self._socket.sendall(bytes((0x8A, 0x80, 0, 0, 0, 0)))
        if kind == CLOSE:
            raise HostError("The host closed the websocket.")
        return kind, payload

    def _read(self, count: int) -> bytes:
        data = self._file.read(count)
        if len(data) < count:
            raise HostError("The host closed the websocket.")
        return data


def _take(events: Events, name: str, data: dict) -> bool:
    """Note a message of the run; True when it was the last."""
    if name == "executed":
        events.outputs[data["node"]] = data["output"]
    elif name == "execution_error":
        events.error = data
    elif name == "execution_interrupted":
        events.interrupted = True
    return name in ("execution_success", "execution_error", "execution_interrupted")


def _take_binary(events: Events, payload: bytes) -> None:
    (kind,) = struct.unpack(">I", payload[:4])
    if kind == PREVIEW:
        events.previews.append(payload[8:])
    elif kind == NODE_TEXT:
        (length,) = struct.unpack(">I", payload[4:8])
        events.texts.append((payload[8 : 8 + length].decode(), payload[8 + length :].decode()))
