"""A loopback stand-in for the Hugging Face Hub: enough of its HTTP API for `push_to_hub` and `from_pretrained`.

Everything lives in memory and nothing leaves the machine. What it speaks (models only; branch `main`, commit hashes):

    POST   /api/repos/create                      409 when the repository exists
    DELETE /api/repos/delete
    GET    /api/whoami-v2
    POST   /api/validate-yaml                     every README upload asks
    POST   /api/models/{id}/preupload/{revision}  always answers "regular": files travel inside the commit, without LFS
    POST   /api/models/{id}/commit/{revision}     newline-delimited JSON: header, file, deletedFile, deletedFolder
    GET    /api/models/{id}[/revision/{revision}]
    GET    /api/models/{id}/tree/{revision}[/{folder}]
    HEAD   /{id}/resolve/{revision}/{path}        and GET

A wrong token is refused everywhere, a missing one where something is written or private, both with the Hub's own status
and words. `drop_next` makes the server hang up on chosen requests before it has acted on them, `fail_next` makes it refuse
them or spoil the answer. What ends in .safetensors is stored as a large file: its ETag is its SHA-256.

`huggingface_hub` reads `HF_ENDPOINT` when it is imported, so a client has to be a process of its own:
`LoopbackHub.python`, `LoopbackHub.run`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

Operation = dict[
    str, Any
]  # one line of a commit: {"key": "header" | "file" | "deletedFile" | "deletedFolder", "value": {}}


class HubError(Exception):
    """An answer that is not 200. `code` is the Hub's `X-Error-Code`, which decides the client's exception."""

    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


# ---- what the Hub keeps ----------------------------------------------------------------------------------------------


def blob_id(content: bytes) -> str:
    """The git object id of a file: its ETag on the Hub."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass(frozen=True)
class Commit:
    sha: str
    title: str
    files: Mapping[str, bytes]


class Repository:
    """A model repository: a line of commits, each with all of its files."""

    def __init__(self, repo_id: str, private: bool) -> None:
        self.repo_id = repo_id
        self.private = private
        self.gated = False  # True: its terms are not accepted, by anybody
        self.commits: list[Commit] = []
        self.branches: dict[str, Commit] = {}  # beside main; nobody commits to them
        self._append("initial commit", {})

    @property
    def head(self) -> Commit:
        return self.commits[-1]

    @property
    def files(self) -> Mapping[str, bytes]:
        """Path -> content on `main`."""
        return self.head.files

    def at(self, revision: str) -> Commit:
        """The commit that a branch or a commit hash names.

        Raises:
            HubError: 404 for any other revision.
        """
        if revision == "main":
            return self.head
        if revision in self.branches:
            return self.branches[revision]
        for commit in self.commits:
            if commit.sha == revision:
                return commit
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def commit(self, operations: Iterable[Operation]) -> Commit:
        """Apply the lines of one commit to `main`: all of them or, if one is refused, none.

        Raises:
            HubError: 400 for an operation that this server never offered (LFS files, copies), 404 where there is
                nothing to delete.
        """
        title, files = "", dict(self.files)
        for operation in operations:
            value = operation["value"]
            match operation["key"]:
                case "header":
                    title = value["summary"]
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "deletedFile":
                    if files.pop(value["path"], None) is None:
                        raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
                case "deletedFolder":
                    folder = value["path"].rstrip("/") + "/"
                    files = {path: content for path, content in files.items() if not path.startswith(folder)}
                case key:
                    raise HubError(400, f"operation {key!r} is not served here")
        return self._append(title, files)

    def _append(self, title: str, files: Mapping[str, bytes]) -> Commit:
        sha = hashlib.sha1(f"{self.repo_id} {len(self.commits)} {title}".encode()).hexdigest()
        self.commits.append(Commit(sha, title, files))
        return self.head


# ---- what the Hub answers --------------------------------------------------------------------------------------------


class Request(NamedTuple):
    method: str
    path: str
    authorization: str | None
    body: bytes


class Response(NamedTuple):
    status: int
    body: bytes
    headers: Mapping[str, str]


