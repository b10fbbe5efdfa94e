"""The report: Markdown tables and PNG plots."""

import math
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from bert_study.estimates import Spread, goal_met, paired_difference
from bert_study.plan import Plan, arguments
from bert_study.results import ModelResult, Text
from fairseq_implicit.commands import pictures

METRICS = {"loss": "loss, nats per masked token", "accuracy": "accuracy, % of the masked tokens"}

Results = dict[str, ModelResult]
Measurements = dict[str, dict[str, Any]]  # of measure(), by model


def write_report(
    plan: Plan,
    command: str,
    text_name: str,
    text: Text,
    grid: dict[str, dict[float, float]],
    found: Results,
    measured: dict[str, Any],
    failures: dict[str, str],
    folder: str,
) -> str:
    """Writes ``report.md`` and its plots into ``folder``; returns the path of the report."""
    os.makedirs(folder, exist_ok=True)
    models = measured["models"]
    sections = [
        _head(plan, command, text_name, text, measured["machine"], found),
        _main_table(plan, text, found, models),
        _cost_table(plan, found, models),
        _differences(plan, found),
        _telemetry(found),
        _grid_table(plan, grid),
        _plots(plan, text, found, models, folder),
        _failures(failures, plan, found),
        _settings(plan),
        DEFINITIONS,
    ]
    path = os.path.join(folder, "report.md")
    with open(path, "w", encoding="utf-8") as file:
        file.write("\n".join(section for section in sections if section))
    return path


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _by_loss(found: Results) -> list[tuple[str, ModelResult]]:
    """The best first."""
    return sorted(found.items(), key=lambda item: item[1].spread(lambda run: run.loss).mean)


def _number(value: float, digits: int) -> str:
    return "–" if not math.isfinite(value) else f"{value:.{digits}f}"


def _spread(spread: Spread, digits: int = 3) -> str:
    if math.isnan(spread.deviation):
        return _number(spread.mean, digits)
    return f"{_number(spread.mean, digits)} ± {_number(spread.deviation, digits)}"


def _head(plan: Plan, command: str, text_name: str, text: Text, machine: str, found: Results) -> str:
    tokens = next(iter(found.values())).tokens_per_update
    shape = plan.shape
    return (
        f"# Study `{plan.size}`\n\n{plan.about.strip()}\n\n"
        f"Printed again by\n\n```bash\n{command}\n```\n\n"
        f"* Text: {text_name}, {text.tokens:,} training tokens, {plan.dictionary:,} symbols. Validation text: unigram "
        f"entropy **{text.unigram:.3f}** nats per token, bigram entropy **{text.bigram:.3f}**.\n"
        f"* Models: L = {shape['encoder-layers']} layers, width {shape['encoder-embed-dim']}, "
        f"feed-forward {shape['encoder-ffn-embed-dim']}, {shape['encoder-attention-heads']} heads.\n"
        f"* Training: {plan.updates:,} updates of {tokens:,} tokens ({plan.updates * tokens / 1e6:.1f} million), seeds "
        f"{_seeds(plan)}. Runs of one seed see the same batches and masks; the masks of the "
        "validation are the same in all runs.\n"
        f"* Measured side by side: {machine}.\n"
    )


def _seeds(plan: Plan) -> str:
    seeds = ", ".join(map(str, plan.seeds))
    if plan.further.models:
        labels = "; ".join(plan.models[name].label for name in plan.further.models)
        seeds += f", and {', '.join(map(str, plan.further.seeds))} for the models of the main comparisons ({labels})"
    return seeds


def _main_table(plan: Plan, text: Text, found: Results, models: Measurements) -> str:
    rows = []
    for name, result in _by_loss(found):
        leaves = [run.curve.first_below(text.plateau) for run in result.runs]
        reached = [value for value in leaves if math.isfinite(value)]
        off = (
            f"{sum(reached) / len(reached):,.0f}" if len(reached) == len(leaves) else f"{len(reached)} of {len(leaves)}"
        )
        rows.append(
            [
                result.model.label,
                f"{models[name]['parameters'] / 1e3:,.0f}",
                f"{result.rate:g}",
                _spread(result.spread(lambda run: run.loss)),
                _spread(result.spread(lambda run: run.curve.last["accuracy"]), 1),
                off,
                f"{sum(run.diverged for run in result.runs)} of {len(result.runs)}",
            ]
        )
    header = ["model", "parameters, thousands", "learning rate", "validation loss, nats", "accuracy, %"]
    header += ["off the plateau at update", "diverged"]
    masked = plan.training.get("valid-mask-prob", plan.training.get("mask-prob", 0.15))
    words = f"Mean ± standard deviation over the seeds, {100 * masked:g} % of the tokens masked."
    return f"\n## Loss at equal tokens\n\n{words}\n\n" + _table(header, rows)


