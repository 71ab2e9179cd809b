"""The built pages in a browser: nothing from elsewhere, no errors, for every reader and window.

Every page is opened over http and from its file. A chapter's stored widgets are drawn and answer to
mouse and keyboard with no kernel behind them.
"""

import functools
import gzip
import html
import http.server
import importlib.resources
import re
import shutil
import threading
import tomllib
from pathlib import Path
from urllib.parse import unquote, urlsplit

import conftest
import pytest
import yaml

import vendor
from t2ilearn import systems

ROOT = Path(__file__).resolve().parent.parent
TOC = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
ENTRIES = [entry for part in TOC["parts"] for entry in part["chapters"]]
ENTRIES += [section for entry in ENTRIES for section in entry.get("sections", [])]
LISTED = [TOC["root"], *(entry["file"] for entry in ENTRIES)]
NAMES = [*LISTED, "genindex", "py-modindex", "search"]
MEGABYTES_A_PAGE = 3
# The theme sets a constant twice; the widgets' script has a remark on its own schema.
HARMLESS = ("'THEBE_JS_URL' has already been declared", "use allowUnionTypes")
COMPRESSED = {".html", ".css", ".js", ".json", ".svg"}  # as a host of static pages sends them
# A chapter's code has the colours of own_pictures', and the API page's thousands of signatures have
# those of the first two in each part: judged one by one they would take axe most of a minute.
AXE = """axe.run(
  {exclude: [".cell_input", "section > .py ~ .py ~ .py > dt.sig", "dl.py dl.py > dt.sig"]},
  {preload: false, resultTypes: ["violations"], ...OPTIONS}
)"""
COLOURS = """{runOnly: ["color-contrast", "link-in-text-block"]}"""  # all that the dark changes
STILL = "* { transition: none !important; animation: none !important; }"


# ---------------------------------------------------------------- scripts of other projects


def test_vendored_files_are_the_listed_ones():
    assert vendor.faults(vendor.FOLDER, vendor.read_list()) == []


def test_the_list_has_version_licence_and_source_of_each_vendored_package():
    for package in vendor.read_list():
        assert {"name", "version", "licence", "from", "files"} <= package.keys()
        assert package["from"] == "pypi" or package["integrity"].startswith("sha512-")
        assert any("LICENSE" in name for name in package["files"]), package["name"]


def test_a_changed_missing_or_unlisted_file_is_named(tmp_path):
    packages = [{"files": {name: {"sha256": vendor.sha256(b"x")} for name in ("a.js", "b.js")}}]
    (tmp_path / "a.js").write_bytes(b"y")
    (tmp_path / "c.js").write_bytes(b"x")
    assert vendor.faults(tmp_path, packages) == [
        "b.js is missing",
        "c.js is not in the list",
        "a.js is not the file that the list names",
    ]


def test_whole_modules_are_removed_from_a_bundle():
    bundle = '/* head */\ndefine("a",1);\ndefine("b",2);\ndefine("c",3);\n'
    assert vendor.without_modules(bundle, ["b"]) == '/* head */\ndefine("a",1);\ndefine("c",3);\n'


# ---------------------------------------------------------------- pages, two ways


class Quiet(http.server.SimpleHTTPRequestHandler):
    """A server of static files that does not log."""

    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def browser():
    with conftest.headless_browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def serve():
    """A function from a folder to its address over http, on this machine."""
    servers = []

    def start(folder: Path) -> str:
        handler = functools.partial(Quiet, directory=str(folder))
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def pages(built, browser) -> Path:
    """The folder of built pages. tests/test_book.py says whether the build is faultless."""
    folder = built[2]
    if not (folder / "index.html").exists():
        pytest.fail(f"the book is not built:\n{built[1][-2000:]}")
    return folder


@pytest.fixture(scope="module")
def addresses(pages, serve) -> dict[str, str]:
    """Where the book is, for each way to open it."""
    return {"http": serve(pages), "file": pages.as_uri()}


class Visit:
    """A page opened in a fresh profile, and what it said and asked for."""

    def __init__(self, browser, address: str, name: str, **options):
        self.page = browser.new_context(**options).new_page()
        self.said, self.asked, self.failed = [], [], []
        self.page.on("console", self._listen)
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("requestfailed", lambda request: self.failed.append(request.url))
        self.page.goto(f"{address}/{name}.html", wait_until="load")

    def _listen(self, message):
        if message.type in ("error", "warning"):
            self.said.append(f"{message.text} {message.location.get('url', '')}")

    def errors(self) -> list[str]:
        """What went wrong, but for what is known and harmless."""
        return [text for text in self.said if not any(known in text for known in HARMLESS)]

    def elsewhere(self, address: str) -> list[str]:
        """Requests to anything but the site; data and blobs are parts of the page itself."""
        return [u for u in self.asked if not u.startswith((address, "data:", "blob:"))]

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.page.context.close()


