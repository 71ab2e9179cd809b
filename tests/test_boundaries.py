"""What models and judges refuse: values out of range, NaN, other types. Never indices, silently."""

import pytest
import torch

from t2ilearn.data.pixels import bytes_from_pictures
from t2ilearn.judging.clip import embed_pictures
from t2ilearn.judging.metrics import (
    codebook_usage,
    frechet_distance,
    kernel_distance,
    perplexity,
    precision_recall,
    psnr,
)
from t2ilearn.judging.reader import Reader, ReaderConfig, read, read_emoji
from t2ilearn.models.autoencoder import VAE, Autoencoder, AutoencoderConfig
from t2ilearn.models.clip import CLIP, ImageTowerConfig, TextTowerConfig
from t2ilearn.models.dalle import DALLE, encode_prefix
from t2ilearn.models.diffusion import RectifiedFlow, jit_loss, q_sample
from t2ilearn.models.dit import DiT, DiTConfig
from t2ilearn.models.dvae import DVAE, DVAEConfig
from t2ilearn.models.lpips import perceptual_distance
from t2ilearn.models.pixelcnn import PixelCNN
from t2ilearn.models.sampling import sample_from_logits
from t2ilearn.models.tokens import null_caption
from t2ilearn.models.transformer import PriorConfig, TransformerPrior
from t2ilearn.models.unet import UNet, UNetConfig
from t2ilearn.models.vqgan import Discriminator, DiscriminatorConfig
from t2ilearn.models.vqgan_clip import codec_of, start_from_pictures
from t2ilearn.models.vqvae import VQVAE, VQVAEConfig

pytestmark = pytest.mark.usefixtures("unchecked")  # what a reader meets: the package's own checks
torch.manual_seed(0)
SIZES = {"resolution": 32, "channels": (8, 8), "codebook_size": 32, "code_dim": 4}
VQ, DV = VQVAE.from_config(VQVAEConfig(**SIZES)).eval(), DVAE(DVAEConfig(**SIZES)).eval()
TEXT = {"vocabulary": 11, "text_length": 5}
PRIOR = PriorConfig(codebook_size=32, side=8, dim=16, num_layers=1, num_heads=2, **TEXT)
PRIORS = [kind(PRIOR).eval() for kind in (TransformerPrior, DALLE, PixelCNN)]
CLIP_MODEL = CLIP(ImageTowerConfig(32, 16, 16, 1, 2, 16), TextTowerConfig(11, 5, 16, 1, 2, 16))
READER = Reader(ReaderConfig()).eval()
EMOJI_READER = Reader(ReaderConfig(answers=(9, 3, 2))).eval()
DIT = DiT(DiTConfig(32, 8, 32, 1, **TEXT)).eval()
UNET = UNet(UNetConfig(resolution=32, **TEXT)).eval()
X, T, CAPTION = torch.rand(2, 3, 32, 32) * 2 - 1, torch.full((2,), 0.5), null_caption(2, 5)

TAKE_PICTURES = {
    "VQVAE": VQ,
    "VQVAE.tokens": VQ.tokens,
    "VQVAE.encode": VQ.encode,
    "DVAE": lambda x: DV(x, 1.0, generator=torch.Generator()),
    "DVAE.tokens": DV.tokens,
    "Autoencoder": Autoencoder(AutoencoderConfig(**SIZES)),
    "VAE": lambda x: VAE(AutoencoderConfig(**SIZES))(x, torch.Generator()),
    "CLIP.encode_image": CLIP_MODEL.encode_image,
    "embed_pictures": lambda x: embed_pictures(CLIP_MODEL, x),
    "Reader": READER,
    "Reader.features": READER.features,
    "read": lambda x: read(READER, x),
    "read_emoji": lambda x: read_emoji(EMOJI_READER, x),
    "perceptual_distance": lambda x: perceptual_distance(READER.trunk, x, 1.5 * X),
    "encode_prefix": lambda x: encode_prefix(VQ, x, 4),
    "start_from_pictures": lambda x: start_from_pictures(x, codec_of(VQ)),
}
WRONG_TYPES = [torch.uint8, torch.int64, torch.bool, torch.float64, torch.float16]


@pytest.mark.parametrize("name", TAKE_PICTURES)
def test_whatever_takes_pictures_refuses_other_ranges_nan_and_types(name):
    take = TAKE_PICTURES[name]
    with torch.no_grad():
        take(X)
        for wrong in (255 * X, (X + 1) * 127.5, X + 1):
            with pytest.raises(ValueError, match="Pixels go from −1 to 1"):
                take(wrong)
        for value in (float("nan"), float("inf")):
            damaged = X.clone()
            damaged[1, 2, 3, 4] = value
            with pytest.raises(ValueError, match="Pixels go from −1 to 1"):
                take(damaged)
        for dtype in WRONG_TYPES:
            with pytest.raises(ValueError, match=str(dtype)):
                take(X.to(dtype))


