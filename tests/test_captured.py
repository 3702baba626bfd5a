"""Chains whose passes are replayed from a CUDA graph are those of the plain passes."""

import itertools
import warnings

import pytest
import torch
from small_networks import SHAPE, Wells

import timm_jem
from timm_jem import SGLDConfig, captured, energy, sgld
from timm_jem.captured import CapturedEnergy
from timm_jem.modes import frozen

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CHAINS = SGLDConfig(num_steps=4, step_size=0.3, noise_std=0.05, grad_clamp=1.0, pixel_clamp=1.0)


def wells():
    net = Wells()
    return lambda u, *y: energy(net(u), *y)


def chains(energy_fn, u, y=None, **options):
    generator = torch.Generator(u.device).manual_seed(1)
    return sgld(energy_fn, u, CHAINS, y=y, generator=generator, **options)


class Recorded:
    """Stands in for a graph where there is no GPU: what a replay gives, and for which inputs."""

    def __init__(self, energy_fn, u, *labels):
        self.energy_fn, self.made_for, self.replays = energy_fn, (tuple(u.shape), len(labels)), 0

    def replay(self, u, *labels):
        self.replays += 1
        with torch.enable_grad():
            u = u.detach().requires_grad_(True)
            energies = self.energy_fn(u, *labels)
            return [energies.detach(), torch.autograd.grad(energies.sum(), u)[0]]


@pytest.mark.parametrize("labelled", [False, True])
def test_chains_follow_the_replayed_gradients_with_a_graph_for_each_shape(monkeypatch, labelled):
    monkeypatch.setattr(captured, "_Graph", Recorded)
    u, y = torch.rand(10, *SHAPE) * 2 - 1, torch.arange(10) % 3 if labelled else None
    replayed, plain = CapturedEnergy(wells()), wells()
    for _ in range(2):
        assert torch.equal(chains(replayed, u, y), chains(plain, u, y))
    chains(replayed, u, y, batch_size=6)
    made = {graph.made_for: graph.replays for graph in replayed._graphs.values()}
    assert made == {((10, *SHAPE), int(labelled)): 8, ((6, *SHAPE), int(labelled)): 4, ((4, *SHAPE), int(labelled)): 4}


def test_a_replay_scales_the_gradient_by_what_comes_back(monkeypatch):
    monkeypatch.setattr(captured, "_Graph", Recorded)
    u, factors = torch.rand(4, *SHAPE), torch.tensor([1.0, -2.0, 0.0, 3.0])
    grads = []
    for energy_fn in (CapturedEnergy(wells()), wells()):
        x = u.clone().requires_grad_(True)
        (energy_fn(x) * factors).sum().backward()
        grads.append(x.grad)
    assert torch.allclose(*grads, rtol=1e-6)


def test_what_cannot_be_captured_runs_as_it_is_and_says_so_once():
    u, replayed = torch.rand(5, *SHAPE) * 2 - 1, CapturedEnergy(wells())
    with pytest.warns(UserWarning, match=r"not captured as a CUDA graph \(they are on cpu\): they run as they are") as warned:
        first = chains(replayed, u)
    assert len(warned) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(first, chains(wells(), u))
        assert torch.equal(first, chains(replayed, u))


FAMILIES = [
    "resnet18", "convnext_atto", "vit_tiny_patch16_224", "mobilenetv3_small_050", "efficientnet_b0", "densenet121",
    "regnetx_002", "swin_tiny_patch4_window7_224", "deit_tiny_patch16_224", "wrn_16_2", "test_byobnet", "poolformerv2_s12",
    "levit_128s",
]  # fmt: skip


@needs_gpu
@pytest.mark.parametrize("name", FAMILIES)
def test_captured_chains_are_the_plain_ones(name):
    torch.manual_seed(0)
    jem = timm_jem.create_model(name, num_classes=10).cuda().eval()
    u, classes = torch.rand(4, *jem.input_size, device="cuda") * 2 - 1, torch.arange(4, device="cuda")
    layouts = (torch.contiguous_format, torch.channels_last)
    for bf16, layout, y in itertools.product((False, True), layouts, (None, classes)):
        jem = jem.to(memory_format=layout)

        def energy_fn(u, *y, jem=jem, bf16=bf16):
            with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
                logits = jem(jem.normalize(u))
            return energy(logits, *y)

        with frozen(jem), warnings.catch_warnings():
            warnings.simplefilter("error")
            replayed = CapturedEnergy(energy_fn)
            torch.testing.assert_close(chains(replayed, u, y), chains(energy_fn, u, y), rtol=0, atol=1e-3)
            with torch.no_grad():
                for parameter in jem.parameters():  # as an optimiser does
                    parameter.mul_(1.01)
            torch.testing.assert_close(chains(replayed, u, y), chains(energy_fn, u, y), rtol=0, atol=1e-3)


@needs_gpu
def test_a_network_that_waits_for_the_gpu_is_not_captured():
    net = Wells().cuda()

    def waits(u):
        return energy(net(u * float(u.abs().max() > -1)))

    u, replayed = torch.rand(4, *SHAPE, device="cuda"), CapturedEnergy(waits)
    with pytest.warns(UserWarning, match="not captured as a CUDA graph"):
        found = chains(replayed, u)
    assert torch.equal(found, chains(waits, u))
    torch.nn.functional.dropout(u)  # and all else goes on
    torch.cuda.empty_cache()
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
