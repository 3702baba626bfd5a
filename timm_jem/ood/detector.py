"""A detector of images that are unlike the training data: a score by some method, and a threshold."""

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from timm_jem.errors import InputError, check_number, one_line, quoted
from timm_jem.model import JEM
from timm_jem.modes import frozen
from timm_jem.ood import stored
from timm_jem.ood.final_layer import FinalLayer
from timm_jem.ood.from_pytorch_ood import library
from timm_jem.ood.methods import METHODS
from timm_jem.ood.views import Survey, View, batches, check_features, survey, view
from timm_jem.reference import accepting

__all__ = ["Detector", "detector", "score_all"]

# Of images that a method is fitted to, those that are kept from it for the threshold.
THRESHOLD_SHARE = 0.2


class Detector:
    """Scores of images, higher = further out of distribution, and a threshold that accepts a share of images in it.

    One sign everywhere, pytorch-ood's: "energy" is E(x) itself. The metrics of pytorch-ood and scikit-learn take scores as
    they are. scikit-learn's scorers and displays take a detector, too, as a classifier of whether an image is an outlier:
    ``sklearn.metrics.RocCurveDisplay.from_estimator(d, x, is_outlier)``. Its own outlier detectors have the other sign, and
    its displays refuse them, so that a detector is none of these and has no ``score_samples``.

    The model is in eval mode while it is looked at, and left as it was. After training it, or changing its head, fit again.

    Args:
        jem: the model.
        name: one of :data:`timm_jem.ood.METHODS`.
        **options: the method's own: ``percentile`` of react (0.9) and ash (0.65), ``variant`` of ash ("ash-s", "ash-p" or
            "ash-b"), ``p`` of dice (0.9), ``d`` of vim (by the number of features), ``k`` of knn (by that of images).

    Attributes:
        jem, name, options: as given, options with their defaults.
        threshold: scores above it are outliers'; None before :meth:`fit`.
        accept: the share of held-out images that it accepts, or None.

    Raises:
        InputError: no such method or option, a model that the method can't look into, or pytorch-ood is missing.
    """

    def __init__(self, jem: JEM, name: str, **options: Any) -> None:
        if not isinstance(jem, JEM):
            raise InputError(f"the model of a detector is a {type(jem).__name__}: give timm_jem.wrap(model)")
        if not isinstance(name, str) or name not in METHODS:
            raise InputError(f"detector is {quoted(name)}: give one of {', '.join(METHODS)}")
        self.jem, self.name, self._method = jem, name, METHODS[name]
        self.options = self._method.chosen(name, options)
        if self._method.library:
            library(name)
        if self._method.features:
            check_features(jem)
        if self._method.layer:
            FinalLayer(jem)
        self.threshold: float | None = None
        self.accept: float | None = None
        self.state: dict[str, Tensor] | None = None if self._method.fit else {}
        self._score: Any = None
        self._probe: Tensor | None = None  # of the weights that it was fitted to

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_method": None, "_score": None}  # made again: they are functions

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update({"_probe": None, **state}, _method=METHODS[state["name"]])

    @property
    def learns(self) -> bool:
        """Whether the method has to be fitted before it can score."""
        return self._method.fit is not None

    @property
    def features(self) -> bool:
        """Whether it looks at features."""
        return self._method.features

    def fit(
        self,
        x: Tensor | Iterable,
        y: Any = None,
        *,
        held_out: Tensor | Iterable | None = None,
        accept: float | None = 0.95,
        batch_size: int = 256,
    ) -> "Detector":
        """Fit the method to images in distribution, and find the threshold that accepts a share of held-out ones.

        Images go through the network once, batch by batch, and memory doesn't grow with their number: of more features than
        256 MiB a random subset is kept. Where a method learns from images (react, dice, vim, knn, mahalanobis, typicality),
        its scores of these are too good for a threshold: a random fifth is kept from it for that, unless ``held_out`` is given.

        Args:
            x: model input in distribution that the network was not trained on, shape (N, C, H, W); or batches of it, or of
                (model input, labels), e.g. a DataLoader.
            y: labels of a tensor's images, integers, shape (N,), below 0 where unknown. Only mahalanobis reads them.
            held_out: other images for the threshold, as ``x``.
            accept: the share of held-out images that :meth:`predict` accepts, at least; None: no threshold.
            batch_size: into which tensors are split.

        Returns:
            The detector.

        Raises:
            InputError: too few images, labels that are missing or none, numbers that are not finite, or a model whose logits
                are no linear function of its features, for methods that shape either. The detector is then as it was.
        """
        if accept is not None:
            check_number("accept", accept, above=0, most=1)
            accept = float(accept)
        if not self.learns:
            threshold = None
            if accept is not None:
                threshold = _threshold(self.score(x if held_out is None else held_out, batch_size=batch_size), accept)
            self.threshold, self.accept, self._probe = threshold, accept, stored.probe(self.jem)
            return self
        how = {"batch_size": batch_size, "desc": f"{self.name}: fitting", "on_first": self._layer}
        seen = survey(self.jem, x, y, features=self.features, labels=self._method.labels, **how)
        aside = 0 if accept is None or held_out is not None else max(1, int(THRESHOLD_SHARE * len(seen)))
        if aside == len(seen):
            raise InputError("x holds one image: give more, of which a fifth is for the threshold")
        fitted = Detector(self.jem, self.name, **self.options).fit_survey(seen.part(aside))
        if accept is not None:
            rest = seen.part(0, aside).view
            scores = fitted._scorer(rest)(rest) if held_out is None else fitted.score(held_out, batch_size=batch_size)
            fitted.threshold, fitted.accept = _threshold(scores, accept), accept
        vars(self).update(vars(fitted))
        return self

    def fit_survey(self, seen: Survey) -> "Detector":
        """As :meth:`fit` without a threshold, from images that were looked at already, for several detectors at once.

        Args:
            seen: of :func:`timm_jem.ood.survey`, with features where the method needs those.

        Raises:
            InputError: as :meth:`fit`.
        """
        layer = self._layer(seen.first)
        if self._method.labels and seen.y is None:
            raise InputError(f"{self.name} needs labels of the images: give batches of (x, y)")
        if self.learns:
            # What is surveyed is on the CPU. In half precision features would vary least in other directions.
            with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
                self.state = dict(self._method.fit(layer, seen, self.options))
                self._score = self._method.score(layer, self.state, self.options)
        self.threshold, self.accept, self._probe = None, None, stored.probe(self.jem)
        return self

    def score(self, x: Tensor | Iterable, *, batch_size: int = 256) -> Tensor:
        """How far out images are: float64, shape (N,), on the CPU, higher = further out; what is not finite is left so.

        Args:
            x: model input, shape (N, C, H, W), or batches of it, e.g. a DataLoader's, whose labels are ignored.
            batch_size: into which a tensor is split.

        Raises:
            InputError: other input than the model's, or a method that has to be fitted first.
        """
        return score_all([self], x, batch_size=batch_size, desc=f"{self.name}: scoring")[0]

    __call__ = score

    def decision_function(self, x: Tensor | Iterable) -> np.ndarray:
        """scikit-learn's name: how far above the threshold scores are, shape (N,); errors as :meth:`predict`."""
        return (self.score(x) - self._known_threshold()).numpy()

    def predict(self, x: Tensor | Iterable, *, batch_size: int = 256) -> Tensor:
        """Whether images are outliers: bool, shape (N,), on the CPU. One whose score is NaN is.

        Raises:
            InputError: no threshold yet, or as :meth:`score`.
        """
        threshold = self._known_threshold()
        return ~(self.score(x, batch_size=batch_size) <= threshold)

    @property
    def classes_(self) -> np.ndarray:
        """scikit-learn's name of what :meth:`predict` gives."""
        return np.array([False, True])

    def __sklearn_is_fitted__(self) -> bool:
        return self.threshold is not None

    def __sklearn_tags__(self) -> Any:
        from sklearn.utils import ClassifierTags, Tags, TargetTags

        return Tags("classifier", TargetTags(required=False), classifier_tags=ClassifierTags(multi_class=False))

    def save(self, file: str | os.PathLike) -> None:
        """Write what was fitted, the threshold and the options as one safetensors file; the model is not in it.

        It is of the weights that it was fitted to: a model that was trained further since then is another to :meth:`load`.

        Raises:
            InputError: nothing is fitted yet, or the file can't be written; one that was there is as before.
        """
        if self.state is None:
            raise InputError(f"{self.name} has nothing to save: fit it first")
        about = {"name": self.name, "options": self.options, "threshold": self.threshold, "accept": self.accept}
        stored.write(file, self.state, about, stored.probe(self.jem) if self._probe is None else self._probe)

    @classmethod
    def load(cls, file: str | os.PathLike, jem: JEM) -> "Detector":
        """Read what :meth:`save` wrote; safetensors and JSON only.

        Raises:
            InputError: a file that is missing, broken, no detector's, or of another model.
        """
        state, about = stored.read(file)
        try:
            try:
                found = cls(jem, about.get("name"), **about["options"])
            except TypeError as error:  # an option of that name is an argument of another kind
                raise InputError(f"its options are {quoted(about['options'])}: {one_line(error)}") from error
            found._probe = stored.check(state, found._method.shapes, jem)
            found.threshold, found.accept = stored.threshold(about)
            found.state = state
        except InputError as error:
            raise InputError(f"{file}: {error}") from error
        return found

    def __repr__(self) -> str:
        options = "".join(f", {name}={value!r}" for name, value in self.options.items())
        return f"Detector({self.name!r}{options}, threshold={self.threshold})"

    def _known_threshold(self) -> float:
        if self.threshold is None:
            raise InputError(f"{self.name} has no threshold: fit it first, e.g. d.fit(x, y, accept=0.95)")
        return self.threshold

    def _layer(self, seen: View) -> FinalLayer | None:
        if not self._method.layer:
            return None
        layer = FinalLayer(self.jem)
        layer.check(seen)
        return layer

    def _scorer(self, first: View) -> Callable[[View], Tensor]:
        """From a view to scores, float64, shape (B,), on the CPU; ``first`` shows whether the model has the layer it needs."""
        score = self._score
        if score is None:
            score = self._method.score(self._layer(first), self.state, self.options)
        if self.learns:
            self._score = score  # of others the last layer is copied each time, as it may have been trained

        def scores(seen: View) -> Tensor:
            with torch.autocast(self.jem.device.type, enabled=False):
                return score(seen).detach().cpu().double()

        return scores


