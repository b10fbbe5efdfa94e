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
from fnmatch import fnmatch
from pathlib import Path

from fairseq_implicit.corpora.durable import sha256_of
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
    for number, name in enumerate(sorted(chosen), start=1):
        facts = by_name[name]
        path = target / name
        logger.info("%s: file %d of %d, %s", repository, number, len(chosen), name)
        _fetch(api, repository, info.sha, facts, path)
    return target


def _fetch(api, repository: str, revision: str, facts, path: Path) -> None:
    """Downloads one file of a repository, or the rest of it, unless it is there and verified."""
    from filelock import FileLock
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    path.parent.mkdir(parents=True, exist_ok=True)
    # The checksum in the name keeps the halves of two versions of a file apart.
    partial = path.with_name(f".{path.name}.{_published(facts)[:16]}.partial")
    with FileLock(f"{partial}.lock"):
        if _is_verified(path, facts):
            return
        if not path.is_file():
            url = hf_hub_url(repository, facts.rfilename, repo_type="dataset", revision=revision, endpoint=api.endpoint)
            with open(partial, "ab") as file:
                # The hub may not say the size (null); whether a partial file is whole cannot be known then.
                if facts.size is None or file.tell() > facts.size:
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
            os.replace(partial, path)
        _verify(path, facts, repository)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _checksum(path: Path, facts) -> tuple[str | None, str]:
    """(published, found): SHA-256 for large files, the git object id for the others."""
    if facts.lfs is not None:
        return facts.lfs.sha256, sha256_of(path)
    if not facts.blob_id:
        return None, ""
    data = path.read_bytes()
    return facts.blob_id, hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _stamp(path: Path) -> Path:
    return path.with_name(f".{path.name}.verified")


def _is_verified(path: Path, facts) -> bool:
    """True when the file was compared before and has not changed since; hashing 400 GB at every start takes an hour."""
    if not path.is_file() or not _stamp(path).is_file():
        return False
    status = path.stat()
    return _stamp(path).read_text() == f"{status.st_size} {status.st_mtime_ns} {_published(facts)}"


def _published(facts) -> str:
    return facts.lfs.sha256 if facts.lfs is not None else str(facts.blob_id)


def _verify(path: Path, facts, repository: str) -> None:
    published, found = _checksum(path, facts)
    if published is not None and found != published:
        path.unlink()
        raise CorpusError(
            f"{path} does not match the checksum that {repository} publishes ({found[:16]}… instead of "
            f"{published[:16]}…); the damaged file was removed, run the same command again to fetch it."
        )
    status = path.stat()
    _stamp(path).write_text(f"{status.st_size} {status.st_mtime_ns} {_published(facts)}")
