"""A real headless Chromium for tests of pages; they are skipped where it or selenium is not installed."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

SECONDS = 60  # to wait for what a page does


@contextmanager
def chromium(*options: str) -> Iterator[Any]:
    """A browser window of 1280 by 1000 pixels; at the end its console must hold no error."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: .[browser]")
    programs = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if None in programs:
        pytest.skip("chromium and chromedriver are not installed")
    settings = webdriver.ChromeOptions()
    settings.binary_location = programs[0]
    for option in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,1000", *options):
        settings.add_argument(option)
    settings.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=settings, service=webdriver.ChromeService(programs[1]))
    try:
        yield browser
        errors = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
        assert not errors, errors
    finally:
        browser.quit()


def wait(browser: Any, condition: Any) -> Any:
    """What a condition of the browser returns once it is true."""
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, SECONDS).until(condition)
