"""A hub in this process: the little of its interface that huggingface_hub asks for one repository, and its failures."""

import hashlib
import http.server
import json
import re
from urllib.parse import unquote, urlsplit


class FakeHub(http.server.ThreadingHTTPServer):
    """Serves files as the repository `name`; refuses, cuts and records as told."""

    daemon_threads = True

    def __init__(self, files: dict[str, bytes], name: str = "org/name"):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files, self.name, self.sha, self.revisions = files, name, "1" * 40, {"main", "v1"}
        self.refuse: dict[str, tuple[int, str]] = {}  # beginning of a path: status and error code
        self.cut: set[str] = set()  # files whose first answer breaks off in the middle
        self.fetched: list[tuple[str, str | None]] = []  # files and ranges
        self.token = None  # of the last request
        self.token_needed = None  # for files of weights and configs; else the licence is not accepted
        self.url = f"http://127.0.0.1:{self.server_port}"

    def served(self) -> list[str]:
        return sorted(name for name, _ in self.fetched)


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeHub

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        hub, path = self.server, unquote(urlsplit(self.path).path)
        hub.token = self.headers.get("authorization")
        if hub.token_needed and hub.token != hub.token_needed and "/resolve/" in path:
            return self.answer(401, {"X-Error-Code": "GatedRepo"})
        for start, (status, code) in hub.refuse.items():
            if path.startswith(start):
                return self.answer(status, {"X-Error-Code": code})
        if match := re.fullmatch(f"/api/models/{hub.name}(?:/(?:revision|tree)/(?P<revision>.*))?", path):
            if (match["revision"] or "main") not in {*hub.revisions, hub.sha}:
                return self.answer(404, {"X-Error-Code": "RevisionNotFound"})
            return self.answer(200, {}, json.dumps(self.tree() if "/tree/" in path else self.info()).encode())
        name = path.removeprefix(f"/{hub.name}/resolve/{hub.sha}/")
        if name not in hub.files:
            return self.answer(404, {"X-Error-Code": "RepoNotFound"})
        data = hub.files[name]
        self.answer(200, {"X-Repo-Commit": hub.sha, "ETag": f'"{etag(name, data)}"', "Accept-Ranges": "bytes"}, data)

    do_GET = do_HEAD

    def info(self) -> dict:
        files = [{"rfilename": f["path"], "size": f["size"], "blobId": f["oid"], "lfs": f["lfs"]} for f in self.tree()]
        return {"id": self.server.name, "sha": self.server.sha, "siblings": files}

    def tree(self) -> list[dict]:
        files = []
        for name, data in self.server.files.items():
            lfs = {"oid": etag(name, data), "sha256": etag(name, data), "size": len(data), "pointerSize": 134}
            entry = {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            files.append(entry | {"lfs": lfs if name.endswith(".safetensors") else None})
        return files

    def answer(self, status: int, headers: dict[str, str], data: bytes = b""):
        name, sent = self.path.rpartition("/")[2], data
        if self.command == "GET" and "/resolve/" in self.path:
            asked = self.headers.get("range")
            self.server.fetched.append((name, asked))
            if asked:
                start = int(asked.removeprefix("bytes=").rstrip("-"))
                status, sent = 206, data[start:]
                headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(sent))}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            if name in self.server.cut:
                self.server.cut.remove(name)
                sent, self.close_connection = sent[: len(sent) // 2], True
            self.wfile.write(sent)


def etag(name: str, data: bytes) -> str:
    """The hash of git's large files, and of its others."""
    return (hashlib.sha256 if name.endswith(".safetensors") else hashlib.sha1)(data).hexdigest()
