import pytest
import torch
import torch.nn.functional as F
from timm.loss import LabelSmoothingCrossEntropy

from timm_jem import InputError, ObjectiveConfig, joint_loss


def batch():
    generator = torch.Generator().manual_seed(0)
    logits, logits_neg = (torch.randn(n, 4, generator=generator, dtype=torch.float64, requires_grad=True) for n in (6, 5))
    y, y_neg = (torch.randint(4, (n,), generator=generator) for n in (6, 5))
    return logits, y, logits_neg, y_neg


def test_loss_is_the_sum_of_its_weighted_terms():
    logits, y, logits_neg, y_neg = batch()
    terms = joint_loss(logits, y, logits_neg, y_neg, ObjectiveConfig(w_ce=0.5, w_x=0.7, w_xy=0.9, energy_l2=0.1))
    e_data, e_neg = -logits.exp().sum(1).log(), -logits_neg.exp().sum(1).log()
    exy_data, exy_neg = -logits[range(6), y], -logits_neg[range(5), y_neg]
    expected = (
        0.5 * (exy_data - e_data).mean()  # cross-entropy is E(x, y) − E(x)
        + 0.7 * (e_data.mean() - e_neg.mean())
        + 0.9 * (exy_data.mean() - exy_neg.mean())
        + 0.1 * ((exy_data**2).mean() + (exy_neg**2).mean())
    )
    torch.testing.assert_close(terms["loss"], expected)
    torch.testing.assert_close(terms["gap"], terms["energy_data"] - terms["energy_neg"])
    assert set(terms) == {"loss", "ce", "energy_data", "energy_neg", "gap", "gap_xy", "l2"}
    assert [name for name, term in terms.items() if term.requires_grad] == ["loss"]


def test_a_balance_multiplies_what_the_chains_are_for():
    logits, y, logits_neg, y_neg = batch()
    loss = lambda balance=None, **weights: joint_loss(  # noqa: E731
        logits, y, logits_neg, y_neg, ObjectiveConfig(**weights), balance=balance
    )["loss"]
    balanced = loss(torch.tensor(3.0, dtype=torch.float64), w_ce=0.5, w_x=0.7, w_xy=0.9, energy_l2=0.1)
    torch.testing.assert_close(balanced, loss(w_ce=0.5, w_x=2.1, w_xy=2.7, energy_l2=0.1))


def test_gradient_in_closed_form():
    logits, y, logits_neg, _ = batch()
    joint_loss(logits, y, logits_neg)["loss"].backward()
    # d/df of CE + E(x) is −onehot: the softmaxes cancel. Of −E(x_neg) it is +softmax.
    torch.testing.assert_close(logits.grad, -F.one_hot(y, 4).double() / 6)
    torch.testing.assert_close(logits_neg.grad, logits_neg.softmax(1) / 5)


def test_softplus_lets_go_of_chains_that_are_left_behind():
    """The linear contrast's gradient times 2σ(gap): the same where the gap is 0, none where chains are far above the data."""
    for shift in (-30.0, -2.0, 0.0, 30.0):
        gradients, gaps = [], []
        for contrast in ("linear", "softplus"):
            logits, y, logits_neg, y_neg = batch()
            config = ObjectiveConfig(w_ce=0, w_x=0.7, w_xy=0.9, contrast=contrast)
            terms = joint_loss(logits, y, logits_neg + shift, y_neg, config)
            gaps.append((terms["gap"], terms["gap_xy"]))
            gradients.append(torch.autograd.grad(terms["loss"], (logits, logits_neg)))
        assert gaps[0] == gaps[1]
        (of_data, of_chains), (soft, soft_chains) = gradients
        slope, slope_xy = (2 * torch.sigmoid(gap) for gap in gaps[0])
        logits, y, logits_neg, y_neg = batch()
        expected = -0.7 * slope * logits.softmax(1) / 6 - 0.9 * slope_xy * F.one_hot(y, 4).double() / 6
        torch.testing.assert_close(soft, expected)
        torch.testing.assert_close(of_data, -0.7 * logits.softmax(1) / 6 - 0.9 * F.one_hot(y, 4).double() / 6)
        expected = 0.7 * slope * logits_neg.softmax(1) / 5 + 0.9 * slope_xy * F.one_hot(y_neg, 4).double() / 5
        torch.testing.assert_close(soft_chains, expected)
        assert of_chains.abs().max() > 0.01


