"""A hub on the loopback device: what the hub's own client asks of it, reading and writing, and faults on demand.

    with HubServer() as hub:                            # HF_ENDPOINT=hub.url; HF_HUB_DISABLE_XET=1 to upload
        commit = hub.add("owner/name", {"config.json": b"{}"}, kind="dataset", gated=True)
        hub.fail("resolve/", status=500, times=2)       # the next two requests whose address holds that text
        ...
        assert hub.requests[0].method == "HEAD"

Large files (LFS_ENDINGS) are objects that a redirect leads to under another host name, `localhost`, as on the hub, so
that a test sees where a token goes. A token opens everything but gated repositories whose terms it has not accepted.
"""

import base64
import hashlib
import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

TOKEN = "hf_tokenThatTheLoopbackHubKnows"
USER = "owner"
LFS_ENDINGS = (".safetensors", ".bin", ".pt", ".parquet", ".arrow", ".gguf", ".model", ".gz", ".zst")
PATIENCE = 8  # seconds until who waits for another is sent away; the client would ask again after ten
KINDS = {"models": "model", "datasets": "dataset"}


@dataclass
class Repository:
    """A repository: commit → path → content, and branch or tag → commit."""

    kind: str = "model"
    private: bool = False
    gated: bool = False
    licence: str = ""
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)


@dataclass
class Request:
    """What a client asked. `path` is without the query, what was not given is ""."""

    method: str
    path: str
    query: str
    host: str
    authorization: str
    range: str
    encoding: str  # that it accepts


@dataclass
class Fault:
    """What goes wrong, `times` times, where an address (with its query) holds `text` and the method is right.

    An error status with its headers, or, where the status is 200, the body: `cut`, the connection ends after so many
    bytes of it; `held`, after so many bytes of it nothing comes until the client has gone; `wrong`, it is as long as
    it should be, but other bytes.
    """

    text: str
    status: int = 200
    times: int = 1
    headers: Mapping[str, str] = field(default_factory=dict)
    method: str = ""
    cut: int | None = None
    held: int | None = None
    wrong: bool = False


class RefusedError(Exception):
    """A request is answered with an error."""

    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


class HubServer:
    """The hub's state, and a server for it that runs while the context is open."""

    def __init__(self, page: int = 1000) -> None:
        self.repositories: dict[str, Repository] = {}
        self.renamed: dict[str, str] = {}  # old name → new name
        self.objects: dict[str, bytes] = {}  # LFS objects by SHA-256
        self.accepted: dict[str, set[str]] = {TOKEN: set()}  # token → gated repositories whose terms it accepted
        self.page = page  # entries of a page of a listing
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.meeting: threading.Barrier | None = None  # where those who ask for an object wait for each other
        self.lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self.storage = f"http://localhost:{self._server.server_port}"  # another origin, for the LFS objects

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Take no new connections; one that is kept alive goes on."""
        self._server.shutdown()
        self._server.server_close()

    def add(self, name: str, files: Mapping[str, bytes], commit: str = "", branch: str = "main", **about: Any) -> str:
        """Make a repository, or a commit on a branch of one, that holds these files; returns the commit.

        `about` is what a new repository is: kind, private, gated, licence.
        """
        repository = self.repositories.setdefault(name, Repository(**about))
        commit = commit or _commit_id(repository.branches.get(branch, ""), files)
        repository.commits[commit] = dict(files)
        repository.branches[branch] = commit
        self.objects |= {_sha256(content): content for path, content in files.items() if _is_lfs(path, len(content))}
        return commit

    def rename(self, old: str, new: str) -> None:
        """Give a repository another name; the hub redirects from the old one."""
        self.repositories[new] = self.repositories.pop(old)
        self.renamed[old] = new

    def fail(self, text: str, **how: Any) -> None:
        """Let requests whose address holds `text` fail as the fields of Fault say."""
        self.faults.append(Fault(text, **how))

    def fault(self, method: str, address: str) -> Fault | None:
        """The fault that befalls a request, counted as used up."""
        with self.lock:
            for fault in self.faults:
                if fault.times and fault.text in address and fault.method in ("", method):
                    fault.times -= 1
                    return fault
        return None

    def asked(self, text: str, method: str = "") -> list[Request]:
        """The recorded requests whose path holds `text`."""
        return [seen for seen in self.requests if text in seen.path and method in ("", seen.method)]


def _is_lfs(path: str, size: int) -> bool:
    return size > 0 and path.endswith(LFS_ENDINGS)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _commit_id(parent: str, files: Mapping[str, bytes]) -> str:
    tree = "".join(f"{path} {_sha256(content)}\n" for path, content in sorted(files.items()))
    return hashlib.sha1(f"{parent}\n{tree}".encode()).hexdigest()


def _identity(path: str, content: bytes) -> str:
    """What names a content on the hub: the SHA-256 of an LFS object, git's hash of another file."""
    return _sha256(content) if _is_lfs(path, len(content)) else _git_hash(content)


