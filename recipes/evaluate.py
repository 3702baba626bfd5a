"""Measure all that a joint energy model claims, or any timm classifier beside it, and write one report with pictures.

    python recipes/evaluate.py runs/digits                                        # a run, a saved folder or a Hub name
    python recipes/evaluate.py user/model --preset full --ood '[cifar100, ./textures]' --extractors '[inception]'
    python recipes/evaluate.py timm:resnet18.a1_in1k --data.dataset ./imagenet    # a plain timm classifier: the baseline
    python recipes/evaluate.py --compare '[jem=runs/a/evaluation, plain=runs/b/evaluation]' --output_dir runs/compared

The data set is the one that the model was trained on, by its own provenance, unless --data.dataset says otherwise. The
folder then holds report.md, report.json and the pictures; --compare puts such folders side by side, and the ones of the
same name as mean and standard deviation.
"""

import json
import math
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.metadata import version
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import timm
import torch
from accelerate import PartialState
from accelerate.utils import tqdm
from jsonargparse import ArgumentError, ArgumentParser
from PIL import Image
from torch import Tensor

import timm_jem
from timm_jem import JEM, InputError
from timm_jem.data import DataConfig, ImageSet, Splits, load_images, load_splits
from timm_jem.errors import check_number, check_whole, one_line
from timm_jem.evaluation.attacks import PGDConfig, auto_attack, auto_attack_names, pixel_classifier
from timm_jem.evaluation.calibration import brier_score, fit_temperature, negative_log_likelihood, reliability
from timm_jem.evaluation.classification import predict
from timm_jem.evaluation.extractors import Extractor, classifier_extractor, extract, load_extractor
from timm_jem.evaluation.generation import (
    chains_by_length,
    frechet_distance,
    inception_score,
    nearest_neighbours,
    sample_quality,
)
from timm_jem.evaluation.illustrations import counterfactuals, distal_adversarials, interpolation_paths
from timm_jem.evaluation.intervals import bootstrap_interval, wilson_interval
from timm_jem.evaluation.judges import fit_judge
from timm_jem.evaluation.ood import auroc_interval, ood_metrics, ood_scores, typicality
from timm_jem.evaluation.ood_sets import constant_images, interpolations, uniform_images
from timm_jem.evaluation.pictures import image_grid, stack_pictures
from timm_jem.evaluation.refinement import RefinementConfig, refined_classifier
from timm_jem.evaluation.report import Report, Result, check_output_dir, comparison, fingerprint, read_report, write_files
from timm_jem.evaluation.robustness import is_correct, robust_correct, sanity_checks, transfer_correct
from timm_jem.modes import frozen
from timm_jem.pixels import eight_bit, to_pixels

try:
    from timm_jem.evaluation import plots
except InputError as error:  # without matplotlib
    sys.exit(f"error: {error}")

SECTIONS = ("classification", "ood", "robustness", "generation", "pictures")
GENERATED = ("interpolation", "uniform", "constant")

# Sizes of what is measured. Everything says its own n and interval; "full" is what a paper would report.
PRESETS: dict[str, dict[str, Any]] = {
    "quick": {
        "test_images": 2000,
        "ood_images": 1000,
        "attack_images": 200,
        "attack_steps": 20,
        "attack_restarts": 1,
        "auto_attack_images": 25,
        "refinement_images": 50,
        "refinement_chains": 1,
        "eot": 3,
        "samples": 500,
        "curve_samples": 250,
        "longest_chain": 500,
        "real_images": 2000,
    },
    "full": {
        "test_images": 1_000_000,
        "ood_images": 10_000,
        "attack_images": 1000,
        "attack_steps": 100,
        "attack_restarts": 5,
        "auto_attack_images": 1000,
        "refinement_images": 500,
        "refinement_chains": 1,
        "eot": 20,
        "samples": 10_000,
        "curve_samples": 1000,
        "longest_chain": 2000,
        "real_images": 50_000,
    },
}


