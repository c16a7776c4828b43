"""A picture of a page that `vit export --format web` wrote, in Chromium; prints what it says of itself, and its table.

python tests/reports/page_picture.py site/ -o page.png --width 1280 --all-sizes
"""

import argparse
import io
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from browser import browser, serving
from PIL import Image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("site", type=Path, help="the folder")
    parser.add_argument("-o", "--output", type=Path, required=True, help="a .png or .jpg file")
    parser.add_argument("--width", type=int, default=1280, help="of the window; default: %(default)s")
    parser.add_argument("--dark", action="store_true", help="in dark colours")
    parser.add_argument("--all-sizes", action="store_true", help="after a click on `try all sizes`")
    args = parser.parse_args()
    with serving(args.site) as url, browser() as page:
        page.look(args.width, dark=args.dark)
        page.open(url, "ready")
        if args.all_sizes:
            page.evaluate("document.getElementById('all').click()")
            sizes = "document.getElementById('size').max * 1 + 1"
            rows = "document.getElementById('rows').children.length"
            page.wait(f"{rows} === {sizes} && !document.body.classList.contains('busy')", seconds=300)
        picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
        picture.save(args.output, quality=85, optimize=True)
        print(f"{args.output}: {args.output.stat().st_size / 1000:.0f} kB", *page.problems(), sep="\n")
        for part in ("proof", "rows"):
            print(page.evaluate(f"document.getElementById('{part}').innerText"))


if __name__ == "__main__":
    main()
