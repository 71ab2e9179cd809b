"""Priors: causality, conditioning on captions, the loss, and sampling with and without a cache."""

import itertools
import math
from dataclasses import FrozenInstanceError

import pytest
import torch

from t2ilearn.models import sampling
from t2ilearn.models.pixelcnn import GatedLayer, PixelCNN
from t2ilearn.models.sampling import check_sampling, sample, sample_from_logits, sample_steps
from t2ilearn.models.tokens import END, NULL, PAD, null_caption
from t2ilearn.models.transformer import (
    PriorConfig,
    TransformerPrior,
    corrupt_tokens,
    drop_captions,
    log_likelihood,
    prior_loss,
)

K, SIDE, TEXT, VOCABULARY = 7, 4, 5, 11
N = SIDE**2
BOTH = pytest.mark.parametrize("kind", [TransformerPrior, PixelCNN])


def small(kind, captions=True, **sizes):
    """A prior in float64 with weights so large that every dependence is measurable."""
    torch.manual_seed(0)
    words = {"vocabulary": VOCABULARY, "text_length": TEXT} if captions else {}
    config = {
        "codebook_size": K,
        "side": SIDE,
        "dim": 16,
        "num_layers": 3,
        "num_heads": 2,
        **words,
        **sizes,
    }
    model = kind(PriorConfig(**config)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture
def indices(generator):
    return torch.randint(K, (3, N), generator=generator)


@pytest.fixture
def caption():
    """Captions of four, three and two tokens with their end, then padding."""
    return torch.tensor([[3, 4, 5, 6, END], [7, 8, 9, END, PAD], [10, 3, END, PAD, PAD]])


def given(captions, caption):
    return caption if captions else None


# ---------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"num_heads": 0}, "dim 16 must be a multiple of num_heads 0"),
        ({"num_heads": 3}, "dim 16 must be a multiple of num_heads 3"),
        ({"dim": 0}, "dim 0 must be"),
        ({"codebook_size": 1}, "codebook_size must be at least 2.*; they are 1, 4, 2 and 0"),
        ({"side": 0}, "side and num_layers at least 1.*; they are 7, 0, 2 and 0"),
        ({"num_layers": 0}, "; they are 7, 4, 0 and 0"),
        ({"vocabulary": -1}, "vocabulary at least 0; they are 7, 4, 2 and -1"),
        ({"vocabulary": 9, "text_length": 1}, "at least two tokens, not 1"),
    ],
)
def test_sizes_that_do_not_fit_together_are_an_error(wrong, message):
    sizes = {"codebook_size": K, "side": SIDE, "dim": 16, "num_layers": 2, "num_heads": 2}
    with pytest.raises(ValueError, match=message):
        PriorConfig(**{**sizes, **wrong})


def test_a_config_counts_image_and_text_tokens_and_is_immutable():
    config = PriorConfig(side=3, vocabulary=9, text_length=6)
    assert (config.num_image_tokens, config.num_text_tokens) == (9, 6)
    assert PriorConfig(text_length=1).num_text_tokens == 0  # there are no captions
    with pytest.raises(FrozenInstanceError):
        config.side = 4


@BOTH
@pytest.mark.parametrize("captions", [True, False])
def test_there_are_logits_for_every_image_token(kind, captions, indices, caption):
    model = small(kind, captions)
    logits = model(indices, given(captions, caption))
    assert logits.shape == (3, N, K)
    for n in (1, 2, 9):  # a prefix has the same logits as in the whole picture
        part = model(indices[:, :n], given(captions, caption))
        assert torch.allclose(part, logits[:, :n], atol=1e-12)


@BOTH
def test_every_parameter_has_a_gradient(kind, indices, caption):
    torch.manual_seed(0)
    model = kind(small(kind).config)
    prior_loss(model(indices, caption), indices).total.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


# ---------------------------------------------------------------- what depends on what


def dependences(model, indices, caption=None):
    """(N, N) booleans: do the logits of token i change when token j is another?"""
    n = indices.shape[1]
    variants = indices[:1].repeat(n, 1)
    variants[range(n), range(n)] = (variants[range(n), range(n)] + 1) % K
    caption = None if caption is None else caption[:1]
    with torch.no_grad():
        before = model(indices[:1], caption)
        after = model(variants, None if caption is None else caption.expand(n, -1))
    return ((after - before).abs().amax(-1) > 1e-11).T