def _cost_table(plan: Plan, found: Results, models: Measurements) -> str:
    own = models[plan.reference]
    reference = found[plan.reference]
    operations = {
        name: list(result.operations_by_update(models[name]["depth_parameters"]).values())[-1]
        for name, result in found.items()
    }
    rows = []
    for name, result in found.items():
        entry = models[name]
        rows.append(
            [
                result.model.label,
                _evaluations(result, "evaluations"),
                _evaluations(result, "evaluations_backward"),
                _number(operations[name] / operations[plan.reference], 2),
                _number(own["seconds"] / entry["seconds"], 2),
                _number(entry["bytes"] / own["bytes"], 2),
            ]
        )
    header = ["model", "evaluations forward", "backward", "operations of the depth ÷", "tokens/s ÷", "peak memory ÷"]
    return f"\n## Cost, over that of {reference.model.label}\n\n" + _table(header, rows)


def _evaluations(result: ModelResult, name: str) -> str:
    spread = result.spread(lambda run: run.curve.mean(name, after=run.steady))
    return "–" if not math.isfinite(spread.mean) or spread.mean == 0 else f"{spread.mean:.1f}"


def _differences(plan: Plan, found: Results) -> str:
    rows = []
    for comparison in plan.comparisons:
        if comparison.model not in found or comparison.reference not in found:
            continue
        ours, theirs = found[comparison.model], found[comparison.reference]
        difference = paired_difference(ours.losses, theirs.losses)
        reference_loss = theirs.spread(lambda run: run.loss).mean
        met = goal_met(comparison, difference, reference_loss)
        wish = {None: "", "below": "below", "within": f"at most +{100 * comparison.margin:g} %"}[comparison.goal]
        judged = {None: "", True: "met", False: "**missed**"}[met]
        rows.append(
            [
                f"{ours.model.label} − {theirs.model.label}",
                comparison.terms,
                f"{difference.mean:+.3f}",
                f"{difference.low:+.3f} … {difference.high:+.3f}" if difference.count > 1 else "–",
                str(difference.count),
                difference.verdict,
                f"{wish}: {judged}" if wish and judged else wish,
            ]
        )
    if not rows:
        return ""
    header = ["difference of the losses", "terms", "mean, nats", "95 % interval", "seeds", "verdict", "goal"]
    return (
        "\n## Paired differences\n\nNegative: the first has the lower loss. Each interval is for its own row; of "
        "twenty such intervals one misses the truth by chance.\n\n" + _table(header, rows)
    )


def _telemetry(found: Results) -> str:
    rows = []
    for result in found.values():

        def mean(name: str) -> Callable:
            return lambda run: run.curve.mean(name, after=run.steady)

        rows.append(
            [
                result.model.label,
                _spread(result.spread(mean("gnorm")), 2),
                _spread(result.spread(mean("clip")), 0),
                _number(result.spread(mean("converged_share")).mean, 4),
                _number(result.spread(mean("residual")).mean, 5),
                _number(result.spread(lambda run: run.curve.last.get("spectral_radius", math.nan)).mean, 2),
                _number(result.spread(lambda run: run.curve.last.get("coefficient_sum", math.nan)).mean, 3),
            ]
        )
    header = ["model", "gradient norm", "updates clipped, %", "converged share", "residual", "spectral radius, end"]
    header += ["sum of the coefficients, end"]
    return "\n## Telemetry\n\nMeans over the training, after a schedule's warm-up.\n\n" + _table(header, rows)


def _grid_table(plan: Plan, grid: dict[str, dict[float, float]]) -> str:
    rates = plan.grid.rates
    if not grid:
        return ""
    rows = []
    for name, by_rate in grid.items():
        best = min(by_rate, key=by_rate.get)
        cells = []
        for rate in rates:
            value = by_rate.get(rate, math.nan)
            shown = "failed" if math.isinf(value) else _number(value, 3)
            cells.append(f"**{shown}**" if rate == best else shown)
        edge = "" if best not in (min(rates), max(rates)) or len(rates) == 1 else "at the grid's edge"
        rows.append([plan.models[name].label, *cells, edge])
    return (
        f"\n## Learning rates\n\nEach model chose among the same rates at the same budget: {plan.grid.updates:,} "
        f"updates and one seed ({plan.grid.seed}) that no final run uses. Validation loss in nats, the chosen one in "
        "bold.\n\n" + _table(["model", *(f"{rate:g}" for rate in rates), ""], rows)
    )


