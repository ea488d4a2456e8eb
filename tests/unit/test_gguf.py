"""GGUF by llama.cpp's converter where one is on the PATH, or a line that says how to get it."""

from pathlib import Path

import pytest

from gguf_merged import gguf_merged
from qlora.errors import UserError

WRITES = '#!/bin/sh\n[ "$2" = --outfile ] && [ "$4 $5" = "--outtype bf16" ] && cat "$1/config.json" > "$3"\n'


def converter(folder: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program of the converter's name, alone on the PATH but for the shell's own."""
    (folder / "bin").mkdir()
    program = folder / "bin/convert_hf_to_gguf.py"
    program.write_text(text)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:/bin:/usr/bin")


@pytest.fixture
def merged(tmp_path: Path) -> Path:
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged/config.json").write_text("a model")
    return tmp_path / "merged"


def test_the_converter_is_given_the_merged_model(merged, tmp_path, monkeypatch):
    converter(tmp_path, WRITES, monkeypatch)
    gguf_merged(merged, tmp_path / "merged.gguf")
    assert (tmp_path / "merged.gguf").read_text() == "a model"


@pytest.mark.parametrize("text", ['#!/bin/sh\necho half > "$3"; exit 3\n', "#!/bin/sh\nexit 0\n"])
def test_a_converter_that_fails_leaves_nothing(merged, tmp_path, monkeypatch, text):
    converter(tmp_path, text, monkeypatch)
    with pytest.raises(UserError, match=r"ended with status \d and wrote no whole file"):
        gguf_merged(merged, tmp_path / "merged.gguf")
    assert not (tmp_path / "merged.gguf").exists()


def test_without_a_converter_the_way_to_one_is_told(merged, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError) as caught:
        gguf_merged(merged, tmp_path / "merged.gguf")
    assert "no convert_hf_to_gguf.py on the PATH: clone llama.cpp" in str(caught.value)
    assert f"python convert_hf_to_gguf.py {merged} --outfile {tmp_path / 'merged.gguf'}" in str(caught.value)
