"""The pages in headless Chromium: no errors, curves drawn, read-outs, sorting, players in step."""

from dataclasses import replace

import pytest
from chromium import wait_for
from report_cases import FRAMES, NASTY, clip, record, write

from harness.report.gates import GatesConf, evaluate
from harness.report.page.compare_page import write_compare_page
from harness.report.page.run_page import run_page, write_run_page
from harness.report.sweep import write_sweep_page

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed (extra [pages])")

PHONE = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = write(tmp_path_factory.mktemp("run"), record(notes=[NASTY], emulated=True), videos=True)
    write_run_page(folder)
    return folder


def open_page(driver, folder):
    driver.get((folder / "report.html").as_uri())
    assert [entry["message"] for entry in driver.get_log("browser")] == []


def positions(driver):
    return driver.execute_script("return [...document.querySelectorAll('video')].map(v => v.currentTime)")


def videos_ready(driver):
    ready = "return [...document.querySelectorAll('video')].every(v => v.readyState >= 3)"
    wait_for(driver, ready)


def test_a_runs_page_loads_without_errors_or_network(browser, run_folder):
    open_page(browser, run_folder)
    videos_ready(browser)
    loaded = browser.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
    assert [name for name in loaded if not name.startswith(("blob:", "data:"))] == []
    assert browser.execute_script("return window.hacked") is None
    text = browser.execute_script("return document.body.innerText")
    for words in ("No gate was asked for", "not measured", "its speed says nothing about MX", "mxfp8_all", NASTY):
        assert words in text
    assert browser.get_log("browser") == []


def test_curves_are_drawn_inside_their_charts(browser, run_folder):
    open_page(browser, run_folder)
    boxes = browser.execute_script("""
        return [...document.querySelectorAll('figure.lines')].map(figure => {
          const svg = figure.querySelector('svg').getBoundingClientRect();
          const lines = [...figure.querySelectorAll('path.line')].map(path => path.getBoundingClientRect());
          return lines.map(b => b.width > svg.width / 2 && b.top >= svg.top && b.bottom <= svg.bottom);
        })""")
    assert [len(lines) for lines in boxes] == [2, 2, 1, 1] * 2, "a tag of one clip has no lines of single clips"
    assert all(inside for lines in boxes for inside in lines)
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth"), "no sideways scrolling"


def test_a_chart_reads_out_every_arm_under_the_pointer(browser, run_folder):
    open_page(browser, run_folder)
    chart = browser.find_element("css selector", "figure.lines svg")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", chart)
    webdriver.ActionChains(browser).move_to_element_with_offset(chart, -200, 0).perform()
    read_out = browser.find_element("id", "tip")
    assert read_out.is_displayed()
    lines = read_out.text.splitlines()
    frame = int(lines[0].removeprefix("frame "))
    assert lines[1:] == [f"BF16 {25 - frame} dB", f"mxfp8_all {24.5 - frame} dB", "drop 0.5 dB"]


def all_clips(driver):
    driver.execute_script("document.getElementById('every').open = true")


def press(driver, name):
    """A click that waits for no smooth scrolling."""
    driver.execute_script("document.getElementById(arguments[0]).click()", name)


def choose(driver, name, value):
    driver.execute_script(
        "const s = document.getElementById(arguments[0]); s.value = arguments[1]; s.dispatchEvent(new Event('change'))",
        name,
        value,
    )


def pixel(driver, share):
    """Red of the stage's picture at ``share`` of its width, halfway down."""
    return driver.execute_script(
        """const shown = document.getElementById('canvas');
        const c = Object.assign(document.createElement('canvas'), { width: 1, height: 1 });
        const copy = c.getContext('2d', { willReadFrequently: true });
        copy.drawImage(shown, -Math.floor(arguments[0] * shown.width), -(shown.height >> 1));
        return copy.getImageData(0, 0, 1, 1).data[0]""",
        share,
    )


