"""VQGAN-CLIP: its gradients, its cutouts, its prompts, and the optimisation itself."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from t2ilearn.models.clip import CLIP, ImageTowerConfig, TextTowerConfig
from t2ilearn.models.cutouts import CutoutConfig, make_cutouts, turn_hue
from t2ilearn.models.taming import TamingConfig, make_taming_vqgan
from t2ilearn.models.vqgan_clip import (
    Latents,
    OptimisationConfig,
    TokenLogits,
    clamp_with_gradient,
    codec_of,
    make_prompts,
    optimise,
    prompt_loss,
    random_latents,
    spherical_distance,
    start_from_noise,
    start_from_pictures,
    straight_through,
)
from t2ilearn.models.vqvae import VQVAE, VQVAEConfig

PLAIN = CutoutConfig(3, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0)  # the whole picture, unaltered
SIDE = 16


@pytest.fixture(params=["ema", "fsq", "taming"])
def model(request):
    """A VQ-VAE of each kind, and a small VQGAN of the released layout."""
    torch.manual_seed(0)
    if request.param == "taming":
        return make_taming_vqgan(TamingConfig(16, 32, (1, 2), 1, (8,), 7, 5))
    sizes = {"resolution": 16, "channels": (8, 16), "blocks": 1}
    size = {"codebook_size": 27, "code_dim": 3} if request.param == "fsq" else {"code_dim": 4}
    return VQVAE.from_config(
        VQVAEConfig(**sizes, **({"codebook_size": 12} | size), quantizer=request.param)
    )


@pytest.fixture
def codec():
    torch.manual_seed(0)
    sizes = {"resolution": 16, "channels": (8, 16), "blocks": 1, "codebook_size": 12, "code_dim": 4}
    return codec_of(VQVAE.from_config(VQVAEConfig(**sizes)))


@pytest.fixture
def tower():
    torch.manual_seed(1)
    clip = CLIP(ImageTowerConfig(SIDE, 8, 16, 1, 2, 12), TextTowerConfig(9, 4, 16, 1, 2, 12)).eval()
    return clip.image_tower


@pytest.fixture
def pictures(generator):
    return 2 * torch.rand(2, 3, 16, 16, generator=generator) - 1


def directions(n, generator, e=12):
    return F.normalize(torch.randn(n, e, generator=generator), dim=1)


# ---------------------------------------------------------------- gradients


def test_the_gradient_of_the_clamp_in_closed_form():
    x = torch.tensor([-2.0, -2.0, 0.5, 0.5, 2.0, 2.0, 1.0], requires_grad=True)
    weight = torch.tensor([3.0, -3.0, 3.0, -3.0, 3.0, -3.0, 5.0])
    y = clamp_with_gradient(x, -1.0, 1.0)
    assert y.tolist() == [-1, -1, 0.5, 0.5, 1, 1, 1]
    (weight * y).sum().backward()
    # A step goes against the gradient: it is kept where the step leads back into [−1, 1].
    assert x.grad.tolist() == [0, -3, 3, -3, 3, 0, 5]


def test_the_clamp_has_a_bound_for_every_channel(generator):
    x = torch.randn(2, 3, 4, 4, generator=generator)
    low, high = torch.tensor([-1.0, 0.0, -0.1]), torch.tensor([1.0, 0.5, 0.1])
    y = clamp_with_gradient(x, low.view(-1, 1, 1), high.view(-1, 1, 1))
    assert torch.equal(y, x.clamp(low.view(-1, 1, 1), high.view(-1, 1, 1)))


def test_straight_through_has_one_s_value_and_the_other_s_gradient():
    x, value = torch.tensor([1.0, 2.0], requires_grad=True), torch.tensor([5.0, 7.0])
    y = straight_through(value, x)
    assert y.tolist() == [5, 7]
    y.sum().backward()
    assert x.grad.tolist() == [1, 1]


def test_the_spherical_distance_is_half_the_squared_angle():
    for degrees in (0.0, 0.001, 30.0, 90.0, 179.0, 180.0):
        angle = math.radians(degrees)
        u = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
        v = torch.tensor([math.cos(angle), math.sin(angle), 0.0], dtype=torch.float64)
        found = spherical_distance(u, v).item()
        assert found == pytest.approx(angle**2 / 2, abs=1e-12)
        half = min(1.0, (u - v).norm().item() / 2)
        assert found == pytest.approx(2 * math.asin(half) ** 2, abs=1e-6)


def test_the_spherical_distance_has_a_finite_gradient_everywhere():
    for v in ([1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]):
        u = torch.tensor([1.0, 0.0], requires_grad=True)
        spherical_distance(u, torch.tensor(v)).backward()
        assert u.grad.isfinite().all()
    assert spherical_distance(torch.ones(4, 1, 2), torch.ones(3, 2)).shape == (4, 3)


# ---------------------------------------------------------------- cutouts


def test_cutouts_have_clip_s_size_and_stay_in_range_without_noise(pictures, generator):
    out = make_cutouts(pictures, 24, CutoutConfig(5, noise=0.0), generator)
    assert out.shape == (10, 3, 24, 24) and out.abs().max() <= 1 + 1e-5
    noisy = make_cutouts(pictures, 24, CutoutConfig(5, noise=1.0), generator)
    assert noisy.abs().max() > 1.2


def test_cutouts_repeat_with_the_generator_and_leave_torch_s_own_alone(pictures):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    config = CutoutConfig(4, erasing=1.0, degrees=40.0)
    draws = [
        make_cutouts(pictures, SIDE, config, torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    ]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert torch.equal(torch.get_rng_state(), before)


def test_all_pictures_are_cut_alike_and_each_cutout_differs(pictures, generator):
    same = pictures[:1].expand(2, -1, -1, -1)
    out = make_cutouts(same, SIDE, CutoutConfig(4, noise=0.0), generator).unflatten(0, (4, 2))
    assert torch.allclose(out[:, 0], out[:, 1], atol=1e-6)
    assert all(not torch.allclose(out[0, 0], out[i, 0], atol=1e-2) for i in (1, 2, 3))


def test_the_whole_picture_unaltered_is_a_cutout(pictures, generator):
    out = make_cutouts(pictures, SIDE, PLAIN, generator)
    assert torch.allclose(out, pictures.repeat(3, 1, 1, 1), atol=1e-6)


def test_the_power_decides_how_many_cutouts_are_small(generator):
    """A ramp from −1 to 1: what a cutout spans is its side."""
    ramp = torch.linspace(-1, 1, 64).expand(1, 3, 64, 64).contiguous()
    spans = []
    for power in (0.25, 4.0):
        config = dataclasses.replace(PLAIN, number=200, smallest=0.25, power=power)
        out = make_cutouts(ramp, 8, config, torch.Generator().manual_seed(0))
        spans.append((out[:, 0, 0, -1] - out[:, 0, 0, 0]).mean().item())
    assert spans[0] > 1.4 * spans[1]


@pytest.mark.parametrize("name", ["degrees", "perspective", "jitter", "erasing", "noise"])
def test_every_alteration_changes_cutouts_and_passes_gradients(pictures, generator, name):
    config = dataclasses.replace(PLAIN, number=12, **{name: 0.4 if name == "jitter" else 1.0})
    x = (0.5 * pictures).requires_grad_()
    out = make_cutouts(x, SIDE, config, generator)
    assert not torch.allclose(out, x.repeat(12, 1, 1, 1), atol=1e-3)
    out.square().sum().backward()
    assert x.grad.isfinite().all() and x.grad.abs().amax() > 0


def test_a_full_turn_of_hue_changes_nothing_and_grey_stays(generator):
    x = torch.rand(2, 3, 4, 4, generator=generator)
    assert torch.allclose(turn_hue(x, 1.0), x, atol=1e-5)
    grey = x[:, :1].expand(-1, 3, -1, -1)
    assert torch.allclose(turn_hue(grey, 0.3), grey, atol=1e-6)
    red = torch.tensor([0.9, 0.1, 0.1]).view(1, 3, 1, 1)
    for turn in (1 / 3, -1 / 3):
        turned = turn_hue(red, turn).flatten()
        assert sorted(turned.tolist()) == pytest.approx([0.1, 0.1, 0.9], abs=1e-5)
        assert turned[0] < 0.2


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"number": 0}, "at least one cutout"),
        ({"smallest": 0.0}, "smallest must be"),
        ({"power": math.nan}, "power must be"),
        ({"degrees": -1.0}, "degrees must be"),
        ({"jitter": 0.6}, "jitter must be"),
        ({"erasing": 2.0}, "erasing must be"),
    ],
)
def test_cutouts_that_make_no_sense_are_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        CutoutConfig(**wrong)


# ---------------------------------------------------------------- prompts


def test_the_loss_is_the_weighted_sum_of_mean_distances(generator):
    cutouts = directions(8, generator).unflatten(0, (4, 2))
    a, b = directions(2, generator)
    prompts = make_prompts([[(a, 2.0), (b, -0.5)], [(b, 1.0)]])
    loss = prompt_loss(cutouts, prompts)
    first = 2 * spherical_distance(cutouts[:, 0], a).mean()
    first = first - 0.5 * spherical_distance(cutouts[:, 0], b).mean()
    assert loss[0].item() == pytest.approx(first.item(), rel=1e-5)
    wanted = spherical_distance(cutouts[:, 1], b).mean()
    assert loss[1].item() == pytest.approx(wanted.item(), rel=1e-5)


def test_embeddings_of_prompts_are_given_length_1(generator):
    (a,) = directions(1, generator)
    prompts = make_prompts([[(3 * a, 1.0)]])
    assert torch.allclose(prompts.embeddings[0, 0], a, atol=1e-6)


@pytest.mark.parametrize(
    "each, said",
    [
        ([], "needs a prompt"),
        ([[]], "needs a prompt"),
        ([[(torch.zeros(4), 1.0)]], "have a direction"),
        ([[(torch.full((4,), math.nan), 1.0)]], "finite"),
        ([[(torch.ones(4), 0.0)]], "other than 0, not 0.0"),
        ([[(torch.ones(4), math.inf)]], "not inf"),
    ],
)
def test_prompts_that_make_no_sense_are_refused(each, said):
    with pytest.raises(ValueError, match=said):
        make_prompts(each)


# ---------------------------------------------------------------- starts


def test_latents_are_quantized_with_their_own_gradient_and_clamped(codec, generator):
    z = 3 * torch.randn(2, 4, 4, 4, generator=generator)
    start = Latents(z, codec)
    e = start()
    flat = e.flatten(2).mT.flatten(0, 1)
    assert (torch.cdist(flat, codec.codebook).amin(1) < 1e-3).all()
    weight = torch.randn(e.shape, generator=generator)
    (weight * e).sum().backward()
    assert torch.equal(start.z.grad, weight)
    start.clamp()
    low, high = codec.codebook.amin(0), codec.codebook.amax(0)
    assert (start.z >= low.view(-1, 1, 1)).all() and (start.z <= high.view(-1, 1, 1)).all()
    assert z.abs().max() > 3  # what was given is unchanged


def test_logits_take_the_likeliest_token_and_have_the_gradient_of_the_mean(codec, generator):
    start = TokenLogits(torch.randint(12, (2, 16), generator=generator), codec, strength=2.0)
    with torch.no_grad():
        start.logits.add_(torch.randn(start.logits.shape, generator=generator))
    weight = torch.randn(2, 4, 4, 4, generator=generator)
    e = start()
    wanted = codec.codebook[start.logits.argmax(-1)].mT.unflatten(2, (4, 4))
    assert torch.allclose(e, wanted, atol=1e-6)
    (gradient,) = torch.autograd.grad((weight * e).sum(), start.logits)
    mean = (start.logits.softmax(-1) @ codec.codebook).mT.unflatten(2, (4, 4))
    (of_mean,) = torch.autograd.grad((weight * mean).sum(), start.logits)
    assert torch.allclose(gradient, of_mean, atol=1e-6) and gradient.any()
    start.clamp()


@pytest.mark.parametrize("form", ["latents", "logits"])
def test_a_start_from_pictures_decodes_to_their_reconstruction(model, pictures, form):
    codec = codec_of(model)
    start = start_from_pictures(pictures, codec, form)
    with torch.no_grad():
        wanted = model.decode_tokens(model.tokens(pictures))
        assert torch.allclose(codec.decode(start()), wanted, atol=1e-4)


@pytest.mark.parametrize("form", ["latents", "logits"])
def test_both_forms_start_from_the_same_noise(codec, form):
    first, second = (
        start_from_noise(2, codec, torch.Generator().manual_seed(3), form)() for _ in range(2)
    )
    assert torch.equal(first, second)
    wanted = random_latents(2, codec, torch.Generator().manual_seed(3))
    assert torch.allclose(first, wanted, atol=1e-6)


def test_other_forms_and_pictures_are_refused(codec, pictures, generator):
    with pytest.raises(ValueError, match="'latents' or 'logits', not 'pixels'"):
        start_from_noise(1, codec, generator, "pixels")
    with pytest.raises(ValueError, match="'latents' or 'logits'"):
        start_from_pictures(pictures, codec, "")
    with pytest.raises(ValueError, match="Pixels go from −1 to 1"):
        start_from_pictures(3 * pictures, codec)


# ---------------------------------------------------------------- the optimisation


def run(start, codec, encode, prompts, generator, cutouts=PLAIN, **config):
    return list(
        optimise(
            start, codec, encode, prompts, SIDE, generator, cutouts, OptimisationConfig(**config)
        )
    )


@pytest.mark.parametrize("form", ["latents", "logits"])
def test_the_loss_falls_and_every_step_is_yielded(model, tower, generator, form):
    codec = codec_of(model)
    target = F.normalize(tower(2 * torch.rand(1, 3, 16, 16, generator=generator) - 1), dim=1)[0]
    prompts = make_prompts([[(target.detach(), 1.0)]] * 2)
    start = start_from_noise(2, codec, generator, form)
    steps = run(start, codec, tower, prompts, generator, steps=12, learning_rate=0.2)
    assert [s.step for s in steps] == list(range(13)) and not any(s.stopped for s in steps)
    assert steps[-1].loss.sum() < steps[0].loss.sum()
    for s in steps:
        assert s.pictures.shape == (2, 3, 16, 16) and s.pictures.abs().max() <= 1
        assert not s.pictures.requires_grad and not s.loss.requires_grad


def test_it_runs_without_gradients_around_it_and_trains_no_network(model, tower, generator):
    codec = codec_of(model)
    before = [p.clone() for p in (*model.parameters(), *model.buffers(), *tower.parameters())]
    prompts = make_prompts([[(directions(1, generator)[0], 1.0)]])
    start = start_from_noise(1, codec, generator)
    z = start.z.clone()
    with torch.no_grad():
        run(start, codec, tower, prompts, generator, CutoutConfig(2), steps=2)
    after = [*model.parameters(), *model.buffers(), *tower.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(p.grad is None for p in (*model.parameters(), *tower.parameters()))
    assert not torch.equal(z, start.z)


def test_the_same_generator_gives_the_same_pictures(codec, tower):
    def final():
        generator = torch.Generator().manual_seed(4)
        prompts = make_prompts([[(directions(1, generator)[0], 1.0)]])
        start = start_from_noise(1, codec, generator)
        return run(start, codec, tower, prompts, generator, CutoutConfig(3), steps=3)[-1].pictures

    assert torch.equal(final(), final())


def test_pictures_of_a_batch_do_not_influence_each_other(codec, tower, generator):
    a, b = directions(2, generator)
    z = random_latents(2, codec, generator)
    both = run(Latents(z, codec), codec, tower, make_prompts([[(a, 1.0)], [(b, 1.0)]]), generator,
               steps=4)  # fmt: skip
    alone = run(Latents(z[:1], codec), codec, tower, make_prompts([[(a, 1.0)]]), generator, steps=4)
    assert torch.allclose(both[-1].pictures[:1], alone[-1].pictures, atol=1e-4)


def test_a_negative_weight_steers_away(codec, tower, generator):
    (a,) = directions(1, generator)
    z = random_latents(1, codec, generator)
    distance = {}
    for weight in (1.0, -1.0):
        prompts = make_prompts([[(a, weight)]])
        last = run(Latents(z, codec), codec, tower, prompts, generator, steps=15)[-1]
        distance[weight] = last.loss.item() * weight
    assert distance[-1.0] > distance[1.0]


def test_a_picture_is_a_prompt_as_well(codec, tower, pictures, generator):
    with torch.no_grad():
        (target,) = tower(pictures[:1])
    prompts = make_prompts([[(target, 1.0)]])
    steps = run(start_from_noise(1, codec, generator), codec, tower, prompts, generator, steps=10)
    assert steps[-1].loss < steps[0].loss


def test_no_steps_show_the_start(codec, tower, generator):
    prompts = make_prompts([[(directions(1, generator)[0], 1.0)]])
    start = start_from_noise(1, codec, generator)
    (only,) = run(start, codec, tower, prompts, generator, steps=0)
    with torch.no_grad():
        assert torch.equal(only.pictures, codec.decode(start()).clamp(-1, 1))


def test_nan_ends_it_and_keeps_the_best_picture(codec, tower, generator):
    calls = []

    def encode(x):
        calls.append(x)
        return tower(x) * (math.nan if len(calls) == 4 else 1.0)

    prompts = make_prompts([[(directions(1, generator)[0], 1.0)]])
    start = start_from_noise(1, codec, generator)
    steps = run(start, codec, encode, prompts, generator, steps=50, learning_rate=0.05)
    assert len(steps) == 4 and steps[-1].stopped == "NaN" and steps[-1].step == 3
    best = min(steps[:3], key=lambda s: s.loss.item())
    assert torch.equal(steps[-1].pictures, best.pictures) and steps[-1].loss == best.loss
    assert all(p.isfinite().all() for p in start.parameters())


def test_nan_at_the_first_step_still_gives_a_picture(codec, generator):
    prompts = make_prompts([[(directions(1, generator)[0], 1.0)]])

    def encode(x):
        return x.flatten(1)[:, :12] * math.nan

    (only,) = run(start_from_noise(1, codec, generator), codec, encode, prompts, generator, steps=3)
    assert only.stopped == "NaN" and only.pictures.isfinite().all()


def test_it_ends_early_where_nothing_improves(codec, tower, generator):
    prompts = make_prompts([[(directions(1, generator)[0], 1.0)]])
    start = start_from_noise(1, codec, generator)

    def encode(x):
        return tower(x) * 0 + torch.arange(1.0, 13.0)  # the same embedding for ever

    steps = run(start, codec, encode, prompts, generator, steps=50, patience=3)
    assert len(steps) == 4 and steps[-1].stopped == "no progress"


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"steps": -1}, "steps must be 0 or more"),
        ({"patience": 0}, "patience at least 1"),
        ({"learning_rate": 0.0}, "above 0, not 0"),
        ({"learning_rate": math.inf}, "above 0, not inf"),
    ],
)
def test_configs_that_make_no_sense_are_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        OptimisationConfig(**wrong)
