"""What lies among the results without being the default's is found, as few names as tell it, and DVC looks past it."""

from pathlib import Path

from strangers import IGNORED, leave_alone, lies_in, strangers


def laid(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)


def test_what_is_not_ours_is_named_once_and_ours_is_not(tmp_path: Path) -> None:
    laid(tmp_path, "results/datasets/sql/train.jsonl", "results/datasets/mine/train.jsonl", "results/datasets/note")
    laid(tmp_path, "results/runs/llama/adapter/a", "results/runs/llama/merged/m", "results/runs/old/adapter/a")
    ours = ["results/datasets/sql", "results/runs/llama/adapter", "results/runs/llama/run.json", "results/metrics.csv"]
    outs = ["results/datasets", "results/runs", "results/metrics.csv", "results/none"]
    assert strangers(tmp_path, outs, ours) == [
        "results/datasets/mine",
        "results/datasets/note",
        "results/runs/llama/merged",
        "results/runs/old",
    ]


def test_a_path_lies_in_itself_and_in_what_is_above(tmp_path: Path) -> None:
    assert lies_in("results/a/b", ["results/c", "results/a"])
    assert lies_in("results/a", ["results/a"])
    assert not lies_in("results/ab", ["results/a"])


def test_dvc_looks_past_just_these(tmp_path: Path) -> None:
    from dvc.fs import localfs
    from dvc.ignore import DvcIgnoreFilter

    names = ["results/a/own [1]*", "results/a/!b", "results/a/#c", "results/a/back\\slash"]
    laid(tmp_path, *names, "results/a/own 1x", "results/b/own [1]*", "results/a/b")
    leave_alone(tmp_path, names)
    (tmp_path / ".dvc").mkdir()
    ignored = DvcIgnoreFilter(localfs, str(tmp_path))
    seen = {path for path in tmp_path.glob("results/*/*") if not ignored.is_ignored_file(str(path))}
    assert {path.relative_to(tmp_path).as_posix() for path in seen} == {
        "results/a/own 1x",
        "results/b/own [1]*",
        "results/a/b",
    }
    leave_alone(tmp_path, [])
    assert (tmp_path / IGNORED).read_text().count("\n") == 1
