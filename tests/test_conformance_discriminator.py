"""Discriminator, losses, λ and perceptual distance equal those of taming-transformers and LPIPS.

Peers are built with random weights, copied from one side to the other; nothing is downloaded.
"""

from types import SimpleNamespace

import pytest
import torch
from test_conformance import agree

from t2ilearn.models.lpips import VGGTrunk, perceptual_distance
from t2ilearn.models.vqgan import (
    Discriminator,
    DiscriminatorConfig,
    adaptive_weight,
    hinge_loss,
    non_saturating_loss,
)
from t2ilearn.pretrained.lpips import lpips_channel_weights

losses = pytest.importorskip("taming.modules.losses.vqperceptual")
discriminators = pytest.importorskip("taming.modules.discriminator.model")


@pytest.fixture
def x(generator):
    """Two pictures of noise, in float64."""
    return torch.rand(2, 3, 64, 64, generator=generator, dtype=torch.float64) * 2 - 1


def pair(levels, channels=8):
    """Ours and taming's, with one set of weights, in float64."""
    torch.manual_seed(0)
    theirs = discriminators.NLayerDiscriminator(ndf=channels, n_layers=levels)
    theirs.apply(discriminators.weights_init)
    ours = Discriminator(DiscriminatorConfig(channels, levels))
    ours.load_state_dict({k.removeprefix("main."): v for k, v in theirs.state_dict().items()})
    return ours.double().train(), theirs.double().train()


@pytest.mark.parametrize("levels", [1, 2, 3, 4])
def test_the_discriminator_and_its_gradients_equal_those_of_taming(levels, x):
    ours, theirs = pair(levels)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [net(a) for net, a in zip((ours, theirs), inputs, strict=True)]
    agree("discriminator: logits", *outputs, atol=1e-9)
    for output in outputs:
        output.square().mean().backward()
    agree("discriminator: gradient of the picture", *(a.grad for a in inputs), atol=1e-9)
    for mine, peer in zip(ours.parameters(), theirs.parameters(), strict=True):
        agree("discriminator: gradients of the weights", mine.grad, peer.grad, atol=1e-9)
    for mine, peer in zip(ours.buffers(), theirs.buffers(), strict=True):
        agree("discriminator: running statistics", mine, peer, atol=1e-9)


def test_the_initial_weights_of_the_discriminator_have_the_scale_of_taming():
    torch.manual_seed(0)
    theirs = discriminators.NLayerDiscriminator(ndf=64, n_layers=3).apply(
        discriminators.weights_init
    )
    ours = Discriminator(DiscriminatorConfig(64, 3))
    for mine, peer in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert mine.shape == peer.shape
        if mine.numel() > 1000:
            assert mine.std().item() == pytest.approx(peer.std().item(), rel=0.05)


@pytest.mark.parametrize(
    ("ours", "peer"),
    [(hinge_loss, "hinge_d_loss"), (non_saturating_loss, "vanilla_d_loss")],
)
def test_the_losses_of_the_discriminator_equal_those_of_taming(ours, peer, generator):
    logits = torch.randn(2, 3, 1, 6, 6, generator=generator, dtype=torch.float64)
    mine, its = ([side.clone().requires_grad_() for side in logits] for _ in range(2))
    a, b = ours(*mine).total, getattr(losses, peer)(*its)
    agree(f"{peer}: value", a, b, atol=1e-9)
    a.backward()
    b.backward()
    for left, right in zip(mine, its, strict=True):
        agree(f"{peer}: gradient", left.grad, right.grad, atol=1e-9)


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e6, 0.0])
def test_the_adaptive_weight_equals_that_of_taming(scale, x):
    last = torch.nn.Conv2d(3, 3, 3, padding=1).double()
    fake = last(x)
    ours, _ = pair(2)
    pictures, gan = (fake - x).abs().mean(), -scale * ours.with_frozen_weights(fake).mean()
    calculate = losses.VQLPIPSWithDiscriminator.calculate_adaptive_weight
    itself = SimpleNamespace(discriminator_weight=1.0)
    theirs = calculate(itself, pictures, gan, last_layer=last.weight)
    mine = adaptive_weight(pictures, gan, last.weight)
    agree("adaptive λ (relative)", mine / theirs, torch.ones(()), atol=1e-9)


def test_the_perceptual_distance_equals_lpips_with_one_trunk(x, generator):
    lpips, torchvision = pytest.importorskip("lpips"), pytest.importorskip("torchvision")
    with pytest.warns(UserWarning):  # of an argument that torchvision has renamed since
        peer = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False).double().eval()
    slices = [getattr(peer.net, f"slice{i}") for i in range(1, 6)]
    features = torchvision.models.vgg16(weights=None).features
    for mine, its in zip(features, (layer for part in slices for layer in part), strict=False):
        mine.load_state_dict(its.state_dict())
    trunk = VGGTrunk(features).double()
    channel_weights = lpips_channel_weights()
    for weight, line in zip(channel_weights, peer.lins, strict=True):
        assert torch.equal(weight, line.model[1].weight.flatten().float())
    y = (x + 0.3 * torch.randn(x.shape, generator=generator, dtype=torch.float64)).clamp(-1, 1)
    copies = [y.clone().requires_grad_() for _ in range(2)]
    ours = perceptual_distance(trunk, x, copies[0], [w.double() for w in channel_weights])
    theirs = peer(x, copies[1]).flatten()
    agree("LPIPS: distance", ours, theirs, atol=1e-9)
    gradients = [
        torch.autograd.grad(d.sum(), c)[0] for d, c in zip((ours, theirs), copies, strict=True)
    ]
    agree("LPIPS: gradient", *gradients, atol=1e-9)
