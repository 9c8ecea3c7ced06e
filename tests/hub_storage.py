"""What a loopback Hub (`hub_server`) keeps in memory: repositories, their commits, and the hashes of files."""

import hashlib
from typing import NamedTuple

LARGE = (".safetensors", ".png", ".bin")  # what goes to LFS, whatever its size


class Commit(NamedTuple):
    oid: str
    files: dict[str, bytes]


class Repo:
    """A repository: its commits, the oldest first, its tags, and who may see it."""

    def __init__(self, files: dict[str, bytes] | None = None, private: bool = False):
        self.private, self.commits, self.tags = private, [], {}
        self.add_commit(files or {".gitattributes": b"*.safetensors filter=lfs\n"})

    def add_commit(self, files: dict[str, bytes]) -> None:
        content = repr((self.commit if self.commits else "", sorted((path, sha256(d)) for path, d in files.items())))
        self.commits.append(Commit(hashlib.sha1(content.encode()).hexdigest(), files))

    @property
    def commit(self) -> str:
        return self.commits[-1].oid

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[-1].files

    def find(self, rev: str) -> Commit:
        oid = {"main": self.commit, **self.tags}.get(rev, rev)
        for commit in self.commits:
            if commit.oid == oid:
                return commit
        raise HubError(404, "RevisionNotFound", f"Invalid rev id: {rev}")


class HubError(Exception):
    """An answer that the client takes for an error: on loopback it goes by the code in the header."""

    def __init__(self, status: int, code: str, message: str):
        super().__init__(message)
        self.status, self.code = status, code


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def etag(path: str, data: bytes) -> str:
    return sha256(data) if path.endswith(LARGE) else git_oid(data)


def describe(path: str, data: bytes) -> dict:
    """A file as the Hub lists it."""
    entry = dict(type="file", path=path, size=len(data), oid=git_oid(data))
    return entry | (dict(lfs=dict(oid=sha256(data), size=len(data), pointerSize=130)) if path.endswith(LARGE) else {})
