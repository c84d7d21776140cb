"""The page in a real browser, from disk: no request, no complaint; sorted and filtered, by keyboard, light and dark."""

import json

import pytest
from made_up_run import add_evaluation, add_generated, make_run, receipt_rows

from vlmdist.report.page import write_report

HOSTILE = '</script><script>window.hurt = 1</script><img src=http://127.0.0.1:9/ onerror="window.hurt = 2">\x00\x1b'
IDS = "[...document.querySelectorAll('.card h3')].map((title) => title.textContent)"
TOLD = "document.querySelector('output').textContent"
FOCUSED = "document.activeElement.querySelector('h3').textContent"
# Tag and class of elements with text whose contrast is below 4.5 (https://www.w3.org/TR/WCAG22/#contrast-minimum)
FAINT = r"""(() => {
  const parse = (colour) => { const m = colour.match(/[\d.]+/g).map(Number); return m.length === 3 ? [...m, 1] : m; };
  const linear = (v) => (v / 255 <= 0.04045 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4);
  const luminance = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const parents = (e) => (e ? [e, ...parents(e.parentElement)] : []);
  const ground = (e) => parents(e).map((p) => parse(getComputedStyle(p).backgroundColor)).find((c) => c[3] === 1);
  const isText = (e) => [...e.childNodes].some((n) => n.nodeType === Node.TEXT_NODE && n.textContent.trim());
  const contrast = (e) => {
    const back = ground(e), share = parents(e).reduce((o, p) => o * getComputedStyle(p).opacity, 1);
    const text = parse(getComputedStyle(e).color).map((v, i) => v * share + back[i] * (1 - share));
    const [x, y] = [luminance(text), luminance(back)].sort((a, b) => b - a);
    return (x + 0.05) / (y + 0.05);
  };
  const all = [...document.querySelectorAll("main *, footer")];
  const seen = all.filter((e) => e.offsetParent && !e.disabled && !e.closest("svg, script") && isText(e));
  return [...new Set(seen.filter((e) => contrast(e) < 4.5).map((e) => e.tagName + "." + e.className))];
})()"""


def open_page(browser, *runs):
    file = write_report(runs)
    browser.emulate()
    browser.open(file)
    browser.wait_for(
        "performance.getEntriesByName('answers shown').length === document.querySelectorAll('.gallery').length"
    )
    return file


def choose(browser, control, value):
    chosen = f"document.querySelector('select.{control}')"
    browser.ask(f"{chosen}.value = {json.dumps(value)}; {chosen}.dispatchEvent(new Event('change'))")


def refuse_complaints(browser, file):
    assert browser.requests == [file.as_uri()]
    assert browser.complaints == []


@pytest.fixture
def receipts(tmp_path):
    """Of 30 samples every third has a wrong total; one failed, one is empty, one cut off, one lacks its company."""
    run = make_run(tmp_path / "run")
    rows = receipt_rows(30)
    rows[1] |= {"prediction": "", "error": "the image is broken"}
    rows[2]["prediction"] = " "
    rows[4]["prediction"] = '{"company": "Shop 4'
    rows[5]["prediction"] = '{"total": "5.50"}'
    add_evaluation(run, "base", [{**row, "prediction": row["truth"] if i == 0 else "-"} for i, row in enumerate(rows)])
    add_evaluation(run, "step-000060", rows)
    return run


def test_what_models_wrote_is_inert(tmp_path, browser):
    run = make_run(tmp_path / "run")
    rows = [{**row, "prediction": HOSTILE} for row in receipt_rows(30)]
    rows[8] |= {"prediction": "A" * 1_000_000, "id": HOSTILE}
    rows[9]["prediction"] = json.dumps({HOSTILE: HOSTILE, "total": HOSTILE})
    rows[10] |= {"truth": json.dumps({HOSTILE: HOSTILE}), "error": HOSTILE}
    add_evaluation(run, "base", rows)
    add_evaluation(run, "step-000060", rows)
    file = open_page(browser, run)
    browser.ask("document.querySelectorAll('details').forEach((details) => { details.open = true; })")
    assert browser.ask("document.querySelectorAll('.card').length") == 20
    assert browser.ask("window.hurt === undefined && document.images.length === 0")
    assert browser.ask("[...document.scripts].filter((s) => s.type === '' || s.src).length") == 1
    browser.ask("document.querySelector('button.on').click()")
    browser.ask("document.querySelectorAll('details').forEach((details) => { details.open = true; })")
    assert browser.ask("window.hurt === undefined && document.images.length === 0")
    assert "onerror" in browser.ask("document.querySelector('.gallery').textContent"), "shown, not dropped"
    refuse_complaints(browser, file)


