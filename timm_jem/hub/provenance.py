"""What a model says of how it came to be, read from JSON that anyone may have written."""

import math
import numbers
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from timm_jem.errors import InputError, quoted

__all__ = ["Measured", "Provenance", "license_id", "printable"]

# Control characters, line and paragraph separators, changes of writing direction, and halves of surrogate pairs.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_LICENSE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]{0,63}")
_LARGEST = 2**63  # a number above is none of training, and may be too large to print


def printable(text: str) -> str:
    """Text as one line that can be printed: other characters, and runs of white space, become one space."""
    return " ".join(_UNPRINTABLE.sub(" ", text).split())


def license_id(value: Any) -> str | None:
    """A licence as the Hub writes its id, such as "apache-2.0"; None: this can't be one."""
    return value.lower() if isinstance(value, str) and _LICENSE.fullmatch(value) else None


def _lines(text: str) -> str:
    return "\n".join(_UNPRINTABLE.sub(" ", line).rstrip() for line in text.splitlines()).strip("\n")


@dataclass(frozen=True)
class Measured:
    """A result, with what it takes to read it.

    Attributes:
        name, type: what a reader and the Hub's metadata call the metric ("Accuracy", "accuracy").
        value: finite.
        split: of the data set.
        n: images.
        protocol: how it was measured.
    """

    name: str
    type: str
    value: float
    split: str
    n: int
    protocol: str

    @classmethod
    def read(cls, data: Any, where: str) -> "Measured":
        """From JSON that ``where`` names in errors.

        Raises:
            InputError: a value that is missing or of the wrong type.
        """
        data = _mapping(data, where)
        values = {name: _text(data, name, where) for name in ("name", "type", "split", "protocol")}
        values |= {"value": _number(data, "value", where), "n": _whole(data, "n", where, least=0)}
        for name, value in values.items():
            if value is None:
                raise InputError(f"{where} has no {name!r}: a result has {', '.join(field.name for field in fields(cls))}")
        return cls(**values)


@dataclass(frozen=True)
class Provenance:
    """How a model came to be; None, or empty, where that is not known.

    Attributes:
        dataset: what it was trained on, for a reader: a Hub name, "digits", a folder or a file.
        dataset_id: its id on the Hub.
        datasets: ids on the Hub of all data sets that were loaded from there, those of images without labels included.
        base_model: id on the Hub of the pretrained weights that training started from.
        license: the Hub's id of the weights' licence, such as "apache-2.0".
        command: what trained it.
        config: every setting.
        steps, seed, seconds: of training.
        outcome: "finished", or "stopped" where training gave up.
        explanation: why it gave up.
        rollbacks: how often training went back to an earlier state.
        processes, device, mixed_precision: how many there were, on which kind of device, "no" or in which precision.
        versions: of the packages that trained it.
        results: what was measured.
        classifier_steps, classifier_seconds: of the classifier before, where there was one; ``rollbacks`` counts its own, too.
        conversion: what there is to know of a checkpoint that was converted, a line each.
        conversion_file: its name.
        energies: "none" where the density of what was converted is not that of its logits.
        chains: "none" where no chains of what was converted were trained.
    """

    dataset: str | None
    dataset_id: str | None
    datasets: tuple[str, ...]
    base_model: str | None
    license: str | None
    command: str | None
    config: Mapping[str, Any]
    steps: int | None
    seed: int | None
    seconds: float | None
    outcome: str | None
    explanation: str | None
    rollbacks: int
    processes: int | None
    device: str | None
    mixed_precision: str | None
    versions: Mapping[str, str]
    results: tuple[Measured, ...]
    classifier_steps: int | None
    classifier_seconds: float | None
    conversion: tuple[str, ...]
    conversion_file: str | None
    energies: str | None
    chains: str | None

    @classmethod
    def read(cls, data: Any) -> "Provenance":
        """From the JSON that is kept with a model; keys that are unknown here are left alone.

        Raises:
            InputError: a value of the wrong type, or no id where the Hub wants one.
        """
        where = "provenance"
        data = _mapping(data, where)
        versions, classifier, converted = (
            _mapping(_get(data, key, Mapping, where, "a dict") or {}, where) for key in ("versions", "classifier", "converted")
        )
        of_classifier, of_conversion = f"{where}['classifier']", f"{where}['converted']"
        if data.get("license") is not None and license_id(data["license"]) is None:
            raise InputError(
                f"{where}['license'] is {quoted(data['license'])}: give the Hub's id of a licence, such as apache-2.0"
            )
        ids = {
            key: None if data.get(key) is None else _repository(data[key], f"{where}['{key}']")
            for key in ("dataset_id", "base_model")
        }
        return cls(
            dataset=_text(data, "dataset", where),
            datasets=tuple(
                _repository(name, f"{where}['datasets'][{i}]") for i, name in enumerate(_list(data, "datasets", where))
            ),
            **ids,
            license=license_id(data.get("license")),
            command=_lines(_get(data, "command", str, where, "text") or "") or None,
            config=_get(data, "config", Mapping, where, "a dict") or {},
            steps=_whole(data, "steps", where, least=0),
            seed=_whole(data, "seed", where),
            seconds=_number(data, "seconds", where, least=0),
            outcome=_text(data, "outcome", where),
            explanation=_text(data, "explanation", where),
            rollbacks=len(_list(data, "rollbacks", where)) + (_whole(classifier, "rollbacks", of_classifier, least=0) or 0),
            processes=_whole(data, "processes", where, least=1),
            device=_text(data, "device", where),
            mixed_precision=_text(data, "mixed_precision", where),
            versions={printable(package): _text(versions, package, f"{where}['versions']") or "" for package in versions},
            results=tuple(
                Measured.read(item, f"{where}['results'][{i}]") for i, item in enumerate(_list(data, "results", where))
            ),
            classifier_steps=_whole(classifier, "steps", of_classifier, least=0) or _steps_before(data.get("config")),
            classifier_seconds=_number(classifier, "seconds", of_classifier, least=0),
            conversion=tuple(printable(line) for line in _list(converted, "told", of_conversion) if isinstance(line, str)),
            conversion_file=_text(converted, "file", of_conversion),
            energies=_text(converted, "energies", of_conversion),
            chains=_text(converted, "chains", of_conversion),
        )

    @property
    def has_density(self) -> bool | None:
        """Whether p(x), or p(x, y), was trained, as far as is known; None: neither training nor a conversion is told of."""
        if not (self.config or self.conversion or self.conversion_file or self.energies or self.chains):
            return None
        train = self.config.get("train")
        objective = train.get("objective") if isinstance(train, Mapping) else None
        weights = [objective.get(name) for name in ("w_x", "w_xy")] if isinstance(objective, Mapping) else [None]
        return self.energies != "none" and any(weight != 0 for weight in weights)

    @property
    def draws(self) -> bool | None:
        """Whether chains of its energies were trained, as far as is known; None as in :attr:`has_density`."""
        return self.has_density and self.chains != "none"

    @property
    def class_conditional(self) -> bool:
        """Whether training drew chains of E(x, y), by the training recipe's settings where they are known."""
        train = self.config.get("train")
        if not isinstance(train, Mapping):
            return False
        objective = train.get("objective")
        weight = objective.get("w_xy") if isinstance(objective, Mapping) else None
        return train.get("conditional_chains") is True or (isinstance(weight, numbers.Real) and weight > 0)

    @property
    def starts_elsewhere(self) -> bool:
        """Whether chains of training started at images of another data set, by the training recipe's settings."""
        data = self.config.get("data")
        return isinstance(data, Mapping) and data.get("starts") is not None


