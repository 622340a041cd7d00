"""A stand-in for the hub's endpoint: answers what huggingface_hub asks when it makes a repository and uploads to it."""

import base64
import json
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

LARGE = (".safetensors", ".gguf")
TOKEN = "hf_stand_in"


@dataclass
class Hub:
    """What the stand-in holds: repository -> file -> bytes, and what was asked of it."""

    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)
    refuse_commits: bool = False
    endpoint: str = ""


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Says nothing."""

    def answer(self, body: Any, status: int = 200) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if status >= 400:
            self.send_header("X-Error-Message", body["error"])
        self.end_headers()
        self.wfile.write(data)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def handle_all(self) -> None:
        data, path = self.body(), self.path.split("?")[0]
        self.hub.asked.append(f"{self.command} {path}")
        if self.headers.get("Authorization") != f"Bearer {TOKEN}" and not path.startswith("/blobs/"):
            return self.answer({"error": "Invalid credentials in Authorization header"}, 401)
        if path == "/api/whoami-v2":
            return self.answer({"name": "me", "type": "user", "orgs": []})
        if path == "/api/repos/create":
            return self.create(json.loads(data))
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if path.startswith("/blobs/"):
            self.hub.blobs[path.removeprefix("/blobs/")] = data
            return self.answer({})
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                one | {"actions": {"upload": {"href": f"{self.hub.endpoint}/blobs/{one['oid']}"}}}
                for one in json.loads(data)["objects"]
            ]
            return self.answer({"transfer": "basic", "objects": objects})
        _, _, _, owner, name, *rest = path.split("/")
        return self.of_repository(f"{owner}/{name}", rest, data)

    do_GET = do_POST = do_PUT = handle_all

    def create(self, wanted: dict[str, Any]) -> None:
        owner = wanted["organization"] or "me"
        name = f"{owner}/{wanted['name']}"
        if owner != "me":
            return self.answer({"error": f"You don't have the rights to create a model under {owner}"}, 403)
        if name in self.hub.repositories:
            return self.answer({"error": "You already created this model repo", "url": ""}, 409)
        self.hub.repositories[name] = {".gitattributes": b""}
        self.hub.private[name] = wanted.get("visibility") == "private" or wanted.get("private") is True
        return self.answer({"url": f"{self.hub.endpoint}/{name}", "name": name})

    def of_repository(self, name: str, rest: list[str], data: bytes) -> None:
        if name not in self.hub.repositories:
            return self.answer({"error": "Repository not found"}, 404)
        files = self.hub.repositories[name]
        if rest[0] == "preupload":
            modes = [
                {"path": one["path"], "uploadMode": "lfs" if one["path"].endswith(LARGE) else "regular"}
                | {"shouldIgnore": False}
                for one in json.loads(data)["files"]
            ]
            return self.answer({"files": modes})
        if rest[0] == "commit":
            if self.hub.refuse_commits:
                return self.answer({"error": "Forbidden: this token may not write"}, 403)
            for line in map(json.loads, data.splitlines()):
                value = line["value"]
                if line["key"] == "header":
                    self.hub.messages.append(value["summary"])
                elif line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                else:
                    files[value["path"]] = self.hub.blobs[value["oid"]]
            url = f"{self.hub.endpoint}/{name}/commit/1234"
            return self.answer({"success": True, "commitOid": "1234", "commitUrl": url, "hookOutput": ""})
        if rest[0] == "tree":
            return self.answer([{"type": "file", "path": file, "size": 1, "oid": "0"} for file in files])
        siblings = [{"rfilename": file} for file in files]
        return self.answer({"id": name, "modelId": name, "sha": "1234", "siblings": siblings, "private": False})


@contextmanager
def stand_in():
    """A hub that listens on this machine."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