@BOTH
@pytest.mark.parametrize("captions", [True, False])
def test_each_token_depends_on_all_previous_tokens_and_on_no_later_one(
    kind, captions, indices, caption
):
    earlier = torch.ones(N, N, dtype=torch.bool).tril(-1)
    found = dependences(small(kind, captions), indices, given(captions, caption))
    assert torch.equal(found, earlier)


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_a_pixelcnn_of_any_depth_is_causal_and_has_no_blind_spot(depth, generator):
    indices = torch.randint(K, (1, 36), generator=generator)
    found = dependences(small(PixelCNN, captions=False, side=6, num_layers=depth), indices)
    assert not found.triu().any()
    # The blind spot of a single masked stack is up and to the right; two stacks have none.
    row, column = (torch.arange(36) // 6), torch.arange(36) % 6
    up = (row[:, None] - row).clamp(min=0)
    aside = (column[:, None] - column).abs()
    near = torch.ones(36, 36, dtype=torch.bool).tril(-1) & (up <= 2) & (aside <= 2)
    assert found[near].all()
    if depth == 4:
        assert torch.equal(found, torch.ones(36, 36, dtype=torch.bool).tril(-1))


@BOTH
def test_gradients_with_respect_to_later_tokens_are_zero(kind, indices, caption):
    # With respect to the embeddings, in case two tokens should have equal ones.
    model, seen = small(kind), []
    weight = model.image_embedding.weight.detach()

    def embed(module, inputs, output):
        seen.append(weight[inputs[0]].clone().requires_grad_())
        return seen[-1]

    model.image_embedding.register_forward_hook(embed)
    logits = model(indices[:1], caption[:1])
    for i in range(N):
        (gradient,) = torch.autograd.grad(logits[0, i].sum(), seen[0], retain_graph=True)
        strength = gradient[0].abs().sum(-1).flatten()
        strength = torch.nn.functional.pad(
            strength, (0, N - len(strength))
        )  # the last one is no input
        assert (strength[:i] > 0).all() and not strength[i:].any()


@BOTH
def test_every_image_token_depends_on_every_text_token(kind, indices, caption):
    model = small(kind)
    before = model(indices[:1], caption[:1])
    for place in range(TEXT - 1):
        other = caption[:1].clone()
        other[0, place] = 9
        assert ((model(indices[:1], other) - before).abs().amax(-1) > 1e-9).all()


def test_text_tokens_attend_to_each_other_in_both_directions_and_to_no_image_token(
    indices, caption
):
    model, seen = small(TransformerPrior), []
    model.blocks[0].register_forward_hook(lambda _, inputs, output: seen.append(output[0, :TEXT]))
    other = caption.clone()
    other[:, 3] = 9
    with torch.no_grad():
        for text, image in ((caption, indices), (other, indices), (caption, (indices + 1) % K)):
            model(image, text)
    before, other_text, other_image = seen
    assert ((other_text - before).abs().amax(-1) > 1e-6).all()
    assert torch.equal(other_image, before)


@BOTH
def test_pictures_of_a_batch_do_not_depend_on_each_other(kind, indices, caption):
    model = small(kind)
    together = model(indices, caption)
    for i in range(3):
        alone = model(indices[i : i + 1], caption[i : i + 1])
        assert torch.allclose(alone, together[i : i + 1], atol=1e-12)


@BOTH
def test_logits_do_not_depend_on_padding(kind, indices, caption):
    model = small(kind)
    before = model(indices, caption)
    with torch.no_grad():
        model.text_embedding.weight[PAD] = torch.randn(16)
        model.position[3:5] = torch.randn(2, 16)  # the third caption's padding, the first's tokens
    after = model(indices, caption)
    assert torch.allclose(after[2], before[2], atol=1e-12)
    assert not torch.allclose(after[0], before[0], atol=1e-3)


@BOTH
def test_padding_has_no_gradient(kind, indices, caption):
    model = small(kind)
    prior_loss(model(indices[2:], caption[2:]), indices[2:]).total.backward()
    assert not model.text_embedding.weight.grad[PAD].any()
    assert not model.position.grad[3:TEXT].any() and model.position.grad[:3].all()


@BOTH
def test_the_order_of_text_tokens_changes_the_logits(kind, indices, caption):
    model, swapped = small(kind), caption.clone()
    swapped[:, [0, 1]] = caption[:, [1, 0]]
    difference = (model(indices, swapped) - model(indices, caption)).abs().amax((1, 2))
    assert (difference > 0.01).all()


@BOTH
def test_positions_and_text_embeddings_have_one_initial_scale(kind):
    torch.manual_seed(0)
    model = kind(
        PriorConfig(
            codebook_size=64, dim=64, num_heads=2, num_layers=1, vocabulary=64, text_length=16
        )
    )
    ratio = model.position.std() / model.text_embedding.weight.std()
    assert 0.9 < ratio.item() < 1.1


def test_input_and_output_embeddings_of_the_transformer_are_tied(indices, caption):
    model = small(TransformerPrior)
    before = model(indices[:, :1], caption)  # of the first token, which has no previous one
    with torch.no_grad():
        model.image_embedding.weight[4] *= 2
    after = model(indices[:, :1], caption)
    assert torch.allclose(after[..., 4], 2 * before[..., 4], atol=1e-12)
    others = [k for k in range(K) if k != 4]
    assert torch.allclose(after[..., others], before[..., others], atol=1e-12)


# ---------------------------------------------------------------- loss and captions


def test_the_prior_loss_is_the_mean_negative_log_likelihood(indices, generator):
    logits = 3 * torch.randn(3, N, K, generator=generator)
    by_hand = 0.0
    for b, i in itertools.product(range(3), range(N)):
        p = logits[b, i].double().exp()
        by_hand -= math.log(p[indices[b, i]] / p.sum()) / (3 * N)
    loss = prior_loss(logits, indices)
    assert loss.total.item() == pytest.approx(by_hand, abs=1e-6)
    assert loss.cross_entropy == loss.total


def test_uniform_logits_have_a_loss_of_ln_k(indices):
    assert prior_loss(torch.zeros(3, N, K), indices).total.item() == pytest.approx(math.log(K))


def test_the_loss_of_logits_in_half_precision_is_computed_in_float32(indices, generator):
    logits = (5 * torch.randn(3, N, K, generator=generator)).bfloat16()
    loss = prior_loss(logits, indices).total
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(prior_loss(logits.double(), indices).total.item(), abs=1e-6)


def test_the_null_caption_has_its_own_token():
    assert null_caption(2, 5).tolist() == [[NULL, END, PAD, PAD, PAD]] * 2
    assert null_caption(1, 2).dtype == torch.int64 and null_caption(0, 4).shape == (0, 4)
    assert len({PAD, END, NULL}) == 3


def test_whole_captions_are_dropped_at_the_stated_rate(generator):
    caption = torch.randint(3, VOCABULARY, (5000, TEXT), generator=generator)
    before = caption.clone()
    for rate in (0.0, 0.1, 0.5, 1.0):
        dropped = drop_captions(caption, rate, generator)
        null = (dropped == null_caption(1, TEXT)).all(1)
        assert torch.equal(dropped[~null], caption[~null])
        slack = 5 * math.sqrt(rate * (1 - rate) / 5000)
        assert abs(null.double().mean().item() - rate) <= slack
    assert torch.equal(caption, before)


def test_dropping_captions_is_reproducible_with_a_seed(device):
    caption = torch.full((400, TEXT), 3, device=device)
    a, b, c = (drop_captions(caption, 0.5, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c) and a.device == caption.device


@BOTH
def test_logits_with_and_without_a_caption_differ(kind, indices, caption):
    model = small(kind)
    difference = model(indices, null_caption(3, TEXT)) - model(indices, caption)
    assert (difference.abs().amax((1, 2)) > 0.01).all()


# ---------------------------------------------------------------- sampling one token


def probabilities(monkeypatch, logits, **how):
    """The distribution from which `sample_from_logits` samples, exactly."""
    seen = []

    def multinomial(p, count, generator=None):
        seen.append(p.clone())
        return p.argmax(1, keepdim=True)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "multinomial", multinomial)
        sample_from_logits(logits, **how)
    (p,) = seen
    return p


P = torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.85, 0.05, 0.06, 0.04]])


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_logits_are_divided_by_the_temperature(monkeypatch, temperature):
    p = probabilities(monkeypatch, P.log() + 5, temperature=temperature)
    expected = P ** (1 / temperature)
    assert torch.allclose(p, expected / expected.sum(1, keepdim=True), atol=1e-6)


