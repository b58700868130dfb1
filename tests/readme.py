"README.md is nbs/index.ipynb: its markdown cells, in order."

import json
from pathlib import Path

root = Path(__file__).resolve().parents[1]
cells = json.loads((root / "nbs" / "index.ipynb").read_text(encoding="utf-8"))["cells"]
(root / "README.md").write_text(
    "\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown") + "\n",
    encoding="utf-8",
)
