"""The loopback hub answers the hub's own client as the hub does: what is asked of it here, other tests rely on."""

import hashlib
from pathlib import Path

import huggingface_hub
import pytest
from hub_server import TOKEN, HubServer
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)


def api(hub: HubServer, token: str | bool = TOKEN) -> HfApi:
    return HfApi(endpoint=hub.url, token=token)


def test_information_names_commit_files_licence_and_access(hub):
    commit = hub.add("owner/name", {"config.json": b"{}", "a.safetensors": b"weights"}, gated=True, licence="mit")
    info = api(hub, token=False).model_info("owner/name", files_metadata=True)
    assert (info.sha, info.private, info.gated, info.card_data["license"]) == (commit, False, "manual", "mit")
    files = {file.rfilename: file for file in info.siblings}
    assert files["config.json"].size == 2
    assert files["config.json"].lfs is None
    assert files["a.safetensors"].lfs.sha256 == hashlib.sha256(b"weights").hexdigest()
    assert api(hub, token=False).model_info("owner/name", expand=["gated"]).sha is None


def test_revisions_lead_to_commits(hub):
    first = hub.add("owner/rows", {"a.csv": b"x\n1\n"}, kind="dataset")
    second = hub.add("owner/rows", {"a.csv": b"x\n2\n"}, kind="dataset")
    hub.repositories["owner/rows"].tags["v1"] = first
    asked = api(hub)
    assert asked.dataset_info("owner/rows").sha == second
    assert asked.dataset_info("owner/rows", revision="v1").sha == first
    assert asked.dataset_info("owner/rows", revision=first).sha == first
    refs = asked.list_repo_refs("owner/rows", repo_type="dataset")
    assert [(ref.name, ref.target_commit) for ref in refs.branches + refs.tags] == [("main", second), ("v1", first)]


def test_a_listing_comes_in_pages(hub):
    hub.page = 2
    names = [f"{number}.json" for number in range(5)]
    hub.add("owner/name", dict.fromkeys(names, b"{}"))
    assert [file.path for file in api(hub).list_repo_tree("owner/name", recursive=True)] == names
    assert len(hub.asked("/tree/")) == 3


def test_files_come_whole_and_a_token_stays_with_the_hub(hub, tmp_path):
    hub.add("owner/name", {"config.json": b"{}", "deep/a.safetensors": b"weights"}, private=True)
    folder = Path(huggingface_hub.snapshot_download("owner/name", endpoint=hub.url, cache_dir=tmp_path, token=TOKEN))
    assert (folder / "config.json").read_bytes() == b"{}"
    assert (folder / "deep/a.safetensors").read_bytes() == b"weights"
    assert {seen.authorization for seen in hub.asked("/owner/name/")} == {f"Bearer {TOKEN}"}
    (stored,) = hub.asked("/objects/")
    assert (stored.host.partition(":")[0], stored.authorization) == ("localhost", "")


def test_what_is_refused_is_refused_as_by_the_hub(hub):
    hub.add("owner/open", {"config.json": b"{}"})
    hub.add("owner/private", {"config.json": b"{}"}, private=True)
    hub.add("owner/gated", {"config.json": b"{}"}, gated=True)
    known, stranger, wrong = api(hub), api(hub, token=False), api(hub, token="hf_wrong")
    for asked, name in ((known, "owner/none"), (stranger, "owner/none"), (stranger, "owner/private")):
        with pytest.raises(RepositoryNotFoundError):
            asked.model_info(name)
    assert known.model_info("owner/private").private
    with pytest.raises(RevisionNotFoundError):
        known.model_info("owner/open", revision="v9")
    with pytest.raises(RemoteEntryNotFoundError):
        known.get_hf_file_metadata(url=f"{hub.url}/owner/open/resolve/main/none.json")
    for asked in (known, stranger):
        with pytest.raises(GatedRepoError):
            asked.get_hf_file_metadata(url=f"{hub.url}/owner/gated/resolve/main/config.json")
    hub.accepted[TOKEN].add("owner/gated")
    assert known.get_hf_file_metadata(url=f"{hub.url}/owner/gated/resolve/main/config.json").size == 2
    with pytest.raises(HfHubHTTPError, match="Invalid credentials"):
        wrong.model_info("owner/open")


def test_an_old_name_leads_to_the_new_one(hub):
    hub.add("owner/old", {"config.json": b"{}"})
    hub.rename("owner/old", "owner/new")
    assert api(hub).model_info("owner/old").id == "owner/new"
    assert api(hub).get_hf_file_metadata(url=f"{hub.url}/owner/old/resolve/main/config.json").size == 2


def test_faults_come_as_often_as_declared(hub):
    hub.add("owner/name", {"config.json": b"{}"})
    hub.fail("/api/models/owner/name", status=503, times=1)
    with pytest.raises(HfHubHTTPError, match="503"):
        api(hub).model_info("owner/name")
    assert api(hub).model_info("owner/name").id == "owner/name"


@pytest.mark.parametrize("kind", ["model", "dataset"])
def test_a_commit_adds_and_deletes_files(hub, kind, tmp_path):
    asked = api(hub)
    made = asked.create_repo("owner/mine", repo_type=kind, private=True)
    assert made.repo_id == "owner/mine"
    assert asked.repo_info("owner/mine", repo_type=kind).private
    (tmp_path / "a.safetensors").write_bytes(b"weights")
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    commit = asked.upload_folder(repo_id="owner/mine", repo_type=kind, folder_path=tmp_path)
    files = {"README.md": b"---\nlicense: mit\n---\n", "a.safetensors": b"weights"}
    assert hub.repositories["owner/mine"].commits[commit.oid] == files
    again = asked.upload_folder(repo_id="owner/mine", repo_type=kind, folder_path=tmp_path)
    assert again.oid == commit.oid, "nothing changed, so there is nothing to commit"
    asked.create_commit("owner/mine", [CommitOperationDelete("README.md")], commit_message="m", repo_type=kind)
    assert asked.list_repo_files("owner/mine", repo_type=kind) == ["a.safetensors"]


def test_what_cannot_be_written_is_refused(hub):
    asked = api(hub)
    asked.create_repo("owner/mine", private=True)
    with pytest.raises(HfHubHTTPError, match="409"):
        asked.create_repo("owner/mine")
    asked.create_repo("owner/mine", private=False, exist_ok=True)
    assert hub.repositories["owner/mine"].private, "as it was made"
    with pytest.raises(HfHubHTTPError, match="403"):
        asked.create_repo("others/mine")
    with pytest.raises(HfHubHTTPError, match="401"):
        api(hub, token=False).create_repo("owner/other")
    parent = asked.model_info("owner/mine").sha
    add = [CommitOperationAdd("a.txt", b"one")]
    asked.create_commit("owner/mine", add, commit_message="first", parent_commit=parent)
    add = [CommitOperationAdd("a.txt", b"two")]
    with pytest.raises(HfHubHTTPError, match="412"):
        asked.create_commit("owner/mine", add, commit_message="second", parent_commit=parent)
