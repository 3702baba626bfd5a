"""The joint objective of energy-based classifiers, on logits."""

import numbers
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_jem.energy import energy
from timm_jem.errors import InputError, check_number, quoted
from timm_jem.inputs import check_label_values, is_floats, is_labels, kind

__all__ = ["ObjectiveConfig", "energy_where_known", "joint_loss"]


@dataclass(frozen=True)
class ObjectiveConfig:
    """Weights of the terms of :func:`joint_loss`.

    Attributes:
        w_ce: cross-entropy of the labelled images (paper: 1).
        w_x: likelihood of x under E(x) (paper: 1).
        w_xy: likelihood of (x, y) under E(x, y), with class-conditional chains (paper: 0).
        contrast: of mean energies, data's minus chains', in the w_x and w_xy terms: linear (paper), or softplus, which lets
            go of chains that are left behind: 2 · softplus(gap) has the linear one's slope where the gap is 0, 2σ(gap)
            of it elsewhere, so that a gap far below 0 is pushed no further and the energies part no more (the gap is that of
            the logits at hand: of several processes each has its own); or bce (DAT,
            arXiv 2510.13872): the cross-entropy of telling images from chains by −E, each image and chain by itself, so that
            E = 0 is the border and energies have no free constant.
        energy_l2: weight of the mean squared energy of data and chains, against drifting energies (paper: 0;
            Du & Mordatch, NeurIPS 2019, arXiv 1903.08689, section 3.2).
        label_smoothing: share of the cross-entropy's target that goes to all classes evenly, timm's and PyTorch's
            meaning (Szegedy et al., CVPR 2016, arXiv 1512.00567, section 7; JEM: 0).

    Raises:
        InputError: a weight that is negative, not finite or above 10⁹, an unknown ``contrast``, or a ``label_smoothing``
            outside [0, 1).
    """

    w_ce: float = 1.0
    w_x: float = 1.0
    w_xy: float = 0.0
    contrast: Literal["linear", "softplus", "bce"] = "linear"
    energy_l2: float = 0.0
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        for name in ("w_ce", "w_x", "w_xy", "energy_l2", "label_smoothing"):
            check_number(f"objective {name}", getattr(self, name), least=0, most=1e9)
        if self.contrast not in ("linear", "softplus", "bce"):
            raise InputError(f"objective contrast is {quoted(self.contrast)}: give linear, softplus or bce")
        if self.label_smoothing >= 1:
            raise InputError(f"objective label_smoothing is {quoted(self.label_smoothing)}: give a number below 1")

    @property
    def needs_chains(self) -> bool:
        """Whether an energy term counts; otherwise it is cross-entropy alone."""
        return self.w_x > 0 or self.w_xy > 0


