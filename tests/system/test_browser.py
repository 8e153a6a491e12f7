"""Reports in a real browser: both themes, wide and as narrow as a phone."""

from __future__ import annotations

import json
import os
import shutil

import pytest

from helpers.large_runs import make_run
from helpers.results import RESULT
from helpers.selections import config
from helpers.zoo import make_checkpoint
from stun.pruning.job import prune
from stun.report.write import write_reports

pytestmark = pytest.mark.browser
BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
if not (BROWSER and DRIVER):
    REASON = "chromium and chromedriver are not installed: apt-get install chromium chromium-driver"
    if os.environ.get("REQUIRE_CHROMIUM"):
        raise RuntimeError(REASON)
    pytest.skip(REASON, allow_module_level=True)


@pytest.fixture(scope="module")
def browser():
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def pages(tmp_path_factory, ranks):
    """A run with every section, one that was not evaluated, and their comparison."""
    folder = tmp_path_factory.mktemp("pages")
    source = make_checkpoint(folder / "source", "mixtral", num_local_experts=12)
    runs = folder / "sweep of runs"
    for name, target in (("evaluated", 0.4), ("a rather long name,experts.fraction=0.125,target=0.625", 0.6)):
        prune(config(source, runs / name, target=target), ranks)
    (runs / "evaluated" / "result.json").write_text(json.dumps(RESULT))
    return write_reports(runs)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Page of a run of a model with 48 layers of 128 experts."""
    return write_reports(make_run(tmp_path_factory.mktemp("large") / "run", 48, 128))[0]


# Numbers that break in two lines, and ends of rows that cannot be scrolled into view.
BROKEN = """
const wrong = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
    const node = walker.currentNode, range = document.createRange();
    for (const match of node.data.matchAll(/\\d[\\d.,]*(\\u00a0[%\\w]+)?/g)) {
        range.setStart(node, match.index); range.setEnd(node, match.index + match[0].length);
        const lines = new Set([...range.getClientRects()].filter(box => box.width).map(box => Math.round(box.top)));
        if (lines.size > 1) wrong.push(match[0]);
    }
}
for (const box of document.querySelectorAll('.scroll')) {
    box.scrollLeft = 1e6;
    for (const row of box.querySelectorAll('tr'))
        if (row.lastElementChild.getBoundingClientRect().right > box.getBoundingClientRect().right + 1)
            wrong.push(row.textContent);
}
return wrong;
"""
# How many pixels of the first picture that is shown are ink: dark ones, light ones.
INK = """
const picture = document.querySelector('picture img'), canvas = document.createElement('canvas');
canvas.width = picture.naturalWidth; canvas.height = picture.naturalHeight;
const context = canvas.getContext('2d'); context.drawImage(picture, 0, 0);
const data = context.getImageData(0, 0, canvas.width, canvas.height).data, ink = [0, 0];
for (let i = 0; i < data.length; i += 4) {
    const colors = [data[i], data[i + 1], data[i + 2]];
    if (data[i + 3] > 200) { ink[0] += Math.max(...colors) < 60; ink[1] += Math.min(...colors) > 215; }
}
return ink;
"""


def shown(browser, page, theme: str, width: int, place: str = "") -> None:
    """Open a page, or a `place` on it, in a window of this width; 390 is a phone's."""
    features = [{"name": "prefers-color-scheme", "value": theme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    size = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width == 390}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get_log("performance"), browser.get_log("browser")
    browser.get(page.absolute().as_uri() + place)


def test_pages(browser, pages):
    assert len(pages) == 3
    for page in pages:
        for theme in ("light", "dark"):
            for width in (390, 1280):
                shown(browser, page, theme, width)
                images = browser.execute_script("return [...document.images].map(i => [i.naturalWidth, i.width, i.alt])")
                assert all(natural > 0 and 0 < seen <= width and alt for natural, seen, alt in images), (page, theme, width)
                assert len(images) >= (2 if page == pages[-1] else 9)
                assert browser.execute_script("return document.documentElement.scrollWidth") <= width, (page, theme, width)
                assert (wrong := browser.execute_script(BROKEN)) == [], (page, theme, width, wrong)
                ground = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
                assert (ground == "rgb(252, 251, 248)") is (theme == "light")
                assert not browser.get_log("browser"), "the console is empty"
                asked = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
                urls = [m["params"]["request"]["url"] for m in asked if m["method"] == "Network.requestWillBeSent"]
                assert urls and all(url.startswith(("data:", page.absolute().as_uri())) for url in urls)
            dark, light = browser.execute_script(INK)
            assert (dark > 100 and not light) if theme == "light" else (light > 100 and not dark), "words can be read"


# Of the enlarged map: whether it fills the window, whether its scale is in it, its width, and what of it can be reached.
ENLARGED = """
const figure = document.querySelector('figure:target'), map = figure.querySelector('img');
const box = figure.getBoundingClientRect(), scale = figure.querySelector('.scale').getBoundingClientRect();
figure.scrollLeft = 1e6;
return {fills: box.left == 0 && box.top == 0 && box.right >= document.documentElement.clientWidth && box.bottom == innerHeight,
        scale: scale.height > 0 && scale.bottom < innerHeight, width: map.getBoundingClientRect().width,
        reached: map.getBoundingClientRect().right <= figure.clientWidth, page: document.documentElement.scrollWidth};
"""


@pytest.mark.parametrize("width", [390, 1280])
def test_a_map_can_be_enlarged(browser, large, width):
    """A map of 128 x 128 experts is small until it is clicked; then it has its scale, and columns that can be told apart."""
    from selenium.webdriver.common.by import By

    shown(browser, large, "light", width)
    link = browser.find_element(By.CSS_SELECTOR, "a.open")
    assert link.size["width"] < 300
    link.click()
    seen = browser.execute_script(ENLARGED)
    assert seen["fills"] and seen["scale"] and seen["reached"] and seen["width"] >= 5 * 128 and seen["page"] <= width
    browser.find_element(By.CSS_SELECTOR, "figure:target .bar a:last-child").click()
    assert link.size["width"] < 300
