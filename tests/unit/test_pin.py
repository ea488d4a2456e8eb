"""`make pin` finds the commits of the sources on the hub, and the configuration takes them from the lock."""

import hashlib
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from hub_server import TOKEN, HubServer
from huggingface_hub import constants

import pin as tool
from pin import HEADER, LOCK, chosen, hub_items, pin
from qlora import config as config_module
from qlora.config import checked_config
from qlora.errors import UserError
from qlora.pins import lock_entry, needed_files, read_lock

ROOT = Path(__file__).parents[2]
WEIGHTS = b"weights"
FILES = {"config.json": b"{}", "model.safetensors": WEIGHTS, "pytorch_model.bin": b"pickled", ".gitattributes": b""}
ROWS = {"data/train-0.parquet": b"rows", "data/other.parquet": b"others", "README.md": b""}
DATASET = {"files": {"train": "data/train-*.parquet"}, "prompt": "{a}", "completion": "{b}"}


@pytest.fixture
def root(tmp_path: Path, hub: HubServer) -> Path:
    """A repository with a model without a revision, one at a tag, one at a commit, and a dataset in an experiment."""
    first = hub.add("owner/small", FILES, licence="mit")
    hub.repositories["owner/small"].tags["v1"] = first
    hub.add("owner/small", {**FILES, "config.json": b"newer"})
    hub.add("owner/rows", ROWS, kind="dataset", branch="refs/convert/parquet")
    folder = tmp_path / "repository"
    write(
        folder / "config/models.yaml",
        models={
            "newest": {"source": {"hub": "owner/small"}},
            "tagged": {"source": {"hub": "owner/small", "revision": "v1"}},
            "pinned": {"source": {"hub": "owner/small", "revision": first}},
            "built": {"source": {"build": {"architecture": "llama"}}},
        },
    )
    write(folder / "config/datasets.yaml", datasets={"notes": {"source": {"path": "notes.csv"}}})
    source = {"hub": "owner/rows", "revision": "refs/convert/parquet"}
    write(folder / "config/experiments/mine.yaml", datasets={"rows": {**DATASET, "source": source}, "notes": {}})
    return folder


def write(path: Path, **content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(content))


def test_branches_tags_and_commits_become_entries_with_files_and_licence(root, hub):
    line, whole = pin(root, [])
    assert whole
    assert line == (
        "Pinned 4 of 4 sources in config/sources.lock.yaml, new or moved: newest, pinned, tagged, rows;"
        " next: git add config/sources.lock.yaml && git commit"
    )
    older, newer = hub.repositories["owner/small"].commits
    text = (root / LOCK).read_text()
    assert text.startswith(HEADER)
    lock = yaml.safe_load(text)
    digest = hashlib.sha256(WEIGHTS).hexdigest()
    files = {"config.json": {"size": 2}, "model.safetensors": {"size": 7, "sha256": digest}}
    expected = {"hub": "owner/small", "asked": "v1", "commit": older, "licence": "mit", "files": files}
    assert lock["models"]["tagged"] == expected
    assert lock["models"]["pinned"] == {**expected, "asked": older}
    assert lock["models"]["newest"] == {
        **expected,
        "asked": "main",
        "commit": newer,
        "files": {**files, "config.json": {"size": 5}},
    }
    assert lock["datasets"]["rows"]["asked"] == "refs/convert/parquet"
    assert lock["datasets"]["rows"]["licence"] == "not stated"
    assert lock["datasets"]["rows"]["files"].keys() == {"data/train-0.parquet"}


def test_the_same_answers_give_the_same_bytes(root):
    pin(root, [])
    first = (root / LOCK).read_bytes()
    line, _ = pin(root, [])
    assert (root / LOCK).read_bytes() == first
    assert "new or moved: none; next:" in line
    lock = yaml.safe_load(first)
    assert list(lock) == ["datasets", "models"]
    assert list(lock["models"]) == sorted(lock["models"])