def test_samples_are_sorted_and_filtered(receipts, browser):
    file = open_page(browser, receipts)
    assert browser.ask("document.querySelectorAll('.card').length") == 20
    assert browser.ask(TOLD) == "1–20 of 30"
    assert browser.ask(IDS)[:3] == ["R00001", "R00002", "R00004"]
    browser.ask("document.querySelector('button.on').click()")
    assert browser.ask(TOLD) == "21–30 of 30"
    assert browser.ask("document.querySelector('button.on').disabled")

    kinds = browser.ask("[...document.querySelector('select.kind').options].map((o) => o.textContent)")
    assert kinds[2:] == [
        "failed (1)",
        "empty (1)",
        "cut off (1)",
        "missing field (1)",
        "wrong field (10)",
        "right (16)",
        "better than before",
        "worse than before",
    ]
    for kind, ids in [("failed", [1]), ("empty", [2]), ("cut off", [4]), ("missing field", [5]), ("worse", [0])]:
        choose(browser, "kind", kind)
        assert browser.ask(IDS) == [f"R{i:05d}" for i in ids], kind
        assert browser.ask(TOLD) == "1–1 of 1 (of 30)"
    choose(browser, "kind", "mistakes")
    choose(browser, "field", "company")
    assert browser.ask(IDS) == ["R00001", "R00002", "R00004", "R00005"]
    choose(browser, "kind", "wrong field")
    assert browser.ask(IDS) == []
    assert browser.ask(TOLD) == "0 (of 30)"
    assert "No sample fits" in browser.ask("document.querySelector('.cards').textContent")

    choose(browser, "kind", "")
    choose(browser, "field", "")
    choose(browser, "sort", "-score")
    assert browser.ask(f"{IDS}[0]") == "R00007"
    choose(browser, "sort", "change")
    assert browser.ask(f"{IDS}[0]") == "R00000"
    choose(browser, "sort", "place")
    assert browser.ask(f"{IDS}[0]") == "R00000"

    browser.ask("document.querySelector('input[type=search]').focus()")
    browser.type("SHOP 17")
    browser.wait_for(f"{TOLD} === '1–1 of 1 (of 30)'")
    assert browser.ask(IDS) == ["R00017"]
    refuse_complaints(browser, file)


def test_the_keyboard_is_enough(receipts, browser):
    file = open_page(browser, receipts)
    browser.press("Tab")
    assert browser.ask("document.activeElement.textContent") == "Skip to the content"
    assert browser.ask("document.activeElement.getBoundingClientRect().left >= 0"), "seen while it has the focus"

    browser.ask("document.querySelector('.plot').focus()")
    browser.press("Home")
    browser.press("ArrowRight")
    reading = browser.ask("document.querySelector('.plot .reading').innerText")
    assert reading.startswith("step 2\n")
    assert "training loss" in reading

    browser.ask("document.querySelector('.controls button.on').focus()")
    browser.press("Tab")
    assert browser.ask(FOCUSED) == "R00001"
    outline = browser.ask("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    browser.press("ArrowDown")
    assert browser.ask(FOCUSED) == "R00002"
    browser.press("End")
    last = browser.ask(FOCUSED)
    browser.press("ArrowDown")
    assert browser.ask(TOLD) == "21–30 of 30"
    browser.press("ArrowUp")
    assert browser.ask(FOCUSED) == last
    browser.press("ArrowRight")
    assert browser.ask(TOLD) == "21–30 of 30"

    browser.ask("document.querySelector('table.sortable thead th:last-child button').focus()")
    order = "[...document.querySelectorAll('tbody.sorted th')].map((cell) => cell.firstChild.textContent.trim())"
    sort = "document.querySelector('table.sortable thead th:last-child').getAttribute('aria-sort')"
    browser.press("Enter")
    assert (browser.ask(sort), browser.ask(order)) == ("ascending", ["total", "company"])
    browser.press("Enter")
    assert (browser.ask(sort), browser.ask(order)) == ("descending", ["company", "total"])
    refuse_complaints(browser, file)


def test_light_dark_a_phone_and_paper(receipts, browser):
    open_page(browser, receipts)
    colours = "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
    light = browser.ask(colours)
    browser.emulate(dark=True)
    dark = browser.ask(colours)
    assert [sum(_rgb(c)) > 380 for c in (*light, *dark)] == [True, False, False, True]
    for is_dark in (False, True):
        browser.emulate(dark=is_dark)
        browser.ask("document.querySelectorAll('details').forEach((details) => { details.open = true; })")
        assert browser.ask(FAINT) == [], "text of less contrast than WCAG 2.2 AA asks for"
    browser.emulate(360, 740)
    assert browser.ask("document.documentElement.scrollWidth") <= 360
    browser.emulate(media="print")
    assert browser.ask("getComputedStyle(document.querySelector('.controls')).display") == "none"


def test_pages_of_several_runs_and_of_one_that_has_only_begun(tmp_path, receipts, browser):
    begun = make_run(tmp_path / "begun", steps=0)
    (begun / "environment.json").unlink()
    long = make_run(tmp_path / ("a-very-long-name-without-a-space" * 7))
    for i in range(10):
        add_evaluation(long, f"step-{i:06d}-of-a-very-long-name", receipt_rows(6))
    generated = make_run(tmp_path / "generated")
    add_generated(generated, 60, [{"id": "a", "truth": "milk##milk##-", "prediction": "milk"}])
    for runs in ([receipts, begun, long, generated], [begun], [long], [generated]):
        file = open_page(browser, *runs)
        browser.emulate(360, 740)
        assert browser.ask("document.documentElement.scrollWidth") <= 360, runs
        refuse_complaints(browser, file)


@pytest.mark.slow
def test_every_one_of_ten_thousand_samples_can_be_reached(tmp_path, browser):
    run = make_run(tmp_path / "run")
    rows = receipt_rows(10_000)
    add_evaluation(run, "base", [{**row, "prediction": "no " * 100} for row in rows])
    add_evaluation(run, "step-000060", rows)
    file = open_page(browser, run)
    assert file.stat().st_size < 30_000_000
    turn = "while (!next.disabled) { next.click(); add(); }"
    add = f"const add = () => {IDS}.forEach((id) => seen.add(id));"
    seen = browser.ask(
        f"(() => {{ const seen = new Set(), next = document.querySelector('button.on'); {add} add(); {turn} "
        "return seen.size; })()"
    )
    assert seen == 10_000
    refuse_complaints(browser, file)


def _rgb(colour):
    return [int(part) for part in colour.removeprefix("rgb(").removesuffix(")").split(",")]
