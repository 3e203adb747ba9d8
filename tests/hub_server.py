"""A small server of the Hugging Face Hub's protocol on localhost, for tests of pushing and pulling.

It speaks real HTTP and keeps real contents (by SHA-256, on disk), commits and branches, so that the unchanged
clients (huggingface_hub, transformers, diffusers, peft) run against it. It knows model repositories only: no
Xet, no multi-part uploads, no pull requests, no pagination. What it does not know it answers with 501.

    with HubServer(tmp_path) as hub:
        hub.run("tests.test_hub_server", "check_files")

The endpoint is read when huggingface_hub is imported, so what talks to the server is a process of its own.
"""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN = "hf_localhost"
USER = "tester"
LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".msgpack", ".npz", ".png", "tokenizer.json", ".model")
LFS_SIZE = 1 << 20
EMPTY_COMMIT = hashlib.sha1(b"initial commit").hexdigest()


class HubError(Exception):
    """Becomes an HTTP answer; `code` is the Hub's `X-Error-Code`, from which the clients choose their exception."""

    def __init__(self, status: int, message: str, code: str | None = None, commit: str | None = None):
        super().__init__(message)
        self.status, self.code, self.commit = status, code, commit


class Entry(NamedTuple):
    """One file of a commit. `blob_id` is git's id: of the contents, or of the pointer for an LFS file."""

    sha256: str
    size: int
    blob_id: str
    pointer_size: int | None  # None: not an LFS file

    @property
    def etag(self) -> str:
        return self.blob_id if self.pointer_size is None else self.sha256

    def describe(self) -> dict:
        if self.pointer_size is None:
            return {"size": self.size, "oid": self.blob_id}
        lfs = {"oid": self.sha256, "sha256": self.sha256, "size": self.size, "pointerSize": self.pointer_size}
        return {"size": self.size, "oid": self.blob_id, "lfs": lfs}


def git_blob_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Repository:
    """Commits (`{sha: {path: Entry}}`) and branches (`{name: sha}`) of one model."""

    def __init__(self):
        self.commits: dict[str, dict[str, Entry]] = {EMPTY_COMMIT: {}}
        self.branches = {"main": EMPTY_COMMIT}

    def resolve(self, revision: str) -> str:
        sha = self.branches.get(revision, revision)
        if sha not in self.commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha

    def commit(self, branch: str, parent: str | None, message: str, files: dict[str, Entry]) -> str:
        head = self.branches[branch]
        if parent is not None and parent != head:
            raise HubError(412, f"{branch} is at {head}, not at the parent commit {parent}")
        if files == self.commits[head]:
            return head
        content = json.dumps([head, message, sorted(files.items())])
        sha = hashlib.sha1(content.encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        return sha


class HubServer:
    """Context manager: serves on a free port of 127.0.0.1 and keeps what is pushed below `root`.

    `requests` lists what was asked so far as `(method, path)`; `repositories` maps `user/name` to its commits.
    """

    def __init__(self, root: str | Path):
        self.root = Path(root)
        self.blobs = self.root / "blobs"
        self.blobs.mkdir(parents=True, exist_ok=True)
        self.repositories: dict[str, Repository] = {}
        self.requests: list[tuple[str, str]] = []
        self.lock = threading.Lock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (HubHandler,), {"hub": self}))
        self.endpoint = f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self._http.shutdown()
        self._http.server_close()

    def environment(self) -> dict[str, str]:
        """This process' environment, turned to this server, with an empty cache that is new with every call."""
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_", "HUGGING"))}
        return inherited | {
            "HF_ENDPOINT": self.endpoint,
            "HF_TOKEN": TOKEN,
            "HF_HOME": tempfile.mkdtemp(prefix="home-", dir=self.root),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
        }

    def run(self, module: str, *arguments: str) -> None:
        """`python -m module` in the root of the checkout, with `environment()`; its errors become an assertion's."""
        command = [sys.executable, "-m", module, *arguments]
        checkout = Path(__file__).parents[1]
        process = subprocess.run(command, cwd=checkout, env=self.environment(), capture_output=True, text=True)
        assert process.returncode == 0, process.stderr

    def repository(self, repo: str) -> Repository:
        if repo not in self.repositories:
            raise HubError(404, f"Repository not found: {repo}", "RepoNotFound")
        return self.repositories[repo]

    def store(self, data: bytes) -> str:
        sha256 = hashlib.sha256(data).hexdigest()
        (self.blobs / sha256).write_bytes(data)
        return sha256

    def lfs_entry(self, sha256: str) -> Entry:
        if not (self.blobs / sha256).exists():
            raise HubError(400, f"LFS object {sha256} was never uploaded")
        size = (self.blobs / sha256).stat().st_size
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
        return Entry(sha256, size, git_blob_id(pointer), len(pointer))


