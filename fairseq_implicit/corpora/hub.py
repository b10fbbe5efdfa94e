"""Dataset repositories of the Hugging Face hub, brought into a local folder before anything is read.

The endpoint comes from the environment (``HF_ENDPOINT``), the token from ``HF_TOKEN`` or the hub's own login. Every
file is compared with the checksum that the hub publishes. An interrupted download goes on where it stopped: recent
releases of the hub library throw partial files away, which costs up to 14 GB per shard of The Pile, so the partial file
is kept here, under a name of its own and a lock.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from fnmatch import fnmatch
from pathlib import Path

from fairseq_implicit.corpora.durable import publish, sha256_of
from fairseq_implicit.corpora.problems import CorpusError
from fairseq_implicit.corpora.sources import is_corpus_file

logger = logging.getLogger(__name__)

PREFIX = "hf://"


def download(reference: str, folder: Path, patterns: tuple[str, ...] = (), revision: str | None = None) -> Path:
    """Downloads the corpus files of a dataset repository.

    Args:
        reference: ``hf://OWNER/NAME`` or ``OWNER/NAME``.
        folder: local parent folder; files go to ``folder/OWNER/NAME``.
        patterns: file name patterns (``train/0*.jsonl.zst``) to take; none takes every corpus file.
        revision: branch, tag or commit.

    Returns:
        the local folder.

    Raises:
        CorpusError: the repository cannot be read, has no such file, or a file's checksum does not match; or the hub's
            client is missing.
    """
    try:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError as error:
        raise CorpusError(
            f"Downloading {reference} needs huggingface_hub, which is not installed: pip install huggingface_hub."
        ) from error

    repository = reference.removeprefix(PREFIX).strip("/")
    # huggingface_hub reads HF_ENDPOINT at its import only; asking here lets one process use several endpoints.
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+|[\w.-]+", repository) or {".", ".."} & set(repository.split("/")):
        raise CorpusError(f"{reference} is no repository of the hub; write hf://OWNER/NAME.")
    target = folder / repository
    try:
        info = api.dataset_info(repository, revision=revision, files_metadata=True)
    except HfHubHTTPError as error:
        raise CorpusError(
            f"The dataset repository {repository} cannot be read from {api.endpoint} ({_first_line(error)}); check the "
            "name, and for gated corpora such as OSCAR accept the terms on the hub and set HF_TOKEN."
        ) from error
    except Exception as error:
        raise CorpusError(f"{api.endpoint} cannot be reached for {repository} ({_first_line(error)}).") from error
    names = [file.rfilename for file in info.siblings]
    chosen = [n for n in names if (any(fnmatch(n, p) for p in patterns) if patterns else is_corpus_file(Path(n).name))]
    if not chosen:
        raise CorpusError(
            f"{repository} has no file like {', '.join(patterns) or 'a corpus file'}; it has: {', '.join(names[:20])}."
        )
    by_name = {file.rfilename: file for file in info.siblings}
    for name in chosen:  # before anything is fetched
        _refuse_unsafe(by_name[name], target, repository)
    for number, name in enumerate(sorted(chosen), start=1):
        logger.info("%s: file %d of %d, %s", repository, number, len(chosen), name)
        _fetch(api, repository, info.sha, by_name[name], target / name)
    return target


def _refuse_unsafe(facts, target: Path, repository: str) -> None:
    """A hub, or who answers in its place, decides what is written into the repository's folder, never what beside it.

    Raises:
        CorpusError: the file would lie elsewhere, on this or another operating system, or its checksum is none.
    """
    name, parts = facts.rfilename, facts.rfilename.split("/")
    if {"", ".", ".."} & set(parts) or not name.isprintable() or "\\" in name or re.match("[A-Za-z]:", name):
        raise CorpusError(
            f"{repository} has a file named {name!r}, which would not lie in {target}; do not trust this repository or "
            "this HF_ENDPOINT."
        )
    if not (target / name).parent.resolve().is_relative_to(target.resolve()):
        raise CorpusError(
            f"{target / name} of {repository} would be written to {(target / name).parent.resolve()}, for a folder on "
            "its way is a symbolic link; replace it by a folder, or give another --hub-folder."
        )
    if not re.fullmatch("[0-9a-f]*", _published(facts)):
        raise CorpusError(f"{repository} publishes {_published(facts)!r} as checksum of {name}, which is none.")


def _fetch(api, repository: str, revision: str, facts, path: Path) -> None:
    """Downloads one file of a repository, or the rest of it, unless it is there and verified.

    A file that is there keeps its name until the download is whole and as published.
    """
    from filelock import FileLock

    path.parent.mkdir(parents=True, exist_ok=True)
    # The checksum in the name keeps the halves of two versions of a file apart.
    partial = path.with_name(f".{path.name}.{_published(facts)[:16] or 'unknown'}.partial")
    with FileLock(f"{partial}.lock"):
        if _is_verified(path, facts):
            return
        if path.is_file() and _published(facts) and _checksum(path, facts) == _published(facts):
            _write_stamp(path, facts)
            return
        if path.is_file():
            logger.warning("%s is not the file that %s publishes now; it is fetched again", path, repository)
        _download(api, repository, revision, facts, partial)
        found = _checksum(partial, facts)
        if not _published(facts):
            logger.warning("%s publishes no checksum of %s, so it is not verified", repository, facts.rfilename)
        elif found != _published(facts):
            partial.unlink()
            raise CorpusError(
                f"{path} does not match the checksum that {repository} publishes ({found[:16]}… instead of "
                f"{_published(facts)[:16]}…); the damaged download was removed, run the same command again to fetch it."
            )
        publish(partial, path)
        _write_stamp(path, facts)


def _download(api, repository: str, revision: str, facts, partial: Path) -> None:
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    url = hf_hub_url(repository, facts.rfilename, repo_type="dataset", revision=revision, endpoint=api.endpoint)
    with open(partial, "ab") as file:
        # Without a size nobody knows whether the partial file is whole, and without a checksum whose half it is.
        if facts.size is None or not _published(facts) or file.tell() > facts.size:
            file.truncate(0)
            file.seek(0)
        try:
            if facts.size is None or file.tell() < facts.size:
                http_get(
                    url,
                    file,
                    resume_size=file.tell(),
                    headers=build_hf_headers(token=api.token),
                    expected_size=facts.size,
                    displayed_filename=facts.rfilename,
                )
        except Exception as error:
            raise CorpusError(
                f"The download of {facts.rfilename} from {repository} was interrupted ({_first_line(error)}); "
                "run the same command again, it goes on where it stopped."
            ) from error
        file.flush()
        os.fsync(file.fileno())


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _checksum(path: Path, facts) -> str:
    """SHA-256 for large files, the git object id for the others."""
    if facts.lfs is not None:
        return sha256_of(path)
    with open(path, "rb") as file:
        digest = hashlib.sha1(b"blob %d\0" % os.fstat(file.fileno()).st_size)
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _stamp(path: Path) -> Path:
    return path.with_name(f".{path.name}.verified")


def _is_verified(path: Path, facts) -> bool:
    """True when the file was compared before and has not changed since; hashing 400 GB at every start takes an hour."""
    if not path.is_file() or not _stamp(path).is_file():
        return False
    status = path.stat()
    return _stamp(path).read_text() == f"{status.st_size} {status.st_mtime_ns} {_published(facts)}"


def _published(facts) -> str:
    """The checksum that the hub publishes, empty when it publishes none."""
    return (facts.lfs.sha256 if facts.lfs is not None else facts.blob_id) or ""


def _write_stamp(path: Path, facts) -> None:
    status = path.stat()
    _stamp(path).write_text(f"{status.st_size} {status.st_mtime_ns} {_published(facts)}")
