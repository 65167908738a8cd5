"""The page in a browser: what a reader sees and does, by mouse and by keys alone."""

import pytest

from qpass.inspect.page import write
from tests.browser import opened, until, violations
from tests.page_documents import document

ROOM = "model.layers.0.mlp.up_proj:linear.0"
MODES = [("sqnr", "dB worst"), ("loss", "most"), ("time", "ms most"), ("type", "left in float")]


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "page.html"
    write(document(3), path)
    page = opened(path)
    page.wait_for_selector(".box")
    return page


@pytest.fixture
def page(shown):
    """The one page, with its modules closed."""
    shown.click("#collapse")
    until(shown, "!document.querySelector('.open') && document.getElementById('busy').hidden")
    yield shown
    assert not shown.troubles
    shown.keyboard.press("Escape")
    shown.fill("#search", "")
    shown.evaluate("document.activeElement.blur()")
    shown.keyboard.press("1")


def deeper(page, times=3):
    for n in range(times):
        page.click("#deeper")
        until(page, f"document.querySelectorAll('.open').length > {n}")


def find(page, words):
    page.fill("#search", words)
    page.keyboard.press("Enter")


def texts(page, selector):
    return page.locator(selector).all_inner_texts()


def box(page, words):
    """Boxes whose spoken name has these words."""
    return page.locator(f'#canvas [data-key][aria-label*="{words}"]')


def column(page, n):
    return texts(page, f"#view-sites tbody tr[data-at] > :nth-child({n})")


def test_the_summary_is_on_top(page):
    cards = texts(page, ".card")
    assert page.title() == "LlamaForCausalLM w8a8 - qpass report"
    assert page.inner_text("h1") == "LlamaForCausalLM"
    assert "86.4%" in cards[0]
    assert "0.0123" in cards[3]
    assert "16.2 ms" in cards[4]
    assert "2.58 × as fast" in cards[4]


def test_modules_open_and_close(page):
    deeper(page)
    closed = box(page, "module model.layers.0.self_attn,")
    assert closed.get_attribute("aria-expanded") == "false"
    closed.click()
    page.wait_for_selector('[data-key="mmodel.layers.0.self_attn"][aria-expanded="true"]')
    box(page, "of model.layers.0.self_attn.q_proj:linear.0").wait_for()
    page.locator('[data-key="mmodel.layers.0.self_attn"] .head').click()
    page.wait_for_selector('[data-key="mmodel.layers.0.self_attn"][aria-expanded="false"]')


def test_depth_buttons(page):
    assert box(page, "module model,").count() == 1
    page.click("#deeper")
    page.wait_for_selector('[data-key="mmodel"][aria-expanded="true"]')
    page.click("#expand")
    until(
        page,
        "document.querySelectorAll('.open').length > 2 && !document.querySelector('#canvas [aria-expanded=false]')",
    )


def test_a_node_opens_its_details(page):
    find(page, ROOM)
    page.wait_for_selector("#details:not([hidden])")
    assert page.inner_text("#details h2") == ROOM
    assert "range is too wide" in page.inner_text(".callout.why")
    find(page, "layers.0.self_attn.q_proj:linear")
    until(page, "document.querySelector('#details h2').textContent.includes('q_proj')")
    page.keyboard.press("Escape")
    assert page.locator("#details").is_hidden()
    box(page, "of model.layers.0.self_attn.q_proj:linear.0").click()
    heads = texts(page, "#details h3")
    assert heads[:4] == ["Error", "Input", "Weight", "Output, float against quantized"]
    assert {"Source", "Rules"} <= set(heads)
    assert page.locator("#details .chart").count() == 4
    assert page.locator("#details .chart .grid").count() == 1
    assert "integers reach from" in page.locator("#details .chart").first.get_attribute("aria-label")
    assert "modeling_llama.py:240" in page.inner_text("#details")
    assert "linear has 2 users" in page.inner_text("#details .rules")


def test_levels_switch(page):
    counts = {}
    for level, op in (("0", "aten.linear"), ("3", "qpass.linear"), ("4", "qpass.linear_w8a8")):
        page.select_option("#level", level)
        page.fill("#search", op)
        counts[level] = page.locator("#found li[data-at]").count()
        page.keyboard.press("Enter")
        box(page, f"{op} of").first.wait_for()
    assert counts == {"0": 22, "3": 19, "4": 19}


