"""Schedules, targets, samplers and embeddings of diffusion agree with diffusers, in float64 where
diffusers allows it: whole trajectories with a toy network, tables, and gradients of losses.

`pytest -s` prints the largest difference of each row.
"""

import pytest
import torch

from t2ilearn.models.conditioning import timestep_embedding
from t2ilearn.models.diffusion import (
    RectifiedFlow,
    VariancePreserving,
    ddpm_loss,
    flow_loss,
    q_sample,
    target_of,
)
from t2ilearn.models.diffusion_samplers import (
    Denoiser,
    ddim_steps,
    ddpm_steps,
    dpm_solver_steps,
    dynamic_threshold,
    euler_steps,
    flow_times,
    static_threshold,
    timesteps,
)
from t2ilearn.models.dit import DiTBlock, sincos_2d
from t2ilearn.models.noise_schedules import (
    cosine_alpha_bar,
    linear_alpha_bar,
    zero_terminal_snr,
)

diffusers = pytest.importorskip("diffusers")
S = 1000
KINDS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
LARGEST: dict[str, float] = {}


@pytest.fixture(autouse=True, scope="module")
def table():
    """Print the rows when all is done; pytest shows them with -s."""
    yield
    for row, difference in LARGEST.items():
        print(f"\n{row:<52} {difference:8.1e}", end="")


def agree(row: str, ours, theirs, atol: float = 1e-12) -> None:
    """Record the largest difference of this row, and assert that it is small."""
    ours, theirs = (torch.as_tensor(t, dtype=torch.float64).detach() for t in (ours, theirs))
    assert ours.shape == theirs.shape
    difference = (ours - theirs).abs().max().item()
    LARGEST[row] = max(LARGEST.get(row, 0.0), difference)
    assert difference <= atol, f"{row}: {difference:.1e}"


def network(z, t):
    """A toy network: smooth, different at each time, and far from a perfect denoiser."""
    return 0.7 * (1.3 * z).sin() + 0.2 * (t / S).cos().view(-1, 1, 1, 1).to(z.dtype)


def pictures(generator, dtype=torch.float64):
    return torch.randn(2, 3, 4, 4, generator=generator, dtype=dtype)


def with_our_table(peer, process):
    """A peer's scheduler with our ᾱ in float64; its own, in float32, is compared apart."""
    peer.alphas_cumprod = process.alpha_bar
    peer.final_alpha_cumprod = peer.one = torch.tensor(1.0, dtype=torch.float64)
    return peer


# ---------------------------------------------------------------- schedules


def test_linear_and_cosine_schedules_are_those_of_diffusers():
    linear = diffusers.DDPMScheduler(S, beta_schedule="linear")
    cosine = diffusers.DDPMScheduler(S, beta_schedule="squaredcos_cap_v2")
    agree("linear schedule, ᾱ", linear_alpha_bar(), linear.alphas_cumprod, 1e-6)
    agree("cosine schedule, ᾱ", cosine_alpha_bar(), cosine.alphas_cumprod, 1e-6)


@pytest.mark.parametrize("steps", [10, 1000])
def test_zero_terminal_snr_is_diffusers_rescaling(steps):
    from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

    alpha_bar = linear_alpha_bar(steps, 1e-4, 0.02)
    before = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
    beta = rescale_zero_terminal_snr(1 - alpha_bar / before)
    agree("zero terminal SNR, ᾱ", zero_terminal_snr(alpha_bar), (1 - beta).cumprod(0))
    assert zero_terminal_snr(alpha_bar)[-1] == 0


@pytest.mark.parametrize("count", [1, 2, 7, 10, 50, 999, 1000])
@pytest.mark.parametrize("spacing", ["trailing", "leading"])
def test_timesteps_are_those_of_diffusers(count, spacing):
    peer = diffusers.DDIMScheduler(S, timestep_spacing=spacing)
    peer.set_timesteps(count)
    ours = timesteps(count, VariancePreserving(linear_alpha_bar()), spacing)
    assert ours == [*peer.timesteps.tolist(), -1]


# ---------------------------------------------------------------- targets and losses


def test_q_sample_and_the_v_target_are_add_noise_and_get_velocity(generator):
    process = VariancePreserving(cosine_alpha_bar())
    peer = with_our_table(diffusers.DDPMScheduler(S), process)
    x, noise = pictures(generator), pictures(generator)
    for time in (0, 500, 999):
        t = torch.tensor([time, 999 - time])
        agree("q_sample", q_sample(x, t, process, noise), peer.add_noise(x, noise, t))
        v = target_of("v", x, noise, process.mix(t).like(x))
        agree("v target", v, peer.get_velocity(x, noise, t))


