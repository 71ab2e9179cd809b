"""VQ-VAE: the parameters that each loss term trains, quantizers, and the autoencoders before."""

from dataclasses import FrozenInstanceError

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from t2ilearn.data import Shapes
from t2ilearn.models import distributed
from t2ilearn.models.autoencoder import (
    VAE,
    Autoencoder,
    Decoder,
    Encoder,
    ImageTokenizer,
    ResidualConvBlock,
    VAEOutput,
    autoencoder_loss,
    vae_loss,
)
from t2ilearn.models.quantizers import (
    FSQ,
    QUANTIZERS,
    EMAQuantizer,
    Quantized,
    VectorQuantizer,
    make_quantizer,
)
from t2ilearn.models.vqvae import VQVAE, VQVAEConfig, VQVAEOutput, vqvae_loss

SIZES = {"resolution": 16, "channels": (8, 16), "blocks": 1, "codebook_size": 27, "code_dim": 3}
KINDS = [
    *(("gradient", False), ("gradient", True), ("ema", False), ("ema", True), ("fsq", False)),
]
kinds = pytest.mark.parametrize("quantizer, cosine", KINDS)
learned = pytest.mark.parametrize("quantizer, cosine", KINDS[:-1])


@pytest.fixture
def x(generator):
    """Four pictures of noise, in float64."""
    return torch.rand(4, 3, 16, 16, generator=generator, dtype=torch.float64) * 2 - 1


def small(quantizer="ema", cosine=False, **sizes) -> VQVAE:
    """A VQ-VAE in float64 whose weights are always the same."""
    torch.manual_seed(0)
    return VQVAE.from_config(
        VQVAEConfig(**{**SIZES, **sizes}, quantizer=quantizer, cosine=cosine)
    ).double()


def codebook_of(kind, rows, **options):
    """A quantizer with these code vectors, as if it had started from them."""
    rows = torch.as_tensor(rows)
    quantizer = kind(*rows.shape, **options).to(rows.dtype)
    quantizer.replace_codes(torch.arange(len(rows)), rows)
    return quantizer


def grid(rows):
    """(n, D) vectors in the layout of an encoder's output: (1, D, 1, n)."""
    return torch.as_tensor(rows).T[None, :, None]


def state_of(module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def same_state(module, before) -> bool:
    return all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


# ---------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"channels": ()}, "multiples of 8"),
        ({"channels": (8, 12)}, "multiples of 8"),
        ({"channels": (0,)}, "multiples of 8"),
        ({"channels": (-8,)}, "multiples of 8"),
        ({"resolution": 18}, "multiple of 4, not 18"),
        ({"resolution": 0}, "multiple of 4, not 0"),
        ({"resolution": 2}, "multiple of 4, not 2"),
        ({"quantizer": "gumbel"}, "one of .*'ema'.*, not 'gumbel'"),
        ({"codebook_size": 1}, "codebook_size must be at least 2"),
        ({"code_dim": 0}, "code_dim and blocks at least 1; they are 27, 0 and 1"),
        ({"blocks": 0}, "at least 1; they are 27, 3 and 0"),
        ({"beta": -0.1}, "β must be 0 or more"),
    ],
)
def test_sizes_that_do_not_fit_together_are_an_error(wrong, message):
    with pytest.raises(ValueError, match=message):
        VQVAEConfig(**{**SIZES, **wrong})


def test_a_config_computes_the_side_of_its_grid_and_is_immutable():
    config = VQVAEConfig()
    assert (config.resolution, config.side, config.beta) == (64, 8, 0.25)
    assert VQVAEConfig(**SIZES).side == 4
    with pytest.raises(FrozenInstanceError):
        config.codebook_size = 3


