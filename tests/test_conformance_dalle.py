"""Gumbel-softmax, likelihood, KL term and Transformer of DALL·E equal their peers'."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from test_conformance import (
    agree,
    pairs_of_parameters,
    randomised,
    table,  # noqa: F401 - `table` prints by itself
)
from torch import distributions

from t2ilearn.models import sampling
from t2ilearn.models.dalle import DALLE, dalle_loss
from t2ilearn.models.dvae import (
    DVAE,
    DVAEConfig,
    DVAEOutput,
    dvae_loss,
    gumbel_noise,
    gumbel_softmax,
    logit_laplace,
    map_pixels,
)
from t2ilearn.models.sampling import sample, sample_steps
from t2ilearn.models.tokens import END, PAD, null_caption
from t2ilearn.models.transformer import PriorConfig

CODEBOOK_SIZE, SIDE, DIM, LAYERS, TEXT, VOCABULARY = 9, 3, 12, 2, 5, 11
N = SIDE**2
TOTAL = 1 + TEXT + 1 + N  # start, text, start of the image, image


def doubles(generator, *shape):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


# ---------------------------------------------------------------- stage one


@pytest.mark.parametrize("temperature", [0.0625, 0.5, 1.0, 3.0])
def test_gumbel_softmax_equals_that_of_torch(temperature, generator):
    logits, weight = doubles(generator, 2, 2, 7, 3, 3).unbind()
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    torch.manual_seed(3)
    g = -torch.empty(2, 7, 3, 3, dtype=torch.float64).exponential_().log()  # as they draw it
    torch.manual_seed(3)
    peer = F.gumbel_softmax(theirs, temperature, dim=1)
    mine = gumbel_softmax(ours, g, temperature)
    agree("Gumbel-softmax, torch", mine, peer)
    (weight * mine).sum().backward()
    (weight * peer).sum().backward()
    assert ours.grad.any()
    agree("Gumbel-softmax, gradient", ours.grad, theirs.grad)


@pytest.mark.parametrize("temperature", [0.3, 1.0])
def test_gumbel_softmax_equals_the_relaxed_one_hot_categorical_of_torch(
    monkeypatch, temperature, generator
):
    """RelaxedOneHotCategorical with the same u: noise and sample together."""
    logits = doubles(generator, 2, 3, 7)
    u = torch.rand(2, 3, 7, generator=generator, dtype=torch.float64)
    gumbel = distributions.relaxed_categorical
    monkeypatch.setattr(gumbel, "clamp_probs", lambda _: u)
    peer = distributions.RelaxedOneHotCategorical(
        torch.tensor(temperature, dtype=torch.float64), logits=logits
    ).rsample()
    monkeypatch.setattr(torch, "rand", lambda *_, **__: u)
    g = gumbel_noise((2, 3, 7), generator, torch.float64)
    mine = gumbel_softmax(logits.movedim(-1, 1), g.movedim(-1, 1), temperature).movedim(1, -1)
    agree("Gumbel-softmax, RelaxedOneHotCategorical", mine, peer)


def test_the_likelihood_equals_a_laplace_distribution_through_the_sigmoid(generator):
    mean, log_scale, where, weight = doubles(generator, 4, 3, 4, 4).unbind()
    x = map_pixels(where.tanh())
    inputs = [[t.clone().requires_grad_() for t in (x, mean, log_scale)] for _ in range(2)]
    mine = logit_laplace(*inputs[0])
    theirs, mu, ln_b = inputs[1]
    laplace = distributions.Laplace(mu, ln_b.exp())
    peer = -distributions.TransformedDistribution(
        laplace, [distributions.SigmoidTransform()]
    ).log_prob(theirs)
    agree("logit-Laplace, −ln p", mine, peer)
    (weight * mine).sum().backward()
    (weight * peer).sum().backward()
    for a, b in zip(*inputs, strict=True):
        assert a.grad.any()
        agree("logit-Laplace, gradients", a.grad, b.grad, 1e-10)


def test_the_kl_term_equals_that_of_torch_to_the_uniform_distribution(generator):
    ours = doubles(generator, 2, 6, 4, 4).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    x = torch.zeros(2, 3, 16, 16, dtype=torch.float64)
    mine = dvae_loss(x, DVAEOutput(ours, x, x)).kl
    q = distributions.Categorical(logits=theirs.movedim(1, -1))
    uniform = distributions.Categorical(logits=torch.zeros_like(theirs.movedim(1, -1)))
    # For each picture the sum over its tokens, divided by its number of values: the paper's
    # loss is divided by 256 · 256 · 3, where `F.kl_div(…, reduction="batchmean")` divides by B.
    peer = distributions.kl_divergence(q, uniform).sum((1, 2)).mean() / (3 * 16 * 16)
    agree("dVAE, KL to uniform", mine, peer)
    mine.backward()
    peer.backward()
    assert ours.grad.any()
    agree("dVAE, KL's gradient", ours.grad, theirs.grad)


def test_the_dvae_loss_and_every_gradient_equal_those_of_torch_distributions(generator):
    sizes = {"resolution": 16, "channels": (16, 32), "blocks": 1, "codebook_size": 6, "code_dim": 5}
    ours = randomised(DVAE(DVAEConfig(**sizes)))
    theirs = copy.deepcopy(ours)
    x = (2 * torch.rand(2, 3, 16, 16, generator=generator) - 1).double()
    g = gumbel_noise((2, 6, 4, 4), generator, torch.float64)
    loss = dvae_loss(x, ours(x, 0.5, g), 2.0)
    logits = theirs.encoder(x).movedim(1, -1)  # (B, h, w, K)
    z = ((logits + g.movedim(1, -1)) / 0.5).softmax(-1) @ theirs.codebook
    mean, log_scale = theirs.decoder(z.movedim(-1, 1)).chunk(2, 1)
    laplace = distributions.Laplace(mean, log_scale.clamp(min=math.log(1 / 4)).exp())
    density = distributions.TransformedDistribution(laplace, [distributions.SigmoidTransform()])
    nats = -density.log_prob(0.1 + 0.8 * (x + 1) / 2).sum()
    q = distributions.Categorical(logits=logits)
    even = distributions.Categorical(logits=torch.zeros_like(logits))
    nats = nats + 2 * distributions.kl_divergence(q, even).sum()
    peer = nats / (2 * 3 * 16 * 16)
    agree("dVAE, the bound", loss.total, peer, 1e-11)
    loss.total.backward()
    peer.backward()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert a.grad is not None, name
        scale = b.grad.abs().max().clamp(min=1)
        agree("dVAE, gradients", a.grad / scale, b.grad / scale, 1e-10)


# ---------------------------------------------------------------- stage two


@pytest.fixture(scope="module")
def gpt2_pair():
    """Ours, and GPT-2 over one vocabulary of text ⊕ image tokens, with our weights in it.

    What GPT-2 does not have, two starts and a vector instead of padding, is given as embeddings.
    """
    peer = pytest.importorskip("transformers")
    ours = randomised(DALLE(PriorConfig(CODEBOOK_SIZE, SIDE, DIM, LAYERS, 3, VOCABULARY, TEXT)))
    with torch.no_grad():  # so large that greedy sampling does not repeat one token
        for name, parameter in ours.named_parameters():
            parameter.mul_(1.5).add_("norm" in name and name.endswith("weight"))
        ours.norm.bias.mul_(0.1)
    config = peer.GPT2Config(
        vocab_size=VOCABULARY + CODEBOOK_SIZE,
        n_positions=TOTAL,
        n_embd=DIM,
        n_layer=LAYERS,
        n_head=3,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    theirs = peer.GPT2LMHeadModel(config).double().eval()
    rows = theirs.transformer.wte.weight
    assert theirs.lm_head.weight is rows
    with torch.no_grad():
        places = (ours.row + ours.column).flatten(0, 1)
        nowhere = torch.zeros(1, DIM, dtype=torch.float64)
        theirs.transformer.wpe.weight.copy_(
            torch.cat([nowhere, ours.word_position, nowhere, places])
        )
        for name, a, b, transposed in pairs_of_parameters(ours, theirs):
            if name != "image embedding":
                b.copy_(a.T if transposed else a)
        rows[:VOCABULARY] = ours.text_embedding.weight
        rows[VOCABULARY:] = ours.image_embedding.weight
    return ours, theirs


@pytest.fixture
def indices(generator):
    return torch.randint(CODEBOOK_SIZE, (3, N), generator=generator)


@pytest.fixture
def caption():
    return torch.tensor([[3, 4, 5, 6, END], [7, 8, 9, END, PAD], [10, 3, END, PAD, PAD]])


def extras(ours):
    """Two starts, and what replaces padding: leaves of GPT-2's graph with our numbers."""
    parts = (ours.starts, ours.padding)
    return [part.detach().clone().requires_grad_() for part in parts]


