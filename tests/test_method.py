"""Our iteration against the paper's algorithm 1, written out plainly."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from timm_jem import JEM, InputError, ObjectiveConfig, ReplayBuffer, SGLDConfig, uniform_noise
from timm_jem.evaluation.attacks import PGDConfig
from timm_jem.training import Batch, MaximumLikelihood, Remedy

SHAPE = (1, 4, 4)


class Tiny(nn.Module):
    num_classes = 3

    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4) if norm else nn.Identity()
        self.act = nn.SiLU()
        self.fc = nn.Linear(16, 3)

    def forward(self, x):
        return self.fc(self.act(self.norm(self.conv(x))).flatten(1))


def make(norm=False, classes=None, restart_prob=0.5):
    torch.manual_seed(0)
    jem = JEM(Tiny(norm), data_config={"input_size": SHAPE, "mean": (0.4,), "std": (0.3,)}).double()
    buffer = ReplayBuffer(
        SHAPE,
        init=uniform_noise,
        generator=torch.Generator().manual_seed(1),
        capacity=12,
        restart_prob=restart_prob,
        num_classes=classes,
    )
    buffer.chains = buffer.chains.double()
    return jem, buffer, torch.rand(6, *SHAPE, dtype=torch.float64) * 2 - 1, torch.tensor([0, 1, 2, 2, 0, 1])


def joint_step(model, jem, u, y, buffer, *, sgld_config, objective, data_noise, generator, u_ce=None, y_ce=None, **settings):
    """An iteration up to the loss, with noise on the images as the stream of batches adds it."""
    method = MaximumLikelihood(jem, buffer, sgld=sgld_config, objective=objective, **settings)
    noisy = u + data_noise * torch.randn(u.shape, generator=generator, dtype=u.dtype) if data_noise else u
    batch = Batch(noisy, y, u_ce, y_ce, clean=u)
    drawn = method.draw(model, batch, step=0, remedy=Remedy(), generator=generator)
    return method.loss(model, drawn, remedy=Remedy()) | drawn.info


SGLD = SGLDConfig(num_steps=5, step_size=0.7, noise_std=0.05)


def test_jitter_is_for_drawing_and_moves_no_chain_of_training():
    ended = []
    for jitter in (0, 2):
        jem, buffer, u, y = make()
        options = {"data_noise": 0.0, "objective": ObjectiveConfig(), "generator": torch.Generator().manual_seed(2)}
        joint_step(jem, jem, u, y, buffer, sgld_config=replace(SGLD, jitter=jitter), **options)
        ended.append(buffer.chains)
    assert torch.equal(*ended)


@pytest.mark.parametrize("conditional", [False, True])
def test_a_whole_iteration_equals_the_plain_algorithm(conditional):
    jem, buffer, u, y = make(classes=3 if conditional else None)
    objective = ObjectiveConfig(w_x=0.8, w_xy=0.6 if conditional else 0.0, energy_l2=0.05)
    weights = [p.detach().clone().requires_grad_(True) for p in jem.parameters()]

    # What our step will draw, from generators in the same state.
    chain_rng, noise_rng = (torch.Generator().manual_seed(seed) for seed in (1, 2))
    chain_rng.set_state(buffer.generator.get_state())
    twin = ReplayBuffer(SHAPE, init=uniform_noise, generator=torch.Generator().manual_seed(1), capacity=12, restart_prob=0.5,
                        num_classes=3 if conditional else None)  # fmt: skip
    twin.chains, twin.generator = buffer.chains.clone(), chain_rng
    chains, slots = twin.draw(6, y if conditional else None)
    noises = [torch.randn(6, *SHAPE, dtype=torch.float64, generator=noise_rng)]
    if conditional:
        torch.empty(6, 3).exponential_(generator=noise_rng)  # classes for images without a label; here all have one
    noises += [torch.randn(6, *SHAPE, dtype=torch.float64, generator=noise_rng) for _ in range(5)]

    optimizer = torch.optim.Adam(jem.parameters(), lr=0.01)
    terms = joint_step(
        jem, jem, u, y, buffer, sgld_config=SGLD, objective=objective, data_noise=0.03,
        generator=torch.Generator().manual_seed(2),
    )  # fmt: skip
    terms["loss"].backward()
    optimizer.step()

    # The paper's algorithm 1, without any of our code.
    def f(pixels):
        conv_w, conv_b, fc_w, fc_b = weights
        x = ((pixels + 1) / 2 - 0.4) / 0.3
        h = nn.functional.conv2d(x, conv_w, conv_b)
        return (h * torch.sigmoid(h)).flatten(1) @ fc_w.T + fc_b

    def chain_energy(pixels):
        logits = f(pixels)
        return -logits[range(6), y] if conditional else -logits.exp().sum(1).log()

    for noise in noises[1:]:
        chains = chains.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(chain_energy(chains).sum(), chains)
        chains = (chains - 0.7 * gradient + 0.05 * noise).detach()
    real, fake = f(u + 0.03 * noises[0]), f(chains)
    e_real, e_fake = -real.exp().sum(1).log(), -fake.exp().sum(1).log()
    loss = -real.log_softmax(1)[range(6), y].mean() + 0.8 * (e_real.mean() - e_fake.mean())
    if conditional:
        e_real, e_fake = -real[range(6), y], -fake[range(6), y]
        loss = loss + 0.6 * (e_real.mean() - e_fake.mean())
    loss = loss + 0.05 * (e_real.square().mean() + e_fake.square().mean())
    loss.backward()
    plain = torch.optim.Adam(weights, lr=0.01)
    plain.step()

    tolerance = {"rtol": 0, "atol": 1e-6}
    torch.testing.assert_close(terms["loss"], loss, **tolerance)
    torch.testing.assert_close(buffer.chains[slots], chains, **tolerance)
    for parameter, weight in zip(jem.parameters(), weights, strict=True):
        torch.testing.assert_close(parameter.grad, weight.grad, **tolerance)
        torch.testing.assert_close(parameter, weight, **tolerance)
    assert (twin.chains == buffer.chains).flatten(1).all(1).sum() == 6  # the other slots are as they were


def test_an_iteration_of_dat_written_out():
    """DAT (arXiv 2510.13872): chains of the class logit by steps of one ℓ2 length from fresh starts, BCE on logsumexp, and
    the cross-entropy of images attacked in an ℓ2 ball. Lengths are in pixels in [-1, 1], the attack's in [0, 1]."""
    jem, buffer, u, y = make(classes=3, restart_prob=1.0)
    eta, ball, attack_step = 0.5, 0.3, 0.12
    sgld = SGLDConfig(num_steps=4, step_size=eta / 16**0.5, noise_std=0.0, normalize_grad=True, pixel_clamp=1.0)
    attack = PGDConfig("l2", ball, 3, attack_step)
    twin = ReplayBuffer(SHAPE, init=uniform_noise, generator=torch.Generator().manual_seed(1), capacity=12, restart_prob=1.0,
                        num_classes=3)  # fmt: skip
    twin.generator.set_state(buffer.generator.get_state())
    start = chains = twin.draw(6, y)[0].double()
    rng = torch.Generator().manual_seed(2)
    direction = torch.randn(u.shape, dtype=torch.float64, generator=rng)
    radius = torch.rand(6, 1, 1, 1, dtype=torch.float64, generator=rng) ** (1 / 16)
    terms = joint_step(jem, jem, u, y, buffer, sgld_config=sgld, objective=ObjectiveConfig(contrast="bce"), data_noise=0.0,
                       generator=torch.Generator().manual_seed(2), attack=attack)  # fmt: skip

    def f(pixels):
        return jem.backbone(((pixels + 1) / 2 - 0.4) / 0.3)

    def by_length(gradient):
        return gradient / gradient.flatten(1).norm(dim=1)[:, None, None, None]

    for _ in range(4):
        chains = chains.detach().requires_grad_(True)
        slope = torch.autograd.grad(f(chains)[range(6), y].sum(), chains)[0]
        moved = chains.detach() + eta * by_length(slope)
        torch.testing.assert_close((moved - chains).flatten(1).norm(dim=1), torch.full((6,), eta, dtype=torch.float64))
        chains = moved.clamp(-1, 1)
    assert (chains - start).flatten(1).norm(dim=1).max() <= 4 * eta
    images = (u + 1) / 2
    attacked = (images + ball * radius * by_length(direction)).clamp(0, 1)
    for _ in range(3):
        attacked = attacked.detach().requires_grad_(True)
        loss = nn.functional.cross_entropy(f(2 * attacked - 1), y, reduction="sum")
        attacked = attacked.detach() + attack_step * by_length(torch.autograd.grad(loss, attacked)[0])
        away = attacked - images
        length = away.flatten(1).norm(dim=1)[:, None, None, None]
        attacked = (images + away * (ball / length.clamp(min=ball))).clamp(0, 1)
    s_data, s_neg = f(u).exp().sum(1).log(), f(chains).exp().sum(1).log()
    bce = (nn.functional.softplus(-s_data).mean() + nn.functional.softplus(s_neg).mean()) / 2
    expected = bce + nn.functional.cross_entropy(f(2 * attacked - 1), y)
    torch.testing.assert_close(terms["loss"], expected, rtol=0, atol=1e-8)


