"""Publishing, by the hub's own client, to a hub on the loopback device: one commit, or one line that says why not."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import TOKEN, USER, HubServer
from huggingface_hub import constants
from outgoing import COMMANDS, FORBIDDEN, MODEL, SOURCES, make_run

import publish_adapter as stage
from publish_adapter import publish_adapter
from qlora.errors import UserError
from qlora.files import read_json

NAME = f"{USER}/llama"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """A hub, and a client that is logged in there."""
    with HubServer() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


@pytest.fixture
def run(tmp_path: Path) -> dict[str, Any]:
    """The arguments of the stage but for where to."""
    folder = tmp_path / "run"
    folder.mkdir()
    make_run(folder)
    return {
        **{"weights": folder / "adapter", "model": folder / MODEL, "record": folder / "run.json"},
        **{"metrics": folder / "metrics.csv", "receipt": folder / "published.json", "base": "owner/base"},
        **{"sources": SOURCES, "commands": COMMANDS, "private": True, "dry_run": False},
    }


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is written to the console."""
    pieces: list[str] = []
    monkeypatch.setattr(stage, "console", type("Console", (), {"write": staticmethod(pieces.append)}))
    return pieces


def refused(run: dict[str, Any], repository: str = NAME) -> str:
    with pytest.raises(UserError) as caught:
        publish_adapter(**run, repository=repository)
    assert "\n" not in str(caught.value)
    assert TOKEN not in str(caught.value)
    assert not run["receipt"].exists()
    return str(caught.value)


