"""Large files of the hub come into its cache so that, after any stop, the next start goes on where that one came to.

The hub's client drops what it has of a file when it fails, and starts at the first byte after it was killed; a stop has
to wait until the files under way are whole. So large files are fetched here, by the client's own functions, to where
it looks for them and under its locks; it then finds them there and links them.
"""

import logging
from collections.abc import Iterable
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

from huggingface_hub import constants, file_download, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.utils import WeakFileLock, build_hf_headers, tqdm

from qlora.errors import UserError
from qlora.hub import ListedFile

LARGE = 2**20  # bytes; a smaller file is fetched anew in no time, by the client
AT_A_TIME = 8  # files, as the client does
SECONDS_FOR_A_LOCK = 0.1  # whoever holds it longer is at work

log = logging.getLogger("qlora")


def fetch_large(files: Iterable[ListedFile], repository: str, kind: str, revision: str, bar: tqdm, what: str) -> None:
    """Put the large ones of these files of a repository, `kind` models or datasets, at a commit into the hub's cache.

    `bar` is told of the bytes that come. Raises the client's errors, and UserError, which begins with `what`, at a file
    that the client leaves to Xet. The threads are daemons: an interrupt waits for none of them, whatever it waits for.
    """
    about = {"revision": revision, "repo_type": kind.removesuffix("s")}
    large = {file.path: file.size for file in files if file.size > LARGE}
    missing = [path for path in large if not isinstance(try_to_load_from_cache(repository, path, **about), str)]
    for path in missing:
        if large[path] > constants.MAX_HTTP_DOWNLOAD_SIZE:
            raise UserError(
                f"{what}: {path} has {large[path]:,} bytes, and one of over"
                f" {constants.MAX_HTTP_DOWNLOAD_SIZE:,} comes by Xet alone: start again with HF_HUB_DISABLE_XET=0"
            )
    bar.total = sum(large[path] for path in missing)
    with ThreadPool(AT_A_TIME) as pool:
        for _ in pool.imap_unordered(partial(_fetch, repository, about, bar), missing):
            pass


def remove_left_over(files: Iterable[Path]) -> None:
    """Remove the beginnings that killed downloads left of `files` of the cache, which are whole now."""
    for blob in {file.resolve() for file in files}:
        for begun in blob.parent.glob(f"{blob.name}.*incomplete"):
            try:
                with WeakFileLock(_lock_of(blob), timeout=SECONDS_FOR_A_LOCK):
                    begun.unlink()
                    log.info("removed %s, which a killed download left", begun)
            except OSError as error:  # another process is at work on it, or another user's cache
                log.info("%s stays (%s)", begun, error)


def _fetch(repository: str, about: dict[str, str], bar: tqdm, path: str) -> None:
    """Put one file into the cache; what an earlier start began is gone on with. Whether it is right, others check."""
    url = hf_hub_url(repository, path, **about)
    headers = build_hf_headers(headers={"Accept-Encoding": "identity"})  # a range counts bytes as they lie in the file
    stated = get_hf_file_metadata(url, headers=headers, retry_on_errors=True)
    if stated.etag is None or stated.size is None:
        raise OSError(f"the hub states no hash or no size of {path}")
    folder_name = file_download.repo_folder_name(repo_id=repository, repo_type=about["repo_type"])
    blob = Path(constants.HF_HUB_CACHE) / folder_name / "blobs" / stated.etag
    for folder in (blob.parent, _lock_of(blob).parent):
        folder.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(_lock_of(blob)):
        if blob.exists():  # another process fetched it meanwhile, or it has the content of another file
            return
        begun = blob.with_name(f"{blob.name}.incomplete")
        with begun.open("ab") as file:
            if file.tell() > stated.size:  # two processes wrote, where locks do not hold
                file.truncate(0)
                file.seek(0)
            there = file.tell()
            log.info("%s: %d of %d bytes are there", path, there, stated.size)
            bar.total -= there
            shared: Any = lambda **_: bar  # noqa: E731 the client makes a bar a file; all count in one
            file_download.http_get(
                url, file, resume_size=there, headers=headers, expected_size=stated.size, tqdm_class=shared
            )
        begun.replace(blob)


def _lock_of(blob: Path) -> Path:
    """The file by which the client locks a file of its cache, cache/REPOSITORY/blobs/HASH."""
    return blob.parents[2] / ".locks" / blob.parents[1].name / f"{blob.name}.lock"
