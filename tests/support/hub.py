"""A stand-in for the Hugging Face hub on this machine: the part of its HTTP interface that pushing and loading need.

It keeps repositories in memory. `HF_ENDPOINT` leads the real client to it. Repositories of the owner "others" may not
be written; without the token, private ones are not there.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_token_of_the_tests"


@dataclass
class Repository:
    """Commits of a model: branch -> commit, and commit -> its files."""

    private: bool
    branches: dict[str, str] = field(default_factory=lambda: {"main": "0" * 40})
    commits: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"0" * 40: {}})
    large: set[str] = field(default_factory=set)
    messages: list[str] = field(default_factory=list)

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.branches.get(revision, revision)]


class Hub(ThreadingHTTPServer):
    """What has arrived, and every request."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.broken_commits = 0  # so many commits end in an error of the server

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def environment(self, home: Path) -> dict[str, str]:
        """The environment in which the client talks to this hub, and keeps its cache in `home`."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
        added = {"HF_ENDPOINT": self.address, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        quiet = {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "no_proxy": "127.0.0.1"}
        return kept | added | quiet | {"HF_TOKEN": TOKEN}


@contextmanager
def running_hub() -> Iterator[Hub]:
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, format: str, *args: Any) -> None:
        self.server.requests.append(f"{self.command} {self.path}")

    def _answer(self, status: int, content: Any = b"", headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _missing(self, code: str) -> None:
        self._answer(404, b"", {"X-Error-Code": code, "X-Error-Message": code})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        pieces = []
        while size := int(self.rfile.readline(), 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    def _has_token(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _repository(self, name: str) -> Repository | None:
        found = self.server.repositories.get(name)
        return found if found is not None and (not found.private or self._has_token()) else None

    def do_GET(self) -> None:
        self._read()

    def do_HEAD(self) -> None:
        self._read()

    def _read(self) -> None:
        path = unquote(urlsplit(self.path).path)
        listed = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(tree|revision)/([^/]+))?/?", path)
        resolved = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        match = listed or resolved
        repository = None if match is None else self._repository(match[1])
        if match is None or repository is None:
            self._missing("RepoNotFound")
        elif listed:
            commit = repository.branches.get(match[3] or "main", match[3])
            files = repository.files(commit)
            if match[2] == "tree":
                self._answer(200, [_entry(name, content, repository) for name, content in sorted(files.items())])
                return
            siblings = [{"rfilename": name} for name in files]
            self._answer(
                200, {"id": match[1], "sha": commit, "private": repository.private, "siblings": siblings, "tags": []}
            )
        else:
            commit = repository.branches.get(match[2], match[2])
            if commit not in repository.commits:
                self._missing("RevisionNotFound")
                return
            content = repository.commits.get(commit, {}).get(match[3])
            if content is None:
                self._missing("EntryNotFound")
                return
            headers = {"ETag": f'"{_etag(match[3], content, repository)}"', "X-Repo-Commit": commit}
            self._answer(200, content, headers)

    def do_PUT(self) -> None:
        content = self._body()
        self.server.blobs[hashlib.sha256(content).hexdigest()] = content
        self._answer(200)

    def do_POST(self) -> None:
        path, body = unquote(urlsplit(self.path).path), self._body()
        if path == "/api/validate-yaml":
            self._validate(json.loads(body)["content"])
        elif not self._has_token():
            self._answer(401)
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit|branch)/([^/]+)", path):
            getattr(self, f"_{match[2]}")(match[1], match[3], body)
        elif path.endswith(".git/info/lfs/objects/batch"):
            wanted = json.loads(body)["objects"]
            self._answer(200, {"transfer": "basic", "objects": [self._instructed(one) for one in wanted]})
        else:
            self._missing("RepoNotFound")

    def _validate(self, card: str) -> None:
        licence = yaml.safe_load(card.split("---\n")[1]).get("license")
        known = licence in ("apache-2.0", "mit", "creativeml-openrail-m", "other")
        error = [] if known else [{"message": f'"license" must be one of a list, not {licence}'}]
        self._answer(200 if known else 400, {"errors": error, "warnings": []})

    def _create(self, asked: dict[str, Any]) -> None:
        owner = asked.get("organization") or "me"
        name = f"{owner}/{asked['name']}"
        if owner == "others":
            self._answer(403, {"error": "You don't have the rights to create a model under this namespace"})
            return
        there = name in self.server.repositories
        private = asked.get("private", False) or asked.get("visibility") == "private"
        self.server.repositories.setdefault(name, Repository(private))
        self._answer(409 if there else 200, {"url": f"{self.server.address}/{name}", "name": name})

    def _preupload(self, name: str, _: str, body: bytes) -> None:
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith((".safetensors", ".png")) else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(body)["files"]
        ]
        self._answer(200, {"files": files})

    def _branch(self, name: str, branch: str, _: bytes) -> None:
        repository = self.server.repositories[name]
        there = branch in repository.branches
        repository.branches.setdefault(branch, repository.branches["main"])
        self._answer(409 if there else 201, {})

    def _instructed(self, wanted: dict[str, Any]) -> dict[str, Any]:
        if wanted["oid"] in self.server.blobs:
            return wanted
        return wanted | {"actions": {"upload": {"href": f"{self.server.address}/lfs/{wanted['oid']}", "header": {}}}}

    def _commit(self, name: str, branch: str, body: bytes) -> None:
        repository = self.server.repositories[name]
        if self.server.broken_commits:
            self.server.broken_commits -= 1
            self._answer(503)
            return
        files = dict(repository.files(branch))
        for line in body.splitlines():
            value, key = json.loads(line)["value"], json.loads(line)["key"]
            if key == "header":
                repository.messages.append(value["summary"])
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            else:
                files[value["path"]] = self.server.blobs[value["oid"]]
                repository.large.add(value["path"])
        commit = hashlib.sha1(body).hexdigest()
        repository.commits[commit] = files
        repository.branches[branch] = commit
        url = f"{self.server.address}/{name}/commit/{commit}"
        self._answer(200, {"success": True, "commitOid": commit, "commitUrl": url})


def _etag(name: str, content: bytes, repository: Repository) -> str:
    return (hashlib.sha256 if name in repository.large else hashlib.sha1)(content).hexdigest()


def _entry(name: str, content: bytes, repository: Repository) -> dict[str, Any]:
    found = {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
    if name in repository.large:
        found["lfs"] = {"oid": _etag(name, content, repository), "size": len(content), "pointerSize": 134}
    return found
