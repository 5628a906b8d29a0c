"""A small Hub on loopback: real HTTP for the real client, with faults on demand. Standard library only."""

import json
import re
import socket
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

from store import Refused, Store


@dataclass
class Fault:
    """What goes wrong with the next `times` requests of `method` whose path contains `path`.

    status: answer that instead. cut: close the connection after so many bytes of the body (of a PUT: received; of an
    answer: sent). lost: do it, then close without an answer. delay: seconds to wait first. before: called first.
    answer: (status, headers, body) instead; with the body None it is sent in chunks without end.
    """

    method: str
    path: str
    times: int = 1
    status: int | None = None
    cut: int | None = None
    lost: bool = False
    delay: float = 0.0
    before: object = None
    answer: tuple | None = None


@dataclass
class Seen:
    """One request as it came."""

    method: str
    path: str
    headers: dict
    received: int = 0
    sent: int = 0


@dataclass
class Hub:
    """The running server. `seen`: every request so far; `faults`: those to come; `overrides`: answers that lie."""

    store: Store
    faults: list = field(default_factory=list)
    seen: list = field(default_factory=list)
    extra_headers: dict = field(default_factory=dict)
    extra_names: list = field(default_factory=list)

    def __post_init__(self):
        handler = type("BoundHandler", (Handler,), {"hub": self})
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.http.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.http.server_address[1]}"
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.thread.start()

    def close(self):
        self.http.shutdown()
        self.http.server_close()

    def count(self, method=None, path=""):
        return sum(1 for s in self.seen if method in (None, s.method) and path in s.path)

    def bytes_up(self):
        return sum(s.received for s in self.seen)

    def bytes_down(self):
        return sum(s.sent for s in self.seen)