def _plots(plan: Plan, text: Text, found: Results, models: Measurements, folder: str) -> str:
    reference = models[plan.reference]["seconds"]
    axes = {
        "tokens": ("tokens, millions", lambda name, update: update * found[name].tokens_per_update / 1e6),
        "operations": ("operations of the depth, 10¹²", _operations_axis(found, models)),
        "time": (
            "time, in that of the reference's whole training",
            lambda name, update: update * models[name]["seconds"] / (reference * plan.updates),
        ),
    }
    numbers = {name: number for number, name in enumerate(plan.models)}  # a model looks the same in every report
    lines = ["\n## Curves\n"]
    for axis, (label, place) in axes.items():
        figure, panels = pictures.figure(1, 2, size=(14, 5.5))
        for panel, (metric, word) in zip(panels, METRICS.items(), strict=True):
            for name, result in _by_loss(found):
                spreads = result.by_update(metric)
                places = [place(name, update) for update in spreads]
                means = [spread.mean for spread in spreads.values()]
                pictures.line(panel, places, means, numbers[name], result.model.label)
            if axis != "tokens":
                pictures.logarithmic(panel.xaxis)
            panel.set_xlabel(label)
            panel.set_ylabel(f"validation {word}")
        for level, word in ((text.unigram, "unigram"), (text.bigram, "bigram")):
            panels[0].axhline(level, color="grey", linestyle=":", linewidth=1)
            at = dict(xycoords=("axes fraction", "data"), ha="right", va="bottom")
            at["bbox"] = dict(facecolor="white", edgecolor="none", alpha=0.7, pad=1)  # curves pass below the words
            panels[0].annotate(f"{word} entropy", (0.99, level), **at)
        figure.legend(*panels[1].get_legend_handles_labels(), fontsize=8, loc="outside right upper", handlelength=4)
        pictures.save(figure, os.path.join(folder, f"curves-{axis}.png"))
        lines.append(f"![loss and accuracy of the validation against {axis}](curves-{axis}.png)\n")
    return "\n".join(lines)


def _operations_axis(found: Results, models: Measurements) -> Callable[[str, int], float]:
    curves = {
        name: {0: 0.0, **result.operations_by_update(models[name]["depth_parameters"])}
        for name, result in found.items()
    }
    # Validations need not fall on the ends of logged intervals.
    return lambda name, update: np.interp(update, list(curves[name]), list(curves[name].values())) / 1e12


def _failures(failures: dict[str, str], plan: Plan, found: Results) -> str:
    lines = [f"* {name}: {sentence}" for name, sentence in failures.items()]
    lines += [f"* {model.label}: no finished run" for name, model in plan.models.items() if name not in found]
    for name, result in found.items():
        planned = plan.seeds_of(name)
        if len(result.runs) < len(planned):
            lines.append(f"* {result.model.label}: {len(result.runs)} of {len(planned)} seeds are finished")
    return "\n## Not finished\n\n" + "\n".join(lines) + "\n" if lines else ""


def _settings(plan: Plan) -> str:
    shared = " ".join(arguments({**plan.shape, **plan.training}))
    lines = []
    for model in plan.models.values():
        flags = dict(model.flags)
        flags.update({flag: f"{share:g}·updates" for flag, share in model.shares.items()})
        words = " ".join(arguments({"arch": model.arch, **flags}))
        note = {"shared": ", one widened layer", "own": f", {model.depth}·L layers" if model.depth > 1 else ""}
        width = ""
        if model.matched:
            flags = plan.flags(plan.finals({model.name: plan.grid.rates[0]})[0])
            width = f", feed-forward {flags['encoder-ffn-embed-dim']}"
        lines.append(f"* {model.label}: `{words}`{note[model.weights]}{width}")
    return f"\n## Settings\n\nAll runs: `{shared}`\n\n" + "\n".join(lines) + "\n"


DEFINITIONS = """
## What the words mean

* **Equal parameters**: models with one set of weights have a wider feed-forward part, so that their matrices hold as
  many parameters as those of all layers together. Learned coefficients, depth embeddings and injections come on top.
* **Equal cost**: a Runge–Kutta block with s evaluations against s times the layers.
* **Off the plateau**: the update at which the validation loss crosses the middle between the unigram and the bigram
  entropy, interpolated. A masked-language model sees both sides, so that its loss can fall far below the latter.
* **Evaluations**: of the block or cell, per update and sample; forward, and products with the Jacobian in the adjoint
  solve backward.
* **Operations of the depth**: an evaluation counts 1, a product with the Jacobian 1, a backward pass 2, each times the
  parameters that one evaluation uses, times 2 per token. Embeddings, head and the attention's products of positions are
  left out.
* **Converged share, residual**: of the forward solves, over the samples; for an unrolled cell, of its last step.
* **Sum of the coefficients**: mean over the blocks. Learned coefficients start at one each, EMA's at 3/4 in all.
* **Tokens/s, peak memory**: whole updates of the trained models, taking turns, medians; the most that forward and
  backward pass hold beyond weights and gradients.
* **Diverged**: a loss that is no number, or that ends more than 0.05 nats above the run's own best.
"""
