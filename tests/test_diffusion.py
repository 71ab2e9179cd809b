"""Diffusion: schedules, targets, weights of the losses, samplers, guidance and thresholds."""

import math

import pytest
import torch

from t2ilearn.models import diffusion_samplers
from t2ilearn.models.conditioning import (
    TextEncoder,
    TimeEmbedding,
    check_captions,
    timestep_embedding,
)
from t2ilearn.models.diffusion import (
    SMALLEST_DISTANCE,
    TARGETS,
    RectifiedFlow,
    VariancePreserving,
    ddpm_loss,
    estimate_of,
    flow_loss,
    jit_loss,
    min_snr_weight,
    q_sample,
    target_of,
    with_x,
)
from t2ilearn.models.diffusion_samplers import (
    SAMPLERS,
    Denoiser,
    ddim_steps,
    ddpm_steps,
    dpm_solver_steps,
    dynamic_threshold,
    euler_steps,
    flow_times,
    guided,
    heun_steps,
    static_threshold,
    timesteps,
)
from t2ilearn.models.noise_schedules import (
    cosine_alpha_bar,
    linear_alpha_bar,
    zero_terminal_snr,
)
from t2ilearn.models.tokens import END, PAD

VP = VariancePreserving(cosine_alpha_bar(100))
ZERO_SNR = VariancePreserving(zero_terminal_snr(linear_alpha_bar()))
FLOW = RectifiedFlow()
PROCESSES = [VP, ZERO_SNR, FLOW]
NAMES = ["variance preserving", "zero terminal SNR", "rectified flow"]
each_process = pytest.mark.parametrize("process", PROCESSES, ids=NAMES)


def some(generator, *shape):
    return torch.randn(*(shape or (4, 3, 2, 2)), generator=generator, dtype=torch.float64)


def times_of(process, count=8):
    return flow_times(count) if process is FLOW else timesteps(count, process)


def perfect(x, process):
    """The optimal network for a data set of one picture: it always predicts x."""
    return lambda z, t: x.expand_as(z)


def curved(z, t):
    return 0.8 * (1.7 * z).sin() + 0.1 * z


# ---------------------------------------------------------------- schedules