class Cut(Exception):
    """The connection ends here."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else every answer waits 40 ms for the client's delayed ACK
    hub: Hub

    def log_message(self, *args):
        pass

    def do_GET(self):
        self._serve("GET")

    def do_HEAD(self):
        self._serve("HEAD")

    def do_POST(self):
        self._serve("POST")

    def do_PUT(self):
        self._serve("PUT")

    def _serve(self, method):
        url = urlsplit(self.path)
        self.seen = Seen(method, unquote(url.path), dict(self.headers))
        self.hub.seen.append(self.seen)
        self.fault = next(
            (f for f in self.hub.faults if f.times > 0 and f.method == method and f.path in self.seen.path), None
        )
        try:
            if self.fault is not None:
                self.fault.times -= 1
                time.sleep(self.fault.delay)
                if self.fault.before is not None:
                    self.fault.before()
            body = self._body()
            if self.fault is not None and self.fault.status is not None:
                return self._json({"error": "planned"}, self.fault.status)
            if self.fault is not None and self.fault.answer is not None:
                status, headers, content = self.fault.answer
                return self._endless(status, headers) if content is None else self._send(content, status, headers)
            try:
                self._route(method, url, body)
            except Refused as error:
                headers = {"X-Error-Code": error.code} if error.code else {}
                self._json({"error": error.text, **error.more}, error.status, **headers)
        except (Cut, BrokenPipeError, ConnectionResetError):
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

    def _body(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            raise Refused(411, "chunked bodies are not served here")
        length = int(self.headers.get("Content-Length") or 0)
        stop = self.fault.cut if self.fault is not None and self.fault.cut is not None and length else None
        if stop is not None and self.seen.method in ("PUT", "POST"):
            self.seen.received = len(self.rfile.read(min(stop, length)))
            raise Cut
        body = self.rfile.read(length)
        self.seen.received = len(body)
        return body

    def _json(self, value, status=200, **headers):
        self._send(json.dumps(value).encode(), status, {"Content-Type": "application/json", **headers})

    def _send(self, body, status=200, headers=None, length=None):
        if self.fault is not None and self.fault.lost:
            raise Cut
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body) if length is None else length)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.seen.method == "HEAD":
            return
        stop = self.fault.cut if self.fault is not None and self.fault.cut is not None else len(body)
        self.seen.sent = min(stop, len(body))  # before: who has read the answer may ask for the count at once
        self.wfile.write(body[:stop])
        if stop < len(body):
            raise Cut

    def _endless(self, status, headers):
        self.send_response(status)
        for name, value in {**headers, "Transfer-Encoding": "chunked"}.items():
            self.send_header(name, value)
        self.end_headers()
        for _ in range(1000):  # a gigabyte: enough for without end
            self.wfile.write(b"100000\r\n" + bytes(1 << 20) + b"\r\n")
            self.seen.sent += 1 << 20

    # -- routes --------------------------------------------------------------------------------------------------

    def _route(self, method, url, raw):
        store, path = self.hub.store, unquote(url.path)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        if path == "/api/repos/create":
            return self._json(store.create(json.loads(raw), token, self.hub.endpoint))
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if m := re.fullmatch(r"/lfs/([0-9a-f]{64})", path):
            if method == "PUT":
                store.put_large(m[1], raw)
            return self._send(b"") if method == "PUT" or store.blob(m[1]).is_file() else self._json({}, 404)
        if m := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            store.allowed(m[1], token)  # whoever may open a pull request may send its files
            return self._json({"transfer": "basic", "objects": [self._large(o) for o in json.loads(raw)["objects"]]})
        if m := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/([a-z]+)/(.+))?", path):
            return self._api(m[1], m[2], m[3], parse_qs(url.query), raw, token)
        if m := re.fullmatch(r"/([^/]+/[^/]+)/resolve/(refs/[^/]+/[^/]+|[^/]+)/(.+)", path):
            return self._resolve(store.allowed(m[1], token), m[2], m[3])
        raise Refused(404, f"no route {method} {path}")

    def _large(self, row):
        href = f"{self.hub.endpoint}/lfs/{row['oid']}"
        there = self.hub.store.blob(row["oid"]).is_file()
        actions = {} if there else {"actions": {"upload": {"href": href}, "verify": {"href": href}}}
        return {"oid": row["oid"], "size": row["size"], **actions}

    def _api(self, name, what, rest, query, raw, token):
        store = self.hub.store
        pr = query.get("create_pr") == ["1"]
        repo = store.allowed(name, token, write=what in ("preupload", "branch", "commit") and not pr)
        if what in (None, "revision"):
            commit = repo.at(rest or "main")
            names = [*commit.files, *self.hub.extra_names]
            siblings = [{"rfilename": f} for f in names]
            return self._json(
                {"id": name, "sha": commit.sha, "private": repo.private, "siblings": siblings, "tags": []}
            )
        if what == "tree":
            rows = [e.row(path) for path, e in repo.at(rest).files.items()]
            rows += [{"type": "file", "oid": "0" * 40, "size": 4, "path": name} for name in self.hub.extra_names]
            return self._json(rows)
        if what == "preupload":
            return self._json({"files": repo.modes(rest, json.loads(raw)["files"])})
        if what == "branch":
            return self._json(repo.branch(rest))
        if what == "commit":
            sha, number = store.commit(repo, rest, [json.loads(line) for line in raw.splitlines()], pr)
            url = f"{self.hub.endpoint}/{name}"
            pull = f"{url}/discussions/{number}" if pr else None
            return self._json({"commitUrl": f"{url}/commit/{sha}", "commitOid": sha, "pullRequestUrl": pull})
        raise Refused(404, f"no route {what}")

    def _resolve(self, repo, revision, path):
        commit = repo.at(revision)
        entry = commit.files.get(path)
        if entry is None:
            return self._json(
                {"error": "Entry not found"}, 404, **{"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit.sha}
            )
        data = self.hub.store.blob(entry.sha256).read_bytes()
        headers = {"X-Repo-Commit": commit.sha, "ETag": f'"{entry.oid}"', "Accept-Ranges": "bytes"}
        if entry.large:
            headers |= {"X-Linked-Etag": f'"{entry.oid}"', "X-Linked-Size": str(len(data))}
        headers |= self.hub.extra_headers
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if part:
            begin, end = int(part[1]), min(int(part[2] or len(data) - 1), len(data) - 1)
            headers["Content-Range"] = f"bytes {begin}-{end}/{len(data)}"
            return self._send(data[begin : end + 1], 206, headers)
        self._send(data, 200, headers)
