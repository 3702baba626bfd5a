"""Which images, and how they become pixels: settings."""

from dataclasses import dataclass

from timm_jem.data.sources import absolute
from timm_jem.errors import InputError, check_number, check_whole

__all__ = ["DataConfig"]


@dataclass
class DataConfig:
    """Which images, and how they become pixels.

    Attributes:
        dataset: "digits" (scikit-learn's 1,797 handwritten digits of 8×8, no network), a Hub name, a local folder (of
            ``save_to_disk``, of parquet files, or of images, see :class:`timm_jem.data.folders.ImageFiles`), or a .parquet
            file. Local paths are kept from the root, so that they mean the same from any folder.
        config_name: the Hub data set's configuration, where it has several.
        train_split: split to train on.
        test_split: split that is only reported; None: the first of test, validation that has labels, or, where there is
            none, ``test_fraction`` of the train split.
        test_fraction: see ``test_split``.
        val_fraction: part of the train split held out for everything that is chosen.
        split_seed: seed of the held-out parts: the same images are held out whatever ``train.seed``.
        image_column: None: the only image column.
        label_column: None: ``label``, ``fine_label``, ``labels``, or the only column of class labels.
        channels: 1 (grey) or 3 (RGB); None: 1 where all images are grey (of some hundreds looked at), else 3.
        image_size: side in pixels, which images of another size are resized to cover, and centre-cropped to. None: the
            images' own size, where they have one in common of at most 256 a side; otherwise a multiple of 8, at most 64.
        crop_padding: random crops after reflective padding by this many pixels (paper, CIFAR-10: 4); None: an eighth
            of the side from 16 pixels up, none below.
        flip: random horizontal flips; None: yes, unless the class names are single characters or numbers.
        cache_gib: data sets that take less than this as 8-bit pixels are decoded once and kept in memory.
        labels_per_class: keep the labels of so many training images of each class, chosen by ``split_seed`` after
            validation and test images were held out; the others become unlabelled, and serve p(x) alone. Fewer are a
            part of more. None: all.
        unlabeled_rows: keep the train split's rows without a label (none, or −1) as unlabelled images. They are never
            held out.
        unlabeled: a second data set, as ``dataset``, whose images join the unlabelled ones; its labels are ignored.
            ?split=NAME (if not train), ?image_column=NAME and ?config_name=NAME may follow, joined by &.
        starts: another data set, as ``dataset``, at whose images chains start in training (DAT); its labels are ignored.
            ?split=NAME (if not train), ?image_column=NAME and ?config_name=NAME may follow, joined by &. The model then draws
            from the one Gaussian of these images; neither they nor the chains, which may show them, are published.
        skip_broken: leave out images that can't be decoded, and say how many; all are tried at the start, those of a
            stream as they come. False: the first ones stop the run by name; those of validation and test before it starts.
        streaming: read the rows one after another, as a Hub data set too large for the disk needs it. Classes must have
            names in the data set's features. Not with ``labels_per_class`` and ``unlabeled``.
        stream_held_out: how many labelled images of the shuffled train stream are held out for validation, and the
            most that are read of the test split; where there is none, as many more are held out as test images.
        shuffle_buffer: how many undecoded images of a stream are kept in memory to shuffle among. Where the rows are
            sorted by class it must span many classes, also for the held-out images.
    """

    dataset: str = "digits"
    config_name: str | None = None
    train_split: str = "train"
    test_split: str | None = None
    test_fraction: float = 0.2
    val_fraction: float = 0.1
    split_seed: int = 0
    image_column: str | None = None
    label_column: str | None = None
    channels: int | None = None
    image_size: int | None = None
    crop_padding: int | None = None
    flip: bool | None = None
    cache_gib: float = 2.0
    labels_per_class: int | None = None
    unlabeled_rows: bool = False
    unlabeled: str | None = None
    starts: str | None = None
    skip_broken: bool = False
    streaming: bool = False
    stream_held_out: int = 2000
    shuffle_buffer: int = 10_000

    def __post_init__(self) -> None:
        for name in ("dataset", "unlabeled", "starts"):
            if (told := getattr(self, name)) is None:
                continue
            if not told.strip():
                raise InputError(f"data {name} is empty: give digits, a Hub name, a folder or a .parquet file")
            setattr(self, name, absolute(told))
        for name in ("test_fraction", "val_fraction"):
            if not 0 < getattr(self, name) < 1:
                raise InputError(f"data {name} is {getattr(self, name)}: give a fraction between 0 and 1")
        check_whole("data split_seed", self.split_seed, 0)
        check_number("data cache_gib", self.cache_gib, least=0)
        if self.test_split == self.train_split:
            raise InputError(f"data test_split is {self.test_split!r}, the train split: leave it out, and a part is held out")
        if (self.unlabeled, "train") == (self.dataset, self.train_split):  # where its name tells no split
            raise InputError("data unlabeled is the train split itself: give other images, or labels_per_class")
        if self.channels not in (None, 1, 3):
            raise InputError(f"data channels is {self.channels}: give 1 (grey) or 3 (RGB)")
        if self.image_size is not None:
            check_whole("data image_size", self.image_size, 1)
        if self.crop_padding is not None:
            check_whole("data crop_padding", self.crop_padding, 0)
        if self.labels_per_class is not None:
            check_whole("data labels_per_class", self.labels_per_class, 1)
        check_whole("data stream_held_out", self.stream_held_out, 1)
        check_whole("data shuffle_buffer", self.shuffle_buffer, 1)
        for name in ("labels_per_class", "unlabeled"):
            if self.streaming and getattr(self, name) is not None:
                raise InputError(f"data {name} is {getattr(self, name)!r}, which excludes data.streaming: drop one")
