"""To and from the Hugging Face Hub, with its reasons in one line when it says no."""

import contextlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import (
    HfApi,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    is_offline_mode,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import httpx, validate_repo_id

from timm_jem.errors import InputError, one_line, quoted
from timm_jem.files import as_path
from timm_jem.gaussians import MAX_STARTS_BYTES, STARTS_FILE
from timm_jem.hub.card import CARD_FILE, PICTURES, is_generated
from timm_jem.hub.published_chains import CHAINS_FILE, MAX_FILE_BYTES
from timm_jem.hub.reading import CONFIG_FILE, WEIGHTS_FILE

__all__ = ["check_reach", "check_repository_name", "explained", "fetch", "make_repository", "push"]

_UNREACHABLE = (httpx.ConnectError, httpx.ConnectTimeout)
_ADVICE = {
    401: "log in with `hf auth login`, or pass token=",
    403: "the token lacks the right for this: use one that may write",
    409: "something else changed the repository meanwhile: try again",
    413: "the files are too large for the Hub: leave the replay buffer out",
    429: "too many requests: wait a few minutes and try again",
}


def fetch(
    repo_id: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
    replay_buffer: bool = True,
) -> Path:
    """Download a model's files, all of one commit, and return their folder in the cache.

    Args:
        repo_id: "user/name".
        revision, token, cache_dir, local_files_only, force_download: as in ``huggingface_hub.hf_hub_download``.
        replay_buffer: with published chains, where the repository has them.

    Raises:
        InputError: the Hub says no, or can't be reached.
    """
    if revision is not None and not isinstance(revision, str):
        raise InputError(f"revision is {quoted(revision)}: give a branch, tag or commit as text")
    if force_download and (local_files_only or is_offline_mode()):
        raise InputError("force_download asks the Hub, and local_files_only or HF_HUB_OFFLINE forbids it: give one of them")
    if cache_dir is not None:
        cache_dir = as_path(cache_dir)
    options = {
        "repo_id": repo_id,
        "token": token,
        "cache_dir": cache_dir,
        "local_files_only": local_files_only,
        "force_download": force_download,
        "library_name": "timm_jem",
    }
    with explained(f"{repo_id} is no folder here; as a repository on the Hub", cached=True):
        if not local_files_only:
            check_reach(repo_id, CONFIG_FILE, revision=revision, token=token, cache_dir=cache_dir)
        folder = Path(hf_hub_download(filename=CONFIG_FILE, revision=revision, **options)).parent
        commit = folder.name
        hf_hub_download(filename=WEIGHTS_FILE, revision=commit, **options)
        if not (local_files_only or is_offline_mode()):
            beside = {STARTS_FILE: MAX_STARTS_BYTES} | ({CHAINS_FILE: MAX_FILE_BYTES} if replay_buffer else {})
            for name, most in beside.items():
                if not force_download and try_to_load_from_cache(repo_id, name, cache_dir, commit) is not None:
                    continue  # of this commit it is cached, or known not to be there: a Hub that fails is not asked
                try:
                    with contextlib.suppress(RemoteEntryNotFoundError):  # the download says so, too, and the cache keeps it
                        size = get_hf_file_metadata(hf_hub_url(repo_id, name, revision=commit), token=token).size or 0
                        if size > most:
                            remedy = ": load it with replay_buffer=False" if name == CHAINS_FILE else ", which is too large"
                            raise InputError(f"{name} of {repo_id} has {size >> 20} MiB{remedy}")
                    hf_hub_download(filename=name, revision=commit, **options)
                except RemoteEntryNotFoundError:
                    pass  # published without
                except _UNREACHABLE:
                    pass  # the model came from the cache, and so does this where it is there
    return folder


def check_repository_name(repo_id: str) -> None:
    """Raise an InputError unless something can be pushed to a repository of this name."""
    try:
        validate_repo_id(repo_id if isinstance(repo_id, str) else "")
    except HFValidationError as error:
        raise InputError(f"{quoted(repo_id)} is not the name of a Hub repository: give user/name") from error
    if "/" not in repo_id:  # the Hub would add its owner, and what the card says would load another model
        raise InputError(f"{quoted(repo_id)} has no owner: give user/name")


def make_repository(repo_id: str, *, private: bool | None = None, token: str | bool | None = None) -> str:
    """Make the repository if there is none, and return its full name: finds what would forbid a push before any work.

    Raises:
        InputError: the Hub says no, or can't be reached.
    """
    check_repository_name(repo_id)
    with explained(repo_id, pushing=True):
        return HfApi(token=token).create_repo(repo_id, private=private, exist_ok=True).repo_id


def push(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    commit_message: str,
    private: bool | None = None,
    token: str | bool | None = None,
    branch: str | None = None,
    create_pr: bool = False,
    overwrite_card: bool = False,
) -> str:
    """Upload a folder in one commit: whatever interrupts it, the old revision stays whole.

    A README.md of the repository that was not generated here, or was edited since, is kept, with a warning. Published
    chains and starts of an older model are removed, and its pictures, too, unless such a README.md may show them.

    Args:
        folder: files to upload.
        repo_id: "user/name"; made if it isn't there.
        commit_message, private, branch, create_pr: as in ``huggingface_hub.ModelHubMixin.push_to_hub``.
        token: a token that may write; None: the one that is logged in.
        overwrite_card: replace a README.md that someone wrote.

    Returns:
        The commit's URL.

    Raises:
        InputError: the Hub says no, or can't be reached.
    """
    repo_id = make_repository(repo_id, private=private, token=token)
    api = HfApi(token=token, library_name="timm_jem")
    with explained(repo_id, pushing=True, cached=True):
        keep_card = not overwrite_card and _has_someones_card(repo_id, branch, token)
        if keep_card:
            warnings.warn(
                f"the README.md of {repo_id} is not a generated one: it is kept; overwrite_card=True replaces it", stacklevel=3
            )
        ours = (CHAINS_FILE, STARTS_FILE) if keep_card else (CHAINS_FILE, STARTS_FILE, *PICTURES)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=commit_message,
            revision=branch,
            create_pr=create_pr,
            ignore_patterns=[CARD_FILE] if keep_card else None,
            delete_patterns=[name for name in ours if not (Path(folder) / name).is_file()] or None,
        )
    return commit.commit_url


