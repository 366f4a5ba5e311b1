"""A headless Chromium, and the text of a page including the shadow trees that TensorBoard uses."""

import contextlib
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service

ALL_TEXT = """
const parts = [];
(function walk(node) {
  if (!node) return;  // a page that is still loading has no body
  if (node.nodeType === Node.TEXT_NODE) parts.push(node.nodeValue);
  if (node.tagName === 'STYLE' || node.tagName === 'SCRIPT') return;
  if (node.shadowRoot) walk(node.shadowRoot);
  if (node.tagName === 'SLOT') node.assignedNodes().forEach(n => parts.push(n.textContent));
  node.childNodes.forEach(walk);
})(document.body);
return parts.join(' ').replace(/\\s+/g, ' ');
"""
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-dev-shm-usage",  # /dev/shm has 64 MB in a container
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1600,1200",
]


@contextlib.contextmanager
def chromium(profile: Path) -> Iterator[webdriver.Chrome]:
    options = Options()
    options.binary_location = shutil.which("chromium")
    for flag in [*FLAGS, f"--user-data-dir={profile}"]:
        options.add_argument(flag)
    driver = webdriver.Chrome(options, Service(shutil.which("chromedriver")))
    try:
        yield driver
    finally:
        driver.quit()


def text_with(driver: webdriver.Chrome, *wanted: str, seconds: float = 240) -> str:
    """The text of the page as soon as it contains all of `wanted`."""
    until = time.monotonic() + seconds
    while True:
        text = driver.execute_script(ALL_TEXT)
        missing = [word for word in wanted if word not in text]
        if not missing:
            return text
        assert time.monotonic() < until, f"{missing} not on {driver.current_url}: {text[:3000]}"
        time.sleep(0.5)
