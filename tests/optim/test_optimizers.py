"""Optimisers against their formulas in float64, and within fairseq: resuming, changing over, half precision, ranks."""

import math
import types

import pytest
import torch
from fairseq.data import Dictionary
from fairseq.optim.adam import Adam, FairseqAdam, FairseqAdamConfig
from fairseq.optim.fp16_optimizer import FP16Optimizer
from omegaconf import OmegaConf

from fairseq_implicit.compat.parameters import decays, leave_undecayed
from fairseq_implicit.models.neural_ode_bert import NeuralOdeBertConfig, NeuralOdeBertModel
from fairseq_implicit.models.ode_bert import OdeBertConfig, OdeBertModel
from fairseq_implicit.optim.fused_adam import FusedAdam, FusedAdamConfig, FusedAdamOptimizer
from fairseq_implicit.optim.stable_adam import StableAdam

OPTIONS = dict(lr=1e-2, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.1)
SHAPES = ((7, 5), (4,), (), (3, 2))


def parameters(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, dtype=dtype, generator=generator)) for shape in SHAPES]


def gradients(updates):
    """Of each update; small ones, for which eps matters, and none for the last parameter in every third."""
    generator = torch.Generator().manual_seed(1)
    for number in range(updates):
        size = 10.0 ** (number % 5 - 6)
        found = [size * torch.randn(shape, dtype=torch.float64, generator=generator) for shape in SHAPES]
        yield found[:-1] + [None if number % 3 == 1 else found[-1]]


def trained(optimizer, weights, updates=60, factor=1.0):
    for found in gradients(updates):
        for weight, gradient in zip(weights, found, strict=True):
            weight.grad = None if gradient is None else gradient.to(weight.dtype) / factor
        optimizer.step(**({} if factor == 1.0 else dict(factor=factor)))
    return weights


def assert_alike(ours, theirs, bound=1e-14):
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.double(), other.double(), atol=bound, rtol=bound)


def test_fused_adam_is_fairseqs_adam():
    """With another number of updates for one parameter, and gradients for which it matters where eps is added."""
    ours, theirs = parameters(), parameters()
    trained(Adam(theirs, **OPTIONS), theirs)
    assert_alike(trained(FusedAdam(ours, **OPTIONS, decay_all=True), ours), theirs)
    scaled = parameters()
    assert_alike(trained(FusedAdam(scaled, **OPTIONS, decay_all=True), scaled, factor=torch.tensor(0.25)), theirs)


def test_norms_biases_and_numbers_do_not_decay():
    ours, theirs = parameters(), parameters()
    leave_undecayed(ours[3:])
    assert [decays(parameter) for parameter in ours] == [True, False, False, False]
    trained(Adam([dict(params=theirs[:1]), dict(params=theirs[1:], weight_decay=0.0)], **OPTIONS), theirs)
    assert_alike(trained(FusedAdam(ours, **OPTIONS, decay_all=False), ours), theirs)


def test_coupled_decay_is_a_part_of_the_gradient():
    ours, theirs = parameters(), parameters()
    plain = Adam(theirs, **{**OPTIONS, "weight_decay": 0.0})
    for found in gradients(20):
        for weight, gradient in zip(theirs, found, strict=True):
            weight.grad = None if gradient is None else gradient + 0.1 * weight.detach()
        plain.step()
    assert_alike(trained(FusedAdam(ours, **OPTIONS, decay_all=True, coupled=True), ours, 20), theirs)


def test_stable_adam_is_its_formula():
    """Algorithm 2 of arXiv 2304.13013, whose moments are unbiased by shares of the past that change with t."""
    ours, theirs = parameters(), [parameter.detach().clone() for parameter in parameters()]
    count, means, squares = ([0.0] * len(SHAPES) for _ in range(3))
    clipped = 0
    for found in gradients(60):
        for i, (theta, g) in enumerate(zip(theirs, found, strict=True)):
            if g is None:
                continue
            count[i] += 1
            first, second = (b * (1 - b ** (count[i] - 1)) / (1 - b ** count[i]) for b in OPTIONS["betas"])
            means[i] = first * means[i] + (1 - first) * g
            squares[i] = second * squares[i] + (1 - second) * g.square()
            rms = (g.square() / squares[i].clamp_min(OPTIONS["eps"] ** 2)).mean().sqrt()
            clipped += rms > 1.5
            eta = OPTIONS["lr"] / max(1.0, rms)
            decay = OPTIONS["weight_decay"] if theta.ndim > 1 else 0.0
            theta -= eta * decay * theta + eta * means[i] / (squares[i].sqrt() + OPTIONS["eps"])
    assert clipped > 10
    assert_alike(trained(StableAdam(ours, **OPTIONS, decay_all=False), ours), theirs, 1e-12)
    scaled = parameters()
    assert_alike(
        trained(StableAdam(scaled, **OPTIONS, decay_all=False), scaled, factor=torch.tensor(0.25)), theirs, 1e-12
    )


@pytest.mark.parametrize("kind", [FusedAdam, StableAdam])
def test_weights_in_half_precision_have_a_state_in_full(kind):
    """As ``--memory-efficient-bf16`` holds them, and fairseq's adam treats them."""
    ours = parameters(torch.bfloat16)
    optimizer = kind(ours, **OPTIONS, decay_all=True)
    trained(optimizer, ours, 5)
    assert {optimizer.state[each]["exp_avg"].dtype for each in ours} == {torch.float32}
    if kind is FusedAdam:
        theirs = parameters(torch.bfloat16)
        trained(Adam(theirs, **OPTIONS), theirs, 5)
        assert_alike(ours, theirs, 1e-2)


