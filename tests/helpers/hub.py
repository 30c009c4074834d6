"""A small Hugging Face hub on this machine, which the real client talks to over HTTP."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

OWNER, READER = "hf_owner", "hf_reader"  # tokens: of "me", and of one who may write nowhere


class Hub(ThreadingHTTPServer):
    """repos: by name {private, files by name, commits}; requests: each as "METHOD /path"."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repos: dict[str, dict[str, Any]] = {}
        self.requests: list[str] = []

    def answer(self, method: str, path: str, token: str, body: bytes) -> tuple[int, dict[str, Any]]:
        self.requests.append(f"{method} {path}")
        if token not in (OWNER, READER):
            return 401, {"error": "Invalid username or password."}
        if path == "/api/validate-yaml":
            _, front, _ = json.loads(body)["content"].split("---\n", 2)
            errors = [] if isinstance(yaml.safe_load(front), dict) else [{"message": '"metadata" must be a mapping'}]
            return 400 if errors else 200, {"errors": errors, "warnings": []}
        if method == "POST" and token == READER:
            return 403, {"error": "You don't have the rights to create a model under this namespace"}
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization'] or 'me'}/{asked['name']}"
            there = name in self.repos
            self.repos.setdefault(name, {"private": asked["visibility"] == "private", "files": {}, "commits": []})
            return 409 if there else 200, {"url": f"{self.url}/{name}"}
        name = "/".join(path.removeprefix("/api/models/").split("/")[:2])
        if name not in self.repos:
            return 404, {"error": "Repository not found"}
        repo = self.repos[name]
        if method == "GET":
            names = [{"rfilename": file} for file in repo["files"]]
            return 200, {"id": name, "private": repo["private"], "siblings": names}
        if path.endswith("/preupload/main"):
            kind = {"uploadMode": "regular", "shouldIgnore": False}
            return 200, {"files": [{"path": file["path"], **kind} for file in json.loads(body)["files"]]}
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                repo["commits"].append(value["summary"])
            elif line["key"] == "deletedFile":
                del repo["files"][value["path"]]
            else:
                repo["files"][value["path"]] = base64.b64decode(value["content"])
        return 200, {"success": True, "commitOid": "0" * 40, "commitUrl": f"{self.url}/{name}/commit/{'0' * 40}"}


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        status, answer = self.server.answer(self.command, self.path.partition("?")[0], token, body)
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST  # noqa: N815

    def log_message(self, *_: Any) -> None:
        """Print nothing."""


@contextmanager
def running_hub() -> Iterator[Hub]:
    with Hub() as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        try:
            yield hub
        finally:
            hub.shutdown()
