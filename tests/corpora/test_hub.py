"""Downloads from a local server that speaks the hub's protocol: whole, interrupted and resumed, damaged."""

import hashlib
import http.server
import json
import os
import threading

import pytest

from fairseq_implicit.corpora import hub
from fairseq_implicit.corpora.problems import CorpusError
from tests.corpora.formats import documents_of, pile_lines, prepare, write_zst

COMMIT = "c" * 40


class HubServer(http.server.ThreadingHTTPServer):
    """One dataset repository ``owner/pile``. ``fail_after`` cuts every answer short; ``damage`` flips a byte."""

    def __init__(self, files):
        super().__init__(("127.0.0.1", 0), HubRequest)
        self.files = files
        self.fail_after = None
        self.damage = False
        self.says_sizes = True
        self.requests = []


class HubRequest(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def do_HEAD(self):
        self.answer(with_body=False)

    def do_GET(self):
        self.answer(with_body=True)

    def answer(self, with_body):
        path = self.path.split("?")[0]
        if path.startswith("/api/datasets/owner/pile"):
            siblings = [
                {
                    "rfilename": name,
                    "size": len(data) if self.server.says_sizes else None,
                    "blobId": hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest(),
                    **(
                        {"lfs": {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}}
                        if name.endswith(".zst")
                        else {}
                    ),
                }
                for name, data in self.server.files.items()
            ]
            body = json.dumps({"id": "owner/pile", "sha": COMMIT, "siblings": siblings}).encode()
            self.send(200, body, {"Content-Type": "application/json"}, with_body)
            return
        name = path.removeprefix(f"/datasets/owner/pile/resolve/{COMMIT}/")
        if name not in self.server.files:
            self.send(404, b"", {"X-Error-Code": "RepoNotFound"}, with_body)
            return
        data = self.server.files[name]
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha256(data).hexdigest()}"', "Accept-Ranges": "bytes"}
        if self.server.damage:
            data = data[:10] + bytes([data[10] ^ 1]) + data[11:]
        start = 0
        if "Range" in self.headers:
            start = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
        if with_body:
            self.server.requests.append((name, start))
        total = len(data)
        if start:
            headers["Content-Range"] = f"bytes {start}-{total - 1}/{total}"
        self.send(206 if start else 200, data[start:], headers, with_body)

    def send(self, status, body, headers, with_body):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if not with_body:
            return
        limit = self.server.fail_after
        if limit is not None and "X-Repo-Commit" in headers:
            self.wfile.write(body[:limit])
            self.wfile.flush()
            self.close_connection = True
            self.server.fail_after = 0  # and nothing more comes until the server is mended
            return
        self.wfile.write(body)


TEXTS = [os.urandom(2000).hex() for _ in range(60)]


@pytest.fixture
def server(tmp_path, monkeypatch):
    shard = write_zst(tmp_path / "origin.jsonl.zst", pile_lines(TEXTS)).read_bytes()
    server = HubServer({"train/00.jsonl.zst": shard, "README.md": b"# The Pile\n", "val.jsonl": b'{"text": "v"}\n'})
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    yield server
    server.shutdown()
    server.server_close()


def test_download_takes_the_corpus_files_and_prepares_them(server, tmp_path):
    arguments = ["hf://owner/pile", "--hub-folder", tmp_path / "hub", "--output", tmp_path / "out"]
    prepare(*arguments, "--download-only")
    assert (tmp_path / "hub/owner/pile/train/00.jsonl.zst").read_bytes() == server.files["train/00.jsonl.zst"]
    assert not (tmp_path / "hub/owner/pile/README.md").exists() and not (tmp_path / "out").exists()
    downloads = list(server.requests)
    assert sorted(downloads) == [("train/00.jsonl.zst", 0), ("val.jsonl", 0)]
    prepare(*arguments, "--valid-fraction", "0")
    assert server.requests == downloads  # verified files are not fetched again
    assert sorted(documents_of(tmp_path / "out")) == sorted([*TEXTS, "v"])


def test_interrupted_download_is_resumed(server, tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the hub client's own attempts
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 10_000)
    server.fail_after = 55_000
    with pytest.raises(CorpusError, match="download of train/00.jsonl.zst .* was interrupted .* goes on where it"):
        hub.download("owner/pile", tmp_path, ("train/*",))
    assert not (tmp_path / "owner/pile/train/00.jsonl.zst").exists()
    server.fail_after = None
    server.requests.clear()
    folder = hub.download("owner/pile", tmp_path, ("train/*",))
    assert (folder / "train/00.jsonl.zst").read_bytes() == server.files["train/00.jsonl.zst"]
    assert server.requests == [("train/00.jsonl.zst", 50_000)]  # whole chunks of the interrupted download are kept
    assert not list(folder.rglob("*.partial"))


@pytest.mark.parametrize("says_sizes", [True, False])
def test_partial_file_that_cannot_be_a_beginning_is_fetched_again(server, tmp_path, says_sizes):
    """One that is longer than the file, or any when the hub's sizes are null."""
    server.says_sizes = says_sizes
    data = server.files["train/00.jsonl.zst"]
    folder = tmp_path / "owner/pile/train"
    folder.mkdir(parents=True)
    (folder / f".00.jsonl.zst.{hashlib.sha256(data).hexdigest()[:16]}.partial").write_bytes(b"x" * (len(data) + 1))
    hub.download("owner/pile", tmp_path, ("train/*",))
    assert (folder / "00.jsonl.zst").read_bytes() == data


@pytest.mark.parametrize("name", ["train/00.jsonl.zst", "val.jsonl"])
def test_checksum_mismatch_removes_the_file(server, tmp_path, name):
    server.damage = True
    with pytest.raises(CorpusError, match="does not match the checksum that owner/pile publishes"):
        hub.download("owner/pile", tmp_path, (name,))
    assert not (tmp_path / "owner/pile" / name).exists()
    server.damage = False
    assert (hub.download("owner/pile", tmp_path, (name,)) / name).read_bytes() == server.files[name]


def test_what_cannot_be_downloaded_is_said(server, tmp_path, monkeypatch):
    with pytest.raises(CorpusError, match=r"has no file like \*.parquet; it has: train/00.jsonl.zst"):
        hub.download("owner/pile", tmp_path, ("*.parquet",))
    with pytest.raises(CorpusError, match="other/name cannot be read .* HF_TOKEN"):
        hub.download("hf://other/name", tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with pytest.raises(CorpusError, match="http://127.0.0.1:9 cannot be reached"):
        hub.download("owner/pile", tmp_path)