def test_the_schedules_agree_with_their_formulas():
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    assert torch.equal(linear_alpha_bar(), (1 - beta).cumprod(0))
    cosine = cosine_alpha_bar(50)
    for step in range(49):  # the last β is clipped
        f = [math.cos((t / 50 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in (step + 1, 0)]
        assert cosine[step].item() == pytest.approx(f[0] / f[1], rel=1e-12)
    assert cosine[-1].item() == pytest.approx(cosine[-2].item() * 0.001, rel=1e-9)
    assert cosine.dtype == torch.float64


def test_zero_terminal_snr_keeps_the_first_step_and_its_argument():
    before = linear_alpha_bar()
    kept = before.clone()
    after = zero_terminal_snr(before)
    assert torch.equal(before, kept)
    assert after[0].item() == pytest.approx(before[0].item(), rel=1e-12) and after[-1] == 0
    assert (after.diff() < 0).all()


@pytest.mark.parametrize(
    "make",
    [
        lambda: linear_alpha_bar(0),
        lambda: linear_alpha_bar(10, 0.0, 0.5),
        lambda: linear_alpha_bar(10, 0.1, 1.0),
        lambda: linear_alpha_bar(10, math.nan, 0.2),
        lambda: cosine_alpha_bar(-3),
        lambda: cosine_alpha_bar(10, max_beta=1.5),
        lambda: cosine_alpha_bar(10, offset=-1.0),
        lambda: VariancePreserving(torch.tensor([])),
        lambda: VariancePreserving(torch.tensor([0.5, 0.6])),
        lambda: VariancePreserving(torch.tensor([1.0, 0.6])),
        lambda: VariancePreserving(torch.tensor([0.9, -0.1])),
        lambda: VariancePreserving(torch.tensor([0.9, math.nan])),
        lambda: RectifiedFlow(std=0.0),
        lambda: RectifiedFlow(mean=math.inf),
    ],
)
def test_schedules_that_leave_the_interval_are_refused(make, unchecked):
    with pytest.raises(ValueError, match="must|one step|Times need"):
        make()


# ---------------------------------------------------------------- mixtures and targets


@each_process
def test_any_target_gives_back_the_picture_and_the_noise(process, generator):
    x, noise = some(generator), some(generator)
    t = torch.rand(4, generator=generator) if process is FLOW else torch.tensor([0, 9, 50, 98])
    z, mix = q_sample(x, t, process, noise), process.mix(t).like(x)
    for kind in TARGETS:
        estimate = estimate_of(kind, target_of(kind, x, noise, mix), z, mix)
        assert torch.allclose(estimate.x, x, atol=1e-9)
        assert torch.allclose(estimate.eps, noise, atol=1e-9)


@each_process
def test_after_clipping_picture_and_noise_still_make_up_the_mixture(process, generator):
    z = 3 * some(generator)
    mix = process.mix(torch.tensor(0.3 if process is FLOW else 40.0))
    before = estimate_of("v", some(generator), z, mix)
    after = with_x(static_threshold(before.x), z, mix)
    assert (before.x.abs() > 1).any() and after.x.abs().max() <= 1
    assert torch.allclose(mix.a * after.x + mix.b * after.eps, z, atol=1e-9)
    assert not torch.allclose(after.eps, before.eps)


def test_v_is_the_velocity_of_the_mixture(generator):
    """dz/dt of a flow by a finite difference; dz/dφ of DDPM's rotation by φ = arccos √ᾱ."""
    x, noise = some(generator), some(generator)
    t = torch.full((4,), 0.4, dtype=torch.float64)
    slope = (q_sample(x, t + 1e-6, FLOW, noise) - q_sample(x, t - 1e-6, FLOW, noise)) / 2e-6
    assert torch.allclose(slope, target_of("v", x, noise, FLOW.mix(t).like(x)), atol=1e-8)
    mix = VP.mix(torch.tensor(30))
    angle = torch.atan2(mix.b, mix.a)
    turned = [(angle + d).cos() * x + (angle + d).sin() * noise for d in (-1e-6, 1e-6)]
    slope = (turned[1] - turned[0]) / 2e-6
    assert torch.allclose(slope, target_of("v", x, noise, mix), atol=1e-8)


def test_the_mixture_has_the_variance_of_the_picture_at_every_time(generator):
    x, noise = some(generator, 2000, 1, 2, 2), some(generator, 2000, 1, 2, 2)
    for time in (0, 50, 99):
        z = q_sample(x, torch.full((2000,), time), VP, noise)
        assert z.std().item() == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("t", [-2.0, 100.0, 0.5])
def test_times_that_a_table_does_not_have_are_refused(t):
    with pytest.raises(ValueError, match="whole numbers from 0 to 99"):
        VP.mix(torch.tensor([t]))


def test_times_outside_a_flow_are_refused():
    with pytest.raises(ValueError, match="from 0 to 1"):
        FLOW.mix(torch.tensor([1.2]))


def test_a_model_of_noise_is_refused_where_the_mixture_is_pure_noise(generator):
    x = some(generator)
    for process in (FLOW, ZERO_SNR):
        with pytest.raises(ValueError, match="Predict v or x0"):
            Denoiser(curved, process, "eps")
    with pytest.raises(ValueError, match="Predict v or x0"):
        ddpm_loss(curved, x, ZERO_SNR, generator=generator)
    with pytest.raises(ValueError, match="one of eps, x0, v, not 'score'"):
        ddpm_loss(curved, x, VP, target="score", generator=generator)


def test_sampled_times_have_their_distributions(generator):
    flow = FLOW.sample_times(20_000, generator)
    assert flow.logit().mean().item() == pytest.approx(-0.8, abs=0.03)
    assert flow.logit().std().item() == pytest.approx(0.8, abs=0.03)
    steps = torch.bincount(VP.sample_times(20_000, generator), minlength=100)
    assert len(steps) == 100 and steps.min() > 130 and steps.max() < 270


# ---------------------------------------------------------------- losses


@pytest.mark.parametrize("gamma", [0.5, 5.0])
def test_min_snr_weights_agree_with_their_closed_forms(gamma):
    snr = torch.tensor([0.0, 0.01, 0.5, 5.0, 300.0], dtype=torch.float64)
    for i, s in enumerate(snr.tolist()):
        least = min(s, gamma)
        assert min_snr_weight("eps", snr, gamma)[i] == pytest.approx(least / s if s else 1)
        assert min_snr_weight("x0", snr, gamma)[i] == pytest.approx(least)
        assert min_snr_weight("v", snr, gamma)[i] == pytest.approx(least / (s + 1))


def test_with_min_snr_weights_all_targets_have_one_loss(generator):
    """They all weigh the error of x̂ by min(SNR, γ), so an equal x̂ has an equal loss."""
    x, noise, t = some(generator), some(generator), torch.tensor([1, 30, 60, 95])
    wrong = x + 0.1 * some(generator)
    mix = VP.mix(t).like(x)
    z = q_sample(x, t, VP, noise)
    eps = with_x(wrong, z, mix).eps
    losses = []
    for kind in TARGETS:
        output = target_of(kind, wrong, eps, mix)
        how = {"target": kind, "gamma": 5.0, "noise": noise, "t": t}
        losses.append(ddpm_loss(lambda z, t, output=output: output, x, VP, **how))
    for loss in losses:
        assert loss.total.item() == pytest.approx(losses[0].total.item(), rel=1e-9)
    assert len({round(loss.mse.item(), 6) for loss in losses}) == 3


def test_the_loss_of_jit_is_the_error_of_v_with_the_distance_bounded(generator):
    x, noise = some(generator), some(generator)
    t = torch.tensor([0.0, 0.3, 0.9, 0.99], dtype=torch.float64)
    z = q_sample(x, t, FLOW, noise)
    loss = jit_loss(curved, x, FLOW, noise=noise, t=t)
    distance = (1 - t).clamp(min=SMALLEST_DISTANCE).view(-1, 1, 1, 1)
    v_hat, v = (curved(z, t) - z) / distance, (x - z) / distance
    assert loss.total.item() == pytest.approx((v_hat - v).square().mean().item(), rel=1e-12)
    assert loss.mse.item() == pytest.approx((curved(z, t) - x).square().mean().item(), rel=1e-12)
    assert loss.weight.item() == pytest.approx(distance.pow(-2).mean().item(), rel=1e-12)
    early = t < 0.95  # there v is x − ε
    assert torch.allclose(v[early], (x - noise)[early])


def test_each_loss_is_zero_for_the_right_prediction_and_draws_what_is_not_given(generator):
    x = some(generator)
    right = {
        "ddpm": lambda: ddpm_loss(perfect(x, VP), x, VP, target="x0", generator=generator),
        "jit": lambda: jit_loss(perfect(x, FLOW), x, FLOW, generator=generator),
        "flow": lambda: flow_loss(lambda z, t: (x - z) / (1 - t.view(-1, 1, 1, 1)), x, FLOW,
                                  generator=generator),
    }  # fmt: skip
    for loss in right.values():
        assert loss().total.item() == pytest.approx(0, abs=1e-8)
    a, b, c = (
        jit_loss(curved, x, FLOW, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)
    )
    assert a == b and a != c


def test_losses_in_half_precision_are_computed_in_float32(generator):
    x = some(generator).float()
    loss = jit_loss(lambda z, t: curved(z, t).bfloat16(), x, FLOW, generator=generator)
    assert loss.total.dtype == torch.float32


def test_losses_refuse_noise_or_times_of_another_shape(generator):
    x = some(generator)
    with pytest.raises(ValueError, match="one time for each"):
        jit_loss(curved, x, FLOW, noise=x[:2], generator=generator)
    with pytest.raises(ValueError, match="one time for each"):
        flow_loss(curved, x, FLOW, t=torch.rand(3), generator=generator)


# ---------------------------------------------------------------- samplers


@pytest.mark.parametrize(
    ("name", "process"),
    [
        *[(name, process) for name in ("ddpm", "ddim", "dpm") for process in PROCESSES],
        ("euler", FLOW),
        ("heun", FLOW),
    ],
)
@pytest.mark.parametrize("count", [1, 2, 9])
def test_each_sampler_ends_at_the_picture_of_a_perfect_model(name, process, count, generator):
    x, z = some(generator, 1, 3, 2, 2), some(generator)
    denoise = Denoiser(perfect(x, process), process, "x0")
    steps = list(SAMPLERS[name](denoise, z, times_of(process, count)))
    assert len(steps) == count and steps[-1].t == times_of(process)[-1]
    assert torch.allclose(steps[-1].z, x.expand_as(z), atol=1e-9)


@each_process
def test_ddpm_is_ddim_with_eta_one(process, generator):
    z, noise = some(generator), [some(generator) for _ in range(8)]
    denoise, times = Denoiser(curved, process, "v"), times_of(process)
    pairs = zip(
        ddpm_steps(denoise, z, times, noise=noise),
        ddim_steps(denoise, z, times, eta=1.0, noise=noise),
        strict=True,
    )
    for a, b in pairs:
        assert torch.allclose(a.z, b.z, atol=1e-9)


def test_ddim_on_a_flow_is_euler(generator):
    z, denoise = some(generator), Denoiser(curved, FLOW, "v")
    a_steps, b_steps = (sampler(denoise, z, flow_times(7)) for sampler in (ddim_steps, euler_steps))
    for a, b in zip(a_steps, b_steps, strict=True):
        assert torch.allclose(a.z, b.z, atol=1e-12)


def gaussian_network(scale):
    """The exact network for pictures from N(0, scale²): x̂ = z · a scale² / (a² scale² + b²)."""

    def network(z, t):
        mix = FLOW.mix(t).like(z)
        return z * mix.a * scale**2 / (mix.a**2 * scale**2 + mix.b**2)

    return network


def test_heun_and_dpm_solver_converge_faster_than_euler(generator):
    """The flow of a Gaussian is known: its end is 0.3 z."""
    z, denoise = some(generator), Denoiser(gaussian_network(0.3), FLOW, "x0")

    def error(sampler, count):
        *_, last = sampler(denoise, z, flow_times(count))
        return (last.z - 0.3 * z).abs().max().item()

    for sampler, order in ((euler_steps, 1), (heun_steps, 2)):
        ratio = error(sampler, 40) / error(sampler, 80)
        assert ratio == pytest.approx(2**order, rel=0.3)
    assert error(heun_steps, 40) < error(euler_steps, 40) / 5
    assert error(dpm_solver_steps, 40) < error(euler_steps, 40) / 3


def test_the_samplers_with_noise_draw_pictures_of_the_right_variance(generator):
    denoise = Denoiser(gaussian_network(0.3), FLOW, "x0")
    z = some(generator, 4000, 1, 1, 1)
    *_, last = ddpm_steps(denoise, z, flow_times(60), generator=generator)
    assert last.z.std().item() == pytest.approx(0.3, rel=0.1)
    assert abs(torch.corrcoef(torch.stack([z.flatten(), last.z.flatten()]))[0, 1]) < 0.5


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_repeat_with_a_seed_and_leave_their_start_unchanged(name, generator):
    z, denoise = some(generator), Denoiser(curved, FLOW, "v")
    kept, state = z.clone(), torch.random.get_rng_state()
    how = [{"generator": torch.Generator().manual_seed(s)} for s in (1, 1, 2)]
    if name not in ("ddpm", "ddim"):
        how = [{}, {}, {}]
    ends = [list(SAMPLERS[name](denoise, z, flow_times(5), **h))[-1].z for h in how]
    assert torch.equal(ends[0], ends[1]) and torch.equal(z, kept)
    assert torch.equal(ends[0], ends[2]) == (name != "ddpm")
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_network_is_asked_at_the_times_given_and_without_gradients(generator):
    asked = []

    def network(z, t):
        asked.append(t.tolist())
        return z.clone().requires_grad_()

    z = some(generator)
    (first, *_) = ddim_steps(Denoiser(network, VP, "v"), z, timesteps(4, VP))
    assert asked == [[t] * 4 for t in (99, 74, 49, 24)]
    assert not first.z.requires_grad


def test_times_are_spaced_trailing_or_leading():
    assert timesteps(4, VP) == [99, 74, 49, 24, -1]
    assert timesteps(4, VP, "leading") == [75, 50, 25, 0, -1]
    assert flow_times(4) == [0, 0.25, 0.5, 0.75, 1]
    shifted = flow_times(4, 3.0)
    assert shifted[0] == 0 and shifted[-1] == 1
    assert shifted[2] == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: timesteps(0, VP), "1 … 100, not 0"),
        (lambda: timesteps(101, VP), "1 … 100, not 101"),
        (lambda: timesteps(5, VP, "linspace"), "trailing or leading, not 'linspace'"),
        (lambda: flow_times(0), "1 or more, not 0"),
        (lambda: flow_times(-2), "1 or more, not -2"),
        (lambda: flow_times(3, 0.0), "shift of times must be above 0"),
    ],
)
def test_impossible_times_are_refused(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def test_samplers_refuse_times_in_the_wrong_order_another_process_and_another_eta(generator):
    z = some(generator)
    flow, vp = Denoiser(curved, FLOW, "v"), Denoiser(curved, VP, "v")
    for denoise, times in ((flow, [0.5, 0.2]), (flow, [0.5]), (vp, [3.0, 7.0]), (vp, [])):
        with pytest.raises(ValueError, match="Times must"):
            list(ddim_steps(denoise, z, times))
    for sampler in (euler_steps, heun_steps):
        with pytest.raises(ValueError, match="rectified flow"):
            list(sampler(vp, z, timesteps(3, VP)))
    for eta in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="η must be in"):
            list(ddim_steps(vp, z, timesteps(3, VP), eta=eta))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_prediction_that_is_not_finite_is_an_error_with_its_time(bad, generator):
    denoise = Denoiser(lambda z, t: torch.where(t[0] > 0.4, bad * z, z), FLOW, "v")
    with pytest.raises(ValueError, match="At time 0.5 the network predicts NaN or infinity"):
        list(euler_steps(denoise, some(generator), flow_times(4)))


