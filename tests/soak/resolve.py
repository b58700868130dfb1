"""Whether the environment resolves on every Python that README names, without installing anything.

python tests/soak/resolve.py      needs uv and the package index; takes seconds
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PYTHONS = ("3.11.0", "3.11.2", "3.12.0", "3.13.0", "3.14.0")


def resolve(python: str) -> str:
    "What the resolver says, empty if it finds an environment with the pins."
    uv = Path(sys.executable).parent / "uv"
    extras = ["--extra", "dev", "--extra", "real", "--extra", "book"]
    command = [str(uv), "pip", "compile", "--quiet", *extras, "pyproject.toml"]
    pins = ["--constraint", "constraints.txt", "--python-version", python]
    done = subprocess.run([*command, *pins], cwd=ROOT, capture_output=True, text=True)
    return "" if done.returncode == 0 else done.stderr.strip()


def main() -> int:
    failed = 0
    for python in PYTHONS:
        reason = resolve(python)
        failed += bool(reason)
        print(f"{python:8} {reason or 'resolves'}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
