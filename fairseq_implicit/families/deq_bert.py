"""DEQ-BERT: the encoder's depth is the equilibrium of one cell (arXiv 1909.01377)."""

import logging
from dataclasses import dataclass, field, replace
from typing import Any, Dict, Optional, Tuple

import torch

from fairseq_implicit.depth.equilibrium import ESTIMATORS, INITIAL_STATES, EquilibriumConfig, EquilibriumDepth
from fairseq_implicit.depth.output import Depth
from fairseq_implicit.depth.schedule import PhaseConfig
from fairseq_implicit.families.bert import SIZES, BertOptions
from fairseq_implicit.families.flags import Flags, flag
from fairseq_implicit.fields.equilibrium_cell import NORM_PLACEMENTS, CellConfig
from fairseq_implicit.fields.injection import InjectionConfig
from fairseq_implicit.fields.semilinear import LINEAR_PARTS
from fairseq_implicit.fields.transformer import TransformerField
from fairseq_implicit.options import OptionError, check_choice, named
from fairseq_implicit.solvers.fixed_point import CRITERIA, METHODS, FixedPointConfig
from fairseq_implicit.solvers.gradients.equilibrium import EquilibriumGradient
from fairseq_implicit.solvers.gradients.names import parse_gradient

logger = logging.getLogger(__name__)

INJECTIONS = ("residual", "none")

FLAGS = Flags(
    "deq",
    checkpoint_activations="checkpoint_activations",
    stage_dropout="stage_dropout",
    first_norm="no_first_norm",
)


