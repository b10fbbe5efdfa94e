"""ODE-BERT: each encoder block integrated by a Runge–Kutta scheme (arXiv 2203.09176); Euler is the ordinary BERT."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import List, NamedTuple, Optional

from fairseq_implicit.depth.output import Depth
from fairseq_implicit.depth.random_steps import RandomDepth
from fairseq_implicit.depth.stack import HISTORIES, BlockStack, StackConfig
from fairseq_implicit.families.bert import BertOptions
from fairseq_implicit.families.flags import Flags, flag
from fairseq_implicit.families.original_flags import from_original_flags
from fairseq_implicit.fields.field import Field
from fairseq_implicit.fields.semilinear import LINEAR_PARTS, SemiLinearField
from fairseq_implicit.fields.transformer import KINDS, TransformerField
from fairseq_implicit.options import OptionError, check_choice
from fairseq_implicit.solvers.adaptive import Adaptive
from fairseq_implicit.solvers.coefficients import MODES, SCOPES, STARTS
from fairseq_implicit.solvers.exponential import SCHEMES as EXPONENTIAL_SCHEMES
from fairseq_implicit.solvers.exponential import Exponential, check_linear_part
from fairseq_implicit.solvers.fixed_point import METHODS, FixedPointConfig
from fairseq_implicit.solvers.gradients.names import parse_gradient
from fairseq_implicit.solvers.names import CORRECTORS, FIXED_GRADIENTS, trajectory_gradient
from fairseq_implicit.solvers.runge_kutta import RungeKutta
from fairseq_implicit.solvers.solver import Solver
from fairseq_implicit.solvers.tableau import get_tableau
from fairseq_implicit.solvers.theta import SCHEMES as IMPLICIT_SCHEMES
from fairseq_implicit.solvers.theta import Theta

DEFAULT_SCHEME = "rk2"

_COMMON = dict(
    total_time="ode_time",
    layers="encoder_layers",
    dim="encoder_embed_dim",
    stage_dropout="stage_dropout",
    first_norm="no_first_norm",
)
FLAGS = Flags(
    "ode",
    start="ode_coefficient_start",
    scope="ode_coefficient_scope",
    stage_norm="rk_norm",
    state_float32="ode_float32_state",
    layerdrop="encoder_layerdrop",
    consistency_penalty="ode_consistency_weight",
    second_order_penalty="ode_second_order_weight",
    **_COMMON,
)
#: Flags that explicit and implicit schemes have in common.
SHARED_FLAGS = {
    *(item.name for item in dataclasses.fields(BertOptions) if item.name != "checkpoint_activations"),
    *("ode_field", "ode_scheme", "ode_steps", "ode_time", "ode_split", "ode_tied", "ode_seed", "ode_max_evaluations"),
    "ode_linear_part",
}
#: Flags of schemes that add up stages with the weights of a tableau, or measure its error.
TABLEAU_FLAGS = (
    *("ode_coefficients", "ode_coefficient_start", "ode_coefficient_scope", "ode_consistency_weight", "rk_norm"),
    *("ode_second_order_weight", "ode_corrector", "ode_residual_in_field", "ode_tolerance"),
)
IMPLICIT_FLAGS = Flags(
    "ode",
    **{option: f"ode_theta_{option}" for option in ("solver", "max_iter", "tol", "memory", "gradient")},
    adjoint_tol="ode_theta_tol",
    **_COMMON,
)


class Coefficients(NamedTuple):
    """The scheme and how its stages are combined, once all flags have been read."""

    scheme: str
    mode: str
    start: str
    scope: str


@dataclass
class OdeBertOptions(BertOptions):
    """What is integrated (``ode_field``), by which scheme, with which coefficients and gradient."""

    ode_field: str = field(
        default="pre-norm",
        metadata={"help": f"the vector field: {', '.join(KINDS)}; Euler on post-norm is exactly BERT and RoBERTa"},
    )
    ode_linear_part: str = field(
        default="none",
        metadata={
            "help": "diagonal: pull the state to the normalised input at a learned rate per channel, so that loops of "
            "any length stay bounded; with --ode-scheme etd1, etd2 or etd4 that part is solved exactly; none"
        },
    )
    ode_scheme: Optional[str] = field(
        default=None,
        metadata={
            "help": f"scheme of each block: euler, rk2, rk3, rk4, … (default {DEFAULT_SCHEME}), exponential: "
            f"{', '.join(EXPONENTIAL_SCHEMES)}, or implicit: {', '.join(IMPLICIT_SCHEMES)}"
        },
    )
    ode_steps: int = field(default=1, metadata={"help": "sub-steps per block, with the same weights"})
    ode_time: float = field(default=1.0, metadata={"help": "time integrated by each block; the step is time / steps"})
    ode_random_steps: Optional[List[int]] = field(
        default=None,
        metadata={
            "help": "LOW,HIGH: draw the sub-steps per block at each update, so that the trained model works with any "
            "of them; evaluation takes --ode-steps"
        },
    )
    ode_random_depth: Optional[float] = field(
        default=None,
        metadata={
            "help": "of one block in a loop (--encoder-layers 1 or --ode-tied): draw the number of steps of each "
            "sequence at each update, a Poisson number of this mean that is not 0, so that the trained model works at "
            "any depth. Steps keep their size --ode-time / --ode-steps; evaluation takes --ode-steps"
        },
    )
    ode_random_depth_max: Optional[int] = field(
        default=None, metadata={"help": "largest number of --ode-random-depth (default: twice the mean)"}
    )
    ode_random_depth_gradient: int = field(
        default=8, metadata={"help": "the gradient goes through so many of a sequence's last steps"}
    )
    ode_seed: int = field(default=1, metadata={"help": "seed of --ode-random-steps and --ode-random-depth"})
    ode_tolerance: float = field(
        default=0.0, metadata={"help": "above 0: adaptive steps in each block (bosh3, dopri5, tsit5) to this tolerance"}
    )
    ode_max_evaluations: int = field(
        default=500, metadata={"help": "evaluations per sample and block after which an adaptive solve stops"}
    )
    ode_split: int = field(
        default=1,
        metadata={
            "help": "progressive depth: N blocks of 1/N of the time in place of each layer; a checkpoint opened with a "
            "larger N keeps its function up to the scheme's error"
        },
    )
    ode_theta: float = field(
        default=1.0, metadata={"help": "of --ode-scheme theta: 0 the ordinary layer, 0.5 trapezoid, 1 backward Euler"}
    )
    ode_theta_solver: str = field(
        default="anderson", metadata={"help": f"root solver of the implicit schemes: {', '.join(METHODS)}"}
    )
    ode_theta_max_iter: int = field(
        default=20, metadata={"help": "evaluations per implicit step, and products per adjoint solve"}
    )
    ode_theta_tol: Optional[float] = field(
        default=None, metadata={"help": "tolerance of each implicit step (default by precision: 1e-3; bfloat16 1e-2)"}
    )
    ode_theta_gradient: str = field(
        default="ift", metadata={"help": "gradient of each implicit step: ift, neumann-K, phantom-K, jfb, bptt-K"}
    )
    ode_coefficients: Optional[str] = field(
        default=None, metadata={"help": f"combination of the stages: {', '.join(MODES)} (default fixed)"}
    )
    ode_coefficient_start: Optional[str] = field(
        default=None, metadata={"help": f"start of learned coefficients: {', '.join(STARTS)} (default tableau)"}
    )
    ode_coefficient_scope: Optional[str] = field(
        default=None, metadata={"help": f"one set of coefficients per {', '.join(SCOPES)} (default block)"}
    )
    rk_norm: bool = field(
        default=False, metadata={"help": "normalise the state and each stage's increment before the sum (PCformer)"}
    )
    ode_consistency_weight: float = field(
        default=0.0, metadata={"help": "weight of the penalty (sum of coefficients - 1)^2"}
    )
    ode_second_order_weight: float = field(
        default=0.0, metadata={"help": "weight of the penalty (sum of coefficients times nodes - 1/2)^2"}
    )
    ode_corrector: str = field(
        default="none", metadata={"help": f"predictor-corrector, one more evaluation: {', '.join(CORRECTORS)}"}
    )
    ode_history: str = field(
        default="none",
        metadata={"help": f"combination of all earlier blocks before each block: {', '.join(HISTORIES)}"},
    )
    ode_gradient: str = field(
        default="autograd",
        metadata={
            "help": f"{', '.join(FIXED_GRADIENTS)}: the same gradient, less memory, one more evaluation of the field"
        },
    )
    ode_float32_state: bool = field(
        default=False, metadata={"help": "keep the state in float32 around half-precision blocks"}
    )
    ode_residual_in_field: bool = field(
        default=False,
        metadata={
            "help": "integrate the layer with its residual, as the original code does: the state grows exponentially"
        },
    )
    ode_tied: bool = field(default=False, metadata={"help": "one block's weights for all blocks (ALBERT)"})
    encoder_layerdrop: float = field(
        default=0.0, metadata={"help": "LayerDrop: rate at which a whole block is skipped in training"}
    )
    enc_calculate_num: Optional[int] = field(
        default=None, metadata={"help": "the ODE-Transformer's name for the order: 1 euler, 2 rk2, 3 rk3, 4 rk4"}
    )
    rk_type: Optional[str] = field(
        default=None, metadata={"help": "the ODE-Transformer's coefficients: standard, learnable, initialization"}
    )
    enc_learnable_type: Optional[str] = field(
        default=None, metadata={"help": "the ODE-Transformer's kind of --rk-type learnable: gated or ema"}
    )
    alpha_type: Optional[str] = field(
        default=None, metadata={"help": "the ODE-Transformer's shape of the EMA's alpha: scalar or vector"}
    )

    def coefficients(self) -> Coefficients:
        """Read the scheme from ``--ode-*`` or from the ODE-Transformer's flags.

        Raises:
            ValueError: the two kinds of flags contradict each other, or the original ones themselves.
        """
        own = {
            "ode_scheme": self.ode_scheme,
            "ode_coefficients": self.ode_coefficients,
            "ode_coefficient_start": self.ode_coefficient_start,
            "ode_coefficient_scope": self.ode_coefficient_scope,
        }
        if self.enc_calculate_num is None:
            for name in ("rk_type", "enc_learnable_type", "alpha_type"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{flag(name)} {getattr(self, name)} needs --enc-calculate-num, the order")
            defaults = Coefficients(DEFAULT_SCHEME, "fixed", "tableau", "block")
            return Coefficients(
                *(given if given is not None else value for given, value in zip(own.values(), defaults, strict=True))
            )
        mapped = from_original_flags(
            self.enc_calculate_num, self.rk_type or "standard", self.enc_learnable_type, self.alpha_type
        )
        for (name, given), value in zip(own.items(), mapped, strict=True):
            same = given == value or (name == "ode_scheme" and given and get_tableau(given) is get_tableau(value))
            if given is not None and not same:
                raise ValueError(
                    f"{flag(name)} {given} contradicts --enc-calculate-num {self.enc_calculate_num} with its "
                    f"--rk-type, which means {value}: give one of the two"
                )
        return Coefficients(*mapped)

    @property
    def flags(self) -> Flags:
        return IMPLICIT_FLAGS if self.is_implicit else FLAGS

    def check(self) -> StackConfig:
        super().check()
        for name, choices in (
            ("ode_field", KINDS),
            ("ode_linear_part", LINEAR_PARTS),
            ("ode_coefficients", MODES),
            ("ode_coefficient_start", STARTS),
            ("ode_coefficient_scope", SCOPES),
            ("ode_corrector", CORRECTORS),
            ("ode_history", HISTORIES),
            ("ode_gradient", FIXED_GRADIENTS),
        ):
            if getattr(self, name) is not None:
                check_choice(flag(name), getattr(self, name), choices)
        if self.ode_split < 1:
            raise ValueError(f"--ode-split {self.ode_split}: each layer becomes at least one block")
        if self.ode_split > 1 and (self.ode_history != "none" or self.ode_corrector in ("adams", "pcformer")):
            raise ValueError(
                f"--ode-split {self.ode_split} cuts layers in time, but --ode-history {self.ode_history} and "
                f"--ode-corrector {self.ode_corrector} count them: use it with --ode-history none and --ode-corrector "
                "none or backward-euler"
            )
        if self.ode_split > 1 and self.rk_norm:
            raise ValueError(
                f"--ode-split {self.ode_split} with --rk-norm normalises the state {self.ode_split} times in place of "
                "each layer's once, which is another function: leave one of the two out"
            )
        self._check_strangers()
        self._check_company()
        with self.flags.naming():
            return self.stack()

    def _check_company(self) -> None:
        """Refuse flags of a loop that there is not, and what a linear part is to undo.

        Raises:
            ValueError: naming them.
        """
        default = OdeBertOptions.ode_random_depth_gradient
        if self.ode_random_depth is None:
            for name, value in (("ode_random_depth_max", None), ("ode_random_depth_gradient", default)):
                if getattr(self, name) != value:
                    raise ValueError(f"{flag(name)} {getattr(self, name)} needs --ode-random-depth, the mean")
        elif self.drop_path > 0:
            raise ValueError(
                f"--drop-path {self.drop_path} would skip the whole loop of a sample, because --ode-random-depth makes "
                "it one solve: set it to 0"
            )
        if self.ode_residual_in_field and self.has_linear_part:
            raise ValueError(
                "--ode-residual-in-field integrates the state itself beside the field, which --ode-linear-part "
                f"{self.ode_linear_part} is to contract: leave one of the two out"
            )

    def _check_strangers(self) -> None:
        """Refuse the flags that belong to schemes of the other kind, explicit or implicit.

        Raises:
            ValueError: naming the first one that is set.
        """
        scheme = self.ode_scheme or DEFAULT_SCHEME
        for name in TABLEAU_FLAGS if scheme in EXPONENTIAL_SCHEMES else ():
            if getattr(self, name) != OdeBertOptions.__dataclass_fields__[name].default:
                raise ValueError(
                    f"{flag(name)} {getattr(self, name)} belongs to Runge-Kutta schemes, and --ode-scheme {scheme} has "
                    "weights of its own and no error estimate: leave it out"
                )
        for item in dataclasses.fields(OdeBertOptions):
            implicit = item.name.startswith("ode_theta")
            known = implicit if self.is_implicit else not implicit
            if known or item.name in SHARED_FLAGS or getattr(self, item.name) == item.default:
                continue
            if implicit:
                raise ValueError(
                    f"{flag(item.name)} {getattr(self, item.name)} belongs to the implicit schemes "
                    f"({', '.join(IMPLICIT_SCHEMES)}), and --ode-scheme is {scheme}: leave it out"
                )
            raise ValueError(
                f"{flag(item.name)} {getattr(self, item.name)} belongs to explicit schemes, and --ode-scheme {scheme} "
                "is implicit: leave it out (its gradient is --ode-theta-gradient)"
            )

    @property
    def distinct_layers(self) -> bool:
        return not self.ode_tied

    @property
    def is_implicit(self) -> bool:
        """Whether each block solves an equation."""
        return self.ode_scheme in IMPLICIT_SCHEMES

    def stack(self) -> StackConfig:
        """The depth's configuration, its blocks' solver included.

        Raises:
            OptionError: an impossible value or combination, in one sentence.
        """
        layer = self.transformer_field(self.ode_field)
        solver = self._implicit_solver() if self.is_implicit else self._explicit_solver()
        if not solver.evaluates_once or self.ode_random_steps is not None or self.ode_random_depth is not None:
            self.check_repeated()
        options = self.flags.options(StackConfig, self)
        options.update(
            layers=self.encoder_layers * self.ode_split,
            solver=solver,
            total_time=self.ode_time / self.ode_split,
            # Layers that end in a norm of their own, as BERT's do, need no other unless something is added to it.
            final_norm=self.has_linear_part or not layer.residual.ends_in_norm,
            norm=layer.norm,
            random_steps=None if self.ode_random_steps is None else tuple(self.ode_random_steps),
        )
        if self.ode_random_depth is not None and not self.has_linear_part:
            deepest = RandomDepth(self.ode_random_depth, self.ode_random_depth_max, self.ode_seed).maximum
            if self.ode_random_depth_gradient < deepest:
                raise OptionError(
                    "random_depth_gradient",
                    f"{self.ode_random_depth_gradient} last steps of up to {deepest} leave the embedding without a "
                    f"gradient, which enters at the first: set `linear_part` diagonal, or this to {deepest}.",
                )
        return StackConfig(**options)

    @property
    def has_linear_part(self) -> bool:
        return self.ode_linear_part != "none"

    def _explicit_solver(self) -> Solver:
        """Fixed steps, or adaptive ones where there is a tolerance."""
        coefficients = self.coefficients()
        if coefficients.scheme in EXPONENTIAL_SCHEMES:
            check_linear_part(coefficients.scheme, self.has_linear_part)
            return Exponential(
                coefficients.scheme,
                self.ode_steps,
                trajectory_gradient(self.recomputed(self.ode_gradient)),
                state_float32=self.ode_float32_state,
                replay_random=self.stage_dropout == "independent",
            )
        options = self.flags.options(RungeKutta, self)
        options.update(
            scheme=coefficients.scheme,
            coefficients=coefficients.mode,
            start=coefficients.start,
            scope=coefficients.scope,
            gradient=trajectory_gradient(self.recomputed(self.ode_gradient)),
            replay_random=self.stage_dropout == "independent",
        )
        solver = CORRECTORS[self.ode_corrector](**options)
        if not 0 <= self.ode_tolerance < math.inf:
            raise OptionError(
                "tolerance", f"a tolerance of {self.ode_tolerance}: give a positive one, or 0 for fixed steps."
            )
        if self.ode_tolerance == 0:
            return solver
        if solver.learns or solver.stage_norm or solver.residual_in_field or self.ode_corrector != "none":
            raise OptionError(
                "tolerance",
                "adaptive steps (above 0) measure the error of the tableau itself: set `coefficients` fixed, "
                "`corrector` none, and neither `stage_norm` nor `residual_in_field`.",
            )
        return Adaptive(
            solver.scheme,
            self.ode_tolerance,
            self.ode_tolerance,
            self.ode_max_evaluations,
            gradient=solver.gradient,
            state_float32=solver.state_float32,
        )

    def _implicit_solver(self) -> Theta:
        if self.ode_scheme == "implicit-midpoint" and self.ode_theta != 1.0:
            raise ValueError(f"--ode-theta {self.ode_theta}: the implicit midpoint rule has no theta; leave it out")
        layer = self.transformer_field(self.ode_field)
        if self.stage_dropout == "independent" and layer.is_noisy:
            raise ValueError(
                "--stage-dropout independent makes the field a different function at each evaluation, so an implicit "
                "step has no solution: take shared"
            )
        adjoint = FixedPointConfig("anderson", self.ode_theta_max_iter, self.ode_theta_tol)
        options = self.flags.options(Theta, self)
        options.update(
            solver=FixedPointConfig(self.ode_theta_solver, self.ode_theta_max_iter, self.ode_theta_tol),
            gradient=parse_gradient(self.ode_theta_gradient, adjoint=adjoint),
        )
        return Theta(**options)

    def build_depth(self) -> Depth:
        depth, config = self.check(), self.transformer_field(self.ode_field)

        def field(block: int) -> Field:
            # Of a layer that is cut in time all blocks are that layer.
            layer = TransformerField(config.at(block // self.ode_split))
            return SemiLinearField(layer, config.dim, config.norm) if self.has_linear_part else layer

        return BlockStack(depth, field)
