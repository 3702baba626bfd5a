"""A saved model with its card and pictures, to the Hub in one commit."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from timm_jem.errors import InputError
from timm_jem.hub.card import CARD_FILE, PICTURES, model_card
from timm_jem.hub.published_chains import CHAINS_FILE
from timm_jem.hub.repository import push

__all__ = ["publish"]


def publish(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    about: Mapping[str, Any],
    pictures: Mapping[str, str | os.PathLike],
    **options: Any,
) -> str:
    """Add card and pictures to a saved model's folder, and push it.

    Args:
        folder: a model as :func:`timm_jem.hub.folder.write_folder` writes it; card and pictures are added to it.
        repo_id: "user/name"; made if it isn't there.
        about: what :func:`timm_jem.hub.card.model_card` tells of the model.
        pictures: files to show, by their names on the card, which are those of ``timm_jem.hub.card.PICTURES``.
        **options: see :func:`timm_jem.hub.repository.push`.

    Returns:
        The commit's URL.

    Raises:
        InputError: a picture that isn't there or that no card shows, or what the Hub refuses.
    """
    folder = Path(folder)
    for name, file in pictures.items():
        if name not in PICTURES:
            raise InputError(f"no card shows a picture {name!r}: its pictures are {', '.join(PICTURES)}")
        if not Path(file).is_file() or Path(file).is_symlink():
            raise InputError(f"picture {file} is not a file of its own: leave it out")
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(file, folder / name)
    shown = [name for name in PICTURES if name in pictures]
    card = model_card(repo_id=repo_id, has_chains=(folder / CHAINS_FILE).is_file(), pictures=shown, **about)
    (folder / CARD_FILE).write_text(card, encoding="utf-8")
    return push(folder, repo_id, **options)
