"""The networks of the released VQGANs equal those of the authors' own package, number for number.

taming-transformers is built from its modules with random weights; nothing is downloaded. At full
size the weights go through a file with the layout of the released ones, and our converter.
"""

import copy

import pytest
import torch
from test_conformance import agree, randomised, table  # noqa: F401 - `table` prints by itself
from test_pretrained import pretend_lightning
from torch import nn

from t2ilearn.models.taming import RELEASED, TamingConfig, make_taming_vqgan
from t2ilearn.pretrained.taming import load_taming, taming_key

# Not 32 channels: in groups of one the biases before a norm would have no gradient.
SMALL = TamingConfig(32, 64, (1, 2, 2), 2, attention_at=(16,), codebook_size=11, code_dim=5)
SMALL_GUMBEL = TamingConfig(
    16, 64, (1, 2), 1, (16, 8), codebook_size=9, code_dim=4, quantizer="gumbel"
)


def peer(config: TamingConfig) -> nn.Module:
    """Theirs, with the parts and names of `taming.models.vqgan.VQModel` and `GumbelVQ`.

    Those two themselves need a Lightning of 2021.
    """
    model = pytest.importorskip("taming.modules.diffusionmodules.model")
    quantize = pytest.importorskip("taming.modules.vqvae.quantize")
    sizes = {
        "ch": config.channels,
        "ch_mult": config.multipliers,
        "num_res_blocks": config.blocks,
        "attn_resolutions": config.attention_at,
        "resolution": config.resolution,
        "z_channels": config.code_dim,
        "double_z": False,
        "in_channels": 3,
        "out_ch": 3,
    }
    theirs = nn.Module()
    theirs.encoder, theirs.decoder = model.Encoder(**sizes), model.Decoder(**sizes)
    theirs.quant_conv = nn.Conv2d(config.code_dim, config.code_dim, 1)
    theirs.post_quant_conv = nn.Conv2d(config.code_dim, config.code_dim, 1)
    if config.quantizer == "gumbel":
        theirs.quantize = quantize.GumbelQuantize(*2 * [config.code_dim], config.codebook_size)
    else:  # legacy would put β on the wrong term
        theirs.quantize = quantize.VectorQuantizer2(
            config.codebook_size, config.code_dim, beta=0.25, legacy=False, sane_index_shape=True
        )
    return theirs


def encode(theirs, x):
    return theirs.quant_conv(theirs.encoder(x))


def decode(theirs, z):
    return theirs.decoder(theirs.post_quant_conv(z))


def agree_relatively(row, ours, theirs, tolerance):
    """As `agree`, with differences measured against the largest number."""
    scale = theirs.abs().max().item()
    agree(row, ours / scale, theirs / scale, tolerance)


def agree_in_gradients(row, ours, theirs, tolerance):
    """Every parameter that has a gradient on one side has the same on the other."""
    theirs, seen = dict(theirs.named_parameters()), 0
    for name, parameter in ours.named_parameters():
        other = theirs[taming_key(name)].grad
        assert (parameter.grad is None) == (other is None), name
        # A bias of the keys has none: it moves all scores of a place alike.
        if other is not None and not name.endswith(".k.bias"):
            agree_relatively(row, parameter.grad, other, tolerance)
            seen += 1
    assert seen > 20


def pictures(generator, size, count=1, dtype=torch.float32):
    return 2 * torch.rand(count, 3, size, size, generator=generator, dtype=dtype) - 1


# ---------------------------------------------------------------- small, whole chains in float64


def small_pair(config):
    theirs = randomised(peer(config))
    ours = make_taming_vqgan(config).double().eval()
    state = {k: theirs.state_dict().get(taming_key(k), v) for k, v in ours.state_dict().items()}
    ours.load_state_dict(state, strict=True)
    return ours, theirs


def test_a_small_vqgan_equals_that_of_taming_from_picture_to_gradient(generator):
    ours, theirs = small_pair(SMALL)
    x = pictures(generator, 32, 2, torch.float64)
    z = encode(theirs, x)
    agree_relatively("VQGAN small, z", ours.encode(x), z, 1e-9)
    z_q, their_loss, (_, _, indices) = theirs.quantize(z)
    assert torch.equal(ours.tokens(x), indices.flatten(1)) and indices.unique().numel() > 5
    decoded = decode(theirs, z_q)
    output = ours(x)
    agree_relatively("VQGAN small, reconstruction", output.reconstruction, decoded, 1e-9)
    agree_relatively(
        "VQGAN small, decoded tokens", ours.decode_tokens(ours.tokens(x)), decoded, 1e-9
    )
    loss = output.quantized.codebook_loss + 0.25 * output.quantized.commitment_loss
    agree_relatively("VQGAN small, quantizer's loss", loss, their_loss, 1e-9)
    weight = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    ((weight * output.reconstruction).mean() + loss).backward()
    ((weight * decoded).mean() + their_loss).backward()
    agree_in_gradients("VQGAN small, gradients", ours, theirs, 1e-9)