# ---------------------------------------------------------------- guidance and thresholds


def by_caption(z, t, caption):
    return z * caption.view(-1, 1, 1, 1)


def test_guidance_has_the_convention_u_plus_s_times_c_minus_u(generator):
    z, t = some(generator), torch.full((4,), 0.5)
    c, u = torch.tensor([1.0, 2, 3, 4]), torch.full((4,), 0.5)
    for s in (0.0, 1.0, 2.5):
        wanted = by_caption(z, t, u) + s * (by_caption(z, t, c) - by_caption(z, t, u))
        assert torch.allclose(guided(by_caption, [c], [u], s)(z, t), wanted)


def test_guidance_takes_one_batch_and_none_where_it_changes_nothing(generator):
    sizes = []

    def network(z, t, caption):
        sizes.append(len(z))
        return by_caption(z, t, caption)

    z, c, u = some(generator), torch.ones(4), torch.zeros(4)
    for s in (0.0, 1.0, 3.0):
        guided(network, [c], [u], s)(z, torch.full((4,), 0.5))
    assert sizes == [4, 4, 8]


def test_outside_its_interval_guidance_is_the_conditional_model(generator):
    z, c, u = some(generator), torch.ones(4), torch.zeros(4)
    network = guided(by_caption, [c], [u], 3.0, interval=(0.1, 0.9))
    scales = [network(z, torch.full((4,), t)) / z for t in (0.0, 0.1, 0.5, 0.9, 0.95)]
    assert [round(s.mean().item(), 6) for s in scales] == [1, 3, 3, 3, 1]


