"""The detectors by name: what each looks at, what it is fitted to, and its options."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from timm_jem.errors import InputError, check_number, check_whole, quoted
from timm_jem.ood import from_pytorch_ood as theirs
from timm_jem.ood.class_features import ClassFeatures
from timm_jem.ood.final_layer import FinalLayer
from timm_jem.ood.scores import gradnorm, max_logit, msp, typicality
from timm_jem.ood.views import Survey, View

__all__ = ["METHODS", "Method"]

Options = Mapping[str, Any]
State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Method:
    """One way to score images.

    Attributes:
        score: from the last layer (None unless ``layer``), what was fitted and options to a function of a view, shape (B,).
        fit: from the last layer, images in distribution and options to what is fitted; None: nothing is.
        shapes: of what is fitted, by name: "C" is the number of classes, "D" that of features, other letters any numbers.
        features, slope, layer, labels: what it needs of the model and of the images that it is fitted to.
        library: whether it is pytorch-ood's.
        options: names and defaults.
    """

    score: Callable[[FinalLayer | None, State, Options], Callable[[View], Tensor]]
    fit: Callable[[FinalLayer | None, Survey, Options], State] | None = None
    shapes: Mapping[str, str] = field(default_factory=dict)
    features: bool = False
    slope: bool = False
    layer: bool = False
    labels: bool = False
    library: bool = False
    options: Options = field(default_factory=dict)

    def chosen(self, name: str, options: Options) -> dict[str, Any]:
        """Options with their defaults, checked, and made plain numbers.

        Raises:
            InputError: an option that this method has not, or a value that it can't have.
        """
        for option in options:
            if option not in self.options:
                has = f"it has {', '.join(self.options)}" if self.options else "it has none"
                raise InputError(f"{quoted(option)} is no option of the detector {name}: {has}")
        chosen = {**self.options, **options}
        for option, value in chosen.items():
            if option in ("percentile", "p"):
                check_number(option, value, least=0, most=1)
                if value == 1:
                    raise InputError(f"{option} is 1, which leaves nothing: give a share below 1")
                chosen[option] = float(value)
            elif option == "variant":
                if value not in ("ash-s", "ash-p", "ash-b"):
                    raise InputError(f"variant is {quoted(value)}: give ash-s, ash-p or ash-b")
            elif not (value is None and self.options[option] is None):
                check_whole(option, value, 1)
                chosen[option] = int(value)
        return chosen


def _logits(score: Callable[[Tensor], Tensor]) -> Method:
    return Method(lambda layer, state, options: lambda seen: score(seen.logits))


def _mahalanobis(layer: None, state: State, options: Options) -> Callable[[View], Tensor]:
    classes = ClassFeatures(state["means"], state["precision"])
    return lambda seen: classes.distance(seen.features)


def _fit_mahalanobis(layer: None, seen: Survey, options: Options) -> State:
    classes = ClassFeatures.fit(seen.view.features, seen.y)
    return {"means": classes.means, "precision": classes.precision}


METHODS: dict[str, Method] = {
    "msp": _logits(msp),
    "max_logit": _logits(max_logit),
    # E(x) = −logsumexp f(x): JEM, arXiv 1912.03263, eq. 7 and section 5.3; Liu et al., NeurIPS 2020, arXiv 2010.03759.
    "energy": Method(lambda layer, state, options: lambda seen: seen.energy),
    "react": Method(
        theirs.react,
        theirs.fit_react,
        {"threshold": ""},
        features=True,
        layer=True,
        library=True,
        options={"percentile": 0.9},
    ),
    "ash": Method(theirs.ash, features=True, layer=True, library=True, options={"variant": "ash-s", "percentile": 0.65}),
    "dice": Method(theirs.dice, theirs.fit_dice, {"weight": "CD"}, features=True, layer=True, library=True, options={"p": 0.9}),
    "vim": Method(
        theirs.vim,
        theirs.fit_vim,
        {"subspace": "DS", "alpha": ""},
        features=True,
        layer=True,
        library=True,
        options={"d": None},
    ),
    "knn": Method(theirs.knn, theirs.fit_knn, {"features": "ND"}, features=True, library=True, options={"k": None}),
    "mahalanobis": Method(_mahalanobis, _fit_mahalanobis, {"means": "KD", "precision": "DD"}, features=True, labels=True),
    "gradnorm": Method(
        lambda layer, state, options: lambda seen: gradnorm(seen.logits, seen.features), features=True, layer=True
    ),
    # ‖∇ log p(x)‖₂, "approximate mass": JEM, section 5.3, there negated. By pixels in [-1, 1] and not by model input, so that
    # backbones of other normalisation compare.
    "approximate_mass": Method(lambda layer, state, options: lambda seen: seen.slope, slope=True),
    "typicality": Method(
        lambda layer, state, options: lambda seen: typicality(seen.energy, state["mean_energy"].view(1)),
        lambda layer, seen, options: {"mean_energy": seen.view.energy.mean()},
        {"mean_energy": ""},
    ),
}
