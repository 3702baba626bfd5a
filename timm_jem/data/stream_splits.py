"""Training images read one after another, and the first of them held out."""

from dataclasses import replace
from itertools import islice

import numpy as np
from datasets import Dataset, Features, Image, IterableDataset

from timm_jem.data.columns import channels_and_size, find_test_split, labelling_of
from timm_jem.data.config import DataConfig
from timm_jem.data.images import ImageSet, cache_small
from timm_jem.data.sources import LOADING_ERRORS
from timm_jem.data.streamed import StreamedImage, StreamedSet
from timm_jem.errors import InputError, one_line

__all__ = ["split_stream"]


def split_stream(
    config: DataConfig, loaded: dict[str, IterableDataset], image_column: str, label_column: str, class_names: list[str]
) -> tuple[dict[str, ImageSet | StreamedSet], StreamedSet | None]:
    """The training stream and the two held-out sets, and the stream of labelled images where there may be others."""
    test_split = find_test_split(config, loaded, image_column, label_column)

    def stream(split: str) -> StreamedSet:
        rows = loaded[split].select_columns([image_column, label_column]).cast_column(image_column, Image(decode=False))
        labelling = labelling_of(loaded[split].features, config, split, label_column, class_names)
        name = f"the shuffled split {split} of {config.dataset}"
        return StreamedSet(rows, image_column, labelling, 0, (0, 0), name, config.shuffle_buffer, labelled_only=True)

    def front(split: str, count: int) -> list[StreamedImage]:
        try:
            return list(islice(stream(split).epoch(np.random.default_rng(config.split_seed)), count))
        except InputError:
            raise
        except LOADING_ERRORS as error:
            raise InputError(f"split {split} of {config.dataset} can't be read ({one_line(error)})") from error

    count = config.stream_held_out
    wanted = count if test_split is not None else 2 * count
    held_out = front(config.train_split, wanted + 1)
    if len(held_out) <= wanted:
        raise InputError(
            f"split {config.train_split} of {config.dataset} has {len(held_out)} labelled images, and {wanted} are to be held "
            "out: lower data.stream_held_out, or leave data.streaming out"
        )
    held_out = held_out[:wanted]
    tested = held_out[count:] if test_split is None else front(test_split, count)
    if not tested:
        raise InputError(f"split {test_split} of {config.dataset} is empty: choose another")
    channels, size = channels_and_size(config, held_out[0].stored, held_out[0].what)

    def image_set(images: list[StreamedImage], split: str) -> ImageSet:
        rows = Dataset.from_dict({image_column: [i.stored for i in images]}, Features({image_column: Image(decode=False)}))
        classes, name = [i.label for i in images], stream(split).name
        return ImageSet(rows, image_column, classes, channels, size, name, range(len(images)))

    labeled = replace(
        stream(config.train_split), channels=channels, size=size, held_out=frozenset(image.digest for image in held_out)
    )
    train = replace(labeled, labelled_only=False)
    sets = {
        "train": train,
        "val": image_set(held_out[:count], config.train_split),
        "test": image_set(tested, test_split or config.train_split),
    }
    cache_small([sets["val"], sets["test"]], config.cache_gib)
    return sets, labeled if config.unlabeled_rows else None
