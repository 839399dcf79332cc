"""A local server with the API of the Hugging Face Hub."""

import contextlib
import hashlib
import http.server
import json
import threading
import urllib.parse


class HubServer:
    """Repositories in memory, served over HTTP.

    Attributes:
        endpoint: the server's address, for `HF_ENDPOINT`.
        requests: list of (method, path) of the requests.
        break_after: dict, name of a file to how many bytes of its body are sent before
            the connection is closed, once for each entry of the list.
        gated: names of repositories that need a log-in.
        status: status of every answer, such as 503 for a server that is down; `None`
            to serve.
    """

    def __init__(self):
        self._commits = {}
        self._branches = {}
        self.requests = []
        self.break_after = {}
        self.gated = set()
        self.status = None

    def publish(self, repository, files, branch="main"):
        """Creates a commit of a repository.

        Args:
            repository: string, `user/name`.
            files: dict of bytes by file name.

        Returns:
            The commit's hash.
        """
        content = json.dumps(
            {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
        )
        commit = hashlib.sha1((repository + content).encode()).hexdigest()
        self._commits.setdefault(repository, {})[commit] = dict(files)
        self._branches.setdefault(repository, {})[branch] = commit
        return commit

    def downloads(self):
        """Names of the downloaded files, in order."""
        return [
            path.rsplit("/", 1)[1]
            for method, path in self.requests
            if method == "GET" and "/resolve/" in path
        ]

    @contextlib.contextmanager
    def running(self):
        """Serves inside the block."""
        hub = self

        class Handler(_Handler):
            server_hub = hub

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()
            thread.join()

    def find(self, repository, revision):
        """Commit and files of a revision, or `(None, None)`."""
        commit = self._branches[repository].get(revision, revision)
        return commit, self._commits[repository].get(commit)

    def knows(self, repository):
        return repository in self._commits


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self._answer()

    def do_GET(self):
        self._answer()

    def _answer(self):
        hub = self.server_hub
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        hub.requests.append((self.command, path))
        if hub.status:
            return self._send(hub.status, b"")
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            repository = "/".join(parts[2:4])
            revision = parts[5] if len(parts) > 5 else "main"
            file = None
        else:
            repository, revision = "/".join(parts[:2]), parts[3]
            file = "/".join(parts[4:])
        if not hub.knows(repository):
            return self._refuse(401, "RepoNotFound")
        commit, files = hub.find(repository, revision)
        if files is None:
            return self._refuse(404, "RevisionNotFound")
        if file is None:
            siblings = [{"rfilename": name} for name in files]
            answer = {"id": repository, "sha": commit, "siblings": siblings}
            return self._send(200, json.dumps(answer).encode())
        if repository in hub.gated:
            return self._refuse(403, "GatedRepo")
        if file not in files:
            return self._refuse(404, "EntryNotFound", {"X-Repo-Commit": commit})
        return self._file(file, files[file], commit)

    def _file(self, name, data, commit):
        headers = {
            "ETag": f'"{hashlib.sha256(data).hexdigest()}"',
            "X-Repo-Commit": commit,
            "Accept-Ranges": "bytes",
        }
        status, start = 200, 0
        if byte_range := self.headers.get("Range"):
            start = int(byte_range.removeprefix("bytes=").split("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            status = 206
        limits = self.server_hub.break_after.get(name)
        limit = limits.pop(0) if limits and self.command == "GET" else None
        self._send(status, data[start:], headers, limit)

    def _refuse(self, status, code, headers=()):
        self._send(status, b"", {"X-Error-Code": code, **dict(headers)})

    def _send(self, status, body, headers=(), limit=None):
        self.send_response(status)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:limit])
        if limit is not None:
            self.close_connection = True
