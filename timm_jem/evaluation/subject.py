"""What is evaluated, on which images, and beside what: everything that the sections of a report share."""

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.layers import set_fused_attn, use_fused_attn
from torch import Tensor

from timm_jem.backbone import architecture
from timm_jem.data import DataConfig, ImageSet, Splits, StreamedSet, load_splits
from timm_jem.data.identity import data_identity, same_held_out
from timm_jem.data.sources import check_remote, hub_id
from timm_jem.errors import InputError, one_line, quoted
from timm_jem.evaluation.extractors import Extractor, classifier_extractor, load_extractors
from timm_jem.evaluation.generation import FEWEST_SAMPLES
from timm_jem.evaluation.ood_sets import outlier_sets
from timm_jem.evaluation.refinement import check_second_derivatives
from timm_jem.evaluation.settings import EvaluationConfig, check_libraries
from timm_jem.files import fingerprint
from timm_jem.model import JEM
from timm_jem.modes import frozen
from timm_jem.pixels import to_pixels
from timm_jem.preprocessing import fit_of, trained_here
from timm_jem.progress import tqdm
from timm_jem.wrap import create_model, from_pretrained

__all__ = [
    "Subject",
    "check_classes",
    "data_config",
    "display_name",
    "function_of",
    "load_model",
    "load_subject",
    "sampling_of",
    "some",
    "splits_for",
]


@dataclass
class Subject:
    """What all sections share. Every random choice has a generator of its own: no section changes another's numbers.

    Attributes:
        name: what to call the model in the report.
        model: on the device that measures.
        test, val, train: 8-bit images in a random order, so that the first n are an honest subset, shapes (N, C, H, W), on
            the CPU; ``train`` is empty where samples aren't asked for.
        test_y, val_y, train_y: their labels, int64, shape (N,), −1 where unknown.
        test_total: how many test images there are.
        class_names: in order.
        data: where the images are from.
        identity: which images these are, see :func:`timm_jem.data.identity.data_identity`.
        alike: whether test and ``val`` are those that were held out in the model's training.
        split: the name of the test split.
        held_out: what ``val`` is, in words.
        warnings: what a reader must know where ``val`` is used.
        of_test: what a reader must know where test images are used, which is everywhere.
        outliers: 8-bit images out of distribution, by name; empty where they aren't asked for.
        extractors: features of samples; empty where samples aren't asked for.
        baseline, judge: other classifiers of the same images, or None.
        seed: of all generators.
    """

    name: str
    model: JEM
    test: Tensor
    test_y: Tensor
    val: Tensor
    val_y: Tensor
    train: Tensor
    train_y: Tensor
    test_total: int
    class_names: list[str]
    data: DataConfig
    identity: dict[str, Any]
    alike: bool
    split: str
    held_out: str
    warnings: list[str]
    of_test: list[str]
    outliers: dict[str, Tensor]
    extractors: list[Extractor]
    baseline: JEM | None
    judge: JEM | None
    seed: int

    def generator(self, offset: int = 0) -> torch.Generator:
        """A new generator; other offsets give other numbers."""
        return torch.Generator().manual_seed(self.seed + 1000 * offset)


def function_of(jem: JEM) -> dict[str, Any]:
    """What the logits of given weights depend on, as JSON data: architecture, its arguments, normalisation, size of images."""
    args = json.loads(json.dumps(getattr(jem.backbone, "_model_args", {}), default=str))  # as timm records them
    normalised = {name: values.flatten().tolist() for name, values in (("mean", jem.mean), ("std", jem.std))}
    return {"architecture": architecture(jem.backbone), "args": args, "input_size": list(jem.input_size), **normalised}


def sampling_of(jem: JEM) -> dict[str, Any]:
    """What samples of given weights depend on, as JSON data: settings, starts, published chains, energies to rest at."""

    def digest(kept: Any) -> str | None:
        return None if kept is None else fingerprint({name: t for name, t in vars(kept).items() if isinstance(t, Tensor)})

    reference = None if jem.sgld.rest is None else jem.reference
    rest = None if reference is None else list(reference.medians or reference.quantiles)
    return {"sgld": asdict(jem.sgld), "starts": digest(jem.starts), "chains": digest(jem.chains), "rest": rest}


