"""Neural-ODE BERT: one time-conditioned field, integrated over the whole depth (arXiv 1806.07366)."""

import logging
from dataclasses import dataclass, field
from typing import List, Optional

from fairseq_implicit.depth.continuous import ContinuousConfig, ContinuousDepth
from fairseq_implicit.depth.output import Depth
from fairseq_implicit.families.bert import BertOptions
from fairseq_implicit.families.flags import Flags
from fairseq_implicit.fields.field import Field
from fairseq_implicit.fields.semilinear import LINEAR_PARTS, SemiLinearField
from fairseq_implicit.fields.time_conditioned import INTERPOLATIONS, DepthEmbeddedField, InterpolatedField
from fairseq_implicit.fields.transformer import KINDS
from fairseq_implicit.options import check_choice
from fairseq_implicit.solvers.adaptive import PAIRS, STEP_CONTROLS
from fairseq_implicit.solvers.exponential import SCHEMES as EXPONENTIAL_SCHEMES
from fairseq_implicit.solvers.exponential import check_linear_part
from fairseq_implicit.solvers.names import BACKENDS, GRADIENTS, REVERSIBLE_SCHEME, continuous_solver

logger = logging.getLogger(__name__)

DEPTH_WEIGHTS = ("embedding",) + INTERPOLATIONS
FLAGS = Flags(
    "ode",
    dim="encoder_embed_dim",
    duration="ode_time",
    rtol="ode_tolerance",
    atol="ode_absolute_tolerance",
    stage_dropout="stage_dropout",
    first_norm="no_first_norm",
)


