"""Cross-entropy alone, before joint training: what its run is told."""

import re
from dataclasses import replace

from timm_jem.training.settings import ClassifierConfig, HubConfig, Settings

__all__ = ["AS_TOLD", "as_told", "classifier_settings"]

_ALIKE = ("steps", "epochs", "batch_size", "opt", "lr", "weight_decay", "opt_kwargs", "ema_decay")
# What the classifier's own run calls a setting, and how it was told.
AS_TOLD = {f"train.{name}": f"classifier.{name}" for name in _ALIKE} | {"train.data_noise": "classifier.noise"}


def as_told(text: str) -> str:
    """An error of the classifier's own run, with its settings by the names that they were told by."""
    return re.sub(r"train\.\w+", lambda name: AS_TOLD.get(name[0], name[0]), text)


def classifier_settings(settings: Settings) -> Settings | None:
    """The settings of the classifier's run, or None: joint training starts at once, as ``classifier`` says, or from weights
    that are trained already.

    Data, network, augmentation for the cross-entropy, guard and cadences are those of joint training.
    """
    told, train = settings.classifier, settings.train
    if not settings.trains_classifier:
        return None
    alone = replace(
        train,
        steps=told.steps or train.steps,
        epochs=told.epochs,
        batch_size=told.batch_size,
        grad_accum=1,
        ce_batch_size=None,
        opt=told.opt,
        lr=told.lr,
        weight_decay=told.weight_decay,
        opt_kwargs=told.opt_kwargs,
        freeze=[],
        sam_rho=0.0,
        sched="cosine",
        warmup_steps=None,
        sched_kwargs={},
        ema_decay=told.ema_decay,
        data_noise=told.noise,
        ce_noise=None,
        conditional_chains=False,
        init="noise",
        batch_norm="eval",
        objective=replace(train.objective, w_ce=1.0, w_x=0.0, w_xy=0.0, energy_l2=0.0),
        sample_every=0,
        best_k=0,
        trackers=[],
    )
    data = replace(settings.data, starts=None)  # it has no chains
    return replace(settings, data=data, train=alone, classifier=ClassifierConfig(), hub=HubConfig())