@pytest.mark.parametrize("channels", [(8,), (8, 16), (8, 16, 8)])
@pytest.mark.parametrize("blocks", [1, 2])
def test_every_level_of_the_encoder_halves_the_side_and_the_decoder_mirrors_it(channels, blocks):
    config = VQVAEConfig(16, channels, blocks, codebook_size=9, code_dim=5)
    z = Encoder(config)(torch.zeros(2, 3, 16, 16))
    assert z.shape == (2, 5, 16 // 2 ** len(channels), 16 // 2 ** len(channels))
    assert Encoder(config, 7)(torch.zeros(2, 3, 16, 16)).shape[1] == 7
    assert Decoder(config)(z).shape == (2, 3, 16, 16)
    encoder, decoder = Encoder(config), Decoder(config)
    for kind in (ResidualConvBlock, nn.GroupNorm):
        counts = [sum(isinstance(m, kind) for m in net) for net in (encoder, decoder)]
        assert counts[0] == counts[1]
    count = sum(isinstance(m, ResidualConvBlock) for m in encoder)
    assert count == len(channels) - 1 + blocks  # the coarsest level has all of them


@kinds
def test_shapes_of_reconstruction_tokens_and_losses(quantizer, cosine, x):
    model = small(quantizer, cosine)
    reconstruction, (z_q, indices, codebook_loss, commitment_loss) = model(x)
    assert reconstruction.shape == x.shape and z_q.shape == (4, 3, 4, 4)
    assert indices.shape == (4, 4, 4) and indices.dtype == torch.int64
    assert codebook_loss.shape == commitment_loss.shape == ()
    assert model.tokens(x).shape == (4, 16) and model.encode(x).shape == (4, 3, 4, 4)


@kinds
def test_decoding_uses_the_precision_of_the_weights(quantizer, cosine, x):
    model = small(quantizer, cosine).eval()
    decoded = model.decode_tokens(model.tokens(x))
    assert decoded.shape == x.shape and decoded.dtype == torch.float64
    assert torch.allclose(decoded, model(x).reconstruction, atol=1e-12)


def test_each_token_stands_at_the_place_of_its_encoding():
    quantizer = codebook_of(VectorQuantizer, [[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    z = torch.tensor([[[0.1, 0.9, 0.2], [0.2, 1.1, 0.8]], [[0.1, 0.0, 0.7], [0.9, 0.8, 0.1]]])[None]
    assert quantizer(z).indices.tolist() == [[[0, 1, 2], [2, 3, 1]]]


# ---------------------------------------------------------------- Eq. 3


def terms_by_hand(model, x):
    """x̂ and the three terms, with every distance computed in full."""
    z = model.encode(x)
    book = model.quantizer.embeddings()
    if getattr(model.quantizer, "cosine", False):
        z = z / z.norm(dim=1, keepdim=True)
        book = model.quantizer.codebook / model.quantizer.codebook.norm(dim=1, keepdim=True)
    flat = z.permute(0, 2, 3, 1)
    nearest = (flat[..., None, :] - book).square().sum(-1).argmin(-1)
    e = book[nearest].permute(0, 3, 1, 2)
    reconstruction = model.decoder(e)
    error = (x - reconstruction).square().mean()
    return reconstruction, nearest, error, (z - e).square().mean()


@learned
@pytest.mark.parametrize("beta", [0.25, 2.0])
def test_the_vqvae_loss_equals_equation_3(quantizer, cosine, beta, x):
    model = small(quantizer, cosine)
    reconstruction, nearest, error, distance = terms_by_hand(model, x)
    output = model.eval()(x)
    loss = vqvae_loss(x, output, beta=beta)
    assert torch.equal(output.quantized.indices, nearest)
    assert torch.allclose(output.reconstruction, reconstruction, atol=1e-12)
    of_codebook = distance if quantizer == "gradient" else torch.zeros_like(distance)
    # The two terms would be 0 if they were taken after the straight-through line.
    assert distance > 0.01
    expected = (error, of_codebook, distance, error + of_codebook + beta * distance)
    for name, value, wanted in zip(loss._fields, loss, expected, strict=True):
        assert torch.allclose(value, wanted, atol=1e-12), name


def test_the_loss_with_fsq_is_the_reconstruction_loss_alone(x):
    model = small("fsq")
    loss = vqvae_loss(x, model(x))
    z = model.quantizer.project(model.encode(x))
    reconstruction = model.decoder((z * 1).round())  # three levels: −1, 0, 1
    assert torch.allclose(loss.total, (x - reconstruction).square().mean(), atol=1e-12)
    assert loss.codebook_loss == loss.commitment_loss == 0 and loss.total == loss.reconstruction


def trained_by(model, term) -> set[str]:
    """Which parts get a gradient from this term."""
    model.zero_grad()
    if term.requires_grad:
        term.backward(retain_graph=True)
    parts = {"encoder": model.encoder, "quantizer": model.quantizer, "decoder": model.decoder}
    return {
        name
        for name, part in parts.items()
        if any(p.grad is not None and p.grad.any() for p in part.parameters())
    }


@kinds
def test_each_loss_term_has_gradients_for_its_own_part_only(quantizer, cosine, x):
    model = small(quantizer, cosine)
    loss = vqvae_loss(x, model(x))
    assert trained_by(model, loss.reconstruction) == {"encoder", "decoder"}
    assert trained_by(model, loss.codebook_loss) == (
        {"quantizer"} if quantizer == "gradient" else set()
    )
    assert trained_by(model, loss.commitment_loss) == (set() if quantizer == "fsq" else {"encoder"})


@pytest.mark.parametrize("cosine", [False, True])
def test_beta_weights_the_commitment_loss_and_not_the_codebook_loss(cosine, x):
    # With β on the wrong term the values are the same, and only these gradients differ.
    model, gradients = small("gradient", cosine), []
    for beta in (0.0, 1.0, 3.0):
        model.zero_grad()
        vqvae_loss(x, model(x), beta=beta).total.backward()
        gradients.append(
            [p.grad.clone() for p in (model.quantizer.codebook, model.encoder[0].bias)]
        )
    (indices, bias), (codes1, bias1), (codes3, bias3) = gradients
    assert indices.any() and torch.allclose(indices, codes1, atol=1e-15)
    assert torch.allclose(indices, codes3, atol=1e-15)
    assert not torch.allclose(bias, bias1, rtol=1e-3)
    assert torch.allclose(bias3 - bias, 3 * (bias1 - bias), atol=1e-12)


def test_codebook_and_commitment_losses_pull_code_vector_and_encoding_together(generator):
    quantizer = VectorQuantizer(6, 3).double()
    z = torch.randn(2, 3, 2, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    output = quantizer(z)
    (towards_code,) = torch.autograd.grad(output.commitment_loss, z, retain_graph=True)
    e = quantizer.lookup(output.indices)
    assert torch.allclose(towards_code, 2 * (z - e) / z.numel(), atol=1e-14)
    (towards_z,) = torch.autograd.grad(output.codebook_loss, quantizer.codebook)
    flat, indices = z.detach().movedim(1, -1).flatten(0, 2), output.indices.flatten()
    for k, row in enumerate(quantizer.codebook.detach()):
        pull = 2 * (row - flat[indices == k]).sum(0) / z.numel()
        assert torch.allclose(towards_z[k], pull, atol=1e-14)


@kinds
def test_straight_through_has_the_value_of_the_code_vector_and_the_gradient_of_the_encoding(
    quantizer, cosine, generator
):
    step = small(quantizer, cosine).quantizer.eval()
    z = torch.randn(1, 3, 1, 2, generator=generator, dtype=torch.float64)
    assert torch.allclose(step(z).z_q, step.lookup(step(z).indices).double(), atol=1e-12)
    assert not torch.allclose(step(z).z_q, step.project(z), atol=1e-3)
    through = torch.autograd.functional.jacobian(lambda z: step(z).z_q, z).view(6, 6)
    # The sphere and the bounds of FSQ come before the step, whose own Jacobian is the identity.
    before = torch.autograd.functional.jacobian(step.project, z).view(6, 6)
    assert torch.equal(through, before)
    if quantizer != "fsq" and not cosine:
        assert torch.equal(through, torch.eye(6, dtype=torch.float64))


# ---------------------------------------------------------------- the nearest code vector


@pytest.mark.parametrize("kind", [VectorQuantizer, EMAQuantizer])
def test_cosine_quantizers_compare_directions_only(kind, generator, device):
    torch.manual_seed(1)
    quantizer = kind(12, 4, cosine=True).to(device).eval()
    z = torch.randn(2, 4, 3, 3, generator=generator).to(device)
    scale = torch.rand(2, 1, 3, 3, generator=generator).to(device) * 50 + 0.01
    one, other = quantizer(z), quantizer(z * scale)
    assert torch.equal(one.indices, other.indices)
    similarity = F.cosine_similarity(z[:, None], quantizer.codebook[None, :, :, None, None], dim=2)
    assert torch.equal(one.indices, similarity.argmax(1))
    assert torch.allclose(one.z_q.norm(dim=1), torch.ones(2, 3, 3, device=device), atol=1e-6)


def test_cosine_quantizers_ignore_the_length_of_code_vectors():
    quantizer = codebook_of(EMAQuantizer, [[100.0, 0.0], [0.0, 0.01]], cosine=True)
    assert quantizer.nearest(quantizer.project(grid([[0.5, 1.0], [1.0, 0.5]]))).tolist() == [
        [[1, 0]]
    ]


def close_codes():
    """Code vectors that are equal in bfloat16, and encodings near them."""
    rows = torch.tensor([[1.0, 1.0], [1.001, 1.0], [1.0, 1.001], [1.001, 1.001]])
    return rows, grid(rows + 1e-4)


@pytest.mark.parametrize("kind", [VectorQuantizer, EMAQuantizer])
def test_autocast_does_not_change_the_nearest_code_vectors(kind):
    rows, z = close_codes()
    quantizer = codebook_of(kind, rows)
    low = (rows**2).sum(1).bfloat16() - 2 * (z[0, :, 0].T.bfloat16() @ rows.T.bfloat16())
    assert low.argmin(1).tolist() != [0, 1, 2, 3]  # else this test could not fail
    with torch.autocast("cpu", torch.bfloat16):
        output = quantizer(z)
    assert output.indices.tolist() == [[[0, 1, 2, 3]]]
    assert {t.dtype for t in (output.z_q, output.codebook_loss, output.commitment_loss)} == {
        torch.float32
    }
    assert output.commitment_loss > 0


@pytest.mark.parametrize("quantizer", [VectorQuantizer(9, 2), EMAQuantizer(9, 2), FSQ(9, 2)])
def test_encodings_in_half_precision_are_quantized_in_float32(quantizer, generator):
    z = torch.randn(2, 2, 3, 3, generator=generator).bfloat16()
    output, full = quantizer.eval()(z), quantizer.eval()(z.float())
    assert output.z_q.dtype == torch.float32 and torch.equal(output.indices, full.indices)
    assert torch.equal(output.z_q, full.z_q)


@kinds
def test_under_autocast_losses_and_moving_averages_stay_in_float32(quantizer, cosine, x):
    model, x = small(quantizer, cosine).float(), x.float()
    with torch.autocast("cpu", torch.bfloat16):
        output = model(x)
        loss = vqvae_loss(x, output)
        total = autoencoder_loss(x, output.reconstruction).total
    assert output.reconstruction.dtype == torch.bfloat16  # autocast is active
    assert {term.dtype for term in loss} == {torch.float32} and total.dtype == torch.float32
    assert all(value.dtype == torch.float32 for value in model.state_dict().values())
    loss.total.backward()
    assert all(p.grad.isfinite().all() for p in model.encoder.parameters())


def test_the_gaussian_of_a_vae_stays_in_float32_under_autocast(x, generator):
    model, x = VAE(VQVAEConfig(**SIZES)), x.float()
    with torch.autocast("cpu", torch.bfloat16):
        output = model(x, generator)
        loss = vae_loss(x, output)
    assert output.reconstruction.dtype == torch.bfloat16
    assert {t.dtype for t in (output.mean, output.log_variance, *loss)} == {torch.float32}


@kinds
def test_a_vqvae_works_on_the_device_of_its_weights(quantizer, cosine, x, device, generator):
    model, x = small(quantizer, cosine).float().to(device), x.float().to(device)
    model.kmeans_init(x, generator)
    loss = vqvae_loss(x, model(x))
    loss.total.backward()
    model.restart_dead_codes(x, generator)
    assert model.eval()(x).reconstruction.device.type == device.type
    assert model.decode_tokens(model.tokens(x)).device.type == device.type
    assert {term.device.type for term in loss} == {device.type}


def test_losses_of_reconstructions_in_half_precision_are_computed_in_float32(generator):
    x = torch.rand(2, 3, 16, 16, generator=generator)
    half = (x + 0.001 * torch.randn(x.shape, generator=generator)).bfloat16()
    error, zero = (x - half.float()).square().mean(), torch.zeros(2, 3, 4, 4)
    quantized = Quantized(zero, zero[:, 0].long(), zero.sum(), zero.sum())
    for loss in (
        autoencoder_loss(x, half),
        vae_loss(x, VAEOutput(half, zero, zero)),
        vqvae_loss(x, VQVAEOutput(half, quantized)),
    ):
        assert loss.total.dtype == torch.float32
        assert loss.total.item() == pytest.approx(error.item(), rel=1e-5)


# ---------------------------------------------------------------- moving averages


def test_one_step_of_the_moving_averages_equals_equations_6_to_8():
    quantizer = codebook_of(EMAQuantizer, [[0.0, 0.0], [4.0, 4.0], [9.0, 9.0]], decay=0.9)
    quantizer(grid([[1.0, 0.0], [0.0, 1.0], [5.0, 4.0]]))
    counts = torch.tensor([0.9 + 0.2, 0.9 + 0.1, 0.9])
    sums = torch.tensor([[0.1, 0.1], [3.6 + 0.5, 3.6 + 0.4], [8.1, 8.1]])
    assert torch.allclose(quantizer.counts, counts) and torch.allclose(quantizer.sums, sums)
    smooth = 3 * (counts + 1e-5) / (3 + 3e-5)
    assert torch.allclose(quantizer.codebook, sums / smooth[:, None], atol=1e-6)
    # Nothing uses the third code vector, so that it does not move.
    assert torch.allclose(quantizer.codebook[2], torch.tensor([9.0, 9.0]), atol=1e-3)


def test_ema_code_vectors_converge_to_the_mean_of_their_encodings():
    quantizer = codebook_of(EMAQuantizer, [[-1.0, 0.0], [1.0, 0.0]], decay=0.8)
    z = grid([[-3.0, 1.0], [-5.0, 2.0], [-4.0, 3.0], [2.0, 0.0], [4.0, 1.0]])
    for _ in range(80):
        quantizer(z)
    expected = torch.tensor([[-4.0, 2.0], [3.0, 0.5]])
    assert torch.allclose(quantizer.codebook, expected, atol=1e-3)


@pytest.mark.parametrize("cosine", [False, True])
def test_moving_averages_change_in_training_mode_only(cosine, x):
    model = small("ema", cosine)
    before = state_of(model.quantizer)
    assert before.keys() == {"codebook", "counts", "sums"} and not list(
        model.quantizer.parameters()
    )
    model.eval()
    model(x)
    model.tokens(x)
    model.train().tokens(x)  # reading tokens is not training
    assert same_state(model.quantizer, before)
    model(x)
    assert all(not torch.equal(v, before[k]) for k, v in model.quantizer.state_dict().items())


def test_a_forward_pass_of_the_gradient_quantizer_changes_its_counts_only(x):
    model = small("gradient")
    assert [name for name, _ in model.quantizer.named_parameters()] == ["codebook"]
    before = state_of(model)
    model.eval()(x)
    assert same_state(model, before)
    model.train()(x)
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == {"quantizer.counts"}
    with torch.no_grad():
        model(x)  # without gradients, but in training mode: uses are counted as well
    uses = torch.bincount(model.tokens(x).flatten(), minlength=27)
    assert torch.allclose(
        model.quantizer.counts, 0.99**2 + (1 - 0.99**2) * uses.double(), atol=1e-6
    )


def test_an_ema_codebook_may_change_between_forward_and_backward(x):
    model = small("ema")
    loss = vqvae_loss(x, model(x)).total
    model(x)  # the codebook changes between forward and backward, as with accumulated gradients
    loss.backward()
    assert not any(value.requires_grad for value in model.quantizer.state_dict().values())


def test_statistics_are_summed_over_all_processes(monkeypatch, generator):
    z = torch.randn(2, 2, 3, 3, generator=generator)
    for kind in (EMAQuantizer, VectorQuantizer):
        torch.manual_seed(0)
        alone, among_two = kind(5, 2), kind(5, 2)
        among_two.load_state_dict(alone.state_dict())
        alone(torch.cat([z, z]))
        with monkeypatch.context() as patch:  # two processes with the same batch
            patch.setattr(distributed, "num_ranks", lambda: 2)
            patch.setattr(distributed.dist, "all_reduce", lambda x: x.mul_(2))
            among_two(z)
        for name, value in alone.state_dict().items():
            assert torch.allclose(value, among_two.state_dict()[name], atol=1e-6), name


# ---------------------------------------------------------------- restarting dead code vectors


def with_dead_codes(kind, cosine=False):
    """Four code vectors, of which the last two are far away and have not been used for long."""
    rows = [[1.0, 0.1], [0.1, 1.0], [-1.0, -5.0], [-5.0, -1.0]]
    quantizer = codebook_of(kind, rows, cosine=cosine)
    quantizer.counts[2:] = 0.01
    if kind is EMAQuantizer:
        quantizer.sums[2:] = quantizer.codebook[2:] * 0.01
    return quantizer


@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("kind", [VectorQuantizer, EMAQuantizer])
def test_a_restarted_code_vector_is_used_and_keeps_its_new_place(kind, cosine, generator):
    quantizer = with_dead_codes(kind, cosine)
    z = grid([[2.0, 0.1], [2.0, 0.6], [0.1, 2.0], [0.7, 2.0]])
    assert set(quantizer(z).indices.flatten().tolist()) == {0, 1}
    kept = quantizer.codebook[:2].clone()
    assert quantizer.restart_dead_codes(z, generator) == 2
    assert torch.equal(quantizer.codebook[:2], kept)
    restarted = quantizer.embeddings()[2:].clone()
    encodings = quantizer.project(z)[0, :, 0].T
    distance = torch.cdist(restarted, encodings)
    assert (distance.min(1).values < 1e-6).all() and distance.argmin(1).unique().numel() == 2
    assert quantizer.counts[2:].tolist() == [1.0, 1.0]
    assert set(quantizer(z).indices.flatten().tolist()) >= {2, 3}
    # That was a training step. With the old sums, the old code vectors would be back.
    assert torch.allclose(quantizer.embeddings()[2:], restarted, atol=0.02)
    if kind is EMAQuantizer:
        assert torch.allclose(
            quantizer.sums / quantizer.counts[:, None], quantizer.codebook, atol=1e-3
        )


@pytest.mark.parametrize("kind", [VectorQuantizer, EMAQuantizer])
def test_code_vectors_in_use_are_not_restarted(kind, generator):
    quantizer = with_dead_codes(kind)
    quantizer.counts[:] = 0.03  # dead is below the threshold, not at it
    before = state_of(quantizer)
    z = torch.randn(1, 2, 3, 3, generator=generator)
    assert quantizer.restart_dead_codes(z, generator) == 0 and same_state(quantizer, before)
    assert quantizer.restart_dead_codes(z, generator, threshold=0.04) == 4


def test_an_unused_code_vector_is_dead_after_350_steps(generator):
    quantizer = codebook_of(EMAQuantizer, [[0.0, 0.0], [9.0, 9.0]])
    z, steps = torch.zeros(1, 2, 1, 1), 0
    while not quantizer.restart_dead_codes(z, generator):
        quantizer(z)
        steps += 1
        assert steps < 400
    assert 345 <= steps <= 351


def test_no_more_code_vectors_are_restarted_than_there_are_encodings(generator):
    quantizer = codebook_of(EMAQuantizer, torch.full((5, 2), 9.0))
    quantizer.counts.zero_()
    assert quantizer.restart_dead_codes(grid([[1.0, 2.0], [3.0, 4.0]]), generator) == 2
    assert sorted(quantizer.codebook[:2].tolist()) == [[1, 2], [3, 4]]
    assert quantizer.counts.tolist() == [1, 1, 0, 0, 0]


@pytest.mark.parametrize("kind", [VectorQuantizer, EMAQuantizer])
def test_dead_code_vectors_move_to_encodings_far_from_every_code_vector(kind):
    # With uniform choice one in a hundred would go to the far corner, the others into the crowd.
    crowd = 0.01 * torch.randn(99, 2, generator=torch.Generator().manual_seed(0))
    z = grid(torch.cat([crowd, torch.tensor([[30.0, 40.0]])]))
    for seed in range(20):
        quantizer = codebook_of(kind, [[0.0, 0.0], [-99.0, 0.0]])
        quantizer.counts[1] = 0.0
        assert quantizer.restart_dead_codes(z, torch.Generator().manual_seed(seed)) == 1
        assert quantizer.codebook[1].tolist() == [30, 40]


def test_code_vectors_restart_even_if_every_distance_is_zero(generator):
    # Every distance is 0 then, and there are still enough encodings to choose from.
    quantizer = codebook_of(EMAQuantizer, [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    quantizer.counts.zero_()
    assert quantizer.restart_dead_codes(grid([[1.0, 2.0], [1.0, 2.0], [3.0, 4.0]]), generator) == 3
    assert sorted(quantizer.codebook.tolist()) == [[1, 2], [1, 2], [3, 4]]


@learned
def test_a_vqvae_restarts_code_vectors_on_its_own_encodings(quantizer, cosine, x, generator):
    model = small(quantizer, cosine)
    model.quantizer.counts[5:] = 0.0
    before, weights = state_of(model.encoder), model.quantizer.codebook
    assert model.restart_dead_codes(x, generator) == 22
    assert model.quantizer.codebook is weights  # the optimiser's own parameter, in place
    flat = model.quantizer.project(model.encode(x)).movedim(1, -1).flatten(0, 2)
    assert torch.cdist(model.quantizer.embeddings()[5:], flat).min(1).values.max() < 1e-6
    assert same_state(model.encoder, before)
    used = model.eval()(x).quantized.indices.unique().numel()
    assert used >= 22


def test_restarting_code_vectors_is_reproducible_with_a_seed(x):
    books = []
    for seed in (1, 1, 2):
        model = small("ema")
        model.quantizer.counts.zero_()
        model.restart_dead_codes(x, torch.Generator().manual_seed(seed))
        books.append(model.quantizer.codebook)
    assert torch.equal(books[0], books[1]) and not torch.equal(books[0], books[2])


def test_all_processes_restart_code_vectors_at_the_place_of_the_first(monkeypatch, generator):
    quantizer = codebook_of(EMAQuantizer, torch.full((3, 2), 9.0))
    quantizer.counts.zero_()
    dist = distributed.dist
    monkeypatch.setattr(distributed, "num_ranks", lambda: 2)
    monkeypatch.setattr(dist, "all_gather", lambda parts, x: [p.copy_(x) for p in parts])
    monkeypatch.setattr(dist, "broadcast", lambda x, src: x.copy_(torch.full_like(x, 7.0)))
    quantizer.restart_dead_codes(torch.randn(1, 2, 3, 3, generator=generator), generator)
    assert (quantizer.codebook == 7).all() and (quantizer.sums == 7).all()


# ---------------------------------------------------------------- k-means initialisation


@pytest.mark.parametrize("kind", [VectorQuantizer, EMAQuantizer])
def test_kmeans_init_finds_the_centres_of_clusters(kind, generator):
    spread = torch.randn(40, 2, generator=generator)
    a, b = spread[:25] + torch.tensor([20.0, 0.0]), spread[25:] - torch.tensor([20.0, 0.0])
    quantizer = kind(2, 2)
    quantizer.counts.zero_()
    quantizer.kmeans_init(grid(torch.cat([a, b])), generator)
    book = quantizer.codebook[quantizer.codebook[:, 0].argsort()].detach()
    assert torch.allclose(book, torch.stack([b.mean(0), a.mean(0)]), atol=1e-4)
    assert quantizer.counts.tolist() == [1, 1]
    if kind is EMAQuantizer:
        assert torch.equal(quantizer.sums, quantizer.codebook)


@pytest.mark.parametrize("kind", [VectorQuantizer, EMAQuantizer])
def test_kmeans_init_finds_rare_encodings_among_duplicates(kind):
    # Plain backgrounds: nearly all encodings are equal, and so are most randomly chosen ones.
    rest = torch.tensor([[9.0, 0.0], [0.0, 7.0], [-8.0, -8.0]])
    z = grid(torch.cat([torch.zeros(60, 2), rest]))
    for seed in range(5):
        quantizer = kind(4, 2)
        quantizer.kmeans_init(z, torch.Generator().manual_seed(seed))
        assert torch.cdist(rest, quantizer.codebook).min(1).values.max() < 1e-5
        assert quantizer.eval()(z).commitment_loss < 1e-8


def test_more_rounds_of_lloyds_algorithm_reduce_the_distance(generator):
    z = torch.randn(1, 4, 16, 16, generator=generator)
    errors = []
    for rounds in (0, 1, 10):
        quantizer = EMAQuantizer(20, 4)
        quantizer.kmeans_init(z, torch.Generator().manual_seed(0), rounds)
        errors.append(quantizer.eval()(z).commitment_loss.item())
    assert errors[2] < 0.9 * errors[1] < 0.9 * errors[0]


@learned
def test_after_kmeans_init_nearly_every_code_vector_is_used(quantizer, cosine, x, generator):
    model = small(quantizer, cosine)
    few = model.tokens(x).unique().numel()
    model.kmeans_init(x, generator)
    assert few < 22 and model.tokens(x).unique().numel() >= 25
    assert isinstance(model.quantizer.codebook, nn.Parameter) == (quantizer == "gradient")


def test_kmeans_init_with_fewer_encodings_than_code_vectors_is_an_error(x, generator):
    with pytest.raises(
        ValueError, match="27 code vectors need at least 27 encodings.*16: give more"
    ):
        small().kmeans_init(x[:1], generator)
    model = small()
    model.kmeans_init(x[:2], generator)
    assert model.tokens(x[:2]).unique().numel() > 20


def test_fsq_has_nothing_to_initialise_or_restart(x, generator):
    model = small("fsq")
    before = state_of(model)
    model.kmeans_init(x[:1], generator)
    assert model.restart_dead_codes(x, generator) == 0 and same_state(model, before)
    assert not model.quantizer.state_dict()


# ---------------------------------------------------------------- tokens


@kinds
def test_decoded_tokens_equal_the_reconstruction(quantizer, cosine, x):
    model = small(quantizer, cosine).float().eval()
    x = x.float()
    output, tokens = model(x), model.tokens(x)
    assert torch.equal(tokens, output.quantized.indices.flatten(1))
    assert 0 <= tokens.min() and tokens.max() <= 26 and tokens.dtype == torch.int64
    assert torch.allclose(model.decode_tokens(tokens), output.reconstruction, atol=1e-5)
    other = (tokens + 1) % 27
    assert not torch.allclose(model.decode_tokens(other), output.reconstruction, atol=1e-3)


@kinds
def test_tokens_are_the_same_in_training_and_evaluation_mode(quantizer, cosine, x):
    model = small(quantizer, cosine)
    assert torch.equal(model.train().tokens(x), model.eval().tokens(x))


@kinds
def test_a_state_dict_restores_the_model(quantizer, cosine, x):
    model = small(quantizer, cosine)
    for _ in range(3):
        model(x)
    torch.manual_seed(5)
    other = VQVAE.from_config(model.config).double()
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(other.eval()(x).reconstruction, model.eval()(x).reconstruction)


@kinds
def test_models_quantizers_and_losses_do_not_change_their_arguments(
    quantizer, cosine, x, generator
):
    model, x = small(quantizer, cosine).float(), x.float()
    z, tokens = model.encode(x).detach(), model.tokens(x)
    output = model(x)
    before = [t.clone() for t in (x, z, tokens, output.reconstruction, output.quantized.z_q)]
    model.quantizer(z)
    model.decode_tokens(tokens)
    model.kmeans_init(x, generator)
    model.restart_dead_codes(x, generator)
    if quantizer != "fsq":
        model.quantizer.kmeans_init(z, generator)
        model.quantizer.counts.zero_()
        model.quantizer.restart_dead_codes(z, generator)
    vqvae_loss(x, output)
    after = (x, z, tokens, output.reconstruction, output.quantized.z_q)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


# ---------------------------------------------------------------- FSQ


@pytest.mark.parametrize("levels, dims", [(3, 2), (4, 2), (5, 3), (8, 2), (7, 1), (6, 1)])
def test_every_token_of_fsq_can_be_reached(levels, dims):
    quantizer = FSQ(levels**dims, dims)
    line = torch.linspace(-4, 4, 81)
    z = torch.cartesian_prod(*[line] * dims).view(-1, dims)
    output = quantizer(grid(z))
    assert output.indices.unique().tolist() == list(range(levels**dims))
    far = quantizer(grid(torch.tensor([[-1e4] * dims, [1e4] * dims])))
    assert far.indices.flatten().tolist() == [0, levels**dims - 1] and far.z_q.isfinite().all()


@pytest.mark.parametrize("levels, dims", [(3, 2), (4, 3), (5, 2), (8, 3)])
def test_levels_of_fsq_are_the_digits_of_the_token(levels, dims):
    quantizer = FSQ(levels**dims, dims)
    rows, numbers = quantizer.embeddings(), torch.arange(levels**dims)
    assert rows.shape == (levels**dims, dims) and len(rows.unique(dim=0)) == levels**dims
    assert rows.min() == -1 and rows.max() <= 1
    digits = (rows * (levels // 2) + levels // 2).round().long()
    assert digits.min() == 0 and digits.max() == levels - 1
    assert torch.equal(sum(digits[:, i] * levels**i for i in range(dims)), numbers)
    assert torch.equal(quantizer.nearest(grid(rows)).flatten(), numbers)
    assert torch.equal(quantizer.lookup(numbers.view(1, 1, -1)), grid(rows))


@pytest.mark.parametrize("levels", [3, 4, 5, 8])
def test_fsq_rounds_to_the_nearest_level_and_is_monotonic(levels):
    quantizer = FSQ(levels, 1)
    z = torch.linspace(-6, 6, 400, dtype=torch.float64).view(1, 1, 1, -1)
    squashed, output = quantizer.project(z), quantizer(z)
    half = 0.5 / (levels // 2)
    assert ((output.z_q - squashed).abs() <= half * 1.01).all()
    assert (squashed.diff() > 0).all() and (output.indices.diff() >= 0).all()
    # An encoding of 0 is rounded to the middle level.
    assert quantizer(torch.zeros(1, 1, 1, 1)).indices.item() == levels // 2


@pytest.mark.parametrize("size, dims", [(1000, 4), (8, 3), (2, 1), (28, 3), (4, 2)])
def test_codebook_sizes_that_fsq_does_not_have_are_an_error_that_lists_some(size, dims):
    fits = f"{3**dims}, {4**dims}"
    with pytest.raises(ValueError, match=rf"FSQ with {dims} numbers has {fits}.*not {size}"):
        FSQ(size, dims)


# ---------------------------------------------------------------- autoencoder and VAE


def test_an_autoencoder_is_encoder_and_decoder(x):
    model = Autoencoder(VQVAEConfig(**SIZES)).double()
    reconstruction = model(x)
    assert torch.equal(reconstruction, model.decoder(model.encoder(x)))
    loss = autoencoder_loss(x, reconstruction)
    assert torch.allclose(loss.reconstruction, (x - reconstruction).square().mean())
    assert loss.total == loss.reconstruction


class Passing(nn.Module):
    """A decoder that returns z, so that a test can see it."""

    def forward(self, z):
        return z


def vae_that_shows_z(**sizes) -> VAE:
    torch.manual_seed(0)
    model = VAE(VQVAEConfig(**{**SIZES, **sizes})).double()
    model.decoder = Passing()
    return model


@pytest.mark.parametrize("sigma", [0.1, 1.0])
def test_the_kl_term_of_the_vae_is_that_of_two_gaussians(sigma, x):
    torch.manual_seed(0)
    model = VAE(VQVAEConfig(**SIZES)).double()
    output = model(x, torch.Generator().manual_seed(0))
    loss = vae_loss(x, output, sigma)
    q = torch.distributions.Normal(output.mean, (output.log_variance / 2).exp())
    p = torch.distributions.Normal(torch.zeros_like(output.mean), 1.0)
    kl = torch.distributions.kl_divergence(q, p).flatten(1).sum(1).mean()
    assert torch.allclose(loss.kl * 3 * 16 * 16, kl, atol=1e-10)
    assert torch.allclose(loss.reconstruction, (x - output.reconstruction).square().mean())
    # The negative ELBO itself, with a Gaussian of width σ over pixels, up to its constant.
    likelihood = torch.distributions.Normal(output.reconstruction, sigma).log_prob(x)
    bound = kl - likelihood.flatten(1).sum(1).mean()
    constant = torch.distributions.Normal(0.0, sigma).log_prob(torch.zeros(())).double() * 768
    assert torch.allclose(loss.total * 768 / (2 * sigma**2), bound + constant, rtol=1e-6)


def test_the_kl_term_of_a_standard_normal_encoder_is_zero(x):
    zero = torch.zeros(4, 3, 4, 4, dtype=torch.float64)
    assert vae_loss(x, VAEOutput(x, zero, zero)).total == 0
    assert vae_loss(x, VAEOutput(x, zero + 1, zero)).kl * 768 == pytest.approx(48 / 2)
    assert vae_loss(x, VAEOutput(x, zero, zero - 1)).kl > 0


def test_z_is_the_mean_plus_sigma_times_noise(x):
    model = vae_that_shows_z()
    z, mean, log_variance = model(x, torch.Generator().manual_seed(3))
    noise = torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    assert torch.allclose(z, mean + log_variance.exp().sqrt() * noise, atol=1e-12)
    many = torch.stack([model(x, torch.Generator().manual_seed(s))[0] for s in range(300)])
    deviation = (log_variance / 2).exp()
    assert ((many.mean(0) - mean) / deviation).abs().max() < 5 / 300**0.5
    assert (many.std(0) / deviation - 1).abs().max() < 0.25


def test_the_reparameterisation_has_gradients_for_mean_and_variance(x):
    model = vae_that_shows_z()
    z, mean, log_variance = model(x, torch.Generator().manual_seed(0))
    to_mean, to_log = torch.autograd.grad(z.sum(), (mean, log_variance))
    assert torch.equal(to_mean, torch.ones_like(mean))
    assert torch.allclose(to_log, (z - mean) / 2, atol=1e-12)


def test_a_vae_draws_random_numbers_from_its_generator_only(x):
    torch.manual_seed(0)
    model = VAE(VQVAEConfig(**SIZES)).double()
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    a, b, c = (model(x, torch.Generator().manual_seed(s)).reconstruction for s in (7, 7, 8))
    assert torch.equal(a, b) and not torch.allclose(a, c, atol=1e-6)
    a, b, c = (model.sample(5, torch.Generator().manual_seed(s)) for s in (7, 7, 8))
    assert a.shape == (5, 3, 16, 16)
    assert torch.equal(a, b) and not torch.allclose(a, c, atol=1e-6)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_vae_samples_from_the_standard_normal(unchecked):  # since z is no picture
    model = vae_that_shows_z()
    model.decoder.register_parameter("kind", nn.Parameter(torch.zeros(1, dtype=torch.float64)))
    z = model.sample(200, torch.Generator().manual_seed(0))
    assert z.shape == (200, 3, 4, 4) and z.dtype == torch.float64
    assert abs(z.mean().item()) < 0.05 and abs(z.std().item() - 1) < 0.05


# ---------------------------------------------------------------- eight pictures


@pytest.fixture(scope="module")
def eight():
    """Eight captioned shapes; their variance is 0.48, the loss of predicting the mean."""
    pictures = Shapes(16).sample(8, generator=torch.Generator().manual_seed(0)).pictures
    assert pictures.var() > 0.4
    return pictures


def overfitted(model, compute_loss, steps=120):
    """The last loss, after some steps of Adam on the same pictures."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        loss = compute_loss(model)
        optimiser.zero_grad()
        loss.total.backward()
        optimiser.step()
    return loss


LEARNING = {"resolution": 16, "channels": (16, 32), "blocks": 1}


def test_an_autoencoder_learns_eight_pictures(eight):
    torch.manual_seed(0)
    model = Autoencoder(VQVAEConfig(**LEARNING, code_dim=8))
    loss = overfitted(model, lambda model: autoencoder_loss(eight, model(eight)))
    assert loss.reconstruction.item() < 0.03


def test_a_vae_learns_eight_pictures(eight, generator):
    torch.manual_seed(0)
    model = VAE(VQVAEConfig(**LEARNING, code_dim=8))
    loss = overfitted(model, lambda model: vae_loss(eight, model(eight, generator)))
    assert loss.reconstruction.item() < 0.06
    assert loss.kl.item() > 0.01  # z carries information about each picture


@kinds
def test_a_vqvae_learns_eight_pictures(quantizer, cosine, eight, generator):
    torch.manual_seed(0)
    sizes = (
        {"codebook_size": 625, "code_dim": 4}
        if quantizer == "fsq"
        else {"codebook_size": 64, "code_dim": 8}
    )
    model = VQVAE.from_config(VQVAEConfig(**LEARNING, **sizes, quantizer=quantizer, cosine=cosine))
    model.kmeans_init(eight, generator)
    overfitted(model, lambda model: vqvae_loss(eight, model(eight)))
    model.eval()
    with torch.no_grad():
        again = model.decode_tokens(model.tokens(eight))
    assert F.mse_loss(again, eight).item() < 0.05
    assert model.tokens(eight).unique().numel() > 8


# ---------------------------------------------------------------- bad input

PICTURES = [
    torch.zeros(1, 3, 8, 8),
    torch.zeros(1, 3, 16, 8),
    torch.zeros(1, 1, 16, 16),
    torch.zeros(1, 4, 16, 16),
    torch.zeros(3, 16, 16),
    torch.zeros(1, 3, 16, 16, dtype=torch.uint8),
    torch.zeros(1, 3, 16, 16, dtype=torch.int64),
]


@pytest.mark.parametrize("pictures", PICTURES, ids=lambda p: f"{p.dtype}{tuple(p.shape)}")
def test_every_model_checks_size_and_type_of_its_pictures(unchecked, pictures, generator):
    message = r"float tensors of shape \(B, 3, 16, 16\) with values in \[−1, 1\]; this is torch\."
    model = small().float()
    for use in (
        model,
        model.tokens,
        model.encode,
        lambda p: model.kmeans_init(p, generator),
        lambda p: model.restart_dead_codes(p, generator),
        Autoencoder(VQVAEConfig(**SIZES)),
        lambda p: VAE(VQVAEConfig(**SIZES))(p, generator),
    ):
        with pytest.raises(ValueError, match=message):
            use(pictures)


@kinds
def test_decoding_tokens_of_another_number_or_range_is_an_error(unchecked, quantizer, cosine):
    model = small(quantizer, cosine)
    for shape in ((2, 15), (2, 17), (2, 4, 4), (16,)):
        with pytest.raises(ValueError, match=r"A picture has 4² tokens: \(B, 16\), not"):
            model.decode_tokens(torch.zeros(shape, dtype=torch.int64))
    for wrong in (-1, 27):
        indices = torch.zeros(2, 16, dtype=torch.int64)
        indices[1, 3] = wrong
        with pytest.raises(ValueError, match=f"from 0 to 26; these are .*{wrong}"):
            model.decode_tokens(indices)


def test_an_empty_batch_of_tokens_decodes_to_an_empty_batch_of_pictures():
    model = small().float()
    assert model.decode_tokens(torch.zeros(0, 16, dtype=torch.int64)).shape == (0, 3, 16, 16)


def test_a_residual_conv_block_starts_as_the_identity_and_has_no_normalisation(generator):
    block, x = ResidualConvBlock(8), torch.randn(2, 8, 4, 4, generator=generator)
    with torch.no_grad():
        block.conv2.bias.zero_()
    assert torch.equal(block(x), x)
    torch.nn.init.normal_(block.conv2.weight)
    assert not torch.allclose(block(x), x)
    assert not any("norm" in name.lower() for name in map(repr, block.modules()))


def test_without_quantization_the_decoder_receives_z_and_the_codebook_does_not_change(generator):
    torch.manual_seed(0)
    model = VQVAE.from_config(
        VQVAEConfig(resolution=16, channels=(8, 8), codebook_size=8, code_dim=4)
    ).train()
    x = 2 * torch.rand(2, 3, 16, 16, generator=generator) - 1
    before = model.quantizer.codebook.clone()
    output = model(x, quantize=False)
    z = model.quantizer.project(model.encode(x))
    assert torch.equal(output.reconstruction, model.decoder(z))
    assert torch.equal(model.quantizer.codebook, before)
    loss = vqvae_loss(x, output)
    assert (
        loss.codebook_loss == 0 and loss.commitment_loss == 0 and loss.total == loss.reconstruction
    )


@pytest.mark.parametrize("wrong", [1.5, -1.5, float("nan")])
def test_every_model_checks_the_range_of_its_pictures(x, wrong, generator):
    x = x.float()
    x[1, 2, 3, 4] = wrong
    model = small().float()
    for use in (
        model,
        model.tokens,
        model.encode,
        Autoencoder(VQVAEConfig(**SIZES)),
        lambda p: VAE(VQVAEConfig(**SIZES))(p, generator),
    ):
        with pytest.raises(ValueError, match="Pixels go from −1 to 1"):
            use(x)


def test_a_vqvae_is_composed_of_any_encoder_quantizer_and_decoder(x):
    config = VQVAEConfig(**SIZES)
    encoder, decoder = nn.Conv2d(3, 3, 4, stride=4), nn.ConvTranspose2d(3, 3, 4, stride=4)
    quantizer = VectorQuantizer(27, 3)
    model = VQVAE(encoder, quantizer, decoder, config)
    assert isinstance(model, ImageTokenizer)
    assert (model.encoder, model.quantizer, model.decoder) == (encoder, quantizer, decoder)
    assert {name.split(".")[0] for name in model.state_dict()} == {
        "encoder",
        "decoder",
        "quantizer",
    }
    output = model(x.float())
    assert torch.equal(output.reconstruction, decoder(output.quantized.z_q))
    assert torch.equal(output.quantized.indices.flatten(1), model.tokens(x.float()))


def test_quantizers_are_made_by_name():
    kinds = [type(make_quantizer(name, 27, 3)) for name in QUANTIZERS]
    assert kinds == [EMAQuantizer, VectorQuantizer, FSQ]
    assert make_quantizer("ema", 27, 3, cosine=True).cosine
    with pytest.raises(ValueError, match=r"one of \('ema', 'gradient', 'fsq'\), not 'hard'"):
        make_quantizer("hard", 27, 3)
