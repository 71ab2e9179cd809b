"""DALL·E: a draw that gradients can pass, one stream of words and codes, and going on from it."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from t2ilearn import dalle, prior
from t2ilearn.dalle import (
    TEMPERATURE_END,
    DALLE,
    DVAE,
    EPSILON,
    KL_WEIGHT,
    MIN_LOG_SCALE,
    TEMPERATURE_START,
    Candidates,
    DVAEConfig,
    DVAEOutput,
    Stream,
    beginning,
    dalle_loss,
    dvae_loss,
    gumbel_noise,
    keep_best,
    kl_weight_at,
    logit_laplace,
    gumbel_softmax,
    squeeze,
    temperature_at,
)
from t2ilearn.prior import PriorConfig, drop_captions, log_likelihood, sample, sample_steps
from t2ilearn.tokens import END, NULL, PAD, null_caption

K, SIDE, WORDS, VOCABULARY = 7, 4, 5, 11
N = SIDE**2
SIZES = DVAEConfig(resolution=16, channels=(8, 16), blocks=1, codebook_size=6, code_dim=5)


def small_dvae(**sizes) -> DVAE:
    """A dVAE in float64, always with the same weights."""
    torch.manual_seed(0)
    return DVAE(DVAEConfig(**{**vars(SIZES), **sizes})).double()


def small(**sizes) -> DALLE:
    """A DALL·E in float64 with weights so large that whatever can be heard is heard."""
    torch.manual_seed(0)
    given = {"codebook_size": K, "side": SIDE, "dim": 16, "num_layers": 3, "num_heads": 2}
    words = {"vocabulary": VOCABULARY, "text_length": WORDS}
    model = DALLE(PriorConfig(**{**given, **words, **sizes})).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            gain = "norm" in name and name.endswith("weight")
            parameter.copy_(0.4 * torch.randn_like(parameter) + gain)
    return model.eval()


@pytest.fixture
def x(generator):
    """Four pictures of noise, in float64."""
    return torch.rand(4, 3, 16, 16, generator=generator, dtype=torch.float64) * 2 - 1


@pytest.fixture
def noise(generator):
    return gumbel_noise((4, 6, 4, 4), generator, torch.float64)


@pytest.fixture
def indices(generator):
    return torch.randint(K, (3, N), generator=generator)


@pytest.fixture
def caption():
    """Captions of four, three and two words with their end, then padding."""
    return torch.tensor([[3, 4, 5, 6, END], [7, 8, 9, END, PAD], [10, 3, END, PAD, PAD]])


def moved(loss, module):
    """The names of parameters that a loss has a gradient for."""
    names, parameters = zip(*module.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    found = zip(names, gradients, strict=True)
    return {name for name, g in found if g is not None and g.abs().max() > 0}


# ---------------------------------------------------------------- a draw that gradients can pass


def test_gumbel_noise_has_its_mean_and_its_variance(generator):
    n = 200_000
    g = gumbel_noise((n,), generator, torch.float64)
    deviation = math.pi / 6**0.5
    assert abs(g.mean().item() - 0.5772156649) < 5 * deviation / n**0.5
    assert g.std().item() == pytest.approx(deviation, rel=0.01)
    # P(g ≤ t) = exp(−exp(−t)), at the quartiles and far out
    for share in (0.01, 0.25, 0.5, 0.75, 0.99):
        below = (g <= -math.log(-math.log(share))).double().mean().item()
        assert abs(below - share) < 5 * (share * (1 - share) / n) ** 0.5


def test_the_likeliest_code_with_noise_is_a_draw_from_the_softmax(generator):
    logits = torch.tensor([2.0, 0.0, -1.0, 1.0, -3.0])
    n = 50_000
    g = gumbel_noise((n, 5), generator)
    seen = torch.bincount((logits + g).argmax(1), minlength=5).double()
    wanted = n * logits.double().softmax(0)
    chi_square = ((seen - wanted) ** 2 / wanted).sum().item()
    assert chi_square < 18.5  # 4 degrees of freedom: one seed in a thousand is above
    plain = torch.bincount((logits + torch.randn(n, 5, generator=generator)).argmax(1))
    assert ((plain.double() - wanted) ** 2 / wanted).sum() > 100  # other noise would not do


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("u", [0.0, 1 - 2**-24])
def test_noise_is_finite_at_both_ends_of_u(monkeypatch, dtype, u, generator):
    monkeypatch.setattr(torch, "rand", lambda s, generator, dtype: torch.full(s, u, dtype=dtype))
    g = gumbel_noise((3,), generator, dtype)
    assert g.isfinite().all() and g.dtype == dtype
    assert (g < -4).all() if u == 0 else (g > 15).all()


def test_noise_repeats_with_its_seed_and_touches_no_other_randomness():
    state = torch.random.get_rng_state()
    a, b, c = (gumbel_noise((2, 3), torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_relaxed_draw_becomes_one_code_when_cold_and_all_codes_when_hot(generator):
    logits = torch.randn(3, 6, 2, 2, generator=generator, dtype=torch.float64)
    g = gumbel_noise((3, 6, 2, 2), generator, torch.float64)
    hard = F.one_hot((logits + g).argmax(1), 6).movedim(-1, 1).double()
    assert torch.allclose(gumbel_softmax(logits, g, 1e-4), hard, atol=1e-9)
    assert torch.allclose(gumbel_softmax(logits, g, 1e7), torch.full_like(hard, 1 / 6), atol=1e-6)
    y = gumbel_softmax(logits, g, 0.5)
    assert torch.allclose(y.sum(1), torch.ones(3, 2, 2, dtype=torch.float64)) and (y > 0).all()
    by_hand = ((logits + g) / 0.5).exp()
    assert torch.allclose(y, by_hand / by_hand.sum(1, keepdim=True), atol=1e-12)


@pytest.mark.parametrize("wrong", [0.0, -1.0, math.nan, math.inf])
def test_a_temperature_that_is_none_is_refused(wrong, noise, x):
    with pytest.raises(ValueError, match="relaxed draw must be above 0, not"):
        gumbel_softmax(torch.zeros_like(noise), noise, wrong)
    with pytest.raises(ValueError, match="relaxed draw must be above 0, not"):
        small_dvae()(x, wrong, noise)


# ---------------------------------------------------------------- the dVAE


def test_the_shapes_of_a_dvae(x, noise):
    model = small_dvae()
    output = model(x, 1.0, noise)
    assert output.logits.shape == (4, 6, 4, 4)
    assert output.mean.shape == output.log_scale.shape == (4, 3, 16, 16)
    tokens = model.tokens(x)
    assert tokens.shape == (4, 16) and tokens.dtype == torch.int64
    assert model.decode_tokens(tokens).shape == (4, 3, 16, 16)


def test_each_place_hears_the_mixture_of_its_own_codes(monkeypatch, x, noise):
    model, seen = small_dvae(), []
    model.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    output = model(x, 0.7, noise)
    y = gumbel_softmax(output.logits, noise, 0.7)
    b, i, j = 2, 3, 1
    by_hand = sum(y[b, k, i, j] * model.codebook[k] for k in range(6))
    assert torch.allclose(seen[0][b, :, i, j], by_hand, atol=1e-12)


def test_tokens_are_the_likeliest_codes_row_by_row_and_ignore_noise(x, noise):
    model = small_dvae().train()
    logits = model.logits(x)
    tokens = model.tokens(x)
    assert tokens[1, 4 * 2 + 3] == logits[1, :, 2, 3].argmax() and tokens.unique().numel() > 1
    state = torch.random.get_rng_state()
    model(x, 1.0, noise)
    assert torch.equal(model.tokens(x), tokens)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_cold_draw_without_noise_paints_what_the_tokens_paint(x, noise):
    model = small_dvae()
    output = model(x, 1e-5, torch.zeros_like(noise))
    painted = 2 * (output.mean.sigmoid() - EPSILON) / (1 - 2 * EPSILON) - 1
    assert torch.allclose(model.decode_tokens(model.tokens(x)), painted, atol=1e-8)


def test_decoding_undoes_the_squeeze(x):
    model = small_dvae()
    model.picture = lambda mixture: (map_pixels(x).logit(), torch.zeros_like(x))
    assert torch.allclose(model.decode_tokens(torch.zeros(4, 16, dtype=torch.int64)), x, atol=1e-12)
    ends = map_pixels(torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64))
    assert ends.tolist() == pytest.approx([0.1, 0.5, 0.9])


def test_a_dvae_begins_as_an_autoencoder():
    """A soft draw without noise hands on what the encoder saw; random logits would tell nothing."""

    def explained(model):
        pictures = 2 * torch.rand(64, 3, 16, 16, generator=torch.Generator().manual_seed(0)) - 1
        with torch.no_grad():
            before = torch.nn.Sequential(*list(model.encoder)[:-1])
            features = before(pictures.to(model.codebook.dtype))
            y = model.encoder[-1](features).softmax(1)
            mixture = torch.einsum("bkhw,kd->bdhw", y, model.codebook)
        z, m = (t.movedim(1, -1).flatten(0, 2) for t in (features, mixture))
        z, m = z - z.mean(0), m - m.mean(0)
        rest = m - z @ torch.linalg.lstsq(z, m).solution
        return 1 - rest.square().sum() / m.square().sum(), m.std()

    torch.manual_seed(0)
    config = DVAEConfig(resolution=16, channels=(16, 32), blocks=1, codebook_size=256, code_dim=8)
    share, size = explained(DVAE(config).double())
    assert share > 0.8
    by_chance = DVAE(config).double()
    torch.nn.init.normal_(
        by_chance.encoder[-1].weight, std=by_chance.encoder[-1].weight.std().item()
    )
    assert size > 2 * explained(by_chance)[1]


def test_the_scale_has_a_floor(x, noise):
    model = small_dvae()
    with torch.no_grad():
        model.decoder[-1].weight.zero_()
        model.decoder[-1].bias.copy_(torch.tensor([0.0, 0, 0, -50, -1, 2]))
    log_scale = model(x, 1.0, noise).log_scale
    assert log_scale[0, :, 0, 0].tolist() == pytest.approx([MIN_LOG_SCALE, -1, 2])


@pytest.mark.parametrize("mean, log_scale", [(0.0, 0.0), (1.3, -2.0), (-0.7, math.log(0.3))])
def test_the_logit_laplace_density_integrates_to_1(mean, log_scale):
    logit = torch.linspace(-40, 40, 200_001, dtype=torch.float64)  # even in the logit, dense at
    x = logit.sigmoid()  # both ends
    inside = (x > 0) & (x < 1)
    x = x[inside]
    full = (torch.full_like(x, value) for value in (mean, log_scale))
    density = (-logit_laplace(x, *full)).exp()
    assert torch.trapezoid(density, x).item() == pytest.approx(1, abs=1e-5)


def test_the_likelihood_is_the_paper_s_formula():
    x, mean, log_scale = (torch.tensor(v, dtype=torch.float64) for v in (0.3, -0.4, 0.2))
    b = math.exp(0.2)
    density = math.exp(-abs(math.log(0.3 / 0.7) + 0.4) / b) / (2 * b * 0.3 * 0.7)
    assert logit_laplace(x, mean, log_scale).item() == pytest.approx(-math.log(density), rel=1e-12)


def saying(logits, x):
    """An output with these logits, of a decoder that says the same everywhere."""
    return DVAEOutput(logits, torch.zeros_like(x), torch.zeros_like(x))


def test_the_divergence_is_0_for_even_logits_and_ln_k_a_code_for_sure_ones(x, generator):
    even = dvae_loss(x, saying(torch.full((4, 6, 4, 4), 3.0, dtype=torch.float64), x))
    assert even.kl.item() == pytest.approx(0, abs=1e-12)
    chosen = torch.randint(6, (4, 4, 4), generator=generator)
    sure = 1e4 * F.one_hot(chosen, 6).movedim(-1, 1).double()
    found = dvae_loss(x, saying(sure, x)).kl.item()
    assert found == pytest.approx(math.log(6) * 16 / (3 * 16 * 16), rel=1e-12)


def test_the_divergence_is_the_formula_by_hand(x, generator):
    logits = torch.randn(4, 6, 4, 4, generator=generator, dtype=torch.float64)
    q = logits.softmax(1)
    by_hand = 0.0
    for b in range(4):
        for k in range(6):
            for place in range(16):
                p = q[b, k].flatten()[place].item()
                by_hand += p * math.log(p * 6) / 4
    assert dvae_loss(x, saying(logits, x)).kl.item() == pytest.approx(by_hand / 768)


def test_a_nat_a_code_weighs_beta_over_192_as_in_the_paper():
    # 64 × 64 pixels with 8 × 8 codes; the paper's 256 × 256 with 32 × 32 have the same ratio.
    x = torch.zeros(1, 3, 64, 64, dtype=torch.float64)
    sure = torch.zeros(1, 1024, 8, 8, dtype=torch.float64)
    sure[:, 5] = 1e4
    loss = dvae_loss(x, saying(sure, x), 3.0)
    assert (loss.total - loss.reconstruction).item() == pytest.approx(3 * math.log(1024) / 192)
    assert 64 * 64 * 3 / 64 == 256 * 256 * 3 / 1024 == 192


def test_the_reconstruction_is_the_mean_over_the_numbers_of_a_picture(x, noise):
    output = small_dvae()(x, 1.0, noise)
    loss = dvae_loss(x, output, 2.5)
    squeezed = (1 - 2 * EPSILON) * (x + 1) / 2 + EPSILON
    by_hand = logit_laplace(squeezed, output.mean, output.log_scale).sum() / (4 * 3 * 16 * 16)
    assert loss.reconstruction.item() == pytest.approx(by_hand.item(), rel=1e-12)
    assert torch.allclose(loss.total, loss.reconstruction + 2.5 * loss.kl)
    default = dvae_loss(x, output)
    assert torch.allclose(default.total, loss.reconstruction + 6.6 * loss.kl)
    assert KL_WEIGHT == 6.6


def test_the_terms_move_their_own_parts(x, noise):
    model = small_dvae()
    loss = dvae_loss(x, model(x, 1.0, noise))
    parts = [{name.split(".")[0] for name in moved(term, model)} for term in loss]
    assert parts[0] == parts[2] == {"encoder", "codebook", "decoder"} and parts[1] == {"encoder"}


def test_nothing_is_changed_in_place(x, noise):
    model = small_dvae()
    before = [x.clone(), noise.clone()]
    state = copy.deepcopy(model.state_dict())
    output = model(x, 0.3, noise)
    kept = [value.clone() for value in output]
    dvae_loss(x, output)
    map_pixels(x)
    logit_laplace(map_pixels(x), output.mean, output.log_scale)
    gumbel_softmax(output.logits, noise, 0.3)
    indices = model.tokens(x)
    same = indices.clone()
    model.decode_tokens(indices)
    assert torch.equal(x, before[0]) and torch.equal(noise, before[1]) and torch.equal(indices, same)
    assert all(torch.equal(a, b) for a, b in zip(output, kept, strict=True))
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())


def test_logits_and_losses_stay_in_float32_under_autocast(x, noise):
    model, x, noise = small_dvae().float(), x.float(), noise.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert model.encoder(x).dtype == torch.bfloat16  # autocast is really on
        output = model(x, 0.5, noise)
        loss = dvae_loss(x, output)
        picture = model.decode_tokens(model.tokens(x))
        y = gumbel_softmax(output.logits.bfloat16(), noise, 0.5)
    assert {value.dtype for value in output} == {torch.float32}
    assert {value.dtype for value in loss} == {torch.float32} and loss.total.isfinite()
    assert picture.dtype == y.dtype == torch.float32
    assert map_pixels(x.bfloat16()).dtype == torch.float32
    assert gumbel_softmax(noise.bfloat16(), noise.bfloat16(), 0.5).dtype == torch.float32


# ---------------------------------------------------------------- schedules


def test_the_temperature_falls_from_1_to_a_sixteenth():
    assert temperature_at(0.0) == TEMPERATURE_START == 1 and TEMPERATURE_END == 1 / 16
    assert temperature_at(0.5) == temperature_at(0.8) == temperature_at(1.0) == 1 / 16
    assert temperature_at(0.25) == pytest.approx((1 + 1 / 16) / 2)  # half the way at half the time
    assert temperature_at(0.1, until=0.1) == 1 / 16 and temperature_at(0.9, until=1.0) > 1 / 16
    values = [temperature_at(i / 1000) for i in range(501)]
    assert all(a > b for a, b in zip(values, values[1:], strict=False))
    assert values[0] - values[1] < (values[250] - values[251]) / 10  # gently at first


def test_the_kl_weight_rises_from_0_to_its_top():
    assert kl_weight_at(0.0) == 0 and kl_weight_at(0.1) == kl_weight_at(1.0) == 6.6
    assert kl_weight_at(0.05) == pytest.approx(3.3) and kl_weight_at(1.0, top=0.5) == 0.5
    values = [kl_weight_at(i / 1000, until=0.5) for i in range(501)]
    assert all(a < b for a, b in zip(values, values[1:], strict=False)) and values[-1] == 6.6


def test_schedules_depend_on_the_share_alone():
    """Asked twice, out of order, or after a restart, they say the same: no decay compounds."""
    shares = [i / 50 for i in range(51)]
    once = [(temperature_at(s), kl_weight_at(s)) for s in shares]
    again = [(temperature_at(s), kl_weight_at(s)) for s in reversed(shares) for _ in range(2)]
    assert again[::2] == again[1::2] == once[::-1]


# ---------------------------------------------------------------- the dVAE, bad input


@pytest.mark.parametrize(
    "indices, said",
    [
        (torch.zeros(2, 15, dtype=torch.int64), r"4² codes: \(B, 16\), not \(2, 15\)"),
        (torch.zeros(2, 4, 4, dtype=torch.int64), r"not \(2, 4, 4\)"),
        (torch.full((2, 16), 6), "numbers from 0 to 5; these are 6 … 6"),
        (torch.full((2, 16), -1), "numbers from 0 to 5; these are -1"),
    ],
)
def test_what_cannot_be_decoded_is_refused(unchecked, indices, said):
    with pytest.raises(ValueError, match=said):
        small_dvae().decode_tokens(indices)


def test_pictures_of_another_size_are_refused(unchecked, noise):
    model = small_dvae()
    for wrong in (torch.zeros(2, 3, 8, 16), torch.zeros(2, 1, 16, 16), torch.zeros(3, 16, 16)):
        for what in (model.tokens, model.logits, lambda x: model(x, 1.0, noise)):
            with pytest.raises(ValueError, match="16"):
                what(wrong.double())


def test_sizes_that_do_not_fit_are_refused():
    for wrong in ({"codebook_size": 1}, {"code_dim": 0}, {"channels": (7,)}, {"resolution": 18}):
        with pytest.raises(ValueError):
            DVAEConfig(**{**vars(SIZES), **wrong})


def test_nothing_in_nothing_out():
    model = small_dvae()
    assert model.tokens(torch.zeros(0, 3, 16, 16).double()).shape == (0, 16)
    assert model.decode_tokens(torch.zeros(0, 16, dtype=torch.int64)).shape == (0, 3, 16, 16)


def test_a_small_dvae_learns_eight_pictures(generator):
    torch.manual_seed(0)
    coarse = torch.rand(8, 3, 4, 4, generator=generator) * 1.6 - 0.8
    pictures = F.interpolate(coarse, scale_factor=4)
    sizes = {"resolution": 16, "channels": (16, 32), "blocks": 1, "codebook_size": 64, "code_dim": 16}
    model = DVAE(DVAEConfig(**sizes))
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(200):
        g = gumbel_noise((8, 64, 4, 4), generator)
        output = model(pictures, temperature_at(step / 200), g)
        loss = dvae_loss(pictures, output, kl_weight_at(step / 200, 0.01))
        optimiser.zero_grad()
        loss.total.backward()
        optimiser.step()
    assert loss.total.item() < -1.5  # nats a number, from -0.1
    copies = model.eval().decode_tokens(model.tokens(pictures))
    assert (copies - pictures).square().mean().item() < 0.03  # of grey it is 0.2


# ---------------------------------------------------------------- DALL·E: what looks at what


def test_there_are_logits_for_every_word_and_every_code(indices, caption):
    model = small()
    stream = model(indices, caption)
    assert stream.words.shape == (3, WORDS, VOCABULARY) and stream.picture.shape == (3, N, K)
    for n in (1, 2, 9):  # a beginning gets the logits it has in the whole
        part = model(indices[:, :n], caption)
        assert torch.allclose(part.picture, stream.picture[:, :n], atol=1e-12)
        assert torch.allclose(part.words, stream.words, atol=1e-12)
    assert torch.equal(model.code_logits(indices, caption), stream.picture)


def test_words_hear_the_words_before_them_and_nothing_else(indices, caption):
    model = small()
    before = model(indices[:1], caption[:1]).words
    heard = torch.zeros(WORDS, WORDS, dtype=torch.bool)
    for place in range(WORDS):
        other = caption[:1].clone()
        other[0, place] = 9
        difference = model(indices[:1], other).words - before
        heard[:, place] = difference[0].abs().amax(-1) > 1e-9
    assert torch.equal(heard, torch.ones_like(heard).tril(-1))  # word i of those before i
    assert torch.equal(model((indices[:1] + 1) % K, caption[:1]).words, before)  # and of no code


def test_codes_hear_all_words_and_the_codes_before_them(indices, caption):
    model = small()
    before = model(indices[:1], caption[:1]).picture
    for place in range(WORDS):
        other = caption[:1].clone()
        other[0, place] = 9
        difference = (model(indices[:1], other).picture - before)[0].abs().amax(-1)
        assert (difference > 1e-9).all()
    heard = torch.zeros(N, N, dtype=torch.bool)
    for place in range(N):
        other = indices[:1].clone()
        other[0, place] = (other[0, place] + 1) % K
        difference = model(other, caption[:1]).picture - before
        heard[:, place] = difference[0].abs().amax(-1) > 1e-11
    assert torch.equal(heard, torch.ones_like(heard).tril(-1))


def test_pictures_of_a_batch_do_not_hear_of_each_other(indices, caption):
    model = small()
    together = model(indices, caption)
    for i in range(3):
        alone = model(indices[i : i + 1], caption[i : i + 1])
        assert torch.allclose(alone.picture, together.picture[i : i + 1], atol=1e-12)
        assert torch.allclose(alone.words, together.words[i : i + 1], atol=1e-12)


def test_where_there_is_no_word_a_vector_of_that_place_stands_in(indices, caption, generator):
    model = small()
    before = model(indices, caption).picture
    heard = torch.zeros(3, WORDS, dtype=torch.bool)
    for place in range(WORDS):
        changed = copy.deepcopy(model)
        with torch.no_grad():
            changed.padding[place] = 0.5 * torch.randn(16, generator=generator)
        after = changed(indices, caption).picture
        heard[:, place] = (after - before).abs().amax((1, 2)) > 1e-9
    assert torch.equal(heard, caption == PAD)
    with torch.no_grad():  # the row of the word PAD itself is no input
        model.text_embedding.weight[PAD] = torch.randn(16, generator=generator)
    assert torch.equal(model(indices, caption).picture, before)


def test_a_caption_is_no_bag_of_words(indices, caption):
    model, swapped = small(), caption.clone()
    swapped[:, [0, 1]] = caption[:, [1, 0]]
    difference = model(indices, swapped).picture - model(indices, caption).picture
    assert (difference.abs().amax((1, 2)) > 0.01).all()


def test_rows_and_columns_are_told_apart(indices, caption, generator):
    model = small()
    constant = torch.zeros_like(indices)
    for what in (model.row, model.column):
        before = model(constant, caption).picture
        with torch.no_grad():
            what[1] = torch.randn(what[1].shape, generator=generator)
        after = model(constant, caption).picture
        changed = ((after - before).abs().amax((0, 2)) > 1e-9).nonzero()[:, 0]
        # The first place in row 1 is the fifth code, in column 1 the second; what reads it is next.
        assert changed[0] == (SIDE + 1 if what is model.row else 2)


def test_words_and_codes_have_one_matrix_each_in_and_out(indices, caption):
    model = small()
    before = model(indices[:, :1], caption)
    with torch.no_grad():
        model.image_embedding.weight[4] *= 2
        model.text_embedding.weight[2] *= 2  # NULL, which these captions do not say
    after = model(indices[:, :1], caption)
    assert torch.allclose(after.picture[..., 4], 2 * before.picture[..., 4], atol=1e-12)
    assert torch.allclose(after.words[..., 2], 2 * before.words[..., 2], atol=1e-12)
    assert torch.allclose(after.words[..., 3:], before.words[..., 3:], atol=1e-12)


def test_no_caption_does_not_say_what_a_caption_says(indices, caption):
    model = small()
    null = model(indices, null_caption(3, WORDS)).picture
    assert ((null - model(indices, caption).picture).abs().amax((1, 2)) > 0.01).all()


def test_words_codes_and_places_start_at_one_scale():
    torch.manual_seed(0)
    model = DALLE(PriorConfig(64, 8, 64, 1, 2, vocabulary=64, text_length=16))
    parts = (model.text_embedding.weight, model.image_embedding.weight, model.padding)
    for part in (*parts, model.word_position, model.row, model.column):
        assert part.std().item() == pytest.approx(0.02, rel=0.2)


# ---------------------------------------------------------------- DALL·E: the loss


def test_the_loss_counts_words_and_codes_by_their_own_means(indices, caption, generator):
    words = torch.randn(3, WORDS, VOCABULARY, generator=generator, dtype=torch.float64)
    picture = torch.randn(3, N, K, generator=generator, dtype=torch.float64)
    loss = dalle_loss(DALLEOutput(words, picture), caption, indices)
    said, nats = 0, 0.0
    for b in range(3):
        for t in range(WORDS):
            if caption[b, t] != PAD:  # END counts, padding does not
                nats -= words[b, t].log_softmax(0)[caption[b, t]].item()
                said += 1
    assert said == 12 and loss.words.item() == pytest.approx(nats / 12, rel=1e-12)
    by_hand = -picture.log_softmax(-1).gather(2, indices[..., None]).mean()
    assert loss.picture.item() == pytest.approx(by_hand.item(), rel=1e-12)
    assert loss.total.item() == pytest.approx(nats / 12 / 8 + 7 / 8 * by_hand.item(), rel=1e-12)
    for share in (0.0, 0.3, 1.0):
        total = dalle_loss(DALLEOutput(words, picture), caption, indices, share).total
        assert torch.allclose(total, share * loss.words + (1 - share) * loss.picture)


def test_captions_left_out_are_not_learned(indices, caption):
    model, mixed = small(), caption.clone()
    mixed[1] = null_caption(1, WORDS)[0]
    stream = model(indices, mixed)
    loss = dalle_loss(stream, mixed, indices)
    rows = torch.tensor([0, 2])
    only = dalle_loss(DALLEOutput(*(part[rows] for part in stream)), mixed[rows], indices[rows])
    assert torch.allclose(loss.words, only.words, atol=1e-12)
    whole = F.cross_entropy(stream.picture.flatten(0, 1), indices.flatten())
    assert torch.allclose(loss.picture, whole)  # the picture of a caption left out is learned


def test_without_any_word_the_words_cost_nothing_and_nothing_is_nan(indices):
    model, null = small(), null_caption(3, WORDS)
    loss = dalle_loss(model(indices, null), null, indices)
    assert loss.words.item() == 0 and loss.total.isfinite()
    assert torch.allclose(loss.total, 7 / 8 * loss.picture)
    loss.total.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_the_loss_stays_in_float32_under_autocast_and_in_float64_where_it_can(indices, caption):
    model = small()
    assert dalle_loss(model(indices, caption), caption, indices).total.dtype == torch.float64
    model = model.float()
    with torch.autocast("cpu", torch.bfloat16):
        stream = model(indices, caption)
        loss = dalle_loss(stream, caption, indices)
    assert stream.picture.dtype == torch.bfloat16  # autocast was really on
    assert {term.dtype for term in loss} == {torch.float32}
    half = dalle_loss(DALLEOutput(*(part.bfloat16() for part in stream)), caption, indices)
    assert {term.dtype for term in half} == {torch.float32}  # also where no autocast helps
    exact = dalle_loss(DALLEOutput(*(part.double() for part in stream)), caption, indices)
    for a, b in zip(loss, exact, strict=True):
        assert a.item() == pytest.approx(b.item(), abs=1e-6)


def test_the_terms_move_words_and_codes(indices, caption):
    model = small()
    loss = dalle_loss(model(indices, caption), caption, indices)
    words, picture = moved(loss.words, model), moved(loss.picture, model)
    everything = {name for name, _ in model.named_parameters()}
    of_pictures = {"image_embedding.weight", "row", "column"}
    # No word looks ahead, and after padding no word comes that would be counted.
    assert words == everything - of_pictures - {"padding"}
    assert picture == everything
    rows = torch.autograd.grad(loss.words, model.starts, retain_graph=True)[0].abs().sum((1, 2, 3))
    assert rows[0] > 0 and rows[1] == 0  # the start of the picture comes after all words


def test_every_parameter_learns(indices, caption):
    torch.manual_seed(0)
    model = DALLE(small().config)
    dalle_loss(model(indices, caption), caption, indices).total.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


@pytest.mark.parametrize("share", [-0.1, 1.1, math.nan])
def test_a_share_that_is_none_is_refused(share, indices, caption):
    with pytest.raises(ValueError, match=r"words' share of the loss must be in \[0, 1\]"):
        dalle_loss(small()(indices, caption), caption, indices, share)


def test_captions_are_dropped_at_the_rate_of_the_recipe(generator):
    from t2ilearn.recipes import DROP_CAPTIONS

    caption = torch.full((8000, WORDS), 3)
    dropped = drop_captions(caption, DROP_CAPTIONS, generator)
    rate = (dropped[:, 0] == NULL).double().mean().item()
    assert abs(rate - 0.1) < 5 * (0.09 / 8000) ** 0.5


# ---------------------------------------------------------------- DALL·E: drawing


def logits_while_drawing(monkeypatch, model, indices, caption, **how):
    """The logits behind each draw while exactly these codes are drawn: (B, steps, K)."""
    seen, first = [], how["start"].shape[1] if "start" in how else 0

    def forced(logits, *_):
        seen.append(logits)
        return indices[:, first + len(seen) - 1]

    with monkeypatch.context() as patch:
        patch.setattr(sampling, "sample_from_logits", forced)
        (*_, last) = sample_steps(model, caption, **how)
    assert torch.equal(last, indices)
    return torch.stack(seen, dim=1)


@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5])
@pytest.mark.parametrize("given", [0, 1, 8, N - 1])
def test_cached_is_uncached_is_the_whole(monkeypatch, dtype, atol, scale, given, indices, caption):
    model = small().to(dtype)
    how = {"guidance_scale": scale, **({"start": indices[:, :given]} if given else {})}
    cached, uncached = (
        logits_while_drawing(monkeypatch, model, indices, caption, use_cache=use_cache, **how)
        for use_cache in (True, False)
    )
    c = model(indices, caption).picture
    u = model(indices, null_caption(3, WORDS)).picture
    whole = (u + scale * (c - u))[:, given:]
    assert (c - u).abs().max() > 0.01 and cached.dtype == dtype
    assert (cached - uncached).abs().max() <= atol
    assert (cached - whole).abs().max() <= atol and (uncached - whole).abs().max() <= atol


def test_a_cache_saves_work_and_has_room_for_the_whole_stream(caption, generator):
    model, lengths = small(), []
    model.blocks[0].register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1]))
    sample(model, caption, generator=generator)
    assert lengths == [1 + WORDS + 1] + [1] * (N - 1)
    assert [c.keys.shape for c in model.new_caches(4)] == [(4, 2, 1 + WORDS + N, 8)] * 3


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("given", [0, 6])
def test_drawing_changes_neither_prompt_nor_start_nor_model(scale, given, indices, caption):
    model = small().train()
    words, start = caption.clone(), indices[:, :given].clone()
    state = copy.deepcopy(model.state_dict())
    random = torch.random.get_rng_state()

    def draw(seed):
        how = {"guidance_scale": scale, "start": start if given else None, "top_p": 0.9}
        return sample(model, words, generator=torch.Generator().manual_seed(seed), **how)

    first = draw(1)
    assert torch.equal(words, caption) and torch.equal(start, indices[:, :given])
    assert torch.equal(first[:, :given], start)
    assert torch.equal(draw(1), first) and not torch.equal(draw(2), first)
    assert torch.equal(torch.random.get_rng_state(), random) and model.training
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())


def test_scale_one_is_the_conditional_and_scale_zero_the_unconditional_model(caption):
    model = small()

    def draw(caption, **how):
        return sample(model, caption, generator=torch.Generator().manual_seed(1), **how)

    unconditional = draw(null_caption(3, WORDS))
    assert torch.equal(draw(caption, guidance_scale=1.0), draw(caption))
    assert torch.equal(draw(caption, guidance_scale=0.0), unconditional)
    assert torch.equal(draw(null_caption(3, WORDS), guidance_scale=4.0), unconditional)
    assert not torch.equal(draw(caption), unconditional)
    assert not torch.equal(draw(caption, guidance_scale=4.0), draw(caption))


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_temperature_0_takes_the_likeliest_code_whatever_the_seed(scale, indices, caption):
    model = small()
    how = {"temperature": 0.0, "guidance_scale": scale}
    a, b = (
        sample(model, caption, generator=torch.Generator().manual_seed(s), **how) for s in (1, 2)
    )
    assert torch.equal(a, b) and a.unique().numel() > 1
    c, u = model(a, caption).picture, model(a, null_caption(3, WORDS)).picture
    assert torch.equal((u + scale * (c - u)).argmax(-1), a)


def test_the_likelihood_of_a_picture_is_of_its_codes_and_not_of_its_words(indices, caption):
    model = small()
    found = log_likelihood(model, indices, caption)
    for row in range(3):
        q, c = indices[row : row + 1], caption[row : row + 1]
        loss = dalle_loss(model(q, c), c, q)
        assert found[row].item() == pytest.approx(-N * loss.picture.item(), rel=1e-5)
    assert found.shape == (3,) and found.unique().numel() == 3


def test_drawing_works_under_autocast_and_where_the_weights_are(device, caption, generator):
    model, caption = small().float().to(device), caption.to(device)
    with torch.autocast(device.type, torch.bfloat16):
        drawn = sample(model, caption, generator=generator, guidance_scale=2.0, top_k=5, top_p=0.9)
    assert drawn.shape == (3, N) and drawn.device.type == device.type
    assert dalle_loss(model(drawn, caption), caption, drawn).total.isfinite()


def test_a_dalle_learns_eight_pictures_and_their_captions():
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    indices = torch.randint(32, (8, N), generator=generator)
    caption = torch.stack([torch.randperm(8, generator=generator)[:WORDS] for _ in indices]) + 3
    caption[:, -1] = END
    # Two captions of the same words in another order have other pictures.
    caption[1, :4] = caption[0, [1, 0, 2, 3]]
    model = DALLE(PriorConfig(32, SIDE, 48, 2, 2, VOCABULARY, WORDS))
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(150):
        loss = dalle_loss(model(indices, caption), caption, indices)
        optimiser.zero_grad()
        loss.total.backward()
        optimiser.step()
    assert loss.picture.item() < 0.05  # from ln 32 = 3.5
    assert loss.words.item() < 0.7  # from ln 11; which of eight begins, nobody can know: ln 8 / 5
    drawn = sample(model.eval(), caption, temperature=0.0, generator=generator)
    assert (drawn == indices).float().mean() > 0.99


# ---------------------------------------------------------------- DALL·E: bad input


def word_ids(*shape):
    return torch.full(shape, 3)


def test_a_dalle_without_words_is_refused():
    with pytest.raises(ValueError, match="vocabulary cannot be 0"):
        DALLE(PriorConfig(codebook_size=K, side=SIDE, dim=16, num_layers=1, num_heads=2))


@pytest.mark.parametrize(
    "caption, said",
    [
        (None, "with captions: give one"),
        (word_ids(3, WORDS - 1), r"shape \(B, 5\), not \(3, 4\)"),
        (word_ids(3, WORDS + 1), r"shape \(B, 5\), not \(3, 6\)"),
        (word_ids(3, WORDS) + VOCABULARY - 3, "Word ids go up to 10, not 11"),
        (word_ids(3, WORDS) - 4, "Word ids"),
        (word_ids(3, WORDS) * 0, "all padding"),
        (word_ids(2, WORDS), "3 pictures but 2 captions"),
    ],
)
def test_what_is_no_caption_is_refused(unchecked, caption, said, indices, generator):
    model = small()
    with pytest.raises(ValueError, match=said):
        model(indices, caption)
    for use_cache in (True, False):
        with pytest.raises(ValueError, match=said):
            how = {"start": indices[:, :4], "use_cache": use_cache}
            sample(model, caption, generator=generator, **how)


@pytest.mark.parametrize(
    "indices, said",
    [
        (torch.zeros(3, N + 1, dtype=torch.int64), "At most 16 codes"),
        (torch.zeros(3, SIDE, SIDE, dtype=torch.int64), "At most 16 codes"),
        (torch.full((3, 4), K), "from 0 to 6; these are 7"),
        (torch.full((3, 4), -1), "from 0 to 6; these are -1"),
    ],
)
def test_what_are_no_codes_is_refused(unchecked, indices, said, caption, generator):
    model = small()
    with pytest.raises(ValueError, match=said):
        model(indices, caption)
    with pytest.raises(ValueError, match=said):
        sample(model, caption, start=indices, generator=generator)


@pytest.mark.parametrize(
    "how, said",
    [
        ({"temperature": -0.1}, "temperature must be 0"),
        ({"temperature": math.nan}, "temperature must be 0"),
        ({"top_k": 0}, "top-k must be 1 … 7, not 0"),
        ({"top_k": K + 1}, "top-k must be 1 … 7, not 8"),
        ({"top_p": 0.0}, r"top-p must be in \(0, 1\], not 0.0"),
        ({"guidance_scale": -1.0}, "guidance scale must be 0 or more, not -1"),
        ({"start": torch.zeros(3, N, dtype=torch.int64)}, "All 16 codes are given"),
    ],
)
def test_what_cannot_be_sampled_with_is_refused(how, said, caption, generator):
    with pytest.raises(ValueError, match=said):
        sample(small(), caption, generator=generator, **how)


# ---------------------------------------------------------------- going on from half a picture


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_what_is_below_the_kept_rows_is_never_looked_at(rows, x, generator):
    model = small_dvae().eval()
    kept = encode_prefix(model, x, rows)
    assert kept.shape == (4, rows * 4) and kept.dtype == torch.int64
    other = x.clone()
    other[:, :, 4 * rows :] = torch.rand(other[:, :, 4 * rows :].shape, generator=generator) * 2 - 1
    assert torch.equal(encode_prefix(model, other, rows), kept)
    # An encoder that sees the rest says something else: there is something to hide.
    logits, hidden = model.logits(x)[:, :, :rows], model.logits(other)[:, :, :rows]
    assert not torch.allclose(logits, hidden)
    other = x.clone()
    other[:, :, : 4 * rows] *= -1
    assert not torch.equal(encode_prefix(model, other, rows), kept)


def test_below_stands_each_column_s_last_pixel(x, monkeypatch):
    model, seen = small_dvae().eval(), []
    monkeypatch.setattr(model, "tokens", lambda x: seen.append(x) or torch.zeros(4, 16).long())
    before = x.clone()
    encode_prefix(model, x, 2)
    assert torch.equal(x, before) and torch.equal(seen[0][:, :, :8], x[:, :, :8])
    assert (seen[0][:, :, 8:] == x[:, :, 7:8]).all()


def test_the_codes_kept_are_those_of_a_picture_that_ends_there(x):
    model = small_dvae().eval()
    closed = x.clone()
    closed[:, :, 8:] = closed[:, :, 7:8]
    assert torch.equal(encode_prefix(model, x, 2), model.tokens(closed)[:, :8])


def with_one(x, value):
    x = x.clone()
    x[1, 2, 15, 3] = value
    return x


@pytest.mark.parametrize("value", [1.01, -1.5, math.nan, math.inf, -math.inf])
def test_pictures_of_another_range_have_no_beginning(value, x):
    with pytest.raises(ValueError, match=r"Pictures lie in \[−1, 1\]; these go from"):
        encode_prefix(small_dvae(), with_one(x, value), 2)
    encode_prefix(small_dvae(), with_one(with_one(x, 1.0), -1.0), 2)


@pytest.mark.parametrize("rows", [0, 4, 5, -1])
def test_all_or_no_rows_are_no_beginning(rows, x):
    with pytest.raises(ValueError, match=f"Keep 1 … 3 rows of codes, not {rows}"):
        encode_prefix(small_dvae(), x, rows)


def test_pictures_of_another_size_have_no_beginning(unchecked):
    for wrong in (torch.zeros(2, 3, 8, 16), torch.zeros(3, 16, 16), torch.zeros(2, 1, 16, 16)):
        with pytest.raises(ValueError, match="16"):
            encode_prefix(small_dvae(), wrong.double(), 2)


def test_what_is_drawn_begins_with_the_beginning(x, generator):
    first = small_dvae(codebook_size=K).eval()
    start = encode_prefix(first, x, 2)
    caption = word_ids(4, WORDS)
    drawn = sample(small(), caption, start=start, guidance_scale=2.0, generator=generator)
    assert torch.equal(drawn[:, :8], start) and drawn.shape == (4, N)
    assert first.decode_tokens(drawn).shape == x.shape


# ---------------------------------------------------------------- keeping the best of many


@pytest.fixture
def candidates(generator):
    pictures = torch.rand(6, 3, 4, 4, generator=generator)
    return Candidates(pictures, torch.randint(K, (6, N), generator=generator), list("abcdef"))


def test_of_each_row_the_scorer_s_favourite_is_kept(candidates):
    seen = []

    def scorer(among):
        seen.append(among)
        return torch.tensor([0.0, 2.0, 1.0, -5.0, -4.0, -3.0])

    pictures, kept = rerank(candidates, 3, scorer)
    assert kept.tolist() == [1, 5] and torch.equal(pictures, candidates.pictures[[1, 5]])
    assert seen[0] is candidates
    pictures, kept = rerank(candidates, 1, scorer)
    assert kept.tolist() == list(range(6)) and torch.equal(pictures, candidates.pictures)
    assert rerank(candidates, 6, scorer)[1].tolist() == [1]


def test_scorers_see_pictures_codes_and_captions(candidates):
    by_codes = rerank(candidates, 3, lambda among: among.indices.double().mean(1))[1]
    rows = candidates.indices.double().mean(1).view(2, 3)
    assert by_codes.tolist() == [0 + rows[0].argmax(), 3 + rows[1].argmax()]
    by_words = rerank(
        candidates, 2, lambda among: torch.tensor([float(ord(c)) for c in among.captions])
    )[1]
    assert by_words.tolist() == [1, 3, 5]


def test_of_equals_one_is_kept_and_always_the_same(candidates):
    kept = [rerank(candidates, 3, lambda among: torch.zeros(6))[1].tolist() for _ in range(3)]
    assert kept[0] == kept[1] == kept[2] and kept[0][0] < 3 <= kept[0][1]
    kept = rerank(candidates, 3, lambda among: torch.tensor([-math.inf] * 5 + [0.0]))[1]
    assert kept[1] == 5


@pytest.mark.parametrize("best_of", [0, -1, 4, 12])
def test_what_makes_no_whole_rows_is_refused(candidates, best_of):
    with pytest.raises(ValueError, match=f"6, 6, 6 pictures.* make no rows of {best_of}"):
        rerank(candidates, best_of, lambda among: torch.zeros(6))


def test_candidates_of_unequal_number_are_refused(unchecked, candidates):
    for wrong in (
        candidates._replace(captions=list("abcde")),
        candidates._replace(indices=candidates.indices[:4]),
    ):
        with pytest.raises(ValueError, match="make no rows of 2"):
            rerank(wrong, 2, lambda among: torch.zeros(6))


@pytest.mark.parametrize(
    "scores", [torch.zeros(3), torch.zeros(6, 1), torch.tensor([0.0, math.nan, 1, 2, 3, 4])]
)
def test_a_scorer_has_one_number_for_each(unchecked, candidates, scores):
    with pytest.raises(ValueError, match="a number of each of 6 candidates, none of them NaN"):
        rerank(candidates, 3, lambda among: scores)


def test_no_candidates_no_pictures():
    nobody = Candidates(torch.zeros(0, 3, 4, 4), torch.zeros(0, N, dtype=torch.int64), [])
    pictures, kept = rerank(nobody, 4, lambda among: torch.zeros(0))
    assert pictures.shape == (0, 3, 4, 4) and kept.shape == (0,)


def test_the_paper_s_constants():
    assert (EPSILON, dalle.TEXT_WEIGHT) == (0.1, 1 / 8)