@pytest.mark.parametrize("model", [DIT, UNET])
def test_whatever_takes_mixtures_refuses_nan_and_other_types(model):
    with torch.no_grad():
        assert model(5 * X, T, CAPTION).shape == X.shape  # noise has no bounds
        for value in (float("nan"), float("inf")):
            damaged, times = X.clone(), T.clone()
            damaged[1, 2, 3, 4] = times[1] = value
            for arguments in ((damaged, T, CAPTION), (X, times, CAPTION)):
                with pytest.raises(ValueError, match="NaN or infinity"):
                    model(*arguments)
        for dtype in WRONG_TYPES:
            with pytest.raises(ValueError, match=str(dtype)):
                model(X.to(dtype), T, CAPTION)


@pytest.mark.parametrize("function", [q_sample, jit_loss])
def test_mixing_refuses_nan_and_whole_numbers(function):
    for wrong in (X / 0 * 0, X.byte()):
        with pytest.raises(ValueError, match=r"NaN|uint8"):
            if function is q_sample:
                q_sample(wrong, T, RectifiedFlow(), torch.zeros_like(X))
            else:
                jit_loss(DIT, wrong, RectifiedFlow(), CAPTION, noise=torch.zeros_like(wrong), t=T)


@pytest.mark.parametrize("model", [READER.trunk, Discriminator(DiscriminatorConfig(8, 2))])
def test_networks_in_losses_refuse_other_types_but_no_values(model):
    """What is compared in a loss are reconstructions, and these may leave [−1, 1]."""
    model(1.5 * X)
    for dtype in (torch.float64, torch.uint8):
        with pytest.raises(ValueError, match=str(dtype)):
            model(X.to(dtype))


TAKE_TOKENS = {
    "VQVAE.decode_tokens": (lambda q: VQ.decode_tokens(q), 32, 64),
    "DVAE.decode_tokens": (lambda q: DV.decode_tokens(q), 32, 64),
    **{type(p).__name__: (lambda q, p=p: p(q, CAPTION), 32, 64) for p in PRIORS},
    "prior's caption": (lambda q: PRIORS[0](torch.zeros(2, 64, dtype=torch.int64), q), 11, 5),
    "DALLE's caption": (lambda q: PRIORS[1](torch.zeros(2, 64, dtype=torch.int64), q), 11, 5),
    "CLIP.encode_text": (CLIP_MODEL.encode_text, 11, 5),
    "DiT's caption": (lambda q: DIT(X, T, q), 11, 5),
    "UNet's caption": (lambda q: UNET(X, T, q), 11, 5),
}


@pytest.mark.parametrize("name", TAKE_TOKENS)
def test_whatever_takes_tokens_refuses_other_ranges_and_types(name):
    take, count, length = TAKE_TOKENS[name]
    good = torch.ones(2, length, dtype=torch.int64)  # captions that end at once
    with torch.no_grad():
        take(good)
        for wrong in (-1, count):
            bad = good.clone()
            bad[1, -1] = wrong
            with pytest.raises(ValueError, match=f"numbers from 0 to {count - 1}"):
                take(bad)
        for dtype in (torch.float32, torch.bool, torch.int16, torch.uint8):
            with pytest.raises(ValueError, match=f"whole numbers.*{dtype}"):
                take(good.to(dtype))


@pytest.mark.parametrize("metric", [frechet_distance, kernel_distance, precision_recall])
def test_distances_refuse_nan_and_whole_numbers(metric):
    good = torch.rand(8, 3)
    for bad in (good / 0, good * float("nan"), (9 * good).long(), good > 0.5):
        for pair in ((good, bad), (bad, good)):
            with pytest.raises(ValueError, match="NaN or infinity|floating numbers"):
                metric(*pair)


def test_psnr_refuses_other_ranges_nan_and_types():
    for bad in (255 * X, X * float("nan"), X.byte()):
        for pair in ((X, bad), (bad, X), (bad, bad)):
            with pytest.raises(ValueError, match="Pictures"):
                psnr(*pair)


@pytest.mark.parametrize("metric", [codebook_usage, perplexity])
def test_counts_of_indices_refuse_other_ranges_and_types(metric):
    for bad in (torch.tensor([-1, 0]), torch.tensor([0, 4]), torch.rand(3), torch.tensor([True])):
        with pytest.raises(ValueError, match="Indices"):
            metric(bad, 4)


def test_bytes_are_made_of_numbers_alone():
    for bad in (X * float("nan"), X.long(), X > 0):
        with pytest.raises(ValueError, match="Pictures are floating numbers"):
            bytes_from_pictures(bad)


def test_sampling_refuses_nan_and_temperatures_that_overflow():
    logits = torch.rand(2, 7)
    for temperature in (1e-50, 1e-7, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="temperature"):
            sample_from_logits(logits, temperature)
    for top in ({"top_k": 0}, {"top_k": 8}, {"top_p": 0.0}, {"top_p": 1.5}):
        with pytest.raises(ValueError, match="top-"):
            sample_from_logits(logits, **top)
    for temperature in (0, 1):
        with pytest.raises(ValueError, match="NaN"):
            sample_from_logits(logits * float("nan"), temperature)
    assert sample_from_logits(100 * logits, 1e-6).tolist() == logits.argmax(1).tolist()
