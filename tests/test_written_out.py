"""Iterations of published methods against plain code, in double precision: weights, running statistics and chains."""

import contextlib
import copy

import pytest
import torch
from accelerate import Accelerator
from timm.optim import create_optimizer_v2
from torch import nn

import timm_jem
from timm_jem import ClassGaussians, ObjectiveConfig, ReplayBuffer, SGLDConfig, uniform_noise
from timm_jem.modes import batch_norms
from timm_jem.training import Batch, Learner, MaximumLikelihood
from timm_jem.training.sam import SAM

SHAPE = (1, 8, 8)


def network(norm_layer):
    """A joint energy model, whose input is pixels, and the same network once more."""
    torch.manual_seed(0)
    norm = {} if norm_layer is None else {"norm_layer": norm_layer}
    jem = timm_jem.create_model("wrn_10_1", num_classes=3, input_size=SHAPE, act_layer="silu", **norm).double().train()
    return jem, copy.deepcopy(jem.backbone)


def learner_of(jem, buffer, generator, sam=None, **settings):
    """As a run has it: plain SGD, with momentum where the weights are decayed."""
    method = MaximumLikelihood(jem, buffer, **settings)
    accelerator = Accelerator(cpu=True)
    optimizer = create_optimizer_v2(jem.backbone, opt="momentum", lr=0.1, weight_decay=0.01, filter_bias_and_bn=False)
    model, optimizer = accelerator.prepare(jem, optimizer)
    return Learner(accelerator, model, jem, optimizer, None, method, generator=generator, sam=sam)


@contextlib.contextmanager
def statistics_stay(net):
    momenta = {layer: layer.momentum for layer in batch_norms(net)}
    for layer in momenta:
        layer.momentum = 0.0
    yield
    for layer, momentum in momenta.items():
        layer.momentum = momentum


def statistics(net):
    return {name: value.clone() for name, value in net.named_buffers() if value.is_floating_point()}


def assert_same(net, weights, running):
    for (name, ours), weight in zip(net.named_parameters(), weights, strict=True):
        torch.testing.assert_close(ours, weight, rtol=0, atol=1e-8, msg=name)
    torch.testing.assert_close(statistics(net), running, rtol=0, atol=1e-10)


@pytest.mark.parametrize("norm_layer", [None, "batchnorm2d"])
def test_an_iteration_of_sada(norm_layer):
    """SADA-JEM (arXiv 2209.07959): negatives drawn once, two passes on them, running statistics of the first one and of the
    data alone; and with energy_l2, which its code has in the first pass only."""
    jem, net = network(norm_layer)
    generator = torch.Generator().manual_seed(1)
    chains = uniform_noise((6, *SHAPE), generator=generator, dtype=torch.float64)
    buffer = ReplayBuffer(SHAPE, init=uniform_noise, generator=generator, capacity=6, restart_prob=0.0)
    buffer.chains = chains.clone()
    u, y = uniform_noise((6, *SHAPE), generator=generator, dtype=torch.float64), torch.arange(6) % 3
    learner = learner_of(
        jem, buffer, generator, SAM(0.7), sgld=SGLDConfig(num_steps=3, noise_std=0.0, grad_clamp=1.0, pixel_clamp=1.0),
        objective=ObjectiveConfig(energy_l2=0.1),
    )  # fmt: skip
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
        with statistics_stay(net):
            negatives = net(v)
        e_data, e_neg = -data.logsumexp(1), -negatives.logsumexp(1)
        l2 = 0.1 * (e_data.square().mean() + e_neg.square().mean())
        return nn.functional.cross_entropy(data, y) + e_data.mean() - e_neg.mean() + l2

    net.train()
    first = loss()
    running = statistics(net)
    weights = list(net.parameters())
    slopes = torch.autograd.grad(first, weights)
    norm = torch.cat([(w.abs() * g).flatten() for w, g in zip(weights, slopes, strict=True)]).norm()
    start = [w.detach().clone() for w in weights]
    with torch.no_grad():
        for w, g in zip(weights, slopes, strict=True):
            w += 0.7 * w**2 * g / norm
    second = loss()
    slopes = torch.autograd.grad(second, weights)
    assert_same(jem.backbone, [w - 0.1 * (g + 0.01 * w) for w, g in zip(start, slopes, strict=True)], running)
    assert float(terms["sharpness"]) == pytest.approx((second - first).item(), abs=1e-10)


