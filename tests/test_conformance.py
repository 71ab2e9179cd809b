"""Where a peer computes the same thing, it has the same numbers: values, indices and gradients.

Peers are built from small configurations with random weights, copied from one side to the other;
nothing is downloaded. `pytest -s` prints the largest difference of each row.
"""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from t2ilearn.judging.metrics import (
    frechet_distance,
    kernel_distance,
    perplexity,
    precision_recall,
    psnr,
)
from t2ilearn.models import sampling
from t2ilearn.models.autoencoder import VAE, AutoencoderConfig, vae_loss
from t2ilearn.models.layers import QuickGELU, ResidualBlock, TransformerBlock
from t2ilearn.models.quantizers import FSQ, EMAQuantizer, VectorQuantizer
from t2ilearn.models.sampling import sample, sample_from_logits, sample_steps
from t2ilearn.models.tokens import null_caption
from t2ilearn.models.transformer import PriorConfig, TransformerPrior, prior_loss

LARGEST: dict[str, float] = {}


@pytest.fixture(autouse=True, scope="module")
def table():
    """Print the rows when all is done; pytest shows them with -s."""
    yield
    for row, difference in LARGEST.items():
        print(f"\n{row:<44} {difference:8.1e}", end="")


def agree(row: str, ours, theirs, atol: float = 1e-12) -> None:
    """Record the largest difference of this row, and assert that it is small."""
    ours, theirs = (torch.as_tensor(t, dtype=torch.float64).detach() for t in (ours, theirs))
    assert ours.shape == theirs.shape
    difference = (ours - theirs).abs().max().item()
    LARGEST[row] = max(LARGEST.get(row, 0.0), difference)
    assert difference <= atol, f"{row}: {difference:.1e}"


def randomised(module: nn.Module) -> nn.Module:
    """Weights large enough to show every difference: no bias is 0 and no scale is 1."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return module.double().eval()


def features(n, d, seed, scale=1.0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(n, d, generator=generator, dtype=torch.float64) + shift


# ---------------------------------------------------------------- quantizers


@pytest.fixture
def vq_pair():
    """Our gradient quantizer and diffusers', with one codebook."""
    peer = pytest.importorskip("diffusers.models.autoencoders.vae")

    def build(legacy):
        theirs = peer.VectorQuantizer(11, 5, beta=0.25, legacy=legacy, sane_index_shape=True)
        torch.manual_seed(0)
        ours = VectorQuantizer(11, 5).double()
        theirs = theirs.double()
        theirs.embedding.weight.data.copy_(ours.codebook.data)
        return ours, theirs

    return build


def quantized_by_both(ours, theirs, generator):
    """Outputs, losses and gradients of a loss that also depends on the decoder's input."""
    z = torch.randn(3, 5, 4, 2, generator=generator, dtype=torch.float64)
    weight = torch.randn(z.shape, generator=generator, dtype=torch.float64)
    z1, z2 = z.clone().requires_grad_(), z.clone().requires_grad_()
    output = ours(z1)
    loss = output.codebook_loss + 0.25 * output.commitment_loss
    z_q, their_loss, (_, _, indices) = theirs(z2)
    (loss + (weight * output.z_q).sum()).backward()
    (their_loss + (weight * z_q).sum()).backward()
    return output, loss, z1.grad, z_q, their_loss, indices, z2.grad


def test_the_gradient_quantizer_equals_that_of_diffusers(vq_pair, generator):
    ours, theirs = vq_pair(legacy=False)
    output, loss, grad, z_q, their_loss, indices, their_grad = quantized_by_both(
        ours, theirs, generator
    )
    assert torch.equal(output.indices, indices) and indices.unique().numel() > 5
    agree("VectorQuantizer, z_q", output.z_q, z_q)
    agree("VectorQuantizer, loss", loss, their_loss)
    agree("VectorQuantizer, gradient to z", grad, their_grad)
    agree("VectorQuantizer, gradient to codebook", ours.codebook.grad, theirs.embedding.weight.grad)


def test_beta_on_the_wrong_term_has_the_same_loss_and_other_gradients(vq_pair, generator):
    # β on the wrong term, the default of diffusers and taming. The values are the same.
    ours, theirs = vq_pair(legacy=True)
    _, loss, grad, _, their_loss, _, their_grad = quantized_by_both(ours, theirs, generator)
    assert torch.allclose(loss, their_loss, atol=1e-12)
    assert (ours.codebook.grad - 4 * theirs.embedding.weight.grad).abs().max() < 1e-12
    assert not torch.allclose(grad, their_grad, atol=1e-3)