def detector(jem: JEM, name: str, **options: Any) -> Detector:
    """A :class:`Detector`: arguments and errors as there."""
    return Detector(jem, name, **options)


def score_all(
    detectors: Sequence[Detector], x: Tensor | Iterable, *, batch_size: int = 256, desc: str = "scoring"
) -> list[Tensor]:
    """Scores by several detectors of one model, which looks at each image once.

    Args:
        detectors: at least one.
        x, batch_size: as :meth:`Detector.score`.
        desc: of the progress bar.

    Returns:
        For each detector float64, shape (N,), on the CPU, higher = further out.

    Raises:
        InputError: no detectors, detectors of several models, or as :meth:`Detector.score`.
    """
    if not detectors or any(d.jem is not detectors[0].jem for d in detectors):
        raise InputError("the detectors are none, or of several models: give at least one, all of one model")
    jem = detectors[0].jem
    for one in detectors:
        if one.state is None:
            raise InputError(f"{one.name} isn't fitted: call fit with images in distribution first")
    needs = {what: any(getattr(d._method, what) for d in detectors) for what in ("features", "slope")}
    found: list[list[Tensor]] = [[] for _ in detectors]
    scorers: list[Callable[[View], Tensor]] = []
    with frozen(jem), torch.inference_mode(False), torch.no_grad():
        for images, _ in batches(jem, x, labels=False, batch_size=batch_size, desc=desc):
            seen = view(jem, images, **needs)
            scorers = scorers or [one._scorer(seen) for one in detectors]
            for scores, scorer in zip(found, scorers, strict=True):
                scores.append(scorer(seen))
    return [torch.cat(scores) for scores in found]


def _threshold(scores: Tensor, accept: float) -> float:
    """The smallest score up to which a share ``accept`` of the scores are."""
    if not scores.isfinite().all():
        bad = int((~scores.isfinite()).sum())
        raise InputError(f"{bad} of {len(scores)} scores of held-out images are not finite: no threshold can be found")
    return accepting(scores, accept)
