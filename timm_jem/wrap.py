"""Three ways to a joint energy model: around a timm model, by timm's name, and from a folder or the Hub."""

import contextlib
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import timm
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError
from timm.models import resolve_model_input_args
from torch import Tensor, nn

from timm_jem.backbone import (
    check_classifier,
    is_unpooled,
    label_names,
    refuse_size,
    resolve_data_config,
    warn_of_projection,
    warn_of_unseen,
    warn_of_zero_head,
)
from timm_jem.errors import InputError, one_line, quoted
from timm_jem.files import as_path
from timm_jem.gaussians import STARTS_FILE, ClassGaussians
from timm_jem.hub.provenance import license_id
from timm_jem.hub.published_chains import CHAINS_FILE, PublishedChains
from timm_jem.hub.reading import CONFIG_FILE, KEY, WEIGHTS_FILE, model_folder, read_folder
from timm_jem.hub.repository import check_reach, explained, fetch
from timm_jem.hub.shipped import shipped
from timm_jem.model import JEM
from timm_jem.models.names import BUILD_ERRORS, check_name, weights_id
from timm_jem.reference import Reference
from timm_jem.sampling import SGLDConfig

__all__ = ["create_model", "from_pretrained", "wrap"]


def wrap(
    model: nn.Module,
    *,
    input_size: tuple[int, int, int] | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    class_names: list[str] | None = None,
    sgld: SGLDConfig = SGLDConfig(),
    provenance: dict[str, Any] | None = None,
) -> JEM:
    """See a timm classifier as a joint energy model; the model's function, weights and modes are not changed.

    Attention layers that keep what depends on their weights, LeViT's for one, get hooks that forget it in time.

    Args:
        model: any timm classifier.
        input_size: (C, H, W) of the images it is for; None: as the model's configuration says.
        mean, std: normalisation, [0, 1] pixel units; None: as the model's configuration says.
        class_names: names of the classes; None: those that the model's configuration has, if any. Predictions of a model
            without names take ImageNet's where its configuration has the tag of weights trained on it, which timm leaves there
            without these weights as well.
        sgld, provenance: see :class:`JEM`.

    Raises:
        InputError: not a timm model, no classification head, no pooling before it, or an input size that the model can't take.

    Warns:
        UserWarning: the head's weights are all zero, so that energies are flat in x and chains can't move; patches leave pixels
            out, which chains can't move; the head is a CLIP projection; or a mean of pixels in 0..255.
    """
    if isinstance(model, nn.Module) and any(isinstance(part, JEM) for part in model.modules()):
        raise InputError("this is a joint energy model already: use it as it is, or wrap its backbone")
    check_classifier(model)
    data_config, fixed_input_size = resolve_data_config(model, _plain(input_size), _plain(mean), _plain(std))
    if input_size is not None or is_unpooled(model):
        refuse_size(model, data_config["input_size"])
    warn_of_unseen(model, data_config["input_size"], stacklevel=3)
    warn_of_zero_head(model, stacklevel=3)
    warn_of_projection(model, stacklevel=3)
    jem = JEM(
        model,
        data_config=data_config,
        class_names=label_names(model) if class_names is None else class_names,
        sgld=sgld,
        provenance=provenance,
        fixed_input_size=fixed_input_size,
    )
    if max(np.atleast_1d(data_config["mean"])) > 2:
        warnings.warn(f"mean {data_config['mean']} is of pixels in 0..255: give mean and std in [0, 1] units", stacklevel=2)
    return jem


