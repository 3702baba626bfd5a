"""What each setting means to a run that goes on: it takes effect from there, or is refused with the reason."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from timm_jem.errors import InputError
from timm_jem.training.settings import OF_WEIGHTS, Settings

__all__ = ["REFUSED", "Refused", "differences", "refuse_changes", "what_terms_are_of"]


@dataclass(frozen=True)
class Refused:
    """Why a run can't go on with another value; ``where`` says for which (old, new) that is, where not for all."""

    why: str
    where: Callable[[Any, Any], bool] = lambda old, new: True


def _one_is_zero(old: float, new: float) -> bool:
    return (old == 0) != (new == 0)


def _one_is_none(old: Any, new: Any) -> bool:
    return (old is None) != (new is None)


def _other_networks(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether a model's arguments differ in more than the file of its weights, which a run that goes on doesn't read."""

    def without_file(kwargs: Mapping[str, Any]) -> dict[str, Any]:
        dicts = {key: value for key, value in kwargs.items() if key in OF_WEIGHTS and isinstance(value, Mapping)}
        return {**kwargs, **{key: {k: v for k, v in value.items() if k != "file"} for key, value in dicts.items()}}

    return without_file(old) != without_file(new)


_HELD_OUT = Refused("other images would be held out, and test images move into training")
_PIXELS = Refused("weights and chains are of images of that shape")
_NETWORK = Refused("the weights are of that network")
_CLASSES = Refused("every chain has a class, or none, for good")
_CLASSIFIER = Refused("joint training has started from what it gave")
_LABELS = Refused("the run has learned from those labels")

# All others take effect. That data are the same wherever they are read from is seen from the images; timm_jem.data.identity.
REFUSED: dict[str, Refused] = {
    "data.test_fraction": _HELD_OUT,
    "data.val_fraction": _HELD_OUT,
    "data.split_seed": _HELD_OUT,
    "data.channels": _PIXELS,
    "data.image_size": _PIXELS,
    "data.labels_per_class": _LABELS,
    "data.unlabeled_rows": _LABELS,
    "data.starts": Refused("chains that may show such images are published, or not, for good", _one_is_none),
    "data.streaming": Refused("its place in the data is one of that way of reading them"),
    "data.stream_held_out": _HELD_OUT,
    "data.shuffle_buffer": _HELD_OUT,
    "model.name": _NETWORK,
    "model.pretrained": Refused("the weights have started already"),
    "model.kwargs": Refused(_NETWORK.why, _other_networks),
    "classifier.steps": _CLASSIFIER,
    "classifier.epochs": _CLASSIFIER,
    "classifier.batch_size": _CLASSIFIER,
    "classifier.opt": _CLASSIFIER,
    "classifier.lr": _CLASSIFIER,
    "classifier.weight_decay": _CLASSIFIER,
    "classifier.opt_kwargs": _CLASSIFIER,
    "classifier.ema_decay": _CLASSIFIER,
    "classifier.noise": _CLASSIFIER,
    "train.opt": Refused("its moments are that optimiser's"),
    "train.freeze": Refused("the optimiser's moments are of the parts that were trained; start a new run from its model/"),
    "train.ema_decay": Refused("the moving average is one from the first step on, or none", _one_is_zero),
    "train.conditional_chains": _CLASSES,
    "train.objective.w_xy": Refused(_CLASSES.why, _one_is_zero),
    "train.seed": Refused("weights, order and chains came of that one"),
    "output_dir": Refused("a run goes on in its own folder"),
}

# What the terms of the loss are made up of, besides weights and chains: one that becomes harder is not lost.
_OF_TERMS = ["data.crop_padding", "data.flip", "model.drop_rate", "model.drop_path_rate"]
_OF_TERMS += [f"train.{name}" for name in ("objective", "balance", "px_augment", "ce_auto_augment", "data_noise", "ce_noise")]
_OF_TERMS += [f"train.attack_{name}" for name in ("norm", "eps", "steps", "step_size")] + ["train.batch_norm"]


def what_terms_are_of(settings: Settings) -> dict[str, Any]:
    """The settings that the guard's past values of the loss are of; see :class:`timm_jem.training.DivergenceGuard`."""
    sections = settings.sections()
    return {name: _value(sections, name) for name in _OF_TERMS}


def refuse_changes(
    saved: Mapping[str, Any], settings: Settings, *, section: str = "", called: Mapping[str, str] | None = None
) -> None:
    """Refuse to go on with settings that a run can't take over.

    Args:
        saved: what ``Settings.sections`` gave when the checkpoint was written.
        settings: those of now.
        section: look at its settings alone; "": at all.
        called: settings that were told by other names.

    Raises:
        InputError: with the first setting that is refused, and the reason.
    """
    now = settings.sections()
    for name, rule in REFUSED.items():
        if not name.startswith(section):
            continue
        try:
            old, new = _value(saved, name), _value(now, name)
        except KeyError:  # none of a checkpoint's sections, or none that it knew
            continue
        if old != new and rule.where(old, new):
            raise InputError(
                f"{(called or {}).get(name, name)} is {new!r} now and was {old!r}, and a run that goes on can't change it "
                f"({rule.why}): leave it out, or start another run"
            )


def differences(old: Any, new: Any, name: str = "", *, called: Mapping[str, str] | None = None) -> list[str]:
    """What settings have become, a line each; ``called``: those that were told by other names."""
    name = (called or {}).get(name, name)
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return [] if old == new else [f"{name} is {new!r} now and was {old!r}"]
    lines = []
    for key in dict.fromkeys([*new, *old]):
        path = f"{name}.{key}".lstrip(".")
        if key not in new:
            lines.append(f"{path} was {old[key]!r} and is not set now")
        elif key not in old:
            lines.append(f"{path} is {new[key]!r} now and was not set")
        else:
            lines += differences(old[key], new[key], path, called=called)
    return lines


def _value(sections: Mapping[str, Any], name: str) -> Any:
    for part in name.split("."):
        sections = sections[part]
    return sections
