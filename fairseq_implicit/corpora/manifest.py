"""The record of a finished corpus: which files belong to it, from which sources they were made and how."""

from __future__ import annotations

from pathlib import Path

from fairseq_implicit.corpora.durable import read_json
from fairseq_implicit.corpora.preparation import IDENTITY
from fairseq_implicit.corpora.problems import CorpusError

MANIFEST = "manifest.json"
JOB = {"settings": dict, "sources": [list]}
_MANIFEST = {"job": JOB, "sources": [IDENTITY], "damaged?": [list], "files": {"*": {"sha256": str, "bytes": int}}}


def read_manifest(folder: Path, name: str = MANIFEST) -> dict | None:
    """The manifest of a prepared corpus, or None when it is not finished.

    Raises:
        CorpusError: the manifest is damaged, or names a file outside the folder.
    """
    manifest = read_json(folder / name, _MANIFEST)
    for file in manifest["files"] if manifest is not None else ():
        if file in ("", ".", "..") or "/" in file or "\\" in file:
            raise CorpusError(
                f"{folder / name} names the file {file!r}, which does not lie in its folder; it is damaged or was "
                "tampered with: prepare the corpus again."
            )
    return manifest
