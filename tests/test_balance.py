"""Parts of a loss that pull alike at the weights."""

import pytest
import torch
from accelerate import Accelerator
from torch import nn

import timm_jem
from timm_jem import InputError, ObjectiveConfig, ReplayBuffer, SGLDConfig, uniform_noise
from timm_jem.training import Batch, Learner, MaximumLikelihood, Remedy
from timm_jem.training.balance import gradient_ratio
from timm_jem.training.sam import SAM

SHAPE = (1, 8, 8)


def test_a_ratio_by_hand():
    """Of a linear model the gradients are the inputs: (3, 4) against twice (5, 12) and a bias's 1, over two layers together."""
    layer = nn.Linear(2, 1)
    layer.weight.grad = kept = torch.ones(1, 2)
    frozen, unused = nn.Parameter(torch.ones(3), requires_grad=False), nn.Parameter(torch.ones(3))
    part = layer.weight[0] @ torch.tensor([3.0, 4.0])
    other = 2 * layer(torch.tensor([5.0, 12.0])).sum() * frozen.mean()
    ratio = gradient_ratio(part, other, [*layer.parameters(), frozen, unused])
    assert float(ratio) == pytest.approx(5 / (2 * (5**2 + 12**2 + 1) ** 0.5))
    assert not ratio.requires_grad
    assert torch.equal(layer.weight.grad, kept)
    (part + other).backward()  # the graph is still there


@pytest.mark.parametrize(
    ("slope", "other", "expected"),
    [
        (0.0, 2.0, 0.0),
        (0.0, 0.0, 0.0),
        (1.0, 0.0, 1e4),
        (1.0, 1e-30, 1e4),
        (torch.nan, 1.0, torch.nan),
        (1.0, torch.nan, torch.nan),
    ],
)
def test_where_there_is_no_slope_it_is_bounded_and_nan_stays(slope, other, expected):
    weight = nn.Parameter(torch.ones(()))
    assert float(gradient_ratio(slope * weight, other * weight, [weight])) == pytest.approx(expected, nan_ok=True)


def test_weights_that_have_no_gradient_are_named():
    weight = nn.Parameter(torch.ones(()))
    with pytest.raises(InputError, match="no weight has a gradient"):
        gradient_ratio(weight * 1, weight * 2, [nn.Parameter(torch.ones(()))])


def make(objective, sam=None, classes=None, **settings):
    torch.manual_seed(0)
    jem = timm_jem.create_model("wrn_10_1", num_classes=3, input_size=SHAPE, act_layer="silu").double().train()
    generator = torch.Generator().manual_seed(1)
    buffer = ReplayBuffer(SHAPE, init=uniform_noise, generator=generator, capacity=12, num_classes=classes)
    buffer.chains = buffer.chains.double()
    sgld = SGLDConfig(num_steps=2, pixel_clamp=1.0)
    method = MaximumLikelihood(jem, buffer, sgld=sgld, objective=objective, **settings)
    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(jem, torch.optim.SGD(jem.parameters(), lr=0.01))
    return Learner(accelerator, model, jem, optimizer, None, method, generator=torch.Generator().manual_seed(2), sam=sam)


def batch(seed=3):
    u = uniform_noise((4, *SHAPE), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Batch(u, torch.tensor([0, 1, 2, 0]), u.flip(-1), torch.tensor([0, 1, 2, 0]))


@pytest.mark.parametrize(
    "objective",
    [
        ObjectiveConfig(w_ce=2.0, w_x=0.6),
        ObjectiveConfig(w_x=0.3, w_xy=0.9, contrast="bce", label_smoothing=0.1),
        ObjectiveConfig(w_x=0.0, w_xy=0.5, contrast="softplus"),
    ],
)
def test_the_parts_pull_as_their_weights_say(objective):
    learner = make(objective, classes=3, balance=True)
    method, model, data = learner.method, learner.model, batch()
    drawn = method.draw(model, data, step=0, remedy=Remedy(), generator=learner.generator)
    terms = method.loss(model, drawn, remedy=Remedy())
    ce = nn.functional.cross_entropy(model(method.jem.normalize(data.u_ce)), data.y, label_smoothing=objective.label_smoothing)
    parts = objective.w_ce * ce, terms["loss"] - objective.w_ce * ce
    of_ce, of_energies = (
        torch.cat([g.flatten() for g in torch.autograd.grad(part, list(model.parameters()), retain_graph=True)]).norm()
        for part in parts
    )
    assert float(of_energies / of_ce) == pytest.approx((objective.w_x + objective.w_xy) / objective.w_ce)
    assert float(drawn.info["balance"]) > 0


def test_both_passes_of_sam_descend_one_loss_and_remedies_stay_as_they_are():
    learner = make(ObjectiveConfig(), sam=SAM(0.5), balance=True)
    learner.apply(Remedy(energy_l2=0.1), seed=5)
    ratios, losses, loss = [], [], learner.method.loss

    def seen(model, drawn, *, remedy):
        terms = loss(model, drawn, remedy=remedy)
        ratios.append(float(drawn.info["balance"]))
        losses.append({name: term.item() for name, term in terms.items()})
        return terms

    learner.method.loss = seen
    terms = learner.iterate([batch(3), batch(4)])
    assert ratios[:2] == ratios[2:]
    assert ratios[0] != ratios[1]  # of each batch
    assert float(terms["balance"]) == pytest.approx(sum(ratios[:2]) / 2)
    for ratio, of_batch in zip(ratios, losses, strict=True):
        assert of_batch["loss"] == pytest.approx(of_batch["ce"] + ratio * of_batch["gap"] + 0.1 * of_batch["l2"])
    mean = [sum(of_batch["loss"] for of_batch in part) / 2 for part in (losses[:2], losses[2:])]
    assert float(terms["sharpness"]) == pytest.approx(mean[1] - mean[0])


def test_cross_entropy_alone_has_nothing_to_balance_and_none_can_not_be_balanced_by():
    terms = make(ObjectiveConfig(w_x=0.0), balance=True).iterate([batch()])
    assert "balance" not in terms
    with pytest.raises(InputError, match="w_ce is 0"):
        make(ObjectiveConfig(w_ce=0.0), balance=True)
