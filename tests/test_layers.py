"""Layers: their formulas, their receptive fields, and arguments that stay unchanged; the guards."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from t2ilearn.models.layers import (
    RANGE_TOLERANCE,
    Attention,
    KVCache,
    QuickGELU,
    ResidualBlock,
    SpatialAttention,
    TransformerBlock,
    at_least_float32,
    check_pictures,
)

BATCH, TOKENS, WIDTH, HEADS = 2, 5, 12, 3


@pytest.fixture
def x(generator):
    """A few tokens, in float64 so that tolerances can be tight."""
    return torch.randn(BATCH, TOKENS, WIDTH, generator=generator, dtype=torch.float64)


def made(kind, *sizes):
    """A layer with repeatable weights, biases that are not zero, in float64."""
    torch.manual_seed(0)
    layer = kind(*sizes).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(0.5 * torch.randn_like(parameter))
    return layer


def attention_by_hand(layer, x, allowed):
    """Eq. 1 of Vaswani et al., one head and one query at a time."""
    q, k, v = layer.qkv(x).chunk(3, dim=-1)
    size, heads = WIDTH // HEADS, []
    for h in range(HEADS):
        part = slice(h * size, (h + 1) * size)
        scores = q[..., part] @ k[..., part].mT / math.sqrt(size)
        scores = scores.masked_fill(~allowed, -math.inf)
        heads.append(scores.softmax(-1) @ v[..., part])
    return layer.out(torch.cat(heads, dim=-1))


def depends_on(function, x):
    """Which inputs each output depends on: (T, T) booleans, from gradients."""
    x = x.clone().requires_grad_()
    y = function(x)
    rows = []
    for i in range(y.shape[1]):
        (gradient,) = torch.autograd.grad(y[:, i].sum(), x, retain_graph=True)
        rows.append((gradient != 0).any(-1).any(0))
    return torch.stack(rows)


# ---------------------------------------------------------------- residual block


@pytest.mark.parametrize("sizes", [(8, 8), (8, 16), (24, 8)])
def test_a_residual_block_is_the_input_plus_two_convolutions(sizes, generator):
    block = made(ResidualBlock, *sizes)
    x = torch.randn(2, sizes[0], 5, 6, generator=generator, dtype=torch.float64)
    y = F.group_norm(x, 8, block.norm1.weight, block.norm1.bias)
    y = F.conv2d(F.silu(y), block.conv1.weight, block.conv1.bias, padding=1)
    y = F.group_norm(y, 8, block.norm2.weight, block.norm2.bias)
    y = F.conv2d(F.silu(y), block.conv2.weight, block.conv2.bias, padding=1)
    before = x if sizes[0] == sizes[1] else F.conv2d(x, block.skip.weight, block.skip.bias)
    assert torch.allclose(block(x), before + y, atol=1e-12)


def test_a_residual_block_with_a_last_layer_of_zeros_is_the_identity(generator):
    block = made(ResidualBlock, 8, 8)
    nn.init.zeros_(block.conv2.weight)
    nn.init.zeros_(block.conv2.bias)
    x = torch.randn(2, 8, 4, 4, generator=generator, dtype=torch.float64)
    assert torch.equal(block(x), x)
    assert not list(block.skip.parameters())


@pytest.mark.parametrize("sizes", [(12, 8), (8, 12), (0, 8), (8, -8), (3, 16)])
def test_channels_that_the_groups_do_not_divide_are_an_error(sizes):
    with pytest.raises(ValueError, match="multiples of 8, not"):
        ResidualBlock(*sizes)


def test_a_residual_block_with_other_groups_and_another_epsilon(generator):
    block = made(ResidualBlock, 6, 3, 3, 0.5)
    x = torch.randn(2, 6, 5, 6, generator=generator, dtype=torch.float64)
    y = F.group_norm(x, 3, block.norm1.weight, block.norm1.bias, 0.5)
    y = F.conv2d(F.silu(y), block.conv1.weight, block.conv1.bias, padding=1)
    y = F.group_norm(y, 3, block.norm2.weight, block.norm2.bias, 0.5)
    y = F.conv2d(F.silu(y), block.conv2.weight, block.conv2.bias, padding=1)
    assert torch.allclose(block(x), block.skip(x) + y, atol=1e-12)
    with pytest.raises(ValueError, match="multiples of 32, not 48"):
        ResidualBlock(32, 48, groups=32)


# ---------------------------------------------------------------- attention over places


def test_spatial_attention_equals_its_formula_at_every_place(generator):
    layer = made(SpatialAttention, 6, 3, 0.5)
    x = torch.randn(2, 6, 2, 3, generator=generator, dtype=torch.float64)
    y = F.group_norm(x, 3, layer.norm.weight, layer.norm.bias, 0.5)
    q, k, v = layer.q(y), layer.k(y), layer.v(y)
    mean = torch.zeros_like(x)
    for i, j in [(i, j) for i in range(2) for j in range(3)]:
        scores = (q[:, :, i, j, None, None] * k).sum(1, keepdim=True) / math.sqrt(6)
        weights = scores.flatten(1).softmax(1).view(2, 1, 2, 3)
        mean[:, :, i, j] = (weights * v).sum((2, 3))
    assert torch.allclose(layer(x), x + layer.out(mean), atol=1e-12)


def test_spatial_attention_is_equivariant_to_flips_and_transposition(generator):
    layer = made(SpatialAttention, 8)
    x = torch.randn(1, 8, 3, 4, generator=generator, dtype=torch.float64)
    assert torch.allclose(layer(x.mT), layer(x).mT, atol=1e-12)
    assert torch.allclose(layer(x.flip(3)), layer(x).flip(3), atol=1e-12)


def test_spatial_attention_has_a_gradient_for_every_parameter_but_the_bias_of_the_keys(generator):
    # It adds the same number to all scores of a place, and the softmax does not change.
    layer = made(SpatialAttention, 8)
    x = torch.randn(2, 8, 3, 3, generator=generator, dtype=torch.float64)
    layer(x).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert (parameter.grad.abs().max() > 1e-3) == (name != "k.bias"), name


def test_channels_that_the_groups_of_spatial_attention_do_not_divide_are_an_error():
    for sizes, said in [((12,), "multiples of 8, not 12"), ((48, 32), "multiples of 32, not 48")]:
        with pytest.raises(ValueError, match=said):
            SpatialAttention(*sizes)


# ---------------------------------------------------------------- QuickGELU


def test_quick_gelu_equals_its_formula_and_approximates_the_gelu():
    x = torch.linspace(-6, 6, 241, dtype=torch.float64)
    y = QuickGELU()(x)
    assert torch.allclose(y, x / (1 + torch.exp(-1.702 * x)), atol=1e-12)
    assert (y - F.gelu(x)).abs().max() < 0.021
    # Not SiLU, which is the same with 1 in the place of 1.702.
    assert (y - F.silu(x)).abs().max() > 0.1


# ---------------------------------------------------------------- KV cache


def test_a_cache_returns_all_keys_and_values_in_order(generator, device):
    keys, values = torch.randn(2, 2, 3, 6, 4, generator=generator).to(device)
    cache = KVCache(2, 3, 6, 4, like=keys)
    for start, end in ((0, 3), (3, 4), (4, 6)):
        k, v = cache.extend(keys[:, :, start:end], values[:, :, start:end])
        assert torch.equal(k, keys[:, :, :end]) and torch.equal(v, values[:, :, :end])
        assert cache.length == end


def test_a_full_cache_is_an_error_and_stays_unchanged():
    cache = KVCache(1, 1, 3, 2, like=torch.zeros(1))
    cache.extend(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2))
    with pytest.raises(ValueError, match="holds 3 tokens; 4 do not fit"):
        cache.extend(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2))
    assert cache.length == 2
    keys, _ = cache.extend(torch.full((1, 1, 1, 2), 2.0), torch.zeros(1, 1, 1, 2))
    assert keys[0, 0, :, 0].tolist() == [1, 1, 2]


@pytest.mark.parametrize("shape", [(1, 3, 1, 4), (2, 1, 1, 4), (2, 3, 1, 5), (6, 3, 1, 4)])
def test_keys_of_another_batch_number_of_heads_or_dimension_are_an_error_for_a_cache(shape):
    # A batch of 1 would be broadcast without an error: one picture's cache for all.
    cache = KVCache(2, 3, 6, 4, like=torch.zeros(1))
    with pytest.raises(ValueError, match=r"made for keys like \(2, 3, 6, 4\), not"):
        cache.extend(torch.zeros(shape), torch.zeros(shape))
    assert cache.length == 0


def test_a_cache_takes_the_precision_of_its_first_keys():
    cache = KVCache(1, 1, 2, 2, like=torch.zeros(1))
    half = torch.ones(1, 1, 1, 2, dtype=torch.bfloat16)
    for _ in range(2):
        keys, values = cache.extend(half, half)
        assert keys.dtype == values.dtype == torch.bfloat16


def test_a_cache_copies_keys_and_values():
    keys, values = torch.ones(1, 1, 1, 2), torch.ones(1, 1, 1, 2)
    cache = KVCache(1, 1, 2, 2, like=nn.Parameter(torch.zeros(3)))
    assert not cache.keys.requires_grad
    cache.extend(keys, values)
    keys.zero_()
    values.zero_()
    k, v = cache.extend(keys, values)
    assert k[0, 0, 0].tolist() == v[0, 0, 0].tolist() == [1, 1]


# ---------------------------------------------------------------- attention


def test_attention_equals_equation_1_of_vaswani_et_al(x):
    layer = made(Attention, WIDTH, HEADS)
    everything = torch.ones(TOKENS, TOKENS, dtype=torch.bool)
    assert torch.allclose(layer(x), attention_by_hand(layer, x, everything), atol=1e-12)


def test_attention_without_a_mask_is_equivariant_to_permutations(x):
    layer = made(Attention, WIDTH, HEADS)
    order = torch.tensor([3, 1, 4, 0, 2])
    assert torch.allclose(layer(x)[:, order], layer(x[:, order]), atol=1e-12)


def test_true_in_a_mask_is_where_attention_is_allowed(x, generator):
    layer = made(Attention, WIDTH, HEADS)
    mask = torch.rand(TOKENS, TOKENS, generator=generator) < 0.5
    mask.fill_diagonal_(True)
    assert torch.allclose(layer(x, mask), attention_by_hand(layer, x, mask), atol=1e-12)
    assert torch.equal(depends_on(lambda x: layer(x, mask), x), mask)


def test_a_mask_broadcasts_over_batch_heads_and_queries(x):
    layer = made(Attention, WIDTH, HEADS)
    real = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
    y = layer(x, real[:, None, None])
    assert torch.allclose(y[:1, :3], layer(x[:1, :3]), atol=1e-12)
    assert torch.allclose(y[1:], layer(x[1:]), atol=1e-12)


def test_a_token_of_causal_attention_depends_on_itself_and_previous_tokens_only(x):
    layer = made(Attention, WIDTH, HEADS)
    backwards = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
    y = layer(x, is_causal=True)
    assert torch.allclose(y, attention_by_hand(layer, x, backwards), atol=1e-12)
    assert torch.allclose(y, layer(x, backwards), atol=1e-12)
    assert torch.equal(depends_on(lambda x: layer(x, is_causal=True), x), backwards)


@pytest.mark.parametrize("steps", [(1, 1, 1, 1, 1), (3, 2), (2, 1, 2), (5,)])
def test_cached_causal_attention_equals_causal_attention(x, steps, device):
    layer, x = made(Attention, WIDTH, HEADS).to(device), x.to(device)
    cache, parts = KVCache(BATCH, HEADS, TOKENS, WIDTH // HEADS, like=x), []
    with torch.no_grad():
        for part in x.split(steps, dim=1):
            parts.append(layer(part, cache=cache, is_causal=True))
        whole = layer(x, is_causal=True)
    assert torch.allclose(torch.cat(parts, dim=1), whole, atol=1e-12)


def test_cached_attention_without_a_mask_attends_to_all_new_tokens_too(x):
    layer = made(Attention, WIDTH, HEADS)
    cache = KVCache(BATCH, HEADS, TOKENS, WIDTH // HEADS, like=x)
    with torch.no_grad():
        layer(x[:, :2], cache=cache)
        late = layer(x[:, 2:], cache=cache)
        assert torch.allclose(late, layer(x)[:, 2:], atol=1e-12)


def test_a_mask_with_a_cache_covers_cached_and_new_tokens(x, generator):
    layer = made(Attention, WIDTH, HEADS)
    mask = (torch.rand(TOKENS, TOKENS, generator=generator) < 0.5).tril()
    mask.fill_diagonal_(True)
    cache = KVCache(BATCH, HEADS, TOKENS, WIDTH // HEADS, like=x)
    with torch.no_grad():
        layer(x[:, :3], mask[:3, :3], cache)
        late = layer(x[:, 3:], mask[3:], cache)
        assert torch.allclose(late, layer(x, mask)[:, 3:], atol=1e-12)


def test_attention_caches_half_precision_under_autocast(x):
    layer, x = made(Attention, WIDTH, HEADS).float(), x.float()
    cache = KVCache(BATCH, HEADS, TOKENS, WIDTH // HEADS, like=x)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        parts = [layer(part, cache=cache, is_causal=True) for part in x.split(1, dim=1)]
        whole = layer(x, is_causal=True)
    assert cache.keys.dtype == torch.bfloat16
    assert torch.allclose(torch.cat(parts, dim=1), whole, atol=0.1)


def test_a_mask_together_with_is_causal_is_an_error(x):
    with pytest.raises(ValueError, match="not both"):
        made(Attention, WIDTH, HEADS)(
            x, torch.ones(TOKENS, TOKENS, dtype=torch.bool), is_causal=True
        )


@pytest.mark.parametrize("sizes", [(12, 5), (12, 0), (12, -3), (3, 4)])
def test_a_dimension_that_num_heads_does_not_divide_is_an_error(sizes):
    with pytest.raises(ValueError, match=r"dim \(\d+\) must be a multiple of num_heads"):
        Attention(*sizes)
    with pytest.raises(ValueError, match="multiple of num_heads"):
        TransformerBlock(*sizes)


# ---------------------------------------------------------------- Transformer block


def test_a_transformer_block_is_two_residual_branches_with_the_normalisation_first(x):
    block = made(TransformerBlock, WIDTH, HEADS)
    middle = x + block.attention(block.norm1(x))
    first, _, second = block.mlp
    assert first.out_features == 4 * WIDTH
    hidden = F.gelu(first(block.norm2(middle)), approximate="tanh")
    assert torch.allclose(block(x), middle + second(hidden), atol=1e-12)


def test_a_transformer_block_with_another_activation(x):
    block = made(TransformerBlock, WIDTH, HEADS)
    quick = made(TransformerBlock, WIDTH, HEADS, QuickGELU())
    assert quick.state_dict().keys() == block.state_dict().keys()
    quick.load_state_dict(block.state_dict())
    middle = x + quick.attention(quick.norm1(x))
    first, _, second = quick.mlp
    hidden = first(quick.norm2(middle))
    expected = middle + second(hidden * torch.sigmoid(1.702 * hidden))
    assert torch.allclose(quick(x), expected, atol=1e-12)
    assert not torch.allclose(quick(x), block(x), atol=1e-3)


def test_a_stack_of_causal_blocks_depends_on_no_later_token(x):
    torch.manual_seed(0)
    blocks = [made(TransformerBlock, WIDTH, HEADS) for _ in range(3)]

    def stack(x):
        for block in blocks:
            x = block(x, is_causal=True)
        return x

    backwards = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
    assert torch.equal(depends_on(stack, x), backwards)


def test_a_stack_of_blocks_with_caches_equals_the_stack_without(x):
    blocks = [made(TransformerBlock, WIDTH, HEADS) for _ in range(2)]
    caches = [KVCache(BATCH, HEADS, TOKENS, WIDTH // HEADS, like=x) for _ in blocks]
    parts, whole = [], x
    with torch.no_grad():
        for part in x.split((2, 1, 1, 1), dim=1):
            for block, cache in zip(blocks, caches, strict=True):
                part = block(part, cache=cache, is_causal=True)
            parts.append(part)
        for block in blocks:
            whole = block(whole, is_causal=True)
    assert torch.allclose(torch.cat(parts, dim=1), whole, atol=1e-12)


def test_a_block_passes_its_mask_to_attention(x, generator):
    block = made(TransformerBlock, WIDTH, HEADS)
    mask = torch.rand(TOKENS, TOKENS, generator=generator) < 0.5
    mask.fill_diagonal_(True)
    assert torch.equal(depends_on(lambda x: block(x, mask), x), mask)


# ---------------------------------------------------------------- arguments and gradients


def test_no_layer_changes_its_arguments(x, generator):
    picture = torch.randn(2, 8, 4, 4, generator=generator, dtype=torch.float64)
    mask = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
    cache = KVCache(BATCH, HEADS, TOKENS, WIDTH // HEADS, like=x)
    before = [t.clone() for t in (x, picture, mask)]
    with torch.no_grad():
        made(ResidualBlock, 8, 16)(picture)
        made(SpatialAttention, 8)(picture)
        made(Attention, WIDTH, HEADS)(x, mask)
        made(TransformerBlock, WIDTH, HEADS)(x, mask)
        made(TransformerBlock, WIDTH, HEADS)(x, cache=cache, is_causal=True)
        QuickGELU()(x)
    assert all(torch.equal(a, b) for a, b in zip(before, (x, picture, mask), strict=True))


@pytest.mark.parametrize(
    "make, shape",
    [
        (lambda: ResidualBlock(8, 16), (2, 8, 4, 4)),
        (lambda: Attention(WIDTH, HEADS), (2, 5, WIDTH)),
        (lambda: TransformerBlock(WIDTH, HEADS), (2, 5, WIDTH)),
    ],
)
def test_every_parameter_gets_a_gradient(make, shape, generator):
    layer = make()
    layer(torch.randn(shape, generator=generator)).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


# ---------------------------------------------------------------- the two guards


def test_the_float32_guard_widens_half_precision_and_keeps_float64():
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert at_least_float32(torch.ones(2, dtype=dtype)).dtype == torch.float32
    x = torch.ones(2, dtype=torch.float64)
    assert at_least_float32(x) is x


def picture(*sizes, value=0.0, dtype=torch.float32):
    return torch.full(sizes, value, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_pictures_of_any_floating_type_are_accepted(dtype):
    for value in (-1.0, 0.0, 1.0):
        check_pictures(picture(2, 3, 8, 8, value=value, dtype=dtype), 8)
    check_pictures(picture(2, 3, 8, 16, dtype=dtype), multiple_of=4)


def test_pixels_may_leave_the_range_by_a_small_tolerance():
    assert RANGE_TOLERANCE == 1e-3
    for sign in (-1, 1):
        check_pictures(picture(1, 3, 4, 4, value=sign * 1.0009, dtype=torch.float64), 4)
        with pytest.raises(ValueError, match="Pixels go from −1 to 1"):
            check_pictures(picture(1, 3, 4, 4, value=sign * 1.0011, dtype=torch.float64), 4)


@pytest.mark.parametrize("wrong", [1.5, -1.5, math.nan, math.inf, -math.inf])
def test_one_pixel_out_of_range_is_an_error(wrong):
    x = picture(2, 3, 8, 8)
    x[1, 2, 7, 3] = wrong
    with pytest.raises(ValueError, match=r"Pixels go from −1 to 1; these go from .*x / 127\.5 − 1"):
        check_pictures(x, 8)


@pytest.mark.parametrize(
    "x, options, message",
    [
        (picture(3, 8, 8), {}, r"\(B, 3, H, W\) .*this is torch\.float32 of shape \(3, 8, 8\)"),
        (picture(2, 1, 8, 8), {}, r"\(B, 3, H, W\)"),
        (picture(2, 3, 8, 8, dtype=torch.uint8), {}, "this is torch.uint8"),
        (picture(2, 3, 8, 4), {"resolution": 8}, r"\(B, 3, 8, 8\)"),
        (picture(2, 3, 8, 6), {"multiple_of": 4}, "multiples of 4, not 8 × 6"),
        (picture(2, 3, 0, 8), {"multiple_of": 4}, "no pixel"),
    ],
)
def test_tensors_that_are_no_pictures_are_an_error(unchecked, x, options, message):
    with pytest.raises(ValueError, match=message):
        check_pictures(x, **options)


def test_an_empty_batch_of_pictures_is_accepted_and_no_picture_is_changed():
    check_pictures(picture(0, 3, 8, 8), 8)
    check_pictures(picture(0, 3, 8, 8), multiple_of=4)
    x = torch.rand(2, 3, 8, 8, requires_grad=True)
    before = x.detach().clone()
    assert check_pictures(x, 8) is None and torch.equal(x, before)
