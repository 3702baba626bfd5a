"""The third reader of a saved folder: transformers, where the architecture is timm's own."""

import pytest
import timm
import torch
from PIL import Image

import timm_jem

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize(("name", "arguments"), [("resnet18", {}), ("vit_tiny_patch16_224", {"patch_size": 8, "depth": 2})])
def test_a_pipeline_reads_a_saved_folder(tmp_path, name, arguments):
    torch.manual_seed(0)
    names = [f"class {i}" for i in range(7)]
    jem = timm_jem.create_model(name, num_classes=7, input_size=(3, 64, 64), class_names=names, **arguments)
    with torch.no_grad():
        jem(torch.randn(8, 3, 64, 64))  # BatchNorm statistics that are not the initial ones
    jem.eval().save_pretrained(tmp_path)
    model = transformers.AutoModelForImageClassification.from_pretrained(tmp_path)
    x = torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model(x).logits, jem(x))
    pixels = torch.randint(0, 256, (64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    image = Image.fromarray(pixels.numpy())
    classify = transformers.pipeline("image-classification", model=str(tmp_path), top_k=7)
    transform = timm.data.create_transform(**jem.data_config, is_training=False)
    with torch.no_grad():
        expected = jem(transform(image)[None]).softmax(1)[0]
    scores = {entry["label"]: entry["score"] for entry in classify(image)}
    assert set(scores) == set(names)
    torch.testing.assert_close(torch.tensor([scores[name] for name in names]), expected)