def compare(row, ours, theirs, atol=1e-12):
    """Two losses of a network w · sin z, and their derivatives by w."""
    weights = [torch.tensor(0.7, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    losses = ours(lambda z, t: weights[0] * z.sin()).total, theirs(lambda z: weights[1] * z.sin())
    for loss in losses:
        loss.backward()
    agree(row, *losses, atol)
    agree(f"{row}, gradient", weights[0].grad, weights[1].grad, atol)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_of_each_loss_is_that_of_the_peers_target(kind, generator):
    process = VariancePreserving(linear_alpha_bar())
    peer = with_our_table(diffusers.DDPMScheduler(S), process)
    x, noise, t = pictures(generator), pictures(generator), torch.tensor([3, 700])
    target = {"eps": noise, "x0": x, "v": peer.get_velocity(x, noise, t)}[kind]
    z = peer.add_noise(x, noise, t)
    compare(
        "DDPM losses",
        lambda network: ddpm_loss(network, x, process, target=kind, noise=noise, t=t),
        lambda network: ((network(z) - target) ** 2).mean(),
    )


def test_the_gradient_of_the_flow_loss_is_that_of_the_peers_mixture(generator):
    peer = diffusers.FlowMatchEulerDiscreteScheduler(S)
    x, noise = pictures(generator), pictures(generator)
    t = 1 - peer.sigmas[[100, 800]].double()
    z = peer.scale_noise(x.float(), peer.timesteps[[100, 800]], noise.float()).double()
    compare(
        "flow loss",
        lambda network: flow_loss(network, x, RectifiedFlow(), noise=noise, t=t),
        lambda network: ((network(z) - (x - noise)) ** 2).mean(),
        1e-6,
    )


# ---------------------------------------------------------------- samplers: whole trajectories


def follow(row, peer, steps, z, kind_network, atol=1e-12, **how):
    """Compare z after every step."""
    for t, step in zip(peer.timesteps, steps, strict=True):
        done = peer.step(kind_network(z, t.expand(len(z))), t, z, **how)
        z = done.prev_sample
        agree(row, step.z, z, atol)
    return z


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("threshold", [None, static_threshold])
def test_ddpm_follows_diffusers_from_noise_to_picture(kind, threshold, generator):
    process = VariancePreserving(cosine_alpha_bar())
    options = {"prediction_type": KINDS[kind], "clip_sample": threshold is not None}
    peer = with_our_table(
        diffusers.DDPMScheduler(S, timestep_spacing="trailing", **options), process
    )
    peer.set_timesteps(25)
    z = pictures(generator)
    denoise = Denoiser(network, process, kind, threshold)
    ours = torch.Generator().manual_seed(4)
    steps = ddpm_steps(denoise, z, timesteps(25, process), generator=ours)
    theirs = torch.Generator().manual_seed(4)
    # At its last step diffusers adds noise of variance 1e-20, where Algorithm 2 adds none.
    follow(f"DDPM, 25 steps, {kind}", peer, steps, z, network, 1e-9, generator=theirs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spacing", ["trailing", "leading"])
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_ddim_follows_diffusers_from_noise_to_picture(kind, spacing, eta, generator):
    process = VariancePreserving(linear_alpha_bar())
    options = {"prediction_type": KINDS[kind], "clip_sample": False}
    peer = diffusers.DDIMScheduler(S, timestep_spacing=spacing, **options)
    with_our_table(peer, process).set_timesteps(20)
    z, noise = pictures(generator), [pictures(generator) for _ in range(20)]
    denoise = Denoiser(network, process, kind)
    steps = ddim_steps(denoise, z, timesteps(20, process, spacing), eta=eta, noise=noise)
    for i, (t, step) in enumerate(zip(peer.timesteps, steps, strict=True)):
        how = {"eta": eta, "variance_noise": noise[i]}
        done = peer.step(network(z, t.expand(2)), t, z, **how)
        z = done.prev_sample
        agree(f"DDIM, 20 steps, {kind}", step.z, z, 1e-9)
        agree("DDIM, x̂", step.x, done.pred_original_sample, 1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_ddim_derives_eps_again_after_thresholding_as_diffusers_can(kind, dynamic, generator):
    process = VariancePreserving(cosine_alpha_bar())
    options = {"thresholding": dynamic, "sample_max_value": 1e9, "clip_sample": not dynamic}
    peer = diffusers.DDIMScheduler(
        S, prediction_type=KINDS[kind], timestep_spacing="trailing", **options
    )
    with_our_table(peer, process).set_timesteps(10)
    z = 2 * pictures(generator)
    chosen = dynamic_threshold if dynamic else static_threshold
    steps = ddim_steps(Denoiser(network, process, kind, chosen), z, timesteps(10, process))
    row = f"DDIM, {'dynamic' if dynamic else 'static'} threshold"
    follow(row, peer, steps, z, network, 1e-9, use_clipped_model_output=True)


@pytest.mark.parametrize("count", [2, 10, 20])
@pytest.mark.parametrize("kind", KINDS)
def test_dpm_solver_follows_diffusers_from_noise_to_picture(kind, count, generator):
    process = VariancePreserving(linear_alpha_bar())
    peer = diffusers.DPMSolverMultistepScheduler(
        S,
        beta_schedule="linear",
        solver_order=2,
        algorithm_type="dpmsolver++",
        solver_type="midpoint",
        prediction_type=KINDS[kind],
        timestep_spacing="trailing",
        final_sigmas_type="zero",
    )
    peer.set_timesteps(count)
    z = pictures(generator)
    steps = dpm_solver_steps(Denoiser(network, process, kind), z, timesteps(count, process))
    scale = 1.0
    for t, step in zip(peer.timesteps, steps, strict=True):
        z = peer.step(network(z, t.expand(2)), t, z).prev_sample
        scale = max(scale, z.abs().max().item())
        agree(f"DPM-Solver++(2M), relative, {kind}", step.z / scale, z / scale, 2e-5)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_euler_follows_diffusers_whose_time_runs_from_one_to_zero(shift, generator):
    peer = diffusers.FlowMatchEulerDiscreteScheduler(S, shift=shift)
    peer.set_timesteps(sigmas=[1 - i / 12 for i in range(12)])
    agree("flow times", torch.tensor(flow_times(12, shift)), 1 - peer.sigmas, 1e-6)
    z = pictures(generator, torch.float32)
    denoise = Denoiser(lambda z, t: -network(z, t * S), RectifiedFlow(), "v")
    for t, step in zip(peer.timesteps, euler_steps(denoise, z, flow_times(12, shift)), strict=True):
        # Its v points from picture to noise, and it is given 1000 (1 − t).
        z = peer.step(network(z, (S - t).expand(2)), t, z).prev_sample
        agree("Euler, 12 steps", step.z, z, 5e-6)


# ---------------------------------------------------------------- embeddings


@pytest.mark.parametrize("cos_first", [False, True])
@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_the_timestep_embedding_is_diffusers_in_both_orders(cos_first, shift):
    from diffusers.models.embeddings import get_timestep_embedding

    t = torch.tensor([0.0, 0.5, 3, 999])
    peer = get_timestep_embedding(t, 32, flip_sin_to_cos=cos_first, downscale_freq_shift=shift)
    agree(
        "timestep embedding", timestep_embedding(t, 32, cos_first=cos_first, shift=shift), peer, 0
    )


# ---------------------------------------------------------------- the Transformer's parts


def test_a_dit_block_is_diffusers_block_with_shared_modulation(generator):
    """PixArt-α's block: values, and gradients of every weight."""
    from diffusers.models.attention import BasicTransformerBlock

    peer = BasicTransformerBlock(
        64,
        num_attention_heads=2,
        attention_head_dim=32,
        activation_fn="gelu",
        attention_bias=True,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
    ).double()
    torch.manual_seed(0)
    ours = DiTBlock(64, 2).double()
    q, k, v = ours.attention.qkv.weight.chunk(3)
    bq, bk, bv = ours.attention.qkv.bias.chunk(3)
    pairs = {
        "attn1.to_q": (q, bq),
        "attn1.to_k": (k, bk),
        "attn1.to_v": (v, bv),
        "attn1.to_out.0": (ours.attention.out.weight, ours.attention.out.bias),
        "ff.net.0.proj": (ours.mlp[0].weight, ours.mlp[0].bias),
        "ff.net.2": (ours.mlp[2].weight, ours.mlp[2].bias),
    }
    with torch.no_grad():
        ours.modulation.copy_(torch.randn(6, 64, generator=generator))
        peer.scale_shift_table.copy_(ours.modulation)
        for name, (weight, bias) in pairs.items():
            peer.get_submodule(name).weight.copy_(weight)
            peer.get_submodule(name).bias.copy_(bias)
    x = torch.randn(2, 5, 64, generator=generator, dtype=torch.float64)
    modulation = torch.randn(2, 6, 64, generator=generator, dtype=torch.float64)
    real = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    minus = torch.zeros(2, 1, 1, 5).masked_fill(~real[:, None, None], -torch.inf)
    a = ours(x, modulation, minus)
    b = peer(x, attention_mask=minus[:, 0].double(), timestep=modulation.flatten(1))
    agree("DiT block", a, b, 1e-10)
    a.sin().sum().backward()
    b.sin().sum().backward()
    theirs = [peer.get_submodule(name).weight.grad for name in pairs]
    agree("DiT block, gradients", ours.attention.qkv.weight.grad, torch.cat(theirs[:3]), 1e-10)
    agree("DiT block, gradients", ours.attention.out.weight.grad, theirs[3], 1e-10)
    agree("DiT block, gradients", ours.mlp[0].weight.grad, theirs[4], 1e-10)
    agree("DiT block, gradients", ours.mlp[2].weight.grad, theirs[5], 1e-10)
    agree("DiT block, gradients", ours.modulation.grad, peer.scale_shift_table.grad, 1e-10)


def test_positions_are_diffusers_with_row_and_column_exchanged():
    from diffusers.models.embeddings import get_2d_sincos_pos_embed

    peer = torch.as_tensor(get_2d_sincos_pos_embed(32, 6, base_size=6, output_type="pt"))
    column, row = peer.chunk(2, dim=1)
    agree("2-D sin/cos positions", sincos_2d(6, 32), torch.cat([row, column], 1), 1e-6)
