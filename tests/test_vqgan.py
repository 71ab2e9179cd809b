"""Two players on one picture: each learns from its own terms alone, at its own time."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from t2ilearn import weights
from t2ilearn.data import Shapes, TinyShapes
from t2ilearn.drawing import load_reader
from t2ilearn.training import TrainConfig, train
from t2ilearn.vqgan import (
    DELTA,
    MAX_ADAPTIVE_WEIGHT,
    VQGAN,
    Discriminator,
    DiscriminatorConfig,
    VQGANLossConfig,
    VQGANWithDiscriminator,
    VGGTrunk,
    adaptive_weight,
    hinge_loss,
    non_saturating_loss,
    perceptual_distance,
    generator_loss,
    vqgan_loss,
)
from t2ilearn.vqvae import VQVAE, VQVAEConfig

SIZES = VQVAEConfig(
    resolution=16, channels=(8, 16), blocks=1, codebook_size=27, code_dim=3, quantizer="gradient"
)
NOW = VQGANLossConfig(start=0.0, warm=0.0)  # the critic is there from the first step


def edges(x):
    """A trunk of two levels that needs no training."""
    return [x[..., 1:] - x[..., :-1], F.avg_pool2d(x, 2)]


def distance(x, y):
    return perceptual_distance(edges, x, y)


def pair(objective=NOW, config=SIZES) -> VQGANWithDiscriminator:
    """Both players in float64, always with the same weights."""
    torch.manual_seed(0)
    players = VQGANWithDiscriminator(VQGAN(config), Discriminator(DiscriminatorConfig(4, 1)), objective, distance)
    return players.double().train()


@pytest.fixture
def x(generator):
    """Four pictures of noise, in float64."""
    return torch.rand(4, 3, 16, 16, generator=generator, dtype=torch.float64) * 2 - 1


def moved(loss, module):
    """The names of parameters that a loss has a gradient for."""
    names, parameters = zip(*module.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    found = zip(names, gradients, strict=True)
    return {name for name, g in found if g is not None and g.abs().max() > 0}


# ---------------------------------------------------------------- who moves whom


def test_no_gradient_crosses_from_one_player_to_the_other(x):
    players = pair()
    step = players(x, 0.5)
    ours = step.total - step.critic
    assert moved(step.critic, players.critic) and not moved(step.critic, players.generator)
    assert moved(ours, players.generator) and not moved(ours, players.critic)


def test_each_term_moves_its_own_part(x):
    players = pair()
    step, model = players(x, 0.5), players.generator
    parts = {"encoder": model.encoder, "decoder": model.decoder, "codebook_size": model.quantizer}
    wanted = {
        "pixels": {"encoder", "decoder"},
        "perceptual": {"encoder", "decoder"},
        "adversarial": {"encoder", "decoder"},
        "codebook": {"codes"},
        "commitment": {"encoder"},
    }
    for term, expected in wanted.items():
        found = {name for name, part in parts.items() if moved(getattr(step, term), part)}
        assert found == expected, term


def test_the_adversarial_gradient_is_the_critics_own_opinion_of_the_picture(x):
    players = pair()
    drawn = x.clone().requires_grad_()
    (through,) = torch.autograd.grad(players.critic.with_frozen_weights(drawn).sum(), drawn)
    (plain,) = torch.autograd.grad(players.critic(drawn).sum(), drawn)
    assert torch.equal(through, plain) and plain.abs().max() > 0


def test_the_total_is_the_equation(x):
    players = pair(VQGANLossConfig(2.0, 0.7, 0.4, start=0.0, warm=0.0))
    step = players(x, 0.5)
    ours = 2.0 * step.pixels + 0.7 * step.perceptual + step.codebook_loss + 0.25 * step.commitment_loss
    expected = ours + 0.4 * step.weight * step.adversarial + step.critic
    assert torch.allclose(step.total, expected, rtol=1e-12)


@pytest.mark.parametrize("left_out", ["perceptual", "adversarial", "pixels"])
def test_a_weight_of_0_leaves_a_term_out(x, left_out):
    players = pair(VQGANLossConfig(**{left_out: 0.0}, start=0.0, warm=0.0))
    step = players(x, 0.5)
    assert step.total.isfinite()
    if left_out == "adversarial":
        assert step.critic == 0 and step.real_logit == 0 and step.weight == 0
        assert not moved(step.total, players.critic)
    if left_out == "perceptual":
        assert step.perceptual == 0


def test_the_two_critics_losses_are_their_formulae(generator):
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


def test_a_critic_that_knows_nothing_has_a_hinge_loss_of_1():
    assert hinge_loss(torch.zeros(3), torch.zeros(3)).total == 1
    sure = hinge_loss(torch.full((3,), 1.5), torch.full((3,), -1.5))
    assert sure.total == 0  # once sure enough it stops pushing


# ---------------------------------------------------------------- λ


def test_lambda_makes_both_gradients_equally_strong(x):
    players = pair()
    model = players.generator
    drawn = model(x).reconstruction
    pictures, opinion = (drawn - x).abs().mean(), generator_loss(players.critic.with_frozen_weights(drawn))
    weight = adaptive_weight(pictures, opinion, model.last_layer)
    norms = [
        torch.autograd.grad(term, model.last_layer, retain_graph=True)[0].norm()
        for term in (pictures, opinion)
    ]
    assert torch.allclose(weight, norms[0] / (norms[1] + DELTA), rtol=1e-12)
    assert not weight.requires_grad
    tenth = adaptive_weight(pictures, opinion / 10, model.last_layer)
    assert tenth > 5 * weight  # a quiet critic is turned up


def test_lambda_stays_finite_where_the_critic_says_nothing():
    last = torch.ones(2, requires_grad=True)
    assert adaptive_weight(last.sum(), 0 * last.sum(), last) == pytest.approx(
        min(2**0.5 / DELTA, MAX_ADAPTIVE_WEIGHT)
    )
    assert adaptive_weight(100 * last.sum(), 0 * last.sum(), last) == MAX_ADAPTIVE_WEIGHT


def test_lambda_survives_half_precision_where_gradients_are_small():
    """A mean over many pixels has gradients below float16's smallest number."""
    last = torch.full((4,), 0.5, requires_grad=True)
    tiny = (last.half() * 2.0**-12).mean() * 2.0**-14
    weight = adaptive_weight(last.mean(), tiny, last)
    quiet = torch.full((4,), 2.0**-28).norm().item()
    assert weight == pytest.approx(0.5 / (quiet + DELTA), rel=1e-3)


