"""A server that speaks as much of the Hub's API as uploading and loading need, with faults to order.

Files live in memory, commit by commit; LFS objects are checked against their sha256.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

LFS = (".safetensors", ".bin", ".png", ".pt", ".pth")


@dataclass
class Fault:
    """The next `times` requests whose "METHOD path" matches get this status, or a cut connection where it is None."""

    pattern: str
    status: int | None
    times: int = 1


@dataclass
class LocalHub:
    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    commits: list[tuple[str, str]] = field(default_factory=list)  # (repo, revision) in order
    objects: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    url: str = ""

    def fail(self, pattern: str, status: int | None, times: int = 1) -> None:
        self.faults.append(Fault(pattern, status, times))

    def fault_of(self, request: str) -> Fault | None:
        for fault in self.faults:
            if fault.times and re.search(fault.pattern, request):
                fault.times -= 1
                return fault
        return None


@contextlib.contextmanager
def local_hub() -> Iterator[LocalHub]:
    """A running server; its `url` is what HF_ENDPOINT must be before huggingface_hub is imported."""
    hub = LocalHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: LocalHub

    def log_message(self, *_):
        pass

    def _answer(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(length)
        path = self.path.split("?")[0]
        request = f"{self.command} {path}"
        self.hub.requests.append(request)
        if path == "/fault":  # another process orders or (0 times) takes back a fault
            pattern, status, times = json.loads(body)
            self.hub.faults = [fault for fault in self.hub.faults if fault.pattern != pattern]
            self.hub.fail(pattern, status, times)
            return self._json({})
        fault = self.hub.fault_of(request)
        if fault is None:
            return self._route(path, body)
        if fault.status is None:
            self.close_connection = True
            self.connection.close()
            return None
        return self._json({"error": f"fault {fault.status}"}, fault.status)

    do_GET = do_POST = do_PUT = do_HEAD = _answer

    def _route(self, path: str, body: bytes) -> None:
        hub = self.hub
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            status = 409 if name in hub.repos else 200
            hub.repos.setdefault(name, {})
            return self._json({"url": f"{hub.url}/{name}", "name": name}, status)
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if found := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/preupload/(.+)", path):
            files = json.loads(body)["files"]
            return self._json({"files": [self._mode(file["path"]) for file in files]})
        if found := re.fullmatch(r"/([\w.-]+/[\w.-]+)\.git/info/lfs/objects/batch", path):
            return self._json(
                {"transfer": "basic", "objects": [self._lfs(found[1], o) for o in json.loads(body)["objects"]]}
            )
        if found := re.fullmatch(r"/lfs/(\w+)", path):
            if hashlib.sha256(body).hexdigest() != found[1]:
                return self._json({"error": "sha256 differs"}, 400)
            hub.objects[found[1]] = body
            return self._json({})
        if path == "/lfs-verify":
            return self._json({})
        if found := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/commit/(.+)", path):
            return self._commit(found[1], found[2], body)
        if found := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)(?:/revision/.+)?", path):
            files = hub.repos.get(found[1])
            if files is None:
                return self._missing("RepoNotFound")
            return self._json({"id": found[1], "sha": "a" * 40, "siblings": [{"rfilename": n} for n in files]})
        if found := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/tree/.+", path):
            files = hub.repos.get(found[1], {})
            tree = [{"type": "file", "path": n, "size": len(b), "oid": _etag(b)} for n, b in files.items()]
            return self._json(tree)
        if found := re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/[^/]+/(.+)", path):
            data = hub.repos.get(found[1], {}).get(found[2])
            if data is None:
                return self._missing("EntryNotFound")
            return self._send(data, 200, {"ETag": f'"{_etag(data)}"', "X-Repo-Commit": "a" * 40})
        return self._json({"error": f"no route for {path}"}, 404)

    def _mode(self, path: str) -> dict:
        return {
            "path": path,
            "uploadMode": "lfs" if path.endswith(LFS) else "regular",
            "shouldIgnore": False,
            "oid": None,
        }

    def _lfs(self, repo: str, wanted: dict) -> dict:
        oid, size = wanted["oid"], wanted["size"]
        if any(_etag(data) == oid for data in self.hub.repos[repo].values()):
            return {"oid": oid, "size": size}
        actions = {
            "upload": {"href": f"{self.hub.url}/lfs/{oid}", "header": {}},
            "verify": {"href": f"{self.hub.url}/lfs-verify", "header": {}},
        }
        return {"oid": oid, "size": size, "actions": actions}

    def _commit(self, repo: str, revision: str, body: bytes) -> None:
        files = self.hub.repos[repo]
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif entry["key"] == "deletedFile":
                files.pop(value["path"], None)
        self.hub.commits.append((repo, revision))
        url = f"{self.hub.url}/{repo}/commit/{'a' * 40}"
        self._json({"success": True, "commitOid": "a" * 40, "commitUrl": url, "hookOutput": ""})

    def _missing(self, code: str) -> None:
        self._json({"error": code}, 404, {"X-Error-Code": code, "X-Repo-Commit": "a" * 40})

    def _json(self, value, status: int = 200, headers: dict | None = None) -> None:
        self._send(json.dumps(value).encode(), status, {"Content-Type": "application/json"} | (headers or {}))

    def _send(self, data: bytes, status: int, headers: dict) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _etag(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
