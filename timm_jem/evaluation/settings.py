"""What an evaluation measures, and how much of it."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from timm_jem.errors import InputError, check_number, check_whole, need, quoted
from timm_jem.ood import METHODS

__all__ = ["DEFAULT_DETECTORS", "PRESETS", "SECTIONS", "TITLES", "EvaluationConfig", "check_libraries"]

SectionName = Literal["classification", "ood", "robustness", "generation", "pictures"]
SECTIONS: tuple[SectionName, ...] = get_args(SectionName)
TITLES: dict[SectionName, str] = {
    "classification": "Classification and calibration",
    "ood": "Out-of-distribution detection",
    "robustness": "Robustness",
    "generation": "Generation",
    "pictures": "Pictures",
}

# Every number states its own n and interval; "full" is what a paper would report.
PRESETS: dict[str, dict[str, int]] = {
    "quick": {
        "test_images": 2000,
        "ood_images": 1000,
        "attack_images": 200,
        "attack_steps": 20,
        "attack_restarts": 1,
        "auto_attack_images": 25,
        "refinement_images": 50,
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
        "eot": 20,
        "samples": 10_000,
        "curve_samples": 1000,
        "longest_chain": 2000,
        "real_images": 50_000,
    },
}


# The settings that tell a section's numbers apart; those of all sections are added. batch_size is none, so that the same
# command goes on with less where memory ran out: attacks whose noise is drawn batch by batch have it in their protocol.
_OF_ALL = ("seed", "test_images")
_OF_SECTION: dict[SectionName, tuple[str, ...]] = {
    "classification": (),
    "ood": ("ood", "ood_images", "detectors"),
    "robustness": (
        "baseline",
        "attack_images",
        "attack_steps",
        "attack_restarts",
        "linf_epsilons",
        "l2_epsilons",
        "linf_epsilon",
        "l2_epsilon",
        "auto_attack_images",
        "refinement_steps",
        "refinement_images",
        "eot",
    ),
    "generation": ("judge", "extractors", "samples", "curve_samples", "longest_chain", "chain_precision", "real_images"),
    "pictures": ("baseline",),
}


# One forward and one backward give them, and no other library.
DEFAULT_DETECTORS = ("energy", "msp", "max_logit", "approximate_mass", "typicality", "mahalanobis")


@dataclass
class EvaluationConfig:
    """What to measure. Sizes that are None are the preset's.

    One class for all sections: they share most of these, and each is a flag of its own name.

    Attributes:
        preset: quick: minutes on a CPU for small models; full: what a paper would report. It gives the numbers that are null.
        sections: which parts of the report.
        seed: of subsets, chains, attacks and resampling.
        batch_size: images through the network at once.
        baseline: another classifier (as MODEL) for transfer attacks and beside the distal adversarials.
        judge: an independent classifier (as MODEL) that reads the samples; None: a support vector machine on pixels.
        ood: out-of-distribution sets: interpolation, uniform and constant need no download; others are Hub names,
            folders or .parquet files, which ?split=NAME, ?image_column=NAME or several, joined by &, may follow.
        detectors: of images out of distribution: all, or some of msp, max_logit, energy, react, ash, dice, vim, knn,
            mahalanobis, gradnorm, approximate_mass, typicality; react, ash, dice, vim and knn need pytorch-ood.
        extractors: features for distances of samples: pixels, thumbnails, pyramid (thumbnails and the strength of finer
            detail), inception (FID's; inception:PATH where there is no network), timm:NAME; auto: pixels up to 8×8,
            thumbnails above.
        test_images: how many test images, at most, for accuracy and calibration; and as many held-out ones, for what is fitted.
        ood_images: how many images of each set, at most.
        attack_images: how many test images to attack, at most.
        attack_steps: steps of PGD.
        attack_restarts: random starts of PGD.
        linf_epsilons: sizes of ℓ∞ attacks, in [0, 1] pixel units, such as 8/255.
        l2_epsilons: sizes of ℓ2 attacks, in [0, 1] pixel units.
        linf_epsilon: size of the ℓ∞ attack in AutoAttack, refinement, transfer and the sanity checks.
        l2_epsilon: size of the ℓ2 attack in AutoAttack and transfer.
        auto_attack_images: how many images for AutoAttack, at most; 0: no AutoAttack. It needs pyautoattack.
        refinement_steps: SGLD steps k of the refinement defence (JEM-k); 0: leave it out.
        refinement_images: how many images for the refinement defence, at most.
        eot: noise draws whose mean gradient attacks the refinement.
        samples: how many fresh chains.
        curve_samples: how many chains for the curve of quality against SGLD steps.
        longest_chain: where that curve ends, in SGLD steps.
        chain_precision: no: chains of float32; bf16: bfloat16 autocast, faster on processors that compute in it.
        real_images: how many training images to compare samples with, at most.

    Raises:
        InputError: a value outside its range, or no sections.
    """

    preset: Literal["quick", "full"] = "quick"
    sections: list[SectionName] = field(default_factory=lambda: list(SECTIONS))
    seed: int = 0
    batch_size: int = 256
    baseline: str | None = None
    judge: str | None = None
    ood: list[str] = field(default_factory=lambda: ["interpolation", "uniform", "constant"])
    detectors: list[str] = field(default_factory=lambda: list(DEFAULT_DETECTORS))
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
    eot: int | None = None
    samples: int | None = None
    curve_samples: int | None = None
    longest_chain: int | None = None
    chain_precision: Literal["no", "bf16"] = "no"
    real_images: int | None = None

    def __post_init__(self) -> None:
        for name, value, known in (
            ("preset", self.preset, tuple(PRESETS)),
            ("chain_precision", self.chain_precision, ("no", "bf16")),
            *(("one of the sections", section, SECTIONS) for section in self.sections),
        ):
            if value not in known:
                raise InputError(f"{name} is {quoted(value)}: give {', '.join(known[:-1])} or {known[-1]}")
        for name, value in PRESETS[self.preset].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        least: dict[str, Any] = dict.fromkeys(PRESETS[self.preset], 1)
        least |= {"auto_attack_images": 0, "refinement_steps": 0, "batch_size": 1, "samples": 20}
        least |= {"curve_samples": 2, "real_images": 5}  # fewer have no covariance, and no third-nearest neighbour
        for name, value in least.items():
            check_whole(name, getattr(self, name), value)
        check_whole("seed", self.seed, 0, 2**31 - 1)
        for name, most in (("linf_epsilon", 1), ("l2_epsilon", math.inf)):
            check_number(name, getattr(self, name), above=0, most=most)
            if not isinstance(epsilons := getattr(self, f"{name}s"), list | tuple):
                raise InputError(f"{name}s is {quoted(epsilons)}: give a list of sizes, in [0, 1] pixel units")
            for epsilon in epsilons:
                check_number(f"{name}s", epsilon, above=0, most=most)
        self.detectors = _detectors(self.detectors)
        self.sections = list(dict.fromkeys(self.sections))
        if not self.sections:
            raise InputError(f"sections is empty: give some of {', '.join(SECTIONS)}")

    def of_section(self, name: SectionName) -> dict[str, Any]:
        """The settings that change a section's numbers."""
        return {setting: getattr(self, setting) for setting in (*_OF_ALL, *_OF_SECTION[name])}

    @property
    def without_effect(self) -> list[str]:
        """Settings that are told, and that none of these sections asks for."""
        usual = EvaluationConfig(preset=self.preset)
        asked = {setting for section in self.sections for setting in _OF_SECTION[section]}
        others = dict.fromkeys(setting for settings in _OF_SECTION.values() for setting in settings if setting not in asked)
        return [setting for setting in others if getattr(self, setting) != getattr(usual, setting)]

    @property
    def refines(self) -> bool:
        """Whether the refinement defence is attacked, which needs second derivatives of the model."""
        return "robustness" in self.sections and self.refinement_steps > 0


def _detectors(names: list[str]) -> list[str]:
    """The detectors of these names, those of the default first; "all" are all of them."""
    if unknown := [name for name in names if name != "all" and name not in METHODS]:
        raise InputError(f"detectors has {quoted(unknown[0])}: give all, or some of {', '.join(METHODS)}")
    if not names:
        raise InputError(f"detectors is empty: give all, or some of {', '.join(METHODS)}; or leave the section ood out")
    return list(dict.fromkeys(n for n in (*DEFAULT_DETECTORS, *METHODS) if "all" in names or n in names))


def check_libraries(config: EvaluationConfig) -> None:
    """Raise an InputError for a library that these sections need and that is missing."""
    need("matplotlib", "a report", "eval")
    if "ood" in config.sections and (theirs := [name for name in config.detectors if METHODS[name].library]):
        need("pytorch_ood", f"the detector {theirs[0]}", "ood")
    if "robustness" in config.sections and config.auto_attack_images:
        need("pyautoattack", "AutoAttack", "robust", ", or set auto_attack_images to 0")
    if "generation" in config.sections:
        need("torch_fidelity", "the generation section", "eval")
