"""Training images read one after another, and the first of them held out."""

from dataclasses import replace
from itertools import islice

import numpy as np
from datasets import Dataset, Features, Image, IterableDataset

from timm_jem.data.columns import find_test_split, labelling_of
from timm_jem.data.config import DataConfig
from timm_jem.data.headers import Headers, read_headers
from timm_jem.data.images import ImageSet, cache_small
from timm_jem.data.sources import LOADING_ERRORS
from timm_jem.data.streamed import StreamedImage, StreamedSet
from timm_jem.decoding import Fit
from timm_jem.errors import InputError, one_line

__all__ = ["split_stream"]


def split_stream(
    config: DataConfig,
    loaded: dict[str, IterableDataset],
    image_column: str,
    label_column: str,
    class_names: list[str],
    size: tuple[int, int] | None,
    fit: Fit,
) -> tuple[dict[str, ImageSet | StreamedSet], StreamedSet | None, Headers, int]:
    """The training stream and the two held-out sets, the stream of labelled images where there may be others, headers of
    the images held out, and how many of these were broken and left out."""
    test_split = find_test_split(config, loaded, image_column, label_column)

    def stream(split: str) -> StreamedSet:
        rows = loaded[split].select_columns([image_column, label_column]).cast_column(image_column, Image(decode=False))
        labelling = labelling_of(loaded[split].features, config, split, label_column, class_names)
        name = f"the shuffled split {split} of {config.dataset}"
        return StreamedSet(
            *(rows, image_column, labelling, 0, (0, 0), name, config.shuffle_buffer),
            labelled_only=True,
            skip_broken=config.skip_broken,
        )

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

    def stored(images: list[StreamedImage]) -> Dataset:
        return Dataset.from_dict({image_column: [i.stored for i in images]}, Features({image_column: Image(decode=False)}))

    headers = read_headers(stored(held_out), image_column, stream(config.train_split).name)
    channels, size = headers.channels_for(config), size or headers.size_for(config)

    def image_set(images: list[StreamedImage], split: str) -> ImageSet:
        rows = stored(images)
        classes, name = [i.label for i in images], stream(split).name
        return ImageSet(rows, image_column, classes, channels, size, name, range(len(images)), fit)

    digests = frozenset(image.digest for image in held_out)
    labeled = replace(stream(config.train_split), channels=channels, size=size, held_out=digests, fit=fit)
    train = replace(labeled, labelled_only=False)
    sets = {
        "val": image_set(held_out[:count], config.train_split),
        "test": image_set(tested, test_split or config.train_split),
    }
    sets, left_out = cache_small(sets, config.cache_gib, skip_broken=config.skip_broken)
    return {"train": train, **sets}, labeled if config.unlabeled_rows else None, headers, left_out
