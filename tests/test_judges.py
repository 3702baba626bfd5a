import pytest
import torch
from sklearn.svm import SVC

from timm_jem import InputError
from timm_jem.data import DataConfig, load_splits
from timm_jem.evaluation.judges import fit_judge
from timm_jem.pixels import to_pixels


@pytest.fixture(scope="module")
def splits():
    return load_splits(DataConfig())


@pytest.fixture(scope="module")
def judge(splits):
    return fit_judge(splits.train.images, splits.train.labels)


def test_a_judge_reads_digits_as_the_classifier_that_it_names(splits, judge):
    train, test = (to_pixels(part.images).flatten(1) for part in (splits.train, splits.test))
    expected = SVC(C=10).fit(train, splits.train.labels).predict(test)
    assert judge.predict(splits.test.images).tolist() == expected.tolist()
    assert judge.accuracy(splits.test.images, splits.test.labels) >= 0.97
    assert judge.accuracy(splits.test.images, (splits.test.labels + 1) % 10) <= 0.03
    assert judge.name == f"a support vector classifier (C = 10) on 8×8 pixels of {len(train):,} training images"


def test_large_images_are_averaged(splits, judge):
    larger = splits.train.images.repeat_interleave(4, 2).repeat_interleave(4, 3)
    found = fit_judge(larger, splits.train.labels)
    assert "on 16×16 pixels" in found.name
    assert found.classifier.n_features_in_ == 256
    test = splits.test.images.repeat_interleave(4, 2).repeat_interleave(4, 3)
    assert found.predict(test).tolist() == judge.predict(splits.test.images).tolist()  # the same kernel


def test_at_most_so_many_training_images_by_seed(splits):
    images, y = splits.train.images, splits.train.labels
    few = [fit_judge(images, y, max_images=60, seed=seed) for seed in (0, 0, 1)]
    assert "of 60 training images" in few[0].name
    read = [judge.predict(splits.test.images) for judge in few]
    assert torch.equal(read[0], read[1])
    assert not torch.equal(read[0], read[2])
    assert read[0].dtype == torch.int64


def test_what_a_judge_refuses(splits, judge):
    images, y = splits.train.images[:50], splits.train.labels[:50]
    with pytest.raises(InputError, match="8-bit"):
        judge.predict(to_pixels(images))
    with pytest.raises(InputError, match="8-bit"):
        fit_judge(images.float() / 255, y)
    with pytest.raises(InputError, match="two classes"):
        fit_judge(images, torch.zeros(50, dtype=torch.long))
    with pytest.raises(InputError, match="1 of 50 images"):
        fit_judge(images, y.index_fill(0, torch.tensor(3), -1))
