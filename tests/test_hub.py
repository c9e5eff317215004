"""A model on the hub that cannot be had: an answer in seconds, in a line that says why and what to do."""

import contextlib
import http.server
import os
import subprocess
import sys
import threading
import time

import pytest
from warm import free_port

from oneloop.configs import BadInput
from oneloop.families import hub

CODE = """
import sys
from oneloop.configs import BadInput
from oneloop.families import hub
for name in sys.argv[1:]:
    try:
        with hub.readable(name, "a diffusers model", "another"):
            print(hub.read(name, "v9" if "Revision" in name else None, "model_index.json"), hub.card(name, None))
    except BadInput as error:
        print(error)
"""


def ask(tmp_path, *names, **env):
    """What a process says that reads the indexes of these models, and the seconds it took."""
    own = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "HF_TOKEN") and "proxy" not in k.lower()}
    own |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_TELEMETRY": "1"} | env
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", CODE, *(names or ["owner/model"])], env=own, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip(), time.monotonic() - started


@contextlib.contextmanager
def served(files=None):
    """A hub on this machine that answers for the model owner/STATUS-CODE with this status and code, or has some files."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            body = (files or {}).get(self.path.rpartition("/")[2])
            model = "404-EntryNotFound" if files or self.path.count("/") < 2 else self.path.split("/")[2]
            status, _, code = model.partition("-")
            self.send_response(int(status) if body is None else 200)
            invalid = (
                {"X-Error-Message": "Invalid credentials in Authorization header"} if self.headers["Authorization"] else {}
            )
            headers = (
                {"X-Error-Code": code} | invalid if body is None else {"X-Repo-Commit": "0" * 40, "ETag": f'"{len(body)}"'}
            )
            for key, value in (headers | {"Content-Length": str(len(body or b""))}).items():
                self.send_header(key, value) if value else None
            self.end_headers()
            return body or b""

        def do_GET(self):
            self.wfile.write(self.do_HEAD())

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def test_a_hub_that_cannot_be_reached_is_said_in_seconds(tmp_path):
    said, took = ask(tmp_path, HTTPS_PROXY=f"http://127.0.0.1:{free_port()}")
    assert said.startswith("owner/model: the hub cannot be reached: https://") and "a folder that save_pretrained wrote" in said
    assert took < 15 and said.count("\n") == 0


def test_offline_says_who_asked_for_it(tmp_path):
    said, took = ask(tmp_path, HF_HUB_OFFLINE="1")
    assert (
        "since HF_HUB_OFFLINE is set, for https://huggingface.co/owner/model" in said
        and "a folder that save_pretrained wrote" in said
        and took < 15
    )


ABSENT = "there is no model of this name on the hub, or it is private; check https://huggingface.co/owner/"
REFUSED = {
    "401": ABSENT,
    "401-RepoNotFound": ABSENT,
    "404-RepoNotFound": ABSENT,
    "403-GatedRepo": "it is gated: accept its terms at https://huggingface.co/owner/403-GatedRepo, then log in",
    "401-GatedRepo": "it is gated: accept its terms",
    "403": "the hub answers 403 for model_index.json; log in with a token that may read https://huggingface.co/owner/403 (`hf",
    "418": "the hub answers 418 for model_index.json",
    "404-RevisionNotFound": "it has no branch, tag or commit 'v9' on the hub",
    "404-EntryNotFound": "not a diffusers model (it has no model_index.json)",
}


def test_what_the_hub_refuses_is_a_line(tmp_path):
    with served() as endpoint:
        said, took = ask(tmp_path, *(f"owner/{name}" for name in REFUSED), HF_ENDPOINT=endpoint)
    lines = said.splitlines()
    assert len(lines) == len(REFUSED) and took < 15, said
    for line, (name, says) in zip(lines, REFUSED.items(), strict=True):
        assert line.startswith(f"owner/{name}: {says}"), line


def test_a_token_that_does_not_suffice_is_said(tmp_path):
    """Gated, with a token of somebody who was not let in; and a token that the hub does not know."""
    with served() as endpoint:
        said, took = ask(tmp_path, "owner/403-GatedRepo", "owner/401", HF_ENDPOINT=endpoint, HF_TOKEN="hf_x")
    gated, unknown = said.splitlines()
    assert gated.startswith("owner/403-GatedRepo: it is gated: the account of HF_TOKEN is not let in: accept its terms at ")
    assert (
        unknown
        == "owner/401: the hub does not accept HF_TOKEN: log in anew with `hf auth login`, for https://huggingface.co/owner/401"
    )
    assert took < 15


def test_a_hub_that_answers_is_read_and_its_cache_serves_without_it(tmp_path):
    files = {"model_index.json": b'{"_class_name": "X"}', "README.md": b"---\nlicense: mit\n---\n"}
    expected = "{'_class_name': 'X'} {'base_model': 'owner/model', 'license': 'mit'}"
    with served(files) as endpoint:
        assert ask(tmp_path, HF_ENDPOINT=endpoint)[0] == expected
    said, took = ask(tmp_path, HF_ENDPOINT=endpoint)
    assert said == expected and took < 15


@pytest.mark.parametrize("content", [b"[]", b'"x"', b"{", b"\xff\xfe", b"null"])
def test_a_file_that_holds_no_object_is_a_line(tmp_path, content):
    (tmp_path / "model_index.json").write_bytes(content)
    hub.read.cache_clear()
    with (
        pytest.raises(BadInput, match=r"it: not a diffusers model .*; expected another"),
        hub.readable("it", "a diffusers model", "another"),
    ):
        hub.read(str(tmp_path), None, "model_index.json")


def test_only_two_libraries_are_imported_for_a_file(tmp_path, monkeypatch):
    """A module that a folder names is never imported, nor anything called that is no class of models."""
    (tmp_path / "evil.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    for library, kind in (
        ("evil", "Model"),
        ("diffusers", "os"),
        ("diffusers", "nothing"),
        (["x"], "y"),
        ("diffusers", 7),
        (None, "A"),
    ):
        with pytest.raises(BadInput, match=r"flag: unet is a .*; expected a class of models of diffusers or transformers"):
            hub.load(library, kind, str(tmp_path), "flag: unet")
    assert "evil" not in sys.modules
