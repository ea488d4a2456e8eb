"""Stage `gguf`, on request: a merged model becomes one GGUF file in bfloat16, by llama.cpp's converter on the PATH."""

from qlora.stage import log, run_stage

import shutil
import subprocess
from pathlib import Path

from qlora.errors import UserError
from qlora.files import replacing

CONVERTERS = ("convert_hf_to_gguf.py", "convert-hf-to-gguf.py", "convert-hf-to-gguf", "convert_hf_to_gguf")


def gguf_merged(merged: Path, gguf: Path) -> None:
    """Convert a merged model. Raises UserError, which says how to get the converter, where there is none."""
    converter = next(filter(None, map(shutil.which, CONVERTERS)), None)
    if converter is None:
        raise UserError(
            f"no {CONVERTERS[0]} on the PATH: clone llama.cpp, install its requirements.txt, put its folder on the PATH"
            f" and make the script executable; or run it yourself: python {CONVERTERS[0]} {merged} --outfile {gguf}"
        )
    with replacing(gguf) as temporary:
        command = [converter, str(merged), "--outfile", str(temporary), "--outtype", "bf16"]
        log.info("%s", " ".join(command))
        status = subprocess.run(command, check=False).returncode
        if status or not temporary.exists():
            raise UserError(f"{converter} ended with status {status} and wrote no whole file; its log says why")
    log.info("%s", gguf)


if __name__ == "__main__":
    run_stage(gguf_merged)