@dataclass
class DeqBertOptions(BertOptions):
    """The cell, the solver, the gradient and the schedule of an equilibrium encoder.

    ``encoder_layers`` is the depth of the explicit encoder it is compared with: it enters the cost report only.
    ``encoder_ffn_embed_dim`` is the cell's own width.
    """

    attention_dropout: float = field(default=0.0, metadata={"help": "dropout of the attention probabilities"})
    deq_cell_layers: int = field(default=1, metadata={"help": "transformer layers in the map that is iterated"})
    deq_cell_norm: str = field(
        default="pre-norm", metadata={"help": f"{', '.join(NORM_PLACEMENTS)}; pre-norm ends in a norm inside the map"}
    )
    deq_no_final_norm: bool = field(
        default=False, metadata={"help": "a pre-norm cell without its final norm: only for --deq-gradient bptt-K"}
    )
    deq_linear_part: str = field(
        default="none",
        metadata={
            "help": "diagonal: the cell is an exponential Euler step of a layer beside a contracting linear part, "
            "which bounds it in place of a norm: what a tied ode_bert of --ode-linear-part diagonal converges to; none"
        },
    )
    deq_prelude_layers: int = field(default=0, metadata={"help": "ordinary layers before the equilibrium"})
    deq_coda_layers: int = field(default=0, metadata={"help": "ordinary layers after the equilibrium"})
    deq_injection: str = field(
        default="residual", metadata={"help": "residual: add the normalised input to the residual stream; none"}
    )
    deq_injection_gain: float = field(default=1.0, metadata={"help": "start of the learnable injection gain"})
    deq_injection_gain_floor: float = field(default=0.0, metadata={"help": "the injection gain stays above this"})
    deq_qkv_injection: bool = field(
        default=False, metadata={"help": "also add an untied projection of the input to the queries, keys and values"}
    )
    deq_initial_state: str = field(
        default="zero", metadata={"help": f"where the solver starts: {', '.join(INITIAL_STATES)}"}
    )
    deq_weight_norm: bool = field(default=False, metadata={"help": "weight normalisation of the cell's matrices"})
    deq_solver: str = field(
        default="auto",
        metadata={"help": f"auto, none, {', '.join(METHODS)}; auto: anderson where the gradient needs a solver"},
    )
    deq_max_iter: int = field(default=30, metadata={"help": "evaluation budget of the forward solve"})
    deq_tol: Optional[float] = field(
        default=None, metadata={"help": "tolerance (default by precision: 1e-3; bfloat16 1e-2; float64 1e-6)"}
    )
    deq_criterion: str = field(
        default="relative", metadata={"help": f"what the tolerance is compared with: {', '.join(CRITERIA)}"}
    )
    deq_damping: float = field(default=1.0, metadata={"help": "damping of Picard, mixing of Anderson, in (0, 1]"})
    deq_window: Optional[int] = field(default=None, metadata={"help": "Anderson's window (default 6)"})
    deq_memory: Optional[float] = field(
        default=None, metadata={"help": "cap in MiB on Broyden's updates, which then restarts (default 1024)"}
    )
    deq_no_freeze: bool = field(
        default=False, metadata={"help": "go on moving samples that have converged, until all have"}
    )
    deq_compact: bool = field(
        default=False, metadata={"help": "drop converged samples from the evaluations (where no dropout is drawn)"}
    )
    deq_eval_solver: Optional[str] = field(
        default=None, metadata={"help": "solver of evaluation (default: --deq-solver); with --model-overrides, a dial"}
    )
    deq_eval_max_iter: Optional[int] = field(
        default=None, metadata={"help": "evaluation budget outside training (default: --deq-max-iter)"}
    )
    deq_eval_tol: Optional[float] = field(
        default=None, metadata={"help": "tolerance outside training (default: --deq-tol)"}
    )
    deq_gradient: str = field(
        default="ift", metadata={"help": "ift (exact), neumann-K, phantom-K, jfb, bptt-K (no solver), reversible"}
    )
    deq_gradient_damping: Optional[float] = field(
        default=None,
        metadata={"help": "damping of neumann, phantom and bptt (default 1), beta of reversible (default 0.5)"},
    )
    deq_adjoint_solver: str = field(
        default="auto", metadata={"help": f"solver of the adjoint equation: auto (anderson), {', '.join(METHODS)}"}
    )
    deq_adjoint_max_iter: int = field(default=30, metadata={"help": "budget of the adjoint solve, in products"})
    deq_adjoint_tol: Optional[float] = field(
        default=None,
        metadata={"help": "tolerance of the adjoint solve, relative to the gradient (default by precision)"},
    )
    deq_warmup_updates: int = field(
        default=0, metadata={"help": "updates that unroll the cell before the solver is used; 10 %% is common"}
    )
    deq_warmup_steps: int = field(default=4, metadata={"help": "unrolled steps of the warm-up"})
    deq_phantom_updates: int = field(
        default=0, metadata={"help": "updates after the warm-up with phantom gradients, before --deq-gradient"}
    )
    deq_phantom_steps: int = field(default=4, metadata={"help": "steps of those phantom gradients"})
    deq_ramp_updates: int = field(
        default=0, metadata={"help": "updates over which budget and tolerance go from their start to their end"}
    )
    deq_start_max_iter: Optional[int] = field(default=None, metadata={"help": "budget at the start of the ramp"})
    deq_start_tol: Optional[float] = field(default=None, metadata={"help": "tolerance at the start of the ramp"})
    deq_budget_jitter: int = field(
        default=0, metadata={"help": "each update's budget moves by a random number up to this, the same on all ranks"}
    )
    deq_jacobian_weight: float = field(default=0.0, metadata={"help": "weight of the Jacobian penalty ||J||^2 / N"})
    deq_jacobian_frequency: float = field(default=1.0, metadata={"help": "share of the updates that pay the penalty"})
    deq_jacobian_weight_step: float = field(default=0.0, metadata={"help": "added to the weight at every interval"})
    deq_jacobian_weight_interval: int = field(default=0, metadata={"help": "updates between two such additions"})
    deq_jacobian_estimator: str = field(
        default="finite-difference",
        metadata={"help": f"{', '.join(ESTIMATORS)} (unfused attention, no recomputation)"},
    )
    deq_jacobian_probes: int = field(default=1, metadata={"help": "random directions per estimate"})
    deq_correction: str = field(
        default="", metadata={"help": "evaluations whose state is also trained to predict, such as 4,8"}
    )
    deq_correction_weight: float = field(default=1.0, metadata={"help": "weight of the last corrected evaluation"})
    deq_correction_decay: float = field(default=0.8, metadata={"help": "factor from each to the one before"})
    deq_monitor_interval: int = field(
        default=100, metadata={"help": "updates between measurements of spectral radius and Jacobian norm; 0: never"}
    )
    deq_allow_nonconvergent: bool = field(
        default=False, metadata={"help": "train a cell that does not converge at update 0"}
    )
    deq_seed: int = field(default=1, metadata={"help": "seed of the budget jitter and of the penalty's draws"})

    @property
    def flags(self) -> Flags:
        return FLAGS

    def check(self) -> EquilibriumConfig:
        super().check()
        for name, choices in (
            ("deq_cell_norm", NORM_PLACEMENTS),
            ("deq_linear_part", LINEAR_PARTS),
            ("deq_injection", INJECTIONS),
            ("deq_solver", ("auto", "none", *METHODS)),
            ("deq_adjoint_solver", ("auto", *METHODS)),
        ):
            check_choice(flag(name), getattr(self, name), choices)
        if self.no_first_norm and not self.deq_prelude_layers:
            raise ValueError(
                "--no-first-norm: the first layer is the equilibrium's cell, which reads its own state: leave it out, "
                "or set --deq-prelude-layers"
            )
        with self.flags.naming():
            return self.equilibrium()

    def equilibrium(self) -> EquilibriumConfig:
        """The depth's configuration.

        Raises:
            OptionError: a value or combination that cannot be, in one sentence.
        """
        self.check_repeated()
        gradient = self._gradient()
        solver = self._solver(gradient)
        options = self.flags.options(EquilibriumConfig, self)
        options.update(
            cell=self._cell(),
            solver=solver,
            evaluation=self._evaluation(solver, gradient),
            gradient=gradient,
            phases=PhaseConfig(**self.flags.options(PhaseConfig, self)),
            recompute=self.checkpoint_activations,
            correction=self._correction(),
        )
        return EquilibriumConfig(**options)

    def _gradient(self) -> EquilibriumGradient:
        method = "anderson" if self.deq_adjoint_solver == "auto" else self.deq_adjoint_solver
        with named("adjoint_{}".format):
            adjoint = FixedPointConfig(method, self.deq_adjoint_max_iter, self.deq_adjoint_tol)
        return parse_gradient(self.deq_gradient, self.deq_gradient_damping, adjoint)

    def _solver(self, gradient: EquilibriumGradient) -> FixedPointConfig:
        method = self.deq_solver
        if gradient.uses_solver:
            if method == "none":
                raise OptionError(
                    "solver", f"none contradicts `gradient` {gradient.name}, which is taken at a fixed point."
                )
        elif method not in ("auto", "none"):
            raise OptionError(
                "solver", f"{method} contradicts `gradient` {gradient.name}, which iterates without a solver."
            )
        method = "anderson" if method in ("auto", "none") else method
        options: Dict[str, Any] = {}
        for name, owner in (("window", "anderson"), ("memory", "broyden")):
            value = getattr(self, f"deq_{name}")
            if value is None:
                continue
            if method != owner or not gradient.uses_solver:
                raise OptionError(name, f"only `solver` {owner} has one; drop the flag or take {owner}.")
            options[name] = value
        return FixedPointConfig(
            method=method,
            max_iter=self.deq_max_iter,
            tol=self.deq_tol,
            criterion=self.deq_criterion,
            damping=self.deq_damping,
            freeze=not self.deq_no_freeze,
            compact=self.deq_compact,
            **options,
        )

    def _evaluation(self, solver: FixedPointConfig, gradient: EquilibriumGradient) -> Optional[FixedPointConfig]:
        """The training's solver with the dials of evaluation turned."""
        dials = {"method": self.deq_eval_solver, "max_iter": self.deq_eval_max_iter, "tol": self.deq_eval_tol}
        turned: Dict[str, Any] = {name: value for name, value in dials.items() if value is not None}
        if turned and not gradient.needs_equilibrium:
            name = "solver" if "method" in turned else next(iter(turned))
            raise OptionError(
                f"eval_{name}", f"{gradient.name} iterates a fixed number of steps without a solver; drop the flag."
            )
        with named("eval_{}".format):
            return replace(solver, **turned) if turned else None

    def _cell(self) -> CellConfig:
        layer = self.transformer_field(self.deq_cell_norm)
        if self.deq_linear_part != "none" and self.deq_no_final_norm:
            raise OptionError("no_final_norm", "a cell with a linear part has no norm at its end; drop the flag.")
        if self.deq_cell_norm == "post-norm" and self.deq_no_final_norm:
            raise OptionError("no_final_norm", "a post-norm cell ends in its layer's own norm; drop the flag.")
        if self.deq_cell_layers < 1:
            raise OptionError("cell_layers", f"{self.deq_cell_layers} layers make no map; give at least 1.")
        if self.drop_path:
            raise ValueError(
                f"--drop-path {self.drop_path:g} would make the cell the identity for the samples it drops, which "
                "then have no equilibrium: set it to 0"
            )
        try:
            injection = InjectionConfig(
                residual=self.deq_injection == "residual",
                gain=self.deq_injection_gain,
                gain_floor=self.deq_injection_gain_floor,
                qkv=self.deq_qkv_injection,
            )
        except ValueError as error:
            raise OptionError("injection_gain", f"{error}.") from error
        return CellConfig(
            layer=layer,
            layers=self.deq_cell_layers,
            injection=injection,
            linear_part=self.deq_linear_part,
            final_norm=not self.deq_no_final_norm,
            weight_norm=self.deq_weight_norm,
            initial_std=self.encoder_init_std,
            start=self.encoder_init,
            before=self.deq_prelude_layers,
        )

    def _correction(self) -> Tuple[int, ...]:
        if not self.deq_correction:
            return ()
        try:
            return tuple(int(part) for part in self.deq_correction.split(","))
        except ValueError:
            raise OptionError("correction", f"{self.deq_correction!r} is no list of numbers such as 4,8.") from None

    @property
    def layers_in_series(self) -> int:
        return self.deq_prelude_layers + self.deq_cell_layers + self.deq_coda_layers

    @property
    def distinct_layers(self) -> bool:
        return self.layers_in_series > 1

    def build_depth(self) -> Depth:
        depth = EquilibriumDepth(self.check())
        logger.info(cost_report(self, depth))
        return depth