def test_the_last_layer_is_the_one_that_paints():
    model = pair().generator
    assert model.last_layer is model.decoder[-1].weight


def test_a_fixed_weight_is_1(x):
    assert pair(VQGANLossConfig(adaptive=False, start=0.0, warm=0.0))(x, 0.5).weight == 1


# ---------------------------------------------------------------- the critic's entry


def test_the_critic_first_learns_alone_and_its_say_then_rises():
    plan = VQGANLossConfig(start=0.4, warm=0.1)
    assert [plan.say(p) for p in (0.0, 0.4, 0.49)] == [0, 0, 0]
    assert plan.say(0.55) == pytest.approx(0.5)
    assert plan.say(0.6) == pytest.approx(1) and plan.say(1.0) == 1


def test_before_its_time_the_critic_neither_learns_nor_speaks(x):
    players = pair(VQGANLossConfig(start=0.4, warm=0.1))
    early, alone, late = (players(x, p) for p in (0.39, 0.45, 0.9))
    assert early.critic == 0 and early.weight == 0 and not moved(early.total, players.critic)
    assert alone.critic > 0 and alone.adversarial == 0 and moved(alone.total, players.critic)
    assert late.critic > 0 and late.weight > 0
    # Data-parallel training waits for a gradient of every weight, even one of 0.
    gradients = torch.autograd.grad(early.total, players.critic.parameters())
    assert all(g.abs().max() == 0 for g in gradients)


# ---------------------------------------------------------------- the critic


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_one_logit_sees_one_patch(levels, generator):
    critic = Discriminator(DiscriminatorConfig(4, levels)).double().eval()
    side = 128
    x = torch.randn(1, 3, side, side, generator=generator, dtype=torch.float64).requires_grad_()
    logits = critic(x)
    middle = logits.shape[-1] // 2
    (seen,) = torch.autograd.grad(logits[0, 0, middle, middle], x)
    rows = seen.abs().sum((0, 1, 3)).nonzero()[:, 0]
    assert rows[-1] - rows[0] + 1 == critic.config.patch == {1: 16, 2: 34, 3: 70}[levels]


