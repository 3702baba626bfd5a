"""Methods of pytorch-ood (Kirchheim et al., CVPR workshops 2022), on features that a timm classifier gives.

What is fitted is kept as tensors, so that it can be saved; the library's detectors are built from these. ReAct and ASH act
on the features that the last layer takes, pooled, as ReAct's paper does: so they work for networks without feature maps, too.
"""

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from timm_jem.errors import InputError, importing
from timm_jem.ood.final_layer import FinalLayer
from timm_jem.ood.views import Survey, View

__all__ = [
    "ash",
    "components",
    "dice",
    "fit_dice",
    "fit_knn",
    "fit_react",
    "fit_vim",
    "knn",
    "library",
    "nth_neighbour",
    "react",
    "vim",
]

State = Mapping[str, Tensor]
Options = Mapping[str, Any]
Score = Callable[[View], Tensor]

# torch.quantile takes no more numbers at once.
_MOST_WEIGHTS = 2**24
# Numbers of an array of images by classes by dimensions, which pytorch-ood's DICE makes.
_MOST_VOTES = 2**24


def library(name: str) -> ModuleType:
    """``pytorch_ood.detector``, or an InputError that says how to get it."""
    with importing("pytorch-ood", f"the detector {name}", "ood"):
        from pytorch_ood import detector
    return detector


def fit_react(layer: FinalLayer, seen: Survey, options: Options) -> State:
    """The threshold at which activations are cut: their ``percentile``."""
    theirs = library("react").ReAct(None, None, percentile=options["percentile"])
    theirs.fit_feature_maps(seen.view.features, torch.zeros(len(seen), dtype=torch.long))
    return {"threshold": torch.tensor(theirs.threshold, dtype=torch.float64)}


def react(layer: FinalLayer, state: State, options: Options) -> Score:
    """E of the logits of min(z, c), c the threshold (Sun et al., "ReAct: out-of-distribution detection with rectified
    activations", NeurIPS 2021, arXiv 2111.12797, section 3)."""
    theirs = library("react").ReAct(None, layer, threshold=state["threshold"].item())
    return lambda seen: theirs.to(seen.features.device).predict_feature_maps(seen.features.float())


def ash(layer: FinalLayer, state: State, options: Options) -> Score:
    """E of the logits of features of which the smallest, a share ``percentile``, are zero, and the others shaped (Djurisic et
    al., "Extremely simple activation shaping for out-of-distribution detection", ICLR 2023, arXiv 2209.09858, algorithms 1
    to 3): ASH-S times exp(Σ before / Σ after), ASH-B each replaced by Σ before / their number, ASH-P as they are."""
    options = {"variant": options["variant"], "percentile": options["percentile"]}
    theirs = library("ash").ASH(None, nn.Sequential(nn.Flatten(), layer), **options)

    def score(seen: View) -> Tensor:
        width = seen.features.shape[1]
        if round(width * theirs.percentile) == width:
            raise InputError(
                f"percentile is {theirs.percentile:g}, which leaves ash none of {width} features: "
                f"give {width - 1}/{width} at most"
            )
        return theirs.to(seen.features.device).predict_feature_maps(seen.features.float()[:, :, None, None])

    return score


def fit_dice(layer: FinalLayer, seen: Survey, options: Options) -> State:
    """The last layer's weight without the share ``p`` that contributes least."""
    weight, bias = layer.matrix(seen.view.features.shape[1])
    if weight.numel() > _MOST_WEIGHTS:
        raise InputError(f"dice ranks the {weight.numel():,} weights of the last layer, and can rank {_MOST_WEIGHTS:,}")
    p = np.float32(options["p"])  # a tensor of it is float32 whatever torch's default dtype is, as quantiles need it
    theirs = library("dice").DICE(None, weight, bias, p)
    theirs.fit_features(seen.view.features, torch.zeros(len(seen), dtype=torch.long))
    return {"weight": theirs.masked_w.contiguous()}