@pytest.mark.parametrize(
    ("scale", "interval", "null", "says"),
    [
        (-1.0, (0.0, 1.0), torch.zeros(4), "0 or more, not -1"),
        (math.nan, (0.0, 1.0), torch.zeros(4), "0 or more, not nan"),
        (2.0, (0.8, 0.2), torch.zeros(4), "must not be empty"),
        (2.0, (0.0, 1.0), torch.zeros(3), "same shape"),
    ],
)
def test_senseless_guidance_is_refused(scale, interval, null, says):
    with pytest.raises(ValueError, match=says):
        guided(by_caption, [torch.ones(4)], [null], scale, interval)


def test_dynamic_threshold_scales_pictures_that_leave_the_range_and_no_others(generator):
    x = torch.stack([torch.linspace(-4, 4, 48), torch.linspace(-0.7, 0.7, 48)]).view(2, 3, 4, 4)
    kept = x.clone()
    y = dynamic_threshold(x, 0.9)
    s = x[0].abs().quantile(0.9)
    assert torch.allclose(y[0], x[0].clamp(-s, s) / s) and torch.equal(y[1], x[1])
    assert torch.equal(x, kept)
    inside = (y[0].abs() < 1).sum()
    assert inside > (static_threshold(x)[0].abs() < 1).sum()
    for percentile in (0.0, 1.2):
        with pytest.raises(ValueError, match="percentile"):
            dynamic_threshold(x, percentile)