def matched_ffn_dim(layers: int, dim: int, ffn_dim: int) -> int:
    """Feed-forward width at which one layer has the matrices of ``layers`` layers of width ``ffn_dim``.

    A layer has 4 dim² + 2 dim · ffn weights.
    """
    return layers * ffn_dim + 2 * dim * (layers - 1)


def cost_report(cfg: DeqBertOptions, depth: EquilibriumDepth) -> str:
    """Parameters and cost of one update, in evaluations of the cell, beside those of the explicit encoder.

    The solver is counted at its whole budget; what it really spends is logged.
    """
    config = depth.config
    own = sum(parameter.numel() for parameter in depth.parameters())
    cell = sum(parameter.numel() for layer in depth.cell.layers for parameter in layer.parameters())
    twin_ffn = cfg.encoder_ffn_embed_dim
    for shape in SIZES.values():
        if (shape["encoder_embed_dim"], shape["encoder_layers"]) == (cfg.encoder_embed_dim, cfg.encoder_layers):
            twin_ffn = shape["encoder_ffn_embed_dim"]
    with torch.device("meta"):
        twin_field = TransformerField(replace(config.cell.layer.at(0), ffn_dim=twin_ffn))
    twin_layer = sum(parameter.numel() for parameter in twin_field.parameters())
    twin = cfg.encoder_layers * twin_layer
    gradient = config.gradient
    cost, formula = gradient.update_cost(config.solver.max_iter, gradient.adjoint.max_iter)
    return (
        f"equilibrium depth: {own / 1e6:.2f} M parameters, {cell / 1e6:.2f} M of them in the cell's "
        f"{cfg.deq_cell_layers} layer(s); {cfg.encoder_layers} explicit layers have {twin / 1e6:.2f} M. "
        f"One update with {gradient.name} costs at most {cost} evaluations of the cell ({formula}), "
        f"as much as {cost * cell / twin_layer:.0f} layer passes; "
        f"{cfg.encoder_layers} explicit layers cost {3 * cfg.encoder_layers}"
    )


#: BERT's sizes with one cell layer of as many parameters as the explicit layers together.
MATCHED_SIZES: Dict[str, Dict[str, Any]] = {
    size: {
        **shape,
        "encoder_ffn_embed_dim": matched_ffn_dim(
            shape["encoder_layers"], shape["encoder_embed_dim"], shape["encoder_ffn_embed_dim"]
        ),
    }
    for size, shape in SIZES.items()
}
