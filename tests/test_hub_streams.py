"""Streams from hf:// paths: a server on this machine that answers as the hub does, 50 ms late."""

import http.server
import json
import os
import re
import subprocess
import sys
import threading
import time
from urllib.parse import parse_qs, unquote, urlparse

from test_streaming import DELAY, parquet

CODE = """
import json, sys
from pathlib import Path
from oneloop import data
from oneloop.configs import BadInput, Data
from oneloop.inputs import sources
for pattern in sys.argv[2:]:
    try:
        cfg = Data(stream=pattern, resolution=8, train_batch_size=4, stream_lanes=2, stream_window=2)
        examples = data.opened(sources.open_source(cfg, folder=Path(sys.argv[1])), cfg, 0, None)
        print(json.dumps([examples.size, examples[range(8)]["caption"], examples.source.streams[0].fetched]))
    except BadInput as error:
        print(error)
"""


class Hub(http.server.BaseHTTPRequestHandler):
    """The data set owner/name, whose files lie in the server's folder, as of huggingface_hub's HfFileSystem."""

    protocol_version = "HTTP/1.1"

    def send(self, status, body, **headers):
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def about(self, path):
        return {"type": "file", "path": path.name, "size": path.stat().st_size, "oid": "0" * 40}

    def do_GET(self):
        asked = self.rfile.read(int(self.headers.get("Content-Length", 0))) if self.command == "POST" else b""
        time.sleep(DELAY)
        url, files = unquote(urlparse(self.path).path), {path.name: path for path in self.server.folder.iterdir()}
        self.server.requests.append((self.command, url, self.headers.get("Range")))
        if not re.match(r"/(api/)?datasets/owner/name\b", url):
            return self.send(404, b"", X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
        if "/paths-info/" in url:
            text = asked.decode()
            names = json.loads(text)["paths"] if text.startswith("{") else parse_qs(text)["paths"]
            found = [self.about(files[name]) for name in names if name in files]
            return self.send(200, json.dumps(found).encode(), Content_Type="application/json")
        if "/tree/" in url:
            body = json.dumps([self.about(path) for path in sorted(files.values())]).encode()
            return self.send(200, body, Content_Type="application/json")
        if url.startswith("/api/"):
            about = {
                "id": "owner/name",
                "sha": "1" * 40,
                "private": False,
                "tags": [],
                "downloads": 0,
                "likes": 0,
                "siblings": [],
            }
            return self.send(200, json.dumps(about).encode(), Content_Type="application/json")
        if (path := files.get(url.rpartition("/")[2])) is None:
            return self.send(404, b"", X_Error_Code="EntryNotFound")
        raw, extra, status = path.read_bytes(), {"Accept_Ranges": "bytes", "ETag": f'"{path.name}"'}, 200
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            start, end = int(match[1]), min(int(match[2] or len(raw)), len(raw) - 1)
            extra["Content_Range"], raw, status = f"bytes {start}-{end}/{len(raw)}", raw[start : end + 1], 206
        self.send(status, raw, X_Repo_Commit="1" * 40, **extra)

    do_HEAD = do_POST = do_GET

    def log_message(self, *_):
        pass


def test_hub_paths(tmp_path):
    """A pattern, a folder and a file: the same examples as from the disk, a row group a request; a second start asks for no
    footer; what is not there is a line."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.folder, server.requests, server.daemon_threads = parquet(tmp_path / "set", rows=60, group=5), [], True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    own = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "HF_TOKEN") and "proxy" not in k.lower()}
    own |= {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}"}
    patterns = ["hf://datasets/owner/name/*.parquet", "hf://datasets/owner/name", "hf://datasets/owner/name/{000..002}.parquet"]
    wrong = ["hf://datasets/owner/other/*.parquet", "hf://datasets/owner/name/x-*.parquet"]
    here = [str(tmp_path / "set")]
    try:
        command = [sys.executable, "-c", CODE, str(tmp_path / "cache")]
        done = subprocess.run([*command, *here, *patterns, *wrong], env=own, capture_output=True, text=True, timeout=100)
    finally:
        server.shutdown()
        server.server_close()
    assert done.returncode == 0, done.stderr
    local, *far = done.stdout.splitlines()
    assert far[:3] == [local] * 3 and json.loads(local)[0] == 60, done.stdout
    assert all(line.startswith("--data.stream 'hf://") or "--data.stream hf://" in line for line in far[3:]), far
    ranges = [url for command, url, asked in server.requests if command == "GET" and asked]
    fetched = json.loads(local)[2]
    assert 3 + 3 * (fetched + 1) <= len(ranges) <= 3 + 3 * (fetched + 3), server.requests  # and a footer of each file in use
