"""DALL·E: the dVAE and its Gumbel-softmax, text and image tokens in one output, completion."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from t2ilearn.models import sampling
from t2ilearn.models.dalle import DALLE, TEXT_WEIGHT, DALLEOutput, dalle_loss, encode_prefix
from t2ilearn.models.dvae import (
    DVAE,
    EPSILON,
    KL_WEIGHT,
    MIN_LOG_SCALE,
    TEMPERATURE_END,
    TEMPERATURE_START,
    DVAEConfig,
    DVAEOutput,
    dvae_loss,
    gumbel_noise,
    gumbel_softmax,
    kl_weight_at,
    logit_laplace,
    map_pixels,
    temperature_at,
    unmap_pixels,
)
from t2ilearn.models.sampling import sample, sample_steps
from t2ilearn.models.tokens import END, NULL, PAD, null_caption
from t2ilearn.models.transformer import PriorConfig, drop_captions, log_likelihood
from t2ilearn.systems.base import Candidates, rerank

K, SIDE, TEXT, VOCABULARY = 7, 4, 5, 11
N = SIDE**2
SIZES = DVAEConfig(resolution=16, channels=(8, 16), blocks=1, codebook_size=6, code_dim=5)


def small_dvae(**sizes) -> DVAE:
    """A dVAE in float64, always with the same weights."""
    torch.manual_seed(0)
    return DVAE(DVAEConfig(**{**vars(SIZES), **sizes})).double()


def small(**sizes) -> DALLE:
    """A DALL·E in float64 with weights so large that every dependence is measurable."""
    torch.manual_seed(0)
    given = {"codebook_size": K, "side": SIDE, "dim": 16, "num_layers": 3, "num_heads": 2}
    text = {"vocabulary": VOCABULARY, "text_length": TEXT}
    model = DALLE(PriorConfig(**{**given, **text, **sizes})).double()
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
    """Captions of four, three and two tokens with their end, then padding."""
    return torch.tensor([[3, 4, 5, 6, END], [7, 8, 9, END, PAD], [10, 3, END, PAD, PAD]])


def trained(loss, module):
    """The names of parameters that a loss has a gradient for."""
    names, parameters = zip(*module.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    found = zip(names, gradients, strict=True)
    return {name for name, g in found if g is not None and g.abs().max() > 0}


# ---------------------------------------------------------------- the Gumbel-softmax


def test_gumbel_noise_has_the_distribution_of_gumbel(generator):
    n = 200_000
    g = gumbel_noise((n,), generator, torch.float64)
    deviation = math.pi / 6**0.5
    assert abs(g.mean().item() - 0.5772156649) < 5 * deviation / n**0.5
    assert g.std().item() == pytest.approx(deviation, rel=0.01)
    # P(g ≤ t) = exp(−exp(−t)), at the quartiles and far out
    for share in (0.01, 0.25, 0.5, 0.75, 0.99):
        below = (g <= -math.log(-math.log(share))).double().mean().item()
        assert abs(below - share) < 5 * (share * (1 - share) / n) ** 0.5


def test_the_argmax_of_logits_with_gumbel_noise_is_a_sample_from_the_softmax(generator):
    logits = torch.tensor([2.0, 0.0, -1.0, 1.0, -3.0])
    n = 50_000
    g = gumbel_noise((n, 5), generator)
    seen = torch.bincount((logits + g).argmax(1), minlength=5).double()
    wanted = n * logits.double().softmax(0)
    chi_square = ((seen - wanted) ** 2 / wanted).sum().item()
    assert chi_square < 18.5  # 4 degrees of freedom: one seed in a thousand is above
    plain = torch.bincount((logits + torch.randn(n, 5, generator=generator)).argmax(1))
    assert ((plain.double() - wanted) ** 2 / wanted).sum() > 100  # other noise has another result


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("u", [0.0, 1 - 2**-24])
def test_gumbel_noise_is_finite_at_both_ends_of_u(monkeypatch, dtype, u, generator):
    monkeypatch.setattr(torch, "rand", lambda s, generator, dtype: torch.full(s, u, dtype=dtype))
    g = gumbel_noise((3,), generator, dtype)
    assert g.isfinite().all() and g.dtype == dtype
    assert (g < -4).all() if u == 0 else (g > 15).all()


def test_gumbel_noise_draws_random_numbers_from_its_generator_only():
    state = torch.random.get_rng_state()
    a, b, c = (gumbel_noise((2, 3), torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_gumbel_softmax_is_one_hot_at_low_and_uniform_at_high_temperature(generator):
    logits = torch.randn(3, 6, 2, 2, generator=generator, dtype=torch.float64)
    g = gumbel_noise((3, 6, 2, 2), generator, torch.float64)
    hard = F.one_hot((logits + g).argmax(1), 6).movedim(-1, 1).double()
    assert torch.allclose(gumbel_softmax(logits, g, 1e-4), hard, atol=1e-9)
    assert torch.allclose(gumbel_softmax(logits, g, 1e7), torch.full_like(hard, 1 / 6), atol=1e-6)
    y = gumbel_softmax(logits, g, 0.5)
    assert torch.allclose(y.sum(1), torch.ones(3, 2, 2, dtype=torch.float64)) and (y > 0).all()
    by_hand = ((logits + g) / 0.5).exp()
    assert torch.allclose(y, by_hand / by_hand.sum(1, keepdim=True), atol=1e-12)


def test_a_hard_gumbel_softmax_is_one_hot_with_the_gradient_of_the_soft_one(generator):
    logits = torch.randn(3, 6, 2, 2, generator=generator, dtype=torch.float64).requires_grad_()
    g = gumbel_noise((3, 6, 2, 2), generator, torch.float64)
    weight = torch.randn(3, 6, 2, 2, generator=generator, dtype=torch.float64)
    soft, hard = gumbel_softmax(logits, g, 0.5), gumbel_softmax(logits, g, 0.5, hard=True)
    one_hot = F.one_hot(soft.argmax(1), 6).movedim(-1, 1).double()
    assert torch.allclose(hard, one_hot, atol=1e-15) and not torch.allclose(soft, one_hot, atol=0.1)
    gradients = [torch.autograd.grad((weight * y).sum(), logits)[0] for y in (soft, hard)]
    assert torch.equal(*gradients) and gradients[0].any()


@pytest.mark.parametrize("wrong", [0.0, -1.0, math.nan, math.inf])
def test_a_temperature_not_above_0_is_an_error(wrong, noise, x):
    message = f"Gumbel-softmax's temperature must be above 0, not {wrong}"
    with pytest.raises(ValueError, match=message):
        gumbel_softmax(torch.zeros_like(noise), noise, wrong)
    with pytest.raises(ValueError, match=message):
        small_dvae()(x, wrong, noise)


# ---------------------------------------------------------------- the dVAE


def test_shapes_of_the_dvae(x, noise):
    model = small_dvae()
    output = model(x, 1.0, noise)
    assert output.logits.shape == (4, 6, 4, 4)
    assert output.mean.shape == output.log_scale.shape == (4, 3, 16, 16)
    tokens = model.tokens(x)
    assert tokens.shape == (4, 16) and tokens.dtype == torch.int64
    assert model.decode_tokens(tokens).shape == (4, 3, 16, 16)


def test_a_generator_gives_the_dvae_the_noise_of_gumbel_noise(x):
    model = small_dvae()
    noise = gumbel_noise((4, 6, 4, 4), torch.Generator().manual_seed(5), torch.float64)
    with_noise = model(x, 0.7, noise)
    with_generator = model(x, 0.7, generator=torch.Generator().manual_seed(5))
    assert all(torch.equal(a, b) for a, b in zip(with_noise, with_generator, strict=True))


def test_the_decoder_receives_the_mixture_of_code_vectors_at_each_place(monkeypatch, x, noise):
    model, seen = small_dvae(), []
    model.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    output = model(x, 0.7, noise)
    y = gumbel_softmax(output.logits, noise, 0.7)
    b, i, j = 2, 3, 1
    by_hand = sum(y[b, k, i, j] * model.codebook[k] for k in range(6))
    assert torch.allclose(seen[0][b, :, i, j], by_hand, atol=1e-12)


def test_tokens_of_the_dvae_are_the_likeliest_ones_row_by_row_without_noise(x, noise):
    model = small_dvae().train()
    logits = model.logits(x)
    tokens = model.tokens(x)
    assert tokens[1, 4 * 2 + 3] == logits[1, :, 2, 3].argmax() and tokens.unique().numel() > 1
    state = torch.random.get_rng_state()
    model(x, 1.0, noise)
    assert torch.equal(model.tokens(x), tokens)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_sample_at_low_temperature_without_noise_decodes_as_its_tokens(x, noise):
    model = small_dvae()
    output = model(x, 1e-5, torch.zeros_like(noise))
    picture = 2 * (output.mean.sigmoid() - EPSILON) / (1 - 2 * EPSILON) - 1
    assert torch.allclose(model.decode_tokens(model.tokens(x)), picture, atol=1e-8)


def test_decoding_inverts_map_pixels(x):
    model = small_dvae()
    model.picture = lambda mixture: (map_pixels(x).logit(), torch.zeros_like(x))
    assert torch.allclose(model.decode_tokens(torch.zeros(4, 16, dtype=torch.int64)), x, atol=1e-12)
    ends = map_pixels(torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64))
    assert ends.tolist() == pytest.approx([0.1, 0.5, 0.9])
    assert torch.allclose(unmap_pixels(map_pixels(x)), x, atol=1e-12)


def test_a_dvae_begins_as_an_autoencoder():
    """A soft sample without noise is a projection of the features; from random logits it is not."""

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


def test_the_scale_of_the_decoder_has_a_minimum(x, noise):
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


def test_the_likelihood_equals_the_formula_of_the_paper():
    x, mean, log_scale = (torch.tensor(v, dtype=torch.float64) for v in (0.3, -0.4, 0.2))
    b = math.exp(0.2)
    density = math.exp(-abs(math.log(0.3 / 0.7) + 0.4) / b) / (2 * b * 0.3 * 0.7)
    assert logit_laplace(x, mean, log_scale).item() == pytest.approx(-math.log(density), rel=1e-12)


def output_with(logits, x):
    """An output with these logits, of a decoder that predicts the same everywhere."""
    return DVAEOutput(logits, torch.zeros_like(x), torch.zeros_like(x))


def test_the_kl_term_is_0_for_uniform_logits_and_ln_k_per_token_for_certain_ones(x, generator):
    even = dvae_loss(x, output_with(torch.full((4, 6, 4, 4), 3.0, dtype=torch.float64), x))
    assert even.kl.item() == pytest.approx(0, abs=1e-12)
    chosen = torch.randint(6, (4, 4, 4), generator=generator)
    certain = 1e4 * F.one_hot(chosen, 6).movedim(-1, 1).double()
    found = dvae_loss(x, output_with(certain, x)).kl.item()
    assert found == pytest.approx(math.log(6) * 16 / (3 * 16 * 16), rel=1e-12)


def test_the_kl_term_equals_its_formula(x, generator):
    logits = torch.randn(4, 6, 4, 4, generator=generator, dtype=torch.float64)
    q = logits.softmax(1)
    by_hand = 0.0
    for b in range(4):
        for k in range(6):
            for place in range(16):
                p = q[b, k].flatten()[place].item()
                by_hand += p * math.log(p * 6) / 4
    assert dvae_loss(x, output_with(logits, x)).kl.item() == pytest.approx(by_hand / 768)


def test_a_nat_per_token_counts_beta_over_192_as_in_the_paper():
    # 64 × 64 pixels with 8 × 8 tokens; the paper's 256 × 256 with 32 × 32 have the same ratio.
    x = torch.zeros(1, 3, 64, 64, dtype=torch.float64)
    certain = torch.zeros(1, 1024, 8, 8, dtype=torch.float64)
    certain[:, 5] = 1e4
    loss = dvae_loss(x, output_with(certain, x), 3.0)
    assert (loss.total - loss.reconstruction).item() == pytest.approx(3 * math.log(1024) / 192)
    assert 64 * 64 * 3 / 64 == 256 * 256 * 3 / 1024 == 192


def test_the_reconstruction_term_is_the_mean_over_the_values_of_a_picture(x, noise):
    output = small_dvae()(x, 1.0, noise)
    loss = dvae_loss(x, output, 2.5)
    mapped = (1 - 2 * EPSILON) * (x + 1) / 2 + EPSILON
    by_hand = logit_laplace(mapped, output.mean, output.log_scale).sum() / (4 * 3 * 16 * 16)
    assert loss.reconstruction.item() == pytest.approx(by_hand.item(), rel=1e-12)
    assert torch.allclose(loss.total, loss.reconstruction + 2.5 * loss.kl)
    default = dvae_loss(x, output)
    assert torch.allclose(default.total, loss.reconstruction + 6.6 * loss.kl)
    assert KL_WEIGHT == 6.6


def test_each_term_of_the_dvae_loss_has_gradients_for_its_own_parts(x, noise):
    model = small_dvae()
    loss = dvae_loss(x, model(x, 1.0, noise))
    parts = [{name.split(".")[0] for name in trained(term, model)} for term in loss]
    assert parts[0] == parts[2] == {"encoder", "codebook", "decoder"} and parts[1] == {"encoder"}


def test_the_dvae_changes_no_argument_in_place(x, noise):
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
    assert (
        torch.equal(x, before[0]) and torch.equal(noise, before[1]) and torch.equal(indices, same)
    )
    assert all(torch.equal(a, b) for a, b in zip(output, kept, strict=True))
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())


def test_logits_and_losses_stay_in_float32_under_autocast(x, noise):
    model, x, noise = small_dvae().float(), x.float(), noise.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert model.encoder(x).dtype == torch.bfloat16  # autocast is active
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


def test_the_temperature_falls_from_1_to_one_sixteenth():
    assert temperature_at(0.0) == TEMPERATURE_START == 1 and TEMPERATURE_END == 1 / 16
    assert temperature_at(0.5) == temperature_at(0.8) == temperature_at(1.0) == 1 / 16
    assert temperature_at(0.25) == pytest.approx((1 + 1 / 16) / 2)  # half-way at half the time
    assert temperature_at(0.1, until=0.1) == 1 / 16 and temperature_at(0.9, until=1.0) > 1 / 16
    values = [temperature_at(i / 1000) for i in range(501)]
    assert all(a > b for a, b in zip(values, values[1:], strict=False))
    assert values[0] - values[1] < (values[250] - values[251]) / 10  # slowly at first


def test_the_kl_weight_rises_from_0_to_its_maximum():
    assert kl_weight_at(0.0) == 0 and kl_weight_at(0.1) == kl_weight_at(1.0) == 6.6
    assert kl_weight_at(0.05) == pytest.approx(3.3) and kl_weight_at(1.0, top=0.5) == 0.5
    values = [kl_weight_at(i / 1000, until=0.5) for i in range(501)]
    assert all(a < b for a, b in zip(values, values[1:], strict=False)) and values[-1] == 6.6


def test_schedules_depend_on_the_share_of_the_training_only():
    """Twice, in another order, or after a restart they have the same values."""
    shares = [i / 50 for i in range(51)]
    once = [(temperature_at(s), kl_weight_at(s)) for s in shares]
    again = [(temperature_at(s), kl_weight_at(s)) for s in reversed(shares) for _ in range(2)]
    assert again[::2] == again[1::2] == once[::-1]


# ---------------------------------------------------------------- the dVAE, bad input


@pytest.mark.parametrize(
    "indices, message",
    [
        (torch.zeros(2, 15, dtype=torch.int64), r"4² tokens: \(B, 16\), not \(2, 15\)"),
        (torch.zeros(2, 4, 4, dtype=torch.int64), r"not \(2, 4, 4\)"),
        (torch.full((2, 16), 6), "numbers from 0 to 5; these are 6 … 6"),
        (torch.full((2, 16), -1), "numbers from 0 to 5; these are -1"),
    ],
)
def test_decoding_tokens_of_another_number_or_range_is_an_error(unchecked, indices, message):
    with pytest.raises(ValueError, match=message):
        small_dvae().decode_tokens(indices)


def test_pictures_of_another_size_are_an_error_for_the_dvae(unchecked, noise):
    model = small_dvae()
    for wrong in (torch.zeros(2, 3, 8, 16), torch.zeros(2, 1, 16, 16), torch.zeros(3, 16, 16)):
        for what in (model.tokens, model.logits, lambda x: model(x, 1.0, noise)):
            with pytest.raises(ValueError, match="16"):
                what(wrong.double())


def test_sizes_that_do_not_fit_together_are_an_error():
    for wrong in ({"codebook_size": 1}, {"code_dim": 0}, {"channels": (7,)}, {"resolution": 18}):
        with pytest.raises(ValueError):
            DVAEConfig(**{**vars(SIZES), **wrong})


def test_an_empty_batch_has_empty_results():
    model = small_dvae()
    assert model.tokens(torch.zeros(0, 3, 16, 16).double()).shape == (0, 16)
    assert model.decode_tokens(torch.zeros(0, 16, dtype=torch.int64)).shape == (0, 3, 16, 16)


def test_a_small_dvae_learns_eight_pictures(generator):
    torch.manual_seed(0)
    coarse = torch.rand(8, 3, 4, 4, generator=generator) * 1.6 - 0.8
    pictures = F.interpolate(coarse, scale_factor=4)
    sizes = {
        "resolution": 16,
        "channels": (16, 32),
        "blocks": 1,
        "codebook_size": 64,
        "code_dim": 16,
    }
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


# ---------------------------------------------------------------- DALL·E: what depends on what


def test_there_are_logits_for_every_text_and_image_token(indices, caption):
    model = small()
    output = model(indices, caption)
    assert output.text.shape == (3, TEXT, VOCABULARY) and output.image.shape == (3, N, K)
    for n in (1, 2, 9):  # a prefix has the same logits as in the whole picture
        part = model(indices[:, :n], caption)
        assert torch.allclose(part.image, output.image[:, :n], atol=1e-12)
        assert torch.allclose(part.text, output.text, atol=1e-12)
    assert torch.equal(model.code_logits(indices, caption), output.image)


def test_text_tokens_depend_on_previous_text_tokens_only(indices, caption):
    model = small()
    before = model(indices[:1], caption[:1]).text
    found = torch.zeros(TEXT, TEXT, dtype=torch.bool)
    for place in range(TEXT):
        other = caption[:1].clone()
        other[0, place] = 9
        difference = model(indices[:1], other).text - before
        found[:, place] = difference[0].abs().amax(-1) > 1e-9
    assert torch.equal(found, torch.ones_like(found).tril(-1))  # token i on those before i
    assert torch.equal(
        model((indices[:1] + 1) % K, caption[:1]).text, before
    )  # and on no image token


def test_image_tokens_depend_on_all_text_and_previous_image_tokens(indices, caption):
    model = small()
    before = model(indices[:1], caption[:1]).image
    for place in range(TEXT):
        other = caption[:1].clone()
        other[0, place] = 9
        difference = (model(indices[:1], other).image - before)[0].abs().amax(-1)
        assert (difference > 1e-9).all()
    found = torch.zeros(N, N, dtype=torch.bool)
    for place in range(N):
        other = indices[:1].clone()
        other[0, place] = (other[0, place] + 1) % K
        difference = model(other, caption[:1]).image - before
        found[:, place] = difference[0].abs().amax(-1) > 1e-11
    assert torch.equal(found, torch.ones_like(found).tril(-1))


def test_pictures_of_a_batch_do_not_depend_on_each_other(indices, caption):
    model = small()
    together = model(indices, caption)
    for i in range(3):
        alone = model(indices[i : i + 1], caption[i : i + 1])
        assert torch.allclose(alone.image, together.image[i : i + 1], atol=1e-12)
        assert torch.allclose(alone.text, together.text[i : i + 1], atol=1e-12)


def test_a_learned_vector_of_that_place_replaces_padding(indices, caption, generator):
    model = small()
    before = model(indices, caption).image
    found = torch.zeros(3, TEXT, dtype=torch.bool)
    for place in range(TEXT):
        changed = copy.deepcopy(model)
        with torch.no_grad():
            changed.padding[place] = 0.5 * torch.randn(16, generator=generator)
        after = changed(indices, caption).image
        found[:, place] = (after - before).abs().amax((1, 2)) > 1e-9
    assert torch.equal(found, caption == PAD)
    with torch.no_grad():  # the embedding of PAD itself is no input
        model.text_embedding.weight[PAD] = torch.randn(16, generator=generator)
    assert torch.equal(model(indices, caption).image, before)


def test_the_order_of_text_tokens_changes_the_logits(indices, caption):
    model, swapped = small(), caption.clone()
    swapped[:, [0, 1]] = caption[:, [1, 0]]
    difference = model(indices, swapped).image - model(indices, caption).image
    assert (difference.abs().amax((1, 2)) > 0.01).all()


def test_rows_and_columns_have_their_own_positions(indices, caption, generator):
    model = small()
    constant = torch.zeros_like(indices)
    for what in (model.row, model.column):
        before = model(constant, caption).image
        with torch.no_grad():
            what[1] = torch.randn(what[1].shape, generator=generator)
        after = model(constant, caption).image
        changed = ((after - before).abs().amax((0, 2)) > 1e-9).nonzero()[:, 0]
        # The first place of row 1 is token 5, of column 1 token 2; the next one depends on it.
        assert changed[0] == (SIDE + 1 if what is model.row else 2)


def test_input_and_output_embeddings_are_tied_for_text_and_for_image(indices, caption):
    model = small()
    before = model(indices[:, :1], caption)
    with torch.no_grad():
        model.image_embedding.weight[4] *= 2
        model.text_embedding.weight[2] *= 2  # NULL, which these captions do not have
    after = model(indices[:, :1], caption)
    assert torch.allclose(after.image[..., 4], 2 * before.image[..., 4], atol=1e-12)
    assert torch.allclose(after.text[..., 2], 2 * before.text[..., 2], atol=1e-12)
    assert torch.allclose(after.text[..., 3:], before.text[..., 3:], atol=1e-12)


def test_logits_with_and_without_a_caption_differ(indices, caption):
    model = small()
    null = model(indices, null_caption(3, TEXT)).image
    assert ((null - model(indices, caption).image).abs().amax((1, 2)) > 0.01).all()


def test_embeddings_of_text_image_and_positions_have_one_initial_scale():
    torch.manual_seed(0)
    model = DALLE(PriorConfig(64, 8, 64, 1, 2, vocabulary=64, text_length=16))
    parts = (model.text_embedding.weight, model.image_embedding.weight, model.padding)
    for part in (*parts, model.word_position, model.row, model.column):
        assert part.std().item() == pytest.approx(0.02, rel=0.2)


# ---------------------------------------------------------------- DALL·E: the loss


def test_the_loss_weights_the_means_over_text_and_image_tokens(indices, caption, generator):
    text = torch.randn(3, TEXT, VOCABULARY, generator=generator, dtype=torch.float64)
    image = torch.randn(3, N, K, generator=generator, dtype=torch.float64)
    loss = dalle_loss(DALLEOutput(text, image), caption, indices)
    counted, nats = 0, 0.0
    for b in range(3):
        for t in range(TEXT):
            if caption[b, t] != PAD:  # END counts, padding does not
                nats -= text[b, t].log_softmax(0)[caption[b, t]].item()
                counted += 1
    assert counted == 12 and loss.text.item() == pytest.approx(nats / 12, rel=1e-12)
    by_hand = -image.log_softmax(-1).gather(2, indices[..., None]).mean()
    assert loss.image.item() == pytest.approx(by_hand.item(), rel=1e-12)
    assert loss.total.item() == pytest.approx(nats / 12 / 8 + 7 / 8 * by_hand.item(), rel=1e-12)
    for weight in (0.0, 0.3, 1.0):
        total = dalle_loss(DALLEOutput(text, image), caption, indices, weight).total
        assert torch.allclose(total, weight * loss.text + (1 - weight) * loss.image)


def test_dropped_captions_are_not_counted_in_the_loss(indices, caption):
    model, mixed = small(), caption.clone()
    mixed[1] = null_caption(1, TEXT)[0]
    output = model(indices, mixed)
    loss = dalle_loss(output, mixed, indices)
    rows = torch.tensor([0, 2])
    only = dalle_loss(DALLEOutput(*(part[rows] for part in output)), mixed[rows], indices[rows])
    assert torch.allclose(loss.text, only.text, atol=1e-12)
    whole = F.cross_entropy(output.image.flatten(0, 1), indices.flatten())
    assert torch.allclose(loss.image, whole)  # the picture of a dropped caption is learned


def test_without_any_text_token_the_text_loss_is_0_and_finite(indices):
    model, null = small(), null_caption(3, TEXT)
    loss = dalle_loss(model(indices, null), null, indices)
    assert loss.text.item() == 0 and loss.total.isfinite()
    assert torch.allclose(loss.total, 7 / 8 * loss.image)
    loss.total.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_the_loss_is_in_float32_under_autocast_and_in_float64_for_such_weights(indices, caption):
    model = small()
    assert dalle_loss(model(indices, caption), caption, indices).total.dtype == torch.float64
    model = model.float()
    with torch.autocast("cpu", torch.bfloat16):
        output = model(indices, caption)
        loss = dalle_loss(output, caption, indices)
    assert output.image.dtype == torch.bfloat16  # autocast was active
    assert {term.dtype for term in loss} == {torch.float32}
    half = dalle_loss(DALLEOutput(*(part.bfloat16() for part in output)), caption, indices)
    assert {term.dtype for term in half} == {torch.float32}  # without autocast as well
    exact = dalle_loss(DALLEOutput(*(part.double() for part in output)), caption, indices)
    for a, b in zip(loss, exact, strict=True):
        assert a.item() == pytest.approx(b.item(), abs=1e-6)


def test_the_text_loss_has_no_gradient_for_the_parameters_of_the_image(indices, caption):
    model = small()
    loss = dalle_loss(model(indices, caption), caption, indices)
    text, image = trained(loss.text, model), trained(loss.image, model)
    everything = {name for name, _ in model.named_parameters()}
    of_image = {"image_embedding.weight", "row", "column"}
    # Attention is causal, and after padding there is no text token that would be counted.
    assert text == everything - of_image - {"padding"}
    assert image == everything
    rows = torch.autograd.grad(loss.text, model.starts, retain_graph=True)[0].abs().sum((1, 2, 3))
    assert rows[0] > 0 and rows[1] == 0  # the start of the image follows the text


def test_every_parameter_has_a_gradient(indices, caption):
    torch.manual_seed(0)
    model = DALLE(small().config)
    dalle_loss(model(indices, caption), caption, indices).total.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


@pytest.mark.parametrize("weight", [-0.1, 1.1, math.nan])
def test_a_text_weight_outside_0_and_1_is_an_error(weight, indices, caption):
    with pytest.raises(ValueError, match=rf"text_weight must be in \[0, 1\], not {weight}"):
        dalle_loss(small()(indices, caption), caption, indices, weight)


def test_captions_are_dropped_at_the_rate_of_the_training(generator):
    from t2ilearn.systems.token_training import DROP_CAPTIONS

    caption = torch.full((8000, TEXT), 3)
    dropped = drop_captions(caption, DROP_CAPTIONS, generator)
    rate = (dropped[:, 0] == NULL).double().mean().item()
    assert abs(rate - 0.1) < 5 * (0.09 / 8000) ** 0.5


# ---------------------------------------------------------------- DALL·E: sampling


def logits_while_drawing(monkeypatch, model, indices, caption, **how):
    """The logits at each step while exactly these tokens are sampled: (B, steps, K)."""
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
def test_sampling_with_and_without_a_cache_has_the_logits_of_the_whole_picture(
    monkeypatch, dtype, atol, scale, given, indices, caption
):
    model = small().to(dtype)
    how = {"guidance_scale": scale, **({"start": indices[:, :given]} if given else {})}
    cached, uncached = (
        logits_while_drawing(monkeypatch, model, indices, caption, use_cache=use_cache, **how)
        for use_cache in (True, False)
    )
    c = model(indices, caption).image
    u = model(indices, null_caption(3, TEXT)).image
    whole = (u + scale * (c - u))[:, given:]
    assert (c - u).abs().max() > 0.01 and cached.dtype == dtype
    assert (cached - uncached).abs().max() <= atol
    assert (cached - whole).abs().max() <= atol and (uncached - whole).abs().max() <= atol


def test_with_a_cache_one_token_a_step_is_computed_and_there_is_room_for_all(caption, generator):
    model, lengths = small(), []
    model.blocks[0].register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1]))
    sample(model, caption, generator=generator)
    assert lengths == [1 + TEXT + 1] + [1] * (N - 1)
    assert [c.keys.shape for c in model.new_caches(4)] == [(4, 2, 1 + TEXT + N, 8)] * 3


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("given", [0, 6])
def test_sampling_changes_neither_caption_nor_start_nor_model(scale, given, indices, caption):
    model = small().train()
    text, start = caption.clone(), indices[:, :given].clone()
    state = copy.deepcopy(model.state_dict())
    random = torch.random.get_rng_state()

    def draw(seed):
        how = {"guidance_scale": scale, "start": start if given else None, "top_p": 0.9}
        return sample(model, text, generator=torch.Generator().manual_seed(seed), **how)

    first = draw(1)
    assert torch.equal(text, caption) and torch.equal(start, indices[:, :given])
    assert torch.equal(first[:, :given], start)
    assert torch.equal(draw(1), first) and not torch.equal(draw(2), first)
    assert torch.equal(torch.random.get_rng_state(), random) and model.training
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())


def test_guidance_scale_1_is_the_conditional_model_and_0_the_unconditional_one(caption):
    model = small()

    def draw(caption, **how):
        return sample(model, caption, generator=torch.Generator().manual_seed(1), **how)

    unconditional = draw(null_caption(3, TEXT))
    assert torch.equal(draw(caption, guidance_scale=1.0), draw(caption))
    assert torch.equal(draw(caption, guidance_scale=0.0), unconditional)
    assert torch.equal(draw(null_caption(3, TEXT), guidance_scale=4.0), unconditional)
    assert not torch.equal(draw(caption), unconditional)
    assert not torch.equal(draw(caption, guidance_scale=4.0), draw(caption))


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_temperature_0_takes_the_likeliest_token_for_every_seed(scale, indices, caption):
    model = small()
    how = {"temperature": 0.0, "guidance_scale": scale}
    a, b = (
        sample(model, caption, generator=torch.Generator().manual_seed(s), **how) for s in (1, 2)
    )
    assert torch.equal(a, b) and a.unique().numel() > 1
    c, u = model(a, caption).image, model(a, null_caption(3, TEXT)).image
    assert torch.equal((u + scale * (c - u)).argmax(-1), a)


def test_the_log_likelihood_of_a_picture_counts_image_tokens_only(indices, caption):
    model = small()
    found = log_likelihood(model, indices, caption)
    for row in range(3):
        q, c = indices[row : row + 1], caption[row : row + 1]
        loss = dalle_loss(model(q, c), c, q)
        assert found[row].item() == pytest.approx(-N * loss.image.item(), rel=1e-5)
    assert found.shape == (3,) and found.unique().numel() == 3


def test_sampling_works_under_autocast_and_on_the_device_of_the_weights(device, caption, generator):
    model, caption = small().float().to(device), caption.to(device)
    with torch.autocast(device.type, torch.bfloat16):
        drawn = sample(model, caption, generator=generator, guidance_scale=2.0, top_k=5, top_p=0.9)
    assert drawn.shape == (3, N) and drawn.device.type == device.type
    assert dalle_loss(model(drawn, caption), caption, drawn).total.isfinite()


def test_a_dalle_learns_eight_pictures_and_their_captions():
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    indices = torch.randint(32, (8, N), generator=generator)
    caption = torch.stack([torch.randperm(8, generator=generator)[:TEXT] for _ in indices]) + 3
    caption[:, -1] = END
    # Two captions of the same tokens in another order have different pictures.
    caption[1, :4] = caption[0, [1, 0, 2, 3]]
    model = DALLE(PriorConfig(32, SIDE, 48, 2, 2, VOCABULARY, TEXT))
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(150):
        loss = dalle_loss(model(indices, caption), caption, indices)
        optimiser.zero_grad()
        loss.total.backward()
        optimiser.step()
    assert loss.image.item() < 0.05  # from ln 32 = 3.5
    assert loss.text.item() < 0.7  # from ln 11; the first of eight cannot be predicted: ln 8 / 5
    drawn = sample(model.eval(), caption, temperature=0.0, generator=generator)
    assert (drawn == indices).float().mean() > 0.99


# ---------------------------------------------------------------- DALL·E: bad input


def text_tokens(*shape):
    return torch.full(shape, 3)


def test_a_dalle_without_a_vocabulary_is_an_error():
    with pytest.raises(ValueError, match="vocabulary cannot be 0"):
        DALLE(PriorConfig(codebook_size=K, side=SIDE, dim=16, num_layers=1, num_heads=2))


@pytest.mark.parametrize(
    "caption, message",
    [
        (None, "with captions: give one"),
        (text_tokens(3, TEXT - 1), r"shape \(B, 5\), not \(3, 4\)"),
        (text_tokens(3, TEXT + 1), r"shape \(B, 5\), not \(3, 6\)"),
        (text_tokens(3, TEXT) + VOCABULARY - 3, "Text tokens are numbers from 0 to 10, not 11"),
        (text_tokens(3, TEXT) - 4, "Text tokens"),
        (text_tokens(3, TEXT) * 0, "all padding"),
        (text_tokens(2, TEXT), "3 pictures but 2 captions"),
    ],
)
def test_captions_of_another_shape_or_range_are_an_error(
    unchecked, caption, message, indices, generator
):
    model = small()
    with pytest.raises(ValueError, match=message):
        model(indices, caption)
    for use_cache in (True, False):
        with pytest.raises(ValueError, match=message):
            how = {"start": indices[:, :4], "use_cache": use_cache}
            sample(model, caption, generator=generator, **how)


@pytest.mark.parametrize(
    "indices, message",
    [
        (torch.zeros(3, N + 1, dtype=torch.int64), "at most 16 tokens"),
        (torch.zeros(3, SIDE, SIDE, dtype=torch.int64), "at most 16 tokens"),
        (torch.full((3, 4), K), "from 0 to 6; these are 7"),
        (torch.full((3, 4), -1), "from 0 to 6; these are -1"),
    ],
)
def test_image_tokens_of_another_shape_or_range_are_an_error(
    unchecked, indices, message, caption, generator
):
    model = small()
    with pytest.raises(ValueError, match=message):
        model(indices, caption)
    with pytest.raises(ValueError, match=message):
        sample(model, caption, start=indices, generator=generator)


@pytest.mark.parametrize(
    "how, message",
    [
        ({"temperature": -0.1}, "temperature must be 0"),
        ({"temperature": math.nan}, "temperature must be 0"),
        ({"top_k": 0}, "top-k must be 1 … 7, not 0"),
        ({"top_k": K + 1}, "top-k must be 1 … 7, not 8"),
        ({"top_p": 0.0}, r"top-p must be in \(0, 1\], not 0.0"),
        ({"guidance_scale": -1.0}, "guidance scale must be 0 or more, not -1"),
        ({"start": torch.zeros(3, N, dtype=torch.int64)}, "All 16 tokens are given"),
    ],
)
def test_sampling_options_out_of_range_are_an_error(how, message, caption, generator):
    with pytest.raises(ValueError, match=message):
        sample(small(), caption, generator=generator, **how)


# ---------------------------------------------------------------- completion from a prefix


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_a_prefix_does_not_depend_on_pixels_below_the_kept_rows(rows, x, generator):
    model = small_dvae().eval()
    kept = encode_prefix(model, x, rows)
    assert kept.shape == (4, rows * 4) and kept.dtype == torch.int64
    other = x.clone()
    other[:, :, 4 * rows :] = torch.rand(other[:, :, 4 * rows :].shape, generator=generator) * 2 - 1
    assert torch.equal(encode_prefix(model, other, rows), kept)
    # With the lower part the logits differ: the receptive fields reach below the kept rows.
    logits, lower = model.logits(x)[:, :, :rows], model.logits(other)[:, :, :rows]
    assert not torch.allclose(logits, lower)
    other = x.clone()
    other[:, :, : 4 * rows] *= -1
    assert not torch.equal(encode_prefix(model, other, rows), kept)


def test_pixels_below_the_kept_rows_are_replaced_by_the_last_kept_one(x, monkeypatch):
    model, seen = small_dvae().eval(), []
    monkeypatch.setattr(model, "tokens", lambda x: seen.append(x) or torch.zeros(4, 16).long())
    before = x.clone()
    encode_prefix(model, x, 2)
    assert torch.equal(x, before) and torch.equal(seen[0][:, :, :8], x[:, :, :8])
    assert (seen[0][:, :, 8:] == x[:, :, 7:8]).all()


def test_a_prefix_has_the_tokens_of_the_picture_with_replaced_pixels(x):
    model = small_dvae().eval()
    closed = x.clone()
    closed[:, :, 8:] = closed[:, :, 7:8]
    assert torch.equal(encode_prefix(model, x, 2), model.tokens(closed)[:, :8])


def with_one(x, value):
    x = x.clone()
    x[1, 2, 15, 3] = value
    return x


@pytest.mark.parametrize("value", [1.01, -1.5, math.nan, math.inf, -math.inf])
def test_a_prefix_of_pictures_out_of_range_is_an_error(value, x):
    with pytest.raises(ValueError, match="Pixels go from −1 to 1; these go from"):
        encode_prefix(small_dvae(), with_one(x, value), 2)
    encode_prefix(small_dvae(), with_one(with_one(x, 1.0), -1.0), 2)


@pytest.mark.parametrize("rows", [0, 4, 5, -1])
def test_a_prefix_of_all_or_no_rows_is_an_error(rows, x):
    with pytest.raises(ValueError, match=f"Keep 1 … 3 rows of tokens, not {rows}"):
        encode_prefix(small_dvae(), x, rows)


def test_a_prefix_of_pictures_of_another_size_is_an_error(unchecked):
    for wrong in (torch.zeros(2, 3, 8, 16), torch.zeros(3, 16, 16), torch.zeros(2, 1, 16, 16)):
        with pytest.raises(ValueError, match="16"):
            encode_prefix(small_dvae(), wrong.double(), 2)


def test_a_sample_from_a_prefix_keeps_its_tokens(x, generator):
    first = small_dvae(codebook_size=K).eval()
    start = encode_prefix(first, x, 2)
    caption = text_tokens(4, TEXT)
    drawn = sample(small(), caption, start=start, guidance_scale=2.0, generator=generator)
    assert torch.equal(drawn[:, :8], start) and drawn.shape == (4, N)
    assert first.decode_tokens(drawn).shape == x.shape


# ---------------------------------------------------------------- reranking


@pytest.fixture
def candidates(generator):
    pictures = torch.rand(6, 3, 4, 4, generator=generator)
    return Candidates(pictures, list("abcdef"), torch.randint(K, (6, N), generator=generator))


def test_rerank_keeps_the_candidate_with_the_highest_score_of_each_row(candidates):
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


def test_scorers_receive_pictures_captions_and_tokens(candidates):
    by_tokens = rerank(candidates, 3, lambda among: among.tokens.double().mean(1))[1]
    rows = candidates.tokens.double().mean(1).view(2, 3)
    assert by_tokens.tolist() == [0 + rows[0].argmax(), 3 + rows[1].argmax()]
    by_captions = rerank(
        candidates, 2, lambda among: torch.tensor([float(ord(c)) for c in among.captions])
    )[1]
    assert by_captions.tolist() == [1, 3, 5]


def test_rerank_keeps_the_same_one_of_equal_candidates(candidates):
    kept = [rerank(candidates, 3, lambda among: torch.zeros(6))[1].tolist() for _ in range(3)]
    assert kept[0] == kept[1] == kept[2] and kept[0][0] < 3 <= kept[0][1]
    kept = rerank(candidates, 3, lambda among: torch.tensor([-math.inf] * 5 + [0.0]))[1]
    assert kept[1] == 5


@pytest.mark.parametrize("best_of", [0, -1, 4, 12])
def test_candidates_that_make_no_whole_rows_are_an_error(candidates, best_of):
    with pytest.raises(ValueError, match=f"6, 6, 6 pictures.* make no rows of {best_of}"):
        rerank(candidates, best_of, lambda among: torch.zeros(6))


def test_unequal_numbers_of_candidates_are_an_error(unchecked, candidates):
    for wrong in (
        candidates._replace(captions=list("abcde")),
        candidates._replace(tokens=candidates.tokens[:4]),
    ):
        with pytest.raises(ValueError, match="make no rows of 2"):
            rerank(wrong, 2, lambda among: torch.zeros(6))


@pytest.mark.parametrize(
    "scores", [torch.zeros(3), torch.zeros(6, 1), torch.tensor([0.0, math.nan, 1, 2, 3, 4])]
)
def test_a_scorer_without_one_number_for_each_candidate_is_an_error(unchecked, candidates, scores):
    with pytest.raises(ValueError, match="a number to each of 6 candidates, none of them NaN"):
        rerank(candidates, 3, lambda among: scores)


def test_rerank_of_no_candidates_keeps_no_pictures():
    none = Candidates(torch.zeros(0, 3, 4, 4), [], torch.zeros(0, N, dtype=torch.int64))
    pictures, kept = rerank(none, 4, lambda among: torch.zeros(0))
    assert pictures.shape == (0, 3, 4, 4) and kept.shape == (0,)


def test_constants_equal_those_of_the_paper():
    assert (EPSILON, TEXT_WEIGHT) == (0.1, 1 / 8)
