"""The page in headless Chromium: played with keys and a mouse, formats switched, split, recorded, replayed."""

import time

import numpy as np
import pytest
from chromium import wait_for

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed (extra [pages])")

from harness.config import ROOT  # noqa: E402

COUNT_MOVES = """
    window.moved = 0;
    const socket = game.link.socket, hear = socket.onmessage;
    socket.onmessage = event => {
      if (typeof event.data !== "string") moved += Math.abs(unpackFrame(event.data).mouse[0]);
      hear(event);
    };
"""
"""Adds up how far frames say that the mouse was moved."""


@pytest.fixture
def open_game(make_game, browser, listen):
    def opened(**fields):
        served = listen(make_game(port=0, fps=35.0, **fields))
        browser.get(f"http://127.0.0.1:{served.port}/")
        wait_for(browser, "return game.drawn > 0 && game.state !== null")
        return served

    yield opened
    errors = [entry["message"] for entry in browser.get_log("browser")]
    browser.get("about:blank")
    assert errors == []


def actions(driver):
    return webdriver.ActionChains(driver)


def tap(driver, key):
    actions(driver).send_keys(key).perform()


def test_a_game_is_played_with_keys_and_mouse_switched_split_recorded_and_replayed(open_game, browser):
    served = open_game()
    assert served.game.pool.used == 1
    browser.find_element("id", "begin").click()
    wait_for(browser, "return game.state.playing")
    tap(browser, "c")
    wait_for(browser, "return game.state.recording")
    actions(browser).key_down("w").perform()
    wait_for(browser, "return game.last.buttons.includes('W')")
    assert "down" in browser.find_element("id", "key-W").get_attribute("class")
    actions(browser).key_up("w").perform()
    wait_for(browser, "return !game.last.buttons.includes('W')")
    browser.execute_script(COUNT_MOVES)
    actions(browser).move_to_element_with_offset(browser.find_element("id", "stage"), 60, 20).perform()
    actions(browser).move_by_offset(40, 5).perform()
    wait_for(browser, "return moved > 0")
    actions(browser).click_and_hold().perform()
    wait_for(browser, "return game.last.buttons.includes('LMB')")
    actions(browser).release().perform()
    tap(browser, "1")
    wait_for(browser, "return game.state.arm === 'bf16' && game.last.arm === 'bf16'")
    tap(browser, "3")
    wait_for(browser, "return document.querySelectorAll('.pane').length === 2 && game.last.psnr")
    assert browser.find_element("id", "psnr").text.startswith("PSNR ")
    tap(browser, "4")
    wait_for(browser, "return document.querySelectorAll('.pane').length === 3")
    wait_for(browser, "return document.getElementById('p50').textContent.endsWith('ms')")
    assert float(browser.find_element("id", "fps").text) > 1
    tap(browser, "4")
    wait_for(browser, "return document.querySelectorAll('.pane').length === 1")
    tap(browser, "c")
    saved = wait_for(browser, "return document.querySelector('#notices [data-saved]')?.dataset.saved")
    tap(browser, "p")
    wait_for(browser, "return !game.state.playing && game.state.reason === 'player'")
    frame = browser.execute_script("return game.last.frame")
    tap(browser, "n")
    wait_for(browser, f"return game.last.frame === {frame + 1}")
    choose = "const clip = document.getElementById('clip'); clip.value = arguments[0]; clip.onchange()"
    browser.execute_script(choose, f"played/{saved}")
    browser.find_element("id", "replay").click()
    wait_for(browser, "return document.getElementById('notices').innerText.includes('bit for bit')")
    loaded = browser.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
    assert [name for name in loaded if not name.startswith(("blob:", "data:", "ws:"))] == []


def test_a_second_tab_too_many_is_told_and_can_connect_later(open_game, browser):
    open_game(max_sessions=1)
    first = browser.current_window_handle
    url = browser.current_url
    browser.switch_to.new_window("tab")
    browser.get(url)
    wait_for(browser, "return document.getElementById('why').textContent.includes('all 1 sessions are in use')")
    second = browser.current_window_handle
    browser.switch_to.window(first)
    browser.get("about:blank")
    browser.switch_to.window(second)
    time.sleep(1)
    browser.find_element("id", "begin").click()
    wait_for(browser, "return game.drawn > 0 && game.state !== null")
    browser.close()
    browser.switch_to.window(first)


def test_a_tab_that_is_hidden_pauses_and_plays_on_when_it_is_seen_again(open_game, browser):
    open_game()
    browser.find_element("id", "begin").click()
    wait_for(browser, "return game.state.playing")
    browser.execute_script(
        "window.seen = []; document.addEventListener('visibilitychange',"
        " () => seen.push([document.hidden, game.state.playing, game.last.frame]))"
    )
    first = browser.current_window_handle
    browser.switch_to.new_window("tab")  # in front of the game's, which the browser then hides
    time.sleep(2)  # 20 frames and more, were they made
    browser.close()
    browser.switch_to.window(first)
    (hidden, _, then), (shown, playing, now) = wait_for(browser, "return seen.length === 2 && seen")
    assert (hidden, shown, playing) == (True, False, False)
    assert now - then <= 5  # those on their way when the pause came
    wait_for(browser, f"return game.state.playing && game.last.frame > {now}")


@pytest.mark.parametrize("width", [390, 1400])
def test_the_page_fits_phone_and_desktop(open_game, browser, width):
    touch = width < 600
    metrics = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": touch}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": touch})
    try:
        open_game()
        assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
        assert browser.find_element("id", "touch").is_displayed() is touch
        if touch:
            browser.find_element("id", "begin").click()
            wait_for(browser, "return game.state.playing")
            browser.execute_script("document.getElementById('stick').scrollIntoView({block: 'center'})")
            stick = browser.find_element("id", "stick")
            pointer = actions(browser)
            pointer.move_to_element_with_offset(stick, 0, -50).click_and_hold().perform()
            wait_for(browser, "return game.last.buttons.includes('W')")
            pointer.release().perform()
            wait_for(browser, "return !game.last.buttons.includes('W')")
        else:
            tap(browser, "p")
            wait_for(browser, "return game.state.playing")
        tap(browser, "c")
        wait_for(browser, "return game.state.recording && game.state.playing && game.last.recorded > 2")
        tap(browser, "c")
        wait_for(browser, "return document.querySelector('#notices [data-saved]')")
        # The command that judges what was saved is a line longer than a phone is wide.
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        browser.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": False})


def shift_right(before, after):
    """By how many pixels ``after`` is ``before`` moved to the right: the best match of luma over the middle rows."""
    one, two = (np.asarray(picture, dtype=np.float32).mean(2)[16:80] for picture in (before, after))
    span = range(-32, 33)
    errors = [np.mean((one[:, max(0, -s) : 128 - max(0, s)] - two[:, max(0, s) : 128 - max(0, -s)]) ** 2) for s in span]
    return span[int(np.argmin(errors))]


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / "assets/doom/dit.safetensors").is_file(), reason="the demo model is not here")
def test_turning_left_moves_the_demos_picture_right():
    from harness.session import Action, open_session

    with open_session("model=doom") as session:
        for clip in ("my_way_home_1000001_motion", "defend_the_center_1000008_motion"):
            seen = session.reset(clip)
            left = [session.step(Action((), (-2.0, 0.0))) for _ in range(6)][-1]
            session.reset(clip)
            right = [session.step(Action((), (2.0, 0.0))) for _ in range(6)][-1]
            assert shift_right(seen, left) > 2
            assert shift_right(seen, right) < -2
