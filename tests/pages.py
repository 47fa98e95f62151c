"""Tools to read pages with a parser and a real browser."""

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome", "headless_shell")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--hide-scrollbars",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
    "--virtual-time-budget=2000",
)

PROBE = """
<script>
addEventListener("load", () => {
  const axis = new URLSearchParams(location.search).get("axis");
  if (axis) document.getElementById(axis).click();
  const charts = [...document.querySelectorAll("svg")].map(svg => {
    const box = svg.getBoundingClientRect();
    return {
      title: svg.querySelector("title").textContent, shown: box.width > 0,
      box: [box.left, box.top, box.right, box.bottom],
      lines: [...svg.querySelectorAll("path")].filter(
        path => path.getBoundingClientRect().width > box.width / 3).length,
      images: [...svg.querySelectorAll("image")].length,
    };
  });
  const wide = document.documentElement.scrollWidth > innerWidth;
  document.body.innerHTML += "<pre id='probe'>" + JSON.stringify({charts, wide}) + "</pre>";
});
</script>
"""

Look = Callable[..., Any]


class Tables(HTMLParser):
    """Texts of all table cells by section and row, links, and the number of pictures."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.rows: dict[str, list[list[str]]] = {}
        self.links: list[str] = []
        self.pictures = 0
        self._section, self._cell = "", False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        self.links += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href", "action")]
        if tag == "section":
            self._section = named["id"] or ""
            self.rows[self._section] = []
        if tag == "tr":
            self.rows[self._section].append([])
        if tag in ("td", "th"):
            self._cell = True
            self.rows[self._section][-1].append("")
        self.pictures += tag == "svg"

    def handle_endtag(self, tag: str) -> None:
        self._cell = self._cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self._cell:
            self.rows[self._section][-1][-1] += data.strip()

    def section(self, name: str) -> dict[str, list[str]]:
        """The rows of a section by their first cell."""
        return {row[0]: row[1:] for row in self.rows[name]}


def headless_browser(profile: Path) -> Look:
    """A function that runs a headless Chromium and returns its output. Without one, the test is
    skipped."""
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("no Chromium is installed")

    def look(*arguments: str) -> str:
        command = [found, *FLAGS, f"--user-data-dir={profile}", *arguments]
        result = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert result.returncode == 0, result.stderr
        return result.stdout

    return look


def add_probe(page: Path, probed: Path) -> Path:
    """A copy of a page that reports its own layout."""
    probed.write_text(page.read_text().replace("</body>", f"{PROBE}</body>"))
    return probed


def probe(browser: Look, path: Path, *flags: str, axis: str = "") -> dict[str, Any]:
    """The layout of a page in the browser."""
    query = f"?axis={axis}" if axis else ""
    text = browser("--dump-dom", *flags, f"file://{path}{query}")
    found = re.search(r'<pre id="probe">(.*?)</pre>', text, re.DOTALL)
    assert found, text[-500:]
    return json.loads(found.group(1).replace("&amp;", "&").replace("&lt;", "<"))
