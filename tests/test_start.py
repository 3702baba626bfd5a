"""What a run says of its method before it starts."""

from dataclasses import replace

import pytest

from timm_jem import ObjectiveConfig, SGLDConfig
from timm_jem.data import DataConfig
from timm_jem.training import ModelConfig, Settings, TrainConfig
from timm_jem.training.settings import ClassifierConfig
from timm_jem.training.start import _notes, method_in_words, without_effect

ALONE, BCE = ObjectiveConfig(w_x=0.0), ObjectiveConfig(contrast="bce")


@pytest.mark.parametrize(
    ("told", "words"),
    [
        (TrainConfig(), "cross-entropy + likelihood of x; chains of 25 steps from noise"),
        (TrainConfig(objective=ALONE), "cross-entropy"),
        (TrainConfig(objective=replace(ALONE, energy_l2=1.0), sam_rho=2.0), "cross-entropy; sharpness-aware minimisation"),
        (TrainConfig(objective=ALONE, attack_norm="linf"), "cross-entropy of attacked images (linf 0.0314)"),
        (
            TrainConfig(objective=ObjectiveConfig(0.5, 0.0, 0.03, "softplus", 0.002), ramp_steps=9, step_cosine=0.4),
            "0.5 × cross-entropy + 0.03 × softplus contrast of (x, y) + 0.002 × squared energies; "
            "class-conditional chains of 1 to 25 steps (of adapted size) from noise",
        ),
        (
            TrainConfig(objective=BCE, attack_norm="l2", init="gaussian", restart_prob=1, ramp_auc=0.8),
            "cross-entropy of attacked images (l2 0.5) + BCE contrast of x; "
            "chains of 1 to 25 steps from class Gaussians, new ones each time",
        ),
        (
            TrainConfig(objective=ObjectiveConfig(w_ce=0.0), sam_rho=1.0),
            "likelihood of x; chains of 25 steps from noise; sharpness-aware minimisation",
        ),
    ],
)  # fmt: skip
def test_the_method_in_words(told, words):
    assert method_in_words(Settings(train=told, sgld=SGLDConfig(num_steps=25))) == words


def test_a_method_with_starts_elsewhere():
    data, sgld = DataConfig("digits", starts="user/photos"), SGLDConfig(num_steps=5, step_decay=True)
    words = "chains of 5 steps (falling to 0) from images of user/photos; balanced gradients"
    told = Settings(data=data, train=TrainConfig(balance=True), sgld=sgld)
    assert method_in_words(told) == f"cross-entropy + likelihood of x; {words}"


NO_CHAINS = "nothing: train.objective.w_x and w_xy are 0, and no chain moves"


@pytest.mark.parametrize(
    ("told", "notes"),
    [
        (TrainConfig(), []),
        (TrainConfig(objective=ALONE), []),
        (TrainConfig(objective=ALONE, ramp_auc=0.8), [f"train.ramp_auc does {NO_CHAINS}"]),
        (TrainConfig(objective=ALONE, step_cosine=0.4, ramp_steps=9), [f"train.ramp_steps, train.step_cosine do {NO_CHAINS}"]),
        (TrainConfig(objective=replace(ALONE, contrast="bce")), [f"train.objective.contrast does {NO_CHAINS}"]),
        (TrainConfig(ramp_auc=0.8, step_cosine=0.4, init="gaussian", ramp_from=2), []),
        (TrainConfig(ramp_from=2), ["train.ramp_from does nothing: there is no train.ramp_steps or ramp_auc"]),
        (TrainConfig(attack_steps=3), ["train.attack_steps does nothing: there is no train.attack_norm"]),
        (TrainConfig(attack_steps=3, attack_norm="l2"), []),
        (TrainConfig(sam_adaptive=False), ["train.sam_adaptive does nothing: train.sam_rho is 0"]),
        (TrainConfig(sam_adaptive=False, sam_rho=0.1), []),
    ],
)  # fmt: skip
def test_what_does_nothing_is_said(told, notes):
    assert without_effect(Settings(train=told)) == notes


def test_a_classifier_first_does_nothing_for_weights_that_are_trained():
    first = ClassifierConfig(steps=5)
    assert without_effect(Settings(model=ModelConfig("resnet18"), classifier=first)) == []
    (note,) = without_effect(Settings(model=ModelConfig("resnet18", pretrained=True), classifier=first))
    assert note == "classifier.steps does nothing: the weights are trained already"


def test_what_chains_alone_have_does_nothing_without_them():
    told = Settings(DataConfig(starts="digits"), train=TrainConfig(objective=ALONE), sgld=SGLDConfig(step_decay=True))
    assert without_effect(told) == [f"data.starts, sgld.step_decay do {NO_CHAINS}"]


def test_the_papers_length_is_announced():
    planned = TrainConfig(warmup_steps=1000, buffer_size=10_000)
    for model, train, said in (
        (ModelConfig(), planned, 1),
        (ModelConfig("wrn_10_1"), planned, 0),
        (ModelConfig(), replace(planned, steps=5000), 0),
    ):
        notes = _notes(Settings(model=model), Settings(model=model, train=train), 1)
        assert len(notes) == said
        assert all("wrn_28_10 and 117,000 steps are the paper's" in note and "--config own_data" in note for note in notes)