def embedded(theirs, starts, padding, indices, caption):
    """The inputs of GPT-2 without its positions: (B, 2 + T + N, D)."""
    lookup = theirs.transformer.wte
    first, second = starts.expand(-1, len(indices), -1, -1)
    text = torch.where((caption != PAD)[..., None], lookup(caption), padding)
    return torch.cat([first, text, second, lookup(indices + VOCABULARY)], dim=1)


def logits_of(theirs, inputs):
    """GPT-2's logits of the text tokens and of the image tokens, each at its own places."""
    logits = theirs(inputs_embeds=inputs).logits
    return logits[:, :TEXT, :VOCABULARY], logits[:, TEXT + 1 :, VOCABULARY:]


def test_the_transformer_equals_gpt_2_over_text_and_image_tokens(gpt2_pair, indices, caption):
    ours, theirs = copy.deepcopy(gpt2_pair)
    inputs = embedded(theirs, *extras(ours), indices[:, :-1], caption)
    text, image = logits_of(theirs, inputs)
    mine = ours(indices, caption)
    agree("DALLE, logits of text", mine.text, text)
    agree("DALLE, logits of image", mine.image, image)
    assert text.abs().max() > 0.1 and image.abs().max() > 0.1
    text, image = logits_of(theirs.float(), inputs.float())
    mine = ours.float()(indices, caption)
    agree("DALLE, logits in float32", mine.text, text, 1e-5)
    agree("DALLE, logits in float32", mine.image, image, 1e-5)


