"""The networks of the released VQGANs: sizes, layout, pictures of any size, and the quantizers."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from t2ilearn.models.dvae import gumbel_noise, gumbel_softmax
from t2ilearn.models.quantizers import VectorQuantizer
from t2ilearn.models.taming import (
    RELEASED,
    GumbelQuantizer,
    TamingConfig,
    TamingDecoder,
    TamingEncoder,
    make_taming_vqgan,
)
from t2ilearn.models.vqgan import last_layer
from t2ilearn.models.vqvae import VQVAE

SMALL = TamingConfig(16, 32, (1, 2), 1, (8,), codebook_size=7, code_dim=5)
GUMBEL = dataclasses.replace(SMALL, quantizer="gumbel")


# ---------------------------------------------------------------- sizes


def test_released_models_have_the_sizes_in_their_names():
    for name, codebook_size, f in [
        ("f16-1024", 1024, 16),
        ("f16-16384", 16384, 16),
        ("gumbel-f8", 8192, 8),
    ]:
        config = RELEASED[name]
        assert (config.codebook_size, config.shrink, config.side) == (codebook_size, f, 256 // f)
        assert config.code_dim == 256 and config.attention_at == (256 // f,)
        assert config.beta == 0.25 and not config.cosine
        with torch.device("meta"):
            model = make_taming_vqgan(config)
        assert 68e6 < sum(p.numel() for p in model.parameters()) < 77e6


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"channels": 48}, "multiple of 32, not 48"),
        ({"channels": 0}, "multiple of 32, not 0"),
        ({"multipliers": ()}, "from 1 up"),
        ({"multipliers": (1, 0)}, "from 1 up"),
        ({"resolution": 250}, "5 levels halve the side 4 times.*multiple of 16, not 250"),
        ({"resolution": 8}, "multiple of 16, not 8"),
        ({"attention_at": (16, 20)}, r"\(256, 128, 64, 32, 16\), and not all of \(16, 20\)"),
        ({"quantizer": "ema"}, "'gumbel'.*not 'ema'"),
        ({"codebook_size": 1}, "codebook_size must be at least 2"),
        ({"code_dim": 0}, "they are 1024, 0 and 2"),
        ({"blocks": 0}, "they are 1024, 256 and 0"),
    ],
)
def test_sizes_that_do_not_fit_together_are_an_error(wrong, message):
    with pytest.raises(ValueError, match=message):
        TamingConfig(**wrong)


# ---------------------------------------------------------------- layout


def test_encoder_and_decoder_have_matching_shapes_at_any_size(generator):
    encoder, decoder = TamingEncoder(SMALL), TamingDecoder(SMALL)
    for sides in ((16, 16), (8, 24)):  # any sides that f divides
        x = torch.randn(2, 3, *sides, generator=generator)
        z = encoder(x)
        assert z.shape == (2, 5, sides[0] // 2, sides[1] // 2)
        assert decoder(z).shape == x.shape


def test_attention_follows_every_block_at_the_stated_sides_only():
    config = TamingConfig(32, 32, (1, 2, 2), 2, attention_at=(32, 8), codebook_size=7, code_dim=5)
    for network, blocks in ((TamingEncoder(config), 2), (TamingDecoder(config), 3)):
        counts = [
            sum(not isinstance(layer, nn.Identity) for layer in level.attentions)
            for level in network.levels
        ]
        assert counts == [blocks, 0, blocks]
        assert [len(level.blocks) for level in network.levels] == 3 * [blocks]


def test_downsampling_pads_on_the_right_and_below_only(generator):
    resize = TamingEncoder(SMALL).levels[0].resize
    x = torch.randn(1, 32, 6, 6, generator=generator)
    weight, bias = resize[1].weight, resize[1].bias
    expected = F.conv2d(F.pad(x, (0, 1, 0, 1)), weight, bias, stride=2)
    assert torch.equal(resize(x), expected) and expected.shape == (1, 32, 3, 3)


def test_the_decoder_does_not_clamp_the_picture():
    decoder = TamingDecoder(SMALL)
    nn.init.constant_(decoder.conv_out.bias, 5.0)
    assert decoder(torch.zeros(1, 5, 2, 2)).max() > 2


def test_the_last_layer_is_the_last_convolution_of_the_decoder():
    decoder = make_taming_vqgan(SMALL).decoder
    assert last_layer(decoder) is decoder.conv_out.weight


@pytest.mark.parametrize("config", [SMALL, GUMBEL], ids=["gradient", "gumbel"])
def test_decoded_tokens_equal_the_reconstruction(config, generator):
    model = make_taming_vqgan(config).eval()
    x = 2 * torch.rand(2, 3, 16, 16, generator=generator) - 1
    with torch.no_grad():
        indices, output = model.tokens(x), model(x)
        assert indices.shape == (2, 64)
        assert torch.equal(indices, output.quantized.indices.flatten(1))
        assert torch.allclose(model.decode_tokens(indices), output.reconstruction, atol=1e-5)


# ---------------------------------------------------------------- the Gumbel quantizer


@pytest.fixture
def gumbel():
    """A quantizer, and encodings for it."""
    torch.manual_seed(0)
    return GumbelQuantizer(7, 5), torch.randn(3, 5, 4, 4)


def test_in_evaluation_the_gumbel_quantizer_takes_the_likeliest_token(gumbel):
    quantizer, z = gumbel[0].eval(), gumbel[1]
    first, second = quantizer(z), quantizer(z)
    assert torch.equal(first.indices, quantizer.proj(z).argmax(1))
    assert torch.equal(first.indices, second.indices)
    assert torch.equal(first.indices, quantizer.nearest(z))
    assert torch.equal(first.z_q, quantizer.embed.weight[first.indices].movedim(-1, 1))
    assert torch.equal(first.z_q, quantizer.lookup(first.indices)) and first.commitment_loss == 0


def test_in_training_tokens_are_sampled_with_their_probabilities(gumbel):
    quantizer, z = gumbel[0].train(), gumbel[1][:1, :, :1, :1]
    indices = quantizer(z.expand(1, 5, 200, 200)).indices
    shares = torch.bincount(indices.flatten(), minlength=7) / indices.numel()
    assert torch.allclose(shares, quantizer.proj(z).softmax(1).flatten(), atol=0.01)


def test_sampled_tokens_are_one_hot_and_reproducible_with_a_seed(gumbel):
    quantizer, z = gumbel[0].train(), gumbel[1]
    outputs = []
    for _ in range(2):
        torch.manual_seed(1)
        outputs.append(quantizer(z))
    assert torch.equal(outputs[0].indices, outputs[1].indices)
    assert not torch.equal(outputs[0].indices, quantizer(z).indices)
    assert torch.allclose(outputs[0].z_q, quantizer.lookup(outputs[0].indices), atol=1e-6)


def test_in_training_encodings_logits_and_code_vectors_have_gradients(gumbel):
    quantizer, z = gumbel[0].train(), gumbel[1].requires_grad_()
    quantizer(z).z_q.square().sum().backward()
    for tensor in (z, *quantizer.parameters()):
        assert tensor.grad.abs().max() > 0


def test_a_higher_temperature_makes_gradients_smaller(gumbel):
    quantizer, z = gumbel[0].train(), gumbel[1]
    norms = []
    for temperature in (0.5, 50.0):
        quantizer.temperature = temperature
        torch.manual_seed(1)
        (grad,) = torch.autograd.grad(quantizer(z).z_q.square().sum(), quantizer.proj.weight)
        norms.append(grad.norm())
    assert norms[0] > 10 * norms[1]


def test_the_kl_term_is_0_for_uniform_logits_and_ln_k_for_certain_ones(gumbel):
    quantizer, z = GumbelQuantizer(7, 5, kl_weight=0.5), gumbel[1]
    nn.init.zeros_(quantizer.proj.weight)
    nn.init.zeros_(quantizer.proj.bias)
    assert quantizer(z).codebook_loss.abs() < 1e-6
    nn.init.constant_(quantizer.proj.bias[:1].detach(), 1000.0)
    assert quantizer(z).codebook_loss.item() == pytest.approx(0.5 * math.log(7))


def test_logits_stay_in_float32_under_autocast(gumbel):
    quantizer, z = gumbel[0].eval(), gumbel[1]
    with torch.autocast("cpu", torch.bfloat16):
        low = quantizer(z.bfloat16())
    assert low.z_q.dtype == torch.float32
    assert torch.equal(low.indices, quantizer(z.bfloat16().float()).indices)


def test_noise_and_generator_give_the_same_sample_as_gumbel_softmax(gumbel):
    quantizer, z = gumbel[0].train(), gumbel[1]
    quantizer.temperature = 0.7
    noise = gumbel_noise((3, 7, 4, 4), torch.Generator().manual_seed(2))
    with_noise = quantizer(z, noise)
    with_generator = quantizer(z, generator=torch.Generator().manual_seed(2))
    assert torch.equal(with_noise.indices, with_generator.indices)
    assert torch.equal(with_noise.z_q, with_generator.z_q)
    y = gumbel_softmax(quantizer.proj(z), noise, 0.7)
    assert torch.equal(with_noise.indices, y.argmax(1))
    # The value is one-hot, the gradient that of the soft sample.
    expected, found = (
        torch.autograd.grad(
            torch.einsum("bkhw,kd->bdhw", sample, quantizer.embed.weight).sum(),
            quantizer.proj.weight,
        )[0]
        for sample in (y, gumbel_softmax(quantizer.proj(z), noise, 0.7, hard=True))
    )
    assert torch.equal(expected, found) and found.any()


# ---------------------------------------------------------------- the whole


@pytest.mark.parametrize("config", [SMALL, GUMBEL], ids=["gradient", "gumbel"])
def test_a_released_layout_is_a_vqvae_of_its_networks(config):
    model = make_taming_vqgan(config)
    assert type(model) is VQVAE and model.config is config
    assert isinstance(model.encoder, TamingEncoder) and isinstance(model.decoder, TamingDecoder)
    kind = GumbelQuantizer if config.quantizer == "gumbel" else VectorQuantizer
    assert type(model.quantizer) is kind
    parts = {name.split(".")[0] for name in model.state_dict()}
    assert parts == {"encoder", "decoder", "quantizer"}


def test_pictures_of_any_size_that_the_downsampling_factor_divides_are_accepted(generator):
    model = make_taming_vqgan(SMALL).eval()
    x = 2 * torch.rand(2, 3, 8, 24, generator=generator) - 1
    with torch.no_grad():
        output, indices = model(x), model.tokens(x)
        assert output.reconstruction.shape == x.shape and indices.shape == (2, 4 * 12)
        decoded = model.decode_grid(indices.unflatten(1, (4, 12)))
    assert torch.allclose(decoded, output.reconstruction, atol=1e-5)
    assert model.tokens(torch.zeros(0, 3, 16, 16)).shape == (0, 64)


@pytest.mark.parametrize(
    ("pictures", "message"),
    [
        (torch.zeros(2, 3, 17, 16), "both sides must be multiples of 2, not 17 × 16"),
        (torch.zeros(2, 3, 0, 16), "no pixel"),
        (torch.zeros(2, 1, 16, 16), r"\(B, 3, H, W\)"),
        (torch.zeros(3, 16, 16), r"\(B, 3, H, W\)"),
        (torch.zeros(2, 3, 16, 16, dtype=torch.uint8), "uint8"),
        (torch.full((2, 3, 16, 16), 255.0), "go from 255 to 255. Bytes become pixels"),
        (torch.full((2, 3, 16, 16), math.nan), "go from nan"),
    ],
)
def test_size_type_and_range_of_pictures_are_checked(unchecked, pictures, message):
    model = make_taming_vqgan(SMALL)
    for use in (model, model.tokens, model.encode):
        with pytest.raises(ValueError, match=message):
            use(pictures)
