"""Take the picture of a report page that README and site show.

python docs/picture.py runs/digits/<run id>/exports/best docs/report.webp
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

from polyexport import Report
from polyexport.report.html import page

WIDTH, HEIGHT = 1200, 1400  # CSS pixels: the highlights, the table and the first drawings


def shot(file: Path, target: Path) -> None:
    """Open a page in a headless Chromium and save what it shows as a PNG."""
    names = ("chromium", "chromium-browser", "google-chrome")
    chromium = next(filter(None, map(shutil.which, names)), None)
    if chromium is None:
        sys.exit(f"there is no Chromium on PATH; looked for {', '.join(names)}")
    with tempfile.TemporaryDirectory() as profile:
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={profile}"]
        size = f"--window-size={WIDTH},{HEIGHT}"
        subprocess.run([chromium, *options, size, f"--screenshot={target}", file.as_uri()], check=True, timeout=120)


def main(export: str, target: str) -> None:
    """Draw the page of an export anew, and save its picture as WebP."""
    with tempfile.TemporaryDirectory() as folder:
        file, picture = Path(folder, "report.html"), Path(folder, "report.png")
        file.write_text(page(Report.load(export)), encoding="utf-8")
        shot(file, picture)
        with Image.open(picture) as image:
            image.convert("RGB").save(target, "WEBP", quality=80)


if __name__ == "__main__":
    main(*sys.argv[1:])
