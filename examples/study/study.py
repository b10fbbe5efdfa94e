"""Trains implicit BERTs and their explicit twins on equal terms and writes a report.

    python examples/study/study.py cpu --text wikitext2 --out runs/study-cpu

What a study runs stands in SIZE.yaml and models.yaml beside this file. The same command goes on where it was stopped:
finished runs are kept, an interrupted one continues from its last checkpoint. OUT/report holds the report.
"""

import argparse
import fcntl
import json
import logging
import os
import signal
import sys
import warnings
from typing import Any

warnings.filterwarnings("ignore")  # fairseq and hydra warn about their own internals

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.dirname(os.path.dirname(HERE))]

from bert_study.plan import Plan, StudyError, load  # noqa: E402

logger = logging.getLogger("study")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", metavar="SIZE", help="smoke, cpu, gpu, or the path of a .yaml file")
    parser.add_argument("--text", metavar="PATH", help="file or folder (default: documentation strings of Python)")
    parser.add_argument("--out", metavar="DIR", help="where everything is written (default: runs/study-SIZE)")
    parser.add_argument("--jobs", type=int, metavar="N", help="runs at a time (default: the size's)")
    parser.add_argument("--report-only", action="store_true", help="train nothing: report on what is finished")
    return parser.parse_args()


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s  %(message)s", datefmt="%H:%M:%S", stream=sys.stdout)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("study: ended; the same command goes on from here"))
    try:
        study(parse())
    except StudyError as error:
        sys.exit(f"study: {error}")
    except KeyboardInterrupt:
        sys.exit("study: interrupted; the same command goes on from here")


def study(options: argparse.Namespace) -> None:
    """Raises StudyError with a sentence for the user."""
    folder, size = os.path.split(options.size)
    plan = load(size.removesuffix(".yaml"), folder or HERE, **({"jobs": options.jobs} if options.jobs else {}))
    out = os.path.abspath(options.out or os.path.join("runs", f"study-{plan.size}"))
    os.makedirs(out, exist_ok=True)
    with open(os.path.join(out, "lock"), "w", encoding="utf-8") as lock:
        # Trainings inherit the lock: those that outlive a killed study hold it until they end.
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise StudyError(f"another study, or a run that a killed one left behind, still works in {out}") from None
        _study(plan, options, out, lock.fileno())


def _study(plan: Plan, options: argparse.Namespace, out: str, lock: int) -> None:
    # fairseq takes seconds to import: not before the plan has been read without complaint.
    from bert_study.training import Trainer, prepare

    from fairseq_implicit.commands import pictures

    try:  # hours before they are drawn
        pictures.check(os.path.join(out, "report", "curves-tokens.png"))
    except pictures.PictureError as error:
        raise StudyError(str(error)) from None
    data = prepare(plan, options.text, out)
    trainer = Trainer(plan, data, out, lock)
    from bert_study import results

    if not options.report_only:
        trainer.train(plan.trials())
    grid = results.grid_losses(plan, out)
    rates = results.best_rates(plan, grid)
    if not options.report_only:
        trainer.train(plan.finals(rates))
    found = results.results(plan, rates, out)
    failed = results.failures(plan, rates, out)
    if plan.reference not in found:
        reasons = "; ".join(f"{name}: {sentence}" for name, sentence in failed.items())
        raise StudyError(f"no run of {plan.reference} is finished, and every ratio is over it. {reasons}".strip())
    from bert_study.report import write_report

    path = write_report(
        plan, _command(plan, options), os.path.basename(os.path.normpath(options.text or "embedded documentation")),
        results.text_of(data), grid, found, _measured(plan, results.first_runs(found), data, out), failed,
        os.path.join(out, "report"),
    )  # fmt: skip
    logger.info("report: %s", path)
    if failed:
        raise StudyError(f"{len(failed)} runs failed; the report names them, the same command tries them again")


def _measured(plan: Plan, runs, data: str, out: str) -> dict[str, Any]:
    """The measurements of these runs, taken once."""
    from bert_study.training import write_json

    path, key = os.path.join(out, "measured.json"), {name: run.name for name, run in runs.items()}
    if os.path.isfile(path):
        with open(path, encoding="utf-8") as file:
            stored = json.load(file)
        if stored.pop("runs") == key:
            return stored
    logger.info("measuring %d models side by side", len(runs))
    logging.disable(logging.INFO)  # fairseq's
    from bert_study.measure import measure

    found = measure(plan, runs, data, out)
    logging.disable(logging.NOTSET)
    write_json(path, {"runs": key, **found})
    return found


def _command(plan: Plan, options: argparse.Namespace) -> str:
    size = os.path.basename(options.size).removesuffix(".yaml") if os.path.isabs(options.size) else options.size
    words = ["python examples/study/study.py", size]
    if options.text:
        words.append(f"--text {os.path.basename(os.path.normpath(options.text))}")
    return " ".join([*words, f"--out runs/study-{plan.size}"])


if __name__ == "__main__":
    main()
