"""How close drawn images are to real ones, as a section of a report."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from timm_jem.errors import InputError
from timm_jem.evaluation.chain_length import chains_by_length
from timm_jem.evaluation.classification import in_batches, predict
from timm_jem.evaluation.extractors import Extractor, extract
from timm_jem.evaluation.generation import (
    FEWEST_SAMPLES,
    FEWEST_SCORED,
    frechet_distance,
    inception_score,
    nearest_neighbours,
    sample_quality,
    within_class_distance,
)
from timm_jem.evaluation.judges import fit_judge
from timm_jem.evaluation.pictures import image_grid
from timm_jem.evaluation.plots import AGAINST_LENGTH, quality_curves
from timm_jem.evaluation.section import Section
from timm_jem.evaluation.settings import EvaluationConfig
from timm_jem.evaluation.subject import Subject
from timm_jem.model import JEM
from timm_jem.noise import chain_generators, draw_seeds
from timm_jem.pixels import eight_bit, to_pixels

__all__ = ["SampleSet", "generation_section"]

Reader = Callable[[Tensor], Tensor]  # from 8-bit images to classes


@dataclass(frozen=True)
class SampleSet:
    """Images that are compared with real ones: a row of the tables.

    Attributes:
        name: of the row.
        images: uint8, shape (N, C, H, W).
        asked: the class that each was asked to be, int64, shape (N,); None: any.
        how: they were made.
        seed: of their making, or None.
        fresh: drawn by the model just now, so that they are what a model card tells of.
    """

    name: str
    images: Tensor
    asked: Tensor | None
    how: str
    seed: int | None
    fresh: bool = False


def generation_section(subject: Subject, config: EvaluationConfig, section: Section) -> None:
    """Fresh chains, published ones and real images: distances, what a judge reads, variety, all by length, and neighbours.

    Raises:
        InputError: fresh chains are not finite.
    """
    fresh = _fresh(subject, config)
    sets = [fresh]
    if subject.model.starts is not None:
        sets.append(_starts(subject, config))
    if (chains := subject.model.chains) is not None and len(chains) < FEWEST_SAMPLES:
        section.warn(f"The replay buffer is left out: it has {len(chains)} chains, and distances take {FEWEST_SAMPLES}.")
    elif chains is not None:
        sets.append(_buffered(subject, config))
    test, test_y = subject.test[: config.samples], subject.test_y[: config.samples]
    sets.append(SampleSet("real test images", test, test_y, "what real images score", config.seed))
    real = [_quality(config, section, extractor, subject.train, sets) for extractor in subject.extractors]
    name, read = _judge(subject, config)
    for samples in (samples for samples in sets if samples.asked is not None):
        more = {"seed": samples.seed, "split": subject.split}
        table, right = "Read as asked by an independent classifier", read(samples.images) == samples.asked
        section.share(table, samples.name, right, f"{samples.how}; by {name}", **more)
    _variety(config, section, sets)
    by = -1 if subject.judge is not None else 0  # the judge sees more than thumbnails, which noise doesn't change
    _lengths(subject, config, section, subject.extractors[by], real[by], name, read)
    _neighbours(subject, config, section, fresh.images)
    _samples(subject, section, fresh)


def _fresh(subject: Subject, config: EvaluationConfig) -> SampleSet:
    jem = subject.model
    steps = jem.sgld.sample_steps or jem.sgld.num_steps
    classes = torch.arange(config.samples) % jem.num_classes
    seeds = torch.tensor(draw_seeds(config.samples, subject.generator()))
    drawn, broken = [], 0
    for y, of_part in zip(classes.split(config.batch_size), seeds.split(config.batch_size), strict=True):
        with _precision(jem, config):
            u = jem.denormalize(jem.sample(y=y, seeds=of_part, batch_size=config.batch_size))
        broken += int((~u.flatten(1).isfinite()).any(1).sum())
        drawn += [] if broken else [eight_bit(u).cpu()]
    if broken:
        raise InputError(
            f"{broken} of {config.samples} fresh chains are not finite after {steps} steps, so there is nothing to measure: "
            "take smaller or fewer SGLD steps"
        )
    how = f"class-conditional chains of {steps} SGLD steps{_told(config)} from {_origin(jem)}, classes in turn, none left out"
    return SampleSet(f"fresh chains, {steps} steps", torch.cat(drawn), classes, how, config.seed, fresh=True)


def _precision(jem: JEM, config: EvaluationConfig) -> torch.autocast:
    """What chains are drawn in: neither features nor a judge are of that precision."""
    return torch.autocast(jem.device.type, torch.bfloat16, enabled=config.chain_precision == "bf16")


def _told(config: EvaluationConfig) -> str:
    return "" if config.chain_precision == "no" else f" in {config.chain_precision}"


def _starts(subject: Subject, config: EvaluationConfig) -> SampleSet:
    """The fresh chains before their first step: what SGLD adds is the difference."""
    classes = torch.arange(config.samples) % subject.model.num_classes
    seeds = draw_seeds(config.samples, subject.generator())
    u = subject.model.fresh(config.samples, y=classes, generator=chain_generators(seeds))
    return SampleSet("where these start", eight_bit(u), classes, f"{_origin(subject.model)}, no SGLD step", config.seed)


def _buffered(subject: Subject, config: EvaluationConfig) -> SampleSet:
    """Published chains, at random: a buffer's slots are class by class, and the first of them would be of a few."""
    chains = subject.model.chains
    rows = torch.randperm(len(chains), generator=subject.generator(2))[: config.samples]
    labels = None if chains.labels is None else chains.labels[rows]
    how = "chains of the training's replay buffer, not fresh samples"
    return SampleSet("replay buffer", chains.images[rows], labels, how, config.seed)


