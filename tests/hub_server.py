"""A loopback Hub for the real huggingface_hub client: it answers in real HTTP what `hub_storage` keeps in memory.

with Hub({"hf_token": {"lab"}}) as hub:  # tokens, and the namespaces that each may write to
    hub.repos["lab/name"] = Repo({"model.safetensors": data})
    hub.faults.append(Fault("GET /lab/name/resolve", "cut"))
    ...  # a process with HF_ENDPOINT=hub.url and HF_HUB_DISABLE_XET=1

Paths, headers and bodies are those that the Hub and its client exchange; what no client of ours asks for is missing.
"""

import base64
import json
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple

import yaml
from hub_storage import LARGE, HubError, Repo, describe, etag, sha256

LICENSES = ("apache-2.0", "bsd-3-clause", "cc-by-nc-4.0", "mit", "other")


@dataclass
class Fault:
    """What goes wrong with requests whose "METHOD /path" matches `pattern`, the first `times` times.

    kind: "hang up" (before the request is read), "no answer" (it is done, and the connection closes), "cut" (half of
    the answer's body), "corrupt" (its last bit is flipped), "slow" (the answer takes 8 s), "trickle" (it comes in
    parts, for a second), a status: "503", "gated"; or what happens just before the request is handled, such as
    somebody else's commit.
    """

    pattern: str
    kind: str | Callable[[], None]
    times: int = 1_000_000


class Request(NamedTuple):
    method: str
    repo: str
    path: str
    token: str


class Hub:
    """Serves `repos` at `url` while the context is open, and keeps count in `requests`.

    Args:
        writers: the tokens that the Hub knows, and the namespaces that each may write to.
    """

    def __init__(self, writers: dict[str, set[str]]):
        self.writers = writers
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}  # uploaded through LFS, not yet in a commit or already
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self.lock = threading.Lock()
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

    def take_fault(self, request: str) -> str:
        with self.lock:
            found = next((f for f in self.faults if f.times and re.match(f.pattern, request)), None)
            if found is None:
                return ""
            found.times -= 1
        return found.kind if isinstance(found.kind, str) else found.kind() or ""


ROUTES: list[tuple[str, re.Pattern, Callable]] = []


