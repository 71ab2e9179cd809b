"""The U-Net: levels, conditions, skip connections, the upsampler, and that it learns."""

import copy

import pytest
import torch

from t2ilearn.models.diffusion import VariancePreserving, ddpm_loss, q_sample
from t2ilearn.models.diffusion_samplers import (
    Denoiser,
    ddim_steps,
    guided,
    static_threshold,
    timesteps,
)
from t2ilearn.models.noise_schedules import cosine_alpha_bar
from t2ilearn.models.tokens import END, PAD, null_caption
from t2ilearn.models.unet import CrossAttention, TextAttention, TimeResidualBlock, UNet, UNetConfig

SMALL = {"resolution": 8, "channels": (32, 32), "blocks": 1, "attention_side": 4}
SMALL |= {"text_layers": 1, "vocabulary": 11, "text_length": 6}
CAPTIONS = torch.tensor([[3, 4, 5, END, PAD, PAD], [7, END, PAD, PAD, PAD, PAD]])
T = torch.tensor([20.0, 700.0])
LOW = {"low_resolution": 4}


def small(randomised=True, **sizes) -> UNet:
    """A U-Net in float64; with large weights, so that nothing that matters is hidden by zeros."""
    torch.manual_seed(0)
    model = UNet(UNetConfig(**{**SMALL, **sizes})).double()
    if randomised:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(0.2 * torch.randn_like(parameter) + ("norm" in name))
    return model.eval()


@pytest.fixture
def z(generator):
    return torch.randn(2, 3, 8, 8, generator=generator, dtype=torch.float64)


@pytest.fixture
def low(generator):
    return torch.randn(2, 3, 4, 4, generator=generator, dtype=torch.float64)


# ---------------------------------------------------------------- parts


def test_a_new_residual_block_passes_its_input_on_and_the_time_modulates_a_trained_one(generator):
    torch.manual_seed(0)
    block = TimeResidualBlock(32, 32, 16)
    x, time = (torch.randn(*s, generator=generator) for s in ((2, 32, 4, 4), (2, 16)))
    assert torch.allclose(block(x, time), x + block.conv2.bias.view(1, -1, 1, 1))
    torch.nn.init.normal_(block.conv2.weight)
    assert not torch.allclose(block(x, time), block(x, 2 * time))


def test_new_attention_passes_its_input_on(z):
    model = small(randomised=False)
    x = torch.randn(2, 32, 4, 4, dtype=torch.float64)
    attention = TextAttention(32, 32).double()
    assert torch.equal(attention(x, model.text(CAPTIONS)), x)
    assert not model(z, T, CAPTIONS).any()


def test_cross_attention_is_torch_s_and_leaves_padding_out(generator):
    """`nn.MultiheadAttention` with the same weights: values and gradients."""
    ours = CrossAttention(32, 32, 2).double()
    peer = torch.nn.MultiheadAttention(32, 2, batch_first=True).double()
    with torch.no_grad():
        peer.in_proj_weight.copy_(torch.cat([ours.q.weight, ours.kv.weight]))
        peer.in_proj_bias.copy_(torch.cat([ours.q.bias, ours.kv.bias]))
        peer.out_proj.weight.copy_(ours.out.weight)
        peer.out_proj.bias.copy_(ours.out.bias)
    text = small().text(CAPTIONS)
    x = torch.randn(2, 9, 32, generator=generator, dtype=torch.float64)
    mine = ours(x, text)
    theirs, _ = peer(x, text.vectors, text.vectors, key_padding_mask=~text.real)
    assert torch.allclose(mine, theirs, atol=1e-12)
    mine.sin().sum().backward(retain_graph=True)
    theirs.sin().sum().backward()
    both = torch.cat([ours.q.weight.grad, ours.kv.weight.grad])
    assert torch.allclose(both, peer.in_proj_weight.grad, atol=1e-12)


# ---------------------------------------------------------------- the whole network