def test_bce_tells_images_from_chains():
    logits, y, logits_neg, y_neg = batch()
    logits_neg = torch.cat([logits_neg, logits_neg[:1] * 0.3])  # as many as images
    y_neg = torch.cat([y_neg, y_neg[:1]])
    config = ObjectiveConfig(w_ce=0, w_x=0.7, w_xy=0.9, contrast="bce")
    are_images = torch.tensor([1.0] * 6 + [0.0] * 6, dtype=torch.float64)
    of_x = F.binary_cross_entropy_with_logits(torch.cat([logits, logits_neg]).logsumexp(1), are_images)
    of_xy = F.binary_cross_entropy_with_logits(torch.cat([logits[range(6), y], logits_neg[range(6), y_neg]]), are_images)
    torch.testing.assert_close(joint_loss(logits, y, logits_neg, y_neg, config)["loss"], 0.7 * of_x + 0.9 * of_xy)


def test_the_l2_term_takes_the_energies_that_are_trained():
    logits, y, logits_neg, y_neg = batch()
    of_x = joint_loss(logits, y, logits_neg, y_neg, ObjectiveConfig(energy_l2=1.0))["l2"]
    torch.testing.assert_close(of_x, logits.logsumexp(1).square().mean() + logits_neg.logsumexp(1).square().mean())


def test_without_chains_it_is_cross_entropy():
    logits, y, _, _ = batch()
    assert joint_loss(logits, y)["loss"] == F.cross_entropy(logits, y)


def test_images_without_a_label_count_as_x():
    logits, y, logits_neg, y_neg = batch()
    y = torch.where(torch.tensor([True, False, True, True, False, True]), y, -1)
    config = ObjectiveConfig(w_x=0.7, w_xy=0.9, energy_l2=0.1)
    terms = joint_loss(logits, y, logits_neg, y_neg, config)
    e_data = [-logits[i].exp().sum().log() if label < 0 else -logits[i, label] for i, label in enumerate(y.tolist())]
    e_data, e_neg = torch.stack(e_data), -logits_neg[range(5), y_neg]
    known = y >= 0
    expected = (
        -logits[known].log_softmax(1)[range(4), y[known]].mean()
        + 0.7 * (logits_neg.logsumexp(1).mean() - logits.logsumexp(1).mean())
        + 0.9 * (e_data.mean() - e_neg.mean())
        + 0.1 * (e_data.square().mean() + e_neg.square().mean())
    )
    torch.testing.assert_close(terms["loss"], expected)
    torch.testing.assert_close(terms["gap_xy"], e_data.mean() - e_neg.mean())


def test_negatives_of_x_and_of_x_and_y_have_the_same_expected_gradient():
    logits = batch()[0].detach().requires_grad_(True)
    (of_x,) = torch.autograd.grad(-logits.logsumexp(1).sum(), logits)
    of_xy = [torch.autograd.grad(-logits[:, y].sum(), logits)[0] * logits.softmax(1)[:, y : y + 1] for y in range(4)]
    torch.testing.assert_close(sum(of_xy), of_x)


def test_chains_like_the_images_leave_no_gradient():
    """Whatever the model: where chains have the images' distribution, there is nothing to learn about x."""
    logits, y, _, _ = batch()
    y = torch.where(torch.tensor([True, False, True, False, False, True]), y, -1)
    chains = logits.detach().clone().requires_grad_(True)
    terms = joint_loss(logits, y, chains, y, ObjectiveConfig(w_ce=0.0, w_x=0.0, w_xy=1.0))
    terms["loss"].backward()
    torch.testing.assert_close(logits.grad, -chains.grad)
    # Of a constant on one class above all: with chains of E(x, y) for images without a label it would grow for ever.
    torch.testing.assert_close(logits.grad.sum(0) + chains.grad.sum(0), torch.zeros(4, dtype=torch.float64))