@pytest.mark.parametrize("cosine", [False, True])
def test_the_ema_quantizer_equals_that_of_vector_quantize_pytorch(cosine, generator):
    peer = pytest.importorskip("vector_quantize_pytorch")
    torch.manual_seed(0)
    ours = EMAQuantizer(11, 5, cosine=cosine, decay=0.9)
    theirs = peer.VectorQuantize(
        dim=5,
        codebook_size=11,
        decay=0.9,
        commitment_weight=0.25,
        use_cosine_sim=cosine,
        threshold_ema_dead_code=0,
        rotation_trick=False,
        accept_image_fmap=True,
    ).train()
    book = theirs._codebook
    book.embed.copy_(ours.codebook[None])
    book.embed_avg.copy_(ours.codebook[None])
    book.cluster_size.fill_(1)
    name = "cosine EMA" if cosine else "EMA"
    for _ in range(3):
        z = torch.randn(4, 5, 3, 3, generator=generator)
        z1, z2 = z.clone().requires_grad_(), z.clone().requires_grad_()
        output = ours(z1)
        z_q, indices, loss = theirs(z2)
        (0.25 * output.commitment_loss + output.z_q.square().sum()).backward()
        (loss.sum() + z_q.square().sum()).backward()
        assert torch.equal(output.indices, indices)
        agree(f"{name}, z_q", output.z_q, z_q, 1e-6)
        agree(f"{name}, β · commitment", 0.25 * output.commitment_loss, loss.view(()), 1e-6)
        agree(f"{name}, gradient to z", z1.grad, z2.grad, 1e-5)
        agree(f"{name}, codebook after a step", ours.embeddings(), book.embed[0], 1e-6)
        agree(f"{name}, counts after a step", ours.counts, book.cluster_size[0], 1e-6)
        agree(f"{name}, sums after a step", ours.sums, book.embed_avg[0], 1e-6)


@pytest.mark.parametrize("levels, dims", [(3, 4), (4, 3), (5, 3), (8, 2)])
def test_fsq_equals_that_of_vector_quantize_pytorch(levels, dims, generator):
    # One convention: the first number counts units, and an even grid reaches −1 but not 1.
    peer = pytest.importorskip("vector_quantize_pytorch")
    ours, theirs = FSQ(levels**dims, dims), peer.FSQ([levels] * dims)
    z = 2 * torch.randn(4, dims, 5, 5, generator=generator)
    z1, z2 = z.clone().requires_grad_(), z.clone().requires_grad_()
    output, (z_q, indices) = ours(z1), theirs(z2)
    weight = torch.randn(z.shape, generator=generator)
    (weight * output.z_q).sum().backward()
    (weight * z_q).sum().backward()
    assert torch.equal(output.indices, indices.long())
    agree("FSQ, z_q", output.z_q, z_q, 1e-6)
    agree("FSQ, gradient to z", z1.grad, z2.grad, 1e-5)
    agree("FSQ, grid", ours.embeddings(), theirs.implicit_codebook, 1e-6)


# ---------------------------------------------------------------- layers and the VAE


@pytest.mark.parametrize("sizes", [(8, 8), (8, 16)])
def test_the_residual_block_equals_that_of_diffusers(sizes, generator):
    peer = pytest.importorskip("diffusers.models.resnet")
    ours = randomised(ResidualBlock(*sizes))
    theirs = peer.ResnetBlock2D(
        in_channels=sizes[0], out_channels=sizes[1], temb_channels=None, groups=8, eps=1e-5
    )
    state = {k.replace("skip", "conv_shortcut"): v for k, v in ours.state_dict().items()}
    theirs.double().load_state_dict(state, strict=True)
    x = torch.randn(2, sizes[0], 5, 5, generator=generator, dtype=torch.float64)
    agree("ResidualBlock", ours(x), theirs(x, None))


def test_the_kl_term_and_the_sample_of_the_vae_equal_those_of_diffusers(generator):
    peer = pytest.importorskip("diffusers.models.autoencoders.vae")
    model = randomised(VAE(AutoencoderConfig(16, (8,), 1, code_dim=3)))
    x = torch.rand(2, 3, 16, 16, generator=generator, dtype=torch.float64)
    output = model(x, torch.Generator().manual_seed(5))
    theirs = peer.DiagonalGaussianDistribution(torch.cat([output.mean, output.log_variance], 1))
    kl = vae_loss(x, output).kl * x[0].numel()
    agree("VAE, KL divergence", kl / 100, theirs.kl().mean() / 100)
    z = theirs.sample(torch.Generator().manual_seed(5))
    agree("VAE, decoded sample", output.reconstruction, model.decoder(z))


