"""Whether notebooks are clean and exported: cleaning and exporting must leave no difference."""

import hashlib
import subprocess
import sys
from pathlib import Path

root = Path(__file__).resolve().parents[1]
tools = Path(sys.executable).parent


def state() -> dict:
    files = [
        p
        for d in ("nbs", "octomed")
        for p in (root / d).rglob("*")
        if p.suffix in (".ipynb", ".py") and ".ipynb_checkpoints" not in p.parts
    ]
    return {
        str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in [*files, root / "README.md"]
        if p.exists()
    }


before = state()
for command in (["nbdev_clean"], ["nbdev_export"]):
    subprocess.run([str(tools / command[0])], cwd=root, check=True)
subprocess.run([sys.executable, str(root / "tests" / "readme.py")], cwd=root, check=True)
after = state()
changed = sorted(f for f in before.keys() | after.keys() if before.get(f) != after.get(f))
print(
    f"clean and exported: {len(after)} files"
    if not changed
    else "run nbdev_clean, nbdev_export and tests/readme.py, and commit: " + ", ".join(changed)
)
sys.exit(bool(changed))
