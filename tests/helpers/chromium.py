"""A headless Chromium that looks at a page."""

import shutil
import time
from pathlib import Path

import pytest

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1280,900",
)  # fmt: skip


def open_browser(profile: Path):
    """A browser with an empty profile. Skips the test where there is none."""
    selenium = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    from selenium.webdriver.chrome.options import Options
    from selenium.webdriver.chrome.service import Service

    browser = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.skip("there is no Chromium with chromedriver; Debian has them as chromium and chromium-driver")
    options = Options()
    options.binary_location = browser
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return selenium.Chrome(options=options, service=Service(driver))


def until(browser, script: str, seconds: float = 60.0):
    """Wait until a script gives something true, and return that."""
    end = time.monotonic() + seconds
    while not (found := browser.execute_script(script)):
        assert time.monotonic() < end, f"not within {seconds} s: {script}"
        time.sleep(0.05)
    return found


def open_page(browser, path: Path) -> list[dict]:
    """Open a page, wait until it is drawn, and return what its scripts wrote to the console."""
    browser.get(path.resolve().as_uri())
    until(browser, "return document.documentElement.dataset.ready === 'yes'")
    until(browser, "return [...document.querySelectorAll('.curves')].every((one) => one.dataset.done === 'yes')")
    return [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]
