"""Tokens per second and activation memory of ode_bert against fairseq's RoBERTa and transformers' BERT.

Every model has the same shape, sees the same batch and the same masked positions, and runs forward and backward in
training mode, dropout on. The models take turns, one step each per round, so that whatever else the machine does hits
all alike; the ratios of the medians are what counts. Each has the loss that it is trained with. The share of the peak
is model operations, by formula, over those of one matrix product of the same precision, measured before. Memory is the
most that the allocator holds during forward and backward beyond weights and gradients, recomputation included.

    python -m scripts.benchmark_throughput --size base --batch 4 --length 128 --rounds 10
    python -m scripts.benchmark_throughput --size base --layers 2 --batch 8 --length 512 --dtype bfloat16-weights
    python -m scripts.benchmark_throughput --size small --layers 4 --batch 16 --length 128 --profile
"""

import argparse
import itertools
import logging
import sys
import types
import warnings
from collections.abc import Callable

warnings.filterwarnings("ignore")
import torch  # noqa: E402
from torch.nn import functional  # noqa: E402

logging.disable(logging.INFO)
from fairseq.data import Dictionary  # noqa: E402

from fairseq_implicit.commands.checkpoint_arguments import device  # noqa: E402
from fairseq_implicit.commands.wording import conditions, counted  # noqa: E402
from fairseq_implicit.compat.outputs import output_of  # noqa: E402
from fairseq_implicit.families.bert import SIZES  # noqa: E402
from fairseq_implicit.machine import matrix_product_speed  # noqa: E402
from fairseq_implicit.models.ode_bert import OdeBertConfig, OdeBertModel  # noqa: E402
from fairseq_implicit.networks.cross_entropy import cross_entropy_and_correct  # noqa: E402
from scripts.side_by_side import median_seconds, peak_bytes, self_time_shares  # noqa: E402

Step = Callable[[], torch.Tensor]
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
DTYPES = ("float32", "bfloat16", "bfloat16-weights")
_PROFILE_ROWS = 20


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(SIZES), default="base")
    parser.add_argument("--layers", type=int, help="number of blocks, where it is not the size's")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--vocabulary", type=int, default=8000)
    parser.add_argument("--dropout", type=float, default=0.1, help="of hidden states and attention")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="float32",
        help="bfloat16 is autocast around float32 weights; bfloat16-weights is all of it, as fairseq's --bf16 has it",
    )
    parser.add_argument(
        "--profile", action="store_true", help="where one step of each spends its time, in place of the tables"
    )
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


def _plain_loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(logits.float(), target, reduction="sum")


class Bench:
    """The batch that all models share, and the models."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.device = torch.device(options.device)
        self.dictionary = Dictionary()
        for index in range(options.vocabulary):
            self.dictionary.add_symbol(f"piece{index}")
        self.dictionary.add_symbol("<mask>")
        self.task = types.SimpleNamespace(source_dictionary=self.dictionary, max_positions=lambda: options.length)
        generator = torch.Generator().manual_seed(options.seed)
        shape = (options.batch, options.length)
        self.tokens = torch.randint(4, options.vocabulary, shape, generator=generator).to(self.device)
        self.masked = (torch.rand(shape, generator=generator) < 0.15).to(self.device)
        self.target = torch.randint(4, options.vocabulary, (int(self.masked.sum()),), generator=generator).to(
            self.device
        )
        self.shape = dict(SIZES[options.size])
        if options.layers:
            self.shape["encoder_layers"] = options.layers

    @torch.no_grad()
    def operations(self, model: torch.nn.Module) -> float:
        """What one forward and backward pass of one of ours costs by its own account."""
        return float(output_of(model(self.tokens, masked_tokens=self.masked, has_padding=False)).operations)

    def peak(self) -> float:
        """Operations per second of one large matrix product in the precision of the models'."""
        return matrix_product_speed(self.device, torch.float32 if self.options.dtype == "float32" else torch.bfloat16)

    def _step(self, model: torch.nn.Module, logits: Callable[[], torch.Tensor], loss: Loss) -> Step:
        model.to(self.device).train()
        if self.options.dtype == "bfloat16-weights":
            model.to(torch.bfloat16)

        def step() -> torch.Tensor:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.dtype == "bfloat16"):
                return loss(logits(), self.target)

        step.model = model
        return step

    def ode_bert(self, **settings) -> Step:
        rates = dict(dropout=self.options.dropout, attention_dropout=self.options.dropout)
        config = OdeBertConfig(**{**self.shape, **rates, "ode_field": "post-norm", **settings})
        model = OdeBertModel.build_model(config, self.task)
        logits = lambda: model(self.tokens, masked_tokens=self.masked, has_padding=False)[0]  # noqa: E731
        padding = self.dictionary.pad()
        return self._step(model, logits, lambda *batch: cross_entropy_and_correct(*batch, padding)[0])

    def roberta(self) -> Step:
        from fairseq.models.roberta import RobertaModel

        options = argparse.Namespace(
            **self.shape,
            max_positions=self.options.length,
            dropout=self.options.dropout,
            attention_dropout=self.options.dropout,
        )
        model = RobertaModel.build_model(options, self.task)
        return self._step(model, lambda: model(self.tokens, masked_tokens=self.masked)[0], _plain_loss)

    def bert(self) -> Step:
        from transformers import BertConfig, BertForMaskedLM

        config = BertConfig(
            vocab_size=len(self.dictionary),
            hidden_size=self.shape["encoder_embed_dim"],
            num_hidden_layers=self.shape["encoder_layers"],
            num_attention_heads=self.shape["encoder_attention_heads"],
            intermediate_size=self.shape["encoder_ffn_embed_dim"],
            hidden_dropout_prob=self.options.dropout,
            attention_probs_dropout_prob=self.options.dropout,
            max_position_embeddings=self.options.length,
        )
        model = BertForMaskedLM(config)
        # It has no way to restrict the head to masked positions: that is part of what is measured.
        return self._step(model, lambda: model(input_ids=self.tokens).logits[self.masked], _plain_loss)