def create_model(
    model_name: str,
    pretrained: bool = False,
    *,
    input_size: tuple[int, int, int] | None = None,
    class_names: list[str] | None = None,
    sgld: SGLDConfig = SGLDConfig(),
    **kwargs: Any,
) -> JEM:
    """``timm.create_model`` and :func:`wrap` in one: of a saved joint energy model the weights alone.

    Args:
        model_name: any of ``timm.list_models()``, this package's ``wrn_*`` included, or timm's "hf-hub:" and "local-dir:".
        pretrained: load pretrained weights; classes of a model without them have no names of ImageNet's.
        input_size: (C, H, W) of the images; sets ``in_chans``, and ``img_size`` where the backbone needs it.
        class_names, sgld: see :func:`wrap`.
        **kwargs: to ``timm.create_model``: ``num_classes``, ``drop_rate``, ...

    Raises:
        InputError: an unknown name (with close matches), or what :func:`wrap` refuses.

    Warns:
        UserWarning: pretrained weights of a saved joint energy model, which :func:`from_pretrained` reads with all the rest,
            unless they get another number of classes; or as :func:`wrap`.
    """
    check_name(model_name)
    kwargs, input_size = {key: _plain(value) for key, value in kwargs.items()}, _plain(input_size)
    arguments = {"model_name": model_name, **kwargs}
    if (checkpoint := kwargs.get("checkpoint_path")) and not os.path.isfile(checkpoint):
        raise InputError(f"checkpoint_path is {str(checkpoint)!r}, and there is no such file: give one that is there")
    try:
        with _from_hub(model_name, pretrained, kwargs):
            if input_size is not None:
                arguments = resolve_model_input_args(model_name, {"input_size": input_size}, **kwargs)
            backbone = timm.create_model(pretrained=pretrained, **arguments)
    except InputError:
        raise
    except (EOFError, SafetensorError) as error:
        raise InputError(f"the weights of {model_name} can't be read ({one_line(error)}): get them again") from error
    except BUILD_ERRORS as error:
        of_size = "" if input_size is None else f" for images of {quoted(input_size)}"
        reason = f"{type(error).__name__}: " * isinstance(error, LookupError) + one_line(error)  # which may be a key alone
        raise InputError(f"{quoted(model_name)} can't be built with these arguments{of_size} ({reason})") from error
    if not pretrained:  # what timm says of its weights holds for no others
        backbone.pretrained_cfg = {key: value for key, value in backbone.pretrained_cfg.items() if key != "tag"}
    if pretrained and (saved := _saved_jem(model_name, kwargs)) is not None:
        arguments, config = saved
        backbone.pretrained_cfg = {**backbone.pretrained_cfg, "license": _stated_license(config)}  # not the architecture's
        if config.get("num_classes") == backbone.num_classes:
            warnings.warn(
                f"{model_name} is a joint energy model and these are its weights alone: timm_jem.from_pretrained({arguments}) "
                "reads its settings of chains, held-out reference, provenance, starts and published chains, too",
                stacklevel=2,
            )
    base_model = weights_id(model_name, kwargs) if pretrained else None
    provenance = None if base_model is None else {"base_model": base_model}
    return wrap(backbone, input_size=input_size, class_names=class_names, sgld=sgld, provenance=provenance)


def _plain(value: Any) -> Any:
    """Numbers of numpy's and tensors' as Python's, also in a tuple, since timm could not write them when the model is saved."""
    if isinstance(value, (np.generic, np.ndarray, Tensor)):
        value = value.tolist()
    return type(value)(map(_plain, value)) if type(value) in (tuple, list) else value