def configured(**options):
    return OmegaConf.create({**vars(FusedAdamConfig()), "lr": [1e-2], "_name": "fused_adam", **options})


def test_multiplied_and_clipped_as_fairseq_does():
    """In the order of the trainer; the factors wait for the step, the norm that is logged does not."""
    theirs_config = OmegaConf.create({**vars(FairseqAdamConfig()), "lr": [1e-2], "tpu": False})
    ours, theirs = parameters(torch.float32), parameters(torch.float32)
    pairs = (FusedAdamOptimizer(configured(), ours), ours), (FairseqAdam(theirs_config, theirs), theirs)
    for number, found in enumerate(gradients(10)):
        norms = []
        for optimizer, weights in pairs:
            optimizer.zero_grad()
            for weight, gradient in zip(weights, found, strict=True):
                weight.grad = None if gradient is None else gradient.float()
            optimizer.multiply_grads(torch.tensor(1 / 7))
            norms.append(optimizer.clip_grad_norm((0.0, 1e-9, 1e3)[number % 3]))
            optimizer.step()
        torch.testing.assert_close(*norms)
    assert_alike(ours, theirs, 1e-6)


def test_float32_copies_are_of_the_kind_of_what_they_copy():
    weights = parameters(torch.bfloat16)
    leave_undecayed(weights[:1])
    copies = FP16Optimizer.build_fp32_params(None, weights, flatten=False)
    assert [decays(copy) for copy in copies] == [decays(weight) for weight in weights] == [False, False, False, True]


def matrices(model, config, **settings):
    """Names of a small model's parameters with rows and columns, and of those that decay."""
    dictionary = Dictionary()
    shape = dict(encoder_layers=2, encoder_embed_dim=8, encoder_ffn_embed_dim=8, encoder_attention_heads=2)
    task = types.SimpleNamespace(source_dictionary=dictionary, max_positions=lambda: 8)
    named = dict(model.build_model(config(**shape, **settings), task).named_parameters())
    return {name for name in named if named[name].ndim > 1}, {name for name in named if decays(named[name])}


def test_which_parameters_of_a_model_decay():
    """Matrices of layers and embeddings do, matrices of coefficients do not."""
    all_plain, plain = matrices(OdeBertModel, OdeBertConfig)
    assert all_plain == plain and {name.rsplit(".")[-1] for name in plain} == {"weight"}
    all_gated, gated = matrices(OdeBertModel, OdeBertConfig, ode_coefficients="gated", ode_history="dlcl")
    assert gated == plain and {name.rsplit(".")[-1] for name in all_gated - gated} == {"weight", "mixture"}
    all_timed, timed = matrices(NeuralOdeBertModel, NeuralOdeBertConfig)
    assert all_timed - timed == {"encoder.depth.field.depth_embedding.coefficients.weight"}


@pytest.mark.parametrize(
    "options, sentence",
    [
        (dict(adam_betas="(0.9,1)"), r"--adam-betas must be two numbers .* not \(0.9,1\)"),
        (dict(adam_betas="0.9"), "--adam-betas must be two numbers"),
        (dict(adam_eps=-1.0), "--adam-eps must not be negative, but it is -1.0"),
        (dict(weight_decay=math.nan), "--weight-decay must not be negative, but it is nan"),
    ],
)
def test_numbers_that_are_none_of_adams(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        FusedAdamOptimizer(configured(**options), parameters())


def test_the_state_of_one_long_vector_is_cut():
    """That of adam with --fp16, whose float32 copies are one vector."""
    theirs = parameters()[:3]
    flat = [torch.nn.Parameter(torch.cat([each.detach().flatten() for each in theirs]))]
    adams = Adam(theirs, **OPTIONS), Adam(flat, **OPTIONS)
    for found in gradients(3):
        flat[0].grad = torch.cat([gradient.flatten() for gradient in found[:3]])
        for each, gradient in zip(theirs, found[:3], strict=True):
            each.grad = gradient
        for adam in adams:
            adam.step()
    ours = FusedAdamOptimizer(configured(), parameters()[:3])
    ours.load_state_dict(adams[1].state_dict())
    expected, found = adams[0].state_dict(), ours.state_dict()
    assert found["param_groups"] == expected["param_groups"] and found["state"].keys() == expected["state"].keys()
    for index, state in expected["state"].items():
        assert found["state"][index]["step"] == state["step"] == 3
        assert torch.equal(found["state"][index]["exp_avg"], state["exp_avg"])
        assert torch.equal(found["state"][index]["exp_avg_sq"], state["exp_avg_sq"])


def test_one_long_vector_is_refused_where_shapes_matter():
    flat = [torch.nn.Parameter(torch.zeros(8))]
    assert FusedAdamOptimizer(configured(), flat).supports_flat_params
    assert FusedAdamOptimizer(configured(weight_decay=0.1, decay_all=True), flat).supports_flat_params
    with pytest.raises(ValueError, match="--optimizer fused_adam needs --fp16-no-flatten-grads with --fp16"):
        assert FusedAdamOptimizer(configured(weight_decay=0.1), flat).supports_flat_params
