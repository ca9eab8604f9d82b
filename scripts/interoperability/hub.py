"""A stand-in for the part of the Hugging Face hub that `hf upload` uses."""

import base64
import json
import subprocess
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, Self

REPOSITORY = "me/adapter"
COMMIT = "0" * 40


class Hub:
    """The server. A file of safetensors is uploaded by git-lfs, every other one in the commit.

    Attributes:
        files: contents of committed files by path.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self._objects: dict[str, bytes] = {}
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                data = self.rfile.read(int(self.headers["Content-Length"] or 0))
                reply = json.dumps(hub._reply(self.path.partition("?")[0], data)).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(reply)))
                self.end_headers()
                self.wfile.write(reply)

            do_GET = do_PUT = do_POST

            def log_message(self, *_args: Any) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def upload(self, hf: str, directory: Path, home: Path) -> str:
        """Upload an adapter's directory with `hf upload`; return a summary.

        Raises:
            AssertionError: `hf` failed, or the committed files are not those of the directory.
        """
        environment = {
            "HF_ENDPOINT": self._url,
            "HF_HOME": str(home / "hf"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_TOKEN": "hf_interop",
            "HOME": str(home),
        }
        command = [hf, "upload", REPOSITORY, str(directory), "--exclude", "tensors.json"]
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, f"hf upload: {done.stderr[-300:]}"
        names = ("adapter_config.json", "adapter_model.safetensors")
        expected = {name: (directory / name).read_bytes() for name in names}
        assert self.files == expected, f"committed: {sorted(self.files)}"
        return f"committed {', '.join(sorted(self.files))}"

    def _reply(self, path: str, data: bytes) -> Any:
        if path == "/api/repos/create":
            return {"url": f"{self._url}/{REPOSITORY}"}
        if path.endswith("/preupload/main"):
            names = [file["path"] for file in json.loads(data)["files"]]
            modes = {True: "lfs", False: "regular"}
            return {
                "files": [
                    {
                        "path": name,
                        "uploadMode": modes[name.endswith(".safetensors")],
                        "shouldIgnore": False,
                    }
                    for name in names
                ]
            }
        if path.endswith("/objects/batch"):
            objects = json.loads(data)["objects"]
            for each in objects:
                each["actions"] = {"upload": {"href": f"{self._url}/objects/{each['oid']}"}}
            return {"transfer": "basic", "objects": objects}
        if path.startswith("/objects/"):
            self._objects[path.removeprefix("/objects/")] = data
        elif path.endswith("/commit/main"):
            for line in data.splitlines():
                operation = json.loads(line)
                value = operation["value"]
                if operation["key"] == "file":
                    self.files[value["path"]] = base64.b64decode(value["content"])
                elif operation["key"] == "lfsFile":
                    self.files[value["path"]] = self._objects[value["oid"]]
            url = f"{self._url}/{REPOSITORY}/commit/{COMMIT}"
            return {"commitOid": COMMIT, "commitUrl": url}
        return {}