def _saved_jem(name: str, kwargs: dict[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """Arguments of :func:`from_pretrained` for a joint energy model that timm has just read, and its config.json; None: it is
    another model."""
    source, _, place = name.partition(":")
    arguments = repr(place)
    if source == "local-dir":
        file = Path(place) / CONFIG_FILE
    elif source in ("hf-hub", "hf_hub"):
        repo_id, _, revision = place.partition("@")
        arguments = f"{repo_id!r}, {revision=}" if revision else arguments
        file = try_to_load_from_cache(repo_id, CONFIG_FILE, cache_dir=kwargs.get("cache_dir"), revision=revision or None)
    else:
        return None
    if not isinstance(file, (str, Path)):
        return None
    config = json.loads(Path(file).read_text(encoding="utf-8"))
    return (arguments, config) if KEY in config else None


def _stated_license(config: dict[str, Any]) -> str | None:
    """The licence that a joint energy model states of its weights."""
    provenance = config[KEY].get("provenance") if isinstance(config[KEY], dict) else None
    return license_id(provenance.get("license")) if isinstance(provenance, dict) else None


@contextlib.contextmanager
def _from_hub(name: str, pretrained: bool, kwargs: dict[str, Any]) -> Iterator[None]:
    """Reasons of the Hub, where timm gets a model or its weights from there."""
    source, _, repo_id = name.rpartition(":")
    files = [CONFIG_FILE]
    if not source and pretrained and not any(key.startswith("pretrained_cfg") for key in kwargs):
        pretrained_cfg = timm.models.get_pretrained_cfg(name)
        repo_id = pretrained_cfg.hf_hub_id if pretrained_cfg else None
        files = [WEIGHTS_FILE, "pytorch_model.bin", *filter(None, [pretrained_cfg and pretrained_cfg.hf_hub_filename])]
    elif source not in ("hf-hub", "hf_hub"):
        repo_id = None
    if not repo_id:
        yield
        return
    repo_id, _, revision = repo_id.partition("@")
    with explained(f"{name} from {repo_id} on the Hub", cached=True):
        check_reach(repo_id, *files, revision=revision or None, cache_dir=kwargs.get("cache_dir"))
        yield


def from_pretrained(
    name: str | os.PathLike,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
    replay_buffer: bool = True,
) -> JEM:
    """Load a joint energy model from a folder, the package itself or a Hub repository, in eval mode.

    "digits", "fashion_mnist" and "cifar10" come with the package, each with a card, unless there is a folder of that name:
    hybrids by the presets of these names or of smaller networks, as their cards say. A plain timm repository works as well: it
    becomes a joint energy model with the paper's sampling settings. Only JSON and safetensors are read, and nothing in them is
    trusted.

    Args:
        name: folder written by :meth:`JEM.save_pretrained`, or of a run, which has one in ``model/``; a model of the package;
            or a Hub repository "user/name".
        revision, token, cache_dir, local_files_only, force_download: as in ``huggingface_hub.hf_hub_download``.
        replay_buffer: with published chains, where there are some.

    Raises:
        InputError: nothing there, a folder that is no such model, a ``revision`` of what is no repository, or what the Hub
            refuses.

    Warns:
        UserWarning: the model was saved with starts of its chains, or with published chains, and their file is missing.
    """
    folder, base_model = as_path(name), None
    if os.path.isdir(folder):  # Path.is_dir raises where a name is too long
        if (inside := model_folder(folder)) != folder:
            name = folder = inside
    elif (of_package := shipped(name)) is not None:
        folder = of_package
    else:
        base_model = str(name)
        folder = fetch(
            str(name),
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            force_download=force_download,
            replay_buffer=replay_buffer,
        )
    if revision is not None and base_model is None:
        raise InputError(f"{name} is no repository on the Hub, and has no revision {quoted(revision)}: leave it out")
    try:
        backbone, ours = read_folder(folder)
        known = {"base_model": base_model} if base_model is not None and not ours else None  # a repository of plain timm
        jem = wrap(backbone, sgld=_sgld_config(ours.get("sgld", {})), provenance=ours.get("provenance", known))
        jem.reference = None if ours.get("reference") is None else _reference(ours["reference"], jem.num_classes)
        if replay_buffer and (folder / CHAINS_FILE).is_file():
            jem.chains = _chains(folder / CHAINS_FILE, jem)
        elif replay_buffer and ours.get("chains"):
            warnings.warn(
                f"{name} was saved with a {CHAINS_FILE}, which is not there: no published chains can go on, and a push would "
                "leave them out; load it once while online, or copy the whole folder",
                stacklevel=2,
            )
        if (folder / STARTS_FILE).is_file():
            jem.starts = ClassGaussians.load(folder / STARTS_FILE, jem.input_size, jem.num_classes)
        elif ours.get("starts"):  # timm's own readers leave it out of the cache
            warnings.warn(
                f"{name} was saved with a {STARTS_FILE}, which is not there: fresh chains start from noise, where those of "
                "training did not, and a push would leave it out; load it once while online, or copy the whole folder",
                stacklevel=2,
            )
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
    return jem.eval()


def _reference(data: Any, num_classes: int) -> Reference:
    try:
        reference = Reference.read(data)
        reference.check_fit(num_classes)
        return reference
    except InputError as error:
        raise InputError(
            f"the reference in config.json is broken ({error}): remove it, and fit_reference makes another"
        ) from error


def _chains(file: Path, jem: JEM) -> PublishedChains:
    """The published chains, or why there are none and how to do without."""
    try:
        return PublishedChains.load(file, jem.input_size, jem.num_classes)
    except (InputError, OSError) as error:
        raise InputError(f"{one_line(error)}; replay_buffer=False loads the model without its chains") from error


def _sgld_config(settings: dict[str, Any]) -> SGLDConfig:
    try:
        return SGLDConfig(**settings)
    except TypeError as error:
        raise InputError(f"the sgld settings of config.json are not this version's ({one_line(error)})") from error