def load_subject(
    name: str, model: JEM, data: DataConfig, config: EvaluationConfig, *, alike: bool, device: torch.device | str = "cpu"
) -> Subject:
    """Load everything that the sections need.

    Args:
        name: of the model.
        model: itself, see :func:`load_model`.
        data: images to evaluate on, see :func:`data_config`.
        config: what is going to be measured.
        alike: whether ``data`` are split as in the model's own training, by their settings: it counts for models that don't
            know the images themselves (:func:`timm_jem.data.identity.data_identity`).
        device: where.

    Raises:
        InputError: whatever is wrong with the input, a missing library included: it is found before anything is measured.
    """
    check_libraries(config)
    baseline, judge = (None if other is None else load_model(other) for other in (config.baseline, config.judge))
    splits = splits_for(model, data)
    identity = data_identity(splits)
    test_alike = alike
    if isinstance(known := model.provenance.get("data"), dict):
        alike, test_alike = same_held_out(known, identity), same_held_out(known, identity, ["test"])
    for jem, called in ((model, name), (baseline, config.baseline), (judge, config.judge)):
        if jem is not None:
            check_classes(jem, splits, called, data.dataset)
            jem.to(device)
    test, test_y = some(splits.test, config.test_images, config.seed, "test images")
    val, val_y = some(splits.val, config.test_images, config.seed, "held-out images")
    train, train_y = test[:0], test_y[:0]
    if "generation" in config.sections:
        train, train_y = some(splits.train, config.real_images, config.seed, "training images")
    if len(test_y.unique()) < 2:
        raise InputError(f"the {len(test_y)} test images of {data.dataset} are of one class: give a set of several")
    _check_sections(config, model, len(test))
    _check_finite(model, test[: config.batch_size], name)
    outliers: dict[str, Tensor] = {}
    if "ood" in config.sections:
        fit = fit_of(model.data_config, model.provenance)
        outliers = outlier_sets(config.ood, test, test_y, count=config.ood_images, seed=config.seed, fit=fit)
    extractors: list[Extractor] = []
    if "generation" in config.sections:
        extractors = load_extractors(config.extractors, input_size=model.input_size, device=device)
        if judge is not None:
            extractors.append(classifier_extractor(judge, f"features of {Path(config.judge).name}"))
    of_split = f"images held out of split {data.train_split}"
    seen = f"{of_split}, which the model may have been trained on"
    held_out = f"{of_split}, as in training" if alike else seen
    of_test = []
    if not test_alike and splits.test_of_train:
        of_test.append(f"Test images are {seen}: all numbers may look too good.")
    elif not test_alike and (isinstance(known, dict) or trained_here(model.provenance)):
        of_test.append(
            f"Test images are split {splits.tested_on}, which is not known to be that of the model's training: it may have "
            "been trained on some of them, and all numbers may look too good."
        )
    return Subject(
        name=display_name(name),
        model=model,
        test=test,
        test_y=test_y,
        val=val,
        val_y=val_y,
        train=train,
        train_y=train_y,
        test_total=len(splits.test),
        class_names=model.class_names or splits.class_names,
        data=data,
        identity=identity,
        alike=alike,
        split=splits.tested_on,
        held_out=held_out,
        warnings=[] if alike else [f"Temperature and typicality use {held_out}."],
        of_test=of_test,
        outliers=outliers,
        extractors=extractors,
        baseline=baseline,
        judge=judge,
        seed=config.seed,
    )


def _check_sections(config: EvaluationConfig, model: JEM, test_images: int) -> None:
    """Raise an InputError where a section can't be measured by these settings."""
    if "generation" in config.sections and test_images < FEWEST_SAMPLES:  # as real_images
        raise InputError(
            f"generation needs {FEWEST_SAMPLES} test images, and there are {test_images}: raise --test_images, or leave it out"
        )
    largest, farthest = max([config.l2_epsilon, *config.l2_epsilons]), math.sqrt(math.prod(model.input_size))
    if "robustness" in config.sections and largest > farthest:
        raise InputError(
            f"an ℓ2 attack has the size {largest:g}, and no two images are further apart than {farthest:.3g} (pixels in "
            "[0, 1]): divide grey levels by 255 in l2_epsilon and l2_epsilons"
        )
    if config.refines:
        check_second_derivatives(model, "set --refinement_steps 0 to leave the refinement out")


def display_name(name: str) -> str:
    """What to call a model in a report: a folder by its last name."""
    return Path(name).resolve().name if Path(name).is_dir() else name


def load_model(name: str, *, second_derivatives: bool = False) -> JEM:
    """The model of a run, a saved folder, a Hub name, or timm:NAME for timm's own weights.

    Args:
        name: which.
        second_derivatives: build its attention without PyTorch's fused kernels, which have none.

    Raises:
        InputError: nothing there, or not a classifier.
    """
    with _unfused_attention() if second_derivatives else contextlib.nullcontext():
        if name.startswith("timm:"):
            return create_model(name.removeprefix("timm:"), pretrained=True)
        return from_pretrained(name)