def test_adapter_tokenizer_card_and_record_arrive_in_one_commit_in_a_private_repository(hub, run):
    publish_adapter(**run, repository=NAME)
    repository = hub.repositories[NAME]
    assert repository.private
    assert len(repository.commits) == 2  # the empty one that a new repository begins with
    commit = repository.branches["main"]
    files = repository.commits[commit]
    assert files["adapter_model.safetensors"] == b"weights"  # by LFS
    assert sorted(files) == [
        *("README.md", "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "run.json"),
        *("tokenizer.json", "tokenizer_config.json"),
    ]
    assert f'PeftModel.from_pretrained(base, "{NAME}")' in files["README.md"].decode()
    receipt = read_json(run["receipt"])
    assert (receipt["repository"], receipt["commit"], receipt["private"]) == (NAME, commit, True)
    assert receipt["files"] == {name: len(content) for name, content in files.items()}


def test_a_merged_model_arrives_and_a_public_repository_is_made_where_asked(hub, run):
    publish_adapter(**{**run, "weights": run["record"].parent / "merged", "private": False}, repository=NAME)
    repository = hub.repositories[NAME]
    assert not repository.private
    assert repository.commits[repository.branches["main"]]["model.safetensors"] == b"all weights"


def test_publishing_again_adds_a_commit_and_keeps_what_others_put_there(hub, run):
    hub.add(NAME, {"notes.txt": b"mine"}, private=True)
    publish_adapter(**run, repository=NAME)
    files = hub.repositories[NAME].commits[hub.repositories[NAME].branches["main"]]
    assert files["notes.txt"] == b"mine"
    assert "adapter_model.safetensors" in files


def test_the_token_goes_nowhere_but_to_the_hub(hub, run, caplog):
    publish_adapter(**run, repository=NAME)
    sent = b"".join(hub.repositories[NAME].commits[hub.repositories[NAME].branches["main"]].values())
    assert TOKEN.encode() not in sent
    assert TOKEN not in run["receipt"].read_text() + caplog.text
    objects = hub.asked("/objects/", "PUT")
    assert objects
    assert not any(request.authorization for request in objects)


def test_a_dry_run_shows_files_sizes_and_card_and_asks_the_hub_nothing(hub, run, shown):
    publish_adapter(**{**run, "dry_run": True}, repository=NAME)
    assert not hub.requests
    text = "".join(shown)
    assert f"To {NAME} (private; refused if it is there and public), in one commit:\n" in text
    assert "              7  adapter_model.safetensors\n" in text
    assert "# llama\n\nA QLoRA adapter for `owner/base`." in text
    assert "publish: licence: dataset notes (not stated): the registry does not say" in text
    assert run["receipt"].read_text() in text


def test_a_licence_that_forbids_publishing_is_told_on_the_console_and_on_the_card_that_arrives(hub, run, shown):
    publish_adapter(**{**run, "sources": [*SOURCES, FORBIDDEN]}, repository=NAME)
    told = "dataset mine (not stated) forbids publishing what is made of it"
    assert f"publish: licence: {told}\n" in shown
    files = hub.repositories[NAME].commits[hub.repositories[NAME].branches["main"]]
    assert f"**Licence:** {told}." in files["README.md"].decode()


def test_no_token_and_a_wrong_one_are_told(hub, run, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_unknown")
    assert refused(run) == f"publish: {NAME}: {stage.REFUSALS[401]}"
    monkeypatch.delenv("HF_TOKEN")
    assert refused(run) == f"publish: {NAME}: {stage.NO_TOKEN}"
    assert not hub.repositories


def test_a_token_that_can_be_none_is_told_and_not_shown(hub, run, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", f"{TOKEN}\x0bx")
    assert "cannot be a token" in refused(run)
    assert not hub.requests


def test_a_name_that_is_somebody_elses_is_told(hub, run):
    assert refused(run, "stranger/llama") == f"publish: stranger/llama: {stage.REFUSALS[403]}"


def test_a_token_that_may_only_read_is_told(hub, run):
    hub.fail("/commit/", status=403)
    assert refused(run) == f"publish: {NAME}: {stage.REFUSALS[403]}"


@pytest.mark.parametrize("status", [409, 412])
def test_a_commit_that_came_in_between_is_told(hub, run, status):
    hub.fail("/commit/", status=status)
    assert refused(run) == f"publish: {NAME}: {stage.REFUSALS[412]}"


def test_what_somebody_adds_meanwhile_is_not_published_over(hub, run, monkeypatch):
    made = stage.CommitOperationAdd
    monkeypatch.setattr(
        stage, "CommitOperationAdd", lambda *given: hub.add(NAME, {"new.txt": b"theirs"}) and made(*given)
    )
    assert refused(run) == f"publish: {NAME}: {stage.REFUSALS[412]}"
    repository = hub.repositories[NAME]
    assert repository.commits[repository.branches["main"]] == {"new.txt": b"theirs"}


def test_a_cut_connection_is_told_and_the_next_try_sends_just_what_is_missing(hub, run):
    hub.fail("/commit/", status=503, times=100)
    assert refused(run).endswith(stage.AGAIN)
    hub.faults.clear()
    before = len(hub.asked("/objects/", "PUT"))
    publish_adapter(**run, repository=NAME)
    assert len(hub.asked("/objects/", "PUT")) == before


def test_where_the_answer_is_cut_off_after_the_commit_the_next_try_finds_it_there_and_makes_no_other(hub, run):
    hub.fail("/commit/", cut=0)
    message = refused(run)
    assert message.endswith(stage.AGAIN), message
    commits = list(hub.repositories[NAME].commits)
    publish_adapter(**run, repository=NAME)
    assert list(hub.repositories[NAME].commits) == commits
    assert read_json(run["receipt"])["commit"] == commits[-1]


@pytest.mark.parametrize("status", [400, 403])
@pytest.mark.parametrize("files", [1, 2])
def test_weights_that_the_storage_does_not_take_are_told_without_its_address(hub, run, files, status):
    for number in range(1, files):  # the client sends several in threads
        (run["weights"] / f"{number}.safetensors").write_bytes(b"%d" % number)
    hub.fail("/objects/", method="PUT", times=100, status=status)
    message = refused(run)
    assert message.startswith(f"publish: {NAME}: Error while uploading '")
    assert message.endswith(f".safetensors' to the Hub (the answer was {status}); {stage.AGAIN}")
    assert list(hub.repositories[NAME].commits.values()) == [{}]


def test_large_files_that_the_hub_refuses_are_told(hub, run):
    hub.fail("info/lfs", status=413, times=100)
    assert refused(run).endswith(stage.AGAIN)


def test_a_hub_that_is_not_there_is_told(hub, run):
    hub.stop()
    assert refused(run).endswith(stage.NOTHING_YET)


@pytest.mark.parametrize(("there", "asked"), [("public", "private"), ("private", "public")])
def test_a_repository_that_others_can_read_otherwise_than_asked_is_left_as_it_is(hub, run, there, asked):
    hub.add(NAME, {"notes.txt": b"mine"}, private=there == "private")
    message = refused({**run, "private": asked == "private"})
    assert message.startswith(f"publish: {NAME}: it is there and {there}, not {asked}; ")
    assert f"publish_private={there == 'private'}" in message
    assert len(hub.repositories[NAME].commits) == 1
    assert not hub.asked("/objects/", "PUT")


def test_weights_in_other_files_take_the_place_of_the_earlier_ones(hub, run):
    merged = run["record"].parent / "merged"
    shards = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    theirs = {"notes.txt": b"mine", "extra/model.safetensors": b"theirs", "vision-model.safetensors": b"theirs"}
    hub.add(NAME, theirs, private=True)

    def sent() -> set[str]:
        publish_adapter(**{**run, "weights": merged}, repository=NAME)
        files = hub.repositories[NAME].commits[hub.repositories[NAME].branches["main"]]
        assert theirs.items() <= files.items()
        return {name for name in files if name.startswith("model")}

    assert sent() == {"model.safetensors"}
    (merged / "model.safetensors").unlink()
    for name in (*shards, "model.safetensors.index.json"):
        (merged / name).write_bytes(name.encode())
    assert sent() == {*shards, "model.safetensors.index.json"}
    for name in (*shards, "model.safetensors.index.json"):
        (merged / name).unlink()
    (merged / "model.safetensors").write_bytes(b"other weights")
    before = len(hub.repositories[NAME].commits)
    assert sent() == {"model.safetensors"}
    assert len(hub.repositories[NAME].commits) == before + 1
    publish_adapter(**run, repository=NAME)  # an adapter may lie beside a model
    assert "model.safetensors" in hub.repositories[NAME].commits[hub.repositories[NAME].branches["main"]]


@pytest.mark.parametrize(
    ("repository", "line"),
    [("", "publish: say where to with --config publish_to=owner/name"), ("a/b/c", "publish: a/b/c: Repo id must be")],
)
def test_a_place_that_is_none_is_told_before_anything_is_asked(hub, run, repository, line):
    assert refused(run, repository).startswith(line)
    assert not hub.requests


def test_the_command_publishes_with_the_environment_alone(hub, run, tmp_path):
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in run.items() if name != "dry_run"]
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home")}
    script = Path(__file__).parents[2] / "scripts/publish_adapter.py"
    command = [sys.executable, script, *arguments, "--dry-run=false", f"--repository={NAME}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    assert read_json(run["receipt"])["commit"] == hub.repositories[NAME].branches["main"]
