"""The page in a real browser: every panel, broken files, two visitors, a phone, a keyboard, and what the server refuses.

It needs Gradio, Selenium and Chromium: pip install -e '.[demo]' selenium; apt-get install chromium chromium-driver
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

import demo
import pytest
import torch
from PIL import Image

import timm_jem
from timm_jem.data import digits
from timm_jem.demo import panels
from timm_jem.demo.exhibit import load_exhibit
from timm_jem.demo.space import write_space

BROWSER, DRIVER = (
    next(filter(None, map(shutil.which, names)), None) for names in (("chromium", "google-chrome"), ("chromedriver",))
)
MISSING = [name for name in ("gradio", "selenium") if find_spec(name) is None]
MISSING += [name for name, found in (("chromium", BROWSER), ("chromedriver", DRIVER)) if found is None]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(MISSING), reason=f"{', '.join(MISSING)} not installed")]
PATIENCE = 60.0  # seconds, on a machine that is busy with other things


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A page on this machine, whose Gradio would write to a folder of its own."""
    folder = tmp_path_factory.mktemp("page")
    os.environ["GRADIO_TEMP_DIR"] = str(folder / "written")
    torch.manual_seed(0)
    sgld = timm_jem.SGLDConfig(num_steps=20, step_size=1.0, noise_std=0.05)
    jem = timm_jem.create_model("wrn_10_1", num_classes=10, input_size=(1, 8, 8), class_names=list("0123456789"), sgld=sgld)
    jem.provenance = {"config": {"data": {"dataset": "digits", "val_fraction": 0.1}}}
    jem.eval().save_pretrained(folder / "digits")
    from timm_jem.demo.page import launch

    exhibit, _ = load_exhibit(str(folder / "digits"))
    served = launch(exhibit, wait=False)
    served.exhibit, served.written = exhibit, folder / "written"
    yield served
    served.close()