@dataclass
class NeuralOdeBertOptions(BertOptions):
    """The field, the depth and how it is solved. ``encoder_layers`` is the depth in units of one layer."""

    ode_field: str = field(default="pre-norm", metadata={"help": f"the vector field: {', '.join(KINDS)}"})
    ode_linear_part: str = field(
        default="none",
        metadata={
            "help": "diagonal: pull the state to the normalised input at a learned rate per channel; fixed steps of "
            f"{', '.join(EXPONENTIAL_SCHEMES)} solve that part exactly; none"
        },
    )
    ode_depth_weights: str = field(
        default="embedding",
        metadata={
            "help": "embedding: one set of weights, the depth moves the scale and shift of its norms; linear or "
            "constant: --ode-knots sets, interpolated along the depth"
        },
    )
    ode_knots: Optional[int] = field(
        default=None, metadata={"help": "sets of weights along the depth (default: one per layer of --encoder-layers)"}
    )
    ode_time: Optional[float] = field(
        default=None, metadata={"help": "total time, in units of one layer (default: --encoder-layers)"}
    )
    ode_scheme: Optional[str] = field(
        default=None,
        metadata={
            "help": f"adaptive: {', '.join(PAIRS)}; fixed steps: any Runge-Kutta or exponential scheme or "
            f"{REVERSIBLE_SCHEME} "
            "(default: bosh3, with torchdyn dopri5; rk4 for fixed steps)"
        },
    )
    ode_tolerance: float = field(
        default=5e-2, metadata={"help": "relative tolerance of the adaptive solve; 0: --ode-steps fixed steps"}
    )
    ode_absolute_tolerance: Optional[float] = field(
        default=None, metadata={"help": "absolute tolerance (default: the relative one)"}
    )
    ode_steps: Optional[int] = field(
        default=None, metadata={"help": "fixed steps over the whole depth (default: --encoder-layers)"}
    )
    ode_random_steps: Optional[List[int]] = field(
        default=None,
        metadata={"help": "LOW,HIGH: draw the number of fixed steps at each update, so that any of them works later"},
    )
    ode_max_evaluations: int = field(
        default=500, metadata={"help": "evaluations per sample after which a solve stops where it is"}
    )
    ode_first_step: Optional[float] = field(
        default=None,
        metadata={
            "help": "first trial step of adaptive solves, in layers (default 1; over many layers at once an error "
            "estimate means little)"
        },
    )
    ode_backend: str = field(default="own", metadata={"help": f"adaptive solver: {', '.join(BACKENDS)}"})
    ode_step_control: str = field(
        default="auto",
        metadata={
            "help": f"adaptive steps per {' or per '.join(STEP_CONTROLS)}; auto: per sample in evaluation, so that "
            "batch mates change no answer, and in training where field and back end can"
        },
    )
    ode_gradient: str = field(
        default="autograd",
        metadata={
            "help": f"{', '.join(GRADIENTS)}: checkpoint-* are exact with less memory, adjoint exact to the tolerance, "
            "reversible exact with the memory of one state"
        },
    )
    ode_kinetic_energy: float = field(default=0.0, metadata={"help": "weight of the kinetic energy of the trajectory"})
    ode_jacobian: float = field(
        default=0.0, metadata={"help": "weight of the squared Frobenius norm of the field's Jacobian, an estimate"}
    )
    ode_local_error: float = field(default=0.0, metadata={"help": "weight of the solver's error estimate"})
    ode_seed: int = field(default=1, metadata={"help": "seed of --ode-random-steps"})

    @property
    def flags(self) -> Flags:
        return FLAGS

    def check(self) -> ContinuousConfig:
        super().check()
        check_choice("--ode-field", self.ode_field, KINDS)
        check_choice("--ode-linear-part", self.ode_linear_part, LINEAR_PARTS)
        check_choice("--ode-depth-weights", self.ode_depth_weights, DEPTH_WEIGHTS)
        if self.ode_knots is not None and self.ode_depth_weights == "embedding":
            raise ValueError("--ode-knots belongs to --ode-depth-weights linear or constant")
        if self.drop_path > 0:
            raise ValueError(
                f"--drop-path {self.drop_path} would skip the whole depth of a sample, because the depth is one solve: "
                "set it to 0"
            )
        if self.checkpoint_activations and self.ode_backend != "own":
            raise ValueError(f"--checkpoint-activations needs --ode-backend own, not {self.ode_backend}")
        with self.flags.naming():
            return self.continuous()

    @property
    def distinct_layers(self) -> bool:
        return False

    @property
    def duration(self) -> float:
        return float(self.encoder_layers if self.ode_time is None else self.ode_time)

    @property
    def has_linear_part(self) -> bool:
        return self.ode_linear_part != "none"

    @property
    def scheme(self) -> str:
        """The scheme, chosen by what else is asked for where it is not given."""
        if self.ode_scheme is not None:
            return self.ode_scheme
        if self.ode_tolerance > 0:
            # The fewest evaluations for a smooth depth, and what torchdyn has.
            return "dopri5" if self.ode_backend == "torchdyn" else "bosh3"
        return REVERSIBLE_SCHEME if self.ode_gradient == "reversible" else "rk4"

    def continuous(self) -> ContinuousConfig:
        """The solve.

        Raises:
            OptionError: an impossible combination, in one sentence.
        """
        layer = self.transformer_field(self.ode_field)
        if self.scheme in EXPONENTIAL_SCHEMES:
            check_linear_part(self.scheme, self.has_linear_part)
        solver = continuous_solver(
            scheme=self.scheme,
            tolerance=self.ode_tolerance,
            absolute_tolerance=self.ode_absolute_tolerance,
            steps=self.encoder_layers if self.ode_steps is None else self.ode_steps,
            max_evaluations=self.ode_max_evaluations,
            first_step=self.ode_first_step,
            backend=self.ode_backend,
            gradient=self.recomputed(self.ode_gradient),
            replay_random=self.stage_dropout == "independent",
        )
        self.check_repeated()
        options = self.flags.options(ContinuousConfig, self)
        options.update(
            duration=self.duration,
            solver=solver,
            random_steps=None if self.ode_random_steps is None else tuple(self.ode_random_steps),
            noise=layer.is_noisy,
            independent_noise=self.stage_dropout == "independent",
            # Fields that end in a norm pull the state to a normed one, as BERT's layers do.
            final_norm=self.has_linear_part or not layer.residual.ends_in_norm,
            norm=layer.norm,
        )
        return ContinuousConfig(**options)

    def build_depth(self) -> Depth:
        depth, config = self.check(), self.transformer_field(self.ode_field)
        if self.ode_field == "post-norm" and self.scheme == REVERSIBLE_SCHEME:
            logger.warning(
                "--ode-field post-norm contracts the state and --ode-scheme %s does not damp its own error: in fresh "
                "models the state is 4 %% too large at depth 6, 57 %% at depth 12 and leaves the scheme's range at "
                "depth 24, however many --ode-steps; use --ode-field pre-norm, or --ode-scheme heun2 with "
                "--ode-gradient checkpoint-step",
                REVERSIBLE_SCHEME,
            )
        field: Field
        if self.ode_depth_weights == "embedding":
            field = DepthEmbeddedField(config, self.duration)
        else:
            knots = self.encoder_layers if self.ode_knots is None else self.ode_knots
            field = InterpolatedField(config, self.duration, knots, self.ode_depth_weights)
        if self.has_linear_part:
            field = SemiLinearField(field, config.dim, config.norm)
        return ContinuousDepth(depth, field)
