"""Stage `export`, on request: a run's adapter, tokenizer, card and record are copied to any folder."""

from qlora.stage import console, log, run_stage

import errno
import shutil
from collections.abc import Mapping
from pathlib import Path

from qlora.bundle import Files, bundle, subject_of
from qlora.errors import UserError
from qlora.files import read_json, replacing, sha256_of_file, write_json
from qlora.licences import objections

NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR)
CONTENTS = "export.json"  # in an export: SHA-256 of each of its files


def export_run(
    adapter: Path,
    model: Path,
    record: Path,
    metrics: Path,
    receipt: Path,
    to: str,
    base: str,
    sources: list[dict[str, str]],
    commands: Mapping[str, str],
    merged: Path | None = None,
) -> None:
    """Copy a run into the folder named like it in `to`, and its merged model, where given, into merged/ in there.

    The copy is there whole or not at all. Only an earlier export that nobody changed is replaced. `receipt` says where
    the copy lies.
    """
    if not to:
        raise UserError("export: say where to with --config to=FOLDER")
    subject = subject_of(record, metrics, model, base, sources, commands)
    target = Path(to).expanduser().absolute() / subject.run["name"]
    check_replaceable(target)
    files = bundle(adapter, model, subject, str(target))
    if merged:
        inner = bundle(merged, model, subject, str(target / "merged"))
        files |= {f"merged/{name}": content for name, content in inner.items()}
    for line in objections(sources):
        log.warning("licence: %s", line)
        console.write(f"export: licence: {line}\n")
    try:
        with replacing(target) as folder:
            copy(files, folder)
            check_replaceable(target)  # a copy takes its time
    except OSError as error:
        if error.errno not in NOT_WRITABLE:
            raise
        raise UserError(f"export: {target} cannot be written ({error.strerror}); choose another folder") from error
    write_json(receipt, {"folder": str(target), "files": sorted(files)})
    console.write(f"export: {target}\n")


def check_replaceable(target: Path) -> None:
    """Raise UserError where something is at `target` that is not an export, or one with a file of somebody else's."""
    if not target.exists() and not target.is_symlink():
        return
    if not (target / CONTENTS).is_file():
        raise UserError(f"export: {target} is there and is no earlier export; move it away, or choose another folder")
    files = [file for file in target.rglob("*") if file.is_file()]
    found = {file.relative_to(target).as_posix(): sha256_of_file(file) for file in files}
    del found[CONTENTS]
    known = read_json(target / CONTENTS)
    changed = sorted(name for name in found if found[name] != known.get(name))
    if changed:
        raise UserError(f"export: {target / changed[0]} was changed or added since the export; move it away")


def copy(files: Files, folder: Path) -> None:
    """Write files, and the list of them, into a new folder."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            shutil.copyfile(content, path)
    write_json(folder / CONTENTS, {name: sha256_of_file(folder / name) for name in files})


if __name__ == "__main__":
    run_stage(export_run)
