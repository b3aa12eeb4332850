"""`make screenshot`: a picture of the shop's page for the documentation, as an SVG.

The page is printed to a PDF by Chromium and turned into an SVG, which is text, by Poppler.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import Page, expect

from .shop import NO_CHROMIUM, find_chromium, order, running_chromium, running_shop

WIDTH = 1100
LARGEST = 300_000
PLAIN = "body { print-color-adjust: exact } @page { margin: 0 }"


def use(page: Page) -> None:
    """Place the orders that the picture shows."""
    status = page.locator(".order").first.get_by_role("status")
    order(page, "teapot")
    expect(status).to_contain_text("409")
    order(page, "mug")
    expect(status).to_contain_text("paid in")
    page.get_by_role("button", name="Stop payments").click()
    expect(page.get_by_text("Payments is down")).to_be_visible()
    order(page, "lamp")
    expect(page.get_by_role("log").get_by_role("listitem")).to_have_count(3, timeout=60_000)
    expect(status).to_contain_text("paid in")
    order(page, "poster", answer="later")
    expect(status).to_contain_text("paid in")


def print_page(page: Page, path: Path) -> None:
    """Print the page as it looks on a screen, on one sheet of its size."""
    page.emulate_media(media="screen", color_scheme="light")
    page.add_style_tag(content=PLAIN)
    height = page.evaluate("document.documentElement.scrollHeight")
    page.pdf(path=path, width=f"{WIDTH}px", height=f"{height + 1}px", print_background=True)


def main(target: Path) -> int:
    """Renew the picture; return the exit code."""
    chromium, poppler = find_chromium(), shutil.which("pdftocairo")
    if chromium is None or poppler is None:
        print(NO_CHROMIUM if chromium is None else "no pdftocairo: apt-get install poppler-utils")
        return 1
    os.environ.pop("HOSTNAME", None)  # the name of this machine is no part of the picture
    with tempfile.TemporaryDirectory() as directory:
        printed = Path(directory) / "page.pdf"
        with running_shop() as shop, running_chromium(chromium) as browser:
            page = browser.new_page(viewport={"width": WIDTH, "height": 700})
            page.goto(shop.url)
            use(page)
            print_page(page, printed)
        drawn = Path(directory) / "page.svg"
        subprocess.run([poppler, "-svg", printed, drawn], check=True)  # noqa: S603  # found above
        text = drawn.read_text()
    target.write_text(smaller(text))
    print(f"{target}: {target.stat().st_size} bytes")
    return int(target.stat().st_size > LARGEST)


def smaller(svg: str) -> str:
    """Leave out what cannot be seen: digits, blanks, and the ends of groups that go on alike."""
    svg = re.sub(r"\d+\.\d{3,}", lambda found: f"{round(float(found[0]), 2):g}", svg)
    svg = re.sub(r"^ +", "", svg, flags=re.MULTILINE)
    svg = svg.replace("xlink:href", "href").replace("glyph", "g").replace("fill-opacity:1;", "")
    letters = re.compile(r'(<g style="[^"]*">\n)((?:<use .*\n)+)</g>\n\1')
    while (shorter := letters.sub(r"\1\2", svg)) != svg:
        svg = shorter
    return svg


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
