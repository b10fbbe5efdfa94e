"""What the optimisers of this room share: Adam's two moments, in the state that fairseq's ``adam`` reads and writes.

An update of fairseq multiplies the gradients (by the inverse of the number of targets), clips them, and then takes the
step: three passes over all gradients. Here the factors are noted, and applied where the step reads the gradient.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Dict, List, NamedTuple, Tuple, Type

import torch
from fairseq.dataclass import FairseqDataclass
from fairseq.optim import FairseqOptimizer
from omegaconf import II, OmegaConf
from torch import Tensor

from fairseq_implicit.compat.parameters import decays


@dataclass
class MomentsConfig(FairseqDataclass):
    adam_betas: Any = field(default=(0.9, 0.999), metadata={"help": "shares of the past in the two moments"})
    adam_eps: float = field(default=1e-8, metadata={"help": "added to the root of the second moment"})
    weight_decay: float = field(
        default=0.0,
        metadata={
            "help": "share of a weight, times the learning rate, that each update takes away; of weight matrices and "
            "embeddings, not of norms, biases, gains, coefficients, step sizes and gates"
        },
    )
    decay_all: bool = field(default=False, metadata={"help": "weight decay for every parameter, as fairseq's adam"})
    lr: List[float] = II("optimization.lr")


class Weights(NamedTuple):
    """Parameters of one dtype and device that have seen equally many updates and decay alike.

    Attributes:
        values: of the parameters, in float32 at least.
        gradients: in the same dtype.
        means, squares: the two moments.
        update: the number of this update, from 1.
        decay: their weight decay.
    """

    values: List[Tensor]
    gradients: List[Tensor]
    means: List[Tensor]
    squares: List[Tensor]
    update: int
    decay: float


class Moments(torch.optim.Optimizer):
    """Adam's state and what it is made of; a subclass says what an update is.

    The state of a parameter is ``step`` (a number), ``exp_avg`` and ``exp_avg_sq`` (at least float32, of its shape),
    and all parameters stand in one group: fairseq's layout. Which of them decay is asked at each update.

    Args:
        params: the parameters.
        lr, betas, eps, weight_decay: of Adam.
        decay_all: whether every parameter decays.
    """

    # fairseq hands over parameters in half precision as they are, and their state uncast.
    supports_memory_efficient_fp16 = True

    def __init__(self, params, lr: float, betas: Tuple[float, float], eps: float, weight_decay: float, decay_all: bool):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, amsgrad=False))
        self.decay_all = decay_all

    @property
    def needs_shapes(self) -> bool:
        """Whether an update depends on the shapes of the parameters, and not on their elements alone."""
        return not self.decay_all and any(group["weight_decay"] for group in self.param_groups)

    @torch.no_grad()
    def step(self, closure=None, factor: "float | Tensor" = 1.0):
        """One update.

        Args:
            closure: computes the loss anew, as torch's optimisers have it.
            factor: of the gradients, a number or a 0-dim tensor.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weights, parameters in self._weights(group):
                self.update(weights, group, factor)
                if parameters[0].dtype != weights.values[0].dtype:
                    torch._foreach_copy_(parameters, weights.values)
        return loss

    def update(self, weights: Weights, group: Dict[str, Any], factor: "float | Tensor") -> None:
        """Changes values and moments in place.

        Args:
            weights: what to update.
            group: ``lr``, ``betas`` and ``eps``.
            factor: of the gradients, to be applied.
        """
        raise TypeError(f"{type(self).__name__} defines no update(): an optimiser must say what one is")

    def _weights(self, group: Dict[str, Any]) -> Iterator[Tuple[Weights, List[Tensor]]]:
        """What can be updated at once, with the parameters themselves, which may be narrower than their values."""
        found: Dict[Tuple, List[Tensor]] = {}
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                wide = torch.promote_types(parameter.dtype, torch.float32)
                state["step"] = 0
                state["exp_avg"] = torch.zeros_like(parameter, dtype=wide)
                state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=wide)
            state["step"] = update = int(state["step"]) + 1
            decay = group["weight_decay"] if self.decay_all or decays(parameter) else 0.0
            found.setdefault((update, decay, parameter.dtype, parameter.device), []).append(parameter)
        for (update, decay, _, _), parameters in found.items():
            states = [self.state[parameter] for parameter in parameters]
            means = [state["exp_avg"] for state in states]
            wide = [parameter.to(mean.dtype) for parameter, mean in zip(parameters, means, strict=True)]
            gradients = [parameter.grad.to(mean.dtype) for parameter, mean in zip(parameters, means, strict=True)]
            squares = [state["exp_avg_sq"] for state in states]
            yield Weights(wide, gradients, means, squares, update, decay), parameters


