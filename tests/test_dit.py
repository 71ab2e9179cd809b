"""The diffusion Transformer: patches, modulation by the time, captions, and that it learns."""

import copy

import pytest
import torch
import torch.nn.functional as F

from t2ilearn.models.diffusion import RectifiedFlow, jit_loss
from t2ilearn.models.diffusion_samplers import Denoiser, euler_steps, flow_times, guided
from t2ilearn.models.dit import DiT, DiTBlock, DiTConfig, modulate, sincos_2d
from t2ilearn.models.layers import attend
from t2ilearn.models.tokens import END, PAD, null_caption

SMALL = {"resolution": 8, "patch": 4, "dim": 32, "num_layers": 2, "text_layers": 1}
SMALL |= {"vocabulary": 11, "text_length": 6}
CAPTIONS = torch.tensor([[3, 4, 5, END, PAD, PAD], [7, END, PAD, PAD, PAD, PAD]])
T = torch.tensor([0.2, 0.7])


def small(randomised=True, **sizes) -> DiT:
    """A DiT in float64; with large weights, so that nothing that matters is hidden by zeros."""
    torch.manual_seed(0)
    model = DiT(DiTConfig(**{**SMALL, **sizes})).double()
    if randomised:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(0.3 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture
def z(generator):
    return torch.randn(2, 3, 8, 8, generator=generator, dtype=torch.float64)


# ---------------------------------------------------------------- patches


@pytest.mark.parametrize("overlap", [0, 1, 4])
def test_patches_come_back_to_their_places(overlap, z):
    """Through an identity instead of the network: x̂ is z, whatever the overlap."""
    model = small(overlap=overlap)
    window = 4 + 2 * overlap
    padded = F.pad(z, (overlap,) * 4)
    patches = F.unfold(padded, window, stride=4).mT  # (B, N, 3 · window²), as `last` returns them
    if overlap == 0:
        assert torch.equal(patches, F.pixel_unshuffle(z, 4).flatten(2).mT)
    assert torch.allclose(model._unpatchify(patches), z.to(patches.dtype), atol=1e-6)


def test_each_patch_vector_sees_its_own_pixels(z):
    model = small()
    vectors = model._patchify(z.requires_grad_())
    assert vectors.shape == (2, 4, 32)
    (gradient,) = torch.autograd.grad(vectors[0, 1].sum(), z)  # first row, second column
    seen = gradient[0].abs().sum(0) > 0
    assert seen[:4, 4:].all() and seen.sum() == 16 and not gradient[1].any()


def test_overlapping_patches_are_averaged_where_they_meet():
    model = small(overlap=2)
    values = torch.tensor([0.0, 4.0, 0.0, 4.0]).view(1, 4, 1).expand(1, 4, 3 * 64)
    row = model._unpatchify(values)[0, 0, 0]
    assert row.tolist() == [0, 0, 2, 2, 2, 2, 4, 4]


def test_positions_differ_everywhere_and_halves_tell_row_and_column():
    places = sincos_2d(5, 16)
    assert torch.cdist(places, places).add(torch.eye(25)).min() > 0.1
    grid = places.view(5, 5, 16)
    assert (grid[..., :8] == grid[:, :1, :8]).all() and (grid[..., 8:] == grid[:1, :, 8:]).all()


# ---------------------------------------------------------------- blocks and modulation


def test_a_new_block_changes_nothing_and_a_new_model_predicts_grey(z):
    block = DiTBlock(32, 1).double()
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    zeros = torch.zeros(2, 6, 32, dtype=torch.float64)
    assert torch.equal(block(x, zeros, torch.zeros(2, 1, 1, 5)), x)
    assert not small(randomised=False)(z, T, CAPTIONS).any()


def test_a_block_is_its_two_equations(generator):
    block = DiTBlock(32, 1).double()
    x, m = (torch.randn(2, n, 32, generator=generator, dtype=torch.float64) for n in (5, 6))
    bias = torch.zeros(2, 1, 1, 5)
    with torch.no_grad():
        block.modulation.copy_(torch.randn(6, 32, generator=generator))
    shift1, scale1, gate1, shift2, scale2, gate2 = (m + block.modulation).unbind(1)
    y = F.layer_norm(x, (32,)) * (1 + scale1[:, None]) + shift1[:, None]
    assert torch.allclose(modulate(x, shift1[:, None], scale1[:, None]), y, atol=1e-12)
    middle = x + gate1[:, None] * block.attention(y, bias)
    y = F.layer_norm(middle, (32,)) * (1 + scale2[:, None]) + shift2[:, None]
    assert torch.allclose(block(x, m, bias), middle + gate2[:, None] * block.mlp(y), atol=1e-12)


def test_attend_is_scaled_dot_product_attention_with_its_gradients(generator):
    q, k, v = torch.randn(3, 2, 3, 5, 4, generator=generator, dtype=torch.float64).unbind()
    bias = torch.zeros(2, 1, 1, 5).masked_fill(torch.arange(5) > 2, -torch.inf)
    inputs = [[t.clone().requires_grad_() for t in (q, k, v)] for _ in range(2)]
    ours = attend(*inputs[0], bias)
    theirs = F.scaled_dot_product_attention(*inputs[1], attn_mask=bias.double())
    assert torch.allclose(ours, theirs, atol=1e-12)
    ours.sin().sum().backward()
    theirs.sin().sum().backward()
    for a, b in zip(*inputs, strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-12)


# ---------------------------------------------------------------- what the prediction depends on


def test_the_prediction_depends_on_mixture_time_and_caption(z):
    model = small()
    x = model(z, T, CAPTIONS)
    assert x.shape == z.shape
    assert not torch.allclose(model(z, T + 0.1, CAPTIONS), x)
    assert not torch.allclose(model(z, T, CAPTIONS.flip(0)), x)
    assert not torch.allclose(model(z, T, null_caption(2, 6)), x)
    moved = CAPTIONS.clone()
    moved[0, :3] = torch.tensor([5, 4, 3])  # the same words in another order
    assert not torch.allclose(model(z, T, moved)[0], x[0])


def test_pictures_of_a_batch_do_not_depend_on_each_other_nor_on_padding(z):
    """The second caption is shorter: alone it is cut to its own length."""
    model = small()
    both = model(z, T, CAPTIONS)
    for i in range(2):
        alone = model(z[i : i + 1], T[i : i + 1], CAPTIONS[i : i + 1])
        assert torch.allclose(both[i], alone[0], atol=1e-10)


def test_every_parameter_receives_a_gradient(z):
    model = small()
    jit_loss(model, z.clamp(-1, 1), RectifiedFlow(), CAPTIONS, t=T, noise=z).total.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


def test_arguments_are_left_unchanged(z):
    given = [z, T, CAPTIONS]
    kept = copy.deepcopy(given)
    small()(*given)
    assert all(torch.equal(a, b) for a, b in zip(given, kept, strict=True))


# ---------------------------------------------------------------- sizes and errors


def test_the_positions_are_no_weights():
    assert "places" not in small().state_dict()


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"patch": 3}, "Patches of 3 pixels do not divide pictures of 8"),
        ({"patch": 0}, "Patches of 0 pixels"),
        ({"resolution": 0}, "do not divide"),
        ({"dim": 48}, "multiple of 32, not 48"),
        ({"num_layers": 0}, "num_layers must be at least 1"),
        ({"text_layers": -1}, "text_layers at least 0"),
        ({"vocabulary": 2}, "vocabulary of 3"),
        ({"text_length": 1}, "length of 2"),
        ({"overlap": 5}, "overlap must be 0 … 4, not 5"),
        ({"overlap": -1}, "overlap must be 0 … 4, not -1"),
    ],
)
def test_sizes_that_do_not_fit_together_are_refused(wrong, says):
    with pytest.raises(ValueError, match=says):
        DiTConfig(**{**SMALL, **wrong})