def run(jem, buffer, u, y, **kwargs):
    settings = {"sgld_config": SGLD, "objective": ObjectiveConfig(), "data_noise": 0.0}
    settings["generator"] = torch.Generator().manual_seed(2)
    return joint_step(jem, jem, u, y, buffer, **{**settings, **kwargs})


def test_one_forward_for_data_and_chains_where_nothing_mixes_them():
    for norm, expected in ((False, [12]), (True, [6, 6])):
        jem, buffer, u, y = make(norm)
        jem.train()
        sizes = []
        jem.register_forward_hook(lambda module, args, _, sizes=sizes: sizes.append(len(args[0])) if module.training else None)
        run(jem, buffer, u, y)
        assert sizes == expected


def test_without_an_energy_term_it_is_cross_entropy_alone():
    jem, buffer, u, y = make()
    before = buffer.chains.clone()
    terms = run(jem, buffer, u, y, objective=ObjectiveConfig(w_x=0.0))
    assert terms["loss"] == nn.functional.cross_entropy(jem(jem.normalize(u)), y)
    assert torch.equal(buffer.chains, before)


@pytest.mark.parametrize("norm", [False, True])
def test_cross_entropy_can_have_its_own_views(norm):
    jem, buffer, u, y = make(norm)
    u_ce = u.flip(-1)
    terms = run(jem.eval(), buffer, u, y, u_ce=u_ce)
    torch.testing.assert_close(terms["ce"], nn.functional.cross_entropy(jem(jem.normalize(u_ce)), y))
    torch.testing.assert_close(terms["energy_data"], jem.pixel_energy(u).mean())
    only = run(jem, buffer, u, y, u_ce=u_ce, objective=ObjectiveConfig(w_x=0.0))
    torch.testing.assert_close(only["loss"], terms["ce"])


