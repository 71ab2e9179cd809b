"""VQGAN: losses of generator and discriminator, the adaptive weight, the perceptual distance."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from t2ilearn.data import Shapes, TinyShapes
from t2ilearn.judging.reader import load_reader
from t2ilearn.models.lpips import VGGTrunk, perceptual_distance
from t2ilearn.models.transformer import PriorLoss
from t2ilearn.models.vqgan import (
    DELTA,
    MAX_ADAPTIVE_WEIGHT,
    Discriminator,
    DiscriminatorConfig,
    VQGANLossConfig,
    VQGANWithDiscriminator,
    adaptive_weight,
    generator_loss,
    hinge_loss,
    last_layer,
    non_saturating_loss,
    vqgan_loss,
)
from t2ilearn.models.vqvae import VQVAE, VQVAEConfig
from t2ilearn.pretrained.lpips import lpips_channel_weights
from t2ilearn.training import TrainConfig, train

SIZES = VQVAEConfig(
    resolution=16, channels=(8, 16), blocks=1, codebook_size=27, code_dim=3, quantizer="gradient"
)
NOW = VQGANLossConfig(disc_start=0.0, disc_warmup=0.0)  # with the discriminator from step 0


def edges(x):
    """A trunk of two levels that needs no training."""
    return [x[..., 1:] - x[..., :-1], F.avg_pool2d(x, 2)]


def distance(x, y):
    return perceptual_distance(edges, x, y)


def made(loss_config=NOW, config=SIZES) -> VQGANWithDiscriminator:
    """Generator and discriminator in float64, always with the same weights."""
    torch.manual_seed(0)
    generator = VQVAE.from_config(config)
    discriminator = Discriminator(DiscriminatorConfig(4, 1))
    pair = VQGANWithDiscriminator(generator, discriminator, loss_config, distance)
    return pair.double().train()


@pytest.fixture
def x(generator):
    """Four pictures of noise, in float64."""
    return torch.rand(4, 3, 16, 16, generator=generator, dtype=torch.float64) * 2 - 1


def trained(loss, module):
    """The names of parameters that a loss has a gradient for."""
    names, parameters = zip(*module.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    found = zip(names, gradients, strict=True)
    return {name for name, g in found if g is not None and g.abs().max() > 0}


# ---------------------------------------------------------------- which loss trains what


def test_neither_loss_has_gradients_for_the_other_network(x):
    pair = made()
    step = pair(x, 0.5)
    ours, theirs = step.total - step.discriminator_loss, step.discriminator_loss
    assert trained(theirs, pair.discriminator) and not trained(theirs, pair.generator)
    assert trained(ours, pair.generator) and not trained(ours, pair.discriminator)


def test_each_loss_term_has_gradients_for_its_own_part_only(x):
    pair = made()
    step, model = pair(x, 0.5), pair.generator
    parts = {"encoder": model.encoder, "decoder": model.decoder, "codebook": model.quantizer}
    wanted = {
        "pixels": {"encoder", "decoder"},
        "perceptual": {"encoder", "decoder"},
        "generator_loss": {"encoder", "decoder"},
        "codebook_loss": {"codebook"},
        "commitment_loss": {"encoder"},
    }
    for term, expected in wanted.items():
        found = {name for name, part in parts.items() if trained(getattr(step, term), part)}
        assert found == expected, term


def test_frozen_weights_leave_the_gradient_of_the_picture_unchanged(x):
    D, fake = made().discriminator, x.clone().requires_grad_()
    (through,) = torch.autograd.grad(D.with_frozen_weights(fake).sum(), fake)
    (plain,) = torch.autograd.grad(D(fake).sum(), fake)
    assert torch.equal(through, plain) and plain.abs().max() > 0


def test_the_total_is_the_weighted_sum_of_the_terms(x):
    pair = made(VQGANLossConfig(2.0, 0.7, 0.4, disc_start=0.0, disc_warmup=0.0))
    step = pair(x, 0.5)
    pictures = 2.0 * step.pixels + 0.7 * step.perceptual
    ours = pictures + step.codebook_loss + 0.25 * step.commitment_loss
    gan = 0.4 * step.adaptive_weight * step.generator_loss
    expected = ours + gan + step.discriminator_loss
    assert torch.allclose(step.total, expected, rtol=1e-12)


@pytest.mark.parametrize("left_out", ["perceptual_weight", "disc_weight", "pixel_weight"])
def test_a_weight_of_0_leaves_a_term_out(x, left_out):
    pair = made(VQGANLossConfig(**{left_out: 0.0}, disc_start=0.0, disc_warmup=0.0))
    step = pair(x, 0.5)
    assert step.total.isfinite()
    if left_out == "disc_weight":
        assert step.discriminator_loss == step.logits_real == step.adaptive_weight == 0
        assert not trained(step.total, pair.discriminator)
    if left_out == "perceptual_weight":
        assert step.perceptual == 0


def test_discriminator_and_generator_losses_equal_their_formulae(generator):
    real, fake = torch.randn(2, 5, 7, generator=generator, dtype=torch.float64)
    hinge = hinge_loss(real, fake)
    assert math.isclose(hinge.real, sum(max(0, 1 - v) for v in real.flatten().tolist()) / 70)
    assert math.isclose(hinge.fake, sum(max(0, 1 + v) for v in fake.flatten().tolist()) / 70)
    soft = non_saturating_loss(real, fake)
    assert torch.allclose(soft.real, -torch.log(torch.sigmoid(real)).mean() / 2)
    assert torch.allclose(soft.fake, -torch.log(1 - torch.sigmoid(fake)).mean() / 2)
    assert hinge.total == hinge.real + hinge.fake and soft.total == soft.real + soft.fake
    assert torch.equal(generator_loss(fake), -fake.mean())
    assert torch.allclose(generator_loss(fake, "non-saturating"), F.softplus(-fake).mean())


def test_the_hinge_loss_is_1_for_logits_of_0_and_0_beyond_the_margin():
    assert hinge_loss(torch.zeros(3), torch.zeros(3)).total == 1
    sure = hinge_loss(torch.full((3,), 1.5), torch.full((3,), -1.5))
    assert sure.total == 0  # logits beyond ±1 have no gradient


# ---------------------------------------------------------------- λ


def test_the_adaptive_weight_equals_the_ratio_of_the_gradient_norms(x):
    pair = made()
    model = pair.generator
    last, fake = last_layer(model.decoder), model(x).reconstruction
    pictures = (fake - x).abs().mean()
    gan = generator_loss(pair.discriminator.with_frozen_weights(fake))
    weight = adaptive_weight(pictures, gan, last)
    norms = [
        torch.autograd.grad(term, last, retain_graph=True)[0].norm() for term in (pictures, gan)
    ]
    assert torch.allclose(weight, norms[0] / (norms[1] + DELTA), rtol=1e-12)
    assert not weight.requires_grad
    tenth = adaptive_weight(pictures, gan / 10, last)
    assert tenth > 5 * weight  # a small gradient gets a large weight


def test_the_adaptive_weight_is_finite_without_a_generator_gradient():
    last = torch.ones(2, requires_grad=True)
    assert adaptive_weight(last.sum(), 0 * last.sum(), last) == pytest.approx(
        min(2**0.5 / DELTA, MAX_ADAPTIVE_WEIGHT)
    )
    assert adaptive_weight(100 * last.sum(), 0 * last.sum(), last) == MAX_ADAPTIVE_WEIGHT


def test_the_adaptive_weight_is_correct_for_gradients_below_the_range_of_float16():
    """A mean over many pixels has gradients below float16's smallest number."""
    last = torch.full((4,), 0.5, requires_grad=True)
    tiny = (last.half() * 2.0**-12).mean() * 2.0**-14
    weight = adaptive_weight(last.mean(), tiny, last)
    small = torch.full((4,), 2.0**-28).norm().item()
    assert weight == pytest.approx(0.5 / (small + DELTA), rel=1e-3)