def test_a_phone_shows_the_page_without_sideways_scrolling(browser, run_folder):
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", PHONE)
    try:
        open_page(browser, run_folder)
        videos_ready(browser)
        assert browser.execute_script("return document.documentElement.scrollWidth") == 390
        outside = """return [...document.querySelectorAll('button, select, input, #stage')]
          .filter(e => { const b = e.getBoundingClientRect(); return b.left < 0 || b.right > 390; }).map(e => e.id)"""
        assert browser.execute_script(outside) == [], "every control within the screen"
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_a_phone_shows_no_line_for_an_interval_that_a_gate_has_not(browser, tmp_path):
    judged = record()
    judged.gates = evaluate(judged, GatesConf(enabled=True, max_psnr_drop=1.0, min_clips=2))
    write_run_page(write(tmp_path, judged))
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", PHONE)
    try:
        open_page(browser, tmp_path)
        found = browser.execute_script("""return [...document.querySelectorAll('.checks [data-label=interval]')]
          .map(cell => [cell.textContent, cell.offsetParent !== null])""")
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert {seen for text, seen in found if "…" in text} == {True}
    assert {seen for text, seen in found if "…" not in text} == {False}


def test_a_run_of_one_arm_has_nothing_to_swipe_between(browser, tmp_path):
    walk = clip("walk", "motion", one_arm=True) | {"scores": {}}
    folder = write(tmp_path, record(candidate=None, quality=None, clips=[walk]), videos=True)
    write_run_page(folder)
    open_page(browser, folder)
    videos_ready(browser)
    wait_for(browser, "return document.getElementById('canvas').width !== 480")
    seen = (
        "return [...document.querySelectorAll('.stage-bar label, .divider, #stage .tag')].filter(e => e.offsetParent)"
    )
    assert browser.execute_script(seen + ".map(e => e.innerText.trim().split(/\\s/)[0])") == ["Clip", "BF16"]
    assert "Drag across" not in browser.execute_script("return document.getElementById('videos').innerText")
    assert browser.execute_script("return document.querySelector('#videos h2').innerText") == "Clips"
    assert "candidate" not in browser.execute_script("return document.getElementById('quality').textContent")


# How many names of points are drawn, and which of them touch another name or any point; a line of text is taller than
# its letters by a third.
NAMES = """
const drawn = [...document.querySelectorAll('figure.scatter')].map(figure => {
  const shown = query => [...figure.querySelectorAll(query)].filter(node => node.getBoundingClientRect().width);
  const boxes = (query, spare) => shown(query).map(node => {
    const { left, right, top, bottom } = node.getBoundingClientRect();
    const room = spare * (bottom - top);
    return { text: node.textContent, left, right, top: top + room, bottom: bottom - room };
  });
  const [names, dots] = [boxes('.name', 1 / 6), boxes('.dot', 0)];
  const touch = (a, b) => a !== b && a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom;
  return { count: names.length, touching: names.filter(name => [...names, ...dots].some(other => touch(name, other))) };
});
return [drawn.map(plot => plot.count), drawn.flatMap(plot => plot.touching.map(name => name.text))];
"""


def test_names_of_a_sweeps_points_touch_no_other_name_or_point(browser, tmp_path):
    for number, name in enumerate(("mxfp4_mlp + mx_v_only", "mxfp4_mlp", "mxfp8_all", "mxfp8_all + mx_v_only")):
        write(tmp_path / f"{number}", record(candidate=name, factor=1 / (0.8 + 0.03 * number)))
    write_sweep_page(tmp_path)
    for screen in (PHONE | {"width": 1400, "mobile": False}, PHONE):
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        try:
            open_page(browser, tmp_path)
            counts, touching = browser.execute_script(NAMES)
            assert touching == []
            assert all(count >= 3 for count in counts), "names are drawn at all"
            sideways = browser.execute_script("return document.documentElement.scrollWidth > innerWidth")
            assert not sideways
            wide = "return [...document.querySelectorAll('.scatter svg')].map(e => e.getBoundingClientRect().right)"
            assert 0 < max(browser.execute_script(wide)) <= screen["width"], "a plot is no wider than the screen"
        finally:
            browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_a_swipe_moves_the_border_between_the_arms(browser, run_folder):
    open_page(browser, run_folder)
    videos_ready(browser)
    stage = browser.find_element("id", "stage")
    wait_for(browser, "return document.querySelector('#stage .right').textContent.startsWith('mxfp8_all')")
    wait_for(browser, "return document.getElementById('canvas').width !== 480")
    bf16, candidate = pixel(browser, 0.1), pixel(browser, 0.9)
    assert candidate - bf16 == pytest.approx(10, abs=3), "left BF16, right the candidate, brighter by 10"
    browser.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", stage)
    width = stage.size["width"]
    webdriver.ActionChains(browser).move_to_element(stage).click_and_hold().move_by_offset(
        int(0.3 * width), 0
    ).release().perform()
    assert int(stage.get_attribute("aria-valuenow")) == pytest.approx(80, abs=2)
    assert pixel(browser, 0.7) == pytest.approx(bf16, abs=3)
    assert pixel(browser, 0.9) == pytest.approx(candidate, abs=3)
    stage.send_keys(webdriver.Keys.ARROW_LEFT)
    assert int(stage.get_attribute("aria-valuenow")) == pytest.approx(78, abs=2)