def _has_someones_card(repo_id: str, branch: str | None, token: str | bool | None) -> bool:
    try:
        file = hf_hub_download(repo_id, CARD_FILE, revision=branch, token=token)
    except RemoteEntryNotFoundError:
        return False
    return not is_generated(Path(file).read_text(encoding="utf-8", errors="replace"))


def check_reach(
    repo_id: str,
    *files: str,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
) -> None:
    """Raise what the client raises where none of the files is cached and the Hub is out of reach, but not after half a minute.

    Within :func:`explained`. Anything else that the Hub may say is left for the download, which asks again where that helps.
    """
    if any(isinstance(try_to_load_from_cache(repo_id, file, cache_dir, revision), str) for file in files):
        return
    with contextlib.suppress(HfHubHTTPError, FileMetadataError, httpx.HTTPError):
        try:
            get_hf_file_metadata(hf_hub_url(repo_id, files[0], revision=revision), token=token)
        except _UNREACHABLE as error:
            raise LocalEntryNotFoundError(f"{files[0]} is not cached") from error


@contextlib.contextmanager
def explained(what: str, *, pushing: bool = False, cached: bool = False) -> Iterator[None]:
    """Any refusal of the Hub or failure to reach it as one line with the Hub's own reason and what to do.

    Args:
        what: the repository, in messages.
        pushing: whether something is sent, not loaded.
        cached: whether any other OSError is one of the cache.
    """
    try:
        yield
    except InputError:
        raise
    except RemoteEntryNotFoundError as error:
        missing = CONFIG_FILE if f"/{CONFIG_FILE}" in str(error) else WEIGHTS_FILE
        raise InputError(
            f"{what}: it has no {missing}: it is not a timm model in safetensors, and no pickle is read"
        ) from error
    except HFValidationError as error:
        raise InputError(f"{quoted(what.split(' is no folder')[0])} is neither a folder nor a Hub repository name") from error
    except (EntryNotFoundError, HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled, httpx.HTTPError) as error:
        raise InputError(f"{what}: {_reason(error, pushing)}") from error
    except FileMetadataError as error:
        raise InputError(f"{what}: what answers is no Hub ({one_line(error)})") from error
    except UnicodeEncodeError as error:
        raise InputError(f"{what}: the token holds {error.object[error.start]!r}, as none does: copy it again") from error
    except OSError as error:
        if isinstance(error, (ConnectionError, TimeoutError)) or error.errno is None:  # of a transfer, and not of this machine
            raise InputError(f"{what}: the transfer failed ({one_line(error)}): try again") from error
        if not cached:
            raise
        raise InputError(
            f"{what}: the cache can't be used ({one_line(error)}): set HF_HOME, or cache_dir, to a folder that can be written"
        ) from error
    except RuntimeError as error:  # the client's way to say that an upload failed
        if not isinstance(error.__cause__, (HfHubHTTPError, httpx.HTTPError)):
            raise
        raise InputError(f"{what}: {_reason(error.__cause__, pushing)}") from error
    except ValueError as error:  # and that a card was refused, or a forced download failed
        if not isinstance(error.__cause__, (HfHubHTTPError, httpx.HTTPError, OSError)):
            raise
        reason = f"the Hub says {one_line(error)}" if pushing else _reason(error.__cause__, pushing)
        raise InputError(f"{what}: {reason}") from error


def _reason(error: BaseException, pushing: bool) -> str:
    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, HfHubHTTPError):
        error = error.__cause__  # the cache has nothing either; what counts is why the Hub gave nothing
    if isinstance(error, GatedRepoError):
        return "access to this repository is gated: ask for it on its page, then log in with `hf auth login`"
    if isinstance(error, RepositoryNotFoundError):
        return "the Hub has no such repository, or it is private: check the name, or log in with `hf auth login`"
    if isinstance(error, RevisionNotFoundError):
        return "the Hub has no such revision of it: check the branch, tag or commit"
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        if status == 403 and not pushing:
            return f"the Hub says 403 ({error.server_message or error.response.reason_phrase}): use a token that may read it"
        advice = _ADVICE.get(status, "try again later" if status >= 500 else "see the Hub's reason")
        return f"the Hub says {status} ({error.server_message or error.response.reason_phrase}): {advice}"
    if isinstance(error, LocalTokenNotFoundError):
        return "no token: log in with `hf auth login`, or pass token="
    if pushing and isinstance(error, OfflineModeIsEnabled):
        return "the Hub is off: unset HF_HUB_OFFLINE to push"
    if isinstance(error, (LocalEntryNotFoundError, OfflineModeIsEnabled)):
        why = f" ({one_line(error.__cause__)})" if isinstance(error.__cause__, httpx.HTTPError) else ""
        return f"it is not in the cache, and the Hub is off or out of reach{why}: load it once while online"
    again = "try again; files already uploaded are not sent twice" if pushing else "try again"
    return f"the connection to the Hub failed ({one_line(error)}): {again}"