@pytest.mark.parametrize(
    "how, kept",
    [
        ({"top_k": 1}, [[0, 1, 0, 0], [1, 0, 0, 0]]),
        ({"top_k": 2}, [[0, 1, 0, 1], [1, 0, 1, 0]]),
        ({"top_k": 3}, [[0, 1, 1, 1], [1, 1, 1, 0]]),
        ({"top_k": 4}, [[1, 1, 1, 1], [1, 1, 1, 1]]),
        ({"top_p": 1e-6}, [[0, 1, 0, 0], [1, 0, 0, 0]]),
        ({"top_p": 0.39}, [[0, 1, 0, 0], [1, 0, 0, 0]]),
        ({"top_p": 0.41}, [[0, 1, 0, 1], [1, 0, 0, 0]]),
        ({"top_p": 0.69}, [[0, 1, 0, 1], [1, 0, 0, 0]]),
        ({"top_p": 0.88}, [[0, 1, 1, 1], [1, 0, 1, 0]]),
        ({"top_p": 1.0}, [[1, 1, 1, 1], [1, 1, 1, 1]]),
        # The nucleus is that of the k likeliest tokens, of which the first has 3/7.
        ({"top_k": 2, "top_p": 0.5}, [[0, 1, 0, 0], [1, 0, 0, 0]]),
        ({"top_k": 3, "top_p": 0.87}, [[0, 1, 1, 1], [1, 0, 0, 0]]),
    ],
)
def test_top_k_and_top_p_keep_the_likeliest_tokens_in_their_proportions(monkeypatch, how, kept):
    p = probabilities(monkeypatch, P.log(), **how)
    expected = P * torch.tensor(kept)
    assert torch.allclose(p, expected / expected.sum(1, keepdim=True), atol=1e-6)