def test_the_difference_is_eight_times_as_bright(browser, run_folder):
    open_page(browser, run_folder)
    videos_ready(browser)
    wait_for(browser, "return document.getElementById('canvas').width !== 480")
    apart = abs(pixel(browser, 0.9) - pixel(browser, 0.1))
    choose(browser, "mode", "difference")
    assert pixel(browser, 0.9) == pytest.approx(8 * apart, abs=16)
    assert browser.find_element("css selector", "#stage .right").text == "|BF16 − mxfp8_all| × 8"
    choose(browser, "left", "2")
    assert pixel(browser, 0.9) == 0, "the candidate against itself"
    choose(browser, "mode", "all")
    assert browser.execute_script("return document.getElementById('canvas').width") == 3 * 48 * 12 + 2 * 4


def test_playing_slows_down_and_stops_at_the_end_where_it_does_not_loop(browser, run_folder):
    open_page(browser, run_folder)
    videos_ready(browser)
    choose(browser, "rate", "0.1")
    press(browser, "play")
    wait_for(browser, "return document.querySelector('video').playbackRate === 0.1")
    assert browser.execute_script("return document.querySelectorAll('video')[1].paused"), "it is not on the stage"
    choose(browser, "rate", "2")
    assert browser.execute_script("return document.querySelector('video').playbackRate") == 2
    press(browser, "loop")
    wait_for(browser, "return document.getElementById('play').textContent.includes('Play')")
    wait_for(browser, f"return document.getElementById('clock').textContent === 'frame {FRAMES - 1} / {FRAMES - 1}'")


def test_another_clip_takes_the_stage(browser, run_folder):
    open_page(browser, run_folder)
    videos_ready(browser)
    browser.execute_script(
        "const s = document.getElementById('clip'); s.selectedIndex = 1; s.dispatchEvent(new Event('change'))"
    )
    press(browser, "play")
    wait_for(browser, "return !document.querySelectorAll('video')[1].paused")
    assert browser.execute_script("return document.querySelectorAll('video')[0].paused")


def test_players_start_stop_and_seek_together(browser, run_folder):
    open_page(browser, run_folder)
    videos_ready(browser)
    all_clips(browser)
    clock = browser.find_element("id", "clock")
    press(browser, "play")
    moving = "return [...document.querySelectorAll('video')].every(v => !v.paused && v.currentTime > 0.1)"
    wait_for(browser, moving)
    first, second = positions(browser)
    assert abs(first - second) < 0.15
    press(browser, "play")
    assert browser.execute_script("return [...document.querySelectorAll('video')].every(v => v.paused)")
    settled = "const t = [...document.querySelectorAll('video')].map(v => v.currentTime); return t[0] === t[1]"
    wait_for(browser, settled)
    browser.execute_script(
        "const s = document.getElementById('seek'); s.value = 0; s.dispatchEvent(new Event('input'))"
    )
    wait_for(browser, "return document.getElementById('clock').textContent.startsWith('frame 0 ')")
    for frame in (1, 2):
        press(browser, "ahead")
        wait_for(browser, f"return document.getElementById('clock').textContent.startsWith('frame {frame} ')")
    first, second = positions(browser)
    assert first == second == pytest.approx(0.25, abs=0.01), "the middle of frame 2 at ten frames a second"
    assert clock.text == f"frame 2 / {FRAMES - 1}"


def test_players_start_over_together_at_their_end(browser, run_folder):
    open_page(browser, run_folder)
    videos_ready(browser)
    all_clips(browser)
    for _ in range(FRAMES - 2):
        press(browser, "ahead")
    wait_for(browser, f"return document.getElementById('clock').textContent.startsWith('frame {FRAMES - 2} ')")
    press(browser, "play")
    again = "return [...document.querySelectorAll('video')].every(v => !v.paused && v.currentTime < 0.5)"
    wait_for(browser, again)
    first, second = positions(browser)
    assert abs(first - second) < 0.15


