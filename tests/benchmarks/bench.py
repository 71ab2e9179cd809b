"""Measure the times and the memory that this project promises, beside their bars.

    python tests/benchmarks/bench.py            # a minute or two; exit 1 if a bar does not hold
    python tests/benchmarks/bench.py --book     # chapters, book build, pages in Chromium instead
    python tests/benchmarks/bench.py --train    # trains `tiny` from nothing instead (ten minutes)

Every figure is the median of several runs, or a fresh process where an import or peak memory is
measured, on as many threads as there are cores; peers are measured in the same run. The figures
go to results.json beside this file, with the machine that they were measured on. A machine busy
with something else is slower.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

CAPTION = "a small red star above a large striped blue ring"
COMMAND = (sys.executable, "-m", "t2ilearn")
RESULTS = Path(__file__).with_name("results.json")


class Row(NamedTuple):
    """One measurement: what, its value, its bar, its unit, and whether more is better."""

    what: str
    value: float
    bar: float
    unit: str
    more: bool = False

    @property
    def holds(self) -> bool:
        """Whether the value meets its bar."""
        return self.value >= self.bar if self.more else self.value <= self.bar


def median_seconds(work: Callable[[], object], repeat: int = 5) -> float:
    """The median duration of work, after one run to warm up."""
    work()
    seconds = []
    for _ in range(repeat):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


# Starts a command and says what it took. A process's peak memory begins with that of the process
# which started it, so the starter is a small one.
LAUNCH = """
import os, subprocess, sys
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
print(usage.ru_maxrss)
sys.exit(os.waitstatus_to_exitcode(status))
"""


def run_measured(*command: str) -> tuple[float, float]:
    """Seconds and peak resident GB of a fresh process (nan memory where the system hides it)."""
    hidden = not hasattr(os, "wait4")
    whole = command if hidden else (sys.executable, "-c", LAUNCH, *command)
    began = time.perf_counter()
    done = subprocess.run(whole, capture_output=True, text=True)
    seconds = time.perf_counter() - began
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr}")
    if hidden:
        return seconds, float("nan")
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, else KiB
    return seconds, int(done.stdout) * unit / 1e9


def imports() -> Iterator[Row]:
    """What `import t2ilearn` and `t2ilearn --help` cost beyond torch's own import."""

    def once(code: str) -> float:
        timed = f"import time; b = time.perf_counter(); {code}; print(time.perf_counter() - b)"
        command = [sys.executable, "-c", timed]
        return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    code = "import torch; b = time.perf_counter(); import t2ilearn; t2ilearn.draw"
    beyond = statistics.median(once(code) for _ in range(5))
    yield Row("import t2ilearn, beyond torch", beyond, 0.3, "s")
    help_seconds = statistics.median(run_measured(*COMMAND, "--help")[0] for _ in range(5))
    yield Row("t2ilearn --help, whole process", help_seconds, 0.5, "s")


def renderer() -> Iterator[Row]:
    """Pictures a second at 64×64."""
    import torch

    from t2ilearn.data.shapes import Shapes

    world, n = Shapes(resolution=64), 2000
    seconds = median_seconds(lambda: world.sample(n, generator=torch.Generator().manual_seed(0)))
    yield Row("renderer at 64×64", n / seconds, 2000, "pictures/s", more=True)


def emoji() -> Iterator[Row]:
    """The emoji world: decoding all archives once, then pictures a second from memory."""
    import torch

    from t2ilearn.data import Emoji

    began = time.perf_counter()
    world, n = Emoji(), 2000
    yield Row("emoji, first decode", time.perf_counter() - began, 15, "s")
    seconds = median_seconds(lambda: world.sample(n, generator=torch.Generator().manual_seed(0)))
    yield Row("emoji at 64×64, from memory", n / seconds, 2000, "pictures/s", more=True)


def cache() -> Iterator[Row]:
    """Sampling 64 tokens at batch 4 with 7 M parameters: with cache, without, and GPT-2's."""
    import torch

    from t2ilearn.data.captions import VOCABULARY
    from t2ilearn.models.sampling import sample
    from t2ilearn.models.transformer import PriorConfig, TransformerPrior

    torch.manual_seed(0)
    words = len(VOCABULARY)
    sizes = {"codebook_size": 1024, "dim": 256, "num_layers": 8, "num_heads": 8}
    config = PriorConfig(**sizes, vocabulary=words)
    model = TransformerPrior(config).eval()
    caption = torch.randint(3, words, (4, config.text_length))

    def draw(use_cache: bool) -> Callable[[], object]:
        return lambda: sample(
            model, caption, generator=torch.Generator().manual_seed(0), use_cache=use_cache
        )

    with_cache, without = median_seconds(draw(True)), median_seconds(draw(False), repeat=3)
    size = sum(p.numel() for p in model.parameters()) / 1e6
    yield Row(f"sampling, {size:.1f} M, without / with cache", without / with_cache, 3, "×", True)
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError:
        print("(transformers is not installed: no comparison with GPT-2's generate)")
        return
    peer = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=1024,
            n_positions=128,
            n_embd=256,
            n_layer=8,
            n_head=8,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=0,
        )
    ).eval()
    options = {"max_new_tokens": 64, "min_new_tokens": 64, "do_sample": True, "use_cache": True}
    mask = torch.ones_like(caption)
    theirs = median_seconds(lambda: peer.generate(caption, attention_mask=mask, **options))
    yield Row("sampling with cache", with_cache, theirs, "s (bar: GPT-2 generate, same run)")