def test_the_temperature_is_applied_before_top_p(monkeypatch):
    # At τ = 0.5 the likeliest token of the first row has 0.53: it is the nucleus of 0.5.
    p = probabilities(monkeypatch, P.log(), temperature=0.5, top_p=0.5)
    assert p.tolist() == [[0, 1, 0, 0], [1, 0, 0, 0]]


@pytest.mark.parametrize("how", [{}, {"temperature": 0.5}, {"top_k": 2}, {"top_p": 0.6}])
def test_samples_have_the_frequencies_of_their_probabilities(monkeypatch, how, generator):
    p = probabilities(monkeypatch, P[:1].log(), **how)[0]
    n = 8000
    drawn = sample_from_logits(P[:1].log().expand(n, -1), generator=generator, **how)
    frequency = torch.bincount(drawn, minlength=4) / n
    assert ((frequency - p).abs() <= 5 * (p * (1 - p) / n).sqrt()).all()


def test_temperature_0_takes_the_likeliest_token(generator):
    logits = torch.randn(50, K, generator=generator)
    assert torch.equal(sample_from_logits(logits, temperature=0.0), logits.argmax(1))
    assert torch.equal(
        sample_from_logits(logits, temperature=0.0, top_p=0.1, top_k=2), logits.argmax(1)
    )
    assert torch.equal(sample_from_logits(logits, top_k=1, generator=generator), logits.argmax(1))
    assert torch.equal(
        sample_from_logits(logits, temperature=1e-4, generator=generator), logits.argmax(1)
    )


def test_sample_from_logits_draws_random_numbers_from_its_generator_only(device):
    logits = torch.zeros(100, K, device=device)
    before, state = logits.clone(), torch.random.get_rng_state()
    options = {"temperature": 0.9, "top_k": 5, "top_p": 0.9}
    a, b, c = (
        sample_from_logits(logits, **options, generator=torch.Generator().manual_seed(s))
        for s in (1, 1, 2)
    )
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert a.dtype == torch.int64 and a.device == logits.device
    assert torch.equal(logits, before) and torch.equal(torch.random.get_rng_state(), state)


def test_tokens_of_probability_0_are_never_sampled(generator):
    logits = torch.zeros(2000, 3)
    logits[:, 1] = -math.inf
    for how in ({}, {"top_k": 3}, {"top_p": 0.99}):
        assert set(sample_from_logits(logits, generator=generator, **how).tolist()) == {0, 2}


