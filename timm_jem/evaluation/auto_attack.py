"""AutoAttack, by pyautoattack, on classifiers of images in [0, 1]."""

import contextlib
import sys
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from timm_jem.errors import InputError, check_number, check_whole, importing, quoted
from timm_jem.evaluation.attacks import Classifier, check_attackable, check_logits, check_norm, first_logits
from timm_jem.modes import frozen
from timm_jem.progress import tqdm

__all__ = ["auto_attack", "auto_attack_names"]

_ATTACKS = ("apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square")


def auto_attack_names(version: str, num_classes: int) -> list[str]:
    """Those of ``version`` that exist: the DLR loss needs three classes, the targeted one four (Croce & Hein, section 4)."""
    if version == "rand":
        return ["apgd-ce", "apgd-dlr"] if num_classes > 2 else ["apgd-ce"]
    dlr = {2: [], 3: ["apgd-dlr"]}.get(num_classes, ["apgd-t"])
    return ["apgd-ce", *dlr, "fab-t", "square"]


def auto_attack(
    classifier: Classifier,
    images: Tensor,
    y: Tensor,
    *,
    norm: Literal["linf", "l2"],
    eps: float,
    version: Literal["standard", "rand"] = "standard",
    attacks: Sequence[str] | None = None,
    n_iter: int | None = None,
    n_queries: int | None = None,
    seed: int = 0,
    batch_size: int = 256,
    desc: str = "AutoAttack",
) -> Tensor:
    """AutoAttack (Croce & Hein, ICML 2020, arXiv 2003.01690) by pyautoattack.

    PyTorch's global generator, which the library seeds, is put back, and so is Python's trace function, which it removes.

    Args:
        classifier: as :func:`timm_jem.evaluation.attacks.pgd`'s. A module is frozen meanwhile: FAB would leave
            gradients on its parameters.
        images, y: as :func:`timm_jem.evaluation.attacks.pgd`'s. The attack is in float32.
        norm, eps: the ball, in [0, 1] pixel units.
        version: standard: APGD-CE, targeted APGD-DLR, targeted FAB, Square, the targeted ones with up to nine targets;
            rand, for classifiers that draw noise: APGD-CE and APGD-DLR with expectation over 20 draws. Targeted DLR is
            undefined with three classes, where the untargeted one takes its place, and both are with two.
        attacks: instead of the version's: names of "apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square".
        n_iter: of APGD and FAB; None: 100, the published number. Fewer is no AutoAttack to report.
        n_queries: of Square, per image; None: 5000, the published number.
        seed: of the attack.
        batch_size: images at once.
        desc: of the progress bar, which counts images that the classifier is asked about: nobody knows their number before.

    Returns:
        Shape of ``images``, on their device; those that no attack broke are unchanged.

    Raises:
        InputError: pyautoattack is missing, an attack that doesn't exist for so few classes or pixels; or as
            :func:`timm_jem.evaluation.attacks.pgd`.
    """
    with importing("pyautoattack", "AutoAttack", "robust"):
        from pyautoattack import AutoAttack
    check_norm(norm)
    if version not in ("standard", "rand"):
        raise InputError(f"version of AutoAttack is {quoted(version)}: give standard or rand")
    y = check_attackable(images, y)
    check_number("eps of an attack", eps, least=0)
    check_whole("batch_size", batch_size, 1)
    for name, number in (("n_iter", n_iter), ("n_queries", n_queries)):
        if number is not None:
            check_whole(f"{name} of AutoAttack", number, 1)
    if isinstance(attacks, str) or (attacks is not None and (len(attacks) == 0 or not set(attacks) <= set(_ATTACKS))):
        raise InputError(f"attacks of AutoAttack are {quoted(attacks)}: give a list of {', '.join(_ATTACKS)}")
    freezing = frozen(classifier) if isinstance(classifier, nn.Module) else contextlib.nullcontext()
    progress = tqdm(desc=desc, unit=" images", leave=False)
    tracer = sys.gettrace()

    def asked(x: Tensor) -> Tensor:
        progress.update(len(x))
        return check_logits(classifier(x))

    try:
        with progress, freezing, torch.inference_mode(False), torch.random.fork_rng():
            start, y = images.detach().float().contiguous().clone(), y.clone()
            if eps == 0:
                return start.to(images.dtype)
            logits = first_logits(classifier, start, y)
            num_classes = logits.shape[1]
            names = auto_attack_names(version, num_classes) if attacks is None else list(attacks)
            _check_names(names, num_classes, norm, tuple(start.shape[2:]))
            attack = AutoAttack(
                asked,
                norm={"linf": "Linf", "l2": "L2"}[norm],
                eps=eps,
                seed=seed,
                device=logits.device,
                version=version,
            )
            attack.attacks_to_run = names
            attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = min(9, num_classes - 1)
            attack.apgd_targeted.eot_iter = attack.apgd.eot_iter
            _set_lengths(attack, n_iter, n_queries)
            broken, _ = attack.run_standard_evaluation(start, y, batch_size=batch_size)
    finally:
        sys.settrace(tracer)
    return broken.detach().to(images.dtype)


def _check_names(names: Sequence[str], num_classes: int, norm: str, size: tuple[int, int]) -> None:
    for name, least in (("apgd-dlr", 3), ("apgd-t", 4)):
        if name in names and num_classes < least:
            raise InputError(f"{name} needs {least} classes, and the classifier has {num_classes}: leave it out")
    if norm == "l2" and "square" in names and min(size) < 5:
        raise InputError(f"square under l2 needs 5 x 5 pixels, and images have {size}: leave it out")


def _set_lengths(attack, n_iter: int | None, n_queries: int | None) -> None:
    """What AutoAttack's constructor makes of the number of iterations (Croce & Hein, section 3)."""
    if n_iter is not None:
        for apgd in (attack.apgd, attack.apgd_targeted):
            apgd.n_iter = apgd.n_iter_orig = n_iter
            apgd.n_iter_2 = max(int(0.22 * n_iter), 1)
            apgd.n_iter_min = max(int(0.06 * n_iter), 1)
            apgd.size_decr = max(int(0.03 * n_iter), 1)
        attack.fab.n_iter = n_iter
    if n_queries is not None:
        attack.square.n_queries = n_queries