def draw() -> Iterator[Row]:
    """Four pictures with the shipped weights: seconds after import, and a process's memory."""
    import t2ilearn
    from t2ilearn.systems import registry

    for name in registry.names():
        how = {"system": name, "count": 4, "seed": 0}
        seconds = median_seconds(lambda how=how: t2ilearn.draw(CAPTION, **how))
        yield Row(f"draw --with {name}, four pictures", seconds, 2, "s")
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / "drawing.png")
        _, memory = run_measured(*COMMAND, "draw", CAPTION, "--count", "4", "--out", out)
    yield Row("draw, peak memory of the process", memory, 1.2, "GB")


def training() -> Iterator[Row]:
    """`tiny` VQ-VAE and prior from nothing: minutes together, and the larger peak memory."""
    import torch

    with tempfile.TemporaryDirectory() as folder:
        command = ("train", "vqvae", "--preset", "tiny", "--runs", folder)
        seconds, memory = run_measured(*COMMAND, *command)
    unit = f"minutes on {torch.get_num_threads()} cores, evaluation included"
    yield Row("tiny VQ-VAE and prior, training", seconds / 60, 20, unit)
    yield Row("tiny training, peak memory", memory, 3, "GB")


def book() -> Iterator[Row]:
    """Each chapter under nbval, the build from stored outputs, and pages until all is shown."""
    root = Path(__file__).resolve().parent.parent.parent
    nbval = ("--nbval", "--nbval-current-env", "--nbval-sanitize-with", "tests/nbval.cfg", "-q")
    for chapter in sorted((root / "notebooks").glob("*.ipynb")):
        command = (sys.executable, "-m", "pytest", *nbval, str(chapter))
        yield Row(f"nbval, {chapter.stem}", run_measured(*command)[0], 60, "s")
    with tempfile.TemporaryDirectory() as folder:
        program = str(Path(sys.executable).parent / "jupyter-book")
        options = ("-W", "-n", "--keep-going", "--path-output", folder)
        yield Row("book build", run_measured(program, "build", str(root), *options)[0], 60, "s")
        pages = sorted(Path(folder, "_build", "html", "notebooks").glob("*.html"))
        seconds = seconds_until_ready(pages)
    slowest = max(seconds, key=seconds.__getitem__)
    yield Row("page with its widgets, until ready", seconds[slowest], 2, f"s ({slowest})")


def seconds_until_ready(pages: list[Path]) -> dict[str, float]:
    """For each page, the median of three openings in headless Chromium, from the request until
    every widget stands there."""
    import shutil

    from playwright.sync_api import sync_playwright

    browsers = ("chromium", "chromium-browser", "google-chrome")
    program = next(filter(None, map(shutil.which, browsers)), None)
    if program is None:
        raise SystemExit("--book needs a Chromium (Debian: apt-get install chromium).")
    seconds: dict[str, list[float]] = {page.stem: [] for page in pages}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        for page in [page for page in pages for _ in range(3)]:
            widgets = page.read_text(encoding="utf-8").count("vnd.jupyter.widget-view+json")
            opened = browser.new_page()
            opened.goto(page.as_uri(), wait_until="load")
            opened.wait_for_function(
                f"document.querySelectorAll('.t2i[role=group]').length >= {widgets}"
            )
            seconds[page.stem].append(opened.evaluate("performance.now() / 1000"))
            opened.close()
        browser.close()
    return {name: statistics.median(times) for name, times in seconds.items()}


def machine() -> dict[str, object]:
    """What the figures were measured on."""
    import torch

    return {
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def main() -> int:
    """Print each row as it is measured, and write them all."""
    parts = [imports, renderer, emoji, cache, draw]
    parts = {"--train": [training], "--book": [book]}.get("".join(sys.argv[1:]), parts)
    # Rows of parts that are not measured now stay as they were.
    old = json.loads(RESULTS.read_text(encoding="utf-8"))["rows"] if RESULTS.exists() else []
    rows: dict[str, dict] = {row["what"]: row for row in old}
    fails = 0
    print(f"{'':44}{'measured':>10}{'bar':>9}")
    for part in parts:
        for row in part():
            sign, word = ("≥" if row.more else "≤"), ("" if row.holds else "  MISSED")
            fails += not row.holds
            rows[row.what] = {**row._asdict(), "holds": row.holds}
            print(
                f"{row.what:44}{row.value:10.2f}  {sign}{row.bar:6.4g} {row.unit}{word}", flush=True
            )
    text = json.dumps({"machine": machine(), "rows": list(rows.values())}, indent=2)
    RESULTS.write_text(text + "\n", encoding="utf-8")
    return int(fails > 0)


if __name__ == "__main__":
    sys.exit(main())
