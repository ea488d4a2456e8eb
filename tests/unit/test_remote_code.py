"""Code that comes with a model: fetched and run where its source says `remote_code: true`, and nowhere else."""

import copy
from pathlib import Path
from typing import Any

import pytest
from hub_server import HubServer
from test_config import SMALL
from tiny_models import FORM, QUANTIZATION, make_base, make_preflight, make_rows, make_tokens, train
from transformers import AutoTokenizer, dynamic_module_utils

from download_source import download_source
from merge_adapter import merge_adapter
from predict_rows import predict_rows
from qlora.config import checked_config
from qlora.errors import UserError
from qlora.files import files_below, read_json, read_jsonl, write_json
from qlora.pins import needed_files
from qlora.pretrained import loaded

CODE = b"""
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "own"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""
NAMES = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where transformers copies code before it imports it."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))


def published(hub: HubServer, tmp_path: Path, code: bytes = CODE, names: dict[str, str] = NAMES) -> dict[str, Any]:
    """A Llama whose classes are in a file of its own, as a source."""
    made = make_base(tmp_path / "made")
    write_json(made / "config.json", {**read_json(made / "config.json"), "model_type": "own", "auto_map": names})
    files = {path.name: path.read_bytes() for path in files_below(made) if path.name != "source.json"}
    return {"hub": "owner/own", "revision": hub.add("owner/own", {**files, "own.py": code})}


def downloaded(source: dict[str, Any], folder: Path) -> Path:
    download_source(folder, "models", folder.name, source, needed_files("models", {"source": source}))
    return folder


def test_it_is_neither_fetched_nor_run_where_nobody_allows_it(hub: HubServer, tmp_path: Path) -> None:
    base = downloaded(published(hub, tmp_path, code=b"raise SystemExit('this ran')"), tmp_path / "own")
    assert not (base / "own.py").exists()
    with pytest.raises(UserError) as caught:
        make_preflight(base)
    assert str(caught.value) == (
        f"{base}: its architecture needs code that comes with it; name a model of a family that transformers knows in"
        " models.own.source, or read that code and, if you trust it, add `remote_code: true`"
    )
    assert not [request for request in hub.requests if "own.py" in request.path]


def test_a_model_that_is_allowed_its_code_is_trained_and_asked(hub: HubServer, tmp_path: Path) -> None:
    base = downloaded({**published(hub, tmp_path), "remote_code": True}, tmp_path / "own")
    report = make_preflight(base)
    assert read_json(report)["class"] == "OwnForCausalLM"
    dataset = make_rows(tmp_path)
    run = tmp_path / "run"
    trained = train(base, make_tokens(tmp_path, base, dataset), report, run, max_steps=2, eval_steps=None)
    assert type(trained.trainer.model.get_base_model()).__name__ == "OwnForCausalLM"
    predict_rows(
        *(base, [dataset], tmp_path / "rows.jsonl", run / "adapter", run / "run.json"),
        **{"form": FORM, "quantization": QUANTIZATION, "attention": "sdpa", "device": "cpu", "threads": 1},
        **{"shots": 0, "max_new_tokens": 4, "batch_size": 2},
    )
    assert len(list(read_jsonl(tmp_path / "rows.jsonl"))) == 6
    with pytest.raises(UserError, match=r"own: a merged model would need the code that comes with it; use base and"):
        merge_adapter(base, run / "adapter", tmp_path / "merged", QUANTIZATION, "sdpa", "cpu")


@pytest.mark.parametrize("file", ["own.py", "config.json"])
def test_code_is_not_run_once_it_or_what_names_it_was_changed(file: str, hub: HubServer, tmp_path: Path) -> None:
    base = downloaded({**published(hub, tmp_path), "remote_code": True}, tmp_path / "own")
    content = (base / file).read_bytes()
    (base / file).unlink()  # a link to the hub's cache
    (base / file).write_bytes(content.replace(b"Own", b"Its"))
    with pytest.raises(UserError, match=rf"{file} is not the file that source\.json names; delete .*own and run"):
        make_preflight(base)


@pytest.mark.parametrize("config", ["config.json", "tokenizer_config.json"])
def test_code_of_another_repository_is_not_fetched(config: str, hub: HubServer, tmp_path: Path) -> None:
    hub.add("owner/code", {"own.py": b"raise SystemExit('this ran')"})
    made = published(hub, tmp_path)
    files = dict(hub.repositories["owner/own"].commits[made["revision"]])
    given = read_json(tmp_path / "made" / config)
    names = (
        {"AutoTokenizer": [None, "owner/code--own.It"]} if "token" in config else {"AutoConfig": "owner/code--own.It"}
    )
    write_json(tmp_path / config, {**given, "auto_map": names})
    files[config] = (tmp_path / config).read_bytes()
    source = {"hub": "owner/own", "revision": hub.add("owner/own", files), "remote_code": True}
    base = downloaded(source, tmp_path / "own")
    hub.requests.clear()
    with pytest.raises(UserError, match=rf"own/{config}: names code of another repository, owner/code--own\.It, of"):
        loaded(AutoTokenizer.from_pretrained, base)
    assert not hub.requests


@pytest.mark.parametrize("other", [{"path": "folder", "sha256": "0" * 64}, {"build": {"architecture": "llama"}}])
def test_it_is_allowed_for_a_repository_of_the_hub_alone(other: dict[str, Any]) -> None:
    config = copy.deepcopy(SMALL)
    config["models"]["big"]["source"]["remote_code"] = True
    assert checked_config(config)["models"]["big"]["source"]["remote_code"]
    config["models"]["big"]["source"] = {**other, "remote_code": True}
    with pytest.raises(UserError, match=r"^config: models\.big\.source\.remote_code: goes with 'hub' alone; leave it"):
        checked_config(config)
