"""Stage `publish`, on request: a run's adapter, with a card of its results, goes to a repository on the hub."""

from qlora.stage import log, run_stage

import csv
import shutil
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError

from qlora.errors import UserError
from qlora.files import read_json, write_json


def publish_adapter(
    adapter: Path, record: Path, metrics: Path, receipt: Path, repository: str, base: str, licence: str, private: bool
) -> None:
    """Upload an adapter and its card in one commit, and write the commit's address into `receipt`.

    `repository` is owner/name; the token is taken from the environment or a stored login by the hub's own client.
    """
    if not repository:
        raise UserError("publish: say where to with --config publish_to=owner/name")
    run = read_json(record)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "upload"
        shutil.copytree(adapter, folder)
        pointing = {"base_model_name_or_path": base, "revision": run["pins"]["model"]["source"].get("revision")}
        write_json(folder / "adapter_config.json", {**read_json(folder / "adapter_config.json"), **pointing})
        (folder / "README.md").write_text(card(run, metrics, base, licence), encoding="utf-8")
        write_json(folder / "run.json", run)
        api = HfApi()
        try:
            api.create_repo(repository, private=private, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repository, folder_path=folder, commit_message=f"Add adapter of run {run['name']}"
            )
        except (HTTPError, ConnectionError) as error:
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise UserError(f"publish: {repository}: {reason}; is HF_TOKEN set, and may it write there?") from error
    write_json(receipt, {"repository": repository, "commit": commit.oid})
    log.info("published as %s at %s", repository, commit.oid)


def card(run: dict[str, Any], metrics: Path, base: str, licence: str) -> str:
    """The model card: base, recipe and results with intervals, as Markdown with the hub's metadata in front."""
    with metrics.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["run"] == run["name"]]
    lines = [
        f"---\nbase_model: {base}\nlibrary_name: peft\n---",
        f"# {run['name']}\n",
        f"A QLoRA adapter for `{base}`: mixture {run['mixture']}, recipe {run['recipe']},"
        f" seed {run['seed']}, {run['steps']} steps. Licence of the base: {licence}.\n",
        "| test set | slice | metric | value | interval | n |\n|---|---|---|---|---|---|",
        *(
            f"| {row['dataset']} | {row['slice']} | {row['metric']} | {float(row['value']):.3f}"
            f" | {float(row['ci_low']):.3f} to {float(row['ci_high']):.3f} | {row['n']} |"
            for row in rows
        ),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run_stage(publish_adapter)