@functools.cache
def bytes_sent(path: Path) -> int:
    """A file's size as a host sends it: texts compressed, pictures as they are."""
    data = path.read_bytes()
    return len(gzip.compress(data, 6)) if path.suffix in COMPRESSED else len(data)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["http", "file"])
@pytest.mark.parametrize("name", NAMES)
def test_a_page_loads_completely_is_small_and_requests_nothing_from_elsewhere(
    browser, pages, addresses, name, way
):
    with Visit(browser, addresses[way], name) as visit:
        visit.page.wait_for_timeout(200)  # whatever scripts ask for after loading
        assert visit.elsewhere(addresses[way]) == []
        assert visit.failed == []
        assert visit.errors() == []
        broken = "[...document.images].filter((i) => !i.complete || !i.naturalWidth).length"
        assert visit.page.evaluate(broken) == 0, "a picture does not show"
        urls = {u.split("#")[0] for u in visit.asked if u.startswith(addresses[way])}
        paths = [pages / unquote(urlsplit(u.removeprefix(addresses[way])).path)[1:] for u in urls]
        megabytes = sum(map(bytes_sent, paths)) / 1e6
        assert megabytes <= MEGABYTES_A_PAGE, f"{megabytes:.2f} MB"


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_page_passes_axe_in_light_and_dark(browser, addresses, name):
    axe = importlib.resources.files("axe_playwright_python").joinpath("axe.min.js")
    with Visit(browser, addresses["file"], name) as visit:
        visit.page.add_style_tag(content=STILL)  # colours that fade in are judged half-way
        visit.page.evaluate(axe.read_text(encoding="utf-8"))
        for scheme, options in (("light", "{}"), ("dark", COLOURS)):
            visit.page.emulate_media(color_scheme=scheme)
            visit.page.wait_for_function(f"document.documentElement.dataset.theme == '{scheme}'")
            found = visit.page.evaluate(AXE.replace("OPTIONS", options))
            faults = [
                f"{scheme}: {v['id']} ({v['impact']}) {node['target']}: {node['html'][:200]}"
                for v in found["violations"]
                if v["impact"] in ("serious", "critical")
                for node in v["nodes"]
            ]
            assert not faults, "\n".join(faults)


# axe leaves open what it cannot see through, tables in outputs among it: their ratios by hand, of
# each text's colour and the first ground under it that is not clear (WCAG 2.2, 1.4.3).
FAINT = """() => {
  const parts = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b]
    .map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = (node) => {
    for (let at = node; at; at = at.parentElement) {
      const colour = parts(getComputedStyle(at).backgroundColor);
      if (colour[3] !== 0) return colour;
    }
    return [255, 255, 255];
  };
  return [...document.querySelectorAll(".text_html *")]
    .filter((e) => [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim()))
    .map((e) => [e.textContent, light(parts(getComputedStyle(e).color)), light(ground(e))])
    .map(([text, a, b]) => [text, (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)])
    .filter(([, ratio]) => ratio < 4.5);
}"""


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("notebooks/")])
def test_html_outputs_have_enough_contrast(browser, addresses, name, scheme):
    with Visit(browser, addresses["file"], name) as visit:
        visit.page.add_style_tag(content=STILL)
        visit.page.emulate_media(color_scheme=scheme)
        visit.page.wait_for_function(f"document.documentElement.dataset.theme == '{scheme}'")
        assert visit.page.locator(".text_html").count() > 0
        assert visit.page.evaluate(FAINT) == []


def stored_widgets(name: str) -> int:
    """How many widgets of this package a page shows; 0 where the page is no notebook."""
    path = ROOT / f"{name}.ipynb"
    return path.read_text(encoding="utf-8").count('"_anywidget_id"') if path.exists() else 0


def settle(page, name: str) -> None:
    """Wait until equations are set, and stored widgets are drawn and have said their state."""
    page.evaluate("window.MathJax?.startup?.promise?.then(() => true)")
    ready = f"""() => {{
      const widgets = [...document.querySelectorAll(".t2i[role=group]")];
      const says = widgets.map((widget) => widget.querySelector("[aria-live]").textContent);
      return widgets.length >= {stored_widgets(name)} && says.every((text) => text);
    }}"""
    page.wait_for_function(ready, timeout=20_000)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_narrow_window_scrolls_only_vertically(browser, addresses, name):
    narrow = {"width": 320, "height": 640}
    with Visit(browser, addresses["file"], name, viewport=narrow) as visit:
        settle(visit.page, name)
        assert visit.page.evaluate("document.documentElement.scrollWidth") <= 320
        # What lies left of where a box begins cannot be scrolled to.
        begins = "[...document.querySelectorAll('mjx-container')].map(box => Math.round("
        begins += "box.getBoundingClientRect().left))"
        lost = [left for left in visit.page.evaluate(begins) if left < 0]
        assert not lost, f"{len(lost)} equations begin left of the window"