def test_probabilities_of_logits_in_half_precision_are_computed_in_float32(monkeypatch):
    p = probabilities(monkeypatch, P.log().bfloat16(), temperature=0.7, top_p=0.95)
    assert p.dtype == torch.float32 and p.sum(1).tolist() == pytest.approx([1, 1], abs=1e-6)


# ---------------------------------------------------------------- sampling one token after another


def logits_while_drawing(monkeypatch, model, indices, caption, **how):
    """The logits at each step while exactly these tokens are sampled: (B, steps, K)."""
    seen, first = [], how["start"].shape[1] if "start" in how else 0

    def forced(logits, *_):
        seen.append(logits)
        return indices[:, first + len(seen) - 1]

    with monkeypatch.context() as patch:
        patch.setattr(sampling, "sample_from_logits", forced)
        (*_, last) = sample_steps(model, caption, count=len(indices), **how)
    assert torch.equal(last, indices)
    return torch.stack(seen, dim=1)


@BOTH
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 2.5])
def test_guided_logits_equal_u_plus_s_times_c_minus_u(
    monkeypatch, kind, use_cache, scale, indices, caption
):
    model = small(kind)
    c, u = model(indices, caption), model(indices, null_caption(3, TEXT))
    drawn = logits_while_drawing(
        monkeypatch, model, indices, caption, guidance_scale=scale, use_cache=use_cache
    )
    assert torch.allclose(drawn, u + scale * (c - u), atol=1e-10)
    assert (c - u).abs().max() > 0.01


@BOTH
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("captions", [True, False])
@pytest.mark.parametrize("given_codes", [0, 1, 8, N - 1])
def test_sampling_from_a_start_has_the_logits_of_the_whole_picture(
    monkeypatch, kind, use_cache, captions, given_codes, indices, caption
):
    model, caption = small(kind, captions), given(captions, caption)
    start = indices[:, :given_codes]
    drawn = logits_while_drawing(
        monkeypatch, model, indices, caption, start=start, use_cache=use_cache
    )
    assert torch.allclose(drawn, model(indices, caption)[:, given_codes:], atol=1e-10)


@BOTH
def test_guided_sampling_from_a_start_with_a_cache(monkeypatch, kind, indices, caption):
    model = small(kind)
    c, u = model(indices, caption), model(indices, null_caption(3, TEXT))
    start = indices[:, :6]
    drawn = logits_while_drawing(
        monkeypatch, model, indices, caption, start=start, guidance_scale=3.0
    )
    assert torch.allclose(drawn, (u + 3 * (c - u))[:, 6:], atol=1e-10)


@BOTH
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("scale, captions", [(1.0, True), (2.0, True), (1.0, False)])
def test_sampling_with_and_without_a_cache_agrees_in_float32(
    kind, temperature, scale, captions, caption
):
    model = small(kind, captions).float()
    a, b = (
        sample(
            model,
            given(captions, caption),
            count=3,
            temperature=temperature,
            guidance_scale=scale,
            generator=torch.Generator().manual_seed(0),
            use_cache=use_cache,
        )
        for use_cache in (True, False)
    )
    assert torch.equal(a, b) and a.shape == (3, N)
    assert temperature == 0 or a.unique().numel() > 2


@BOTH
def test_guidance_scale_1_is_the_conditional_model_and_0_the_unconditional_one(kind, caption):
    model = small(kind)

    def draw(caption, **how):
        return sample(model, caption, generator=torch.Generator().manual_seed(1), **how)

    assert torch.equal(draw(caption, guidance_scale=1.0), draw(caption))
    unconditional = draw(null_caption(3, TEXT))
    assert torch.equal(draw(caption, guidance_scale=0.0), unconditional)
    assert torch.equal(draw(null_caption(3, TEXT), guidance_scale=4.0), unconditional)
    assert not torch.equal(draw(caption), unconditional)
    assert not torch.equal(draw(caption, guidance_scale=4.0), draw(caption))