def test_the_last_layer_is_the_last_convolution_of_the_decoder():
    model = made().generator
    assert last_layer(model.decoder) is model.decoder[-1].weight


def test_without_adaptive_the_weight_is_1(x):
    fixed = VQGANLossConfig(adaptive=False, disc_start=0.0, disc_warmup=0.0)
    assert made(fixed)(x, 0.5).adaptive_weight == 1


# ---------------------------------------------------------------- when the discriminator starts


def test_disc_factor_is_0_until_the_warmup_ends_and_then_rises_to_1():
    config = VQGANLossConfig(disc_start=0.4, disc_warmup=0.1)
    assert [config.disc_factor(p) for p in (0.0, 0.4, 0.49)] == [0, 0, 0]
    assert config.disc_factor(0.55) == pytest.approx(0.5)
    assert config.disc_factor(0.6) == pytest.approx(1) and config.disc_factor(1.0) == 1


def test_before_disc_start_the_discriminator_has_no_loss_and_no_weight(x):
    pair = made(VQGANLossConfig(disc_start=0.4, disc_warmup=0.1))
    D = pair.discriminator
    early, alone, late = (pair(x, p) for p in (0.39, 0.45, 0.9))
    assert early.discriminator_loss == early.adaptive_weight == 0 and not trained(early.total, D)
    assert alone.discriminator_loss > 0 and alone.generator_loss == 0 and trained(alone.total, D)
    assert late.discriminator_loss > 0 and late.adaptive_weight > 0
    # Data-parallel training waits for a gradient of every weight, even a gradient of 0.
    gradients = torch.autograd.grad(early.total, D.parameters())
    assert all(g.abs().max() == 0 for g in gradients)