@pytest.mark.parametrize(
    ("mode", "legend"), [("sqnr", "dB worst"), ("loss", "most"), ("time", "ms most"), ("type", "left in float")]
)
def test_colours_have_a_legend(page, mode, legend):
    page.select_option("#colour", mode)
    assert legend in page.inner_text("#legend")
    fills = page.evaluate("[...document.querySelectorAll('.box .body')].filter((r) => r.style.fill).length")
    assert (fills > 0) == (mode != "type")


def test_the_table_sorts_and_filters(page):
    page.keyboard.press("2")
    head = page.locator("#view-sites thead th").nth(3)
    head.locator("button").click()
    assert head.get_attribute("aria-sort") == "ascending"
    up = [float(text) for text in column(page, 4) if text != "–"]
    assert up == sorted(up)
    head.locator("button").click()
    assert head.get_attribute("aria-sort") == "descending"
    down = column(page, 4)
    assert [float(text) for text in down if text != "–"] == sorted(up, reverse=True)[
        : len([t for t in down if t != "–"])
    ]
    page.fill("#filter", "too wide")
    assert {row.split("\t")[0] for row in column(page, 1)} == {
        f"model.layers.{i}.mlp.up_proj:linear.0" for i in range(3)
    }
    assert page.inner_text("#shown") == "3 of 22 sites"
    page.fill("#filter", "")


def test_two_levels_side_by_side(page):
    page.keyboard.press("3")
    assert page.inner_text("#before-head").startswith("float")
    assert page.inner_text("#counted") == "19 changed, 0 added, 0 removed"
    page.select_option("#after", "2")
    assert page.inner_text("#counted") == "0 changed, 57 added, 0 removed"
    page.check("#changes")
    marks = page.locator("#view-compare tbody tr[data-at]").evaluate_all(
        "rows => [...new Set(rows.map((r) => r.className))]"
    )
    assert marks == ["added"]
    page.select_option("#after", "4")
    row = page.locator("#view-compare tr.changed").first
    before, after = row.locator("td.code").all_inner_texts()
    assert "aten.linear" in before
    assert "qpass.linear_w8a8" in after
    row.click()
    assert "self_attn.q_proj" in page.inner_text("#details h2")
    page.uncheck("#changes")


def test_keys_alone(page):
    """Search, open, walk, close, sort and read, without a mouse."""
    page.keyboard.press("/")
    page.keyboard.type("layers.1.mlp")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    page.wait_for_selector("#details:not([hidden])")
    page.keyboard.press("Escape")
    assert page.locator("#details").is_hidden()
    page.focus("#canvas")
    page.keyboard.press("0")
    first = page.get_attribute("#canvas", "aria-activedescendant")
    page.keyboard.press("ArrowDown")
    until(page, f"document.querySelector('#canvas').getAttribute('aria-activedescendant') !== {first!r}")
    assert page.inner_text("#said")
    open_before = page.locator(".open").count()
    page.keyboard.press("Backspace")
    until(page, f"document.querySelectorAll('.open').length < {open_before}")
    page.keyboard.press("2")
    page.locator("#view-sites thead button").nth(5).press("Enter")
    page.locator("#view-sites tbody tr[tabindex='0']").focus()
    for key in ("ArrowDown", "End", "Home", "ArrowDown"):
        page.keyboard.press(key)
    name = page.evaluate("document.activeElement.firstChild.textContent")
    page.keyboard.press("Enter")
    assert page.inner_text("#details h2") == name
    page.keyboard.press("Escape")
    page.keyboard.press("?")
    assert page.locator("#keys").is_visible()


def test_light_and_dark(page):
    ground = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(ground)
    page.emulate_media(color_scheme="dark")
    until(page, "document.documentElement.dataset.theme === 'dark'")
    dark = page.evaluate(ground)
    page.keyboard.press("t")
    assert page.evaluate(ground) == light != dark
    page.emulate_media(color_scheme="light")
    page.keyboard.press("t")
    assert page.evaluate(ground) == dark
    page.keyboard.press("t")


@pytest.mark.parametrize("view", ["1", "2", "3"])
def test_axe_finds_nothing(page, view):
    """With the details open; in the dark, the contrasts."""
    find(page, "layers.0.self_attn.q_proj:linear")
    page.wait_for_selector("#details:not([hidden])")
    page.keyboard.press(view)
    light = violations(page)
    page.keyboard.press("t")
    dark = violations(page, ["color-contrast"])
    page.keyboard.press("t")
    assert (light, dark) == ([], [])