def json_response(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})


class HubApi:
    """The endpoints: a request and the repositories in, a response out. Knows nothing of sockets."""

    def __init__(self, repos: dict[str, Repository], user: str, token: str) -> None:
        self.repos, self.user, self.token = repos, user, token
        self.url = ""  # known when the server has its port
        model, revision = r"/api/models/([^/]+/[^/]+)", r"([^/]+)"
        self.routes: list[tuple[str, str, Callable[..., Response]]] = [
            ("POST", r"/api/repos/create", self.create),
            ("DELETE", r"/api/repos/delete", self.delete),
            ("GET", r"/api/whoami-v2", self.whoami),
            ("POST", r"/api/validate-yaml", self.validate_yaml),
            ("POST", rf"{model}/preupload/{revision}", self.preupload),
            ("POST", rf"{model}/commit/{revision}", self.commit),
            ("GET", rf"{model}(?:/revision/{revision})?", self.info),
            ("GET", rf"{model}/tree/{revision}(?:/(.+))?", self.tree),
            ("GET", rf"/([^/]+/[^/]+)/resolve/{revision}/(.+)", self.resolve),
        ]

    def answer(self, request: Request) -> Response:
        """Find the endpoint and let it answer; HEAD is GET whose body stays unsent."""
        method = "GET" if request.method == "HEAD" else request.method
        try:
            if request.authorization not in (None, f"Bearer {self.token}"):
                raise HubError(401, "Invalid credentials in Authorization header")
            for route_method, pattern, endpoint in self.routes:
                found = re.fullmatch(pattern, request.path)
                if found and method == route_method:
                    return endpoint(request, *(unquote(group) if group else group for group in found.groups()))
            raise HubError(404, f"no such endpoint: {request.method} {request.path}")
        except HubError as error:
            headers = {"X-Error-Message": error.message} | ({"X-Error-Code": error.code} if error.code else {})
            return json_response({"error": error.message}, error.status, headers)

    def create(self, request: Request) -> Response:
        self._require_token(request)
        wanted = json.loads(request.body)
        repo_id = self._full_id(wanted)
        names = {"url": f"{self.url}/{repo_id}", "name": repo_id, "id": repo_id}
        if repo_id in self.repos:
            return json_response({"error": "You already created this model repo", **names}, 409)
        self.repos[repo_id] = Repository(repo_id, private=bool(wanted.get("private")))
        return json_response(names)

    def delete(self, request: Request) -> Response:
        self._require_token(request)
        repo_id = self._full_id(json.loads(request.body))
        self._repository(request, repo_id)
        del self.repos[repo_id]
        return json_response({})

    def whoami(self, request: Request) -> Response:
        self._require_token(request)
        auth = {"type": "access_token", "accessToken": {"displayName": "test", "role": "write"}}
        return json_response({"type": "user", "name": self.user, "fullname": self.user, "orgs": [], "auth": auth})

    def validate_yaml(self, request: Request) -> Response:
        return json_response({"errors": [], "warnings": []})

    def preupload(self, request: Request, repo_id: str, revision: str) -> Response:
        self._require_token(request)
        files = self._repository(request, repo_id).at(revision).files
        answers = []
        for path in (file["path"] for file in json.loads(request.body)["files"]):
            oid = blob_id(files[path]) if path in files else None  # the client leaves out what has not changed
            answers.append({"path": path, "uploadMode": "regular", "shouldIgnore": False, "oid": oid})
        return json_response({"files": answers})

    def commit(self, request: Request, repo_id: str, revision: str) -> Response:
        self._require_token(request)
        repository = self._repository(request, repo_id)
        repository.at(revision)
        commit = repository.commit(json.loads(line) for line in request.body.splitlines())
        url = f"{self.url}/{repo_id}/commit/{commit.sha}"
        return json_response({"success": True, "commitOid": commit.sha, "commitUrl": url, "hookOutput": ""})

    def info(self, request: Request, repo_id: str, revision: str | None) -> Response:
        repository = self._repository(request, repo_id)
        commit = repository.at(revision or "main")
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        names = {"_id": repo_id, "id": repo_id, "modelId": repo_id, "sha": commit.sha}
        return json_response({**names, "private": repository.private, "tags": [], "siblings": siblings})

    def tree(self, request: Request, repo_id: str, revision: str, folder: str | None) -> Response:
        files = self._repository(request, repo_id).at(revision).files
        prefix = f"{folder}/" if folder else ""
        entries = [
            {"type": "file", "path": path, "size": len(content), "oid": blob_id(content)}
            for path, content in sorted(files.items())
            if path.startswith(prefix)
        ]
        return json_response(entries)

    def resolve(self, request: Request, repo_id: str, revision: str, path: str) -> Response:
        repository = self._repository(request, repo_id)
        if repository.gated:
            status = 401 if request.authorization is None else 403
            raise HubError(status, f"Access to model {repo_id} is restricted", "GatedRepo")
        commit = repository.at(revision)
        if path not in commit.files:
            raise HubError(404, "Entry not found", "EntryNotFound")
        content = commit.files[path]
        etag = hashlib.sha256(content).hexdigest() if path.endswith(".safetensors") else blob_id(content)
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": commit.sha}
        return Response(200, content, {"Content-Type": "application/octet-stream", **headers})

    def _require_token(self, request: Request) -> None:
        if request.authorization is None:
            raise HubError(401, "Invalid username or password.")

    def _repository(self, request: Request, repo_id: str) -> Repository:
        repository = self.repos.get(repo_id)
        if repository is None:
            raise HubError(404, "Repository not found", "RepoNotFound")
        if repository.private and request.authorization is None:
            raise HubError(401, "Repository not found", "RepoNotFound")  # the Hub does not tell that it is there
        return repository

    def _full_id(self, wanted: dict[str, Any]) -> str:
        return f"{wanted.get('organization') or self.user}/{wanted['name']}"