# ---------------------------------------------------------------- the discriminator


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_the_receptive_field_of_one_logit_is_one_patch(levels, generator):
    discriminator = Discriminator(DiscriminatorConfig(4, levels)).double().eval()
    side = 128
    x = torch.randn(1, 3, side, side, generator=generator, dtype=torch.float64).requires_grad_()
    logits = discriminator(x)
    middle = logits.shape[-1] // 2
    (seen,) = torch.autograd.grad(logits[0, 0, middle, middle], x)
    rows = seen.abs().sum((0, 1, 3)).nonzero()[:, 0]
    field = rows[-1] - rows[0] + 1
    assert field == discriminator.config.patch == {1: 16, 2: 34, 3: 70}[levels]


def test_pictures_smaller_than_a_few_patches_are_an_error(unchecked):
    with pytest.raises(ValueError, match=r"sides of at least 24, not \(1, 3, 16, 16\)"):
        Discriminator(DiscriminatorConfig(4, 3))(torch.zeros(1, 3, 16, 16))
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\)"):
        Discriminator(DiscriminatorConfig(4, 1))(torch.zeros(1, 1, 16, 16))
    assert Discriminator(DiscriminatorConfig(4, 3))(torch.zeros(1, 3, 24, 24)).numel() == 1


# ---------------------------------------------------------------- the perceptual distance


def test_the_perceptual_distance_equals_equation_1_of_zhang_et_al(x, generator):
    y = torch.rand(x.shape, generator=generator, dtype=torch.float64)
    channel_weights = torch.rand(2, 3, generator=generator, dtype=torch.float64).unbind()
    expected = torch.zeros(4, dtype=torch.float64)
    for a, b, w in zip(edges(x), edges(y), channel_weights, strict=True):
        for n in range(4):
            for i in range(a.shape[2]):
                for j in range(a.shape[3]):
                    u, v = (m[n, :, i, j] / m[n, :, i, j].norm() for m in (a, b))
                    expected[n] += (w * (u - v) ** 2).sum() / (a.shape[2] * a.shape[3])
    assert torch.allclose(perceptual_distance(edges, x, y, channel_weights), expected)
    halves = [torch.full((3,), 0.5, dtype=torch.float64)] * 2
    assert torch.allclose(
        perceptual_distance(edges, x, y), perceptual_distance(edges, x, y, halves)
    )
    assert perceptual_distance(edges, x, x).abs().max() == 0


