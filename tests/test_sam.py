"""Sharpness-aware minimisation is two plain passes, with one set of negatives."""

import contextlib
import copy

import pytest
import torch
from accelerate import Accelerator
from torch import nn

import timm_jem
from timm_jem import InputError, ObjectiveConfig, ReplayBuffer, SGLDConfig, uniform_noise
from timm_jem.modes import batch_norms
from timm_jem.training import Batch, Learner, MaximumLikelihood
from timm_jem.training.sam import SAM

SHAPE = (1, 8, 8)


@pytest.mark.parametrize("adaptive", [True, False])
def test_the_ascent_is_the_papers_and_undone_to_the_bit(adaptive):
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(5, 3)), nn.Parameter(torch.randn(7)), nn.Parameter(torch.randn(2))]
    before = [w.detach().clone() for w in weights]
    (weights[0].pow(2).sum() * 3 + weights[1].sin().sum()).backward()  # the last one has no gradient
    g, w = (torch.cat([getattr(p, name).flatten() for p in weights[:2]]) for name in ("grad", "data"))
    e = w**2 * g * 0.5 / (w.abs() * g).norm() if adaptive else g * 0.5 / g.norm()
    with contextlib.suppress(KeyError), SAM(0.5, adaptive).ascended(weights):
        torch.testing.assert_close(torch.cat([p.data.flatten() for p in weights[:2]]), w + e)
        assert torch.equal(weights[2], before[2])
        raise KeyError
    assert all(torch.equal(p, b) for p, b in zip(weights, before, strict=True))


@pytest.mark.parametrize("rho", [2.0, 5.0])
@pytest.mark.parametrize("slope", [0.0, 1e-42, 1e-25])  # whose squares are 0
def test_where_there_is_no_slope_weights_stay(slope, rho):
    weight = nn.Parameter(torch.ones(3))
    weight.grad = torch.full((3,), slope)
    with SAM(rho).ascended([weight]):
        assert torch.equal(weight, torch.ones(3))


def test_a_slope_that_is_not_finite_is_seen():
    weight = nn.Parameter(torch.ones(3))
    weight.grad = torch.tensor([1.0, float("nan"), 1.0])
    with SAM().ascended([weight]):
        assert weight.isnan().all()
    assert torch.equal(weight, torch.ones(3))


@pytest.mark.parametrize("rho", [0, -1.0, float("nan"), "2"])
def test_a_radius_is_a_number_above_0(rho):
    with pytest.raises(InputError, match="rho of SAM"):
        SAM(rho)


@pytest.mark.parametrize("norm_layer", [None, "batchnorm2d"])
def test_an_iteration_written_out(norm_layer):
    """One step of SADA-JEM (arXiv 2209.07959) in plain code, in double precision: negatives drawn once, both passes on them,
    running statistics of the first pass and of the data alone."""
    torch.manual_seed(0)
    norm = {} if norm_layer is None else {"norm_layer": norm_layer}
    jem = timm_jem.create_model("wrn_10_1", num_classes=3, input_size=SHAPE, act_layer="silu", **norm).double().train()
    net = copy.deepcopy(jem.backbone)
    generator = torch.Generator().manual_seed(1)
    chains = uniform_noise((6, *SHAPE), generator=generator, dtype=torch.float64)
    buffer = ReplayBuffer(SHAPE, init=uniform_noise, generator=generator, capacity=6, restart_prob=0.0)
    buffer.chains = chains.clone()
    u, y = uniform_noise((6, *SHAPE), generator=generator, dtype=torch.float64), torch.arange(6) % 3

    method = MaximumLikelihood(
        jem,
        buffer,
        sgld=SGLDConfig(num_steps=3, noise_std=0.0, grad_clamp=1.0, pixel_clamp=1.0),
        objective=ObjectiveConfig(energy_l2=0.1),
    )
    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(jem, torch.optim.SGD(jem.parameters(), lr=0.1))
    learner = Learner(accelerator, model, jem, optimizer, None, method, generator=generator, sam=SAM(0.7))
    terms = learner.iterate([Batch(u, y)])

    v = chains.clone()
    net.eval()
    for _ in range(3):
        v.requires_grad_(True)
        slope = torch.autograd.grad(-net(v).logsumexp(1).sum(), v)[0]
        v = (v.detach() - slope.clamp(-1, 1)).clamp(-1, 1)
    torch.testing.assert_close(buffer.chains, v, rtol=0, atol=1e-10)

    def loss():
        data = net(u)
        momenta = [layer.momentum for layer in batch_norms(net)]
        for layer in batch_norms(net):
            layer.momentum = 0.0
        negatives = net(v)
        for layer, momentum in zip(batch_norms(net), momenta, strict=True):
            layer.momentum = momentum
        e_data, e_neg = -data.logsumexp(1), -negatives.logsumexp(1)
        l2 = 0.1 * (e_data.square().mean() + e_neg.square().mean())
        return nn.functional.cross_entropy(data, y) + e_data.mean() - e_neg.mean() + l2

    net.train()
    first = loss()
    statistics = {name: value.clone() for name, value in net.named_buffers()}
    weights = list(net.parameters())
    slopes = torch.autograd.grad(first, weights)
    norm = torch.cat([(w.abs() * g).flatten() for w, g in zip(weights, slopes, strict=True)]).norm()
    start = [w.detach().clone() for w in weights]
    with torch.no_grad():
        for w, g in zip(weights, slopes, strict=True):
            w += 0.7 * w**2 * g / norm
    second = loss()
    slopes = torch.autograd.grad(second, weights)
    for (name, ours), w, g in zip(jem.backbone.named_parameters(), start, slopes, strict=True):
        torch.testing.assert_close(ours, w - 0.1 * g, rtol=0, atol=1e-8, msg=name)
    for name, ours in jem.backbone.named_buffers():
        if ours.is_floating_point():
            torch.testing.assert_close(ours, statistics[name], rtol=0, atol=1e-10, msg=name)
    assert float(terms["sharpness"]) == pytest.approx((second - first).item(), abs=1e-10)
