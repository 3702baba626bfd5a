"""Small data sets of images, for tests."""

import io

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage


def pictures(n=12, size=(10, 10), mode="RGB", seed=0):
    rng = np.random.default_rng(seed)
    shape = (n, size[1], size[0], 3) if mode == "RGB" else (n, size[1], size[0])
    return [PILImage.fromarray(a) for a in rng.integers(0, 256, shape, dtype=np.uint8)]


def save(tmp_path, images=None, labels=None, image="image", label="label", feature=None):
    images = pictures() if images is None else images
    labels = [i % 3 for i in range(len(images))] if labels is None else labels
    features = Features({image: Image(), label: feature or ClassLabel(names=["ant", "bee", "cat"])})
    rows = Dataset.from_dict({image: images, label: labels}, features)
    rows.to_parquet(tmp_path / "rows.parquet")
    return str(tmp_path / "rows.parquet")


def marked(labels, start=0):
    """Grey images of 4×4 whose pixels are start, start + 1, ..."""
    cells = [PILImage.new("L", (4, 4), start + i) for i in range(len(labels))]
    features = Features({"image": Image(), "label": ClassLabel(names=["ant", "bee", "cat"])})
    return Dataset.from_dict({"image": cells, "label": labels}, features)


def marks(image_set):
    return image_set.images[:, 0, 0, 0].tolist()


def broken(tmp_path):
    buffer = io.BytesIO()
    pictures(1)[0].save(buffer, "png")
    cells = [{"bytes": buffer.getvalue(), "path": None} for _ in range(12)]
    cells[5] = {"bytes": b"no image", "path": None}
    return save(tmp_path, images=cells)