def test_inputs_of_another_shape_are_refused(z, unchecked):
    model = small()
    for wrong in (z[:, :, :4], z[:, :1], z[..., :6]):
        with pytest.raises(ValueError, match=r"shape \(B, 3, 8, 8\)"):
            model(wrong, T, CAPTIONS)
    with pytest.raises(ValueError, match="as many times and captions"):
        model(z, T[:1], CAPTIONS)
    with pytest.raises(ValueError, match="as many times and captions"):
        model(z, T, CAPTIONS[:1])
    with pytest.raises(ValueError, match="0 to 10, not 30"):
        model(z, T, CAPTIONS + 27 * (CAPTIONS == 3))


# ---------------------------------------------------------------- training


def test_it_learns_eight_pictures_and_draws_them_from_their_captions():
    """Each picture is a colour on the left and one on the right, in the caption's order."""
    torch.manual_seed(0)
    colours = torch.rand(4, 3) * 2 - 1
    pairs = torch.tensor([[0, 1], [1, 0], [2, 3], [3, 2], [0, 2], [2, 0], [1, 3], [3, 1]])
    x = colours[pairs].mT[..., None, :].repeat_interleave(4, -1).expand(-1, -1, 8, -1)
    end = torch.tensor([[END, PAD]]).expand(8, -1)
    caption = torch.cat([pairs + 3, end], dim=1)
    model = DiT(DiTConfig(**{**SMALL, "text_length": 4, "overlap": 1}))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, betas=(0.9, 0.99))
    generator = torch.Generator().manual_seed(0)
    for step in range(250):
        optimizer.param_groups[0]["lr"] = 5e-3 * min(1, step / 20) * (1 - step / 250)
        loss = jit_loss(
            model, x.repeat(4, 1, 1, 1), RectifiedFlow(), caption.repeat(4, 1), generator=generator
        )
        optimizer.zero_grad()
        loss.total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert loss.mse < 0.02
    network = guided(model.eval(), [caption], [null_caption(8, 4)], 1.0)
    noise = torch.randn(x.shape, generator=generator)
    *_, last = euler_steps(Denoiser(network, RectifiedFlow(), "x0"), noise, flow_times(10))
    distance = (last.z[:, None] - x).square().flatten(2).mean(-1)  # (8 drawn, 8 pictures)
    assert (distance.argmin(1) == torch.arange(8)).all()
    assert distance.diagonal().max() < 0.02


def test_in_bfloat16_the_loss_and_its_gradients_stay_close_to_float32(generator):
    torch.manual_seed(0)
    model = DiT(DiTConfig(**SMALL))
    for layer in (model.modulation, model.last_modulation, model.last):
        torch.nn.init.normal_(layer.weight, std=0.1)
    x, noise = torch.rand(2, 3, 8, 8, generator=generator), torch.randn(2, 3, 8, 8)
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = jit_loss(model, x, RectifiedFlow(), CAPTIONS, noise=noise, t=T)
        results.append([loss.total, *torch.autograd.grad(loss.total, [*model.parameters()])])
    assert results[1][0].dtype == torch.float32
    assert results[1][0].item() == pytest.approx(results[0][0].item(), rel=0.02)
    for full, half in zip(results[0][1:], results[1][1:], strict=True):
        assert half.dtype == torch.float32
        assert (half - full).norm() < 0.1 * full.norm() + 1e-3
