"""What the Hub stand-in keeps: repos of commits, blobs on disk, who may do what."""

import base64
import hashlib
import os
import secrets
import threading
from dataclasses import dataclass, field
from pathlib import Path

LARGE = (".safetensors", ".png", ".bin")


class Refused(Exception):
    """An answer that is no: HTTP status, words, X-Error-Code, further values of its JSON."""

    def __init__(self, status, text, code=None, **more):
        self.status, self.text, self.code, self.more = status, text, code, more


@dataclass(frozen=True)
class Entry:
    """One file of a commit; `oid` as git or LFS would name it."""

    oid: str
    sha256: str
    size: int
    large: bool

    def row(self, path):
        row = {"type": "file", "oid": self.oid[:40], "size": self.size, "path": path}
        return {**row, "lfs": {"oid": self.oid, "size": self.size, "pointerSize": 134}} if self.large else row


@dataclass(frozen=True)
class Commit:
    sha: str
    files: dict
    title: str = ""


@dataclass
class Repo:
    private: bool
    commits: dict = field(default_factory=dict)
    refs: dict = field(default_factory=dict)

    def at(self, revision):
        sha = self.refs.get(revision, revision)
        if sha not in self.commits:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[sha]

    def add(self, files, title=""):
        commit = Commit(secrets.token_hex(20), dict(files), title)
        self.commits[commit.sha] = commit
        return commit.sha

    def branch(self, name):
        if name in self.refs:
            raise Refused(409, "Reference already exists")
        self.refs[name] = self.refs["main"]
        return {}

    def modes(self, revision, files):
        there = self.at(revision).files
        return [
            {
                "path": f["path"],
                "uploadMode": "lfs" if f["path"].endswith(LARGE) else "regular",
                "shouldIgnore": False,
                "oid": there[f["path"]].oid if f["path"] in there else None,
            }
            for f in files
        ]


@dataclass
class Store:
    """`tokens`: {token: (user, may write)}; a private repo is seen by its owner's tokens alone."""

    folder: Path
    tokens: dict = field(default_factory=dict)
    repos: dict = field(default_factory=dict)
    lock: object = field(default_factory=threading.RLock)

    def blob(self, sha256):
        return self.folder / sha256

    def put_large(self, sha256, data):
        if hashlib.sha256(data).hexdigest() != sha256:
            raise Refused(400, "the content does not match its SHA-256")
        temporary = self.folder / f"{sha256}.{secrets.token_hex(4)}"
        temporary.write_bytes(data)
        os.replace(temporary, self.blob(sha256))

    def put(self, path, data):
        """An entry of this content."""
        sha256 = hashlib.sha256(data).hexdigest()
        self.put_large(sha256, data)
        large = path.endswith(LARGE)
        git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        return Entry(sha256 if large else git, sha256, len(data), large)

    def create(self, wanted, token, endpoint):
        user, writes = self.tokens.get(token, (None, False))
        owner = wanted.get("organization") or user
        name = f"{owner}/{wanted['name']}"
        if not writes or owner != user:
            raise Refused(401 if user is None else 403, f"you can't create {name}")
        if name in self.repos:
            raise Refused(409, "You already created this model repo", url=f"{endpoint}/{name}")
        private = bool(wanted.get("private")) or wanted.get("visibility") == "private"
        self.make(name, private=private)
        return {"url": f"{endpoint}/{name}", "id": name}

    def make(self, name, *, private=False, files=None):
        """A repo with one commit, as the Hub makes it."""
        repo = self.repos[name] = Repo(private)
        start = {".gitattributes": self.put(".gitattributes", b"*.safetensors filter=lfs\n")}
        repo.refs["main"] = repo.add(start | {path: self.put(path, data) for path, data in (files or {}).items()})
        return repo

    def allowed(self, name, token, *, write=False):
        repo = self.repos.get(name)
        user, writes = self.tokens.get(token, (None, False))
        owner = name.partition("/")[0]
        if token is not None and user is None:
            raise Refused(401, "Invalid credentials in Authorization header")
        if repo is None or (repo.private and user != owner):
            raise Refused(401 if user is None else 404, "Repository not found", "RepoNotFound")
        if write and not (writes and user == owner):
            raise Refused(401 if user is None else 403, "you don't have the rights to write here")
        return repo

    def commit(self, repo, revision, lines, pr):
        """(sha, number of the pull request or None): all operations, or Refused and none."""
        with self.lock:
            head, *operations = lines
            parent = repo.at(revision)
            wanted = head["value"].get("parentCommit")
            if wanted and not pr and wanted != parent.sha:
                raise Refused(412, "A commit has happened since. Please refresh and try again.")
            files = dict(repo.at(wanted).files if wanted else parent.files)
            for row in operations:
                value, path = row["value"], row["value"]["path"]
                if row["key"] == "file":
                    files[path] = self.put(path, base64.b64decode(value["content"]))
                elif row["key"] == "lfsFile":
                    if not self.blob(value["oid"]).is_file():
                        raise Refused(400, f"{path} was never uploaded")
                    files[path] = Entry(value["oid"], value["oid"], value["size"], True)
                elif row["key"] == "deletedFile":
                    del files[path]
            sha = repo.add(files, head["value"]["summary"])
            number = 1 + sum(ref.startswith("refs/pr/") for ref in repo.refs) if pr else None
            repo.refs[f"refs/pr/{number}" if pr else revision] = sha
            return sha, number

    def content(self, name, revision="main"):
        """{path: bytes} of a revision."""
        return {path: self.blob(e.sha256).read_bytes() for path, e in self.repos[name].at(revision).files.items()}
