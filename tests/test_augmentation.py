import random

import numpy as np
import pytest
import torch

from timm_jem import InputError
from timm_jem.data.augmentation import AutoAugment, augment


def test_augmentation():
    u = torch.arange(2 * 6 * 6).float().view(1, 2, 6, 6).expand(500, 2, 6, 6)
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(augment(u, crop_padding=0, flip=False, generator=generator), u)
    flipped = augment(u, crop_padding=0, flip=True, generator=generator)
    is_flipped = (flipped == u.flip(-1)).flatten(1).all(1)
    assert ((flipped == u).flatten(1).all(1) ^ is_flipped).all()
    assert 180 < is_flipped.sum() < 320
    cropped = augment(u, crop_padding=2, flip=False, generator=generator)
    padded = torch.nn.functional.pad(u[:1], [2] * 4, mode="reflect")[0]
    windows = {tuple(padded[:, i : i + 6, j : j + 6].flatten().tolist()) for i in range(5) for j in range(5)}
    assert {tuple(c.flatten().tolist()) for c in cropped} == windows


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5", "rand-m9-n3-tweights", "augmix-m3-w3", "original", "v0-mstd0.5", "3a"])
def test_policies_of_timm(policy, channels):
    images = torch.randint(0, 256, (12, channels, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    python_state, numpy_state = random.getstate(), np.random.get_state()
    policy = AutoAugment(policy, (16, 16))
    changed = policy(images, [(7, i) for i in range(12)])
    assert changed.shape == images.shape
    assert changed.dtype == torch.uint8
    assert not torch.equal(changed, images)
    assert torch.equal(policy(images[5:6], [(7, 5)])[0], changed[5])
    assert not torch.equal(policy(images, [(8, i) for i in range(12)]), changed)
    assert random.getstate() == python_state
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), numpy_state, strict=True))


@pytest.mark.parametrize("bad", ["", "rant", "rand-m9-q3", "rand-m9-mstd", "augmix-m", "v1", "v0-m3", "rand-n99-tweights"])
def test_unknown_policies_are_named(bad):
    with pytest.raises(InputError, match=f"auto_augment '{bad}' .*rand-m9-mstd0.5") as error:
        AutoAugment(bad, (16, 16))
    assert "\n" not in str(error.value)