def alternate(steps: dict[str, Step], rounds: int) -> dict[str, float]:
    """Median seconds of one forward and backward pass of each."""
    passes = {name: lambda step=step: step().backward() for name, step in steps.items()}
    return median_seconds(passes, rounds, before=lambda name: steps[name].model.zero_grad(set_to_none=True))


def memory(step: Step, device: str) -> int:
    """Most bytes that one forward and backward pass holds beyond the weights and their gradients."""
    step.model.zero_grad(set_to_none=False)
    return peak_bytes(lambda: step().backward(), device)


def print_profiles(steps: dict[str, Step], device: str) -> None:
    """Where one forward and backward pass of each spends its time."""
    for name, step in steps.items():
        step().backward()
        step.model.zero_grad(set_to_none=True)
        shares = self_time_shares(lambda step=step: step().backward(), device)
        sys.stdout.write(f"\n{name + ': share of self time':<52} calls\n")
        for operation, (share, calls) in itertools.islice(shares.items(), _PROFILE_ROWS):
            sys.stdout.write(f"  {operation:<40} {share:>7.1%} {calls:>7}\n")


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    bench = Bench(options)
    steps = {
        "fairseq roberta": bench.roberta(),
        "transformers bert": bench.bert(),
        "ode_bert euler": bench.ode_bert(ode_scheme="euler"),
    }
    report = sys.stdout.write
    shape = ", ".join(f"{name.replace('encoder_', '')} {value}" for name, value in bench.shape.items())
    report(
        f"{options.size}: {shape}; batch {options.batch} x {options.length}, vocabulary {len(bench.dictionary)}, "
        f"dropout {options.dropout}, {options.dtype}, seed {options.seed}, {counted(options.rounds, 'round')}\n"
        f"{conditions(options.device, options.threads)}\n"
    )
    if options.profile:
        return print_profiles(steps, options.device)
    peak = bench.peak()
    seconds = alternate(steps, options.rounds)
    ours = seconds["ode_bert euler"]
    report("\nmodel                               parameters   tokens/s of ode_bert euler over it\n")
    for name, step in steps.items():
        count = sum(parameter.numel() for parameter in step.model.parameters())
        report(f"{name:<35} {count:>10,}   {seconds[name] / ours:.3f}\n")
    share = bench.operations(steps["ode_bert euler"].model) / ours / peak
    report(f"ode_bert euler: {share:.1%} of the peak of one matrix product ({peak / 1e9:,.0f} GFLOP/s)\n")
    del steps
    pre_norm = {
        f"ode_bert {scheme} (pre-norm)": bench.ode_bert(ode_scheme=scheme, ode_field="pre-norm")
        for scheme in ("euler", "rk2", "rk3", "rk4")
    }
    for gradient in ("checkpoint-step", "checkpoint-stage"):
        pre_norm[f"ode_bert rk4 (pre-norm, {gradient})"] = bench.ode_bert(
            ode_scheme="rk4", ode_field="pre-norm", ode_gradient=gradient
        )
    seconds = alternate(pre_norm, options.rounds)
    euler = "ode_bert euler (pre-norm)"
    peaks = {name: memory(step, options.device) for name, step in pre_norm.items()}
    report("\nscheme                                          time / (evaluations x Euler)   peak memory / Euler\n")
    # Recomputation evaluates the field a second time, a forward pass without its backward: a third of a step.
    for name, step in pre_norm.items():
        stages = step.model.encoder.depth.config.solver.tableau.stages
        report(
            f"{name:<47} {seconds[name] / (stages * seconds[euler]):>10.3f}                     "
            f"{peaks[name] / peaks[euler]:>6.3f}\n"
        )


if __name__ == "__main__":
    main()
