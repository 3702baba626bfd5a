"""A saved model with its card and pictures, to the Hub in one commit."""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm

from timm_jem.errors import InputError, quoted
from timm_jem.hub.card import CARD_FILE, CHAINS_PICTURE, PICTURES, model_card
from timm_jem.hub.local_paths import without_local_paths
from timm_jem.hub.provenance import Provenance, license_id
from timm_jem.hub.reading import CONFIG_FILE, KEY
from timm_jem.hub.repository import check_repository_name, push

__all__ = ["publish"]


def publish(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    about: Mapping[str, Any],
    pictures: Mapping[str, str | os.PathLike],
    **options: Any,
) -> str:
    """Add card and pictures to a saved model's folder, and push it. Of local paths no more goes along than their last part.

    Args:
        folder: a model as :func:`timm_jem.hub.folder.write_folder` writes it; card and pictures are added to it.
        repo_id: "user/name"; made if it isn't there.
        about: what :func:`timm_jem.hub.card.model_card` tells of the model; "provenance" as the dict that is kept with it.
        pictures: files to show, by their names on the card, which are those of ``timm_jem.hub.card.PICTURES``; that of the
            chains goes where they go.
        **options: see :func:`timm_jem.hub.repository.push`.

    Returns:
        The commit's URL.

    Raises:
        InputError: provenance that no card can tell, or a picture that isn't there or that no card shows, before anything
            is sent; or what the Hub refuses.
    """
    check_repository_name(repo_id)
    folder = Path(folder)
    provenance = without_local_paths(about["provenance"])
    config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    weights_license = license_id(config["pretrained_cfg"].get("license"))
    about = {**about, "provenance": _with_base(Provenance.read(provenance), config, weights_license)}
    if not about["chains"]:
        pictures = {name: file for name, file in pictures.items() if name != CHAINS_PICTURE}
    for name, file in pictures.items():
        if name not in PICTURES:
            raise InputError(f"no card shows a picture {quoted(name)}: its pictures are {', '.join(PICTURES)}")
        if not Path(file).is_file() or Path(file).is_symlink():
            raise InputError(f"picture {file} is not a file of its own: leave it out")
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(file, folder / name)
    config[KEY]["provenance"] = provenance
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2), encoding="utf-8")
    card = model_card(
        repo_id=repo_id,
        weights_license=weights_license,
        pictures=[name for name in PICTURES if name in pictures],
        **about,
    )
    (folder / CARD_FILE).write_text(card, encoding="utf-8")
    return push(folder, repo_id, **options)


def _with_base(provenance: Provenance, config: Mapping[str, Any], weights_license: str | None) -> Provenance:
    """With base model and licence of timm's own weights, where nothing else is known and ``pretrained_cfg`` has their tag."""
    tag = config["pretrained_cfg"].get("tag")
    if not tag or provenance.base_model is not None or provenance.has_density is not None:
        return provenance
    try:
        timms = timm.get_pretrained_cfg(f"{config['architecture']}.{tag}")
    except RuntimeError:  # somebody else's tag
        return provenance
    base_model = None if timms is None else timms.hf_hub_id
    return replace(provenance, base_model=base_model, license=provenance.license or weights_license)