@dataclass
class EvaluationConfig:
    """What to measure. Sizes that are None are the preset's.

    Attributes:
        preset: quick: minutes on a CPU for small models; full: what a paper would report.
        sections: which parts of the report.
        seed: of subsets, chains, attacks and resampling.
        batch_size: images through the network at once.
        baseline: another classifier (as MODEL) for transfer attacks and beside the distal adversarials.
        judge: an independent classifier (as MODEL) that reads the samples; None: a support vector machine on pixels.
        ood: out-of-distribution sets: interpolation, uniform and constant need no download; others are Hub names,
            folders or .parquet files.
        extractors: features for distances of samples: pixels, thumbnails, inception (FID's; inception:PATH where there
            is no network), timm:NAME; auto: pixels up to 8×8, thumbnails above.
        test_images: at most so many test images for accuracy and calibration.
        ood_images: at most so many of each set.
        attack_images: at most so many test images under attack.
        attack_steps, attack_restarts: of PGD.
        linf_epsilons, l2_epsilons: sizes of attacks, in [0, 1] pixel units.
        linf_epsilon, l2_epsilon: the size for AutoAttack, refinement, transfer and sanity checks.
        auto_attack_images: at most so many; 0: no AutoAttack. It needs pyautoattack.
        refinement_steps: SGLD steps k of the refinement defence (JEM-k); 0: leave it out.
        refinement_images, refinement_chains: at most so many images; chains that vote on each.
        eot: noise draws whose mean gradient attacks the refinement.
        samples: fresh chains.
        curve_samples, longest_chain: chains and longest length of the curve of quality against SGLD steps.
        real_images: at most so many training images to compare samples with.
    """

    preset: Literal["quick", "full"] = "quick"
    sections: list[Literal["classification", "ood", "robustness", "generation", "pictures"]] = field(
        default_factory=lambda: list(SECTIONS)
    )
    seed: int = 0
    batch_size: int = 256
    baseline: str | None = None
    judge: str | None = None
    ood: list[str] = field(default_factory=lambda: list(GENERATED))
    extractors: list[str] = field(default_factory=lambda: ["auto"])
    test_images: int | None = None
    ood_images: int | None = None
    attack_images: int | None = None
    attack_steps: int | None = None
    attack_restarts: int | None = None
    linf_epsilons: list[float] = field(default_factory=lambda: [n / 255 for n in (1, 2, 4, 8, 16, 32, 64)])
    l2_epsilons: list[float] = field(default_factory=lambda: [0.125, 0.25, 0.5, 1.0, 2.0])
    linf_epsilon: float = 8 / 255
    l2_epsilon: float = 0.5
    auto_attack_images: int | None = None
    refinement_steps: int = 10
    refinement_images: int | None = None
    refinement_chains: int | None = None
    eot: int | None = None
    samples: int | None = None
    curve_samples: int | None = None
    longest_chain: int | None = None
    real_images: int | None = None

    def __post_init__(self) -> None:
        for name, value in PRESETS[self.preset].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        least = dict.fromkeys(PRESETS[self.preset], 1)
        least |= {"auto_attack_images": 0, "refinement_steps": 0, "seed": 0, "batch_size": 1, "samples": 20}
        for name, value in least.items():
            check_whole(name, getattr(self, name), value)
        for name in ("linf_epsilons", "l2_epsilons"):
            for epsilon in getattr(self, name):
                check_number(name, epsilon, above=0)
        check_number("linf_epsilon", self.linf_epsilon, above=0, most=1)
        check_number("l2_epsilon", self.l2_epsilon, above=0)
        if not self.sections:
            raise InputError(f"sections is empty: give some of {', '.join(SECTIONS)}")