@BOTH
def test_sampling_tokens_one_by_one_samples_from_the_joint_distribution(kind):
    # All pictures of four tokens out of two: their probabilities add to 1 and are the frequencies.
    model = small(kind, captions=False, codebook_size=2, side=2)
    everything = torch.tensor(list(itertools.product((0, 1), repeat=4)))
    with torch.no_grad():
        steps = model(everything).log_softmax(-1).gather(2, everything[..., None])[..., 0]
    p = steps.sum(1).exp()
    assert p.sum().item() == pytest.approx(1, abs=1e-9)
    n = 4000
    drawn = sample(model, count=n, generator=torch.Generator().manual_seed(0))
    number = (drawn * torch.tensor([8, 4, 2, 1])).sum(1)
    frequency = torch.bincount(number, minlength=16) / n
    assert ((frequency - p).abs() <= 5 * (p * (1 - p) / n).sqrt()).all()
    assert (p - 1 / 16).abs().max() > 0.02  # the distribution is not uniform


@BOTH
def test_the_log_likelihood_of_a_picture_is_minus_its_loss_times_its_number_of_tokens(
    kind, indices, caption
):
    model = small(kind)
    found = log_likelihood(model, indices, caption)
    for row in range(3):
        q, c = indices[row : row + 1], caption[row : row + 1]
        loss = prior_loss(model(q, c), q).total.item()
        assert found[row].item() == pytest.approx(-N * loss, rel=1e-5)
    assert found.unique().numel() == 3
    bare = small(kind, captions=False)
    loss = prior_loss(bare(indices), indices).total.item()
    assert log_likelihood(bare, indices).mean().item() == pytest.approx(-N * loss, rel=1e-5)


@BOTH
def test_each_sampling_step_adds_one_token_and_the_last_is_the_sample(kind, caption):
    model = small(kind)
    steps = list(sample_steps(model, caption, generator=torch.Generator().manual_seed(0)))
    assert [s.shape for s in steps] == [(3, n) for n in range(1, N + 1)]
    assert all(torch.equal(a, b[:, :-1]) for a, b in itertools.pairwise(steps))
    assert torch.equal(
        steps[-1], sample(model, caption, generator=torch.Generator().manual_seed(0))
    )
    assert steps[-1].dtype == torch.int64 and 0 <= steps[-1].min() and steps[-1].max() < K


@BOTH
def test_the_tokens_of_a_start_are_kept(kind, indices, caption, generator):
    model, start = small(kind), indices[:, :7]
    before = start.clone()
    steps = list(sample_steps(model, caption, start=start, generator=generator))
    assert len(steps) == N - 7 and all(torch.equal(s[:, :7], before) for s in steps)
    assert torch.equal(start, before)


@BOTH
@pytest.mark.parametrize("use_cache", [True, False])
def test_a_start_determines_the_number_of_pictures(kind, use_cache, indices, generator):
    model = small(kind, captions=False)
    done = sample(model, start=indices[:, :7], generator=generator, use_cache=use_cache)
    assert done.shape == (3, N) and torch.equal(done[:, :7], indices[:, :7])


def test_corrupted_tokens_have_the_stated_share_and_take_every_value(generator):
    indices = torch.full((4000, N), 3)
    before = indices.clone()
    corrupted = corrupt_tokens(indices, K, 0.4, generator)
    assert torch.equal(indices, before)
    assert torch.equal(corrupt_tokens(indices, K, 0.0, generator), indices)
    wrong = (corrupted != indices).float()
    # A seventh of the random tokens equals the right one; each picture has its own share.
    assert wrong.mean().item() == pytest.approx(0.2 * (K - 1) / K, abs=0.01)
    assert wrong.mean(1).max() > 0.4 and (wrong.mean(1) == 0).float().mean() > 0.1
    assert corrupted.unique().tolist() == list(range(K))


@BOTH
def test_a_count_determines_the_number_of_pictures(kind, generator):
    model = small(kind, captions=False)
    assert sample(model, count=5, generator=generator).shape == (5, N)
    with pytest.raises(ValueError, match="number of pictures must be at least 1, not 0"):
        sample(model, count=0, generator=generator)
    assert sample(model, generator=generator).shape == (1, N)


@BOTH
def test_sampling_is_reproducible_with_a_seed_and_changes_no_argument(kind, caption):
    model = small(kind).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    text, state = caption.clone(), torch.random.get_rng_state()

    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        return sample(model, caption, generator=generator, guidance_scale=2.0, top_p=0.9)

    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    assert torch.equal(caption, text) and torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert model.training and all(p.grad is None for p in model.parameters())