def test_two_iterations_of_jempp():
    """JEM++ (arXiv 2109.09032), as its code has it but for running statistics, which are of the images of p(x) alone: chains
    start from Gaussians of the classes, and move by batch statistics; each slope at the first convolution's output makes five
    inner steps of 0.2; the cross-entropy has images of its own; SGD with momentum decays all weights."""
    jem, net = network("batchnorm2d")
    for model in (jem.backbone, net):
        model.fc.weight.data *= 30  # slopes on both sides of their bound
    images = uniform_noise((60, *SHAPE), generator=torch.Generator().manual_seed(1))
    gaussians = ClassGaussians.fit(images, torch.arange(60).clamp(max=26) % 3, 3)  # of 9, 9 and 42 images
    starts = []
    buffer = ReplayBuffer(SHAPE, init=lambda *args, **options: starts.append(gaussians(*args, **options)) or starts[-1],
                          generator=torch.Generator().manual_seed(2), capacity=9, restart_prob=0.7)  # fmt: skip
    buffer.chains = buffer.chains.double()
    chains, rng = buffer.chains.clone(), torch.Generator().manual_seed(0)
    rng.set_state(buffer.generator.get_state())
    coins = torch.rand(2, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64) < 0.7
    batches = images[:40].double().view(2, 20, *SHAPE).split([6, 14], 1)
    y, y_ce = torch.arange(6) % 3, torch.arange(14) % 3

    learner = learner_of(
        jem, buffer, torch.Generator(), batch_norm="train", objective=ObjectiveConfig(),
        sgld=SGLDConfig(num_steps=3, step_size=1.0, noise_std=0.0, grad_clamp=1.0, pixel_clamp=1.0),
    )  # fmt: skip
    for u, u_ce in zip(*batches, strict=True):
        learner.iterate([Batch(u, y, u_ce, y_ce)])

    of_stem = []
    net.stem.register_forward_hook(lambda module, args, output: of_stem.append(output))
    weights, velocities = list(net.parameters()), [0.0] * len(list(net.parameters()))
    for u, u_ce, restarts, start in zip(*batches, coins, starts[1:], strict=True):
        slots = torch.randperm(9, generator=rng)[:6]
        v, places = chains[slots], torch.randperm(6, generator=rng)[: int(restarts.sum())]
        classes = (gaussians.weights / torch.empty(len(places), 3).exponential_(generator=rng)).argmax(1)
        z = torch.randn(len(places), gaussians.scales.shape[1], generator=rng) * gaussians.scales[classes]
        noise = torch.randn(len(places), *SHAPE, generator=rng)
        common = torch.einsum("ndr,nr->nd", gaussians.factors[classes].float(), z).view(-1, *SHAPE)
        fresh = gaussians.means[classes] + common + gaussians.residual_std[classes] * noise
        torch.testing.assert_close(start, fresh.clamp(-1, 1), rtol=0, atol=1e-6)  # in single precision
        v[places] = start.double()
        e_data = -net(u).logsumexp(1)
        running = statistics(net)
        with statistics_stay(net):
            for _ in range(3):
                energies = -net(v).logsumexp(1)
                p = torch.autograd.grad(energies.sum(), of_stem[-1])[0]
                for _ in range(5):
                    slope = nn.functional.conv_transpose2d(p, net.stem.weight, padding=1)
                    v = (v - 0.2 * slope.clamp(-1, 1)).clamp(-1, 1).detach()
            e_neg, of_ce = -net(v).logsumexp(1), net(u_ce)
        chains[slots] = v
        loss = e_data.mean() - e_neg.mean() + nn.functional.cross_entropy(of_ce, y_ce)
        slopes = torch.autograd.grad(loss, weights)
        with torch.no_grad():
            velocities = [0.9 * m + g + 0.01 * w for m, g, w in zip(velocities, slopes, weights, strict=True)]
            for w, m in zip(weights, velocities, strict=True):
                w -= 0.1 * m
    torch.testing.assert_close(buffer.chains, chains, rtol=0, atol=1e-10)
    assert_same(jem.backbone, weights, running)