# ---- how it is reached -----------------------------------------------------------------------------------------------


class LogEntry(NamedTuple):
    method: str
    path: str
    status: int | None  # None: the connection was dropped


@dataclass
class DropSwitch:
    """Says for each request whether the server hangs up: yes for the next `count` of those that match."""

    count: int = 0
    matching: str = ""

    def takes(self, request: Request) -> bool:
        if self.count == 0 or not re.search(self.matching, f"{request.method} {request.path}"):
            return False
        self.count -= 1
        return True


@dataclass
class Fault:
    """What goes wrong with the next `count` requests whose `"METHOD /path"` holds the regular expression `matching`; the path
    of a creation ends with the name of the new repository.

    Args:
        matching: Which requests.
        count: How many of them.
        status: Refused with this, before anything is done; `message` and `headers` go with it.
        cut: The connection ends after so many bytes of the body.
        slow: Seconds of silence in the middle of the body.
        flip: The last byte of the body is another one.
    """

    matching: str
    count: int = 1
    status: int | None = None
    message: str = "not now"
    headers: Mapping[str, str] = field(default_factory=dict)
    cut: int | None = None
    slow: float = 0.0
    flip: bool = False

    def takes(self, request: Request) -> bool:
        told = f"{request.method} {request.path}"
        if request.path == "/api/repos/create":  # the only address without the name of the repository
            told += f"/{json.loads(request.body)['name']}"
        if self.count == 0 or not re.search(self.matching, told):
            return False
        self.count -= 1
        return True