def test_a_small_gumbel_vqgan_equals_that_of_taming_with_the_same_noise(generator):
    ours, theirs = (model.train() for model in small_pair(SMALL_GUMBEL))
    ours.quantizer.temperature = theirs.quantize.temperature = 0.7
    x = pictures(generator, 16, 2, torch.float64)
    torch.manual_seed(3)
    noise = -torch.empty(2, 9, 8, 8, dtype=torch.float64).exponential_().log()  # as they draw it
    quantized = ours.quantizer(ours.encode(x), noise)
    reconstruction = ours.decoder(quantized.z_q)
    torch.manual_seed(3)
    z_q, their_loss, (_, _, indices) = theirs.quantize(encode(theirs, x))
    decoded = decode(theirs, z_q)
    assert torch.equal(quantized.indices, indices) and indices.unique().numel() > 5
    agree_relatively("VQGAN Gumbel, reconstruction", reconstruction, decoded, 1e-9)
    # Theirs keeps the logarithm finite by adding 1e-10.
    agree_relatively("VQGAN Gumbel, KL term", quantized.codebook_loss, their_loss, 1e-8)
    weight = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    ((weight * reconstruction).mean() + quantized.codebook_loss).backward()
    ((weight * decoded).mean() + their_loss).backward()
    agree_in_gradients("VQGAN Gumbel, gradients", ours, theirs, 1e-9)


# ---------------------------------------------------------------- full size


@pytest.mark.parametrize("name", RELEASED)
def test_every_released_layout_has_the_keys_and_shapes_of_taming(name):
    with torch.device("meta"):  # shapes without numbers
        ours, theirs = (
            make_taming_vqgan(RELEASED[name]).state_dict(),
            peer(RELEASED[name]).state_dict(),
        )
    ours.pop("quantizer.counts", None)
    assert {taming_key(k): t.shape for k, t in ours.items()} == {
        k: t.shape for k, t in theirs.items()
    }


@pytest.fixture(scope="module")
def full_pair(tmp_path_factory):
    """f16 with 16,384 code vectors: theirs, and ours, loaded from a file in the released layout."""
    torch.manual_seed(0)
    theirs = peer(RELEASED["f16-16384"]).eval().requires_grad_(False)
    for parameter in theirs.parameters():
        if parameter.ndim == 1:  # norms start at 1 and 0: equal before and after an exchange
            parameter.add_(0.1 * torch.randn_like(parameter))
    path = tmp_path_factory.mktemp("released") / "last.ckpt"
    with pytest.MonkeyPatch.context() as patch:
        callback = pretend_lightning(patch)
        discriminator = {"loss.discriminator.main.0.weight": torch.ones(64, 3, 4, 4)}
        trunk = {"loss.perceptual_loss.net.slice1.0.weight": torch.ones(64, 3, 3, 3)}
        content = {
            "epoch": 11,
            "global_step": 500_000,
            "pytorch-lightning_version": "1.0.8",
            "callbacks": {callback: {"best_model_score": torch.ones(1), "self": callback()}},
            "optimizer_states": [{"state": {0: {"step": 1, "exp_avg": torch.ones(9)}}}],
            "lr_schedulers": [],
            "state_dict": theirs.state_dict() | discriminator | trunk,
        }
        torch.save(content, path)
    ours = load_taming(path, "f16-16384")
    path.unlink()
    return ours, theirs


@pytest.mark.slow
def test_the_full_f16_encodes_and_decodes_as_that_of_taming(full_pair, generator):
    ours, theirs = full_pair
    x = pictures(generator, 256)
    with torch.no_grad():
        z = encode(theirs, x)
        assert z.shape == (1, 256, 16, 16)
        agree_relatively("VQGAN f16-16384, z in float32", ours.encode(x), z, 1e-4)
        # From shared encodings, in float64: at K = 16384 rounding alone changes a token or two.
        quantize, z = copy.deepcopy(theirs.quantize).double(), z.double()
        z_q, _, (_, _, indices) = quantize(z)
        assert torch.equal(copy.deepcopy(ours.quantizer).double().nearest(z), indices)
        assert indices.unique().numel() > 50
        decoded = decode(
            theirs, theirs.quantize.get_codebook_entry(indices.flatten(), (1, 16, 16, -1))
        )
        mine = ours.decode_tokens(indices.flatten(1))
    agree_relatively("VQGAN f16-16384, picture in float32", mine, decoded, 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "dtype, size, tolerance", [(torch.float32, 64, 1e-4), (torch.float64, 32, 1e-9)]
)
def test_the_full_f16_has_the_gradients_of_that_of_taming(
    full_pair, dtype, size, tolerance, generator
):
    ours, theirs = (copy.deepcopy(model).to(dtype).requires_grad_() for model in full_pair)
    kind = str(dtype).removeprefix("torch.")
    x = pictures(generator, size, dtype=dtype)
    z = encode(theirs, x)
    if dtype == torch.float64:
        mine = ours.encode(x)
        agree_relatively("VQGAN f16-16384, z in float64", mine, z, tolerance)
        _, _, (_, _, indices) = theirs.quantize(z)
        assert torch.equal(ours.quantizer.nearest(mine), indices)
    weights = torch.randn(z.shape, generator=generator, dtype=dtype)
    (weights * z).mean().backward()
    (weights * ours.encode(x)).mean().backward()
    indices = torch.randint(16384, (1, size // 16, size // 16), generator=generator)
    z_q = theirs.quantize.get_codebook_entry(indices.flatten(), (*indices.shape, -1))
    decoded, mine = decode(theirs, z_q), ours.decoder(ours.quantizer.lookup(indices))
    agree_relatively(f"VQGAN f16-16384, picture in {kind}", mine, decoded, tolerance)
    weights = torch.randn(x.shape, generator=generator, dtype=dtype)
    (weights * decoded).mean().backward()
    (weights * mine).mean().backward()
    agree_in_gradients(f"VQGAN f16-16384, gradients in {kind}", ours, theirs, tolerance)
