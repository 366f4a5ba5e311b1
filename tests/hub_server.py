"""A small hub: serves folders as models at the addresses that huggingface_hub asks."""

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0" * 40


class HubServer:
    """`with HubServer({"someone/model": folder}) as hub:` serves at `hub.url`.

    `downloads` counts the files that were sent, as (name, file). Before a file is sent, `hold` is
    called with its address, such as someone/model/config.json; it returns when the file may go.
    """

    def __init__(self, models: dict[str, Path], hold: Callable[[str], None] = lambda file: None):
        self.models, self.hold = models, hold
        self.downloads: Counter[tuple[str, str]] = Counter()
        self.asked: Counter[str] = Counter()  # the models that a process has looked up
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_) -> None:
                pass

            def do_HEAD(self) -> None:
                self.answer(*hub.answer(self.path))

            def do_GET(self) -> None:
                status, content, headers = hub.answer(self.path)
                parts = self.path.split("/resolve/")
                if status == 200 and len(parts) == 2:
                    file = parts[1].split("/", 1)[1]
                    name = parts[0].strip("/")
                    hub.hold(f"{name}/{file}")
                    hub.downloads[name, file] += 1
                self.answer(status, content, headers)

            def answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
                self.send_response(status)
                for key, value in (headers | {"Content-Length": str(len(content))}).items():
                    self.send_header(key, value)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(content)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.server.shutdown()
        self.server.server_close()

    def environment(self, cache: Path) -> dict[str, str]:
        """The variables of a process that asks this hub and keeps its files in `cache`.

        It waits for a file that is held; by default it asks again after ten seconds without a byte.
        """
        own = {"HF_ENDPOINT": self.url, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "0"}
        return own | {"HF_HUB_DOWNLOAD_TIMEOUT": "600"}

    def answer(self, path: str) -> tuple[int, bytes, dict[str, str]]:
        """(status, content, headers) for an address."""
        path = path.split("?")[0]
        for name, folder in self.models.items():
            files = sorted(file for file in folder.rglob("*") if file.is_file())
            names = [str(file.relative_to(folder)) for file in files]
            if path in (f"/api/models/{name}", f"/api/models/{name}/revision/main"):
                self.asked[name] += 1
                siblings = [{"rfilename": file} for file in names]
                return as_json({"id": name, "sha": COMMIT, "siblings": siblings})
            if path.startswith(f"/api/models/{name}/tree/"):
                return as_json(
                    [
                        {"type": "file", "path": key, "size": file.stat().st_size, "oid": oid(file)}
                        for key, file in zip(names, files, strict=True)
                    ]
                )
            wanted = path.removeprefix(f"/{name}/resolve/").partition("/")[2]
            if path.startswith(f"/{name}/resolve/") and wanted in names:
                file = folder / wanted
                headers = {"ETag": f'"{oid(file)}"', "X-Repo-Commit": COMMIT}
                return 200, file.read_bytes(), headers
        code = "EntryNotFound" if "/resolve/" in path else "RepoNotFound"
        return 404, b"", {"X-Error-Code": code, "X-Repo-Commit": COMMIT}


def oid(file: Path) -> str:
    """The name of a file's content, as git has it."""
    content = file.read_bytes()
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


def as_json(content: object) -> tuple[int, bytes, dict[str, str]]:
    """A successful answer."""
    return 200, json.dumps(content).encode(), {"Content-Type": "application/json"}
