"""The critic, its losses, λ and the perceptual distance beside taming-transformers' and LPIPS' own.

Peers are built with random weights, copied from one side to the other; nothing is downloaded.
"""

from types import SimpleNamespace

import pytest
import torch
from test_conformance import agree

from t2ilearn import weights
from t2ilearn.vqgan import (
    Discriminator,
    DiscriminatorConfig,
    VGGTrunk,
    adaptive_weight,
    hinge_loss,
    non_saturating_loss,
    perceptual_distance,
)

losses = pytest.importorskip("taming.modules.losses.vqperceptual")
discriminators = pytest.importorskip("taming.modules.discriminator.model")


@pytest.fixture
def x(generator):
    """Two pictures of noise, in float64."""
    return torch.rand(2, 3, 64, 64, generator=generator, dtype=torch.float64) * 2 - 1


def critics(levels, width=8):
    """Ours and taming's, with one set of weights, in float64."""
    torch.manual_seed(0)
    theirs = discriminators.NLayerDiscriminator(ndf=width, n_layers=levels)
    theirs.apply(discriminators.weights_init)
    ours = Discriminator(DiscriminatorConfig(width, levels))
    ours.load_state_dict({k.removeprefix("main."): v for k, v in theirs.state_dict().items()})
    return ours.double().train(), theirs.double().train()


@pytest.mark.parametrize("levels", [1, 2, 3, 4])
def test_the_critic_and_its_gradients(levels, x):
    ours, theirs = critics(levels)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [net(a) for net, a in zip((ours, theirs), inputs, strict=True)]
    agree("critic: logits", *outputs, atol=1e-9)
    for output in outputs:
        output.square().mean().backward()
    agree("critic: gradient of the picture", *(a.grad for a in inputs), atol=1e-9)
    for mine, peer in zip(ours.parameters(), theirs.parameters(), strict=True):
        agree("critic: gradients of the weights", mine.grad, peer.grad, atol=1e-9)
    for mine, peer in zip(ours.buffers(), theirs.buffers(), strict=True):
        agree("critic: running statistics", mine, peer, atol=1e-9)


def test_the_critic_starts_as_tamings_does():
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
def test_the_critics_losses(ours, peer, generator):
    logits = torch.randn(2, 3, 1, 6, 6, generator=generator, dtype=torch.float64)
    mine, its = ([side.clone().requires_grad_() for side in logits] for _ in range(2))
    a, b = ours(*mine).total, getattr(losses, peer)(*its)
    agree(f"{peer}: value", a, b, atol=1e-9)
    a.backward()
    b.backward()
    for left, right in zip(mine, its, strict=True):
        agree(f"{peer}: gradient", left.grad, right.grad, atol=1e-9)


@pytest.mark.parametrize("loudness", [1.0, 1e-3, 1e6, 0.0])
def test_lambda(loudness, x):
    last = torch.nn.Conv2d(3, 3, 3, padding=1).double()
    drawn = last(x)
    ours, _ = critics(2)
    pictures, opinion = (drawn - x).abs().mean(), -loudness * ours.with_frozen_weights(drawn).mean()
    calculate = losses.VQLPIPSWithDiscriminator.calculate_adaptive_weight
    itself = SimpleNamespace(discriminator_weight=1.0)
    theirs = calculate(itself, pictures, opinion, last_layer=last.weight)
    mine = adaptive_weight(pictures, opinion, last.weight)
    agree("adaptive λ (relative)", mine / theirs, torch.ones(()), atol=1e-9)


def test_lpips_of_a_shared_trunk(x, generator):
    lpips, torchvision = pytest.importorskip("lpips"), pytest.importorskip("torchvision")
    with pytest.warns(UserWarning):  # of an argument that torchvision has renamed since
        peer = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False).double().eval()
    slices = [getattr(peer.net, f"slice{i}") for i in range(1, 6)]
    features = torchvision.models.vgg16(weights=None).features
    for mine, its in zip(features, (layer for part in slices for layer in part), strict=False):
        mine.load_state_dict(its.state_dict())
    trunk = VGGTrunk(features).double()
    heads = weights.lpips_channel_weights()
    for head, line in zip(heads, peer.lins, strict=True):
        assert torch.equal(head, line.model[1].weight.flatten().float())
    y = (x + 0.3 * torch.randn(x.shape, generator=generator, dtype=torch.float64)).clamp(-1, 1)
    copies = [y.clone().requires_grad_() for _ in range(2)]
    ours = perceptual_distance(trunk, x, copies[0], [head.double() for head in heads])
    theirs = peer(x, copies[1]).flatten()
    agree("LPIPS: distance", ours, theirs, atol=1e-9)
    gradients = [
        torch.autograd.grad(d.sum(), c)[0] for d, c in zip((ours, theirs), copies, strict=True)
    ]
    agree("LPIPS: gradient", *gradients, atol=1e-9)