ROUTES = []
REPO, REVISION, FILE = r"(?P<repo>[^/]+/[^/]+)", r"(?P<revision>[^/]+)", r"(?P<path>.+)"


def route(methods: str, pattern: str):
    """Registers a handler; the groups of `pattern`, unquoted, are its arguments."""

    def register(function):
        ROUTES.append((methods.split(), re.compile(pattern), function))
        return function

    return register


class HubHandler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and body leave in one packet; two would wait for each other's acknowledgement

    @route("POST", "/api/repos/create")
    def create_repo(self):
        request = json.loads(self.body)
        if request.get("type", "model") != "model":
            raise HubError(501, f"only model repositories are served here, got type {request['type']!r}")
        repo = f"{request.get('organization') or USER}/{request['name']}"
        url = f"{self.hub.endpoint}/{repo}"
        if repo in self.hub.repositories:
            self.answer_json({"url": url, "error": "You already created this model repo"}, 409)
        else:
            self.hub.repositories[repo] = Repository()
            self.answer_json({"url": url, "name": repo})

    @route("GET", "/api/whoami-v2")
    def whoami(self):
        self.answer_json({"type": "user", "name": USER, "orgs": [], "auth": {"type": "access_token"}})

    @route("POST", "/api/validate-yaml")
    def validate_yaml(self):
        front_matter = re.match(r"---\n(.*?)\n---", json.loads(self.body)["content"], re.DOTALL)
        try:
            yaml.safe_load(front_matter.group(1) if front_matter else "")
        except yaml.YAMLError as error:
            self.answer_json({"errors": [{"message": str(error)}], "warnings": []}, 400)
        else:
            self.answer_json({"errors": [], "warnings": []})

    @route("POST", f"/api/models/{REPO}/preupload/{REVISION}")
    def preupload(self, repo, revision):
        repository = self.hub.repository(repo)
        present = repository.commits[repository.resolve(revision)]
        answers = []
        for file in json.loads(self.body)["files"]:
            lfs = file["path"].endswith(LFS_SUFFIXES) or file["size"] >= LFS_SIZE
            answer = {"path": file["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
            if file["path"] in present:
                answer["oid"] = present[file["path"]].etag
            answers.append(answer)
        self.answer_json({"files": answers})

    @route("POST", rf"/{REPO}\.git/info/lfs/objects/batch")
    def lfs_batch(self, repo):
        self.hub.repository(repo)
        objects = json.loads(self.body)["objects"]
        for item in objects:
            if not (self.hub.blobs / item["oid"]).exists():
                item["actions"] = {"upload": {"href": f"{self.hub.endpoint}/lfs/{item['oid']}"}}
        self.answer_json({"transfer": "basic", "objects": objects})

    @route("PUT", "/lfs/(?P<sha256>[0-9a-f]{64})")
    def lfs_upload(self, sha256):
        if hashlib.sha256(self.body).hexdigest() != sha256:
            raise HubError(400, f"the uploaded contents do not have the announced SHA-256 {sha256}")
        self.hub.store(self.body)
        self.answer(200, b"")

    @route("POST", f"/api/models/{REPO}/branch/{REVISION}")
    def create_branch(self, repo, revision):
        repository = self.hub.repository(repo)
        if revision in repository.branches:
            raise HubError(409, f"Reference already exists: {revision}")
        repository.branches[revision] = repository.resolve(json.loads(self.body).get("startingPoint", "main"))
        self.answer_json({})

    @route("POST", f"/api/models/{REPO}/commit/{REVISION}")
    def commit(self, repo, revision):
        repository = self.hub.repository(repo)
        if revision not in repository.branches:
            raise HubError(404, f"not a branch: {revision}", "RevisionNotFound")
        header, *operations = [json.loads(line) for line in self.body.splitlines()]
        files = dict(repository.commits[repository.branches[revision]])
        for operation in operations:
            apply_operation(self.hub, files, operation["key"], operation["value"])
        parent, message = header["value"].get("parentCommit"), header["value"]["summary"]
        sha = repository.commit(revision, parent, message, files)
        self.answer_json({"success": True, "commitOid": sha, "commitUrl": f"{self.hub.endpoint}/{repo}/commit/{sha}"})

    @route("GET", f"/api/models/{REPO}(?:/revision/{REVISION})?")
    def model_info(self, repo, revision):
        repository = self.hub.repository(repo)
        sha = repository.resolve(revision or "main")
        files = sorted(repository.commits[sha].items())
        siblings = [{"rfilename": path, "blobId": entry.blob_id, **entry.describe()} for path, entry in files]
        info = {"id": repo, "modelId": repo, "author": repo.split("/")[0], "private": False, "gated": False}
        self.answer_json({**info, "sha": sha, "tags": [], "siblings": siblings})

    @route("GET", f"/api/models/{REPO}/tree/{REVISION}(?:/{FILE})?")
    def tree(self, repo, revision, path):
        repository = self.hub.repository(repo)
        sha = repository.resolve(revision)
        recursive = self.query.get("recursive", ["false"])[0].lower() == "true"
        entries = list_tree(repository.commits[sha], path or "", recursive)
        if path and not entries:
            raise HubError(404, f"{path} does not exist on {revision}", "EntryNotFound", commit=sha)
        self.answer_json(entries)

    @route("GET HEAD", f"/{REPO}/resolve/{REVISION}/{FILE}")
    def download(self, repo, revision, path):
        repository = self.hub.repository(repo)
        sha = repository.resolve(revision)
        entry = repository.commits[sha].get(path)
        if entry is None:
            raise HubError(404, "Entry not found", "EntryNotFound", commit=sha)
        headers = {"ETag": f'"{entry.etag}"', "X-Repo-Commit": sha, "Content-Type": "application/octet-stream"}
        if entry.pointer_size is not None:
            headers |= {"X-Linked-Etag": f'"{entry.etag}"', "X-Linked-Size": str(entry.size)}
        self.answer(200, (self.hub.blobs / entry.sha256).read_bytes(), headers)

    def dispatch(self):
        """Finds the route, and holds the server's lock while it runs: a commit is seen whole or not at all."""
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.body = self.rfile.read(int(self.headers["Content-Length"] or 0))  # also if it fails: connections go on
        with self.hub.lock:
            self.hub.requests.append((self.command, url.path))
            try:
                self.call_route(url.path)
            except HubError as error:
                headers = {"X-Error-Message": str(error), "X-Error-Code": error.code, "X-Repo-Commit": error.commit}
                present = {name: value for name, value in headers.items() if value is not None}
                self.answer_json({"error": str(error)}, error.status, present)

    do_GET = do_HEAD = do_POST = do_PUT = dispatch

    def call_route(self, path: str) -> None:
        if self.command == "POST" and self.headers["Authorization"] != f"Bearer {TOKEN}":
            raise HubError(401, "Invalid username or password.")
        for methods, pattern, function in ROUTES:
            match = pattern.fullmatch(path)
            if match and self.command in methods:
                function(self, **{name: value and unquote(value) for name, value in match.groupdict().items()})
                return
        raise HubError(501, f"{self.command} {path} is not part of the protocol that this server knows")

    def answer(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def answer_json(self, value: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.answer(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def log_message(self, format, *args):
        """Silent: `HubServer.requests` is the log."""


def list_tree(files: dict[str, Entry], folder: str, recursive: bool) -> list[dict]:
    """The files and folders directly in `folder`, or everything below it."""
    found = {}
    for path, entry in sorted(files.items()):
        parents = [str(parent) for parent in PurePosixPath(path).parents][::-1]  # ".", "a", "a/b" for a/b/c
        if (folder or ".") in parents:
            below = [*parents, path][parents.index(folder or ".") + 1 :]
            for name in below if recursive else below[:1]:
                if name == path:
                    found[name] = {"type": "file", "path": name, **entry.describe()}
                else:
                    oid = hashlib.sha1(name.encode()).hexdigest()
                    found[name] = {"type": "directory", "path": name, "oid": oid, "size": 0}
    return list(found.values())


def apply_operation(hub: HubServer, files: dict[str, Entry], key: str, value: dict) -> None:
    """Applies one line of a commit to `files` in place."""
    path = value["path"]
    if key == "file":
        data = base64.b64decode(value["content"])
        files[path] = Entry(hub.store(data), len(data), git_blob_id(data), None)
    elif key == "lfsFile":
        files[path] = hub.lfs_entry(value["oid"])
    elif key in ("deletedFile", "deletedFolder"):
        doomed = [name for name in files if name == path or name.startswith(path.rstrip("/") + "/")]
        if not doomed:
            raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
        for name in doomed:
            del files[name]
    else:
        raise HubError(501, f"commit operation {key!r} is not part of the protocol that this server knows")