def test_transformer_blocks_with_quick_gelu_equal_the_text_encoder_of_clip(generator):
    peer = pytest.importorskip("transformers")
    config = peer.CLIPTextConfig(
        vocab_size=13,
        hidden_size=12,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=3,
        max_position_embeddings=7,
        hidden_act="quick_gelu",
        bos_token_id=0,
        eos_token_id=1,
    )
    theirs = randomised(peer.CLIPTextModel(config))
    tower = getattr(theirs, "text_model", theirs)  # one level deeper before transformers 5
    ids = torch.randint(13, (2, 7), generator=generator)
    x = tower.embeddings(ids)
    for layer in tower.encoder.layers:
        block = TransformerBlock(12, 3, QuickGELU()).double()
        ours, attention = block.attention, layer.self_attn
        qkv = (attention.q_proj, attention.k_proj, attention.v_proj)
        ours.qkv.weight.data = torch.cat([p.weight.data for p in qkv])
        ours.qkv.bias.data = torch.cat([p.bias.data for p in qkv])
        ours.out.load_state_dict(attention.out_proj.state_dict())
        block.norm1.load_state_dict(layer.layer_norm1.state_dict())
        block.norm2.load_state_dict(layer.layer_norm2.state_dict())
        block.mlp[0].load_state_dict(layer.mlp.fc1.state_dict())
        block.mlp[2].load_state_dict(layer.mlp.fc2.state_dict())
        x = block(x, is_causal=True)
    agree("TransformerBlock, CLIP", tower.final_layer_norm(x), theirs(ids).last_hidden_state)


# ---------------------------------------------------------------- the Transformer prior

PAIRS = {  # ours: GPT-2's, and whether its Conv1D holds the transpose
    "norm1": ("ln_1", False),
    "attention.qkv": ("attn.c_attn", True),
    "attention.out": ("attn.c_proj", True),
    "norm2": ("ln_2", False),
    "mlp.0": ("mlp.c_fc", True),
    "mlp.2": ("mlp.c_proj", True),
}
CODEBOOK_SIZE, SIDE, DIM, LAYERS = 9, 3, 12, 2
N = SIDE**2


def pairs_of_parameters(ours, theirs):
    """(name, our parameter, theirs, whether one is the other's transpose)."""
    yield "image embedding", ours.image_embedding.weight, theirs.transformer.wte.weight, False
    for part in ("weight", "bias"):
        yield "norm", getattr(ours.norm, part), getattr(theirs.transformer.ln_f, part), False
    for i, (block, layer) in enumerate(zip(ours.blocks, theirs.transformer.h, strict=True)):
        for name, (other, transposed) in PAIRS.items():
            for part in ("weight", "bias"):
                a = getattr(block.get_submodule(name), part)
                b = getattr(layer.get_submodule(other), part)
                yield f"{i}.{name}", a, b, transposed and part == "weight"


