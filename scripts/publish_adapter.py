"""Stage `publish`, on request: a run's adapter or merged model, with a card of its results, goes to the hub."""

from qlora.stage import console, log, run_stage

from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled

from qlora.bundle import Files, bundle, size_of, subject_of
from qlora.errors import UserError
from qlora.files import replacing, write_json
from qlora.licences import objections

NO_TOKEN = "no token; log in with `hf auth login`, or set HF_TOKEN to a token with write access"
REFUSALS = {  # status → what it means, and what to do
    401: "the hub does not know the token; log in anew with `hf auth login`, or mend HF_TOKEN",
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
    form: Mapping[str, str] | None,
    command: str,
    private: bool,
    dry_run: bool,
) -> None:
    """Send an adapter or a merged model, its tokenizer, card and record in one commit; `receipt` names the commit.

    `repository` is owner/name; the token is taken from the environment or a stored login by the hub's own client. With
    `dry_run` nothing is asked of the hub, and the receipt is what would be sent: files, sizes in bytes, and the card.
    """
    if not repository:
        raise UserError("publish: say where to with --config publish_to=owner/name")
    subject = subject_of(record, metrics, model, base, sources, form, command)
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
    kind = "private" if private else "public"
    lines = [f"{size_of(content):>15,}  {name}" for name, content in sorted(files.items())]
    card = files["README.md"]
    assert isinstance(card, bytes)
    return "\n".join([f"To {repository} ({kind}), in one commit:", *lines, "", "README.md:", "", card.decode()])


def send(files: Files, repository: str, private: bool, message: str) -> str:
    """Put files into a repository, made where there is none, in one commit, and return its id.

    Raises UserError where the hub refuses, or where somebody else's commit came in between.
    """
    api = HfApi()
    if get_token() is None:
        raise UserError(f"publish: {repository}: {NO_TOKEN}")
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        parent = api.model_info(repository).sha
        operations = [CommitOperationAdd(name, content) for name, content in sorted(files.items())]
        return api.create_commit(repository, operations, commit_message=message, parent_commit=parent).oid
    except (HTTPError, HFValidationError, OfflineModeIsEnabled, ConnectionError) as error:
        raise UserError(f"publish: {repository}: {reason_of(error)}") from error


def reason_of(error: Exception) -> str:
    """Why the hub did not take it, and what to do, in a line."""
    if isinstance(error, HfHubHTTPError) and error.response.status_code in REFUSALS:
        return REFUSALS[error.response.status_code]
    first = str(error).partition("\n")[0] or type(error).__name__
    if isinstance(error, HFValidationError):
        return f"{first}; publish_to is owner/name"
    return f"{first}; nothing was published, try again: what was sent is not sent twice"


if __name__ == "__main__":
    run_stage(publish_adapter)