def parse(argv: list[str]):
    parser = ArgumentParser(prog="recipes/evaluate.py", description=__doc__.splitlines()[0], exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML file of settings; flags after it override it")
    parser.add_argument("model", type=str | None, nargs="?", help="a run, a saved folder, a Hub name, or timm:NAME")
    parser.add_argument("--output_dir", type=str | None, default=None, help="default: evaluation in the run's folder")
    parser.add_argument("--overwrite", type=bool, default=False, help="replace an earlier report in output_dir")
    parser.add_argument("--compare", type=list[str], default=[], help="reports to put side by side, as name=FOLDER or FOLDER")
    parser.add_argument("--data", type=DataConfig | None, default=None, help="images; default: those of the model's training")
    parser.add_class_arguments(EvaluationConfig, as_group=False)
    try:
        config = parser.parse_args(argv)
    except ArgumentError as error:
        raise InputError(f"{one_line(error)}; recipes/evaluate.py --help lists the settings") from error
    settings = EvaluationConfig(**{f.name: config[f.name] for f in fields(EvaluationConfig)})
    return config, settings, parser.instantiate(config).data


@dataclass
class Evaluation:
    """What all sections share. Every random choice has a generator of its own: no section changes another's numbers.

    ``test`` and its labels ``y`` are 8-bit images in a random order, so that the first n are an honest subset.
    """

    settings: EvaluationConfig
    jem: JEM
    test: Tensor
    y: Tensor
    val: Tensor
    val_y: Tensor
    train: Tensor
    train_y: Tensor
    class_names: list[str]
    split: str
    held_out: str
    baseline: JEM | None
    judge_model: JEM | None
    extractors: list[Extractor]
    outliers: dict[str, Tensor]
    report: Report
    pictures: dict[str, Any] = field(default_factory=dict)

    def generator(self, offset: int = 0) -> torch.Generator:
        return torch.Generator().manual_seed(self.settings.seed + 1000 * offset)

    def add(self, section: str, table: str, row: str, value: float, n: int, protocol: str, column: str = "", **more) -> None:
        self.report.results.append(Result(section, table, row, column, float(value), n, protocol, **more))

    def share(self, section: str, table: str, row: str, correct: Tensor, protocol: str, column: str = "", **more) -> None:
        """A proportion, with Wilson's interval."""
        low, high = wilson_interval(int(correct.sum()), len(correct))
        value = correct.double().mean().item()
        self.add(section, table, row, value, len(correct), protocol, column, low=low, high=high, interval=WILSON, **more)

    def curve(self, section: str, table: str, correct: dict[float, Tensor], norm: str, protocol: str, **more) -> tuple:
        """Proportions by the size of an attack; and sizes, values and interval ends for their plot."""
        for epsilon, right in correct.items():
            self.share(section, table, sized(norm, epsilon), right, protocol, seed=self.settings.seed, split=self.split, **more)
        added = self.report.results[-len(correct) :]
        return list(correct), *([getattr(result, key) for result in added] for key in ("value", "low", "high"))

    def picture(self, section: str, file: str, picture: Any, caption: str) -> None:
        self.pictures[file] = picture
        self.report.pictures.append((section, file, caption))


WILSON = "Wilson, 95 %"
BOOTSTRAP = "bootstrap over images, 95 %"


def load_model(name: str) -> JEM:
    """A run, a saved folder, a Hub name or timm:NAME."""
    if name.startswith("timm:"):
        return timm_jem.create_model(name.removeprefix("timm:"), pretrained=True)
    path = Path(name)
    if path.is_dir() and (path / "model").is_dir():
        path = path / "model"
    elif path.is_dir() and (path / "config.yaml").is_file() and not (path / "config.json").is_file():
        raise InputError(f"{name} is a run without a model: wait for its end, or give one of its best/ models")
    return timm_jem.from_pretrained(path if path.is_dir() else name)


def data_config(jem: JEM, name: str, given: DataConfig | None) -> tuple[DataConfig, bool]:
    """The images to evaluate on, and whether they are split as in the model's own training."""
    trained = jem.provenance.get("config", {}).get("data")
    own = None
    if isinstance(trained, dict):
        known = {f.name for f in fields(DataConfig)}
        try:
            own = DataConfig(**{key: value for key, value in trained.items() if key in known})
        except TypeError as error:
            raise InputError(f"the data settings of {name} are broken ({one_line(error)}): give --data.dataset") from error
    if given is None and own is None:
        raise InputError(f"{name} doesn't say what it was trained on: give --data.dataset")
    config = own if given is None else given
    channels, height, width = jem.input_size
    if config.channels is None:
        config = replace(config, channels=channels)
    if config.image_size is None and height == width:
        config = replace(config, image_size=height)
    # Which images are held out depends on these alone.
    held = ("dataset", "config_name", "train_split", "test_split", "test_fraction", "val_fraction", "split_seed", "streaming")
    alike = own is not None and all(getattr(own, key) == getattr(config, key) for key in held)
    return replace(config, labels_per_class=None, unlabeled=None), alike


def check_classes(jem: JEM, splits: Splits, name: str, dataset: str) -> None:
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


def take(images: ImageSet, rows: np.ndarray, desc: str) -> tuple[Tensor, Tensor]:
    """Some images of a set, and their labels, decoded where they aren't yet."""
    parts = np.array_split(rows, max(1, len(rows) // 256))
    fetched = [images.__getitems__(part.tolist()) for part in tqdm(parts, desc=desc, leave=False)]
    return torch.cat([part for part, _ in fetched]), torch.cat([labels for _, labels in fetched])


def some(images: Any, count: int, seed: int, desc: str) -> tuple[Tensor, Tensor]:
    """``count`` images, or all where there are fewer, in a random order of their own."""
    rng = np.random.default_rng(seed)
    if isinstance(images, ImageSet):
        return take(images, rng.permutation(len(images))[:count], desc)
    streamed = list(tqdm(islice(images.epoch(rng), count), desc=desc, total=count, leave=False))
    return torch.stack([images.decode(image) for image in streamed]), torch.tensor([image.label for image in streamed])


# --- Classification and calibration ----------------------------------------------------------------------------------


def classification(e: Evaluation) -> None:
    section, table = "Classification and calibration", "p(y|x) of test images"
    logits, y = predict(e.jem, in_batches(e.test, e.y, e.settings.batch_size), desc="test images")
    held_out, held_out_y = predict(e.jem, in_batches(e.val, e.val_y, e.settings.batch_size), desc="held-out images")
    temperature, n, seed = fit_temperature(held_out, held_out_y), len(y), e.settings.seed
    plain = {"split": e.split}

    def bootstrap(statistic: Callable[[Tensor], float]) -> dict[str, Any]:
        low, high = bootstrap_interval(statistic, n, seed=seed)
        return {"low": low, "high": high, "interval": BOOTSTRAP, "seed": seed, **plain}

    way = "eval mode, no input noise"
    correct = logits.argmax(1) == y
    e.share(section, table, "Accuracy, top-1", correct, way, "as it is", type="accuracy", title="Accuracy", **plain)
    if e.jem.num_classes > 5:
        within = (logits.topk(5).indices == y[:, None]).any(1)
        e.share(section, table, "Accuracy, top-5", within, way, "as it is", **plain)
    curves = {}
    scaled_way = f"{way}; f(x)/T, T fitted on {len(held_out_y):,} {e.held_out}"
    for column, scaled, how in (("as it is", logits, way), ("temperature scaled", logits / temperature, scaled_way)):
        p = scaled.double().softmax(1)
        losses, briers = negative_log_likelihood(scaled, y), brier_score(p, y)
        bins, row = reliability(p, y), "Negative log-likelihood, nats"
        e.add(section, table, row, losses.mean(), n, how, column, **bootstrap(lambda rows, v=losses: v[rows].mean().item()))
        row = "Brier score"
        e.add(section, table, row, briers.mean(), n, how, column, **bootstrap(lambda rows, v=briers: v[rows].mean().item()))
        more = bootstrap(lambda rows, p=p: reliability(p[rows], y[rows]).ece)
        if column == "as it is":
            more |= {"type": "ece", "title": "Expected calibration error, 15 equal bins, L1"}
        e.add(section, table, "ECE, 15 equal bins, L1", bins.ece, n, how, column, **more)
        adaptive = reliability(p, y, adaptive=True).ece
        e.add(section, table, "ECE, 15 bins of equally many images, L1", adaptive, n, how, column, **plain)
        e.add(section, table, "Largest gap of 15 equal bins", bins.mce, n, how, column, **plain)
        curves[column] = {
            "confidence": bins.confidence.tolist(),
            "accuracy": bins.accuracy.tolist(),
            "share": (bins.count / bins.count.sum()).tolist(),
            "ece": bins.ece,
        }
    e.add(section, table, "Temperature T", temperature, len(held_out_y), scaled_way, "temperature scaled", split=e.split)
    e.report.curves["reliability"] = curves
    caption = "Accuracy against confidence of the test images: on the diagonal, p(y|x) means what it says."
    e.picture(section, "reliability.png", plots.reliability_diagram(curves), caption)


def in_batches(images: Tensor, y: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(images.split(size), y.split(size), strict=True))


# --- Out of distribution ---------------------------------------------------------------------------------------------


def out_of_distribution(e: Evaluation) -> None:
    section = "Out-of-distribution detection"
    size = e.settings.batch_size
    inside = e.test[: e.settings.ood_images]
    reference = ood_scores(e.jem, e.val, approximate_mass=False, batch_size=size, desc="held-out images")["log p(x)"]

    def scores(images: Tensor, desc: str) -> dict[str, Tensor]:
        found = ood_scores(e.jem, images, batch_size=size, desc=desc)
        return {**found, "typicality": typicality(found["log p(x)"], reference)}

    tests = scores(inside, "scores of test images")
    sets = {name: scores(images, f"scores of {name}") for name, images in e.outliers.items()}
    tables = {
        "auroc": "AUROC",
        "aupr_out": "AUPR, out-of-distribution positive",
        "aupr_in": "AUPR, in-distribution positive",
        "fpr95_in": "FPR95, in-distribution positive: share of outliers accepted where 95 % of test images are",
        "fpr95_out": "FPR95, out-of-distribution positive: share of test images rejected where 95 % of outliers are",
    }
    found: dict[str, dict[str, dict[str, float]]] = {
        name: {score: ood_metrics(tests[score], of_set[score]) for score in tests} for name, of_set in sets.items()
    }
    typical = f"typicality: distance to the mean log p(x) of {len(reference):,} {e.held_out}"
    for metric, table in tables.items():
        for name, of_set in sets.items():
            how = f"against {len(inside):,} test images; approximate mass: -|gradient of log p(x)| in pixels; {typical}"
            for score in tests:
                more = {"seed": e.settings.seed, "split": e.split}
                if metric == "auroc":
                    low, high = auroc_interval(tests[score], of_set[score], seed=e.settings.seed)
                    more |= {"low": low, "high": high, "interval": BOOTSTRAP}
                    if score == "log p(x)":
                        more |= {"type": "roc_auc", "title": f"AUROC of log p(x) against {name}"}
                value = found[name][score][metric]
                e.add(section, table, name, value, len(e.outliers[name]), how, score, **more)
    auroc = {name: {score: of_set[score]["auroc"] for score in tests} for name, of_set in found.items()}
    caption = "AUROC of each score against each set: 1 tells them apart, 0.5 is chance, below 0.5 outliers look likelier."
    e.picture(section, "ood_auroc.png", plots.auroc_table(auroc), caption)
    values = {score: {"test images": tests[score].numpy()} for score in tests}
    for name, of_set in sets.items():
        for score in tests:
            values[score][name] = of_set[score].numpy()
    caption = "Each score of test images and of the sets that the model has not seen; higher means more like the data."
    e.picture(section, "ood_scores.png", plots.score_histograms(values, "test images"), caption)
    shown = torch.cat([images[:10] for images in e.outliers.values() if len(images) >= 10])
    names = [name for name, images in e.outliers.items() if len(images) >= 10]
    if names:
        e.picture(section, "ood_sets.png", image_grid(to_pixels(shown), 10, names), "The first ten images of each set.")


# --- Robustness ------------------------------------------------------------------------------------------------------


NORMS = {"linf": "ℓ∞", "l2": "ℓ2"}


def sized(norm: str, epsilon: float) -> str:
    return f"ε = {epsilon * 255:g}/255" if norm == "linf" else f"ε = {epsilon:g}"


def robustness(e: Evaluation) -> None:
    section, s = "Robustness", e.settings
    device = e.jem.mean.device
    images, y = e.test[: s.attack_images].to(device).float() / 255, e.y[: s.attack_images].to(device)
    classifier = pixel_classifier(e.jem)
    plain = {"split": e.split, "seed": s.seed}
    sizes = {"linf": (s.linf_epsilons, s.linf_epsilon), "l2": (s.l2_epsilons, s.l2_epsilon)}
    for norm, (epsilons, _) in sizes.items():
        config = PGDConfig(norm, steps=s.attack_steps, restarts=s.attack_restarts)
        options = {"generator": e.generator(), "batch_size": s.batch_size, "desc": f"PGD {NORMS[norm]}"}
        correct = robust_correct(classifier, images, y, config, [0.0, *sorted(epsilons)], **options)
        way = f"PGD, {config.steps} steps of 2.5 ε / {config.steps}, {config.restarts} random restarts, [0, 1] pixel units"
        table = f"Accuracy under PGD, {NORMS[norm]}"
        curve = {"PGD": e.curve(section, table, correct, norm, way)}
        e.report.curves[f"accuracy under PGD, {norm}"] = curve
        caption = f"Accuracy of {len(y)} test images under PGD of growing size, with 95 % intervals."
        e.picture(section, f"pgd_{norm}.png", plots.accuracy_curves(curve, norm, table, band=WILSON), caption)

    if s.auto_attack_images:
        few, few_y = images[: s.auto_attack_images], y[: s.auto_attack_images]
        for norm, (_, epsilon) in sizes.items():
            broken = auto_attack(classifier, few, few_y, norm=norm, eps=epsilon, seed=s.seed, batch_size=s.batch_size)
            right = is_correct(classifier, broken, few_y, s.batch_size)
            row = f"{NORMS[norm]}, {sized(norm, epsilon)}"
            attacks = ", ".join(auto_attack_names("standard", e.jem.num_classes))
            way = f"AutoAttack, standard ({attacks}; Croce & Hein 2020), by pyautoattack {version('pyautoattack')}"
            more = {"type": "accuracy", "title": f"Accuracy under AutoAttack, {row}", **plain}
            e.share(section, "Accuracy under AutoAttack", row, right, way, **more)

    if s.refinement_steps:
        refinement(e, images[: s.refinement_images], y[: s.refinement_images])
    surrogate = None if e.baseline is None else pixel_classifier(e.baseline)
    if surrogate is not None:
        for norm, (_, epsilon) in sizes.items():
            config = PGDConfig(norm, epsilon, steps=s.attack_steps, restarts=s.attack_restarts)
            options = {"generator": e.generator(1), "batch_size": s.batch_size}
            right = transfer_correct(surrogate, classifier, images, y, config, **options)
            row = f"{NORMS[norm]}, {sized(norm, epsilon)}"
            way = f"PGD, {config.steps} steps, made on {Path(s.baseline).name}"
            e.share(section, "Accuracy under transferred attacks", row, right, way, **plain)
    few = min(len(y), 100)
    config = PGDConfig("linf", s.linf_epsilon, steps=s.attack_steps)
    options = {"generator": e.generator(2), "batch_size": s.batch_size, "surrogate": surrogate}
    checks = sanity_checks(classifier, images[:few], y[:few], config, **options)
    for check in checks:
        way = "checks of Carlini et al. 2019 and Athalye et al. 2018, PGD ℓ∞ at " + sized("linf", s.linf_epsilon)
        row = f"{check.name}: {'passed' if check.passed else 'FAILED'}"
        e.add(section, "Sanity of the attacks", row, check.value, few, way, "measured", **plain)
        e.add(section, "Sanity of the attacks", row, check.limit, few, way, "at most", **plain)
        if not check.passed:
            e.report.warnings.append(f"Attack check failed, robust accuracies may be overstated: {check.name}. {check.detail}")


def refinement(e: Evaluation, images: Tensor, y: Tensor) -> None:
    """JEM-k, attacked as the paper's code did and through the refinement, side by side."""
    section, s = "Robustness", e.settings
    k = s.refinement_steps
    config = RefinementConfig(steps=k, chains=s.refinement_chains)
    table = f"Accuracy with SGLD refinement, JEM-{k}, ℓ∞"
    ways = {
        "attack without the refinement's gradient": (
            "identity",
            "gradient of f at the refined image only, as the paper's code",
        ),
        "attack through the refinement": ("through", f"gradient through all {k} steps"),
    }
    epsilons = [0.0, s.linf_epsilon, 2 * s.linf_epsilon]
    curves = {}
    for column, (gradient, what) in ways.items():
        classifier = refined_classifier(e.jem, config, generator=e.generator(3), gradient=gradient)
        attack = PGDConfig("linf", steps=s.attack_steps, eot=s.eot)
        options = {"generator": e.generator(4), "batch_size": s.batch_size, "stochastic": True, "desc": column}
        correct = robust_correct(classifier, images, y, attack, epsilons, **options)
        way = f"{k} SGLD steps on E(x) before classifying; PGD, {s.attack_steps} steps, {what}, mean of {s.eot} noise draws; "
        curves[column] = e.curve(section, table, correct, "linf", way + "judged with new noise", column=column)
    picture = plots.accuracy_curves(curves, "linf", f"SGLD refinement (JEM-{k}) under two attacks", band=WILSON)
    e.picture(
        section, "refinement.png", picture, "One defence under two attacks: what it is worth is the lower of the two values."
    )


# --- Generation ------------------------------------------------------------------------------------------------------


def generation(e: Evaluation) -> None:
    section, s, jem = "Generation", e.settings, e.jem
    steps = jem.sgld.sample_steps or jem.sgld.num_steps
    classes = torch.arange(s.samples) % jem.num_classes
    x = jem.sample(y=classes, generator=e.generator(), batch_size=s.batch_size)
    broken = int((~x.flatten(1).isfinite()).any(1).sum())
    if broken:
        e.report.warnings.append(
            f"{broken} of {s.samples} fresh chains are not finite after {steps} steps: the samples have no distances, and this "
            "section is left out. Take smaller or fewer SGLD steps."
        )
        return
    fresh = eight_bit(jem.denormalize(x)).cpu()
    drawn = f"class-conditional chains of {steps} SGLD steps from uniform noise, classes in turn, none left out"
    sets = {f"fresh chains, {steps} steps": (fresh, drawn, s.seed)}
    if jem.chains is not None:
        buffered = jem.chains.images[: s.samples]
        sets["replay buffer"] = (buffered, "chains of the training's replay buffer, not fresh samples", None)
    sets["real test images"] = (e.test[: s.samples], "what real images score", s.seed)
    real_features = []
    for extractor in e.extractors:
        real = extract(extractor, e.train, batch_size=s.batch_size, desc="features of training images")
        real_features.append(real)
        table = f"Samples against {len(real):,} training images, in {extractor.name}"
        for row, (images, how, seed) in sets.items():
            features = extract(extractor, images, batch_size=s.batch_size, desc=f"features of {row}")
            quality = sample_quality(features, real, seed=s.seed)
            columns = {"frechet": "Fréchet distance", "kid": "KID", "precision": "precision", "recall": "recall"}
            for key, column in columns.items():
                name = "FID" if key == "frechet" and extractor.name.startswith("FID") else column
                more = {"seed": seed, "split": "train"}
                if key == "frechet" and row.startswith("fresh"):
                    more |= {"type": "frechet_distance", "title": f"{name} of fresh samples, in {extractor.name}"}
                way = f"{how}; KID: mean of 100 subsets; precision, recall: k = 3"
                e.add(section, table, row, quality[key], len(images), way, name, **more)
            if extractor.logits is not None:
                scores = torch.cat([extractor.logits(part).cpu() for part in images.split(s.batch_size)])
                mean, _ = inception_score(scores, seed=s.seed)
                e.add(section, table, row, mean, len(images), f"{how}; 10 splits", "IS", seed=seed)
    judged(e, sets)
    lengths(e, real_features[0])
    neighbours(e, fresh)
    shown = min(jem.num_classes, 20)
    rows = torch.cat([torch.nonzero(classes == label).flatten()[:10] for label in range(shown)])
    if all((classes[rows] == label).sum() == 10 for label in range(shown)):
        caption = f"Fresh {drawn} (seed {s.seed}): the first ten of each class."
        grid = image_grid(to_pixels(fresh[rows]), 10, e.class_names[:shown])
        e.picture(section, "samples.png", grid, caption)


def judged(e: Evaluation, sets: dict[str, tuple[Tensor, str, int | None]]) -> None:
    """What an independent classifier reads in the samples."""
    section, s = "Generation", e.settings
    if e.judge_model is None:
        judge = fit_judge(e.train[e.train_y >= 0], e.train_y[e.train_y >= 0], seed=s.seed)
        name, read = judge.name, judge.predict
    else:
        name = Path(s.judge).name

        def read(images: Tensor) -> Tensor:
            nothing = torch.full((len(images),), -1)
            return predict(e.judge_model, in_batches(images, nothing, s.batch_size), desc="judging")[0].argmax(1)

    table = "Read as asked by an independent classifier"
    way = f"by {name}"
    for row, (images, how, seed) in sets.items():
        if row == "real test images":
            asked = e.y[: len(images)]
        elif row == "replay buffer":
            if e.jem.chains.labels is None:
                continue
            asked = e.jem.chains.labels[: len(images)]
        else:
            asked = torch.arange(len(images)) % e.jem.num_classes
        e.share(section, table, row, read(images) == asked, f"{how}; {way}", seed=seed, split=e.split)


def lengths(e: Evaluation, real: Tensor) -> None:
    """Distance to ``real``, training images' features, against SGLD steps, far beyond the length chains were made for."""
    section, s, jem = "Generation", e.settings, e.jem
    own, k = jem.sgld.sample_steps or jem.sgld.num_steps, jem.sgld.num_steps
    candidates = {k, own} | {k * 2**i for i in range(20)} | {s.longest_chain}
    steps = sorted(n for n in candidates if jem.sgld.denoise_steps < n <= max(s.longest_chain, own))
    classes = torch.arange(s.curve_samples) % jem.num_classes
    extractor = e.extractors[0]
    found = {}
    for n, u in chains_by_length(jem, steps, y=classes, generator=e.generator(1), batch_size=s.batch_size):
        finite = bool(u.isfinite().all())
        features = extract(extractor, eight_bit(u).cpu(), batch_size=s.batch_size) if finite else None
        found[n] = frechet_distance(features, real) if finite else math.nan  # chains that ran away
    floor = frechet_distance(extract(extractor, e.test[: s.curve_samples], batch_size=s.batch_size), real)
    table = f"Fréchet distance against chain length, in {extractor.name}"
    for n, value in found.items():
        how = "the same class-conditional chains from noise seen at each length, against training images"
        e.add(section, table, f"{n} steps", value, s.curve_samples, how, seed=s.seed, split="train")
    curve = {"fresh chains": (list(found), list(found.values()))}
    e.report.curves["quality against length"] = curve
    picture = plots.quality_curves(curve, f"Fréchet distance, {extractor.name}", floor=floor, marks={"fresh chains": own})
    caption = f"{s.curve_samples} chains seen at growing lengths; the mark is the length that the model uses ({own} steps)."
    e.picture(section, "chain_length.png", picture, caption)


def neighbours(e: Evaluation, fresh: Tensor) -> None:
    """Whether samples are copies of training images."""
    section = "Generation"
    distances, rows = nearest_neighbours(fresh, e.train)
    of_test, _ = nearest_neighbours(e.test[: len(fresh)], e.train)
    table = "Distance to the nearest training image"
    way = f"ℓ2 in [0, 1] pixels, median; among {len(e.train):,} training images; far below real test images: copies"
    e.add(section, table, "fresh chains", distances.median(), len(fresh), way, seed=e.settings.seed)
    e.add(section, table, "real test images", of_test.median(), len(of_test), way, seed=e.settings.seed)
    pairs = torch.cat([fresh[:12], e.train[rows.flatten()[:12]]])
    grid = image_grid(to_pixels(pairs), min(12, len(fresh)), ["samples", "nearest training images"])
    e.picture(section, "neighbours.png", grid, "The first twelve samples and the training images nearest to them.")


# --- The paper's pictures --------------------------------------------------------------------------------------------


def paper_pictures(e: Evaluation) -> None:
    section, s, jem = "Pictures", e.settings, e.jem
    classes = torch.arange(min(jem.num_classes, 10))
    names = [e.class_names[label] for label in classes]
    shown = []
    for name, model in ((e.report.subject["name"], jem), (s.baseline, e.baseline)):
        if model is not None:
            u, p = distal_adversarials(model, classes, generator=e.generator())
            with torch.no_grad(), frozen(model):
                energies = [model.pixel_energy(v.to(model.mean.device)).cpu() for v in (u, to_pixels(e.test[:100]))]
            captions = [f"p {a:.2f}  E {b:.1f}" for a, b in zip(p.tolist(), energies[0].tolist(), strict=True)]
            title = f"{Path(name).name} (E of test images: {energies[1].mean():.1f} on average)"
            shown.append((title, image_grid(u, len(classes), captions=captions, column_names=names)))
    caption = (
        "Distal adversarials: from uniform noise up the slope of log p(y|x) until the classifier is sure, p > 0.9; beneath, "
        "p(y|x) and E(x). Energies of two models can't be compared with each other."
    )
    e.picture(section, "distal.png", stack_pictures(shown), caption)

    pixels, y = to_pixels(e.test), e.y
    first = torch.stack([torch.nonzero(y == label).flatten()[0] for label in y.unique()[:5]])
    second = torch.stack([torch.nonzero(y != y[row]).flatten()[1] for row in first])
    paths, energies = interpolation_paths(jem, pixels[first], pixels[second])
    captions = [f"E {value:.2f}" for value in energies.flatten().tolist()]
    grid = image_grid(paths.flatten(0, 1), paths.shape[1], captions=captions)
    e.picture(section, "interpolations.png", grid, "Straight lines between two test images, with E(x); lower is likelier.")

    targets = torch.arange(min(jem.num_classes, 10))
    rows = first[:4]
    starts = pixels[rows].repeat_interleave(len(targets), 0)
    changed = counterfactuals(jem, starts, targets.repeat(len(rows)))
    captions, cells = [], []
    for i, row in enumerate(rows):
        of_row = slice(i * len(targets), (i + 1) * len(targets))
        cells += [pixels[row][None], changed.u[of_row]]
        captions += ["test image"] + [
            f"E {a:.1f}  d {d:.1f}" for a, d in zip(changed.energy[of_row], changed.distance[of_row], strict=True)
        ]
    columns = ["from", *(f"to {e.class_names[label]}" for label in targets)]
    grid = image_grid(torch.cat(cells), len(columns), captions=captions, column_names=columns)
    caption = (
        "Counterfactuals: the least change to each class under E(x, y), with E(x, y) and the ℓ2 distance in [-1, 1] pixels."
    )
    e.picture(section, "counterfactuals.png", grid, caption)


# --- The whole -------------------------------------------------------------------------------------------------------


def prepare(settings: EvaluationConfig, name: str, data: DataConfig | None, argv: list[str]) -> Evaluation:
    """Load all that is needed. Whatever can be wrong with the input is found here, before anything is measured."""
    device = PartialState().device
    if "robustness" in settings.sections and settings.auto_attack_images:
        need("pyautoattack", "AutoAttack", "pip install 'timm_jem[robust]', or set auto_attack_images to 0")
    if "generation" in settings.sections:
        need("torch_fidelity", "the generation section", "pip install 'timm_jem[eval]'")
    jem = load_model(name)
    others = [None if other is None else load_model(other) for other in (settings.baseline, settings.judge)]
    config, alike = data_config(jem, name, data)
    splits = load_splits(config)
    check_classes(jem, splits, name, config.dataset)
    for other, flag in zip(others, ("baseline", "judge"), strict=True):
        if other is not None:
            check_classes(other, splits, getattr(settings, flag), config.dataset)
    jem.to(device)
    baseline, judge_model = (other if other is None else other.to(device) for other in others)
    test, y = some(splits.test, settings.test_images, settings.seed, "test images")
    val, val_y = some(splits.val, settings.test_images, settings.seed, "held-out images")
    wanted = settings.real_images if "generation" in settings.sections else 0
    train, train_y = some(splits.train, wanted, settings.seed, "training images") if wanted else (test[:0], y[:0])
    if len(y.unique()) < 2:
        raise InputError(f"the {len(y)} test images of {config.dataset} are of one class: give a set of several")
    with torch.no_grad(), frozen(jem):
        logits = jem(jem.normalize(to_pixels(test[: settings.batch_size].to(device))))
    if not logits.isfinite().all():
        broken = int((~logits.isfinite()).any(1).sum())
        raise InputError(f"{name} gives logits that are not finite for {broken} of {len(logits)} images: it is broken")
    _, height, width = jem.input_size
    outliers: dict[str, Tensor] = {}
    count = settings.ood_images
    if "ood" in settings.sections:
        for i, spec in enumerate(settings.ood):
            generator = torch.Generator().manual_seed(settings.seed + i)
            if spec == "interpolation":
                outliers[spec] = interpolations(test, y, count, generator)
            elif spec == "uniform":
                outliers["uniform noise"] = uniform_images(count, jem.input_size, generator)
            elif spec == "constant":
                outliers["constant colours"] = constant_images(count, jem.input_size, generator)
            else:
                options = {"channels": jem.input_size[0], "size": (height, width), "count": count, "seed": settings.seed}
                outliers[spec if Path(spec).stem in outliers else Path(spec).stem] = load_images(spec, **options)
        if not outliers:
            raise InputError(f"ood is empty: give some of {', '.join(GENERATED)}, or data sets; or leave the section out")
    extractors = []
    if "generation" in settings.sections:
        small = jem.input_size[0] * height * width <= 192
        for spec in settings.extractors:
            spec = ("pixels" if small else "thumbnails") if spec == "auto" else spec
            extractors.append(load_extractor(spec, input_size=jem.input_size, device=device))
        if not extractors:
            raise InputError("extractors is empty: give auto, pixels, thumbnails, inception or timm:NAME")
        if judge_model is not None:
            extractors.append(classifier_extractor(judge_model, f"features of {Path(settings.judge).name}"))
    fraction = f"images held out of split {config.train_split}"
    held_out = f"{fraction}, as in training" if alike else f"{fraction}, which the model may have been trained on"
    names = jem.class_names or splits.class_names
    split = config.test_split or "test"
    parameters = sum(p.numel() for p in jem.parameters())
    architecture = jem.backbone.pretrained_cfg.get("architecture") or type(jem.backbone).__name__
    subject = {
        "name": Path(name).name if Path(name).is_dir() else name,
        "model": name,
        "weights": fingerprint(jem.state_dict()),
        "data": config.dataset,
        "preset": settings.preset,
        "command": shlex.join(["python", "recipes/evaluate.py", *argv]),
        "headline": {
            "Model": f"{architecture}, {parameters:,} parameters",
            "Data": f"{config.dataset}: {len(test):,} of {len(splits.test):,} test images, {len(val):,} {held_out}",
            "Preset": f"{settings.preset}, seed {settings.seed}",
            "Versions": f"timm_jem {timm_jem.__version__}, timm {timm.__version__}, torch {torch.__version__}, {device.type}",
        },
        "settings": asdict(settings),
        "data_settings": asdict(config),
        "trained": jem.provenance.get("command"),
    }
    report = Report(subject)
    if not alike:
        report.warnings.append(f"Temperature and typicality use {held_out}.")
    return Evaluation(
        settings=settings,
        jem=jem,
        test=test,
        y=y,
        val=val,
        val_y=val_y,
        train=train,
        train_y=train_y,
        class_names=names,
        split=split,
        held_out=held_out,
        baseline=baseline,
        judge_model=judge_model,
        extractors=extractors,
        outliers=outliers,
        report=report,
    )


def need(module: str, what: str, remedy: str) -> None:
    if find_spec(module) is None:
        raise InputError(f"{what} needs {module}: {remedy}")


def save_picture(picture: Any, path: Path) -> None:
    if isinstance(picture, Image.Image):
        picture.save(path)
    else:
        plots.save_figure(picture, path)


def default_output_dir(name: str) -> str:
    if Path(name).is_dir():
        return str(Path(name) / "evaluation")
    return f"runs/evaluation/{name.replace('/', '--').replace(':', '--')}"


def compare(entries: list[str], output_dir: str | None, overwrite: bool) -> None:
    if output_dir is None:
        raise InputError("--compare needs --output_dir")
    folder = check_output_dir(output_dir, overwrite)
    reports: dict[str, list[Report]] = {}
    for entry in entries:
        name, path = entry.split("=", 1) if "=" in entry else ("", entry)
        report = read_report(path)
        reports.setdefault(name or report.subject["name"], []).append(report)
    text, data = comparison(reports)
    pictures = overlays(reports)

    def write(aside: Path) -> None:
        for file, (picture, _) in pictures.items():
            save_picture(picture, aside / file)
        shown = [f"![{caption}]({file})\n\n*{caption}*\n" for file, (_, caption) in pictures.items()]
        (aside / "compare.md").write_text("\n".join([text, *shown]), encoding="utf-8")
        (aside / "compare.json").write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")

    write_files(folder, write)
    print(f"{len(entries)} reports side by side: {folder / 'compare.md'}")


def overlays(reports: dict[str, list[Report]]) -> dict[str, tuple[Any, str]]:
    """The curves of all models in one plot each; of several runs of a model, the mean and the range."""
    pictures = {}
    for norm, shown in NORMS.items():
        curves = {}
        for name, group in reports.items():
            found = [r.curves[key]["PGD"] for r in group if (key := f"accuracy under PGD, {norm}") in r.curves]
            if found and all(curve[0] == found[0][0] for curve in found):
                accuracies = np.array([curve[1] for curve in found])
                low, high = (found[0][2], found[0][3]) if len(found) == 1 else (accuracies.min(0), accuracies.max(0))
                curves[name] = (found[0][0], accuracies.mean(0).tolist(), list(low), list(high))
        if curves:
            picture = plots.accuracy_curves(curves, norm, f"Accuracy under PGD, {shown}")
            band = "95 % interval of one run, or range over runs"
            pictures[f"pgd_{norm}.png"] = picture, f"Accuracy under PGD, {shown}; the band is the {band}."

    def of_runs(plot: str, curve: str) -> dict[str, Any]:
        """That curve of every run, numbered where a model has several."""
        return {
            name if len(group) == 1 else f"{name} {i}": report.curves[plot][curve]
            for name, group in reports.items()
            for i, report in enumerate(group, 1)
            if plot in report.curves
        }

    if bins := of_runs("reliability", "as it is"):
        caption = "Accuracy against confidence, before temperature scaling."
        pictures["reliability.png"] = plots.reliability_diagram(bins), caption
    if quality := of_runs("quality against length", "fresh chains"):
        picture = plots.quality_curves(quality, "Fréchet distance to training images")
        pictures["chain_length.png"] = picture, "Fréchet distance of fresh chains against their length."
    return pictures


PARTS: dict[str, Callable[[Evaluation], None]] = {
    "classification": classification,
    "ood": out_of_distribution,
    "robustness": robustness,
    "generation": generation,
    "pictures": paper_pictures,
}


def main(argv: list[str]) -> None:
    given, settings, data = parse(argv)
    if given.compare:
        if given.model is not None:
            raise InputError(f"--compare takes reports, and no model {given.model}: evaluate it first, then compare")
        compare(given.compare, given.output_dir, given.overwrite)
        return
    if given.model is None:
        raise InputError("which model? Give a run, a saved folder, a Hub name or timm:NAME; --help says more")
    folder = check_output_dir(given.output_dir or default_output_dir(given.model), given.overwrite)
    start = time.perf_counter()
    e = prepare(settings, given.model, data, argv)
    for part in SECTIONS:
        if part in settings.sections:
            before, began = len(e.report.results), time.perf_counter()
            PARTS[part](e)
            print(f"{part}: {len(e.report.results) - before} numbers, {time.perf_counter() - began:.0f} s", flush=True)
    e.report.subject["seconds"] = time.perf_counter() - start
    e.report.subject["headline"]["Took"] = f"{e.report.subject['seconds']:.0f} s"

    def write(aside: Path) -> None:
        for file, picture in e.pictures.items():
            save_picture(picture, aside / file)
        (aside / "report.json").write_text(e.report.as_json(), encoding="utf-8")
        (aside / "report.md").write_text(e.report.as_markdown(), encoding="utf-8")

    write_files(folder, write)
    for warning in e.report.warnings:
        print(f"warning: {warning}")
    print(f"{len(e.report.results)} numbers and {len(e.pictures)} pictures: look at {folder / 'report.md'}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except InputError as error:
        sys.exit(f"error: {error}")