def test_perceptual_distance_and_pixel_distance_rank_noise_and_shift_differently(generator):
    reader = load_reader("reader")
    x = Shapes().test_set("test-full", 8).pictures
    noisy = (x + 0.2 * torch.randn(x.shape, generator=generator)).clamp(-1, 1)
    shifted = x.roll(1, dims=3)
    with torch.no_grad():
        d = [perceptual_distance(reader.trunk, x, y).mean() for y in (noisy, shifted)]
    assert (noisy - x).abs().mean() > 2 * (shifted - x).abs().mean() and d[0] > d[1]


def test_a_vgg_trunk_takes_the_layers_of_vgg_16_only():
    torchvision = pytest.importorskip("torchvision")
    with pytest.raises(ValueError, match="not the layers of VGG-16"):
        VGGTrunk(torchvision.models.vgg11(weights=None).features)
    trunk = VGGTrunk(torchvision.models.vgg16(weights=None).features)
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    maps = trunk(x)
    channel_weights = lpips_channel_weights()
    assert [m.shape[1] for m in maps] == [64, 128, 256, 512, 512]
    assert [m.shape[1] for m in maps] == [len(w) for w in channel_weights]
    assert not any(p.requires_grad for p in trunk.parameters())
    d = perceptual_distance(trunk, x, x.flip(3), channel_weights)
    assert d.shape == (2,) and (d > 0).all()


# ---------------------------------------------------------------- precision


def test_under_autocast_losses_and_adaptive_weight_stay_in_float32(x):
    pair = made().float()
    with torch.autocast("cpu", torch.bfloat16):
        step = pair(x.float(), 0.5)
    assert {value.dtype for value in step} == {torch.float32}
    step.total.backward()
    assert all(p.grad.isfinite().all() for p in pair.parameters())


def test_a_training_step_does_not_change_its_pictures(x):
    pair, before = made(), x.clone()
    pair(x, 0.5).total.backward()
    assert torch.equal(x, before)


# ---------------------------------------------------------------- it learns


@pytest.mark.slow
def test_generator_and_discriminator_learn_eight_pictures(tmp_path):
    torch.manual_seed(0)
    pictures = TinyShapes().test_set("test-full", 8).pictures
    sizes = {"codebook_size": 512, "code_dim": 3, "quantizer": "fsq"}
    config = VQVAEConfig(32, (16, 32), blocks=1, **sizes)
    trunk = copy.deepcopy(load_reader("reader")).requires_grad_(False).trunk
    pair = VQGANWithDiscriminator(
        VQVAE.from_config(config),
        Discriminator(DiscriminatorConfig(8, 1)),
        VQGANLossConfig(4.0, disc_weight=0.4, disc_start=0.3, disc_warmup=0.1),
        lambda x, y: perceptual_distance(trunk, x, y),
    )
    result = train(
        pair,
        lambda step, generator: (pictures, step / 160),
        lambda model, batch, generator: model(*batch),
        TrainConfig(160, 8, 6e-3, warmup_steps=20, ema_decay=0.9),
        tmp_path,
        betas=(0.5, 0.9),
        progress=False,
    )
    curves = result.curves
    assert curves["pixels"][-1] < 0.05 < 0.5 < curves["pixels"][0]
    assert curves["perceptual"][-1] < curves["perceptual"][0] / 20
    entry = next(i for i, step in enumerate(curves["step"]) if step > 0.3 * 160)
    loss, weight = curves["discriminator_loss"], curves["adaptive_weight"]
    assert max(loss[: entry - 1]) == 0 < min(loss[entry + 1 :])
    assert max(weight[: entry - 1]) == 0 < weight[-1]
    assert curves["logits_real"][-1] > curves["logits_fake"][-1]


