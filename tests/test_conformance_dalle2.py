"""DALL·E 2's prior agrees with diffusers: the network's values and gradients, and every step."""

import pytest
import torch

from t2ilearn.models.conditioning import timestep_embedding
from t2ilearn.models.diffusion_prior import DiffusionPrior, DiffusionPriorConfig, prior_process
from t2ilearn.models.diffusion_samplers import Denoiser, ddpm_steps, timesteps
from t2ilearn.models.tokens import END, PAD

diffusers = pytest.importorskip("diffusers")
E, D, T, LAYERS = 6, 64, 5, 2
CAPTIONS = torch.tensor([[3, 4, 5, END, PAD], [7, END, PAD, PAD, PAD]])


def copied(theirs: torch.nn.Module, ours: torch.nn.Module) -> None:
    """A linear layer's or a normalisation's numbers."""
    theirs.load_state_dict(ours.state_dict())


class Waves(torch.nn.Module):
    """Our waves of a time, in the place of theirs."""

    def forward(self, t):
        return timestep_embedding(t, D, cos_first=True, shift=0.0)


def both_priors():
    """Our prior and diffusers' with the same numbers, in float64."""
    torch.manual_seed(0)
    ours = DiffusionPrior(DiffusionPriorConfig(E, D, LAYERS, 11, T)).double().eval()
    theirs = diffusers.PriorTransformer(
        num_attention_heads=2, attention_head_dim=32, num_layers=LAYERS, embedding_dim=E,
        num_embeddings=T, additional_embeddings=4, time_embed_dim=D, embedding_proj_dim=E,
        clip_embed_dim=E, added_emb_type="prd", encoder_hid_proj_type=None,
    ).double().eval()  # fmt: skip
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
        theirs.positional_embedding.copy_(ours.position[None])
        theirs.prd_embedding.copy_(ours.query.expand(1, 1, -1))
    # The waves of the time have a test of their own; in float32 theirs differ in the last digits.
    theirs.time_proj = Waves()
    copied(theirs.time_embedding.linear_1, ours.time.mlp[0])
    copied(theirs.time_embedding.linear_2, ours.time.mlp[2])
    copied(theirs.proj_in, ours.noisy)
    copied(theirs.embedding_proj, ours.text_embedding)
    copied(theirs.norm_out, ours.norm)
    copied(theirs.proj_to_clip_embeddings, ours.last)
    for their, our in zip(theirs.transformer_blocks, ours.blocks, strict=True):
        copied(their.norm1, our.norm1)
        copied(their.norm3, our.norm2)
        layers = (their.attn1.to_q, their.attn1.to_k, their.attn1.to_v)
        weights, biases = our.attention.qkv.weight.chunk(3), our.attention.qkv.bias.chunk(3)
        for layer, weight, bias in zip(layers, weights, biases, strict=True):
            layer.load_state_dict({"weight": weight, "bias": bias})
        copied(their.attn1.to_out[0], our.attention.out)
        copied(their.ff.net[0].proj, our.mlp[0])
        copied(their.ff.net[2], our.mlp[2])
    return ours, theirs


def test_the_network_is_diffusers_prior_transformer(generator):
    ours, theirs = both_priors()
    noisy, text = torch.randn(2, 2, E, generator=generator, dtype=torch.float64)
    t = torch.tensor([20.0, 700.0], dtype=torch.float64)
    noisy.requires_grad_()
    a = ours(noisy, t, text, CAPTIONS)
    (gradient_a,) = torch.autograd.grad(a.square().sum(), noisy)
    words = torch.nn.functional.embedding(CAPTIONS, ours.token)
    b = theirs(noisy, t, text, words, CAPTIONS != PAD).predicted_image_embedding
    (gradient_b,) = torch.autograd.grad(b.square().sum(), noisy)
    assert torch.allclose(a, b, atol=1e-10) and torch.allclose(gradient_a, gradient_b, atol=1e-10)


@pytest.mark.parametrize("steps", [7, 64])
def test_a_whole_sampling_is_that_of_diffusers_scheduler(steps, generator):
    """Its scheduler for this very prior, over our times: any step, the noise included."""
    process = prior_process()
    scheduler = diffusers.UnCLIPScheduler(prediction_type="sample", clip_sample=False)
    scheduler.alphas_cumprod = process.alpha_bar
    previous = torch.cat([torch.ones(1, dtype=torch.float64), process.alpha_bar[:-1]])
    scheduler.betas = 1 - process.alpha_bar / previous
    scheduler.alphas = 1 - scheduler.betas
    z = torch.randn(3, E, generator=generator, dtype=torch.float64)
    mean = torch.randn(3, E, generator=generator, dtype=torch.float64)

    def network(z, t):
        return torch.tanh(0.3 * z + mean) * (1 - t[0].double() / 2000)

    times = timesteps(steps, process)
    any_seed = torch.Generator().manual_seed(5)
    found = list(ddpm_steps(Denoiser(network, process, "x0"), z, times, generator=any_seed))
    their_seed = torch.Generator().manual_seed(5)
    for step, t, following in zip(found, times, times[1:], strict=False):
        prediction = network(z, torch.tensor([t], dtype=torch.float32))
        before = None if following == t - 1 else int(following)
        if following < 0:
            scheduler.one = torch.tensor(1.0, dtype=torch.float64)
        z = scheduler.step(prediction, int(t), z, before, generator=their_seed).prev_sample
        assert torch.allclose(step.z, z, atol=1e-8), t