def test_the_prediction_depends_on_mixture_time_and_caption(z):
    model = small()
    x = model(z, T, CAPTIONS)
    assert x.shape == z.shape
    assert not torch.allclose(model(z + 0.1, T, CAPTIONS), x)
    assert not torch.allclose(model(z, T + 50, CAPTIONS), x)
    assert not torch.allclose(model(z, T, CAPTIONS.flip(0)), x)
    assert not torch.allclose(model(z, T, null_caption(2, 6)), x)


def test_pictures_of_a_batch_do_not_depend_on_each_other_nor_on_padding(z):
    model = small()
    both = model(z, T, CAPTIONS)
    for i in range(2):
        alone = model(z[i : i + 1], T[i : i + 1], CAPTIONS[i : i + 1])
        assert torch.allclose(both[i], alone[0], atol=1e-9)


def test_there_is_a_skip_connection_for_each_layer_of_the_way_down():
    model = UNet(UNetConfig(channels=(32, 64, 96), blocks=2))
    blocks = [layer for layer in model.up if hasattr(layer, "residual")]
    assert len(blocks) == 9 and len(model.down) + 1 == 9
    taken = [b.residual.norm1.num_channels for b in blocks]
    assert taken == [192, 192, 160, 160, 128, 96, 96, 64, 64]


def test_attention_stands_at_small_sides_only():
    model = UNet(UNetConfig(resolution=32, channels=(32, 32, 32), attention_side=8))
    found = [b.attention is not None for b in (*model.down, *model.up) if hasattr(b, "residual")]
    assert found == [False, False, True, True, True, False, False, False, False]
    assert [b.attention is not None for b in model.middle] == [True, False]


@pytest.mark.parametrize("upsampler", [False, True])
def test_every_parameter_receives_a_gradient(z, low, upsampler):
    model = small(**(LOW if upsampler else {}))
    conditions = [CAPTIONS, low, T] if upsampler else [CAPTIONS]
    process = VariancePreserving(cosine_alpha_bar())
    how = {"target": "v", "noise": z, "t": torch.tensor([30, 800])}
    ddpm_loss(model, z, process, *conditions, **how).total.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


def test_arguments_are_left_unchanged(z, low):
    given = [z, T, CAPTIONS, low, T]
    kept = copy.deepcopy(given)
    small(**LOW)(*given)
    assert all(torch.equal(a, b) for a, b in zip(given, kept, strict=True))


def test_the_default_sizes_are_those_of_a_small_picture():
    model = UNet(UNetConfig())
    assert sum(p.numel() for p in model.parameters()) < 4e6
    assert model(torch.randn(1, 3, 32, 32), T[:1], null_caption(1, 28)).shape == (1, 3, 32, 32)


# ---------------------------------------------------------------- the upsampler


def test_an_upsampler_sees_the_small_picture_and_how_noisy_it_is(z, low):
    model = small(**LOW)
    x = model(z, T, CAPTIONS, low, T)
    assert x.shape == z.shape
    assert not torch.allclose(model(z, T, CAPTIONS, -low, T), x)
    assert not torch.allclose(model(z, T, CAPTIONS, low, T + 100), x)
    assert not torch.allclose(model(z, T.flip(0), CAPTIONS, low, T), x)


def test_an_upsampler_is_guided_by_the_caption_and_keeps_the_small_picture(z, low):
    model = small(**LOW)
    null = null_caption(2, 6)
    both = guided(model, [CAPTIONS, low, T], [null, low, T], 2.0)(z, T)
    c, u = model(z, T, CAPTIONS, low, T), model(z, T, null, low, T)
    assert torch.allclose(both, u + 2 * (c - u), atol=1e-9)