def test_the_loss_in_two_parts_and_its_gradients_equal_those_of_gpt_2(gpt2_pair, indices, caption):
    ours, theirs = copy.deepcopy(gpt2_pair)
    mine = dalle_loss(ours(indices, caption), caption, indices)
    starts, padding = extras(ours)
    text, image = logits_of(theirs, embedded(theirs, starts, padding, indices[:, :-1], caption))
    labels = caption.masked_fill(caption == PAD, -100)
    of_text = F.cross_entropy(text.flatten(0, 1), labels.flatten())
    of_image = F.cross_entropy(image.flatten(0, 1), indices.flatten())
    loss = of_text / 8 + 7 * of_image / 8
    agree("DALLE, cross-entropy of text", mine.text, of_text)
    agree("DALLE, cross-entropy of image", mine.image, of_image)
    agree("DALLE, loss", mine.total, loss)
    mine.total.backward()
    loss.backward()
    row = "DALLE, gradients"
    for name, a, b, transposed in pairs_of_parameters(ours, theirs):
        if name != "image embedding":
            assert a.grad.any(), name
            agree(row, a.grad, b.grad.T if transposed else b.grad)
    both = torch.cat([ours.text_embedding.weight.grad, ours.image_embedding.weight.grad])
    agree(row, both, theirs.transformer.wte.weight.grad)
    agree(row, ours.starts.grad, starts.grad)
    agree(row, ours.padding.grad, padding.grad)
    places = theirs.transformer.wpe.weight.grad
    agree(row, ours.word_position.grad, places[1 : 1 + TEXT])
    of_image = places[2 + TEXT :].unflatten(0, (SIDE, SIDE))
    agree(row, ours.row.grad, of_image.sum(1, keepdim=True))
    agree(row, ours.column.grad, of_image.sum(0))


@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_sampling_equals_that_of_gpt_2_with_its_own_cache(
    gpt2_pair, use_cache, caption, generator
):
    ours, theirs = gpt2_pair
    starts, padding = extras(ours)
    indices, past = torch.zeros(3, 0, dtype=torch.int64), None
    with torch.no_grad():
        inputs = embedded(theirs, starts, padding, indices, caption)
        for _ in range(N):
            output = theirs(inputs_embeds=inputs, past_key_values=past, use_cache=True)
            past = output.past_key_values
            new = output.logits[:, -1, VOCABULARY:].argmax(1, keepdim=True)
            indices, inputs = torch.cat([indices, new], 1), theirs.transformer.wte(new + VOCABULARY)
    how = {"temperature": 0.0, "use_cache": use_cache}
    assert torch.equal(sample(ours, caption, generator=generator, **how), indices)
    assert indices.unique().numel() > 2


def test_cached_sampling_has_the_logits_of_gpt_2_at_every_step(gpt2_pair, indices, caption):
    ours, theirs = gpt2_pair
    _, image = logits_of(theirs, embedded(theirs, *extras(ours), indices[:, :-1], caption))
    caches = ours.new_caches(3)
    with torch.no_grad():
        for i in range(N):
            step = ours.next_logits(indices[:, :i], caption, caches)
            agree("DALLE, cached logits", step, image[:, i])


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_guidance_equals_that_of_min_dalle(
    monkeypatch, gpt2_pair, use_cache, scale, indices, caption
):
    """uncond · (1 − s) + cond · s, of GPT-2's logits under both captions."""
    ours, theirs = gpt2_pair
    seen = []

    def forced(logits, *_):
        seen.append(logits)
        return indices[:, len(seen) - 1]

    monkeypatch.setattr(sampling, "sample_from_logits", forced)
    list(sample_steps(ours, caption, guidance_scale=scale, use_cache=use_cache))
    starts, padding = extras(ours)
    cond, uncond = (
        logits_of(theirs, embedded(theirs, starts, padding, indices[:, :-1], text))[1]
        for text in (caption, null_caption(3, TEXT))
    )
    assert (cond - uncond).abs().max() > 0.01
    agree("DALLE, guidance", torch.stack(seen, 1), uncond * (1 - scale) + cond * scale, 1e-11)
