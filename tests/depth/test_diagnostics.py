"""Trajectories: what is drawn is what happens."""

import pytest
import torch

from fairseq_implicit.depth.continuous import ContinuousDepth
from fairseq_implicit.depth.diagnostics import trace
from fairseq_implicit.depth.stack import BlockStack
from fairseq_implicit.fields.mixers.attention import AttentionConfig
from fairseq_implicit.fields.time_conditioned import DepthEmbeddedField
from fairseq_implicit.fields.transformer import TransformerField, TransformerFieldConfig
from fairseq_implicit.layout import Layout
from tests.depth.configs import continuous_config, stack_config

SHAPE = TransformerFieldConfig(16, 32, AttentionConfig(2))


def stack(**settings):
    torch.manual_seed(0)
    return BlockStack(stack_config(3, 16, final_norm=True, **settings), lambda block: TransformerField(SHAPE)).eval()


@pytest.fixture
def batch():
    torch.manual_seed(1)
    layout = Layout(torch.arange(6)[None] < torch.tensor([6, 4])[:, None])
    return layout.keep(torch.randn(2, 6, 16)), layout


def test_a_stack_is_followed_from_block_to_block(batch):
    x, layout = batch
    module = stack(scheme="euler")
    found = trace(module, x, layout)
    states = module(x, layout, return_hidden_states=True).hidden_states
    assert found.times == [0.0, 1.0, 2.0, 3.0] and found.evaluations.tolist() == [3.0, 3.0]
    for place, state in enumerate(states):
        torch.testing.assert_close(found.rms[place, 1], state[1, :4].square().mean().sqrt())
    expected = torch.nn.functional.cosine_similarity(states[1][1, :4], states[2][1, :4], dim=-1).mean()
    torch.testing.assert_close(found.cosine[1, 1], expected)


def test_local_error_falls_with_the_blocks_time(batch):
    """A third-order pair estimates an error of order h³; four times smaller blocks: 64 times less."""
    x, layout = batch
    coarse, fine = (
        trace(stack(scheme="rk4", total_time=h), x, layout).local_error[0].mean().item() for h in (0.2, 0.05)
    )
    assert 40 < coarse / fine < 100


def test_silent_blocks_do_nothing(batch):
    module = stack(scheme="rk2")
    with torch.no_grad():
        for field in module.fields:
            for projection in field.residual_projections():
                projection.weight.zero_()
                projection.bias.zero_()
    found = trace(module, *batch)
    torch.testing.assert_close(found.cosine, torch.ones(3, 2))
    assert found.local_error.max() == 0 and torch.equal(found.rms[0], found.rms[-1])


def test_evaluations_per_sample_of_adaptive_depths(batch):
    x, layout = batch
    x = x * torch.tensor([0.3, 4.0]).view(-1, 1, 1)
    torch.manual_seed(0)
    config = continuous_config(16, 3.0, tolerance=1e-4, scheme="bosh3")
    depths = [stack(scheme="bosh3", tolerance=1e-4), ContinuousDepth(config, DepthEmbeddedField(SHAPE, 3.0)).eval()]
    for module in depths:
        found = trace(module, x, layout)
        assert len(set(found.evaluations.tolist())) == 2
        mean = module(x, layout).statistics["evaluations"]
        assert found.evaluations.mean().item() == pytest.approx(float(mean))
        assert len(found.times) == 4


def test_only_in_evaluation_mode_and_only_along_time(batch):
    with pytest.raises(ValueError, match="evaluation mode"):
        trace(stack().train(), *batch)
    with pytest.raises(ValueError, match="has no trajectory in time"):
        trace(torch.nn.Identity().eval(), *batch)
