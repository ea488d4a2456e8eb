"""Stage `publish`, on request: a run's adapter or merged model, with a card of its results, goes to the hub."""

from qlora.stage import console, log, run_stage

import re
from collections.abc import Mapping, Set
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError

from qlora.bundle import Files, bundle, size_of, subject_of
from qlora.errors import UserError
from qlora.files import replacing, write_json
from qlora.hub import checked_token
from qlora.licences import objections

NO_TOKEN = "no token; log in with `.venv/bin/hf auth login`, or set HF_TOKEN to a token with write access"
SENDING_ERRORS = (HTTPError, ValueError, OSError)  # the client's own errors are kinds of these
WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")  # of a merged model
KINDS = {True: "private", False: "public"}
NOTHING_YET = "nothing was published; try again"
AGAIN = "perhaps not published; try again: what arrived is not sent twice"
REFUSALS = {  # status → what it means, and what to do
    401: "the hub does not know the token; log in anew with `.venv/bin/hf auth login`, or mend HF_TOKEN",
    403: "the token may not write there; take one with write access, or a publish_to that is yours",
    404: "not found, though it was just made; look at publish_to, and try again",
    409: "it was changed meanwhile; try again",
    412: "it was changed meanwhile; try again",
}


def publish_adapter(
    weights: Path,
    model: Path,
    record: Path,
    metrics: Path,
    receipt: Path,
    repository: str,
    base: str,
    sources: list[dict[str, str]],
    commands: Mapping[str, str],
    private: bool,
    dry_run: bool,
) -> None:
    """Send an adapter or a merged model, its tokenizer, card and record in one commit; `receipt` names the commit.

    `repository` is owner/name; the token is taken from the environment or a stored login by the hub's own client. With
    `dry_run` nothing is asked of the hub, and the receipt is what would be sent: files, sizes in bytes, and the card.
    """
    if not repository:
        raise UserError("publish: say where to with --config publish_to=owner/name")
    subject = subject_of(record, metrics, model, base, sources, commands)
    files = bundle(weights, model, subject, repository)
    for line in objections(sources):
        log.warning("licence: %s", line)
        console.write(f"publish: licence: {line}\n")
    if dry_run:
        text = preview(files, repository, private)
        with replacing(receipt) as temporary:
            temporary.write_text(text, encoding="utf-8")
        console.write(text)
        return
    commit = send(files, repository, private, f"Add run {subject.run['name']}")
    sizes = {name: size_of(content) for name, content in files.items()}
    write_json(receipt, {"repository": repository, "commit": commit, "private": private, "files": sizes})
    log.info("published as %s at %s", repository, commit)


def preview(files: Files, repository: str, private: bool) -> str:
    """What would be sent: each file with its size in bytes, and the card."""
    kind, other = KINDS[private], KINDS[not private]
    lines = [f"{size_of(content):>15,}  {name}" for name, content in sorted(files.items())]
    card = files["README.md"]
    assert isinstance(card, bytes)
    head = f"To {repository} ({kind}; refused if it is there and {other}), in one commit:"
    return "\n".join([head, *lines, "", "README.md:", "", card.decode()])


def send(files: Files, repository: str, private: bool, message: str) -> str:
    """Put files into a repository, made where there is none, in one commit, and return its id.

    Where a model's weights are sent, those that an earlier commit left go: transformers would take them for these.
    Raises UserError where the hub refuses, where the repository is there and not as `private` says, or where somebody
    else's commit came in between.
    """
    api = HfApi()
    if checked_token() is None:
        raise UserError(f"publish: {repository}: {NO_TOKEN}")
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        there = api.model_info(repository)
    except SENDING_ERRORS as error:
        raise UserError(f"publish: {repository}: {reason_of(error, NOTHING_YET)}") from error
    if there.private != private:
        raise UserError(
            f"publish: {repository}: it is there and {KINDS[not private]}, not {KINDS[private]}; change that in its"
            f" settings on the hub, or say --config publish_private={not private}"
        )
    added = [CommitOperationAdd(name, content) for name, content in sorted(files.items())]
    removed = [
        CommitOperationDelete(name) for name in left_over({file.rfilename for file in there.siblings or ()}, files)
    ]
    log.info("earlier weights that go: %s", [operation.path_in_repo for operation in removed])
    try:
        return api.create_commit(repository, [*added, *removed], commit_message=message, parent_commit=there.sha).oid
    except SENDING_ERRORS as error:
        raise UserError(f"publish: {repository}: {reason_of(error, AGAIN)}") from error
    except RuntimeError as error:  # the client's, where the storage did not take a large file
        if not isinstance(error.__cause__, SENDING_ERRORS):
            raise
        reason = f"{str(error).rstrip('.')} ({told(error.__cause__)}); {AGAIN}"
        raise UserError(f"publish: {repository}: {reason}") from error


def left_over(there: Set[str], files: Files) -> list[str]:
    """The weights of a model in a repository that others take the place of; none where an adapter is sent."""
    if not any(WEIGHTS.fullmatch(name) for name in files):
        return []
    return sorted(name for name in there - files.keys() if WEIGHTS.fullmatch(name))


def reason_of(error: Exception, then: str) -> str:
    """Why the hub did not take it, and what to do, in a line, with `then` where the error does not say."""
    if isinstance(error, HfHubHTTPError) and error.response.status_code in REFUSALS:
        return REFUSALS[error.response.status_code]
    if isinstance(error, HFValidationError):
        return f"{told(error)}; publish_to is owner/name"
    said = f": {error.server_message}" if isinstance(error, HfHubHTTPError) and error.server_message else ""
    return f"{told(error)}{said}; {then}"


def told(error: BaseException) -> str:
    """An error in a line, without the address: one of the storage opens it to whoever reads it."""
    if isinstance(error, HfHubHTTPError):
        return f"the answer was {error.response.status_code}"
    return " ".join(str(error).split()) or type(error).__name__


if __name__ == "__main__":
    run_stage(publish_adapter)
