"""`vit demo`: its figures and its picture."""

import re
import time

from PIL import Image


def test_demo(tmp_path, run):
    start = time.perf_counter()
    result = run("demo", "-o", tmp_path / "new" / "demo.png", HF_ENDPOINT="http://127.0.0.1:9")
    elapsed = time.perf_counter() - start
    assert result.returncode == 0, result.stderr
    assert elapsed < 60  # 15 s on a quiet machine
    rows = re.findall(r"^(\d+x\d+) +\d+x\d+ +([\d.]+)%", result.stdout, re.M)
    accuracy = {size: float(value) for size, value in rows}
    assert set(accuracy) == {"32x32", "48x48", "32x48"}
    assert accuracy["32x32"] >= 98 and min(accuracy.values()) >= 97
    assert "largest difference of a logit from `reference`, divided by the largest logit" in result.stdout
    assert float(re.search(r"^sdpa +([\d.e-]+)$", result.stdout, re.M).group(1)) <= 1e-5
    picture = Image.open(tmp_path / "new" / "demo.png")
    assert picture.width > 800 and len(picture.getcolors(1 << 20)) > 100
    assert str(tmp_path / "new" / "demo.png") in result.stdout
