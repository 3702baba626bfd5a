"""A Hugging Face Hub on loopback: the calls that the real client makes, kept in memory, failing when told to."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_loopback"


class Hub:
    """Repositories with whole revisions. ``failures`` holds (pattern of "METHOD path", status, or "cut", or raw bytes)."""

    def __init__(self) -> None:
        self.reset()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def reset(self) -> None:
        self.revisions: dict[str, list[tuple[str, dict[str, bytes]]]] = {}
        self.private: set[str] = set()
        self.visibility = "public"  # of a new repository, where the request has none
        self.blobs: dict[str, bytes] = {}
        self.failures: list[tuple[str, int | str]] = []
        self.calls: list[str] = []

    def fail(self, pattern: str, how: int | str) -> None:
        self.failures.append((pattern, how))

    def create(self, repo: str, files: dict[str, bytes] | None = None) -> None:
        self.revisions[repo] = []
        self.commit(repo, {".gitattributes": b"", **(files or {})})

    def commit(self, repo: str, files: dict[str, bytes]) -> str:
        commit = hashlib.sha1(repr((repo, len(self.revisions[repo]), sorted(files))).encode()).hexdigest()
        self.revisions[repo].append((commit, files))
        return commit

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        return self.find(repo, revision)[1]

    def find(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]]:
        if revision == "main":
            return self.revisions[repo][-1]
        return next(r for r in self.revisions[repo] if r[0] == revision)


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        pass

    def answer(self, status: int, body: bytes | dict | list = b"", **headers: str) -> None:
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
        self.send_response(status)
        headers.setdefault("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def error(self, status: int, code: str = "", message: str = "") -> None:
        self.answer(status, {"error": message or code}, X_Error_Code=code, X_Error_Message=message or code)

    def handle_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        call = f"{self.command} {path}"
        self.hub.calls.append(call)
        for pattern, how in self.hub.failures:
            if re.search(pattern, call):
                if how == "cut":
                    self.close_connection = True
                    self.connection.close()
                    return
                self.error(how, message=f"injected {how}")
                return
        if path == "/api/repos/create":
            self.create(json.loads(body))
        elif path == "/api/validate-yaml":
            self.answer(200, {"errors": [], "warnings": []})
        elif match := re.fullmatch(r"/lfs/([0-9a-f]{64})", path):
            self.hub.blobs[match[1]] = body
            self.answer(200)
        elif match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            self.batch(json.loads(body))
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit|revision|tree)/([^/]+)", path):
            getattr(self, match[2])(match[1], match[3], body)
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self.resolve(*match.groups())
        else:
            self.error(404, "RepoNotFound")

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def authorised(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def known(self, repo: str, revision: str) -> bool:
        if repo not in self.hub.revisions or (repo in self.hub.private and not self.authorised()):
            self.error(404 if self.authorised() else 401, "RepoNotFound", "Repository not found")
        elif revision != "main" and revision not in {commit for commit, _ in self.hub.revisions[repo]}:
            self.error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        else:
            return True
        return False

    def create(self, request: dict) -> None:
        repo = f"{request.get('organization') or 'user'}/{request['name']}"
        if not self.authorised():
            self.error(401, "", "Invalid username or password.")
        elif repo in self.hub.revisions:
            self.answer(409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{repo}"})
        else:
            self.hub.create(repo)
            if request.get("private") or request.get("visibility", self.hub.visibility) == "private":
                self.hub.private.add(repo)
            self.answer(200, {"url": f"{self.hub.url}/{repo}", "id": repo, "name": repo})

    def preupload(self, repo: str, revision: str, body: bytes) -> None:
        if self.known(repo, revision):
            files = json.loads(body)["files"]
            mode = {True: "lfs", False: "regular"}
            self.answer(
                200,
                {
                    "files": [
                        {"path": f["path"], "uploadMode": mode[f["path"].endswith(".safetensors")], "shouldIgnore": False}
                        for f in files
                    ]
                },
            )

    def batch(self, request: dict) -> None:
        objects = []
        for item in request["objects"]:
            upload = {"upload": {"href": f"{self.hub.url}/lfs/{item['oid']}"}}
            objects.append({**item, **({} if item["oid"] in self.hub.blobs else {"actions": upload})})
        self.answer(200, {"transfer": "basic", "objects": objects}, Content_Type="application/vnd.git-lfs+json")

    def commit(self, repo: str, revision: str, body: bytes) -> None:
        if not self.known(repo, revision):
            return
        files = dict(self.hub.files(repo, revision))
        for line in body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif entry["key"] == "deletedFile":
                files.pop(value["path"], None)
        commit = self.hub.commit(repo, files)
        self.answer(200, {"commitUrl": f"{self.hub.url}/{repo}/commit/{commit}", "commitOid": commit, "success": True})

    def revision(self, repo: str, revision: str, body: bytes) -> None:
        if self.known(repo, revision):
            commit, files = self.hub.find(repo, revision)
            self.answer(200, {"id": repo, "sha": commit, "siblings": [{"rfilename": name} for name in files]})

    def tree(self, repo: str, revision: str, body: bytes) -> None:
        if self.known(repo, revision):
            files = self.hub.files(repo, revision).items()
            self.answer(
                200,
                [
                    {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for name, data in files
                ],
            )

    def resolve(self, repo: str, revision: str, name: str) -> None:
        if not self.known(repo, revision):
            return
        commit, files = self.hub.find(repo, revision)
        if name not in files:
            self.answer(404, b"", X_Error_Code="EntryNotFound", X_Error_Message="Entry not found", X_Repo_Commit=commit)
            return
        data = files[name]
        self.answer(200, data, ETag=f'"{hashlib.sha256(data).hexdigest()}"', X_Repo_Commit=commit, Accept_Ranges="bytes")