def _origin(jem: JEM) -> str:
    if jem.starts is None:
        return "uniform noise"
    return "Gaussians of the training images of each class" if len(jem.starts.means) > 1 else "one Gaussian of images"


def _quality(config: EvaluationConfig, section: Section, extractor: Extractor, train: Tensor, sets: list[SampleSet]) -> Tensor:
    """Add a table of distances to training images in one extractor; returns the training images' features."""
    real = extract(extractor, train, batch_size=config.batch_size, desc="features of training images")
    table = f"Samples against {len(real):,} training images, in {extractor.name}"
    frechet = "FID" if extractor.name.startswith("FID") else "Fréchet distance"
    for samples in sets:
        images = samples.images
        features = extract(extractor, images, batch_size=config.batch_size, desc=f"features of {samples.name}")
        quality = sample_quality(features, real, seed=config.seed)
        way = f"{samples.how}; KID: mean of 100 subsets; precision, recall: k = 3"
        more = {"seed": samples.seed, "split": "train"}
        title = f"{frechet} of fresh samples, in {extractor.name}"
        card = {"type": "frechet_distance", "title": title} if samples.fresh else {}
        section.add(table, samples.name, quality["frechet"], len(images), way, frechet, **more, **card)
        for key, column in {"kid": "KID", "precision": "precision", "recall": "recall"}.items():
            section.add(table, samples.name, quality[key], len(images), way, column, **more)
        if extractor.logits is not None and len(images) >= FEWEST_SCORED:
            scores = torch.cat([extractor.logits(part).cpu() for part in images.split(config.batch_size)])
            mean, _ = inception_score(scores, seed=config.seed)
            section.add(table, samples.name, mean, len(images), f"{samples.how}; 10 splits", "IS", seed=samples.seed)
    return real


def _judge(subject: Subject, config: EvaluationConfig) -> tuple[str, Reader]:
    """An independent classifier: what it is, and how it reads."""
    if subject.judge is None:
        known = subject.train_y >= 0
        judge = fit_judge(subject.train[known], subject.train_y[known], seed=config.seed)
        return judge.name, judge.predict

    def read(images: Tensor) -> Tensor:
        nothing = torch.full((len(images),), -1)
        return predict(subject.judge, in_batches(images, nothing, config.batch_size), desc="judging")[0].argmax(1)

    return Path(config.judge).name, read


def _variety(config: EvaluationConfig, section: Section, sets: list[SampleSet]) -> None:
    """How far images of a class are from each other; the last of the sets are real images."""
    compared = [samples for samples in sets if samples.asked is not None]
    distances = [within_class_distance(samples.images, samples.asked, batch_size=config.batch_size) for samples in compared]
    way = (
        "mean ℓ2 distance between two images of a class, in [0, 1] pixels, mean over classes; relative to real test images': "
        "1: as diverse, far below 1: few images again and again, above 1: noise, which can also hide that, or unlike the class"
    )
    for samples, distance in zip(compared, distances, strict=True):
        for column, value in {"distance": distance, "relative to real images": _ratio(distance, distances[-1])}.items():
            section.add("Distance within a class", samples.name, value, len(samples.images), way, column, seed=samples.seed)


def _ratio(value: float, of: float) -> float:
    """Infinite or NaN where ``of`` is 0."""
    return (torch.tensor(value, dtype=torch.float64) / of).item()


