"""`report.html` in a browser: complete, self-contained, sortable, and readable on every screen."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

import made_up
from polyexport import FORMATS, Report
from polyexport.report import html
from polyexport.report.files import save
from polyexport.report.outcome import STATES


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    return made_up.report(tmp_path_factory.mktemp("run"))


def opened(browser: Any, path: Path, *, width: int = 1280, media: str = "screen", scheme: str = "light") -> Any:
    browser.get_log("performance"), browser.get_log("browser")  # what came before is not this page's
    screen = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": features})
    browser.get(path.as_uri())
    return browser


def requests(browser: Any) -> list[str]:
    """What the page asked for, beside itself."""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    own = (browser.current_url, "data:", "chrome:")  # the last is the browser's first tab
    return [url for url in urls if not url.startswith(own)]


def overhang(browser: Any) -> int:
    return browser.execute_script("return document.documentElement.scrollWidth - innerWidth")


def formats_shown(browser: Any) -> list[str]:
    return [cell.text for cell in browser.find_elements(By.CSS_SELECTOR, "#table tbody th")]


def heading(browser: Any, name: str) -> Any:
    return next(each for each in browser.find_elements(By.CSS_SELECTOR, "#table thead th") if name in each.text)


def test_the_page_is_complete_and_loads_nothing(browser, report):
    opened(browser, report.folder / "report.html")
    assert len(formats_shown(browser)) == 1 + len(report.outcomes)
    shown = {chip.text for chip in browser.find_elements(By.CSS_SELECTOR, "#table .chip")}
    assert shown == {"baseline", *STATES}
    assert len(browser.find_elements(By.TAG_NAME, "svg")) == 6
    assert browser.get_log("browser") == []
    assert requests(browser) == []


def test_a_page_that_loads_something_is_noticed(browser, tmp_path):
    """The shadow of the checks that the other tests make."""
    page = tmp_path / "bad.html"
    page.write_text("<div style='width: 3000px'>x</div><img src='http://127.0.0.1:9/x.png'><script>throw 1</script>")
    opened(browser, page, width=390)
    assert browser.get_log("browser") != []
    assert requests(browser) == ["http://127.0.0.1:9/x.png"]
    assert overhang(browser) > 0


def test_names_given_by_users_are_escaped(browser, report):
    opened(browser, report.folder / "report.html")
    assert made_up.HOSTILE in formats_shown(browser)
    assert len(browser.find_elements(By.TAG_NAME, "script")) == 1
    assert f"note of {made_up.HOSTILE}" in browser.find_element(By.CLASS_NAME, "notes").text


def test_a_click_on_a_heading_sorts_with_what_is_missing_last(browser, report):
    opened(browser, report.folder / "report.html")
    original = formats_shown(browser)
    figures = {o.format: o.latency.p50_ms for o in report.outcomes if o.latency} | {"eager": report.baseline.p50_ms}
    fastest = sorted(figures, key=figures.__getitem__)
    head = heading(browser, "p50 ms")
    for sort, order in (("ascending", fastest), ("descending", fastest[::-1])):
        head.find_element(By.TAG_NAME, "button").click()
        assert head.get_attribute("aria-sort") == sort
        assert formats_shown(browser)[: len(order)] == order
    head.find_element(By.TAG_NAME, "button").click()
    assert (head.get_attribute("aria-sort"), formats_shown(browser)) == (None, original)


def press(browser: Any, key: str) -> Any:
    """Press a key as a person does, whatever has the focus; returns what has it then."""
    ActionChains(browser).send_keys(key).perform()
    return browser.switch_to.active_element


def test_the_keyboard_reaches_a_heading_and_sorts(browser, report):
    opened(browser, report.folder / "report.html")
    skip = press(browser, Keys.TAB)
    assert (skip.get_attribute("class"), skip.is_displayed(), skip.location["x"] >= 0) == ("skip", True, True)
    press(browser, Keys.ENTER)
    for _ in range(5):
        if press(browser, Keys.TAB).text.startswith("state"):
            break
    press(browser, Keys.ENTER)
    assert heading(browser, "state").get_attribute("aria-sort") == "ascending"
    states = [chip.text for chip in browser.find_elements(By.CSS_SELECTOR, "#table .chip")]
    assert states == sorted(states)
    assert browser.execute_script("return getComputedStyle(document.activeElement).outlineStyle") == "solid"


def tips(browser: Any) -> list[str]:
    return [tip.text for tip in browser.find_elements(By.CSS_SELECTOR, "svg .tip") if tip.is_displayed()]


def test_a_point_says_what_it_is_under_the_pointer_and_by_keyboard(browser, report):
    opened(browser, report.folder / "report.html")
    points = browser.find_elements(By.CSS_SELECTOR, "svg .point")
    assert len(points) > 2 * len(report.pareto())
    for point in points[:4]:
        browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", point)
        words = browser.execute_script("return arguments[0].querySelector('title').textContent", point)
        assert tips(browser) == []
        ActionChains(browser).move_to_element(point.find_element(By.CSS_SELECTOR, ".dot")).perform()
        assert tips(browser) == [words]
        ActionChains(browser).move_to_element(browser.find_element(By.ID, "pictures")).perform()
    browser.execute_script("arguments[0].focus()", points[0])
    for point in points[1:4]:
        assert press(browser, Keys.TAB) == point
        words = browser.execute_script("return arguments[0].querySelector('title').textContent", point)
        assert tips(browser) == [words]


@pytest.mark.parametrize(("scheme", "dark"), [("light", False), ("dark", True)])
def test_the_page_follows_the_color_scheme(browser, report, scheme, dark):
    opened(browser, report.folder / "report.html", scheme=scheme)
    colors = [
        browser.execute_script(f"return getComputedStyle(document.querySelector('{where}')).{what}")
        for where, what in (("body", "backgroundColor"), ("body", "color"), ("svg .name", "fill"))
    ]
    paper, ink, name = (sum(map(int, re.findall(r"\d+", color)[:3])) / 765 for color in colors)
    assert (paper < 0.3, ink > 0.7, name > 0.7) == (dark, dark, dark)


def test_on_a_phone_the_tables_scroll_and_the_page_does_not(browser, report):
    opened(browser, report.folder / "report.html", width=390)
    assert overhang(browser) == 0
    table = "const table = document.querySelector('.scroll:has(#table)'); "
    assert browser.execute_script(f"{table} return table.scrollWidth > table.clientWidth")


def test_printing_opens_folded_parts_and_hides_the_navigation(browser, report):
    opened(browser, report.folder / "report.html", media="print", scheme="dark")
    browser.execute_script("dispatchEvent(new Event('beforeprint'))")
    assert all(each.get_attribute("open") for each in browser.find_elements(By.TAG_NAME, "details"))
    assert not browser.find_element(By.TAG_NAME, "nav").is_displayed()
    paper = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert paper == "rgb(255, 255, 255)"


def test_a_snippet_can_be_copied_or_is_selected(browser, report):
    opened(browser, report.folder / "report.html")
    block = browser.find_element(By.CSS_SELECTOR, "details[open] .code")
    block.find_element(By.CLASS_NAME, "copy").click()
    words = browser.execute_async_script(
        "const [button, done] = arguments; setTimeout(() => done(button.textContent), 300)",
        block.find_element(By.CLASS_NAME, "copy"),
    )
    assert words in ("Copied", "Selected")


def test_the_page_has_reasons_commands_and_history(report):
    text = (report.folder / "report.html").read_text(encoding="utf-8")
    assert "static shapes only; with dynamic axes: XNNPACK has no such pool" in text
    assert "python -m polyexport.worker jobs/onnx.json --scratch" in text
    assert 'href="../epoch%3D1-step%3D200/report.html"' in text
    assert "val_loss of the exported checkpoints" in text
    assert len(text) < 200_000


def test_the_page_has_the_metrics_of_each_runtime_beside_pytorchs(tmp_path):
    made = made_up.report(tmp_path)
    onnx = replace(made["onnx"], metrics={"val_acc": 0.75})
    page = html.page(replace(made, outcomes=(onnx,), metrics={"val_acc": 0.5}))
    assert ">0.5</td>" in page
    assert ">0.75 (+2.5e-01)</td>" in page
    assert 'id="metrics"' not in html.page(made)


def test_a_first_export_that_failed_has_a_page_too(tmp_path):
    made = made_up.report(tmp_path / "run")
    failed = made_up.outcome("onnx", "failed", "the module cannot be rebuilt")
    save(Report(made.checkpoint, None, (failed,), folder=tmp_path))
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "the module cannot be rebuilt" in text
    assert "<svg" not in text
    assert 'id="history"' not in text


def test_every_format_says_how_an_application_opens_it():
    for each in FORMATS.values():
        assert each.snippets, each.name
        assert all("{{ path" in snippet.code for snippet in each.snippets), each.name


def test_the_command_that_draws_a_graph_is_shown_for_files_that_netron_reads(report):
    page = html.page(report)
    shown = {each.format: f">netron {html.graph(each)}<" in page for each in report.outcomes if each.artifact}
    assert shown == {name: name in FORMATS and bool(FORMATS[name].graph) for name in shown}
    assert set(shown.values()) == {True, False}


# --- the choice -------------------------------------------------------------------------------------------------------


def test_the_best_is_the_fastest_verified_one(report):
    assert report.best().format == "openvino"
    assert {each.format for each in report.pareto()} == {
        "onnx",
        "torchscript",
        "openvino",
        "coreml-fp16",
        made_up.HOSTILE,
    }


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({"max_error": 5.5e-6}, "onnx"),
        ({"max_error": 0.0}, "torchscript"),
        ({"max_bytes": 60_000_000}, "coreml-fp16"),
        ({"max_bytes": 90_000_000, "max_error": 1e-4}, made_up.HOSTILE),
        ({"max_ms": 1.0}, None),
        ({"max_bytes": 60_000_000, "max_ms": 20.0}, None),
    ],
)
def test_the_best_keeps_the_limits(report, limits, expected):
    best = report.best(**limits)
    assert (best.format if best else None) == expected


def test_formats_without_a_measurement_keep_no_limit_and_the_closest_wins(tmp_path):
    outcomes = (
        made_up.outcome("onnx", "verified", megabytes=2.0, error=2e-6),
        made_up.outcome("openvino", "verified", megabytes=1.0, error=2e-6),
        made_up.outcome("executorch", "degraded", megabytes=0.5, error=0.0),
    )
    report = Report(made_up.report(tmp_path).checkpoint, None, outcomes)
    assert report.best().format == "openvino"
    assert report.best(max_ms=1e9) is None
