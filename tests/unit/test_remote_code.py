"""Code that comes with a model: fetched and run where its source names the commit for that, and nowhere else."""

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hub_server import HubServer
from test_config import COMMIT, SMALL
from tiny_models import FORM, QUANTIZATION, make_base, make_preflight, make_rows, make_tokens, train
from transformers import AutoTokenizer, dynamic_module_utils

from chat import check_code, main
from download_source import download_source
from merge_adapter import merge_adapter
from predict_rows import predict_rows
from qlora.config import checked_config
from qlora.errors import UserError
from qlora.files import files_below, read_json, read_jsonl, write_json
from qlora.pins import needed_files
from qlora.pretrained import loaded, runs_own_code

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


def allowed(source: dict[str, Any]) -> dict[str, Any]:
    return {**source, "remote_code": source["revision"]}


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
        " models.own.source, or read that code and, if you trust it, add its commit as `remote_code`"
    )
    assert not [request for request in hub.requests if "own.py" in request.path]


def test_a_model_that_is_allowed_its_code_is_trained_and_asked(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = allowed(published(hub, tmp_path))
    base = downloaded(source, tmp_path / "own")
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
    for name in ("models", "datasets", "config"):
        write_json(tmp_path / f"config/{name}.yaml", SMALL if name == "config" else {})
    write_json(tmp_path / "mine.yaml", {"models": {"own": {"source": source}}})
    asked = ["chat.py", "run", "--base", "own", "--prompt", "What?", "--device", "cpu", "--max-new-tokens", "4"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", asked)
    with pytest.raises(UserError, match=r"own: brings code that the config does not allow; see remote_code in docs/"):
        main()
    monkeypatch.setattr(sys, "argv", [*asked, "--configfile", "gone.yaml"])
    with pytest.raises(UserError, match=r"gone\.yaml is not there; start this from the repository's folder"):
        main()
    monkeypatch.setattr(sys, "argv", [*asked, "--configfile", "mine.yaml"])
    main()


@pytest.mark.parametrize("file", ["own.py", "config.json"])
def test_code_is_not_run_once_it_or_what_names_it_was_changed(file: str, hub: HubServer, tmp_path: Path) -> None:
    base = downloaded(allowed(published(hub, tmp_path)), tmp_path / "own")
    content = (base / file).read_bytes()
    (base / file).unlink()  # a link to the hub's cache
    (base / file).write_bytes(content.replace(b"Own", b"Its"))
    with pytest.raises(UserError, match=rf"{file} is not the file that source\.json names; delete .*own and run"):
        make_preflight(base)


@pytest.mark.parametrize("name", ["more.py", "custom_generate/generate.py"])
def test_code_that_was_not_downloaded_is_not_run(name: str, hub: HubServer, tmp_path: Path) -> None:
    base = downloaded(allowed(published(hub, tmp_path)), tmp_path / "own")
    (base / name).parent.mkdir(exist_ok=True)
    (base / name).write_text("raise SystemExit('this ran')")
    with pytest.raises(UserError, match=rf"own/{name}: this code was not downloaded with the model; take it away"):
        make_preflight(base)


ELSEWHERE = "owner/code--own.It"


@pytest.mark.parametrize(
    "configs",
    [
        {"config.json": {"auto_map": {"AutoConfig": ELSEWHERE}}},
        {"tokenizer_config.json": {"auto_map": {"AutoTokenizer": [None, ELSEWHERE]}}},
        {"tokenizer_config.json": {"auto_map": [None, ELSEWHERE]}},  # as it once was written
        {
            "config.json": {"configuration_files": ["config.4.0.0.json"]},  # read in its place from that version on
            "config.4.0.0.json": {"auto_map": {"AutoConfig": ELSEWHERE}},
        },
    ],
)
def test_code_of_another_repository_is_not_fetched(configs: dict[str, Any], hub: HubServer, tmp_path: Path) -> None:
    hub.add("owner/code", {"own.py": b"raise SystemExit('this ran')"})
    made = published(hub, tmp_path)
    files = dict(hub.repositories["owner/own"].commits[made["revision"]])
    for name, changed in configs.items():
        files[name] = json.dumps({**json.loads(files.get(name, b"{}")), **changed}).encode()
    base = downloaded(allowed({"hub": "owner/own", "revision": hub.add("owner/own", files)}), tmp_path / "own")
    hub.requests.clear()
    named = rf"own/{list(configs)[-1]}: names code of another repository, owner/code--own\.It, of which no commit is"
    with pytest.raises(UserError, match=named):
        loaded(AutoTokenizer.from_pretrained, base)
    assert not hub.requests


def test_a_download_without_the_code_that_is_allowed_is_refused(hub: HubServer, tmp_path: Path) -> None:
    made = published(hub, tmp_path)
    files = dict(hub.repositories["owner/own"].commits[made["revision"]])
    del files["own.py"]
    source = allowed({"hub": "owner/own", "revision": hub.add("owner/own", files)})
    with pytest.raises(UserError, match=r"owner/own at .* has no code \(\.py\); leave out 'remote_code'$"):
        downloaded(source, tmp_path / "own")
    assert not (tmp_path / "own").exists()


def test_chat_runs_no_code_that_the_config_does_not_allow(hub: HubServer, tmp_path: Path) -> None:
    source = allowed(published(hub, tmp_path))
    base = downloaded(source, tmp_path / "own")
    check_code(base, source)
    without = {key: value for key, value in source.items() if key != "remote_code"}
    for other in (without, {}, allowed({**source, "revision": "0" * 40})):
        with pytest.raises(UserError, match=r"own: brings code that the config does not allow; see remote_code in"):
            check_code(base, other)
    assert not runs_own_code(downloaded(without, tmp_path / "plain"))


@pytest.mark.parametrize(
    "other",
    [
        {"hub": "owner/big", "revision": "1" * 40},  # an overlay's, over an entry that allowed another
        {"hub": "owner/big", "revision": "main"},
        {"hub": "owner/big"},
        {"path": "folder", "sha256": "0" * 64},
        {"build": {"architecture": "llama"}},
    ],
)
def test_it_is_allowed_for_one_commit_of_the_hub_alone(other: dict[str, Any]) -> None:
    config = copy.deepcopy(SMALL)
    config["models"]["big"]["source"]["remote_code"] = COMMIT
    assert checked_config(config)["models"]["big"]["source"]["remote_code"] == COMMIT
    config["models"]["big"]["source"] = {**other, "remote_code": COMMIT}
    with pytest.raises(
        UserError, match=r"^config: models\.big\.source\.remote_code: goes with 'hub', and is the commit"
    ):
        checked_config(config)