def test_one_name_leaves_the_others_and_asks_nothing_of_them(root, hub):
    pin(root, [])
    before = yaml.safe_load((root / LOCK).read_text())
    newest = hub.add("owner/small", {**FILES, "config.json": b"newest"})
    hub.requests.clear()
    line, whole = pin(root, ["newest"])
    after = yaml.safe_load((root / LOCK).read_text())
    assert whole
    assert line.startswith("Pinned 1 of 1 sources in config/sources.lock.yaml, new or moved: newest;")
    assert after["models"].pop("newest")["commit"] == newest
    del before["models"]["newest"]
    assert after == before
    assert not hub.asked("owner/rows")


def test_several_names_are_pinned_at_once_and_nothing_is_asked_of_the_others(root, hub):
    line, whole = pin(root, ["rows", "tagged"])
    assert whole
    assert line.startswith("Pinned 2 of 2 sources in config/sources.lock.yaml, new or moved: tagged, rows; next: git")
    lock = yaml.safe_load((root / LOCK).read_text())
    assert {kind: list(entries) for kind, entries in lock.items()} == {"datasets": ["rows"], "models": ["tagged"]}
    assert not hub.asked("/revision/main")


def test_of_several_names_the_unknown_one_is_refused_before_anything_is_asked(root, hub):
    with pytest.raises(UserError, match=r"^no source on the hub is called 'taged'; did you mean 'tagged'"):
        pin(root, ["rows", "taged"])
    assert not hub.requests
    assert not (root / LOCK).exists()


def test_of_several_names_the_one_that_cannot_be_asked_is_named_and_keeps_what_was_known(root, hub, capsys):
    pin(root, [])
    before = yaml.safe_load((root / LOCK).read_text())
    newest = hub.add("owner/small", {**FILES, "config.json": b"newest"})
    hub.repositories["owner/rows"].private = True
    line, whole = pin(root, ["rows", "newest"])
    assert not whole
    assert line.startswith("Pinned 1 of 2 sources in config/sources.lock.yaml, new or moved: newest; next: mend what")
    assert capsys.readouterr().err.startswith("pin: datasets.rows: owner/rows is not on the hub, or private")
    after = yaml.safe_load((root / LOCK).read_text())
    assert after["datasets"] == before["datasets"]
    assert after["models"]["newest"]["commit"] == newest


def test_what_the_configuration_no_longer_has_goes_when_all_are_pinned(root):
    pin(root, [])
    (root / "config/experiments/mine.yaml").unlink()
    pin(root, ["newest"])
    assert "rows" in yaml.safe_load((root / LOCK).read_text())["datasets"]
    pin(root, [])
    assert yaml.safe_load((root / LOCK).read_text())["datasets"] == {}


def test_what_cannot_be_asked_is_named_and_keeps_what_was_known(root, hub, capsys):
    pin(root, [])
    before = yaml.safe_load((root / LOCK).read_text())
    newest = hub.add("owner/small", {**FILES, "config.json": b"newest"})
    hub.repositories["owner/rows"].private = True
    line, whole = pin(root, [])
    assert not whole
    assert line.startswith("Pinned 3 of 4 sources in config/sources.lock.yaml, new or moved: newest; next: mend what")
    assert "pin: datasets.rows: owner/rows is not on the hub, or private; mend the name" in capsys.readouterr().err
    after = yaml.safe_load((root / LOCK).read_text())
    assert after["datasets"] == before["datasets"]
    assert after["models"]["newest"]["commit"] == newest


def test_a_gated_source_needs_a_token(root, hub, capsys):
    hub.fail("/api/models/owner/small/revision/v1", status=401, headers={"X-Error-Code": "GatedRepo"})
    _, whole = pin(root, ["tagged"])
    assert not whole
    assert (
        f"pin: models.tagged: owner/small is gated: accept its terms at {hub.url}/owner/small, then set HF_TOKEN"
        in capsys.readouterr().err
    )


def test_a_revision_that_is_not_there_is_named(root, capsys):
    write(root / "config/models.yaml", models={"mine": {"source": {"hub": "owner/small", "revision": "v9"}}})
    _, whole = pin(root, ["mine"])
    assert not whole
    assert "pin: models.mine: owner/small has no revision v9; pin one that it has" in capsys.readouterr().err