def joint_loss(
    logits: Tensor,
    y: Tensor,
    logits_neg: Tensor | None = None,
    y_neg: Tensor | None = None,
    config: ObjectiveConfig = ObjectiveConfig(),
    *,
    logits_ce: Tensor | None = None,
    y_ce: Tensor | None = None,
    balance: Tensor | None = None,
) -> dict[str, Tensor]:
    """Cross-entropy plus the contrastive estimate of maximum likelihood.

    loss = w_ce · CE + w_x · c(E(x_data), E(x_neg)) + w_xy · c(E(x_data, y), E(x_neg, y_neg))
           + energy_l2 · (mean E_data² + mean E_neg²)

    with c(E_data, E_neg) = mean E_data − mean E_neg, the gap; 2 · softplus(gap); or ½ mean softplus(E_data) +
    ½ mean softplus(−E_neg): ``contrast``. The gradient of the gap is that of the negative log-likelihood: JEM (arXiv
    1912.03263), eq. 2; its factorisation log p(x) + log p(y|x) is eq. 8. The L2 term takes the energies of the w_xy term
    where w_xy > 0, else E(x).

    An image without a label (y = −1) takes part in the w_xy term by E(x), not E(x, y): that is maximum likelihood of x
    where only x is known, and of (x, y) elsewhere. Its negative must do so as well (y_neg = −1): where chains' classes
    are given and not the model's own p(y), ∇E(x_neg, y_neg) is no estimate of E_p(x)[∇E(x)], and the energies of images
    and chains part without end, all images in one class. The cross-entropy is the mean over the images with a label; it
    is 0 where none has one. As energies do, it reduces half-precision logits in float32.

    Args:
        logits: f(x_data), shape (B, num_classes).
        y: labels, int64, shape (B,); −1: unknown.
        logits_neg: f(x_neg) of the chains, shape (M, num_classes); None for cross-entropy alone.
        y_neg: the chains' labels, int64, shape (M,); −1: a negative of x alone; needed where w_xy > 0.
        config: see :class:`ObjectiveConfig`.
        logits_ce: for the cross-entropy, where it sees other images or views, shape (N, num_classes); None: ``logits``.
        y_ce: labels for the cross-entropy, int64, shape (N,); −1: unknown; None: ``y``.
        balance: a factor of the w_x and w_xy terms, shape (); None: 1.

    Returns:
        Scalars by name: ``loss`` (the one with a graph), and for logging, detached: ``ce``, ``energy_data`` and
        ``energy_neg`` (means of E(x)), ``gap`` (energy_data − energy_neg), with ``w_xy`` ``gap_xy`` (the difference of its
        term), and ``l2``.

    Raises:
        InputError: ``w_xy`` > 0 without ``y_neg``, logits or labels of wrong shape or type, or, on the CPU, labels that are no
            classes.
    """
    if not isinstance(config, ObjectiveConfig):
        raise InputError(f"config is a {type(config).__name__}: give a timm_jem.ObjectiveConfig")
    if not (balance is None or isinstance(balance, numbers.Real) or (is_floats(balance) and balance.ndim == 0)):
        raise InputError(f"balance is {kind(balance)}: give one number as a floating-point tensor, shape ()")
    _check("logits", logits, "y", y)
    _check("logits_neg", logits_neg, "y_neg", y_neg, like=logits)
    logits_ce, y_ce = logits if logits_ce is None else logits_ce, y if y_ce is None else y_ce
    _check("logits_ce", logits_ce, "y_ce", y_ce, like=logits)
    logits_ce = logits_ce.float() if logits_ce.dtype in (torch.float16, torch.bfloat16) else logits_ce
    # A copy, since autograd keeps no labels that were made in inference mode.
    ce = F.cross_entropy(logits_ce, y_ce.clone(), ignore_index=-1, reduction="sum", label_smoothing=config.label_smoothing)
    ce = ce / (y_ce != -1).sum().clamp(min=1)
    loss = config.w_ce * ce
    terms = {"ce": ce}
    w_x, w_xy = (weight if balance is None else weight * balance for weight in (config.w_x, config.w_xy))
    if logits_neg is not None:
        e_data, e_neg = energy(logits), energy(logits_neg)
        terms |= {"energy_data": e_data.mean(), "energy_neg": e_neg.mean()}
        terms["gap"] = terms["energy_data"] - terms["energy_neg"]
        if config.w_x:
            loss = loss + w_x * _contrast(e_data, e_neg, config)
        if config.w_xy:
            if y_neg is None:
                raise InputError("objective w_xy is above 0 and y_neg is missing: give the chains' labels")
            e_data, e_neg = energy_where_known(logits, y), energy_where_known(logits_neg, y_neg)
            terms["gap_xy"] = e_data.mean() - e_neg.mean()
            loss = loss + w_xy * _contrast(e_data, e_neg, config)
        if config.energy_l2:
            terms["l2"] = e_data.square().mean() + e_neg.square().mean()
            loss = loss + config.energy_l2 * terms["l2"]
    return {"loss": loss, **{name: term.detach() for name, term in terms.items()}}


def _contrast(e_data: Tensor, e_neg: Tensor, config: ObjectiveConfig) -> Tensor:
    if config.contrast == "bce":
        return (F.softplus(e_data).mean() + F.softplus(-e_neg).mean()) / 2
    gap = e_data.mean() - e_neg.mean()
    return gap if config.contrast == "linear" else 2 * F.softplus(gap)


def energy_where_known(logits: Tensor, y: Tensor) -> Tensor:
    """E(x, y), or E(x) where y is −1, in nats, shape (B,); ``logits`` as :func:`timm_jem.energy`, y of shape (B,)."""
    unknown = y == -1
    return torch.where(unknown, energy(logits), energy(logits, y.masked_fill(unknown, 0)))


def _check(name: str, logits: Tensor | None, of: str, y: Tensor | None, like: Tensor | None = None) -> None:
    if logits is None and like is not None:
        return
    if not is_floats(logits) or logits.ndim != 2 or not logits.numel():
        raise InputError(f"{name} is {kind(logits)}: give floating-point logits, shape (B, num_classes)")
    if like is not None and logits.shape[1] != like.shape[1]:
        raise InputError(f"{name} is of {logits.shape[1]} classes and logits of {like.shape[1]}: give those of one model")
    if y is None and of == "y_neg":
        return
    if not is_labels(y, len(logits), logits):
        raise InputError(f"{of} is {kind(y)} for {name} of {len(logits)} images: give {of} as int64, shape ({len(logits)},)")
    if y.device.type == "cpu":  # elsewhere it would have to be waited for
        check_label_values(y, logits.shape[1], least=-1)