def test_a_denoiser_that_thresholds_keeps_both_estimates_consistent(generator):
    z = 4 * some(generator)
    denoise = Denoiser(lambda z, t: 2 * z, FLOW, "x0", static_threshold)
    x, eps = denoise(z, 0.25)
    assert x.abs().max() == 1
    assert torch.allclose(0.25 * x + 0.75 * eps, z)


# ---------------------------------------------------------------- conditions


def test_the_embedding_of_a_time_agrees_with_its_formula():
    e = timestep_embedding(torch.tensor([3.0]), 8)[0]
    for i in range(4):
        angle = 3 * 10_000 ** (-i / 3)
        assert e[i] == pytest.approx(math.sin(angle), abs=1e-6)
        assert e[4 + i] == pytest.approx(math.cos(angle), abs=1e-6)
    for dim in (2, 7, 0):
        with pytest.raises(ValueError, match="even dim above"):
            timestep_embedding(torch.tensor([3.0]), dim)


def test_near_times_have_near_embeddings():
    torch.manual_seed(0)
    near = TimeEmbedding(32, 16, scale=1000.0)(torch.tensor([0.5, 0.501, 0.9]))
    assert (near[0] - near[1]).norm() < (near[0] - near[2]).norm()


@pytest.fixture
def text_encoder():
    torch.manual_seed(0)
    return TextEncoder(11, 6, 16, 2, 2).double()


