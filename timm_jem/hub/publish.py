"""A saved model with its card and pictures, to the Hub in one commit."""

import json
import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from timm_jem.errors import InputError, quoted
from timm_jem.files import fingerprint
from timm_jem.hub.card import CARD_FILE, CHAINS_PICTURE, PICTURES, model_card
from timm_jem.hub.local_paths import without_local_paths
from timm_jem.hub.provenance import Provenance, license_id
from timm_jem.hub.reading import CONFIG_FILE, KEY
from timm_jem.hub.repository import check_repository_name, push
from timm_jem.models.names import weights_id

__all__ = ["of_these_weights", "publish"]


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
    if not isinstance(pictures, Mapping):
        raise InputError(f"pictures are {quoted(pictures)}: give a mapping from names on the card to files")
    folder = Path(folder)
    provenance = without_local_paths(about["provenance"])
    config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    weights_license = license_id(config["pretrained_cfg"].get("license"))
    about = {**about, "provenance": Provenance.read(provenance)}
    if not about["chains"]:
        pictures = {name: file for name, file in pictures.items() if name != CHAINS_PICTURE}
    for name, file in pictures.items():
        if name not in PICTURES:
            raise InputError(f"no card shows a picture {quoted(name)}: its pictures are {', '.join(PICTURES)}")
        if not isinstance(file, (str, os.PathLike)):
            raise InputError(f"picture {name} is {quoted(file)}: give its file")
        if not Path(file).is_file() or Path(file).is_symlink():
            raise InputError(f"picture {file} is not a file of its own: leave it out")
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(file, folder / name)
    config[KEY]["provenance"] = provenance
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2), encoding="utf-8")
    card = model_card(
        repo_id=repo_id,
        weights_license=weights_license,
        timms_weights=_timms_weights(about["provenance"], config),
        pictures=[name for name in PICTURES if name in pictures],
        **about,
    )
    (folder / CARD_FILE).write_text(card, encoding="utf-8")
    return push(folder, repo_id, **options)


def of_these_weights(provenance: dict[str, Any], weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Provenance without results unless these were measured with the very weights, which is warned of.

    Args:
        provenance: as it is kept with a model; ``results_of`` in it is the digest of the weights that were measured.
        weights: the backbone's state dict.

    Raises:
        InputError: provenance that no card can tell.
    """
    Provenance.read(provenance)
    offloaded = any(tensor.is_meta for tensor in weights.values())
    if not provenance.get("results") or (not offloaded and provenance.get("results_of") == fingerprint(weights)):
        return provenance
    warnings.warn(
        "the results in this model's provenance were measured with other weights, or nobody knows with which, and don't go on "
        "its card: evaluate it again",
        stacklevel=3,
    )
    return {**provenance, "results": [], "results_of": None}


def _timms_weights(provenance: Provenance, config: Mapping[str, Any]) -> str | None:
    """The Hub's id of timm's own weights, where ``pretrained_cfg`` has their tag and nothing is known of where these came from:
    ``timm.create_model`` gives the tag to random weights as well."""
    tag = config["pretrained_cfg"].get("tag")
    if not tag or provenance.base_model is not None or provenance.has_density is not None:
        return None
    try:
        return weights_id(f"{config['architecture']}.{tag}", {})
    except RuntimeError:  # somebody else's tag
        return None