def _steps_before(config: Any) -> int | None:
    """Of the classifier before, by the settings: earlier versions told no more of it."""
    told, model = (config.get(key) if isinstance(config, Mapping) else None for key in ("classifier", "model"))
    if not isinstance(told, Mapping) or not isinstance(model, Mapping) or told.get("epochs") is not None:
        return None
    if model.get("pretrained") or (model.get("pretrained") is None and ":" in str(model.get("name"))):
        return None  # weights that are trained already need none
    steps = told.get("steps")
    return steps if type(steps) is int and 0 < steps < _LARGEST else None


def _mapping(data: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(data, Mapping) or not all(isinstance(key, str) for key in data):
        raise InputError(f"{where} is {quoted(data)}: give a dict whose keys are text")
    return data


def _get(data: Mapping[str, Any], key: str, kind: type | tuple[type, ...], where: str, wanted: str) -> Any:
    value = data.get(key)
    if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
        raise InputError(f"{where}[{quoted(key)}] is {quoted(value)}: give {wanted}, or leave it out")
    return value


def _text(data: Mapping[str, Any], key: str, where: str) -> str | None:
    return printable(_get(data, key, str, where, "text") or "") or None


def _list(data: Mapping[str, Any], key: str, where: str) -> Sequence[Any]:
    return _get(data, key, (list, tuple), where, "a list") or ()


def _whole(data: Mapping[str, Any], key: str, where: str, *, least: int = -_LARGEST) -> int | None:
    value = _get(data, key, numbers.Integral, where, "a whole number")
    if value is not None and not least <= value < _LARGEST:
        raise InputError(f"{where}[{key!r}] is {quoted(value)}: give a whole number of at least {least}, or leave it out")
    return value


def _number(data: Mapping[str, Any], key: str, where: str, *, least: float = -math.inf) -> float | None:
    value = _get(data, key, numbers.Real, where, "a finite number")
    if value is not None and not (abs(value) < _LARGEST and value >= least):  # not NaN either
        bound = f" of at least {least:g}" if least > -math.inf else ""
        raise InputError(f"{where}[{key!r}] is {quoted(value)}: give a finite number{bound}, or leave it out")
    return None if value is None else float(value)


def _repository(name: Any, where: str) -> str:
    try:
        validate_repo_id(name if isinstance(name, str) else "")
    except HFValidationError as error:
        raise InputError(f"{where} is {quoted(name)}: give its id on the Hub, such as user/name, or leave it out") from error
    return name