@pytest.fixture(scope="module")
def gpt2_pair():
    """Our prior without captions, and GPT-2 with its weights; GPT-2 has one position more."""
    peer = pytest.importorskip("transformers")
    ours = randomised(TransformerPrior(PriorConfig(CODEBOOK_SIZE, SIDE, DIM, LAYERS, num_heads=3)))
    config = peer.GPT2Config(
        vocab_size=CODEBOOK_SIZE,
        n_positions=N + 1,
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
    assert theirs.lm_head.weight is theirs.transformer.wte.weight
    with torch.no_grad():
        theirs.transformer.wpe.weight[:N] = ours.position
        for _, a, b, transposed in pairs_of_parameters(ours, theirs):
            b.copy_(a.T if transposed else a)
    return ours, theirs


def embedded(ours, theirs, indices):
    """GPT-2 has no start token; ours is given as an embedding."""
    return torch.cat(
        [ours.start.detach().expand(len(indices), -1, -1), theirs.transformer.wte(indices)], dim=1
    )


def test_the_transformer_prior_equals_gpt_2(gpt2_pair, generator):
    ours, theirs = copy.deepcopy(gpt2_pair)
    indices = torch.randint(CODEBOOK_SIZE, (3, N), generator=generator)
    logits = theirs(inputs_embeds=embedded(ours, theirs, indices)[:, :N]).logits
    agree("TransformerPrior, logits", ours(indices), logits)
    single = (
        ours.float()(indices),
        theirs.float()(inputs_embeds=embedded(ours, theirs, indices)).logits,
    )
    agree("TransformerPrior, logits in float32", single[0], single[1][:, :N], 1e-5)


def test_the_prior_loss_and_its_gradients_equal_those_of_gpt_2(gpt2_pair, generator):
    ours, theirs = copy.deepcopy(gpt2_pair)
    indices = torch.randint(CODEBOOK_SIZE, (3, N), generator=generator)
    # GPT-2 shifts the labels: the logits at the start token predict the first image token.
    labels = F.pad(indices, (1, 0), value=-100)
    their_loss = theirs(inputs_embeds=embedded(ours, theirs, indices), labels=labels).loss
    loss = prior_loss(ours(indices), indices).total
    agree("TransformerPrior, cross-entropy", loss, their_loss, 1e-6)
    # Both take the loss in float32; the gradients are compared from one in float64.
    F.cross_entropy(ours(indices).flatten(0, 1), indices.flatten()).backward()
    logits = theirs(inputs_embeds=embedded(ours, theirs, indices)[:, :N]).logits
    theirs.zero_grad()
    F.cross_entropy(logits.flatten(0, 1), indices.flatten()).backward()
    for name, a, b, transposed in pairs_of_parameters(ours, theirs):
        assert a.grad.any(), name
        agree("TransformerPrior, gradients", a.grad, b.grad.T if transposed else b.grad)
    agree("TransformerPrior, gradients", ours.position.grad, theirs.transformer.wpe.weight.grad[:N])


@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_sampling_equals_that_of_gpt_2(gpt2_pair, use_cache, generator):
    ours, theirs = gpt2_pair
    indices = torch.zeros(1, 0, dtype=torch.int64)
    for _ in range(N):
        logits = theirs(inputs_embeds=embedded(ours, theirs, indices)).logits[:, -1]
        indices = torch.cat([indices, logits.argmax(1, keepdim=True)], dim=1)
    how = {"temperature": 0.0, "use_cache": use_cache}
    assert torch.equal(sample(ours, generator=generator, **how), indices)


def test_cached_sampling_has_the_logits_of_gpt_2_at_every_step(gpt2_pair, generator):
    ours, theirs = gpt2_pair
    indices = torch.randint(CODEBOOK_SIZE, (2, N), generator=generator)
    logits = theirs(inputs_embeds=embedded(ours, theirs, indices)).logits
    caches = ours.new_caches(2)
    with torch.no_grad():
        for i in range(N):
            step = ours.next_logits(indices[:, :i], None, caches)
            agree("TransformerPrior, cached logits", step, logits[:, i])


# ---------------------------------------------------------------- sampling


def test_temperature_top_k_and_top_p_equal_those_of_transformers(monkeypatch, generator):
    peer = pytest.importorskip("transformers").generation.logits_process
    logits = 2 * torch.randn(50, 20, generator=generator)
    seen = []
    monkeypatch.setattr(
        torch, "multinomial", lambda p, *_, **__: seen.append(p) or p.argmax(1, keepdim=True)
    )
    for temperature, top_k, top_p in (
        (0.7, None, None),
        (1.0, 5, None),
        (1.3, 7, 0.8),
        (1, 20, 0.3),
    ):
        sample_from_logits(logits, float(temperature), top_k, top_p)
        scores = peer.TemperatureLogitsWarper(float(temperature))(None, logits)
        if top_k:
            scores = peer.TopKLogitsWarper(top_k)(None, scores)
        if top_p:
            scores = peer.TopPLogitsWarper(top_p)(None, scores)
        assert torch.equal(seen[-1] > 0, scores > -torch.inf)
        agree("sample_from_logits, probabilities", seen[-1], scores.softmax(1), 1e-6)


@pytest.mark.parametrize("use_cache", [True, False])
def test_guidance_equals_that_of_transformers(monkeypatch, use_cache, generator):
    peer = pytest.importorskip("transformers").generation.logits_process
    model = randomised(TransformerPrior(PriorConfig(CODEBOOK_SIZE, SIDE, DIM, LAYERS, 3, 8, 4)))
    caption = torch.randint(3, 8, (2, 4), generator=generator)
    indices = torch.randint(CODEBOOK_SIZE, (2, N), generator=generator)
    seen = []

    def forced(logits, *_):
        seen.append(logits)
        return indices[:, len(seen) - 1]

    monkeypatch.setattr(sampling, "sample_from_logits", forced)
    list(sample_steps(model, caption, guidance_scale=3.0, use_cache=use_cache))
    both = torch.cat([model(indices, caption), model(indices, null_caption(2, 4))])
    guide = peer.ClassifierFreeGuidanceLogitsProcessor(3.0)
    for i in range(N):
        agree("guidance on logits", seen[i], guide(indices, both[:, i]))


# ---------------------------------------------------------------- metrics


class AsTheyAre(nn.Module):
    """The identity, instead of an Inception network."""

    num_features = 6

    def forward(self, x):
        return x


def test_the_frechet_distance_equals_that_of_pytorch_fid():
    peer = pytest.importorskip("pytorch_fid.fid_score")
    mix = features(6, 6, 3)
    for real, fake in (
        (features(80, 6, 1), features(50, 6, 2, 1.5, 0.4)),
        (features(80, 6, 1) @ mix, features(50, 6, 2) @ mix.T + 2),
    ):
        numbers = [f(x.numpy()) for x in (real, fake) for f in (lambda x: x.mean(0), covariance)]
        theirs = peer.calculate_frechet_distance(*numbers)
        agree("Fréchet distance, pytorch-fid", frechet_distance(real, fake), theirs, 1e-9)


def covariance(x):
    return np.cov(x, rowvar=False)


def test_the_frechet_distance_equals_that_of_torchmetrics():
    peer = pytest.importorskip("torchmetrics.image.fid")
    theirs = peer.FrechetInceptionDistance(feature=AsTheyAre()).set_dtype(torch.float64)
    real, fake = features(80, 6, 1), features(50, 6, 2, 1.5, 0.4)
    theirs.update(real, real=True)
    theirs.update(fake, real=False)
    agree("Fréchet distance, torchmetrics", frechet_distance(real, fake), theirs.compute(), 1e-9)


@pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance` will save all")
def test_the_kernel_distance_equals_that_of_torchmetrics():
    peer = pytest.importorskip("torchmetrics.image.kid")
    theirs = peer.KernelInceptionDistance(feature=AsTheyAre(), subsets=1, subset_size=40)
    real, fake = features(40, 6, 1), features(40, 6, 2, 1.5, 0.4)
    theirs.update(real, real=True)
    theirs.update(fake, real=False)
    value, _ = theirs.compute()
    agree("kernel distance, torchmetrics", kernel_distance(real, fake), value, 1e-12)


def test_psnr_equals_that_of_torchmetrics(generator):
    peer = pytest.importorskip("torchmetrics.functional.image")
    a, b = 2 * torch.rand(2, 4, 3, 8, 8, generator=generator, dtype=torch.float64) - 1
    theirs = peer.peak_signal_noise_ratio(a, b, data_range=2.0, reduction="none", dim=(1, 2, 3))
    agree("PSNR, torchmetrics", psnr(a, b), theirs, 1e-5)  # its range is float32


@pytest.mark.parametrize("k", [1, 3, 5])
def test_precision_and_recall_equal_brute_force(k):
    real, fake = features(40, 4, 1), features(50, 4, 2, 1.2, 0.7)

    def inside(points, centres):
        hits = 0
        for point in points:
            for i, centre in enumerate(centres):
                others = np.delete(centres, i, axis=0)
                radius = np.sort(np.linalg.norm(others - centre, axis=1))[k - 1]
                if np.linalg.norm(point - centre) <= radius:
                    hits += 1
                    break
        return hits / len(points)

    r, f = real.numpy(), fake.numpy()
    theirs = torch.tensor([inside(f, r), inside(r, f)], dtype=torch.float64)
    assert 0.1 < theirs.min() and theirs.max() < 1
    agree("precision and recall, brute force", precision_recall(real, fake, k), theirs)


def test_perplexity_equals_the_entropy_of_scipy(generator):
    stats = pytest.importorskip("scipy.stats")
    indices = torch.randint(40, (300,), generator=generator) ** 2 // 40
    theirs = np.exp(stats.entropy(np.bincount(indices.numpy())))
    agree("perplexity, scipy", perplexity(indices, 64), theirs, 1e-9)
