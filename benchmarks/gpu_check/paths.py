"""Makes the package, its benchmarks and test helpers importable from the checkout."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]

sys.path[1:1] = [str(ROOT), str(HERE.parent), str(ROOT / "tests" / "support")]