def test_a_click_in_a_curve_takes_the_videos_to_that_frame(browser, run_folder):
    open_page(browser, run_folder)
    videos_ready(browser)
    all_clips(browser)
    chart = browser.find_element("css selector", "figure.lines svg")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", chart)
    chart.click()
    wait_for(browser, "return /^frame [34] /.test(document.getElementById('clock').textContent)")
    first, second = positions(browser)
    assert first == second > 0.3


def test_videos_beside_the_page_play_too(browser, tmp_path):
    folder = write(tmp_path, record(), videos=True)
    (folder / "report.html").write_text(run_page(record(), folder, embed_limit=0))
    open_page(browser, folder)
    videos_ready(browser)
    press(browser, "ahead")
    wait_for(browser, "return document.getElementById('clock').textContent.startsWith('frame 1 ')")


def test_a_sweeps_page_sorts_and_tells_what_its_points_are(browser, tmp_path):
    for number, (name, factor) in enumerate((("slow", 2.0), ("quick", 0.5), ("middling", 0.8))):
        write(
            tmp_path / f"{number}_{name}",
            replace(record(candidate=name, factor=factor), clips=[clip("walk", "motion")]),
        )
    write_sweep_page(tmp_path)
    open_page(browser, tmp_path)
    head = next(head for head in browser.find_elements("css selector", "th") if head.text == "speed")
    names = "return [...document.querySelectorAll('tbody tr')].map(row => row.cells[0].innerText.trim())"
    assert browser.execute_script(names) == ["slow", "quick", "middling"]
    to_the_middle = "arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})"
    browser.execute_script(to_the_middle, head)
    head.click()
    assert browser.execute_script(names) == ["quick", "middling", "slow"]
    head.click()
    assert browser.execute_script(names) == ["slow", "middling", "quick"]
    dot = browser.find_element("css selector", "circle.dot")
    browser.execute_script(to_the_middle, dot)
    webdriver.ActionChains(browser).move_to_element(dot).perform()
    assert browser.find_element("id", "tip").text.startswith("slow\ndrop +0.500 dB, fidelity 41.50 dB\nspeed 0.50×")
    assert browser.get_log("browser") == []


def test_two_runs_swipe_between_their_candidates(browser, tmp_path):
    for name, candidate in (("a", "mxfp8_all"), ("b", "mxfp4_mlp")):
        write(tmp_path / name, record(candidate=candidate), videos=True)
    browser.get(write_compare_page(tmp_path / "a", tmp_path / "b").as_uri())
    videos_ready(browser)
    wait_for(browser, "return document.getElementById('canvas').width !== 480")
    tags = "return [...document.querySelectorAll('#stage .tag')].map(tag => tag.textContent.split('  ')[0])"
    assert browser.execute_script(tags) == ["mxfp8_all (A)", "mxfp4_mlp (B)"]
    press(browser, "play")
    wait_for(browser, "return [...document.querySelectorAll('.player')[0].children].slice(0, 2).every(v => !v.paused)")
    assert browser.get_log("browser") == []


def test_a_chart_is_exported_with_its_colours_and_figures(browser, run_folder):
    open_page(browser, run_folder)
    browser.execute_script("""
        window.saved = [];
        const make = URL.createObjectURL;
        URL.createObjectURL = (blob) => { blob.text().then(text => window.saved.push(text)); return make(blob); };
        for (const button of document.querySelectorAll('figure.lines')[0].querySelectorAll('.export')) {
          if (button.textContent !== 'copy') button.click();
        }""")
    wait_for(browser, "return window.saved.length === 2")
    drawing, figures = sorted(browser.execute_script("return window.saved"), key=lambda text: not text.startswith("<"))
    assert "stroke: rgb(" in drawing
    assert 'xmlns="http://www.w3.org/2000/svg"' in drawing
    assert figures.splitlines()[:2] == ['"","BF16","mxfp8_all","drop"', '"frame 0",25,24.5,0.5']


def test_a_sweeps_plot_is_exported_point_by_point(browser, tmp_path):
    write(tmp_path / "0", record(candidate="mxfp8_all", factor=0.5))
    write_sweep_page(tmp_path)
    open_page(browser, tmp_path)
    figures = browser.execute_script("return table(scatters[0].data)").splitlines()
    assert figures[0].startswith('"","DiT frames/s, × BF16')
    assert figures[1:] == ['"mxfp8_all",2,0.5', '"BF16",1,0']
    names = (
        "return [...document.querySelectorAll('figure.scatter')[0].querySelectorAll('.export')].map(e => e.textContent)"
    )
    assert browser.execute_script(names) == ["SVG", "CSV", "copy"]