def test_small_pictures_have_no_patches(unchecked):
    with pytest.raises(ValueError, match=r"sides of 24 at least, not \(1, 3, 16, 16\)"):
        Discriminator(DiscriminatorConfig(4, 3))(torch.zeros(1, 3, 16, 16))
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\)"):
        Discriminator(DiscriminatorConfig(4, 1))(torch.zeros(1, 1, 16, 16))
    assert Discriminator(DiscriminatorConfig(4, 3))(torch.zeros(1, 3, 24, 24)).numel() == 1


# ---------------------------------------------------------------- the perceptual distance


def test_the_perceptual_distance_is_zhangs_first_equation(x, generator):
    y = torch.rand(x.shape, generator=generator, dtype=torch.float64)
    heads = [torch.rand(3, generator=generator, dtype=torch.float64) for _ in range(2)]
    expected = torch.zeros(4, dtype=torch.float64)
    for a, b, w in zip(edges(x), edges(y), heads, strict=True):
        for n in range(4):
            for i in range(a.shape[2]):
                for j in range(a.shape[3]):
                    u, v = (m[n, :, i, j] / m[n, :, i, j].norm() for m in (a, b))
                    expected[n] += (w * (u - v) ** 2).sum() / (a.shape[2] * a.shape[3])
    assert torch.allclose(perceptual_distance(edges, x, y, heads), expected)
    halves = [torch.full((3,), 0.5, dtype=torch.float64)] * 2
    assert torch.allclose(
        perceptual_distance(edges, x, y), perceptual_distance(edges, x, y, halves)
    )
    assert perceptual_distance(edges, x, x).abs().max() == 0


def test_the_training_reader_sees_what_pixels_do_not(generator):
    reader = load_reader("reader")
    x = Shapes().test_set("test-full", 8).pictures
    noisy = (x + 0.2 * torch.randn(x.shape, generator=generator)).clamp(-1, 1)
    shifted = x.roll(1, dims=3)
    with torch.no_grad():
        d = [perceptual_distance(reader.trunk, x, y).mean() for y in (noisy, shifted)]
    assert (noisy - x).abs().mean() > 2 * (shifted - x).abs().mean() and d[0] > d[1]


def test_only_vggs_layers_make_a_vgg_trunk():
    torchvision = pytest.importorskip("torchvision")
    with pytest.raises(ValueError, match="not the layers of VGG-16"):
        VGGTrunk(torchvision.models.vgg11(weights=None).features)
    trunk = VGGTrunk(torchvision.models.vgg16(weights=None).features)
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    maps = trunk(x)
    heads = weights.lpips_channel_weights()
    assert [m.shape[1] for m in maps] == [len(h) for h in heads] == [64, 128, 256, 512, 512]
    assert not any(p.requires_grad for p in trunk.parameters())
    d = perceptual_distance(trunk, x, x.flip(3), heads)
    assert d.shape == (2,) and (d > 0).all()


# ---------------------------------------------------------------- precision


def test_under_autocast_losses_and_lambda_stay_in_float32(x):
    players = pair().float()
    with torch.autocast("cpu", torch.bfloat16):
        step = players(x.float(), 0.5)
    assert {value.dtype for value in step} == {torch.float32}
    step.total.backward()
    assert all(p.grad.isfinite().all() for p in players.parameters())


def test_nothing_changes_its_arguments(x):
    players, before = pair(), x.clone()
    players(x, 0.5).total.backward()
    assert torch.equal(x, before)


# ---------------------------------------------------------------- it learns


@pytest.mark.slow
def test_two_players_learn_eight_pictures(tmp_path):
    torch.manual_seed(0)
    pictures = TinyShapes().test_set("test-full", 8).pictures
    config = VQVAEConfig(32, (16, 32), blocks=1, codebook_size=512, code_dim=3, quantizer="fsq")
    trunk = copy.deepcopy(load_reader("reader")).requires_grad_(False).trunk
    players = VQGANWithDiscriminator(
        VQGAN(config),
        Discriminator(DiscriminatorConfig(8, 1)),
        VQGANLossConfig(pixels=4.0, adversarial=0.4, start=0.3, warm=0.1),
        lambda x, y: perceptual_distance(trunk, x, y),
    )
    result = train(
        players,
        lambda step, generator: (pictures, step / 300),
        lambda model, batch, generator: model(*batch),
        TrainConfig(300, 8, 6e-3, warmup_steps=20, ema_decay=0.9),
        tmp_path,
        betas=(0.5, 0.9),
        progress=False,
    )
    curves = result.curves
    assert curves["pixels"][-1] < 0.05 < 0.5 < curves["pixels"][0]
    assert curves["perceptual"][-1] < curves["perceptual"][0] / 20
    entry = next(i for i, step in enumerate(curves["step"]) if step > 0.3 * 300)
    assert max(curves["critic"][: entry - 1]) == 0 < min(curves["critic"][entry + 1 :])
    assert max(curves["weight"][: entry - 1]) == 0 < curves["weight"][-1]
    assert curves["real_logit"][-1] > curves["fake_logit"][-1]