def dead_links(folder: Path) -> list[str]:
    """Links within the site, of the listed pages, to a file or an anchor that does not exist."""

    @functools.cache
    def text(path: Path) -> str:
        page = path.read_text(encoding="utf-8")
        return re.sub(r"<script\b.*?</script>", "", page, flags=re.DOTALL)  # widgets' states

    dead = []
    for name in LISTED:
        page = folder / f"{name}.html"
        for link in map(html.unescape, re.findall(r'<a\b[^>]* href="([^"]+)"', text(page))):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            anchor = f'id="{html.escape(unquote(parts.fragment))}"'
            if not target.exists() or (parts.fragment and anchor not in text(target)):
                dead.append(f"{name}: {link}")
    return dead


@pytest.mark.slow
def test_every_link_within_the_site_has_a_target(pages):
    assert dead_links(pages) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in LISTED if name.startswith("notebooks/")])
def test_a_chapters_page_opens_the_same_chapter_on_colab(pages, name):
    page = (pages / f"{name}.html").read_text(encoding="utf-8")
    links = set(re.findall(r'href="(https://colab\.research[^"]+)"', page))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    owner_and_name = project["urls"]["Repository"].removeprefix("https://github.com/")
    start = f"https://colab.research.google.com/github/{owner_and_name}/blob/main/"
    assert links == {f"{start}{name}.ipynb"}


# ---------------------------------------------------------------- widgets without a kernel


def says_more(root, acts) -> bool:
    """Whether one of these acts changes the sentence in which a widget says its state."""
    live = root.locator("[aria-live]")
    for act in acts:
        before = live.inner_text()
        act()
        root.page.wait_for_timeout(200)  # it speaks when it rests
        if live.inner_text() != before:
            return True
    return False


def presses(root):
    """A key on each thing that takes the focus: arrows for what slides, a letter for a choice."""
    for control in root.locator("input, button, [tabindex='0']").all()[:8]:
        for key in ("ArrowRight", "ArrowLeft", "b"):
            yield lambda control=control, key=key: control.press(key)


def clicks(root):
    """The mouse on each button that can be pressed."""
    for button in root.locator("button:enabled:visible, input[type=radio]:visible").all()[:8]:
        yield button.click


CHAPTERS = [name for name in LISTED if name.startswith("notebooks/")]


@pytest.mark.slow
@pytest.mark.parametrize("way", ["http", "file"])
@pytest.mark.parametrize("name", CHAPTERS)
def test_every_widget_of_a_chapter_responds_to_keys_and_mouse(browser, addresses, name, way):
    with Visit(browser, addresses[way], name) as visit:
        roots = visit.page.locator(".t2i[role=group]")
        settle(visit.page, name)
        for root in roots.all():
            label = root.get_attribute("aria-label")
            assert says_more(root, presses(root)), f"{label} does not respond to keys"
            assert says_more(root, clicks(root)), f"{label} does not respond to the mouse"
        assert visit.errors() == [] and visit.failed == []


@pytest.mark.slow
def test_a_finger_drags_a_point_and_presses_a_button(browser, addresses):
    phone = {"viewport": {"width": 412, "height": 800}, "has_touch": True, "is_mobile": True}
    name = "notebooks/02_vqvae"
    with Visit(browser, addresses["file"], name, **phone) as visit:
        page = visit.page
        settle(page, name)
        stairs = page.get_by_role("group", name="Straight-through estimator", exact=True).first
        knob, says = stairs.get_by_role("slider", name="Encoding z"), stairs.locator("[aria-live]")
        knob.scroll_into_view_if_needed()
        page.wait_for_timeout(300)
        before, top = says.inner_text(), page.evaluate("scrollY")
        box = knob.bounding_box()
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        fingers = page.context.new_cdp_session(page)  # a drag, which Playwright's tap is not

        def touch(kind: str, *points: tuple[float, float]) -> None:
            places = [{"x": across, "y": down} for across, down in points]
            fingers.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": places})

        touch("touchStart", (x, y))
        for part in range(1, 6):
            touch("touchMove", (x + 12 * part, y - 20 * part))  # aslant, as fingers are
        touch("touchEnd")
        page.wait_for_timeout(300)  # it speaks when it rests
        dragged = says.inner_text()
        z = [float(text.split()[2].replace("−", "-")) for text in (before, dragged)]
        assert z[1] > z[0] + 0.3, dragged
        assert page.evaluate("scrollY") == top, "the page moved instead"
        stairs.get_by_role("button", name="20 steps").tap()
        page.wait_for_timeout(300)
        assert "After 20 steps" in says.inner_text()