def test_a_renamed_source_is_pinned_and_its_new_name_told(root, hub, capsys):
    hub.rename("owner/small", "owner/large")
    _, whole = pin(root, ["newest"])
    assert whole
    assert "the hub now calls owner/small owner/large; write that into its source" in capsys.readouterr().out


def test_globs_that_match_nothing_are_told(root, capsys):
    source = {"hub": "owner/rows", "revision": "refs/convert/parquet"}
    write(root / "config/datasets.yaml", datasets={"none": {"source": source, "files": {"train": "*.csv"}}})
    pin(root, ["none"])
    told = "datasets.none: owner/rows at refs/convert/parquet has no file like *.csv; mend the source or 'files'"
    assert told in capsys.readouterr().err


def test_a_private_source_is_pinned_with_a_token_that_is_not_written(root, hub, monkeypatch):
    hub.repositories["owner/rows"].private = True
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    _, whole = pin(root, ["rows"])
    assert whole
    assert TOKEN not in (root / LOCK).read_text()


def test_an_unknown_name_is_refused_with_the_nearest(root):
    with pytest.raises(UserError, match="no source on the hub is called 'taged'; did you mean 'tagged'"):
        pin(root, ["taged"])
    assert not (root / LOCK).exists()


def test_offline_nothing_is_done(root, hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        pin(root, [])
    assert not hub.requests


def test_one_name_for_two_sources_is_refused(root):
    write(root / "config/experiments/other.yaml", models={"newest": {"source": {"hub": "owner/other"}}})
    with pytest.raises(UserError, match=r"config/experiments/other.yaml: models.newest stands in another file"):
        hub_items(root)


def test_an_overlay_that_changes_but_the_revision_gives_one_name_two_sources(root, hub):
    write(root / "config/experiments/other.yaml", models={"tagged": {"source": {"revision": "v2"}}})
    with pytest.raises(UserError, match=r"config/experiments/other.yaml: models.tagged stands in another file"):
        pin(root, [])
    assert not hub.requests


def test_one_name_at_two_revisions_in_two_overlays_is_refused(root):
    for name, revision in (("one", {"revision": "v1"}), ("two", {})):
        write(root / f"config/experiments/{name}.yaml", models={"new": {"source": {"hub": "owner/small", **revision}}})
    with pytest.raises(UserError, match=r"config/experiments/two.yaml: models.new stands in another file"):
        hub_items(root)


def test_a_listing_that_lies_in_the_cache_is_not_what_is_pinned(root, hub):
    first = pin(root, ["tagged"]) and (root / "config/sources.lock.yaml").read_text()
    commit = yaml.safe_load(first)["models"]["tagged"]["commit"]
    for listing in Path(constants.HF_HUB_CACHE).glob(f"**/trees/{commit}*"):
        listing.write_text(listing.read_text().replace("sha256", "sha255"))
    hub.requests.clear()
    pin(root, ["tagged"])
    assert (root / "config/sources.lock.yaml").read_text() == first
    assert hub.asked("/tree/")


def test_an_overlay_that_says_of_a_source_what_is_known_changes_nothing(root):
    write(root / "config/experiments/other.yaml", models={"tagged": {"source": {"hub": "owner/small"}}, "newest": {}})
    assert hub_items(root)["models"]["tagged"] == {"source": {"hub": "owner/small", "revision": "v1"}}


@pytest.mark.parametrize("text", [b"models: [", b"models:\n  x: {source: \xff}\n"], ids=["YAML", "UTF-8"])
def test_a_configuration_that_cannot_be_read_is_told_in_one_line(root, monkeypatch, capsys, text):
    monkeypatch.setattr(tool, "ROOT", root)
    (root / "config/models.yaml").write_bytes(text)
    assert tool.main([]) == 1
    told = capsys.readouterr().err
    assert told.startswith("pin: error: config/models.yaml: cannot be read as YAML (")
    assert told.endswith("); mend it\n")
    assert told.count("\n") == 1


def test_the_command_ends_with_the_line_or_the_error(root, hub, monkeypatch, capsys):
    monkeypatch.setattr(tool, "ROOT", root)
    assert tool.main([]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("Pinned 4 of 4 sources")
    assert tool.main(["taged"]) == 1
    assert capsys.readouterr().err.startswith("pin: error: no source on the hub is called 'taged'")
    hub.repositories.clear()
    assert tool.main(["tagged"]) == 1
    assert capsys.readouterr().out.startswith("Pinned 0 of 1 sources")


def test_the_command_takes_several_names_and_says_so(root, monkeypatch, capsys):
    monkeypatch.setattr(tool, "ROOT", root)
    assert tool.main(["tagged", "rows"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("Pinned 2 of 2 sources")
    with pytest.raises(SystemExit) as ended:
        tool.main(["--help"])
    assert ended.value.code == 0
    assert 'make pin NAME="x y"' in capsys.readouterr().out


def test_make_hands_each_name_over(tmp_path):
    command = [*"make --no-print-directory -n -o venv pin -f".split(), ROOT / "Makefile"]
    names = "NAME=law-stack-exchange law-topics"
    shown = subprocess.run([*command, names], cwd=tmp_path, check=True, text=True, capture_output=True).stdout
    assert shown == ".venv/bin/python tools/pin.py 'law-stack-exchange' 'law-topics'\n"


def test_the_registries_sources_can_be_named():
    items = hub_items(ROOT)
    assert ("models", "qwen2.5-7b") in chosen(items, ["qwen2.5-7b"])
    assert ("datasets", "law-stack-exchange") in chosen(items, ["law-stack-exchange"])


COMMIT, OTHER = "a" * 40, "b" * 40
ENTRY = {"hub": "owner/x", "asked": "v1", "commit": COMMIT, "licence": "mit", "files": {}}


@pytest.mark.parametrize(
    ("source", "asked", "applies"),
    [
        ({"hub": "owner/x"}, "main", True),
        ({"hub": "owner/x", "revision": "v1"}, "v1", True),
        ({"hub": "owner/x", "revision": COMMIT}, "v1", True),
        ({"hub": "owner/x", "revision": OTHER}, "v1", False),
        ({"hub": "owner/x"}, "v1", False),
        ({"hub": "owner/y"}, "main", False),
    ],
)
def test_an_entry_holds_for_the_repository_and_revision_that_were_asked(source, asked, applies):
    lock = {"models": {"x": {**ENTRY, "asked": asked}}, "datasets": {}}
    assert (lock_entry(lock, "models", "x", source) is not None) == applies
    assert lock_entry(lock, "datasets", "x", source) is None


def test_the_configuration_takes_its_commits_from_the_lock(tmp_path, monkeypatch):
    write(tmp_path / "lock.yaml", models={"x": ENTRY})
    monkeypatch.setattr(config_module, "LOCK", tmp_path / "lock.yaml")
    sources = {
        "x": {"hub": "owner/x", "revision": "v1"},
        "y": {"hub": "owner/x", "revision": OTHER},
        "z": {"hub": "owner/x"},
        "tiny": {"build": {"architecture": "llama"}},
    }
    full = checked_config(
        {
            "models": {name: {"source": source} for name, source in sources.items()},
            "datasets": {"rows": {"source": {"path": "rows.csv"}, "prompt": "{a}", "completion": "{b}"}},
            "mixtures": {"all": {"datasets": {"rows": {}}}},
            "recipes": {"short": {}},
            "runs": [{"name": "one", "model": "x", "mixture": "all", "recipe": "short"}],
            "suites": {"held-out": {"datasets": ["rows"]}},
        }
    )
    assert full["models"]["x"]["source"]["revision"] == COMMIT
    assert full["models"]["y"]["source"]["revision"] == OTHER
    assert "revision" not in full["models"]["z"]["source"]


def test_a_broken_lock_is_named(tmp_path):
    (tmp_path / "lock.yaml").write_text("models: [")
    with pytest.raises(UserError, match="cannot be read as YAML; delete it and run `make pin`"):
        read_lock(tmp_path / "lock.yaml")
    assert read_lock(tmp_path / "none.yaml") == {"models": {}, "datasets": {}}


def test_a_dataset_needs_its_splits_and_its_database():
    item = {"files": {"train": "a/*.csv", "test": "b.csv"}, "database": {"file": "c.sqlite"}}
    assert needed_files("datasets", item) == ["a/*.csv", "b.csv", "c.sqlite"]
