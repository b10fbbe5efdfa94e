"""fairseq's JSON logs as curves."""

import json
import math
import os
from dataclasses import dataclass

Record = dict[str, float]


@dataclass(frozen=True)
class Curve:
    """What one run logged.

    Attributes:
        validations: metrics by update; ``loss`` in nats per masked token, the rest as logged, without ``valid_``.
        intervals: metrics of training between two log lines, by the update at the interval's end.
    """

    validations: dict[int, Record]
    intervals: dict[int, Record]

    @property
    def last(self) -> Record:
        """The last validation."""
        return self.validations[max(self.validations)]

    def mean(self, name: str, after: int = 0) -> float:
        """Mean of a metric of training over all updates beyond ``after``; nan where there is none."""
        total = weight = 0.0
        start = 0
        for update, record in sorted(self.intervals.items()):
            if name in record and start >= after:
                total += record[name] * (update - start)
                weight += update - start
            start = update
        return total / weight if weight else math.nan

    def first_below(self, level: float) -> float:
        """The update at which the validation loss falls to ``level`` nats, by linear interpolation; nan if never."""
        before = None
        for update, record in sorted(self.validations.items()):
            loss = record["loss"]
            if loss <= level:
                if before is None:
                    return float(update)
                earlier, higher = before
                return earlier + (update - earlier) * (higher - level) / (higher - loss)
            before = update, loss
        return math.nan


def read_curve(path: str) -> Curve:
    """The curve of a log written with ``--log-format json``. Where an interrupted run was resumed, the later record of
    an update counts. Lines that were cut short by a kill are passed over.

    Raises:
        FileNotFoundError: there is no such log.
    """
    validations: dict[int, Record] = {}
    intervals: dict[int, Record] = {}
    for tag, record in _records(path):
        if tag == "valid":
            metrics = {name.removeprefix("valid_"): value for name, value in record.items()}
            metrics["loss"] *= math.log(2)  # fairseq logs bits
            validations[int(metrics["num_updates"])] = metrics
        elif tag == "train_inner":
            intervals[int(record["num_updates"])] = record
    return Curve(validations, intervals)


def _records(path: str) -> list[tuple]:
    found = []
    with open(path, encoding="utf-8", errors="replace") as log:
        for line in log:
            parts = line.split(" | ", 3)
            if len(parts) < 4 or not parts[3].startswith("{"):
                continue
            try:
                values = json.loads(parts[3])
                record = {_today(name): float(value) for name, value in values.items() if value is not None}
            except ValueError:
                continue
            found.append((parts[2], record))
    return found


def _today(name: str) -> str:
    """The name that a metric of an earlier version has now."""
    return name.replace("evaluations_forward", "evaluations")


def last_sentence(path: str) -> str:
    """The last line of a log: where a run failed, the error."""
    if not os.path.isfile(path):
        return "it wrote no log"
    with open(path, encoding="utf-8", errors="replace") as log:
        lines = [line.strip() for line in log if line.strip()]
    return lines[-1] if lines else "its log is empty"