def dice(layer: FinalLayer, state: State, options: Options) -> Score:
    """E of the logits of a weight in which only the largest W ⊙ mean z are kept (Sun & Li, "DICE: leveraging sparsification for
    out-of-distribution detection", ECCV 2022, arXiv 2111.09805, section 3)."""
    weight = state["weight"]
    theirs = library("dice").DICE(None, weight, layer.matrix(weight.shape[1])[1], options["p"])
    theirs.masked_w = weight
    rows = max(1, _MOST_VOTES // weight.numel())

    def score(seen: View) -> Tensor:
        theirs.to(seen.features.device)
        return torch.cat([theirs.predict_features(part) for part in seen.features.float().split(rows)])

    return score


def components(width: int, images: int, d: int | None) -> int:
    """d, or else the authors': 1,000 of 2,048 features and more, 512 of 768 and more, or else half of them; half of the images
    where they are fewer."""
    if d is None:
        d = max(1, min(1000 if width >= 2048 else 512 if width >= 768 else width // 2, images // 2))
    if d >= min(width, images):
        raise InputError(
            f"vim leaves nothing of {width} features of {images} images beyond {d} principal components: give more images, or "
            "a smaller d"
        )
    return d


def fit_vim(layer: FinalLayer, seen: Survey, options: Options) -> State:
    """The directions in which features vary least, and the scale of the virtual logit.

    The paper's α is the mean of the largest logit over that of the residual. A constant added to all logits changes neither
    p(y|x) nor energies relative to one another, but that α: those of joint energy models lie around 0 and below, and with
    them it would be nothing, or negative. So each logit is taken less the mean of all, which of other classifiers is about 0.
    """
    width = seen.view.features.shape[1]
    weight, bias = layer.matrix(width)
    if len(bias) < 2:
        raise InputError("vim compares the logits of classes, and the model has one: use another detector, e.g. knn")
    centred = weight - weight.mean(0), bias - bias.mean()
    theirs = library("vim").ViM(None, components(width, len(seen), options["d"]), *centred)
    theirs.fit_features(seen.view.features, torch.zeros(len(seen), dtype=torch.long))
    alpha = torch.tensor(theirs.alpha, dtype=torch.float64)
    if not alpha.isfinite():
        raise InputError(f"vim finds no residual in the features of {len(seen)} images: give images that differ")
    return {"subspace": theirs.principal_subspace, "alpha": alpha}


def vim(layer: FinalLayer, state: State, options: Options) -> Score:
    """α‖z's residual‖ − logsumexp f(x) (Wang et al., "ViM: out-of-distribution with virtual-logit matching", CVPR 2022, arXiv
    2203.10807, section 4, eq. 4 to 7; the paper's score is this one's sigmoid); but α and the origin are :func:`fit_vim`'s."""
    width, residual = state["subspace"].shape
    weight, bias = layer.matrix(width)
    theirs = library("vim").ViM(None, width - residual, weight - weight.mean(0), bias - bias.mean())
    theirs.w, theirs.b = weight.float(), bias.float()  # logsumexp is of the logits as they are
    theirs.principal_subspace, theirs.alpha = state["subspace"], state["alpha"].item()
    return lambda seen: theirs.to(seen.features.device).predict_features(seen.features)


def nth_neighbour(images: int, k: int | None) -> int:
    """k, or else one for every thousand images: the authors take 50 of CIFAR-10's 50,000, 1,000 of ImageNet's 1.3 million."""
    k = max(1, images // 1000) if k is None else k
    if k > images:
        raise InputError(f"knn asks for the {k}-th nearest of {images} images: give more images, or a smaller k")
    return k


def fit_knn(layer: None, seen: Survey, options: Options) -> State:
    """The features themselves."""
    nth_neighbour(len(seen), options["k"])
    return {"features": seen.view.features}


def knn(layer: None, state: State, options: Options) -> Score:
    """The distance of z / ‖z‖ to the k-th nearest of images in distribution (Sun et al., "Out-of-distribution detection with
    deep nearest neighbors", ICML 2022, arXiv 2204.06507, section 3)."""
    features = state["features"]
    theirs = library("knn").KNN(None, k=nth_neighbour(len(features), options["k"]))
    theirs.fit_features(features, torch.zeros(len(features), dtype=torch.long))

    def score(seen: View) -> Tensor:
        z = seen.features.float().cpu()
        known = z.isfinite().all(1)
        scores = torch.full((len(z),), torch.nan, dtype=torch.float64)  # as other methods give where features are not finite
        if known.any():
            scores[known] = theirs.predict_features(z[known])
        return scores

    return score
