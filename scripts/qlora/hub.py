"""What goes wrong between the hub and its client, in a line that says what to do."""

import errno
import logging
import re
from collections.abc import Iterator

from huggingface_hub import constants, get_token
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from qlora.errors import UserError

HUB_ERRORS = (HTTPError, HFValidationError, OSError)  # the client's own errors are kinds of these
TOO_MANY_REQUESTS = 429
SERVER_ERRORS = 500  # and above
WITHOUT_RIGHTS = (401, 403)
logging.getLogger("httpx2").setLevel(logging.WARNING)  # it logs each address, and those of gated files open them


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
        f"the token, which HF_TOKEN or the file {constants.HF_TOKEN_PATH} gave, is none: it is not plain letters and"
        f" digits; copy it anew from {constants.ENDPOINT}/settings/tokens"
    )


def page_of(kind: str, repository: str) -> str:
    """Address of a repository's page on the hub; `kind` is models or datasets."""
    return f"{constants.ENDPOINT}/{'' if kind == 'models' else f'{kind}/'}{repository}"


def explained(error: Exception, kind: str, repository: str, revision: str) -> str:
    """What an error of the client, one of HUB_ERRORS, means for a repository at a revision, and what to do."""
    if isinstance(error, GatedRepoError):
        page = page_of(kind, repository)
        return (
            f"{repository} is gated: accept its terms at {page},"
            " then set HF_TOKEN to a token of that account, or store one with `hf auth login`"
        )
    if isinstance(error, RevisionNotFoundError):
        return f"{repository} has no revision {revision}; pin one that it has"
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"{repository} is not on the hub, or private; mend the name,"
            " or set HF_TOKEN to a token that may read it, or store one with `hf auth login`"
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"{repository}: no space left for the hub's cache, {constants.HF_HUB_CACHE};"
            " free some, or set HF_HOME to a folder on a larger disk, and start again"
        )
    if constants.HF_HUB_OFFLINE:
        return (
            f"{repository} at {revision} is not whole in the hub's cache, {constants.HF_HUB_CACHE},"
            " and HF_HUB_OFFLINE is set; unset it once, to fetch what is missing"
        )
    status = next((cause.response.status_code for cause in _chain(error) if isinstance(cause, HfHubHTTPError)), None)
    if status in WITHOUT_RIGHTS:
        return (
            f"{repository}: the hub refuses the token ({status}), which HF_TOKEN or `hf auth login` gave;"
            f" make one that may read it at {constants.ENDPOINT}/settings/tokens"
        )
    if status == TOO_MANY_REQUESTS:
        return f"{repository}: the hub asks for fewer requests ({status}); start again in some minutes, to go on"
    if status is not None and status >= SERVER_ERRORS:
        return f"{repository}: the hub has trouble ({status}); start again later, to go on"
    reason = str(error).partition("\n")[0] or type(error).__name__
    return f"{repository} cannot be fetched ({reason}); is there a network? Start again to go on"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what caused it, the nearest first."""
    while error is not None:
        yield error
        error = error.__cause__
