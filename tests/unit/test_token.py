"""A token that can be none is told before anything is asked of the hub, and never shown."""

import pytest
from hub_server import TOKEN
from hub_sources import pinned, refusal
from huggingface_hub import constants

import pin as tool
from qlora.errors import UserError
from qlora.hub import checked_token

SECRET = "SecretOfTheUser"
WRONG = {
    "an ellipsis": f"hf_{SECRET}…".encode(),
    "a vertical tab": f"hf_{SECRET}\x0bx".encode(),
    "a NUL": f"hf_{SECRET}\0".encode(),
    "a space": f"hf_ {SECRET}".encode(),
    "a byte order mark": f"hf_{SECRET}".encode("utf-8-sig"),
    "UTF-16": f"hf_{SECRET}".encode("utf-16"),
}


@pytest.fixture(params=WRONG.values(), ids=WRONG.keys())
def stored(request, tmp_path, hub, monkeypatch):
    """A stored login that can be no token."""
    path = tmp_path / "login"
    path.write_bytes(request.param)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(path))
    return path


def test_a_download_tells_a_token_that_can_be_none(tmp_path, hub, stored):
    message = refusal(tmp_path, "models", pinned(hub, private=True))
    assert message == (
        f"what HF_TOKEN or the file {stored} gave cannot be a token: it holds a space or another sign that no token has;"
        f" copy it anew from {hub.url}/settings/tokens"
    )
    assert not hub.requests


def test_pin_tells_a_token_that_can_be_none(tmp_path, hub, stored, monkeypatch, capsys):
    monkeypatch.setattr(tool, "ROOT", tmp_path)
    (tmp_path / "config").mkdir()
    (tmp_path / "config/models.yaml").write_text("models: {mine: {source: {hub: owner/name}}}")
    assert tool.main([]) == 1
    told = capsys.readouterr().err
    assert told.startswith("pin: error: what HF_TOKEN or the file ")
    assert told.count("\n") == 1
    assert SECRET not in told
    assert not hub.requests


def test_a_token_of_the_environment_is_checked_too(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", f"hf_{SECRET}…")
    with pytest.raises(UserError, match="copy it anew") as caught:
        checked_token()
    assert SECRET not in str(caught.value)


def test_a_good_token_and_none_are_given(hub, monkeypatch):
    assert checked_token() is None
    monkeypatch.setenv("HF_TOKEN", f"{TOKEN}\n")
    assert checked_token() == TOKEN


def test_a_stored_login_that_cannot_be_read_is_named(tmp_path, hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path))
    with pytest.raises(UserError, match=rf"^the stored token cannot be read \(.*{tmp_path}'\); mend that"):
        checked_token()