@BOTH
def test_models_and_losses_do_not_change_their_arguments(kind, indices, caption):
    model = small(kind)
    logits = model(indices, caption)
    before = [t.clone() for t in (indices, caption, logits)]
    model(indices, caption)
    model.next_logits(indices[:, :4], caption)
    model.next_logits(indices[:, :4], caption, model.new_caches(3))
    prior_loss(logits, indices)
    assert all(torch.equal(a, b) for a, b in zip(before, (indices, caption, logits), strict=True))


@BOTH
def test_sampling_works_on_the_device_of_the_weights(kind, device, caption, generator):
    model, caption = small(kind).float().to(device), caption.to(device)
    how = {"guidance_scale": 2.0, "top_k": 5, "top_p": 0.9}
    drawn = sample(model, caption, generator=generator, **how)
    assert drawn.device.type == device.type and drawn.shape == (3, N)
    assert prior_loss(model(drawn, caption), drawn).total.isfinite()


@BOTH
def test_sampling_works_under_autocast(kind, caption, generator):
    model = small(kind).float()
    with torch.autocast("cpu", torch.bfloat16):
        drawn = sample(model, caption, generator=generator, guidance_scale=2.0)
        logits = model(drawn, caption)
    assert drawn.shape == (3, N) and logits.isfinite().all()


def test_with_a_cache_the_transformer_computes_one_token_a_step_and_the_pixelcnn_has_no_cache(
    caption, indices
):
    model, lengths = small(TransformerPrior), []
    model.blocks[0].register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1]))
    sample(model, caption, generator=torch.Generator().manual_seed(0))
    assert lengths == [TEXT + 1] + [1] * (N - 1)
    assert [cache.keys.shape for cache in model.new_caches(4)] == [(4, 2, TEXT + N, 8)] * 3
    assert small(PixelCNN).new_caches(4) is None


# ---------------------------------------------------------------- eight pictures


@BOTH
def test_a_prior_learns_eight_pictures_and_their_captions(kind):
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    indices = torch.randint(32, (8, N), generator=generator)
    caption = torch.stack(
        [torch.randperm(VOCABULARY - 3, generator=generator)[:TEXT] for _ in indices]
    )
    caption[:, -1] = END - 3
    caption += 3
    # Two captions of the same tokens in another order have different pictures.
    caption[1, :4] = caption[0, [1, 0, 2, 3]]
    model = kind(PriorConfig(32, SIDE, 48, 2, 2, VOCABULARY, TEXT))
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(150):
        loss = prior_loss(model(indices, caption), indices).total
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss.item() < 0.05  # from ln 32 = 3.5
    drawn = sample(model.eval(), caption, temperature=0.0, generator=generator)
    assert (drawn == indices).float().mean() > 0.99


# ---------------------------------------------------------------- bad input


def text_tokens(*shape):
    return torch.full(shape, 3)


@BOTH
@pytest.mark.parametrize(
    "caption, message",
    [
        (None, "with captions: give one"),
        (text_tokens(3, TEXT - 1), r"shape \(B, 5\), not \(3, 4\)"),
        (text_tokens(3, TEXT + 1), r"shape \(B, 5\), not \(3, 6\)"),
        (text_tokens(TEXT), r"shape \(B, 5\), not \(5,\)"),
        (text_tokens(3, TEXT) + VOCABULARY - 3, "Text tokens are numbers from 0 to 10, not 11"),
        (text_tokens(3, TEXT) - 4, "Text tokens"),
    ],
)
def test_captions_of_another_shape_or_range_are_an_error(
    unchecked, kind, caption, message, indices, generator
):
    model = small(kind)
    with pytest.raises(ValueError, match=message):
        model(indices, caption)
    with pytest.raises(ValueError, match=message):
        sample(model, caption, generator=generator)


@BOTH
def test_a_caption_for_a_prior_without_captions_is_an_error(
    unchecked, kind, indices, caption, generator
):
    model = small(kind, captions=False)
    with pytest.raises(ValueError, match="without captions: give none"):
        model(indices, caption)
    with pytest.raises(ValueError, match="without captions: give none"):
        sample(model, caption, generator=generator)