class MomentsOptimizer(FairseqOptimizer):
    """fairseq's face of :class:`Moments`.

    Raises:
        ValueError: numbers that are none of Adam's, naming the flag.
    """

    name: ClassVar[str]
    moments: ClassVar[Type[Moments]]

    def __init__(self, cfg: MomentsConfig, params):
        super().__init__(cfg)
        self._optimizer = self.moments(params, **self.optimizer_config)
        self._factor: float | Tensor = 1.0

    @property
    def optimizer_config(self) -> Dict[str, Any]:
        """The arguments of the torch optimiser."""
        return dict(
            lr=self.cfg.lr[0],
            betas=_betas(self.cfg.adam_betas),
            eps=_not_negative("--adam-eps", self.cfg.adam_eps),
            weight_decay=_not_negative("--weight-decay", self.cfg.weight_decay),
            decay_all=self.cfg.decay_all,
        )

    @property
    def supports_flat_params(self) -> bool:
        """What fairseq asks before it copies all parameters into one vector.

        Raises:
            ValueError: the shapes of the parameters are needed.
        """
        if self.optimizer.needs_shapes:
            raise ValueError(
                f"--optimizer {self.name} needs --fp16-no-flatten-grads with --fp16: in one long vector it does not "
                "know norms and biases from weights, nor one weight from the next."
            )
        return True

    def load_state_dict(self, state_dict: Dict[str, Any], optimizer_overrides=None) -> None:
        """Takes also the state of all parameters as one vector, as fairseq's ``adam`` keeps it with ``--fp16``."""
        super().load_state_dict(_cut(state_dict, list(self.params)), optimizer_overrides)

    def multiply_grads(self, c: "float | Tensor") -> None:
        """Notes a factor of the gradients, which the step applies; what the model holds stays as it is."""
        self._factor = self._factor * c

    def clip_grad_norm(self, max_norm: float, aggregate_norm_fn=None) -> Tensor:
        """The norm of the gradients, multiplied as they will be; one above ``max_norm`` adds to the factor."""
        gradients = [parameter.grad for parameter in self.params if parameter.grad is not None]
        if not gradients:
            return torch.tensor(0.0)
        norms = torch._foreach_norm(gradients, 2, dtype=torch.float32)
        norm = torch.stack([each.to(norms[0].device) for each in norms]).norm() * self._factor
        if aggregate_norm_fn is not None:
            norm = aggregate_norm_fn(norm)
        if max_norm > 0:
            self._factor = self._factor * (max_norm / (norm + 1e-6)).clamp(max=1)
        return norm

    def step(self, closure=None, scale: float = 1.0, groups=None) -> None:
        """One update, with gradients divided by ``scale``."""
        self.optimizer.step(closure, factor=self._factor / scale)
        self._factor = 1.0

    def zero_grad(self) -> None:
        for parameter in self.params:
            parameter.grad = None
        self._factor = 1.0


def _cut(state_dict: Dict[str, Any], parameters: List[Tensor]) -> Dict[str, Any]:
    """The state of each parameter, where the state is that of one vector which holds them all in their order."""
    sizes = [parameter.numel() for parameter in parameters]
    state, group = state_dict["state"].get(0, {}), state_dict["param_groups"][0]
    if len(sizes) == 1 or len(group["params"]) != 1 or not state or state["exp_avg"].numel() != sum(sizes):
        return state_dict
    cut: Dict[int, Dict[str, Any]] = {index: {"step": state["step"]} for index in range(len(sizes))}
    for name in ("exp_avg", "exp_avg_sq"):
        for index, piece in enumerate(state[name].split(sizes)):
            cut[index][name] = piece.view_as(parameters[index]).clone()
    return {**state_dict, "state": cut, "param_groups": [{**group, "params": list(cut)}]}


def _betas(value: Any) -> Tuple[float, float]:
    try:
        first, second = ast.literal_eval(value) if isinstance(value, str) else OmegaConf.to_container(value)
        if 0 <= first < 1 and 0 <= second < 1:
            return float(first), float(second)
    except (SyntaxError, TypeError, ValueError):
        pass
    raise ValueError(f"--adam-betas must be two numbers from 0 to below 1, such as '(0.9,0.98)', not {value}.")


def _not_negative(flag: str, value: float) -> float:
    if not value >= 0:
        raise ValueError(f"{flag} must not be negative, but it is {value}.")
    return value