def _lengths(
    subject: Subject,
    config: EvaluationConfig,
    section: Section,
    extractor: Extractor,
    real: Tensor,
    name: str,
    read: Reader,
) -> None:
    """Fresh chains against SGLD steps, far beyond the length that they were made for: near, legible, diverse, and level?

    Args:
        subject, config, section: of the report.
        extractor, real: what distances are measured in, and that of training images.
        name, read: of the judge.
    """
    jem, count = subject.model, config.curve_samples
    own, k = jem.sgld.sample_steps or jem.sgld.num_steps, jem.sgld.num_steps
    candidates = {k, own} | {k * 2**i for i in range(20)} | {config.longest_chain}
    steps = sorted(n for n in candidates if jem.sgld.denoise_steps < n <= max(config.longest_chain, own))
    if not steps:
        return section.warn(
            f"No curves against chain length: chains of up to {max(config.longest_chain, own)} steps are free of noise, as the "
            f"last {jem.sgld.denoise_steps} of longer ones are: give a larger longest_chain."
        )
    classes = torch.arange(count) % jem.num_classes

    def seen(images: Tensor, asked: Tensor) -> tuple[float, Tensor, float]:
        features = extract(extractor, images, batch_size=config.batch_size)
        apart = within_class_distance(images, asked, batch_size=config.batch_size)
        return frechet_distance(features, real), read(images) == asked, apart

    real_frechet, real_right, real_apart = seen(subject.test[:count], subject.test_y[:count])
    how = f"the same class-conditional chains{_told(config)} from {_origin(jem)} seen at each length"
    told = {
        f"Fréchet distance against chain length, in {extractor.name}": (f"{how}, against training images", "train"),
        "Read as asked against chain length": (f"{how}; by {name}", subject.split),
        "Distance within a class against chain length": (f"{how}; relative to real test images'", subject.split),
    }
    ways = {table: {"protocol": way, "seed": config.seed, "split": split} for table, (way, split) in told.items()}
    nearness, legibility, variety = ways
    curves: list[list[float]] = [[], [], []]
    views = chains_by_length(jem, steps, y=classes, generator=subject.generator(1), batch_size=config.batch_size)
    for n, u in _each(views, _precision(jem, config)):
        row = f"{n} steps"
        if u.isfinite().all():
            frechet, right, apart = seen(eight_bit(u), classes)
            results = [
                section.add(nearness, row, frechet, count, **ways[nearness]),
                section.share(legibility, row, right, **ways[legibility]),
                section.add(variety, row, _ratio(apart, real_apart), count, **ways[variety]),
            ]
        else:  # chains that ran away
            results = [section.add(table, row, math.nan, count, **way) for table, way in ways.items()]
        for values, result in zip(curves, results, strict=True):
            values.append(result.value)
    best = min((value for value in curves[0] if not math.isnan(value)), default=math.nan)
    way = f"the distance at {steps[-1]} steps divided by the smallest of all lengths; 1: level, above: longer chains get worse"
    section.add(nearness, "longest / best", _ratio(curves[0][-1], best), count, **{**ways[nearness], "protocol": way})
    panels = {measure: {"fresh chains": (steps, values)} for measure, values in zip(AGAINST_LENGTH, curves, strict=True)}
    section.curves.update(panels)
    floors = dict(zip(AGAINST_LENGTH, (real_frechet, real_right.double().mean().item(), 1.0), strict=True))
    picture = quality_curves(panels, features=extractor.name, floors=floors, marks={"fresh chains": own})
    caption = f"{count} chains seen at growing lengths; the ring is the length that the model uses ({own} steps)."
    section.picture("chain_length.png", picture, caption)


def _each(views: Iterator[tuple[int, Tensor]], precision: torch.autocast) -> Iterator[tuple[int, Tensor]]:
    """The views, each of them made in that precision and looked at outside of it."""
    while True:
        with precision:
            view = next(views, None)
        if view is None:
            return
        yield view


def _neighbours(subject: Subject, config: EvaluationConfig, section: Section, fresh: Tensor) -> None:
    """Whether samples are copies of training images."""
    train, test = subject.train, subject.test[: len(fresh)]
    distances, rows = nearest_neighbours(fresh, train, batch_size=config.batch_size)
    of_test, _ = nearest_neighbours(test, train, batch_size=config.batch_size)
    table = "Distance to the nearest training image"
    way = f"ℓ2 in [0, 1] pixels, median; among {len(train):,} training images; far below real test images: copies"
    section.add(table, "fresh chains", distances.quantile(0.5), len(fresh), way, seed=subject.seed)
    section.add(table, "real test images", of_test.quantile(0.5), len(test), way, seed=subject.seed)
    pairs = torch.cat([fresh[:12], train[rows.flatten()[:12]]])
    grid = image_grid(to_pixels(pairs), min(12, len(fresh)), ["samples", "nearest training images"])
    section.picture("neighbours.png", grid, "The first twelve samples and the training images nearest to them.")


def _samples(subject: Subject, section: Section, fresh: SampleSet) -> None:
    """Ten samples of each class, of up to twenty classes, where there are so many."""
    shown = min(subject.model.num_classes, 20)
    rows = [torch.nonzero(fresh.asked == label).flatten()[:10] for label in range(shown)]
    if all(len(of_class) == 10 for of_class in rows):
        caption = f"Fresh {fresh.how} (seed {fresh.seed}): the first ten of each class."
        grid = image_grid(to_pixels(fresh.images[torch.cat(rows)]), 10, subject.class_names[:shown])
        section.picture("samples.png", grid, caption)