@BOTH
@pytest.mark.parametrize(
    "indices, message",
    [
        (torch.zeros(3, N + 1, dtype=torch.int64), "at most 16 tokens"),
        (torch.zeros(3, SIDE, SIDE, dtype=torch.int64), "at most 16 tokens"),
        (torch.zeros(N, dtype=torch.int64), "at most 16 tokens"),
        (torch.full((3, 4), K), "from 0 to 6; these are 7"),
        (torch.full((3, 4), -1), "from 0 to 6; these are -1"),
    ],
)
def test_image_tokens_of_another_shape_or_range_are_an_error(
    unchecked, kind, indices, message, caption, generator
):
    model = small(kind)
    with pytest.raises(ValueError, match=message):
        model(indices, caption)
    with pytest.raises(ValueError, match=message):
        sample(model, caption, start=indices, generator=generator)


@BOTH
@pytest.mark.parametrize("captions", [1, 2, 4])
def test_unequal_numbers_of_captions_and_pictures_are_an_error(
    unchecked, kind, captions, indices, generator
):
    # One caption must not be broadcast to all pictures without an error.
    model, caption = small(kind), text_tokens(captions, TEXT)
    with pytest.raises(ValueError, match="caption"):
        model(indices, caption)
    with pytest.raises(ValueError, match="caption"):
        sample(model, caption, start=indices[:, :4], generator=generator)


@BOTH
def test_a_caption_of_padding_alone_is_an_error(unchecked, kind, indices, caption):
    # Nothing can be attended to, and the mean over no tokens is NaN; ∅ is `null_caption`.
    caption[1] = PAD
    with pytest.raises(ValueError, match="all padding; use null_caption"):
        small(kind)(indices, caption)


@BOTH
def test_a_start_with_all_tokens_is_an_error(kind, indices, caption, generator):
    with pytest.raises(ValueError, match="All 16 tokens are given"):
        sample(small(kind), caption, start=indices, generator=generator)


@pytest.mark.parametrize(
    "how, message",
    [
        ({"temperature": -0.1}, "temperature must be 0"),
        ({"temperature": math.inf}, "temperature must be 0"),
        ({"temperature": math.nan}, "temperature must be 0"),
        ({"top_k": 0}, "top-k must be 1 … 7, not 0"),
        ({"top_k": K + 1}, "top-k must be 1 … 7, not 8"),
        ({"top_p": 0.0}, r"top-p must be in \(0, 1\], not 0.0"),
        ({"top_p": 1.01}, "top-p must be in"),
        ({"top_p": math.nan}, "top-p must be in"),
        ({"guidance_scale": -1.0}, "guidance scale must be 0 or more, not -1"),
        ({"guidance_scale": math.nan}, "guidance scale must be"),
        ({"guidance_scale": math.inf}, "guidance scale must be"),
    ],
)
def test_sampling_options_out_of_range_are_an_error(how, message, caption, generator):
    model = small(PixelCNN)
    with pytest.raises(ValueError, match=message):
        sample(model, caption, generator=generator, **how)
    plain = {"temperature": 1.0, "top_k": None, "top_p": None, "guidance_scale": 1.0}
    check_sampling(model.config, **plain)
    with pytest.raises(ValueError, match=message):
        check_sampling(model.config, **{**plain, **how})


def test_the_first_gated_layer_has_mask_a_and_the_others_mask_b():
    layers = small(PixelCNN).layers
    assert [layer.first for layer in layers] == [True, False, False]
    assert [layer.horizontal.kernel_size for layer in layers] == [(1, 2), (1, 3), (1, 3)]


@pytest.mark.parametrize("first", [True, False])
def test_both_stacks_of_a_gated_layer_receive_the_condition(first, generator):
    # Eq. 4 with convolutions of zeros: tanh(a) · σ(b) of the condition's halves, nothing else.
    layer = GatedLayer(4, first).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
        layer.out.weight.copy_(torch.eye(4)[..., None, None])
    v, h, condition = (
        torch.randn(2, d, s, s, generator=generator, dtype=torch.float64)
        for d, s in ((4, 3), (4, 3), (8, 1))
    )
    gate = (condition[:, :4].tanh() * condition[:, 4:].sigmoid()).expand(-1, -1, 3, 3)
    new_v, new_h = layer(v, h, condition)
    assert torch.allclose(new_v, gate, atol=1e-12)
    assert torch.allclose(new_h, gate if first else h + gate, atol=1e-12)