CAPTIONS = torch.tensor([[3, 4, 5, END, PAD, PAD], [7, END, PAD, PAD, PAD, PAD]])


def test_the_text_encoder_is_cut_to_the_longest_caption_and_ignores_padding(text_encoder):
    both, alone = text_encoder(CAPTIONS), text_encoder(CAPTIONS[1:])
    assert both.vectors.shape == (2, 4, 16) and alone.vectors.shape == (1, 2, 16)
    assert both.real.tolist() == [[True] * 4, [True, True, False, False]]
    assert torch.allclose(both.vectors[1, :2], alone.vectors[0])


def test_the_order_of_words_changes_their_vectors(text_encoder):
    """A bag of words could not tell "a red star and a blue ring" from its opposite."""
    a = text_encoder(torch.tensor([[3, 4, 5, 6, END, PAD]])).vectors[0]
    b = text_encoder(torch.tensor([[5, 4, 3, 6, END, PAD]])).vectors[0]
    token, position = text_encoder.token.std(), text_encoder.position.std()
    assert token.item() == pytest.approx(position.item(), rel=0.15)
    assert (a[0] - b[2]).abs().max() > 0.1 and (a[4] - b[4]).abs().max() > 0.01


@pytest.mark.parametrize(
    ("caption", "says"),
    [
        (torch.zeros(2, 5, dtype=torch.int64), r"shape \(B, 6\)"),
        (torch.full((1, 6), 11), "0 to 10, not 11"),
        (torch.full((1, 6), -1), "0 to 10, not -1"),
        (torch.full((1, 6), PAD), "all padding"),
    ],
)
def test_captions_that_are_none_are_refused(caption, says):
    with pytest.raises(ValueError, match=says):
        check_captions(caption, 11, 6)


def test_a_text_encoder_of_impossible_sizes_is_refused():
    for sizes in ((2, 6, 16, 2, 2), (11, 1, 16, 2, 2), (11, 6, 16, -1, 2), (11, 6, 15, 2, 2)):
        with pytest.raises(ValueError, match="text encoder|multiple of num_heads"):
            TextEncoder(*sizes)


def test_every_sampler_has_a_name():
    made = {f for name, f in vars(diffusion_samplers).items() if name.endswith("_steps")}
    assert set(SAMPLERS.values()) == made