class Tug(nn.Module):
    """Two players of one number each, whose gradients differ a thousandfold."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(1, 1, bias=False)
        self.second = nn.Linear(1, 1, bias=False)

    @property
    def players(self):
        return self.first, self.second

    def forward(self, x):
        return self.first(x).mean() * 1e-3 + self.second(x).mean()


def test_players_are_clipped_apart(tmp_path):
    lengths = []

    def note(model, batch, step, generator):
        lengths.append([p.grad.norm().item() for p in model.parameters()])

    def loss(model, batch, generator):
        from t2ilearn.prior import PriorLoss

        total = model(batch)
        return PriorLoss(total, total)

    result = train(
        Tug(),
        lambda step, generator: torch.ones(1, 1),
        loss,
        TrainConfig(2, 1, gradient_clip=0.1),
        tmp_path,
        after_step=note,
        progress=False,
    )
    assert lengths[0] == pytest.approx([1e-3, 0.1], rel=1e-3)  # the loud one alone is shortened
    assert result.curves["gradient_norm"][0] == pytest.approx(1e-3, rel=1e-3)


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("pictures", "said"),
    [
        (torch.zeros(2, 3, 18, 16), "both sides must be multiples of 4, not 18 × 16"),
        (torch.zeros(2, 1, 16, 16), r"\(B, 3, H, W\)"),
        (torch.zeros(3, 16, 16), r"\(B, 3, H, W\)"),
        (torch.zeros(2, 3, 16, 16, dtype=torch.uint8), "uint8"),
        (torch.full((2, 3, 16, 16), 255.0), "go from 255 to 255. Bytes become pixels"),
        (torch.full((2, 3, 16, 16), math.nan), "go from nan"),
        (torch.zeros(0, 3, 16, 16), "no picture"),
    ],
)
def test_what_is_no_picture_is_refused(unchecked, pictures, said):
    with pytest.raises(ValueError, match=said):
        VQGAN(SIZES)(pictures)


@pytest.mark.parametrize(
    "wrong",
    [
        {"pixels": -1.0},
        {"loss": "wasserstein"},
        {"start": 1.5},
        {"warm": -0.1},
    ],
)
def test_objectives_without_sense_are_refused(wrong):
    with pytest.raises(ValueError):
        VQGANLossConfig(**wrong)


def test_critics_without_channels_are_refused():
    with pytest.raises(ValueError, match="one channel and one level"):
        DiscriminatorConfig(levels=0)


def test_larger_pictures_have_more_codes_and_the_config_s_own_decode(x, unchecked):
    model = pair().generator.eval()
    assert model.encode(F.pad(x, (0, 16, 0, 0))).shape[2:] == (4, 8)
    indices = model.tokens(x)
    with torch.no_grad():
        assert torch.allclose(model.decode_tokens(indices), model(x).reconstruction)


def test_it_is_chapter_twos_model_with_other_manners(x):
    torch.manual_seed(0)
    ours = VQGAN(SIZES).double().eval()
    theirs = VQVAE.from_config(SIZES).double().eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    with torch.no_grad():
        assert torch.equal(ours(x).reconstruction, theirs(x).reconstruction)


def test_the_loss_by_itself_is_the_equation(x):
    model = pair().generator
    output = model(x)
    seen, opinion = distance(x, output.reconstruction), torch.tensor(0.3, dtype=torch.float64)
    loss = vqgan_loss(x, output, seen, opinion, 0.5, VQGANLossConfig(2.0, 3.0), beta=0.1)
    expected = 2 * (output.reconstruction - x).abs().mean() + 3 * seen.mean() + 0.5 * 0.3
    expected = expected + output.quantized.codebook_loss + 0.1 * output.quantized.commitment_loss
    assert torch.allclose(loss.total, expected)
