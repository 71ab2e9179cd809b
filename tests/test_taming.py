"""The released VQGANs: their layout and their quantizer."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from t2ilearn.taming import RELEASED, GumbelQuantizer, TamingConfig, TamingDecoder, TamingEncoder
from t2ilearn.vqgan import VQGAN

SMALL = TamingConfig(16, 32, (1, 2), 1, (8,), codebook_size=7, code_dim=5)
GUMBEL = dataclasses.replace(SMALL, quantizer="gumbel")


# ---------------------------------------------------------------- sizes


def test_the_released_models_have_the_sizes_that_their_names_say():
    for name, indices, f in [
        ("f16-1024", 1024, 16),
        ("f16-16384", 16384, 16),
        ("gumbel-f8", 8192, 8),
    ]:
        config = RELEASED[name]
        assert (config.codebook_size, config.shrink, config.side) == (indices, f, 256 // f)
        assert config.code_dim == 256 and config.attention_at == (256 // f,)
        assert config.beta == 0.25 and not config.cosine
        with torch.device("meta"):
            model = VQGAN(config)
        assert 68e6 < sum(p.numel() for p in model.parameters()) < 77e6


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"channels": 48}, "multiple of 32, not 48"),
        ({"channels": 0}, "multiple of 32, not 0"),
        ({"multipliers": ()}, "from 1 up"),
        ({"multipliers": (1, 0)}, "from 1 up"),
        ({"resolution": 250}, "5 levels halve the side 4 times.*multiple of 16, not 250"),
        ({"resolution": 8}, "multiple of 16, not 8"),
        ({"attention_at": (16, 20)}, r"\(256, 128, 64, 32, 16\), and not all of \(16, 20\)"),
        ({"quantizer": "ema"}, "'gumbel'.*not 'ema'"),
        ({"codebook_size": 1}, "two codes"),
        ({"code_dim": 0}, "one number"),
        ({"blocks": 0}, "one block"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        TamingConfig(**wrong)


# ---------------------------------------------------------------- layout


def test_encoder_and_decoder_meet_at_the_grid_of_codes(generator):
    encoder, decoder = TamingEncoder(SMALL), TamingDecoder(SMALL)
    for sides in ((16, 16), (8, 24)):  # of any shape that f divides
        x = torch.randn(2, 3, *sides, generator=generator)
        z = encoder(x)
        assert z.shape == (2, 5, sides[0] // 2, sides[1] // 2)
        assert decoder(z).shape == x.shape


def test_attention_follows_every_block_at_its_sides_and_nowhere_else():
    config = TamingConfig(32, 32, (1, 2, 2), 2, attention_at=(32, 8), codebook_size=7, code_dim=5)
    for network, blocks in ((TamingEncoder(config), 2), (TamingDecoder(config), 3)):
        counts = [
            sum(not isinstance(layer, nn.Identity) for layer in level.attentions)
            for level in network.levels
        ]
        assert counts == [blocks, 0, blocks]
        assert [len(level.blocks) for level in network.levels] == 3 * [blocks]


def test_halving_pads_on_the_right_and_below(generator):
    resize = TamingEncoder(SMALL).levels[0].resize
    x = torch.randn(1, 32, 6, 6, generator=generator)
    weight, bias = resize[1].weight, resize[1].bias
    expected = F.conv2d(F.pad(x, (0, 1, 0, 1)), weight, bias, stride=2)
    assert torch.equal(resize(x), expected) and expected.shape == (1, 32, 3, 3)


def test_nothing_clamps_the_picture():
    decoder = TamingDecoder(SMALL)
    nn.init.constant_(decoder.conv_out.bias, 5.0)
    assert decoder(torch.zeros(1, 5, 2, 2)).max() > 2


def test_the_last_four_dimensional_weight_is_the_last_layer_s():
    model = VQGAN(SMALL)
    assert model.last_layer is model.decoder.conv_out.weight


@pytest.mark.parametrize("config", [SMALL, GUMBEL], ids=["gradient", "gumbel"])
def test_tokens_decode_to_what_the_model_reconstructs(config, generator):
    model = VQGAN(config).eval()
    x = 2 * torch.rand(2, 3, 16, 16, generator=generator) - 1
    with torch.no_grad():
        indices, output = model.tokens(x), model(x)
        assert indices.shape == (2, 64) and torch.equal(indices, output.quantized.indices.flatten(1))
        assert torch.allclose(model.decode_tokens(indices), output.reconstruction, atol=1e-5)


# ---------------------------------------------------------------- the Gumbel quantizer


@pytest.fixture
def gumbel():
    """A quantizer, and encodings for it."""
    torch.manual_seed(0)
    return GumbelQuantizer(7, 5), torch.randn(3, 5, 4, 4)


def test_in_evaluation_the_most_likely_code_is_taken(gumbel):
    quantizer, z = gumbel[0].eval(), gumbel[1]
    first, second = quantizer(z), quantizer(z)
    assert torch.equal(first.indices, quantizer.proj(z).argmax(1))
    assert torch.equal(first.indices, second.indices) and torch.equal(first.indices, quantizer.nearest(z))
    assert torch.equal(first.z_q, quantizer.embed.weight[first.indices].movedim(-1, 1))
    assert torch.equal(first.z_q, quantizer.lookup(first.indices)) and first.commitment_loss == 0


def test_in_training_codes_are_drawn_as_often_as_they_are_likely(gumbel):
    quantizer, z = gumbel[0].train(), gumbel[1][:1, :, :1, :1]
    indices = quantizer(z.expand(1, 5, 200, 200)).indices
    shares = torch.bincount(indices.flatten(), minlength=7) / indices.numel()
    assert torch.allclose(shares, quantizer.proj(z).softmax(1).flatten(), atol=0.01)


def test_drawn_codes_are_whole_and_repeat_with_the_seed(gumbel):
    quantizer, z = gumbel[0].train(), gumbel[1]
    outputs = []
    for _ in range(2):
        torch.manual_seed(1)
        outputs.append(quantizer(z))
    assert torch.equal(outputs[0].indices, outputs[1].indices)
    assert not torch.equal(outputs[0].indices, quantizer(z).indices)
    assert torch.allclose(outputs[0].z_q, quantizer.lookup(outputs[0].indices), atol=1e-6)


def test_gradients_reach_logits_codes_and_encodings_in_training(gumbel):
    quantizer, z = gumbel[0].train(), gumbel[1].requires_grad_()
    quantizer(z).z_q.square().sum().backward()
    for tensor in (z, *quantizer.parameters()):
        assert tensor.grad.abs().max() > 0


def test_the_temperature_softens_the_gradient(gumbel):
    quantizer, z = gumbel[0].train(), gumbel[1]
    norms = []
    for temperature in (0.5, 50.0):
        quantizer.temperature = temperature
        torch.manual_seed(1)
        (grad,) = torch.autograd.grad(quantizer(z).z_q.square().sum(), quantizer.proj.weight)
        norms.append(grad.norm())
    assert norms[0] > 10 * norms[1]


def test_the_kl_term_is_0_for_a_toss_up_and_ln_k_for_certainty(gumbel):
    quantizer, z = GumbelQuantizer(7, 5, kl_weight=0.5), gumbel[1]
    nn.init.zeros_(quantizer.proj.weight)
    nn.init.zeros_(quantizer.proj.bias)
    assert quantizer(z).codebook_loss.abs() < 1e-6
    nn.init.constant_(quantizer.proj.bias[:1].detach(), 1000.0)
    assert quantizer(z).codebook_loss.item() == pytest.approx(0.5 * math.log(7))


def test_logits_stay_precise_under_autocast(gumbel):
    quantizer, z = gumbel[0].eval(), gumbel[1]
    with torch.autocast("cpu", torch.bfloat16):
        low = quantizer(z.bfloat16())
    assert low.z_q.dtype == torch.float32
    assert torch.equal(low.indices, quantizer(z.bfloat16().float()).indices)