def route(methods: str, path: str) -> Callable[[Callable], Callable]:
    """Registers a method of the handler for a path: `{repo}` and `{rev}` and `{path}` are its arguments."""
    parts = dict(repo="[^/]+/[^/]+?", rev="[^/?]+", path="[^?]+")
    pattern = re.sub(r"\{(\w+)\}", lambda m: f"(?P<{m[1]}>{parts[m[1]]})", path)
    return lambda f: ROUTES.append((methods, re.compile(pattern + r"(\?.*)?"), f)) or f


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    # --- who asks

    def writes(self, namespace: str) -> None:
        if not self.token:
            raise HubError(401, "", "Invalid username or password.")
        if namespace not in self.hub.writers[self.token]:
            raise HubError(403, "", f"You don't have the rights to create or write to {namespace}")

    def repository(self, name: str) -> Repo:
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and name.split("/")[0] not in self.hub.writers.get(self.token, ())):
            raise HubError(404 if self.token else 401, "RepoNotFound", "Repository not found")
        return repo

    # --- repositories

    @route("GET", "/api/whoami-v2")
    def whoami(self):
        if not self.token:
            raise HubError(401, "", "Invalid username or password.")
        self.answer_json(dict(type="user", name="somebody", auth=dict(type="access_token"), orgs=[]))

    @route("POST", "/api/repos/create")
    def create(self):
        asked = json.loads(self.body)
        namespace = asked["organization"] or "somebody"
        self.writes(namespace)
        name = f"{namespace}/{asked['name']}"
        existed = name in self.hub.repos
        self.hub.repos.setdefault(name, Repo(private=asked.get("visibility") == "private"))
        self.answer_json(dict(url=f"{self.hub.url}/{name}", error="exists already"), 409 if existed else 200)

    @route("GET", "/api/models/{repo}(/revision/{rev})?")
    def info(self, repo, rev):
        repository = self.repository(repo)
        commit = repository.find(rev or "main")
        siblings = [dict(rfilename=path) for path in sorted(commit.files)]
        self.answer_json(dict(id=repo, sha=commit.oid, private=repository.private, siblings=siblings, tags=[]))

    @route("GET", "/api/models/{repo}/tree/{rev}")
    def tree(self, repo, rev):
        commit = self.repository(repo).find(rev)
        self.answer_json([describe(path, data) for path, data in sorted(commit.files.items())])

    @route("GET", "/api/models/{repo}/refs")
    def refs(self, repo):
        found = self.repository(repo)
        tags = [dict(name=n, ref=f"refs/tags/{n}", targetCommit=oid) for n, oid in found.tags.items()]
        main = dict(name="main", ref="refs/heads/main", targetCommit=found.commit)
        self.answer_json(dict(branches=[main], converts=[], tags=tags))

    @route("POST", "/api/models/{repo}/tag/{rev}")
    def tag(self, repo, rev):
        found, name = self.repository(repo), json.loads(self.body)["tag"]
        self.writes(repo.split("/")[0])
        if name in found.tags:
            raise HubError(409, "", f"Tag {name} exists already")
        found.tags[name] = found.find(rev).oid
        self.answer_json({})

    # --- uploads

    @route("POST", "/api/validate-yaml")
    def validate_yaml(self):
        front = re.match(r"---\n(.*?)\n---\n", json.loads(self.body)["content"], re.DOTALL)
        card = yaml.safe_load(front[1]) if front else {}
        results = [result for model in card.get("model-index", ()) for result in model["results"]]
        data = {*card.get("datasets", ()), *(result["dataset"]["type"] for result in results)}
        bad = [name for name in data if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name)]
        errors = [dict(message=f"no data set: {name}") for name in bad]
        errors += [] if card.get("license") in LICENSES else [dict(message=f"no license: {card.get('license')}")]
        self.answer_json(dict(errors=errors, warnings=[]), 400 if errors else 200)

    @route("POST", "/api/models/{repo}/preupload/{rev}")
    def preupload(self, repo, rev):
        files = self.repository(repo).find(rev).files
        self.writes(repo.split("/")[0])
        answers = []
        for file in json.loads(self.body)["files"]:
            path = file["path"]
            answers.append(dict(path=path, uploadMode="lfs" if path.endswith(LARGE) else "regular", shouldIgnore=False))
            answers[-1]["oid"] = etag(path, files[path]) if path in files else None
        self.answer_json(dict(files=answers))

    @route("POST", "/{repo}.git/info/lfs/objects/batch")
    def batch(self, repo):
        self.repository(repo)
        self.writes(repo.split("/")[0])
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            href = f"{self.hub.url}/lfs/{repo}/{wanted['oid']}"
            signed = f"{href}?X-Amz-Signature=planted"  # as good as a token, while it lasts
            actions = dict(upload=dict(href=signed), verify=dict(href=f"{href}/verify"))
            objects.append(wanted | ({} if wanted["oid"] in self.hub.blobs else dict(actions=actions)))
        self.answer_json(dict(transfer="basic", objects=objects))

    @route("PUT", "/lfs/{repo}/{rev}")
    def upload(self, repo, rev):
        if sha256(self.body) != rev:
            raise HubError(400, "", "These bytes have another sha256")
        self.hub.blobs[rev] = self.body
        self.answer(200, b"", {})

    @route("POST", "/lfs/{repo}/{rev}/verify")
    def verify(self, repo, rev):
        if len(self.hub.blobs.get(rev, b"")) != json.loads(self.body)["size"]:
            raise HubError(404, "", "No such object")
        self.answer_json({})

    @route("POST", "/api/models/{repo}/commit/{rev}")
    def add_commit(self, repo, rev):
        found = self.repository(repo)
        self.writes(repo.split("/")[0])
        with self.hub.lock:
            files = dict(found.find(rev).files)
            for line in self.body.splitlines():
                key, value = (entry := json.loads(line))["key"], entry["value"]
                if key == "header" and value.get("parentCommit", found.commit) != found.commit:
                    raise HubError(412, "", "The branch has moved on")
                elif key == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif key == "lfsFile":
                    files[value["path"]] = self.hub.blobs[value["oid"]]
                elif key == "deletedFile":
                    del files[value["path"]]
            found.add_commit(files)
        self.answer_json(dict(commitOid=found.commit, commitUrl=f"{self.hub.url}/{repo}/commit/{found.commit}"))

    # --- downloads

    @route("GET HEAD", "/{repo}/resolve/{rev}/{path}")
    def resolve(self, repo, rev, path):
        commit = self.repository(repo).find(rev)
        if path not in commit.files:
            raise HubError(404, "EntryNotFound", "Entry not found")
        data = commit.files[path]
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{etag(path, data)}"', "Accept-Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if wanted:
            headers["Content-Range"] = f"bytes {wanted[1]}-{len(data) - 1}/{len(data)}"
        self.answer(206 if wanted else 200, data[int(wanted[1]) :] if wanted else data, headers)

    # --- HTTP

    def dispatch(self) -> None:
        self.token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        self.fault = self.hub.take_fault(f"{self.command} {self.path}")
        if self.fault == "hang up":
            self.close_connection = True
            return
        self.body = self.read_body()
        for methods, pattern, handle in ROUTES:
            match = pattern.fullmatch(self.path)
            if match and self.command in methods.split():
                return self.handle_request(handle, match.groupdict())
        self.answer(501, b"", {"X-Error-Message": f"no route for {self.command} {self.path}"})

    def handle_request(self, handle: Callable, arguments: dict[str, str]) -> None:
        path = arguments.get("path", self.path)
        self.hub.requests.append(Request(self.command, arguments.get("repo", ""), path, self.token))
        try:
            if self.fault == "gated":
                raise HubError(403, "GatedRepo", f"Access to model {arguments['repo']} is restricted")
            if self.fault.isdigit():
                raise HubError(int(self.fault), "", "Out of order")
            if self.token and self.token not in self.hub.writers:
                raise HubError(401, "", "Invalid credentials in Authorization header")
            handle(self, **arguments)
        except HubError as e:
            self.answer(e.status, b"", {"X-Error-Code": e.code, "X-Error-Message": str(e)})

    do_GET = do_HEAD = do_POST = do_PUT = dispatch

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def answer_json(self, value: object, status: int = 200) -> None:
        self.answer(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        if self.fault == "no answer":
            self.close_connection = True
            return
        if self.fault == "slow":
            time.sleep(8)
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.fault == "corrupt":
            body = body[:-1] + bytes([body[-1] ^ 1])
        if self.fault == "cut":
            body, self.close_connection = body[: len(body) // 2], True
        step = -(-len(body) // 20) if self.fault == "trickle" else len(body)
        for start in range(0, len(body), max(step, 1)):
            self.wfile.write(body[start : start + step])
            if step < len(body):
                time.sleep(0.05)

    def log_message(self, *_) -> None:
        pass
