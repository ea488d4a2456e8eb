"""Asking the hub: the token, the listing of a repository, and what an error means, in a line that says what to do."""

import errno
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from huggingface_hub import HfApi, constants, file_download, get_token
from huggingface_hub._tree_cache import read_tree_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile

from qlora.errors import UserError

HUB_ERRORS = (HTTPError, HFValidationError, OSError)  # the client's own errors are kinds of these
TOO_MANY_REQUESTS = 429
SERVER_ERRORS = 500  # and above
WITHOUT_RIGHTS = (401, 403)
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS)


def checked_token() -> str | None:
    """The token that the hub's client sends, from the environment or a stored login; None where there is none.

    Raises UserError, which does not quote it, where it can be no token: the client's own error would show it.
    """
    try:
        token = get_token()
    except OSError as error:
        raise UserError(f"the stored token cannot be read ({error}); mend that, or set HF_TOKEN") from error
    except UnicodeDecodeError:
        token = ""
    if token is None or re.fullmatch("[!-~]+", token):
        return token
    raise UserError(
        f"what HF_TOKEN or the file {constants.HF_TOKEN_PATH} gave cannot be a token: it holds a space or another sign"
        f" that no token has; copy it anew from {constants.ENDPOINT}/settings/tokens"
    )


@dataclass(frozen=True)
class ListedFile:
    """A file as the hub lists it: size in bytes, git's hash, and the SHA-256 where it is a large one."""

    path: str
    size: int
    git_hash: str
    sha256: str | None


def cached_listing(repository: str, kind: str, commit: str) -> list[ListedFile] | None:
    """All files of a repository, `kind` models or datasets, at a commit, where the hub's cache has the listing."""
    folder_name = file_download.repo_folder_name(repo_id=repository, repo_type=kind.removesuffix("s"))
    # the client's public function for this, get_cached_repo_tree, leaves out the SHA-256
    cached = read_tree_cache(str(Path(constants.HF_HUB_CACHE) / folder_name), commit)
    if cached is None:
        return None
    return [ListedFile(path, file.size, file.blob_id, file.lfs_sha256) for path, file in cached.items()]


def asked_listing(repository: str, kind: str, commit: str) -> list[ListedFile]:
    """All files of a repository, `kind` models or datasets, at a commit, by the hub. Raises the client's errors."""
    tree = HfApi().list_repo_tree(repository, recursive=True, revision=commit, repo_type=kind.removesuffix("s"))
    files = [file for file in tree if isinstance(file, RepoFile)]
    return [ListedFile(file.path, file.size, file.blob_id, file.lfs.sha256 if file.lfs else None) for file in files]


def page_of(kind: str, repository: str) -> str:
    """Address of a repository's page on the hub; `kind` is models or datasets."""
    return f"{constants.ENDPOINT}/{'' if kind == 'models' else f'{kind}/'}{repository}"


def explained(error: Exception, kind: str, repository: str, revision: str) -> str:
    """What an error of the client, one of HUB_ERRORS, means for a repository at a revision, and what to do."""
    if isinstance(error, GatedRepoError):
        page = page_of(kind, repository)
        return (
            f"{repository} is gated: accept its terms at {page},"
            " then set HF_TOKEN to a token of that account, or store one with `.venv/bin/hf auth login`"
        )
    if isinstance(error, RevisionNotFoundError):
        return f"{repository} has no revision {revision}; pin one that it has"
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"{repository} is not on the hub, or private; mend the name,"
            " or set HF_TOKEN to a token that may read it, or store one with `.venv/bin/hf auth login`"
        )
    if isinstance(error, OSError) and error.errno in NOT_WRITABLE:
        return (
            f"{repository}: the hub's cache, {constants.HF_HUB_CACHE}, cannot be used ({error});"
            " set HF_HOME to a folder that you may write, and start again"
        )
    if isinstance(error, OSError) and error.errno in NO_SPACE:
        return (
            f"{repository}: no space left for the hub's cache, {constants.HF_HUB_CACHE};"
            " free some, or set HF_HOME to a folder on a larger disk, and start again"
        )
    if constants.HF_HUB_OFFLINE:
        return (
            f"{repository} at {revision} is not known to be whole in the hub's cache, {constants.HF_HUB_CACHE},"
            " and HF_HUB_OFFLINE is set; unset it once, to fetch what is missing"
        )
    answer = next((cause.response for cause in _chain(error) if isinstance(cause, HfHubHTTPError)), None)
    status = answer.status_code if answer is not None else 0
    if answer is not None and status in WITHOUT_RIGHTS:
        return f"{repository}: {_refusal(status, answer.url.host)}"
    if status == TOO_MANY_REQUESTS:
        return f"{repository}: the hub asks for fewer requests ({status}); start again in some minutes, to go on"
    if status >= SERVER_ERRORS:
        return f"{repository}: the hub has trouble ({status}); start again later, to go on"
    reason = str(error).partition("\n")[0] or type(error).__name__
    return f"{repository} cannot be fetched ({reason}); is there a network? Start again to go on"


def _refusal(status: int, host: str) -> str:
    """What it means that a host, the hub or where it stores its files, gives nothing for want of rights."""
    if host != urlsplit(constants.ENDPOINT).hostname:
        return (
            f"{host}, where the hub stores its files, refuses to give them ({status}); look whether a proxy or a"
            " firewall keeps you from there, and start again, to go on"
        )
    if checked_token() is None:
        return (
            f"the hub refuses those without a token ({status});"
            " set HF_TOKEN, or store one with `.venv/bin/hf auth login`"
        )
    return (
        f"the hub refuses the token ({status}), which HF_TOKEN or `.venv/bin/hf auth login` gave;"
        f" make one that may read it at {constants.ENDPOINT}/settings/tokens"
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what caused it, the nearest first."""
    while error is not None:
        yield error
        error = error.__cause__
