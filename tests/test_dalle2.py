"""DALL·E 2's parts: the prior over embeddings, the decoder's paths, arithmetic of embeddings."""

import copy
import math

import pytest
import torch

from t2ilearn.models import diffusion_prior
from t2ilearn.models.clip import unit_length
from t2ilearn.models.dalle2 import (
    Decoder,
    ImageConditioning,
    ImageConditioningConfig,
    drop_embeddings,
    slerp,
    text_difference,
)
from t2ilearn.models.diffusion_prior import (
    DiffusionPrior,
    DiffusionPriorConfig,
    Standardised,
    causal_bias,
    diffusion_prior_loss,
    no_embedding,
    prior_process,
    prior_steps,
    sample_image_embedding,
)
from t2ilearn.models.dit import DiT, DiTConfig
from t2ilearn.models.tokens import END, PAD, null_caption

E = 6
SMALL = {"embed_dim": E, "dim": 32, "num_layers": 2, "vocabulary": 11, "text_length": 5}
CAPTIONS = torch.tensor([[3, 4, 5, END, PAD], [7, END, PAD, PAD, PAD]])
T = torch.tensor([20.0, 700.0])


def randomise(model):
    """Large weights everywhere, so that nothing that matters is hidden by zeros."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    return model.eval()


def small_prior(randomised=True, **sizes) -> DiffusionPrior:
    torch.manual_seed(0)
    model = DiffusionPrior(DiffusionPriorConfig(**{**SMALL, **sizes})).double()
    return randomise(model) if randomised else model.eval()


def small_decoder() -> Decoder:
    torch.manual_seed(0)
    sizes = {"resolution": 8, "patch": 4, "num_layers": 2, "vocabulary": 11, "text_length": 5}
    network = randomise(DiT(DiTConfig(dim=32, **sizes)).double())
    conditioning = ImageConditioning(ImageConditioningConfig(E, 32, 3)).double()
    return Decoder(network, randomise(conditioning))


def embeddings(generator, n=2) -> torch.Tensor:
    return unit_length(torch.randn(n, E, generator=generator, dtype=torch.float64))


# ---------------------------------------------------------------- the prior


def test_a_token_sees_those_before_it_and_no_padding():
    allowed = causal_bias(CAPTIONS != PAD)[:, 0] == 0
    query = allowed[:, -1]
    assert query[0].tolist() == [True] * 4 + [False] + [True] * 4  # its caption has 4 tokens
    assert query[1].tolist() == [True] * 2 + [False] * 3 + [True] * 4
    assert not allowed.triu(1).any()
    assert allowed.any(2).all()  # no row is without a key, which would be NaN


def test_padding_and_the_length_of_a_batch_change_nothing(generator):
    prior = small_prior()
    noisy, text = embeddings(generator), embeddings(generator)
    both = prior(noisy, T, text, CAPTIONS)
    with torch.no_grad():
        prior.token[PAD] += 5
    assert torch.equal(prior(noisy, T, text, CAPTIONS), both)
    assert torch.allclose(prior(noisy[1:], T[1:], text[1:], CAPTIONS[1:]), both[1:], atol=1e-12)


@pytest.mark.parametrize("changed", ["noisy", "time", "text embedding", "caption"])
def test_the_prediction_depends_on_every_input(changed, generator):
    prior = small_prior()
    inputs = [embeddings(generator), T, embeddings(generator), CAPTIONS]
    before = prior(*inputs)
    other = [embeddings(generator), T + 50, embeddings(generator), CAPTIONS.clone()]
    other[3][0, 0], other[3][1, 0] = 8, 9
    number = ["noisy", "time", "text embedding", "caption"].index(changed)
    inputs[number] = other[number]
    assert (prior(*inputs) - before).abs().amax(1).min() > 1e-4


def test_the_order_of_words_matters(generator):
    prior = small_prior()
    noisy, text = embeddings(generator, 1), embeddings(generator, 1)
    one = prior(noisy, T[:1], text, torch.tensor([[3, 4, 5, END, PAD]]))
    other = prior(noisy, T[:1], text, torch.tensor([[5, 4, 3, END, PAD]]))
    assert (one - other).abs().max() > 1e-4


def test_no_text_embedding_is_a_learned_vector(generator):
    prior = small_prior()
    text = no_embedding(embeddings(generator))
    before = prior(embeddings(generator), T, text, CAPTIONS)
    before.sum().backward()
    assert prior.no_text.grad.abs().sum() > 0
    assert prior.text_embedding.weight.grad is None or not prior.text_embedding.weight.grad.any()


def test_the_loss_is_the_squared_error_of_the_standardised_embedding(generator):
    prior = small_prior()
    image, text = embeddings(generator, 40), embeddings(generator, 40)
    prior.image_scale.fit(3 * image + 1)
    captions = CAPTIONS.repeat(20, 1)
    noise = torch.randn(40, E, generator=generator, dtype=torch.float64)
    t = torch.randint(1000, (40,), generator=generator)
    process = prior_process()
    x = (image - prior.image_scale.mean) / prior.image_scale.std
    loss = diffusion_prior_loss(
        prior, prior.image_scale(image), text, captions, process, noise=noise, t=t
    )
    alpha_bar = process.alpha_bar[t][:, None]
    noisy = alpha_bar.sqrt() * x + (1 - alpha_bar).sqrt() * noise
    expected = (prior(noisy, t.float(), text, captions) - x).square().mean()
    assert torch.allclose(loss.total, expected, atol=1e-12) and loss.weight == 1


def test_gradients_reach_every_parameter_of_the_prior(generator):
    prior = small_prior()
    process, given = prior_process(), embeddings(generator)
    text = torch.stack([given[0], torch.zeros(E, dtype=torch.float64)])
    loss = diffusion_prior_loss(prior, given, text, CAPTIONS, process, generator=generator)
    loss.total.backward()
    without = [n for n, p in prior.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def test_eight_pairs_are_learned_by_heart(generator):
    """A prior that has seen eight pairs predicts their embeddings from their captions alone."""
    torch.manual_seed(0)
    prior = DiffusionPrior(DiffusionPriorConfig(**{**SMALL, "vocabulary": 20}))
    captions = torch.stack([torch.tensor([3 + i, END, PAD, PAD, PAD]) for i in range(8)])
    image, text = embeddings(generator, 8).float(), embeddings(generator, 8).float()
    prior.image_scale.fit(image)
    process = prior_process()
    optimizer = torch.optim.AdamW(prior.parameters(), 3e-3, weight_decay=0.0)
    for _ in range(400):
        loss = diffusion_prior_loss(
            prior,
            prior.image_scale(image).repeat(4, 1),
            text.repeat(4, 1),
            captions.repeat(4, 1),
            process,
            generator=generator,
        )
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
    with torch.no_grad():
        drawn = sample_image_embedding(prior.eval(), text, captions, process, generator, steps=10)
    cosine = (drawn * image).sum(1)
    others = (drawn @ image.T).fill_diagonal_(-1).amax(1)
    assert cosine.min() > 0.9 and (cosine > others).all()


# ---------------------------------------------------------------- standardising, sampling


def test_standardised_coordinates_have_mean_0_and_variance_1_and_come_back(generator):
    x = unit_length(torch.randn(500, E, generator=generator) * torch.arange(1, E + 1) + 2)
    scale, before = Standardised(E), x.clone()
    scale.fit(x)
    z = scale(x)
    assert z.mean(0).abs().max() < 1e-4 and (z.std(0) - 1).abs().max() < 1e-4
    assert torch.allclose(scale.inverse(z), x, atol=1e-5)
    assert torch.equal(x, before)  # nothing was scaled in place


def test_a_coordinate_that_never_changes_cannot_be_standardised(generator):
    x = embeddings(generator, 9)
    x[:, 2] = 0.5
    with pytest.raises(ValueError, match="never changes"):
        Standardised(E).fit(x)


def test_of_two_samples_the_more_similar_one_is_kept(monkeypatch, generator):
    prior, text = small_prior().float(), embeddings(generator).float()
    samples = embeddings(generator, 6).float()

    class Last:
        z = prior.image_scale(samples)

    monkeypatch.setattr(diffusion_prior, "prior_steps", lambda *_: iter([Last]))
    process = prior_process()
    kept = sample_image_embedding(prior, text, CAPTIONS, process, generator, candidates=3)
    for row in range(2):
        own = samples[3 * row : 3 * row + 3]
        assert torch.allclose(kept[row], own[(own @ text[row]).argmax()], atol=1e-5)


def test_samples_are_of_length_1_and_follow_the_seed(generator):
    prior, text = small_prior().float(), embeddings(generator).float()
    process = prior_process()

    @torch.no_grad()
    def sample(seed):
        any_seed = torch.Generator().manual_seed(seed)
        return sample_image_embedding(prior, text, CAPTIONS, process, any_seed, steps=4)

    assert torch.allclose(sample(0).norm(dim=1), torch.ones(2), atol=1e-5)
    assert torch.equal(sample(0), sample(0)) and not torch.equal(sample(0), sample(1))


def test_guidance_moves_away_from_the_prediction_without_text(generator):
    prior = small_prior()
    text, process = embeddings(generator), prior_process()

    @torch.no_grad()
    def first(scale):
        any_seed = torch.Generator().manual_seed(0)
        return next(prior_steps(prior, text, CAPTIONS, process, 2, scale, any_seed)).x

    none, own, strong = first(0.0), first(1.0), first(3.0)
    assert torch.allclose(strong, none + 3 * (own - none), atol=1e-6)
    assert (own - none).abs().max() > 1e-3


# ---------------------------------------------------------------- the decoder


def test_without_an_embedding_the_decoder_is_the_network_of_chapter_9(generator):
    decoder = small_decoder()
    z = torch.randn(2, 3, 8, 8, generator=generator, dtype=torch.float64)
    t = torch.tensor([0.2, 0.7])
    plain = decoder.network(z, t, CAPTIONS)
    none = no_embedding(embeddings(generator))
    assert torch.allclose(decoder(z, t, none, CAPTIONS), plain, atol=1e-12)
    one = none.clone()
    one[0] = embeddings(generator)[0]
    mixed = decoder(z, t, one, CAPTIONS)
    assert torch.allclose(mixed[1], plain[1], atol=1e-12)
    assert (mixed[0] - plain[0]).abs().max() > 1e-3


@pytest.mark.parametrize("path", ["to_time", "to_tokens"])
def test_each_path_of_the_embedding_alone_changes_the_picture(path, generator):
    decoder = small_decoder()
    other = "to_tokens" if path == "to_time" else "to_time"
    with torch.no_grad():
        for parameter in decoder.conditioning.get_submodule(other).parameters():
            parameter.zero_()
    z = torch.randn(2, 3, 8, 8, generator=generator, dtype=torch.float64)
    t = torch.tensor([0.2, 0.7])
    pictures = [decoder(z, t, embeddings(generator), CAPTIONS) for _ in range(2)]
    assert (pictures[0] - pictures[1]).abs().flatten(1).amax(1).min() > 1e-5


def test_only_the_paths_of_the_embedding_learn(generator):
    decoder = small_decoder()
    z = torch.randn(2, 3, 8, 8, generator=generator, dtype=torch.float64)
    given = embeddings(generator).requires_grad_()
    decoder(z, torch.tensor([0.2, 0.7]), given, CAPTIONS).square().sum().backward()
    assert all(p.grad is None for p in decoder.network.parameters())
    assert all(p.grad.any() for p in decoder.conditioning.parameters())
    assert given.grad.abs().amax(1).min() > 0


def test_a_new_decoder_adds_nothing_to_the_time():
    conditioning = ImageConditioning(ImageConditioningConfig(E, 32, 3))
    found = conditioning(unit_length(torch.randn(2, E)))
    assert not found.time.any() and found.tokens.shape == (2, 3, 32) and found.given.all()


def test_embeddings_are_dropped_at_the_stated_rate(generator):
    x = embeddings(generator, 2000)
    dropped = drop_embeddings(x, 0.3, generator)
    gone = ~dropped.any(1)
    assert 0.26 < gone.double().mean() < 0.34 and torch.equal(dropped[~gone], x[~gone])
    assert torch.equal(drop_embeddings(x, 0.0, generator), x)


# ---------------------------------------------------------------- arithmetic of embeddings


def test_slerp_walks_at_equal_angles_along_the_sphere(generator):
    a, b = embeddings(generator, 5), embeddings(generator, 5)
    angle = (a * b).sum(1).acos()
    for weight in (0.0, 0.25, 0.5, 1.0):
        c = slerp(a, b, weight)
        assert torch.allclose(c.norm(dim=1), torch.ones(5, dtype=torch.float64), atol=1e-12)
        assert torch.allclose((a * c).sum(1).clamp(-1, 1).acos(), weight * angle, atol=1e-6)


def test_slerp_of_equal_directions_is_that_direction(generator):
    a = embeddings(generator)
    assert torch.allclose(slerp(a, a, 0.3), a, atol=1e-7)
    assert slerp(a, a + 1e-9, 0.5).isfinite().all()


def test_a_text_difference_raises_the_similarity_to_the_new_text(generator):
    image, old, new = (embeddings(generator, 20) for _ in range(3))
    turned = text_difference(image, old, new, 0.4)
    direction = unit_length(new - old)
    assert ((turned * direction).sum(1) > (image * direction).sum(1)).all()
    assert torch.allclose(text_difference(image, old, new, 0.0), image, atol=1e-12)


# ---------------------------------------------------------------- bad input


def bad_inputs():
    prior, decoder = small_prior(), small_decoder()
    x, text = torch.ones(2, E).double(), torch.ones(2, E).double()
    process, any_seed = prior_process(), torch.Generator()
    z = torch.zeros(2, 3, 8, 8).double()
    half = torch.tensor([0.5, 0.5])
    return [
        ("another CLIP", "come from the CLIP", lambda: prior(x[:, :4], T, text, CAPTIONS)),
        ("NaN", "NaN or infinity", lambda: prior(x / 0 * 0, T, text, CAPTIONS)),
        ("bytes", "floating numbers", lambda: prior(x.byte(), T, text, CAPTIONS)),
        ("another number", "as many times", lambda: prior(x, T[:1], text, CAPTIONS)),
        ("one text embedding", "as many times", lambda: prior(x, T, text[:1], CAPTIONS)),
        ("an unknown word", "numbers from 0 to 10", lambda: prior(x, T, text, CAPTIONS + 20)),
        ("all padding", "all padding", lambda: prior(x, T, text, 0 * CAPTIONS)),
        (
            "no steps", "number of steps must be 1",
            lambda: list(prior_steps(prior, text, CAPTIONS, process, 0, 1.0, any_seed)),
        ),
        (
            "negative guidance", "guidance scale must be 0 or more",
            lambda: list(prior_steps(prior, text, CAPTIONS, process, 2, -1.0, any_seed)),
        ),
        (
            "no candidate", "At least one embedding",
            lambda: sample_image_embedding(prior, text, CAPTIONS, process, any_seed, candidates=0),
        ),
        ("a decoder's embedding", "have shape", lambda: decoder(z, half, x[:, :4], CAPTIONS)),
        ("weight above 1", "must be in \\[0, 1\\]", lambda: slerp(x, text, 1.5)),
        ("weight NaN", "must be in \\[0, 1\\]", lambda: slerp(x, text, math.nan)),
        ("opposite", "opposite", lambda: slerp(x, -x, 0.5)),
        ("no difference", "same embedding", lambda: text_difference(x, text, text, 0.3)),
        ("dim 33", "multiple of 32", lambda: DiffusionPriorConfig(dim=33)),
        ("no layers", "at least 1", lambda: DiffusionPriorConfig(num_layers=0)),
        ("no words", "vocabulary of 3", lambda: DiffusionPriorConfig(vocabulary=2)),
        ("no image tokens", "at least 1", lambda: ImageConditioningConfig(num_tokens=0)),
        (
            "two widths", "vectors of 32",
            lambda: Decoder(decoder.network, ImageConditioning(ImageConditioningConfig(E, 64))),
        ),
    ]  # fmt: skip


@pytest.mark.parametrize("case", bad_inputs(), ids=lambda case: case[0])
def test_bad_input_is_named(case, unchecked):
    _, said, call = case
    with pytest.raises(ValueError, match=said):
        call()


def test_a_network_that_diverged_is_named(generator):
    prior = copy.deepcopy(small_prior())
    with torch.no_grad():
        prior.last.bias[0] = math.nan
    with pytest.raises(ValueError, match="predicts NaN"):
        sample_image_embedding(
            prior, embeddings(generator), CAPTIONS, prior_process(), generator, steps=2
        )


def test_the_null_caption_is_a_caption_for_the_prior(generator):
    noisy, none = embeddings(generator), null_caption(2, 5)
    assert small_prior()(noisy, T, no_embedding(noisy), none).isfinite().all()
