"""The report of a preparation: where every document and byte went, as JSON and as a table."""

from __future__ import annotations

from fairseq_implicit.corpora.counts import Counts


def report_table(counts: Counts, problems: list[dict], problems_total: int, shards: int) -> str:
    """A table for people. Left: what happened; right: documents and bytes of text; ``shards`` are train files."""
    rows: list[tuple[str, int | str, float | None]] = [("read", counts.documents_read, counts.bytes_read)]
    rows += [
        (f"  dropped: {reason}", -number, -counts.dropped_bytes[reason])
        for reason, number in sorted(counts.dropped.items())
    ]
    if counts.pieces_added:
        rows.append(("  added by splitting long documents", counts.pieces_added, None))
    if counts.copies_added:
        rows.append(("  added by component weights", counts.copies_added, counts.copies_bytes))
    rows.append(("  removed by cleaning and splitting", "", -counts.bytes_removed))
    for split in ("train", "valid", "test"):
        rows.append((f"written: {split}", counts.written[split], counts.written_bytes[split]))
    rows.append(("unaccounted for", counts.documents_missing(), counts.bytes_missing()))
    lines = [f"{'':<56}{'documents':>14}{'bytes':>18}"]
    lines += [f"{label:<56}{_number(documents):>14}{_number(size):>18}" for label, documents, size in rows]
    lines.append("")
    if counts.changed:
        lines.append("changed documents (a document can be counted several times)")
        lines += [f"  {reason:<54}{number:>14,}" for reason, number in sorted(counts.changed.items())]
    if counts.lines_wrapped:
        lines.append(f"  {'line ends added by wrapping':<54}{counts.lines_wrapped:>14,}")
    if set(counts.components) - {"(none)"}:
        lines += ["", "documents read, by component"]
        lines += [f"  {name:<54}{number:>14,}" for name, number in sorted(counts.components.items())]
    lines += ["", f"train shards: {shards}; problems of input files: {problems_total}"]
    lines += [f"  {problem['sentence']}" for problem in problems]
    if problems_total > len(problems):
        lines.append(f"  ... and {problems_total - len(problems)} more")
    return "\n".join(lines) + "\n"


def _number(value: int | float | str | None) -> str:
    return "" if value is None else value if isinstance(value, str) else f"{value:,}"