# ---------------------------------------------------------------- sizes and errors


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"resolution": 9}, "multiple of 2, not 9"),
        ({"resolution": 0}, "multiple of 2, not 0"),
        ({"resolution": 12, "channels": (32,) * 4}, "multiple of 8, not 12"),
        ({"channels": ()}, "multiples of 32"),
        ({"channels": (32, 40)}, "multiples of 32"),
        ({"blocks": 0}, "blocks must be at least 1"),
        ({"text_layers": -1}, "at least 0"),
        ({"vocabulary": 1}, "vocabulary of 3"),
        ({"low_resolution": 8}, "side below 8, not 8"),
        ({"low_resolution": -4}, "side below 8, not -4"),
    ],
)
def test_sizes_that_do_not_fit_together_are_refused(wrong, says):
    with pytest.raises(ValueError, match=says):
        UNetConfig(**{**SMALL, **wrong})


def test_inputs_of_another_shape_are_refused(z, low, unchecked):
    model, upsampler = small(), small(**LOW)
    with pytest.raises(ValueError, match=r"shape \(B, 3, 8, 8\)"):
        model(z[..., :6], T, CAPTIONS)
    with pytest.raises(ValueError, match="as many times and captions"):
        model(z, T[:1], CAPTIONS)
    with pytest.raises(ValueError, match="takes no low"):
        model(z, T, CAPTIONS, low, T)
    with pytest.raises(ValueError, match="give low and low_t"):
        upsampler(z, T, CAPTIONS)
    with pytest.raises(ValueError, match="give low and low_t"):
        upsampler(z, T, CAPTIONS, low)
    with pytest.raises(ValueError, match="Small pictures have shape"):
        upsampler(z, T, CAPTIONS, low[..., :2], T)


# ---------------------------------------------------------------- training


def trained(model, x, *conditions, steps, prepare=None):
    """A model after some steps on one batch, and its last loss."""
    process, generator = VariancePreserving(cosine_alpha_bar()), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.99))
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, step / 20) * (1 - step / steps)
        given = conditions if prepare is None else prepare(process, generator)
        loss = ddpm_loss(model, x, process, *given, target="v", generator=generator)
        optimizer.zero_grad()
        loss.total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval(), process, loss


def test_it_learns_eight_pictures_and_draws_them_from_their_captions():
    torch.manual_seed(0)
    colours = torch.rand(4, 3) * 2 - 1
    pairs = torch.tensor([[0, 1], [1, 0], [2, 3], [3, 2], [0, 2], [2, 0], [1, 3], [3, 1]])
    x = colours[pairs].mT[..., None, :].repeat_interleave(4, -1).expand(-1, -1, 8, -1)
    caption = torch.cat([pairs + 3, torch.tensor([[END, PAD]]).expand(8, -1)], dim=1)
    model = UNet(UNetConfig(**{**SMALL, "text_length": 4}))
    model, process, loss = trained(model, x, caption, steps=170)
    assert loss.mse < 0.2
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    network = guided(model, [caption], [null_caption(8, 4)], 1.0)
    denoise = Denoiser(network, process, "v", static_threshold)
    *_, last = ddim_steps(denoise, noise, timesteps(12, process))
    distance = (last.z[:, None] - x).square().flatten(2).mean(-1)  # (8 drawn, 8 pictures)
    assert (distance.argmin(1) == torch.arange(8)).all()
    assert distance.diagonal().max() < 0.05


def test_an_upsampler_learns_to_enlarge_pictures_that_some_noise_was_added_to():
    torch.manual_seed(0)
    small_pictures = torch.rand(8, 3, 4, 4) * 2 - 1
    x = small_pictures.repeat_interleave(2, 2).repeat_interleave(2, 3)
    caption = null_caption(8, 6)

    def noisy(process, generator):
        low_t = torch.randint(300, (8,), generator=generator)
        noise = torch.randn(small_pictures.shape, generator=generator)
        return caption, q_sample(small_pictures, low_t, process, noise), low_t.float()

    model, process, _ = trained(UNet(UNetConfig(**{**SMALL, **LOW})), x, steps=130, prepare=noisy)
    conditions = (caption, small_pictures, torch.zeros(8))
    denoise = Denoiser(lambda z, t: model(z, t, *conditions), process, "v", static_threshold)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    *_, last = ddim_steps(denoise, noise, timesteps(8, process))
    assert (last.z - x).square().mean() < 0.1
