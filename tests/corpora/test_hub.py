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
        self.withheld = {}  # what the list of files says instead of the truth
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
                    "size": len(data),
                    "blobId": hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest(),
                    **(
                        {"lfs": {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}}
                        if name.endswith(".zst")
                        else {}
                    ),
                }
                for name, data in self.server.files.items()
            ]
            siblings = [facts | self.server.withheld for facts in siblings]
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


@pytest.mark.parametrize("withheld", [{}, {"size": None}])
def test_partial_file_that_cannot_be_a_beginning_is_fetched_again(server, tmp_path, withheld):
    """One that is longer than the file, or any when the hub's sizes are null."""
    server.withheld = withheld
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
    assert not (tmp_path / "owner/pile" / name).exists() and not list(tmp_path.rglob("*.partial"))
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


UNSAFE = ["../../../evil.jsonl", "a/../../evil.jsonl", "{absolute}/evil.jsonl", "a\\..\\evil.jsonl", "C:evil.jsonl"]
UNSAFE += ["C:/evil.jsonl", "./evil.jsonl", "a//evil.jsonl", "evil\0.jsonl", "evil\n.jsonl", "/evil.jsonl", "..", ""]


@pytest.mark.parametrize("name", UNSAFE, ids=repr)
def test_no_file_is_written_or_removed_outside_the_folder(server, tmp_path, name):
    """Nor is anything else fetched from a repository that tries."""
    name = name.format(absolute=tmp_path / "home")
    (tmp_path / "home").mkdir()
    folder = tmp_path / "hub" / "corpora"
    places = [tmp_path / "hub", tmp_path / "home", folder, folder / "owner", tmp_path]
    (folder / "owner").mkdir(parents=True)
    for place in places:
        (place / "evil.jsonl").write_text("the user's own")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    server.files[name] = b'{"text": "evil"}\n'
    for patterns in ((), ("*",)):
        if not patterns and not name.endswith(".jsonl"):
            continue
        with pytest.raises(CorpusError, match="owner/pile has a file named .* do not trust"):
            hub.download("owner/pile", folder, patterns)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before and not server.requests


def test_links_lead_no_download_out_of_the_folder(server, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "hub/owner/pile").mkdir(parents=True)
    (tmp_path / "hub/owner/pile/train").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(
        CorpusError, match="would be written to .*elsewhere, for a folder on its way is a symbolic link"
    ):
        hub.download("owner/pile", tmp_path / "hub")
    assert not list((tmp_path / "elsewhere").iterdir())
    # but the repository's own folder may lie on another disk
    (tmp_path / "hub/owner/pile/train").unlink()
    (tmp_path / "hub/owner/pile").rmdir()
    (tmp_path / "hub/owner/pile").symlink_to(tmp_path / "elsewhere")
    hub.download("owner/pile", tmp_path / "hub")
    assert (tmp_path / "elsewhere/train/00.jsonl.zst").is_file()


@pytest.mark.parametrize("reference", ["hf://../..", "hf://..", "../evil", "hf://owner/..", "hf://a/b/c", "hf:///"])
def test_repository_is_no_path(server, tmp_path, reference):
    with pytest.raises(CorpusError, match="is no repository of the hub"):
        hub.download(reference, tmp_path / "hub")


LARGE = {"size": 1, "pointerSize": 1}


@pytest.mark.parametrize("lie", [{"blobId": "/../../../evil"}, {"lfs": LARGE | {"sha256": "../../../evil"}}])
def test_checksum_is_no_path(server, tmp_path, lie):
    server.withheld = lie
    with pytest.raises(CorpusError, match="as checksum of .*, which is none"):
        hub.download("owner/pile", tmp_path, ("val.jsonl",))
    assert not list(tmp_path.rglob("evil*"))


def test_other_file_stays_until_the_new_one_is_whole(server, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    path = tmp_path / "owner/pile/train/00.jsonl.zst"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"another version")
    server.damage = True
    with pytest.raises(CorpusError, match="does not match the checksum"):
        hub.download("owner/pile", tmp_path)
    assert path.read_bytes() == b"another version"
    server.damage, server.fail_after = False, 55_000
    with pytest.raises(CorpusError, match="was interrupted"):
        hub.download("owner/pile", tmp_path)
    assert path.read_bytes() == b"another version"
    server.fail_after = None
    hub.download("owner/pile", tmp_path)
    assert path.read_bytes() == server.files["train/00.jsonl.zst"]
    assert "00.jsonl.zst is not the file that owner/pile publishes now" in caplog.text


NO_CHECKSUM = {"blobId": None, "lfs": None}


@pytest.mark.parametrize("withheld", [{"size": None}, NO_CHECKSUM, {"size": None, **NO_CHECKSUM}])
def test_what_the_hub_does_not_publish_is_done_without(server, tmp_path, withheld, caplog):
    server.withheld = withheld
    for _ in range(2):
        folder = hub.download("owner/pile", tmp_path)
    assert (folder / "train/00.jsonl.zst").read_bytes() == server.files["train/00.jsonl.zst"]
    assert len(server.requests) == 2  # one for each of the two files
    assert ("publishes no checksum of val.jsonl, so it is not verified" in caplog.text) == ("lfs" in withheld)