@contextlib.contextmanager
def _unfused_attention() -> Iterator[None]:
    before = use_fused_attn(), use_fused_attn(experimental=True)
    set_fused_attn(False)
    try:
        yield
    finally:
        set_fused_attn(*before)


def data_config(jem: JEM, name: str, told: Mapping[str, Any]) -> tuple[DataConfig, bool]:
    """The images to evaluate on, and whether they are split as in the model's own training.

    Args:
        jem: the model.
        name: what to call it.
        told: settings that are others than in its training, by name.

    Raises:
        InputError: no dataset is ``told``, and the model's provenance doesn't say what it was trained on, or names files here,
            itself or by a data set on the Hub, where the model is none of these: nobody's model chooses what of this machine
            is read and shown.
    """
    own = None
    if trained_here(jem.provenance):
        known, trained = {f.name for f in fields(DataConfig)}, jem.provenance["config"]["data"]
        try:
            own = DataConfig(**{key: value for key, value in trained.items() if key in known})
        except (AttributeError, TypeError) as error:
            raise InputError(f"the data settings of {name} are broken ({one_line(error)}): give --data.dataset") from error
    if own is None and "dataset" not in told:
        raise InputError(f"{name} doesn't say what it was trained on: give --data.dataset")
    if "dataset" not in told and not Path(name).is_dir() and own.dataset != "digits":
        if hub_id(own.dataset) is None:
            raise InputError(f"{name} is no folder here, and was trained on a local {quoted(own.dataset)}: give --data.dataset")
        if own.streaming:  # whose images could be any files
            raise InputError(f"{name} is no folder here, and was trained on a stream: give --data.dataset {own.dataset}")
        check_remote(own.dataset, told.get("config_name", own.config_name))
    channels, height, width = jem.input_size
    # How much memory is taken is nothing that a model's settings choose: images have its size, whatever these say.
    by_model = {"channels": channels, "image_size": height if height == width else None, "cache_gib": DataConfig.cache_gib}
    config = replace(own or DataConfig(), **{**by_model, **told, "labels_per_class": None, "unlabeled": None})
    # Which images are held out depends on these alone.
    held = ("dataset", "config_name", "train_split", "test_split", "test_fraction", "val_fraction", "split_seed", "streaming")
    alike = own is not None and all(getattr(own, key) == getattr(config, key) for key in held)
    return config, alike


def splits_for(jem: JEM, data: DataConfig) -> Splits:
    """The images of ``data`` as the model takes them; errors as of :func:`timm_jem.data.load_splits`."""
    size = None if data.image_size else jem.input_size[1:]
    return load_splits(data, size=size, fit=fit_of(jem.data_config, jem.provenance))


def check_classes(jem: JEM, splits: Splits, name: str, dataset: str) -> None:
    """Raise an InputError unless a model's classes and image shape are the data set's."""
    ours, theirs = jem.class_names, splits.class_names
    if jem.num_classes != len(theirs):
        raise InputError(f"{name} has {jem.num_classes} classes and {dataset} has {len(theirs)}: give its own --data.dataset")
    if ours is not None and list(ours) != list(theirs):
        i = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
        raise InputError(
            f"class {i} of {name} is {ours[i]!r} and of {dataset} {theirs[i]!r}: give the data set it was trained for"
        )
    if tuple(splits.image_shape) != jem.input_size:
        raise InputError(f"{name} is for images of {jem.input_size}, {dataset} gives {splits.image_shape}: --data.image_size")


def some(images: ImageSet | StreamedSet, count: int, seed: int, desc: str) -> tuple[Tensor, Tensor]:
    """``count`` images, or all where there are fewer, in a random order of their own, and their labels."""
    rng = np.random.default_rng(seed)
    if isinstance(images, ImageSet):
        rows = rng.permutation(len(images))[:count]
        parts = np.array_split(rows, max(1, len(rows) // 256))
        fetched = [images.__getitems__(part.tolist()) for part in tqdm(parts, desc=desc, leave=False)]
        return torch.cat([part for part, _ in fetched]), torch.cat([labels for _, labels in fetched])
    decoded = ((pixels, image.label) for image in images.epoch(rng) if (pixels := images.decode(image)) is not None)
    pixels, labels = zip(*tqdm(islice(decoded, count), desc=desc, total=count, leave=False), strict=True)
    return torch.stack(pixels), torch.tensor(labels)


@torch.no_grad()
def _check_finite(jem: JEM, images: Tensor, name: str) -> None:
    with frozen(jem):
        logits = jem(jem.normalize(to_pixels(images.to(jem.device))))
    if not logits.isfinite().all():
        broken = int((~logits.isfinite()).any(1).sum())
        raise InputError(
            f"{name} gives logits that are not finite for {broken} of {len(logits)} images: its weights are broken"
        )