class HubServer(ThreadingHTTPServer):
    """The sockets: a free port on 127.0.0.1 and a thread for each connection; one request is answered at a time."""

    daemon_threads = True

    def __init__(self, api: HubApi) -> None:
        super().__init__(("127.0.0.1", 0), HubRequestHandler)
        self.api = api
        self.api.url = f"http://127.0.0.1:{self.server_port}"
        self.log: list[LogEntry] = []
        self.drop = DropSwitch()
        self.faults: list[Fault] = []
        self.lock = threading.Lock()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hung up is none."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class HubRequestHandler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def serve(self) -> None:
        # The body is read even when the connection will be dropped: unread bytes would turn the close into a reset.
        request = Request(self.command, urlsplit(self.path).path, self.headers["Authorization"], self.read_body())
        with self.server.lock:
            dropped = self.server.drop.takes(request)
            fault = next((fault for fault in self.server.faults if fault.takes(request)), None)
            response = None if dropped else self.answer(request, fault)
            self.server.log.append(LogEntry(request.method, request.path, response and response.status))
        if response is None:
            self.close_connection = True
        else:
            self.send(response, fault)

    def answer(self, request: Request, fault: Fault | None) -> Response:
        if fault is None or fault.status is None:
            return self.server.api.answer(request)
        return json_response(
            {"error": fault.message}, fault.status, {"X-Error-Message": fault.message, **fault.headers}
        )

    do_GET = do_HEAD = do_POST = do_DELETE = serve

    def read_body(self) -> bytes:
        if self.headers["Transfer-Encoding"] != "chunked":
            return self.rfile.read(int(self.headers["Content-Length"] or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()  # the line end behind a chunk
        self.rfile.readline()  # and behind the empty last one
        return body

    def send(self, response: Response, fault: Fault | None) -> None:
        self.send_response(response.status)
        for name, value in response.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(response.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.send_body(response.body, fault or Fault(""))

    def send_body(self, body: bytes, fault: Fault) -> None:
        if fault.flip:
            body = body[:-1] + bytes([body[-1] ^ 1])
        half = len(body) // 2 if fault.cut is None else fault.cut
        with suppress(ConnectionError):  # a client does not wait for ever
            self.wfile.write(body[:half])
            if fault.cut is None:
                time.sleep(fault.slow)
                self.wfile.write(body[half:])
        if fault.cut is not None:
            self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on stderr: the log is `HubServer.log`."""


# ---- what a test holds -----------------------------------------------------------------------------------------------


class LoopbackHub:
    """A running Hub and the processes that talk to it.

    Attributes:
        url: Where it listens.
        repos: `"tester/name"` -> `Repository`, whose `files` and `commits` a test looks at.
        log: One `LogEntry` a request, in order.
        token: The one token that is accepted.

    Args:
        home: A folder for the clients' `HF_HOME`: their cache and nothing of the person who runs the tests.
    """

    user = "tester"
    token = "hf_accepted"

    def __init__(self, home: Path) -> None:
        self.home = home
        self.repos: dict[str, Repository] = {}
        self._server = HubServer(HubApi(self.repos, self.user, self.token))
        self.url = self._server.api.url
        self.log = self._server.log

    def __enter__(self) -> LoopbackHub:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def drop_next(self, count: int, matching: str = "") -> None:
        """Hang up on the next `count` requests whose `"METHOD /path"` holds the regular expression `matching`."""
        self._server.drop.count, self._server.drop.matching = count, matching

    def fail_next(self, *faults: Fault) -> None:
        """From now on, beside what is still to come, these faults; the first one that takes a request has it."""
        self._server.faults += faults

    def environment(self, token: str | None = token) -> dict[str, str]:
        """Environment variables of a client process; `token=None` is one that is not logged in."""
        ours = {"HF_ENDPOINT": self.url, "HF_HOME": str(self.home), "NO_PROXY": "127.0.0.1"}
        if token is not None:
            ours["HF_TOKEN"] = token
        theirs = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        return {**theirs, **ours, "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}

    def run(
        self, *command: str | Path, token: str | None = token, cwd: Path | None = None, timeout: float = 300
    ) -> subprocess.CompletedProcess[str]:
        """Run a command that has this server for its Hub; what it printed is in the result."""
        return subprocess.run(
            [str(part) for part in command],
            env=self.environment(token),
            cwd=cwd,
            timeout=timeout,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )

    def python(self, code: str, *arguments: str | Path, token: str | None = token) -> str:
        """Run Python code (`arguments` are its `sys.argv[1:]`) and return what it printed.

        Raises:
            AssertionError: The code failed; the message is its stderr.
        """
        done = self.run(sys.executable, "-c", code, *arguments, token=token)
        assert done.returncode == 0, done.stderr
        return done.stdout
