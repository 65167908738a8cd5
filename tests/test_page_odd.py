"""Pages of large, empty and hostile reports, in a browser."""

import pytest

from qpass.inspect.page import write
from tests.browser import SEARCH, opened, until, violations
from tests.page_documents import document, large, unmeasured

# Each would leave a mark if anything were read as markup.
HOSTILE = (
    "</script><script>window.hit=1</script>",
    "<img src=x onerror=window.hit=1>",
    '"><svg onload=window.hit=1>',
    "javascript:window.hit=1",
    "{{constructor.constructor('window.hit=1')()}}",
    "__proto__",
)


@pytest.fixture(scope="module")
def page_of(tmp_path_factory):
    def make(made):
        path = tmp_path_factory.mktemp("page") / "page.html"
        write(made, path)
        return opened(path)

    return make


def test_ten_thousand_nodes(page_of):
    """Nothing that a reader does keeps the page from answering for long."""
    page = page_of(large())
    page.wait_for_selector(".box")
    page.evaluate("""
      window.longest = 0; let last = performance.now();
      setInterval(() => { const now = performance.now(); longest = Math.max(longest, now - last); last = now; }, 5)
    """)
    assert page.evaluate("document.querySelectorAll('#canvas [data-key]').length") < 200
    took = page.evaluate(SEARCH, ["down_proj", "layers.17", "aten.add", "e"])
    page.fill("#search", "")
    page.click("#expand")
    until(page, "document.querySelector('.open') && document.getElementById('busy').hidden")
    assert page.evaluate("document.querySelectorAll('#canvas *').length") < 8000  # only what is in sight
    page.focus("#canvas")
    for key in ("+", "+", "+", "Shift+ArrowDown", "Shift+ArrowRight", "-", "ArrowDown"):
        page.keyboard.press(key)
    page.fill("#search", "layers.31.mlp.down_proj:linear")
    page.keyboard.press("Enter")
    until(page, "document.querySelector('#canvas').getAttribute('aria-activedescendant')")
    assert page.inner_text("#details h2") == "model.layers.31.mlp.down_proj:linear.0"
    page.keyboard.press("3")
    assert page.inner_text("#counted") == "193 changed, 0 added, 0 removed"
    assert page.locator("#view-compare tbody tr[data-at]").count() < 80
    page.keyboard.press("n")
    page.keyboard.press("2")
    page.click("#view-sites thead th:nth-child(4) button")
    assert page.locator("#view-sites tbody tr[data-at]").count() < 80
    assert not page.troubles
    assert sorted(took)[1] < 200, took
    assert page.evaluate("longest") < 3000  # of a machine that other tests share; seconds alone are in the benchmark
    page.context.close()


def test_nothing_measured_is_a_dash(page_of):
    page = page_of(unmeasured())
    page.wait_for_selector(".box")
    seen = page.inner_text("body")
    for colour in ("sqnr", "loss", "time"):
        page.select_option("#colour", colour)
        assert "Not measured" in page.inner_text("#legend")
    for view in ("2", "3"):
        page.keyboard.press(view)
        seen += page.inner_text("body")
    page.keyboard.press("2")
    page.locator("#view-sites tbody tr[data-at]").first.click()
    seen += page.inner_text("#details")
    assert "–" in seen
    assert not {word for word in ("NaN", "undefined", "null", "Infinity") if word in seen}
    assert not page.troubles
    page.context.close()


def test_no_graph_and_no_site(page_of):
    made = document(0)
    made["sites"], made["graphs"] = [], []
    made["summary"]["notes"] = [f"note {i}" for i in range(9)]
    page = page_of(made)
    page.wait_for_selector("#no-graph:not([hidden])")
    for view in ("2", "3", "1"):
        page.keyboard.press(view)
    assert not violations(page)
    assert not page.troubles
    page.context.close()


def test_no_text_becomes_a_script(page_of):
    made = document(1)
    for n, (text, site) in enumerate(zip(HOSTILE, made["sites"], strict=False)):
        site.update(site=text, module=text, why_float=text, note=text, operation=text, rules=[text], kept=[text])
        site.update(
            missed=[{"rule": text, "why": text}], source={"file": text, "line": 1, "code": text}, quantized=n % 2 == 0
        )
        site.update(quantized=n % 2 == 0, weight_type=text, input_type=text, group=text)
    made["summary"].update(
        model=HOSTILE[0], scheme=HOSTILE[1], backend=HOSTILE[2], metric=HOSTILE[1], notes=list(HOSTILE)
    )
    for level in made["graphs"][0]["levels"]:
        level["after"] = HOSTILE[1]
        for i, node in enumerate(level["nodes"]):
            text = HOSTILE[i % len(HOSTILE)]
            node.update(text=text, op=text, module=text, site=text, rule=text, dtype=text, shape=[text])
    page = page_of(made)
    page.wait_for_selector(".box")
    page.click("#expand")
    for text in HOSTILE:
        page.fill("#search", text[:12])
        page.keyboard.press("Enter")
        page.wait_for_selector("#details:not([hidden])")
    for view in ("2", "3"):
        page.keyboard.press(view)
        page.locator(f"#view-{'sites' if view == '2' else 'compare'} tbody tr[data-at]").first.click()
    assert page.evaluate("window.hit") is None
    assert page.evaluate("document.querySelectorAll('img, svg[onload], [onerror]').length") == 0
    assert HOSTILE[0] in page.inner_text("body")
    assert not page.troubles
    page.context.close()
