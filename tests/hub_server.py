"""A loopback Hub for the real huggingface_hub client: what it answers is real HTTP, what it stores is in memory.

with Hub() as hub:
    hub.repos["ns/name"] = Repo({"model.safetensors": data})
    ...  # a process with HF_ENDPOINT=hub.url
"""

import hashlib
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple


@dataclass
class Repo:
    """Files by path. `fault` is what goes wrong: "gated", "cut" (half a body), "hang up", or a status such as "503"."""

    files: dict[str, bytes] = field(default_factory=dict)
    fault: str = ""

    @property
    def commit(self) -> str:
        return hashlib.sha1(repr(sorted((path, etag(data)) for path, data in self.files.items())).encode()).hexdigest()

    @property
    def refs(self) -> dict[str, str]:
        return {"main": self.commit, self.commit: self.commit}


class Request(NamedTuple):
    method: str
    repo: str
    path: str
    token: str


class HubError(Exception):
    """An answer that the client takes for an error: on loopback it goes by the code in the header."""

    def __init__(self, status: int, code: str, message: str):
        super().__init__(message)
        self.status, self.code = status, code


class Hub:
    """Serves `repos` at `url` while the context is open, and keeps count in `requests`."""

    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.requests: list[Request] = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs=dict(poll_interval=0.05))

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def count(self, method: str, repo: str) -> int:
        return sum(request[:2] == (method, repo) for request in self.requests)


def etag(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def resolve(self, name: str, rev: str, path: str) -> None:
        """A file of a repository, or its head."""
        repo = self.hub.repos.get(name)
        if repo is None:
            raise HubError(404, "RepoNotFound", "Repository not found")
        if repo.fault == "hang up":
            self.close_connection = True
            return
        if repo.fault == "gated":
            raise HubError(403, "GatedRepo", f"Access to model {name} is restricted: ask for access at {self.hub.url}")
        if repo.fault.isdigit():
            raise HubError(int(repo.fault), "", "Out of order")
        if rev not in repo.refs:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {rev}")
        if path not in repo.files:
            raise HubError(404, "EntryNotFound", "Entry not found")
        data = repo.files[path]
        self.answer(200, data, {"ETag": f'"{etag(data)}"', "X-Repo-Commit": repo.refs[rev]}, cut=repo.fault == "cut")

    routes = [
        ("GET HEAD", re.compile(r"/(?P<name>[^/]+/[^/]+)/resolve/(?P<rev>[^/]+)/(?P<path>.+)"), resolve),
    ]

    def dispatch(self) -> None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        for methods, pattern, route in self.routes:
            match = pattern.fullmatch(self.path)
            if match and self.command in methods.split():
                self.hub.requests.append(Request(self.command, match["name"], match["path"], token))
                try:
                    return route(self, **match.groupdict())
                except HubError as e:
                    return self.answer(e.status, b"", {"X-Error-Code": e.code, "X-Error-Message": str(e)})
        return self.answer(501, b"", {"X-Error-Message": f"no route for {self.command} {self.path}"})

    do_GET = do_HEAD = dispatch

    def answer(self, status: int, body: bytes, headers: dict[str, str], cut: bool = False) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if cut else body)
            self.close_connection = cut

    def log_message(self, *_) -> None:
        pass
