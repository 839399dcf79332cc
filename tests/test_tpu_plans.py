"""`benchmarks/tpu_plans.py` writes saved plans as tables, with given prices."""

import json
import subprocess
import sys

import pytest
from checkout import ROOT

from keras_openllama.planning.calibration import expected_figures

pytestmark = pytest.mark.backend_free


def run(path, *arguments):
    script = "benchmarks/tpu_plans.py"
    return subprocess.run(
        [sys.executable, script, "--no-compile", "--output", str(path), *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def test_tpu_plans_prints_the_price_of_a_run(tmp_path):
    plans = json.loads((ROOT / "docs/tpu_plans.json").read_text())
    plan = plans["7b_v2 v4-512"] | {"days": 10.0}
    kept = {"7b_v2 v4-512": plan, "13b v5e-16": {"reason": "does not fit"}}
    path = tmp_path / "plans.json"
    path.write_text(json.dumps(kept))
    done = run(path, "--price", "v4=2")
    assert done.returncode == 0, done.stderr
    (line,) = [text for text in done.stdout.splitlines() if "| 7b_v2" in text]
    hours = expected_figures({"topology": "v4:4x8x8", "chip_hours": 61440})
    dollars = f"{2 * hours['expected_chip_hours']:,.0f} ("
    assert line.split(" | ")[-1].startswith(dollars)
    assert "dollars at 2 per chip-hour" in done.stdout
    assert "| 13b v5e-16 | 16 | does not fit |" in done.stdout
    # A price belongs to a day and a region: the page has none.
    page = (tmp_path / "plans.md").read_text()
    assert "dollars" not in page and f"{hours['expected_chip_hours']:,.0f}" in page
    assert (tmp_path / "plans.png").stat().st_size > 10_000


@pytest.mark.parametrize("price", ["v4", "v3=1", "v4=-1", "v4=nan"])
def test_tpu_plans_rejects_an_invalid_price(price, tmp_path):
    done = run(tmp_path / "plans.json", "--price", price)
    assert done.returncode == 2
    assert "such as v4=3.22" in done.stderr and price in done.stderr