def test_without_any_label_the_cross_entropy_is_nothing():
    logits, y, _, _ = batch()
    terms = joint_loss(logits, torch.full_like(y, -1))
    terms["loss"].backward()
    assert terms["loss"] == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_cross_entropy_has_its_own_images_and_labels():
    logits, y, logits_neg, y_neg = batch()
    terms = joint_loss(logits, torch.full_like(y, -1), logits_neg, y_neg, logits_ce=logits_neg, y_ce=y_neg)
    torch.testing.assert_close(terms["ce"], F.cross_entropy(logits_neg, y_neg).detach())
    torch.testing.assert_close(terms["energy_data"], -logits.logsumexp(1).mean().detach())
    with pytest.raises(InputError, match="y_ce"):
        joint_loss(logits, y, logits_ce=logits_neg)


def test_label_smoothing_is_timms():
    logits, y, _, _ = batch()
    ce = joint_loss(logits, y, config=ObjectiveConfig(label_smoothing=0.2))["loss"]
    torch.testing.assert_close(ce, LabelSmoothingCrossEntropy(0.2)(logits, y))
    y[[1, 4]] = -1
    ce = joint_loss(logits, y, config=ObjectiveConfig(label_smoothing=0.2))["loss"]
    torch.testing.assert_close(ce, LabelSmoothingCrossEntropy(0.2)(logits[y >= 0], y[y >= 0]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_single(dtype):
    generator = torch.Generator().manual_seed(0)
    logits, logits_neg = (30 * torch.randn(1024, 1000, generator=generator).to(dtype).requires_grad_() for _ in range(2))
    y = torch.randint(1000, (1024,), generator=generator)
    terms, exact = joint_loss(logits, y, logits_neg), joint_loss(logits.double(), y, logits_neg.double())
    for name, term in terms.items():
        torch.testing.assert_close(term, exact[name].float(), rtol=1e-5, atol=1e-5)
    assert torch.autograd.grad(terms["loss"], logits)[0].isfinite().all()


def test_nan_is_passed_on():
    logits, y, logits_neg, _ = batch()
    assert joint_loss(logits, y, logits_neg * float("nan"))["loss"].isnan()


@pytest.mark.parametrize(
    "bad",
    [
        {"w_x": -1.0},
        {"w_xy": float("nan")},
        {"energy_l2": float("inf")},
        {"w_ce": -0.1},
        {"label_smoothing": 1.0},
        {"label_smoothing": -0.1},
        {"w_x": 10**400},
        {"w_ce": 1e300},
    ],
)
def test_bad_weights_are_named(bad):
    (name,) = bad
    with pytest.raises(InputError, match=name):
        ObjectiveConfig(**bad)


def test_logits_and_labels_of_another_kind_are_named():
    logits, y, logits_neg, y_neg = batch()
    config = ObjectiveConfig(w_xy=1.0)
    for arguments, message in (
        ((logits[0], y), r"logits is .*shape \(4,\)"),
        ((logits[:0], y[:0]), r"\(0, 4\)"),
        ((None, y), "NoneType"),
        ((logits, y[:3]), r"give y as int64, shape \(6,\)"),
        ((logits, y.float()), "float32"),
        ((logits, y + 4), "label"),
        ((logits, y - 5), "label -"),
        ((logits, y.tolist()), "a list"),
        ((logits, y, logits_neg[:, :3]), "logits_neg is of 3 classes"),
        ((logits, y, logits_neg, y_neg[:1], config), "y_neg"),
        ((logits, y, logits_neg, None, config), "y_neg is missing"),
        ((logits, y, logits_neg, y_neg, {"w_x": 1.0}), "ObjectiveConfig"),
    ):
        with pytest.raises(InputError, match=message) as error:
            joint_loss(*arguments)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("balance", [torch.ones(2), "x", torch.tensor(1)])
def test_a_balance_is_one_number(balance):
    logits, y = torch.randn(2, 3), torch.tensor([0, 1])
    with pytest.raises(InputError, match=r"balance is .*: give one number as a floating-point tensor"):
        joint_loss(logits, y, logits, config=ObjectiveConfig(), balance=balance)