class TwoNetworks(nn.Module):
    """Two networks of one number each, whose gradients differ by a factor of a thousand."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(1, 1, bias=False)
        self.second = nn.Linear(1, 1, bias=False)

    @property
    def networks(self):
        return self.first, self.second

    def forward(self, x):
        return self.first(x).mean() * 1e-3 + self.second(x).mean()


def test_gradients_of_two_networks_are_clipped_separately(tmp_path):
    lengths = []

    def note(model, batch, step, generator):
        lengths.append([p.grad.norm().item() for p in model.parameters()])

    def loss(model, batch, generator):
        total = model(batch)
        return PriorLoss(total, total)

    result = train(
        TwoNetworks(),
        lambda step, generator: torch.ones(1, 1),
        loss,
        TrainConfig(2, 1, gradient_clip=0.1),
        tmp_path,
        after_step=note,
        progress=False,
    )
    assert lengths[0] == pytest.approx([1e-3, 0.1], rel=1e-3)  # the larger one alone is shortened
    assert result.curves["gradient_norm"][0] == pytest.approx(1e-3, rel=1e-3)


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("pictures", "message"),
    [
        (torch.zeros(2, 3, 18, 16), r"\(B, 3, 16, 16\)"),
        (torch.zeros(2, 1, 16, 16), r"\(B, 3, 16, 16\)"),
        (torch.zeros(3, 16, 16), r"\(B, 3, 16, 16\)"),
        (torch.zeros(2, 3, 16, 16, dtype=torch.uint8), "uint8"),
        (torch.full((2, 3, 16, 16), 255.0), "go from 255 to 255. Bytes become pixels"),
        (torch.full((2, 3, 16, 16), math.nan), "go from nan"),
    ],
)
def test_a_vqgan_checks_size_type_and_range_of_its_pictures(unchecked, pictures, message):
    with pytest.raises(ValueError, match=message):
        made()(pictures, 0.5)


@pytest.mark.parametrize(
    "wrong",
    [
        {"pixel_weight": -1.0},
        {"gan_loss": "wasserstein"},
        {"disc_start": 1.5},
        {"disc_warmup": -0.1},
    ],
)
def test_loss_configs_out_of_range_are_an_error(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}.*{next(iter(wrong.values()))}"):
        VQGANLossConfig(**wrong)


def test_a_discriminator_without_levels_is_an_error():
    with pytest.raises(ValueError, match="one channel and one level, not 64 and 0"):
        DiscriminatorConfig(num_levels=0)


def test_decoded_tokens_equal_the_reconstruction(x, unchecked):
    model = made().generator.eval()
    indices = model.tokens(x)
    with torch.no_grad():
        assert torch.allclose(model.decode_tokens(indices), model(x).reconstruction)


def test_the_generator_is_the_vqvae_of_chapter_2(x):
    ours = made().generator.eval()
    assert type(ours) is VQVAE
    theirs = VQVAE.from_config(SIZES).double().eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    with torch.no_grad():
        assert torch.equal(ours(x).reconstruction, theirs(x).reconstruction)


def test_vqgan_loss_equals_its_equation(x):
    model = made().generator
    output = model(x)
    seen, gan = distance(x, output.reconstruction), torch.tensor(0.3, dtype=torch.float64)
    loss = vqgan_loss(x, output, seen, gan, 0.5, VQGANLossConfig(2.0, 3.0), beta=0.1)
    expected = 2 * (output.reconstruction - x).abs().mean() + 3 * seen.mean() + 0.5 * 0.3
    _, _, codebook_loss, commitment_loss = output.quantized
    expected = expected + codebook_loss + 0.1 * commitment_loss
    assert torch.allclose(loss.total, expected)