@pytest.fixture(scope="module")
def toy_book(store_toy, tmp_path_factory) -> Path:
    """Built pages of a book with the house's own settings, and one notebook with widgets."""
    source, out = tmp_path_factory.mktemp("toy"), tmp_path_factory.mktemp("toy-pages")
    store_toy(source / "toy.ipynb")
    shutil.copy(ROOT / "_config.yml", source)
    for name in ("_static", "_ext"):
        shutil.copytree(ROOT / "book" / name, source / "book" / name)
    shutil.copy(ROOT / "book" / "references.bib", source / "book")
    (source / "_toc.yml").write_text("format: jb-book\nroot: toy\n", encoding="utf-8")
    status, said = conftest.build_book(source, out)
    assert status == 0, said[-2000:]
    return out / "_build" / "html"


@pytest.mark.slow
@pytest.mark.parametrize("way", ["http", "file"])
def test_stored_widgets_respond_to_mouse_and_keyboard(toy_book, browser, serve, way):
    address = serve(toy_book) if way == "http" else toy_book.as_uri()
    with Visit(browser, address, "toy") as visit:
        page = visit.page
        says, readout = page.locator(".toy-says"), page.locator(".widget-readout")
        says.wait_for(timeout=20_000)
        assert (says.inner_text(), readout.inner_text()) == ("value 3", "3")
        page.locator(".toy-more").click()
        assert (says.inner_text(), readout.inner_text()) == ("value 4", "4")
        page.locator(".toy-more").press("ArrowUp")
        assert (says.inner_text(), readout.inner_text()) == ("value 5", "5")
        page.locator(".noUi-handle").press("ArrowRight")  # the link works both ways
        page.wait_for_function("document.querySelector('.toy-says').innerText == 'value 6'")
        page.locator(".widget-play button").first.click()  # its icon is replaced by the theme
        page.locator(".widget-play svg").first.wait_for()
        assert page.locator("mjx-container").count() == 1
        assert visit.elsewhere(address) == []
        assert visit.failed == []
        assert visit.errors() == []


@pytest.mark.slow
def test_a_page_with_widgets_names_only_its_own_scripts(toy_book):
    page = (toy_book / "toy.html").read_text(encoding="utf-8")
    scripts = re.findall(r'<script[^>]* src="([^"?]+)', page)
    order = [s.rsplit("/", 1)[-1] for s in scripts]
    assert order.index("require.js") < order.index("widget-paths.js") < order.index("embed-amd.js")
    assert not [s for s in scripts if s.startswith(("http:", "https:", "//"))]


# ---------------------------------------------------------------- the Play page


def test_the_play_page_was_drawn_with_the_shipped_weights():
    text = (ROOT / "book" / "_static" / "play.html").read_text(encoding="utf-8")
    shown = dict(re.findall(r'"([\w-]+)": \{"title": "[^"]+", "weights": "([^"]+)"', text))
    assert shown == {name: systems.load(name).weights_id for name in systems.names()}
    template = (ROOT / "tools" / "play_template.html").read_text(encoding="utf-8")
    assert all(part in text for part in template.split("/*DATA*/")), "run tools/make_play.py"


@pytest.mark.slow
@pytest.mark.parametrize("way", ["http", "file"])
def test_the_play_page_draws_guesses_and_saves(browser, addresses, way):
    with Visit(browser, addresses[way], "book/play") as visit:
        page, says = visit.page, visit.page.locator(".t2i-play [aria-live]")
        assert "seeds 0 to 3" in says.inner_text()
        first = says.inner_text()
        page.locator(".t2i-play .caption").press("ArrowDown")
        assert says.inner_text() != first
        drawn = "c => new Set(c.getContext('2d').getImageData(0, 0, 512, 128).data).size"
        page.wait_for_function(f"({drawn})(document.querySelector('.t2i-play canvas')) > 20")
        page.locator(".t2i-play .guess").click()
        assert "Which system drew" in says.inner_text()
        page.locator(".t2i-play .answers button").first.press("Enter")
        assert re.match(r"(Right|No): .* [01] of 1 so far", says.inner_text())
        page.locator(".t2i-play .surprise").click()
        assert "seeds 0 to 3" in says.inner_text()
        page.locator(".t2i-play .reset").click()
        assert says.inner_text() == first
        with page.expect_download() as download:
            page.locator(".t2i-play .save").click()
        assert download.value.suggested_filename.endswith(".png")
        assert visit.errors() == []