def _entry(path: str, content: bytes) -> dict[str, Any]:
    """A file as a listing shows it."""
    entry = {"type": "file", "path": path, "size": len(content), "oid": _git_hash(content)}
    lfs = {"oid": _sha256(content), "size": len(content), "pointerSize": 134}
    return {**entry, "lfs": lfs, "xetHash": lfs["oid"]} if _is_lfs(path, len(content)) else entry


class _Handler(BaseHTTPRequestHandler):
    """Answers a request from the hub's state."""

    protocol_version = "HTTP/1.1"
    hub: HubServer

    def handle_one(self) -> None:
        """Record the request, and answer it or let it fail."""
        parts = urlsplit(self.path)
        self.address, self.query = parts.path, parse_qs(parts.query)
        self.token = self.headers.get("Authorization", "")
        self.body = self._read_body()
        about = (self.headers.get(name, "") for name in ("Host", "Authorization", "Range", "Accept-Encoding"))
        seen = Request(self.command, self.address, parts.query, *about)
        self.hub.requests.append(seen)
        self.failing = self.hub.fault(self.command, self.path)
        try:
            if self.failing and self.failing.status != 200:
                raise RefusedError(self.failing.status, "as the test wants it")
            self._route()
        except RefusedError as error:
            headers = {"X-Error-Message": error.message, **({"X-Error-Code": error.code} if error.code else {})}
            own = self.failing.headers if self.failing else {}
            self._answer_json({"error": error.message}, error.status, {**headers, **own})

    do_GET = do_HEAD = do_POST = do_PUT = handle_one  # noqa: N815 the names that the server looks for

    def log_message(self, *arguments: Any) -> None:
        """Print nothing."""

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _answer(self, body: bytes, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        """Send a body, or the part that was asked for, or what a fault makes of it."""
        wanted = self.headers.get("Range", "")
        headers = dict(headers or {})
        if wanted and status == 200:
            start = int(wanted.removeprefix("bytes=").partition("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
            body, status = body[start:], 206
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        fault = self.failing
        if fault and fault.wrong:
            body = bytes(byte ^ 1 for byte in body)
        end = None if fault is None else fault.cut if fault.held is None else fault.held
        self.wfile.write(body[:end])
        if end is not None:
            self.close_connection = True
        if fault and fault.held is not None:
            self.rfile.read(1)  # returns when the client closes the connection, or its process ends

    def _answer_json(self, value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        self._answer(json.dumps(value).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def _route(self) -> None:
        """Find what the address is about and answer."""
        steps = [unquote(step) for step in self.address.strip("/").split("/")]
        if steps[0] == "objects":
            return self._object(steps[1])
        self._check_token()
        if steps[:2] == ["api", "whoami-v2"]:
            self._check_known()
            return self._answer_json({"type": "user", "name": USER, "orgs": [], "auth": {"type": "access_token"}})
        if steps[:2] == ["api", "validate-yaml"]:
            return self._answer_json({"errors": [], "warnings": []})
        if steps[:3] == ["api", "repos", "create"]:
            return self._create(json.loads(self.body))
        api = steps[0] == "api"
        steps = steps[1:] if api else steps
        kind = KINDS[steps.pop(0)] if steps[0] in KINDS else "model"
        name, rest = "/".join(steps[:2]), steps[2:]
        if name in self.hub.renamed:
            return self._answer(b"", 307, {"Location": self.path.replace(name, self.hub.renamed[name])})
        repository = self._repository(kind, name.removesuffix(".git"))
        if not api:
            return self._outside_the_api(name, repository, rest)
        if not rest or rest[0] == "revision":
            return self._info(name, repository, rest[1] if rest else "main")
        if rest[0] == "refs":
            return self._refs(repository)
        if rest[0] == "commit":
            return self._commit(name, repository, rest[1])
        answer = {"tree": self._tree, "preupload": self._preupload}[rest[0]]
        return answer(repository.commits[self._commit_of(repository, rest[1])])

    def _check_token(self) -> None:
        if self.token and self.token.removeprefix("Bearer ") not in self.hub.accepted:
            raise RefusedError(401, "Invalid credentials in Authorization header")

    def _check_known(self) -> None:
        if not self.token:
            raise RefusedError(401, "Invalid username or password.")

    def _repository(self, kind: str, name: str) -> Repository:
        found = self.hub.repositories.get(name)
        if found is None or found.kind != kind or (found.private and not self.token):
            status = 404 if self.token else 401  # the hub does not tell strangers what exists
            raise RefusedError(status, "Repository not found", "RepoNotFound")
        return found

    def _commit_of(self, repository: Repository, revision: str) -> str:
        known = {**repository.tags, **repository.branches, **{commit: commit for commit in repository.commits}}
        if revision not in known:
            raise RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return known[revision]

    def _info(self, name: str, repository: Repository, revision: str) -> None:
        commit = self._commit_of(repository, revision)
        siblings = []
        for path, content in repository.commits[commit].items():
            blob = {"size": len(content), "blobId": _git_hash(content)}
            if _is_lfs(path, len(content)):
                blob["lfs"] = {"sha256": _sha256(content), "size": len(content), "pointerSize": 134}
            siblings.append({"rfilename": path, **(blob if self.query.get("blobs") else {})})
        info = {
            "id": name,
            "sha": commit,
            "private": repository.private,
            "gated": "manual" if repository.gated else False,
            "cardData": {"license": repository.licence or None},
            "siblings": siblings,
        }
        if wanted := self.query.get("expand"):
            info = {key: value for key, value in info.items() if key in (*wanted, "id")}
        self._answer_json(info)

    def _refs(self, repository: Repository) -> None:
        named = {"branches": repository.branches, "tags": repository.tags, "converts": {}}
        found = {}
        for kind, refs in named.items():
            found[kind] = [{"name": name, "ref": f"refs/{name}", "targetCommit": at} for name, at in refs.items()]
        self._answer_json(found)

    def _tree(self, files: Mapping[str, bytes]) -> None:
        start = int(self.query.get("cursor", ["0"])[0])
        end = start + self.hub.page
        listing = [_entry(path, content) for path, content in sorted(files.items())]
        following = f"{self.hub.url}{quote(self.address)}?recursive=true&cursor={end}"
        self._answer_json(listing[start:end], headers={"Link": f'<{following}>; rel="next"'} if listing[end:] else {})

    def _outside_the_api(self, name: str, repository: Repository, rest: list[str]) -> None:
        if name.endswith(".git"):
            return self._lfs_batch(json.loads(self.body))
        if repository.gated and name not in self.hub.accepted.get(self.token.removeprefix("Bearer "), ()):
            raise RefusedError(403 if self.token else 401, f"Access to model {name} is restricted.", "GatedRepo")
        commit, path = self._commit_of(repository, rest[1]), "/".join(rest[2:])
        if path not in repository.commits[commit]:
            raise RefusedError(404, "Entry not found", "EntryNotFound")
        content = repository.commits[commit][path]
        headers = {"X-Repo-Commit": commit}
        if not _is_lfs(path, len(content)):
            return self._answer(content, headers={**headers, "ETag": f'"{_git_hash(content)}"'})
        oid = _sha256(content)
        place = f"{self.hub.storage}/objects/{oid}?name={quote(path)}"
        headers |= {"X-Linked-Size": str(len(content)), "X-Linked-ETag": f'"{oid}"', "Location": place}
        headers |= {"X-Xet-Hash": oid, "Link": f'<{self.hub.url}/api/xet-token>; rel="xet-auth"'}
        return self._answer(b"", 302, headers)

    def _object(self, oid: str) -> None:
        """Give or take an LFS object."""
        if self.command == "PUT":
            if _sha256(self.body) != oid:
                raise RefusedError(400, "the content is not what its name says")
            self.hub.objects[oid] = self.body
            return self._answer(b"")
        if self.hub.meeting:
            self.hub.meeting.wait(PATIENCE)
        return self._answer(self.hub.objects[oid], headers={"ETag": f'"{oid}"'})

    def _create(self, wanted: dict[str, Any]) -> None:
        self._check_known()
        name = f"{wanted.get('organization') or USER}/{wanted['name']}"
        if wanted.get("organization") not in (None, USER):
            raise RefusedError(403, f"You may not create a repository under '{wanted['organization']}'")
        kind = wanted.get("type") or "model"
        place = f"{self.hub.url}/{'' if kind == 'model' else f'{kind}s/'}{name}"
        if name in self.hub.repositories:
            return self._answer_json({"error": f"You already created this {kind} repo", "url": place}, 409)
        self.hub.add(name, {}, kind=kind, private=wanted.get("visibility") == "private")
        return self._answer_json({"url": place, "name": name})

    def _preupload(self, there: Mapping[str, bytes]) -> None:
        self._check_known()
        files = []
        for file in json.loads(self.body)["files"]:
            path, lfs = file["path"], _is_lfs(file["path"], file["size"])
            known = _identity(path, there[path]) if path in there else None
            mode = "lfs" if lfs else "regular"
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": known})
        self._answer_json({"files": files})

    def _lfs_batch(self, wanted: dict[str, Any]) -> None:
        self._check_known()
        objects = []
        for asked in wanted["objects"]:
            upload = {"upload": {"href": f"{self.hub.storage}/objects/{asked['oid']}"}}
            objects.append(asked if asked["oid"] in self.hub.objects else {**asked, "actions": upload})
        self._answer_json({"transfer": "basic", "objects": objects})

    def _commit(self, name: str, repository: Repository, branch: str) -> None:
        """Add and delete files on a branch; a parent that is not its newest commit is a conflict."""
        self._check_known()
        with self.hub.lock:
            parent = self._commit_of(repository, branch)
            files = dict(repository.commits[parent])
            for line in self.body.splitlines():
                operation = json.loads(line)
                key, value = operation["key"], operation["value"]
                if key == "header" and value.get("parentCommit", parent) != parent:
                    raise RefusedError(412, "A commit has happened since. Please refresh and try again.")
                if key == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif key == "lfsFile":
                    if value["oid"] not in self.hub.objects:
                        raise RefusedError(400, f"the LFS object of {value['path']} was not uploaded")
                    files[value["path"]] = self.hub.objects[value["oid"]]
                elif key == "deletedFile":
                    del files[value["path"]]
            commit = self.hub.add(name, files, branch=branch)
        place = f"{self.hub.url}/{name}/commit/{commit}"
        self._answer_json({"success": True, "commitUrl": place, "commitOid": commit, "hookOutput": ""})