class Visitor:
    """A browser's window and what a person does in it."""

    def __init__(self, driver, url: str) -> None:
        self.driver = driver
        driver.get(url)
        self.window = driver.current_window_handle
        for part in ("#believed .verdict", "#chooser button", "button.lg"):
            self.see(part)

    def all(self, css: str) -> list:
        self.driver.switch_to.window(self.window)
        return [found for found in self.driver.find_elements("css selector", css) if found.is_displayed()]

    def see(self, css: str, words: str = ""):
        """The first that is shown and has these words, waited for."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            try:
                if found := [one for one in self.all(css) if words in one.text]:
                    return found[0]
            except Exception as error:
                if "stale" not in str(error):
                    raise
            time.sleep(0.02)
        raise AssertionError(f"no {css} with {words!r}; there is {[one.text for one in self.all(css)]}")

    def press(self, name: str, css: str = "button.lg") -> None:
        until(lambda: any(button.text.strip() == name for button in self.all(css)))
        next(button for button in self.all(css) if button.text.strip() == name).click()

    def open(self, tab: str) -> None:
        self.press(tab, 'button[role="tab"]')

    def sources(self, css: str) -> list[str]:
        return [image.get_attribute("src") for image in self.all(f"{css} img")]

    def give(self, file) -> None:
        self.driver.switch_to.window(self.window)
        self.driver.find_element("css selector", "#chooser input").send_keys(str(file))

    def script(self, code: str):
        self.driver.switch_to.window(self.window)
        return self.driver.execute_script(code)


@pytest.fixture(scope="module")
def driver():
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1200,1000"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def visitor(page, driver):
    yield Visitor(driver, page.local_url)
    worst = [entry["message"] for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]
    of_streams_left = ("AbortError", "Connection errored out")  # which the browser cut as a window went elsewhere
    assert not [message for message in worst if not any(words in message for words in of_streams_left)]


def digit(folder, row: int):
    digits()[row]["image"].save(folder / f"{row}.png")
    return folder / f"{row}.png"


def test_the_page_opens_with_a_belief(visitor):
    assert visitor.all("#chooser button")
    assert "training data" in visitor.see("#believed .flag").text
    assert visitor.all("#believed svg")
    assert visitor.script("return document.title").startswith("What ")


def test_an_example_and_noise_are_looked_at(visitor):
    before = visitor.sources("#believed")
    visitor.all("#chooser button")[-1].click()
    visitor.see('#chooser button[aria-pressed="true"]')
    deadline = time.monotonic() + PATIENCE
    while visitor.sources("#believed") == before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert visitor.sources("#believed") != before


def test_an_upload_is_looked_at_and_a_broken_one_is_a_line(visitor, page, tmp_path):
    jem, file = page.exhibit.jem, digit(tmp_path, 30)
    before = visitor.sources("#believed")
    (tmp_path / "broken.png").write_bytes(file.read_bytes()[:60])
    (tmp_path / "large.png").write_bytes(bytes(panels.MOST_BYTES + 1))
    Image.new("1", (9000, 9000)).save(tmp_path / "wide.png")
    for name, words in (("broken.png", "can't be decoded"), ("large.png", "at most 20 MB"), ("wide.png", "at most 50 million")):
        visitor.give(tmp_path / name)
        assert visitor.see("#said .problem", words).text.count("\n") == 0
        assert visitor.sources("#believed") == before
    visitor.give(file)
    visitor.see("#believed .flag", f"{jem.predict(file).energy:.2f}".replace("-", "−"))
    assert not visitor.all("#said .problem")
    assert visitor.see("#believed .verdict").text.startswith(jem.predict(file).label)


def test_chains_are_watched(visitor):
    start = time.monotonic()
    visitor.press("Draw")
    visitor.see("#drawn img")
    print(f"from click to first picture {time.monotonic() - start:.2f} s")
    seen = set()
    deadline = time.monotonic() + PATIENCE
    while "Again in Python" not in visitor.see("#drawn").text and time.monotonic() < deadline:
        seen.add(re.search(r"step \d+ of 20", visitor.see("#drawn svg").text)[0])
    assert len(visitor.sources("#drawn")) == 8
    assert len(seen) >= 3


def test_a_chain_is_stopped(visitor, long_chains):
    visitor.press("Draw")
    visitor.see("#drawn svg", "step 3")
    visitor.press("Stop")
    assert nothing_moves()
    at = visitor.see("#drawn svg").text
    time.sleep(0.5)
    assert visitor.see("#drawn svg").text == at


def test_an_attack_is_watched(visitor):
    visitor.open("Attack")
    visitor.press("Attack")
    visitor.see("#attacked figcaption", "before:")
    visitor.see("#attacked svg", "step 42 of 42")
    assert nothing_moves()
    before, after, _ = visitor.sources("#attacked")
    assert before != after
    assert before == visitor.sources("#believed")[0]
    visitor.all("#chooser button")[1].click()
    gone(visitor, "#attacked img")


def test_a_change_is_gone_back_by_the_slider(visitor):
    from selenium.webdriver import Keys

    visitor.open("Change")
    visitor.press("Change")
    visitor.see("#changed img")
    assert nothing_moves()
    slider = next(one for one in visitor.all('#along input[type="range"]'))
    deadline = time.monotonic() + PATIENCE
    while not slider.is_enabled() and time.monotonic() < deadline:
        time.sleep(0.05)
    before, after = visitor.sources("#changed")
    assert before != after
    slider.send_keys(Keys.HOME)
    visitor.see("#changed svg", "step 0 of")
    assert visitor.sources("#changed") == [before, before]
    slider.send_keys(Keys.END)
    deadline = time.monotonic() + PATIENCE
    while visitor.sources("#changed") != [before, after] and time.monotonic() < deadline:
        time.sleep(0.05)
    assert visitor.sources("#changed") == [before, after]


def test_a_part_is_erased_by_hand_or_keyboard_and_restored(visitor):
    from selenium.webdriver import ActionChains, Keys

    visitor.all("#chooser button")[3].click()  # before there is anything to paint on
    visitor.see('#chooser button[data-row="3"][aria-pressed="true"]')
    visitor.open("Erase and restore")
    visitor.press("Restore")
    visitor.see("#restored .problem", "paint over")
    painter = visitor.see("#painter .painter")
    reach = painter.size["width"] // 2 - 5
    drag = ActionChains(visitor.driver).move_to_element_with_offset(painter, -reach, -reach).click_and_hold()
    for _ in range(8):
        drag = drag.move_by_offset(0, reach // 4)
    drag.release().perform()
    painter.send_keys(Keys.ARROW_RIGHT, Keys.SPACE)
    gone_cells = [
        i
        for i, cell in enumerate(visitor.script("return [...document.querySelectorAll('#painter i')].map(c => c.className)"))
        if "gone" in cell
    ]
    assert gone_cells == [0, 1, 8, 16, 24, 32, 40, 48, 56]
    visitor.press("Restore")
    visitor.see("#restored figcaption", "before")
    visitor.see("#restored svg", "step 20 of 20")
    before, hole, _ = visitor.sources("#restored")
    assert before == visitor.sources("#believed")[0]
    assert hole != before
    visitor.all("#chooser button")[2].click()
    gone(visitor, "#restored img")
    assert not visitor.all("#painter .gone")


def test_two_visitors_do_not_mix(visitor, page):
    visitor.driver.switch_to.new_window("window")
    other = Visitor(visitor.driver, page.local_url)
    visitor.all("#chooser button")[3].click()
    pictures = [one.get_attribute("src") for one in visitor.all("#chooser img")]
    until(lambda: visitor.sources("#believed")[:1] == [pictures[3]])
    assert other.sources("#believed")[:1] == [pictures[0]]
    other.all("#chooser button")[5].click()
    until(lambda: other.sources("#believed")[:1] == [pictures[5]])
    assert visitor.sources("#believed")[:1] == [pictures[3]]
    for one in (visitor, other):
        one.open("Attack")
        one.press("Attack")
    for one, row in ((visitor, 3), (other, 5)):
        one.see("#attacked svg", "step 42 of 42")
        assert one.sources("#attacked")[0] == pictures[row]
    other.driver.close()
    visitor.driver.switch_to.window(visitor.window)


def test_the_keyboard_alone_will_do(visitor):
    from selenium.webdriver import ActionChains, Keys

    reached = []
    for _ in range(40):
        ActionChains(visitor.driver).send_keys(Keys.TAB).perform()
        reached.append(
            visitor.script(
                "const e = document.activeElement; "
                "return e.dataset.row ?? (e.type === 'file' ? 'upload' : e.getAttribute('role') || e.textContent.trim())"
            )
        )
        if reached[-1] == "2":
            ActionChains(visitor.driver).send_keys(Keys.ENTER).perform()
        if reached[-1] == "Draw":
            ActionChains(visitor.driver).send_keys(Keys.ENTER).perform()
            break
    assert {"0", "1", "2", "upload", "tab", "Draw"} <= set(reached)
    visitor.see('#chooser button[data-row="2"][aria-pressed="true"]')
    visitor.see("#drawn img")


def test_a_phone_shows_all_of_it(visitor):
    visitor.driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 375, "height": 812, "deviceScaleFactor": 2, "mobile": True}
    )
    try:
        for tab in ("Draw", "Attack", "Change", "Erase and restore"):
            if not [one for one in visitor.all('button[role="tab"]') if one.text == tab]:
                visitor.all(".overflow-menu > button")[0].click()
            next(one for one in visitor.all('[role="tab"], .overflow-dropdown button') if one.text == tab).click()
            if tab != "Erase and restore":
                visitor.press(tab)
                visitor.see({"Draw": "#drawn", "Attack": "#attacked", "Change": "#changed"}[tab] + " img")
            width = visitor.script("return document.documentElement.scrollWidth")
            assert width <= 375, f"{tab} is {width} wide"
        assert nothing_moves()
    finally:
        visitor.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.fixture
def long_chains(page):
    """Chains that would go on for an hour."""
    jem, before = page.exhibit.jem, page.exhibit.jem.sgld
    jem.sgld = timm_jem.SGLDConfig(num_steps=20, sample_steps=72_000)
    yield
    jem.sgld = before


def moving() -> int:
    return sum(thread.name == "live" for thread in threading.enumerate())


def until(condition) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def nothing_moves() -> bool:
    until(lambda: moving() == 0)
    return True


def gone(visitor: Visitor, css: str) -> None:
    from selenium.common.exceptions import StaleElementReferenceException

    def none_left() -> bool:
        try:
            return not visitor.all(css)
        except StaleElementReferenceException:  # replaced between being found and being asked whether it is shown
            return False

    until(none_left)


def test_a_chain_whose_viewer_left_ends(visitor, page, long_chains):
    visitor.driver.switch_to.new_window("window")
    leaving = Visitor(visitor.driver, page.local_url)
    leaving.press("Draw")
    leaving.see("#drawn svg", "step 2")
    assert moving() == 1
    start = time.monotonic()
    leaving.driver.close()
    visitor.driver.switch_to.window(visitor.window)
    assert nothing_moves()
    print(f"a chain ended {time.monotonic() - start:.1f} s after its viewer left")


def ask(url: str, path: str, request: dict | None = None, method: str | None = None):
    data = None if request is None else json.dumps(request).encode()
    headers = {"content-type": "application/json"}
    return urllib.request.urlopen(urllib.request.Request(url + path, data, headers, method=method), timeout=10 * PATIENCE)


def function_of(url: str, button: str) -> int:
    """The number by which Gradio knows what a button begins."""
    config = json.load(ask(url, "config"))
    names = {one["id"]: one["props"].get("value") for one in config["components"] if one["type"] == "button"}
    return next(one["id"] for one in config["dependencies"] if any(names.get(target) == button for target, _ in one["targets"]))


def test_twenty_at_once_queue(page):
    number, most = function_of(page.local_url, "Draw"), []

    def draw(visit: int) -> str:
        session = f"session{visit}"
        ask(page.local_url, "gradio_api/queue/join", {"data": [visit % 10, 2], "fn_index": number, "session_hash": session})
        last = ""
        for line in ask(page.local_url, f"gradio_api/queue/data?session_hash={session}"):
            most.append(moving())
            if b"process_completed" in line:
                last = line.decode()
                break
        return last

    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(draw, range(20)))
    assert all('"success":true' in answer for answer in answers)
    assert 1 <= max(most) <= 2


def test_the_server_serves_the_page_and_no_more(page, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("secret")
    for path in (f"gradio_api/file={secret}", f"file={secret}", f"gradio_api/file/{secret}", "gradio_api/info", "monitoring"):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            ask(page.local_url, path)
    with pytest.raises(urllib.error.HTTPError, match="404"):
        ask(page.local_url, "gradio_api/upload", {})
    number = function_of(page.local_url, "Restore")
    named = {"path": str(secret), "meta": {"_type": "gradio.FileData"}}
    for value in (named, [named], {"url": "http://127.0.0.1/"}):
        with pytest.raises(urllib.error.HTTPError, match="400"):
            ask(page.local_url, "gradio_api/queue/join", {"data": [None, value], "fn_index": number, "session_hash": "s"})


def test_no_visitor_has_written_to_the_disk(page):
    """All of the above has happened by now."""
    assert not [path for path in page.written.rglob("*") if path.is_file()]


def test_a_space_runs(page, tmp_path):
    write_space(page.exhibit.jem, tmp_path / "space", title="A Space", app=demo.__file__)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        environment |= {"GRADIO_SERVER_PORT": str(free.getsockname()[1])}
    command = [sys.executable, "app.py"]
    with subprocess.Popen(command, cwd=tmp_path / "space", env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            said = []
            for line in process.stdout:
                said.append(line)
                if "Running on" in line:
                    break
            assert "What this model believes" in ask(line.split()[-1] + "/", "config").read().decode(), said
        finally:
            process.terminate()
