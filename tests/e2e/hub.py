"""A model hub on loopback: as much of Hugging Face's as vLLM needs to start by a model's name."""

import contextlib
import functools
import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from tools.make_model import WEIGHT_SUFFIXES

HOST = "127.0.0.1"
_API = re.compile(r"/api/models/(?P<model>[^/]+/[^/]+)(/(?P<what>revision|tree)/(?P<rev>[^/]+))?")
_FILE = re.compile(r"/(?P<model>[^/]+/[^/]+)/resolve/(?P<rev>[^/]+)/(?P<file>.+)")
_RANGE = re.compile(r"bytes=(\d+)-(\d*)")


@dataclass(frozen=True)
class HubModel:
    """A model on the hub.

    Attributes:
        commits: hash -> folder with the files of that commit.
        refs: branch or tag -> hash.
    """

    commits: Mapping[str, Path]
    refs: Mapping[str, str]


@dataclass
class Hub:
    """What the hub has, and which files it has sent.

    Attributes:
        models: name -> model.
        endpoint: the value of HF_ENDPOINT.
        sent: commit and name of each file that was sent whole or to its end, in order.
    """

    models: Mapping[str, HubModel]
    endpoint: str = ""
    sent: list[tuple[str, str]] = field(default_factory=list)

    def weights_sent(self) -> list[tuple[str, str]]:
        return [sent for sent in self.sent if sent[1].endswith(WEIGHT_SUFFIXES)]

    def environment(self, home: Path, *, offline: bool = False) -> dict[str, str]:
        """Returns what a process needs to use this hub, with a cache of its own."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "1" if offline else "0",
            "TRANSFORMERS_OFFLINE": "0",
            "NO_PROXY": HOST,
            "no_proxy": HOST,
        }


@contextlib.contextmanager
def serving(models: Mapping[str, HubModel]) -> Iterator[Hub]:
    hub = Hub(models)
    with ThreadingHTTPServer((HOST, 0), functools.partial(_Handler, hub)) as server:
        hub.endpoint = f"http://{HOST}:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, hub: Hub, *args: Any) -> None:
        self._hub = hub
        super().__init__(*args)

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self) -> None:
        path = urlsplit(self.path).path
        asked = _API.fullmatch(path) or _FILE.fullmatch(path)
        model = self._hub.models.get(asked["model"]) if asked else None
        if asked is None or model is None:
            return self._send(404, {"X-Error-Code": "RepoNotFound" if asked else "EntryNotFound"})
        revision = unquote(asked["rev"] or "main")
        commit = model.refs.get(revision, revision)
        if commit not in model.commits:
            return self._send(404, {"X-Error-Code": "RevisionNotFound"})
        folder = model.commits[commit]
        if asked.re is _API:
            files = sorted(file.name for file in folder.iterdir())
            if asked["what"] == "tree":
                return self._send_json([_entry(folder / name) for name in files])
            siblings = [{"rfilename": name} for name in files]
            return self._send_json({"id": asked["model"], "sha": commit, "siblings": siblings})
        file = folder / unquote(asked["file"])
        if not file.is_file():
            return self._send(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        return self._send_file(file, commit)

    def _send_file(self, file: Path, commit: str) -> None:
        content = file.read_bytes()
        headers = {"ETag": f'"{_digest(file)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        span = _RANGE.fullmatch(self.headers.get("Range", ""))
        # A part with an end, as vLLM reads of the header of a weight file, is no download.
        if self.command == "GET" and not (span and span[2]):
            self._hub.sent.append((commit, file.name))
        if span:
            first, last = int(span[1]), min(int(span[2] or len(content)), len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            return self._send(206, headers, content[first : last + 1])
        return self._send(200, headers, content)

    def _send_json(self, value: object) -> None:
        self._send(200, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def _send(self, status: int, headers: Mapping[str, str], body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


def _entry(file: Path) -> dict[str, Any]:
    entry = {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": _digest(file)}
    if file.name.endswith(WEIGHT_SUFFIXES):
        entry["lfs"] = {"oid": _digest(file), "size": file.stat().st_size, "pointerSize": 134}
    return entry


@functools.cache
def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def cached_files(home: Path) -> set[str]:
    """Returns the names of all files in a cache that have been downloaded."""
    snapshots = home.glob("hub/models--*/snapshots/*")
    return {name for snapshot in snapshots for name in os.listdir(snapshot)}