def test_chains_leave_batch_norm_and_gradients_alone():
    jem, buffer, u, y = make(norm=True)
    jem.train()
    before = {k: v.clone() for k, v in jem.backbone.state_dict().items()}
    terms = run(jem, buffer, u, y)
    # The running statistics are those of the data alone: evaluation meets images, not chains.
    assert jem.backbone.norm.num_batches_tracked == 1
    assert jem.backbone.norm.track_running_stats
    features = nn.functional.conv2d(jem.normalize(u), before["conv.weight"], before["conv.bias"])
    torch.testing.assert_close(jem.backbone.norm.running_mean, 0.1 * features.mean((0, 2, 3)))
    assert all(p.grad is None for p in jem.parameters())
    assert all(p.requires_grad for p in jem.parameters())
    terms["loss"].backward()
    assert all(p.grad is not None for p in jem.parameters())
    assert torch.equal(before["conv.weight"], jem.backbone.conv.weight)


def test_the_loss_is_that_of_the_model_that_is_handed_in():
    jem, buffer, u, y = make()
    calls = []

    class Prepared(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = jem

        def forward(self, x):
            calls.append(len(x))
            return self.inner(x)

    joint_step(
        Prepared(), jem, u, y, buffer, sgld_config=SGLD, objective=ObjectiveConfig(), data_noise=0.0,
        generator=torch.Generator(),
    )  # fmt: skip
    assert calls == [6] * 5 + [12]


def classes_drawn(y, frequencies, times=1):
    jem, buffer, _, _ = make(classes=3, restart_prob=0.0)
    drawn, rng = [], torch.Generator().manual_seed(2)
    draw = buffer.draw
    buffer.draw = lambda n, y: drawn.append(y) or draw(n, y)
    u = torch.zeros(len(y), *SHAPE, dtype=torch.float64)
    for _ in range(times):
        run(jem, buffer, u, y, sgld_config=SGLDConfig(num_steps=1), class_frequencies=frequencies, generator=rng)
    return torch.cat(drawn)


def test_images_without_a_label_get_chains_of_the_given_classes():
    y = torch.tensor([0, -1, 2, -1, 0, -1])
    assert classes_drawn(y, torch.tensor([0.0, 5.0, 0.0])).tolist() == [0, 1, 2, 1, 0, 1]
    for frequencies in (torch.tensor([0.2, 0.3, 0.5]), None):
        counts = classes_drawn(torch.full((4,), -1), frequencies, times=200).bincount(minlength=3)
        expected = 800 * (torch.ones(3) / 3 if frequencies is None else frequencies)
        assert ((counts - expected).abs() < 5 * expected.sqrt()).all()


def test_chains_grow_with_what_is_told_apart():
    jem, buffer, u, y = make(classes=3)
    sgld = SGLDConfig(num_steps=4, noise_std=0.0)
    method = MaximumLikelihood(jem, buffer, sgld=sgld, objective=ObjectiveConfig(w_x=0.0, w_xy=1.0), ramp_auc=0.0)
    generator, told = torch.Generator().manual_seed(0), []
    for step in range(20):
        drawn = method.draw(jem, Batch(u, y), step=step, remedy=Remedy(), generator=generator)
        told.append(int(drawn.info["num_steps"]))
    assert told == [1] * 8 + [2] * 8 + [3] * 4
    data, neg = jem.pixel_energy(u, y), jem.pixel_energy(drawn.u_neg, y)
    assert float(drawn.info["auc"]) == pytest.approx(float((neg[:, None] > data).double().mean()))
    assert method.adapted(sgld, 20).num_steps == 3
    again = MaximumLikelihood(jem, buffer, sgld=sgld, objective=ObjectiveConfig(), ramp_auc=0.0)
    again.load_state_dict(method.state_dict())
    assert again.sgld_at(0, Remedy()).num_steps == 3


def test_images_without_a_label_are_told_apart_by_all_classes():
    """As in the loss: not by the class that was drawn for their chain."""
    jem, buffer, u, y = make(classes=3)
    y[::2] = -1
    objective = ObjectiveConfig(w_x=0.0, w_xy=1.0)
    method = MaximumLikelihood(jem, buffer, sgld=SGLDConfig(num_steps=4), objective=objective, ramp_auc=0.0)
    drawn = method.draw(jem, Batch(u, y), step=0, remedy=Remedy(), generator=torch.Generator().manual_seed(0))
    known = y.clamp(min=0)
    data, neg = (torch.where(y == -1, jem.pixel_energy(v), jem.pixel_energy(v, known)) for v in (u, drawn.u_neg))
    assert float(drawn.info["auc"]) == pytest.approx(float((neg[:, None] > data).double().mean()))


def test_what_the_loss_has_not_is_not_watched():
    jem, buffer, *_ = make()
    watched = [MaximumLikelihood(jem, buffer, sgld=SGLDConfig(), objective=ObjectiveConfig(w_ce=w)).watched for w in (0.0, 0.5)]
    assert watched == [("gap", "gap_xy", "energy_data", "energy_neg"), MaximumLikelihood.watched]


def test_nothing_waits_for_the_device():
    class Ops(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            ops.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    for classes, objective in ((None, ObjectiveConfig()), (3, ObjectiveConfig(w_xy=1.0, energy_l2=0.1))):
        jem, buffer, u, y = make(norm=True, classes=classes)
        y[::2] = -1
        for policy in ("eval", "frozen", "train"):
            ops, ways = [], {"objective": objective, "batch_norm": policy, "attack": PGDConfig("l2", 0.5, 2), "balance": True}
            # No more images than a class has slots, so that the buffer needn't check that they suffice.
            with Ops():
                run(jem.train(), buffer, u[:3], y[:3], u_ce=u, y_ce=y, **ways,
                    sgld_config=SGLDConfig(num_steps=2, pixel_clamp=1.0))["loss"].backward()  # fmt: skip
            assert ops.count("_local_scalar_dense") == 1  # the number of restarts, which is the host's
            assert not {"nonzero", "masked_select", "is_nonzero", "_unique2"} & set(ops)


def test_conditional_chains_can_be_negatives_of_x():
    jem, buffer, u, y = make(classes=3, restart_prob=0.0)
    before = buffer.chains.clone()
    config = SGLDConfig(num_steps=1, step_size=0.7, noise_std=0.0)
    terms = run(jem, buffer, u, y, sgld_config=config)
    moved = (buffer.chains != before).flatten(1).any(1)
    start = before[moved].requires_grad_(True)
    logits = jem(jem.normalize(start))
    (gradient,) = torch.autograd.grad(-logits[range(6), buffer.labels[moved]].sum(), start)
    torch.testing.assert_close(buffer.chains[moved], start - 0.7 * gradient)
    torch.testing.assert_close(terms["energy_neg"], jem.pixel_energy(buffer.chains[moved]).mean())
    assert "gap_xy" not in terms


def test_chains_of_images_without_a_label_are_negatives_of_x():
    jem, buffer, u, y = make(classes=3, restart_prob=0.0)
    y[[0, 3]] = -1
    before = buffer.chains.clone()
    terms = run(jem, buffer, u, y, objective=ObjectiveConfig(w_x=0.0, w_xy=1.0))
    moved = (buffer.chains != before).flatten(1).any(1)
    logits, labels = jem(jem.normalize(buffer.chains[moved])), buffer.labels[moved]
    data = jem(jem.normalize(u))
    e_data = torch.where(y == -1, -data.logsumexp(1), -data[range(6), y])
    # Which two of the chains were drawn for images without a label is not told: one choice gives the gap.
    of_x, of_xy = -logits.logsumexp(1), -logits[range(6), labels]
    gaps = [e_data.mean() - (of_xy.sum() + (of_x - of_xy)[[i, j]].sum()) / 6 for i in range(6) for j in range(i)]
    assert min((gap - terms["gap_xy"]).abs() for gap in gaps) < 1e-9


def test_cross_entropy_can_have_a_batch_of_its_own():
    for norm in (False, True):
        jem, buffer, u, y = make(norm)
        rng = torch.Generator().manual_seed(5)
        u_ce, y_ce = torch.rand(9, *SHAPE, generator=rng, dtype=torch.float64), torch.arange(9) % 3
        y_ce[4] = -1
        known = y_ce != -1
        expected = nn.functional.cross_entropy(jem.eval()(jem.normalize(u_ce))[known], y_ce[known])
        terms = run(jem, buffer, u, torch.full_like(y, -1), u_ce=u_ce, y_ce=y_ce)
        torch.testing.assert_close(terms["ce"], expected)
        torch.testing.assert_close(terms["energy_data"], jem.pixel_energy(u).mean())
        alone = run(jem, buffer, u, y, u_ce=u_ce, y_ce=y_ce, objective=ObjectiveConfig(w_x=0.0))
        torch.testing.assert_close(alone["loss"], expected)
    with pytest.raises(InputError, match="y_ce"):
        run(jem, buffer, u, y, u_ce=u_ce)


def modes(jem):
    """(batch size, BatchNorm in train mode, statistics tracked, other layers in train mode) of each forward."""
    seen, norm = [], jem.backbone.norm

    def note(module, args, _):
        seen.append((len(args[0]), norm.training, norm.track_running_stats, module.backbone.act.training))

    jem.register_forward_hook(note)
    return seen


def test_batch_norm_policies():
    chains = {"eval": (6, False, True, False), "frozen": (6, False, True, False), "train": (6, True, False, False)}
    losses = {
        "eval": [(6, True, True, True), (6, True, False, True)],
        "frozen": [(12, False, True, True)],
        "train": [(6, True, True, True), (6, True, False, True)],
    }
    for policy in chains:
        jem, buffer, u, y = make(norm=True)
        jem.train()
        seen = modes(jem)
        run(jem, buffer, u, y, batch_norm=policy)
        assert seen == [chains[policy]] * 5 + losses[policy]
        assert all(m.training for m in jem.modules())
        assert jem.backbone.norm.track_running_stats
        assert jem.backbone.norm.num_batches_tracked == (0 if policy == "frozen" else 1)
        seen.clear()
        run(jem, buffer, u, y, batch_norm=policy, objective=ObjectiveConfig(w_x=0.0))
        assert [forward[1] for forward in seen] == [policy != "frozen"]
    with pytest.raises(InputError, match="'trian'"):
        run(jem, buffer, u, y, batch_norm="trian")


def test_frozen_batch_norm_is_the_loss_of_eval_mode():
    jem, buffer, u, y = make(norm=True)
    state = buffer.state_dict() | {"chains": buffer.chains.clone()}
    terms = run(jem.train(), buffer, u, y, batch_norm="frozen")
    buffer.load_state_dict(state)
    assert terms["loss"] == run(jem.eval(), buffer, u, y)["loss"]


def test_gradient_checkpointing_goes_without_batch_norm_alone():
    for norm in (False, True):
        jem, buffer, u, y = make(norm)
        jem.train().backbone.grad_checkpointing = True
        if norm:
            with pytest.raises(InputError, match="set_grad_checkpointing"):
                run(jem, buffer, u, y)
        else:
            assert run(jem, buffer, u, y)["loss"].isfinite()


def test_modes_are_restored_after_an_error():
    jem, buffer, u, y = make(norm=True)
    jem.train()
    jem.backbone.fc = nn.Linear(1, 3)
    for policy in ("eval", "frozen", "train"):
        for objective in (ObjectiveConfig(), ObjectiveConfig(w_x=0.0)):
            with pytest.raises(RuntimeError):
                run(jem, buffer, u, y, batch_norm=policy, objective=objective)
            assert all(m.training for m in jem.modules())
            assert all(p.requires_grad for p in jem.parameters())
            assert jem.backbone.norm.track_running_stats


def test_terms_say_how_the_chains_are():
    jem, buffer, u, y = make(restart_prob=0.0)
    before = buffer.chains.clone()
    u = u.clamp(-0.4, 0.4)
    u[:3] = 0.9
    clamped = SGLDConfig(num_steps=3, step_size=5.0, noise_std=0.3, pixel_clamp=0.5)
    terms = run(jem, buffer, u, y, sgld_config=clamped, data_noise=10.0)
    moved = (buffer.chains != before).flatten(1).any(1)
    chains, start = buffer.chains[moved], before[moved]
    torch.testing.assert_close(terms["chain_rms"], chains.square().mean().sqrt())
    torch.testing.assert_close(terms["chain_moved"], (chains - start).square().mean().sqrt())
    torch.testing.assert_close(terms["chain_spread"], chains.std(0, correction=0).mean())
    at_clamp = (chains.abs() == 0.5).float().mean()
    assert at_clamp > 0
    torch.testing.assert_close(terms["chain_saturated"], at_clamp - 0.5)  # half of the images' pixels are beyond
    assert not any(term.requires_grad for name, term in terms.items() if name != "loss")
    assert not [name for name in run(jem, buffer, u, y, objective=ObjectiveConfig(w_x=0.0)) if name.startswith("chain")]
    single = run(jem, buffer, u[:1], y[:1])
    assert "chain_spread" not in single
    assert "chain_saturated" not in single


def test_bad_input_is_named():
    jem, buffer, u, y = make()
    with pytest.raises(InputError, match="num_classes"):
        run(jem, buffer, u, y, objective=ObjectiveConfig(w_xy=1.0))
    jem, buffer, u, y = make(classes=3)
    with pytest.raises(InputError, match="class_frequencies"):
        run(jem, buffer, u, y, class_frequencies=torch.ones(4))
