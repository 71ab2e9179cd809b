"""Metrics equal their closed forms, keep their invariances, and refuse what has no answer."""

import math

import pytest
import torch

from t2ilearn.judging.metrics import (
    bootstrap,
    codebook_usage,
    frechet_distance,
    inception_features,
    kernel_distance,
    perplexity,
    precision_recall,
    psnr,
)


def normal(n, d, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator, dtype=torch.float64)


def whitened(n, d, seed=0):
    """Points whose sample mean is exactly 0, and whose sample covariance is the identity."""
    x = normal(n, d, seed)
    x = x - x.mean(0)
    half = torch.linalg.cholesky(torch.atleast_2d(x.T.cov()))
    return torch.linalg.solve_triangular(half, x.T, upper=False).T


def rotation(d, seed=9):
    return torch.linalg.qr(normal(d, d, seed))[0]


SETS = {"frechet": frechet_distance, "kernel": kernel_distance, "both": precision_recall}
of_sets = pytest.mark.parametrize("metric", SETS.values(), ids=SETS.keys())


# ---------------------------------------------------------------- Fréchet distance


def test_gaussians_of_equal_axes_are_apart_by_their_means_and_widths():
    mean, widths = torch.tensor([1.0, -2.0, 0.5]).double(), torch.tensor([0.5, 3.0, 1.0]).double()
    real, fake = whitened(40, 3, 1), whitened(25, 3, 2) * widths + mean
    expected = mean.square().sum() + (widths - 1).square().sum()
    assert frechet_distance(real, fake) == pytest.approx(expected.item(), abs=1e-10)
    turn = rotation(3)
    assert frechet_distance(real @ turn, fake @ turn) == pytest.approx(expected.item(), abs=1e-10)


def test_one_feature_is_enough():
    real, fake = 2 * whitened(30, 1, 1) + 5, 3 * whitened(20, 1, 2) + 1
    assert frechet_distance(real, fake) == pytest.approx(16 + 1, abs=1e-10)


def test_covariances_that_do_not_commute_have_the_trace_of_their_root():
    real, fake = normal(60, 5, 1) @ normal(5, 5, 3), normal(50, 5, 2) @ normal(5, 5, 4) + 1
    a, b = real.T.cov(), fake.T.cov()
    assert (a @ b - b @ a).abs().max() > 1
    cross = torch.linalg.eigvals(a @ b).real.sqrt().sum()
    shift = (real.mean(0) - fake.mean(0)).square().sum()
    expected = (shift + a.trace() + b.trace() - 2 * cross).item()
    assert frechet_distance(real, fake) == pytest.approx(expected, rel=1e-10)


def test_fewer_samples_than_features_have_a_distance_too():
    # The usual root of a product gets complex here.
    real, fake = normal(6, 20, 1), 2 * normal(9, 20, 2) + 1
    a, b = real.T.cov(), fake.T.cov()
    values = torch.linalg.svdvals(
        ((real - real.mean(0)) @ (fake - fake.mean(0)).T) / (5 * 8) ** 0.5
    )
    shift = (real.mean(0) - fake.mean(0)).square().sum()
    expected = (shift + a.trace() + b.trace() - 2 * values.sum()).item()
    assert frechet_distance(real, fake) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(real, real) == pytest.approx(0, abs=1e-5)


def test_frechet_distance_scales_with_the_square_and_ignores_a_common_shift():
    real, fake = normal(40, 4, 1), 1.5 * normal(30, 4, 2) + 0.3
    distance = frechet_distance(real, fake)
    assert frechet_distance(3 * real, 3 * fake) == pytest.approx(9 * distance, rel=1e-10)
    assert frechet_distance(real + 1000, fake + 1000) == pytest.approx(distance, rel=1e-7)


def test_single_precision_features_are_taken_in_double():
    real, fake = normal(200, 16, 1).float() + 100, normal(200, 16, 2).float() + 100
    expected = frechet_distance(real.double(), fake.double())
    assert frechet_distance(real, fake) == expected
    assert frechet_distance(real, real) == pytest.approx(0, abs=1e-8)


# ---------------------------------------------------------------- kernel distance


def test_the_kernel_distance_is_its_sum_over_pairs():
    real, fake = normal(7, 3, 1), normal(5, 3, 2) + 0.5

    def kernel(x, y):
        return ((x @ y).item() / 3 + 1) ** 3

    def within(x):
        pairs = [kernel(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j]
        return sum(pairs) / len(pairs)

    across = [kernel(a, b) for a in real for b in fake]
    expected = within(real) + within(fake) - 2 * sum(across) / len(across)
    assert kernel_distance(real, fake) == pytest.approx(expected, rel=1e-10)


def test_repeated_points_have_the_kernel_distance_of_two_points():
    real, fake = torch.tensor([[1.0, 1.0]]).repeat(4, 1), torch.tensor([[-1.0, 1.0]]).repeat(6, 1)
    assert kernel_distance(real, fake) == pytest.approx(2 * 2**3 - 2 * 1, abs=1e-12)


def test_the_kernel_distance_is_unbiased():
    values = torch.tensor(
        [kernel_distance(normal(12, 4, i), normal(15, 4, -i - 1)) for i in range(300)]
    )
    error = values.std() / len(values) ** 0.5
    assert abs(values.mean()) < 4 * error and (values < 0).any()
    # The biased estimate, with the pairs (i, i), is far outside.
    assert error < 0.05


# ---------------------------------------------------------------- precision and recall


def test_precision_and_recall_by_hand():
    real = torch.tensor([[0.0], [1.0], [10.0]])  # nearest neighbours at 1, 1 and 9
    fake = torch.tensor([[1.5], [12.0], [20.0], [30.0]])  # at 10.5, 8, 8 and 10
    assert precision_recall(real, fake, k=1) == (0.5, 1.0)
    # With k = 2 the radii of the real are 10, 9 and 10: 20 is in now, 30 is not.
    assert precision_recall(real, fake, k=2) == (0.75, 1.0)


def test_a_radius_is_closed_and_does_not_count_the_point_itself():
    real, fake = torch.tensor([[0.0], [2.0]]), torch.tensor([[4.0], [5.0]])
    assert precision_recall(real, fake, k=1) == (0.5, 0.0)


def test_lost_modes_cost_recall_and_invented_ones_precision():
    two = torch.cat([normal(40, 3, 1), normal(40, 3, 2) + 50])
    one = normal(200, 3, 3)
    lost = precision_recall(two, one, k=5)
    assert lost.precision > 0.9 and 0.4 < lost.recall <= 0.5
    invented = precision_recall(one, two, k=5)
    assert (invented.recall, invented.precision) == lost
    assert precision_recall(two, normal(60, 3, 4) - 90) == (0, 0)
    assert precision_recall(two, two.flip(0)) == (1, 1)


def test_a_larger_k_covers_more():
    real, fake = normal(60, 4, 1), 1.3 * normal(60, 4, 2) + 0.5
    values = [precision_recall(real, fake, k) for k in (1, 3, 8, 20)]
    assert all(a.precision < b.precision for a, b in zip(values, values[1:], strict=False))
    assert all(a.recall < b.recall for a, b in zip(values, values[1:], strict=False))


# ---------------------------------------------------------------- what all of these share


@of_sets
def test_order_and_rotation_do_not_matter(metric):
    real, fake = normal(40, 5, 1), 1.2 * normal(30, 5, 2) + 0.4
    value = metric(real, fake)
    turn, mirror = rotation(5), torch.diag(torch.tensor([1, -1, 1, 1, -1]).double())
    shuffled = real[torch.randperm(40, generator=torch.Generator().manual_seed(0))]
    for a, b in ((real @ turn, fake @ turn), (real @ mirror, fake @ mirror), (shuffled, fake)):
        assert metric(a, b) == pytest.approx(value, rel=1e-9)


@pytest.mark.parametrize("metric", [frechet_distance, kernel_distance])
def test_distances_are_symmetric_and_grow(metric):
    real = normal(50, 4, 1)
    distances = [metric(real, normal(50, 4, 2) + shift) for shift in (0.0, 0.5, 1.0, 2.0)]
    assert distances == sorted(distances) and distances[1] > 2 * abs(distances[0])
    other = normal(30, 4, 3) + 1
    assert metric(real, other) == pytest.approx(metric(other, real), rel=1e-10)


@of_sets
def test_metrics_leave_their_sets_alone_and_take_any_device(metric, device):
    real, fake = normal(20, 3, 1).to(device), normal(30, 3, 2).to(device)
    before = real.clone(), fake.clone()
    value = metric(real, fake)
    assert torch.equal(real, before[0]) and torch.equal(fake, before[1])
    assert value == pytest.approx(metric(real.cpu(), fake.cpu()), rel=1e-9)


@of_sets
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_features_that_are_not_finite_are_refused(metric, bad):
    broken = normal(20, 3)
    broken[3, 1] = bad
    with pytest.raises(ValueError, match="The fake features hold NaN or infinity"):
        metric(normal(20, 3), broken)
    with pytest.raises(ValueError, match="The real features hold NaN or infinity"):
        metric(broken, normal(20, 3))


@of_sets
@pytest.mark.parametrize("shape", [(1, 3), (0, 3), (20,), (20, 3, 1)])
def test_tensors_of_another_shape_than_features_are_refused(unchecked, metric, shape):
    with pytest.raises(ValueError, match=r"The real features must have shape \(N, D\)"):
        metric(torch.zeros(shape), normal(20, 3))
    with pytest.raises(ValueError, match=r"The fake features must have shape \(N, D\)"):
        metric(normal(20, 3), torch.zeros(shape))


@of_sets
def test_features_of_different_extractors_are_refused(unchecked, metric):
    with pytest.raises(ValueError, match="Features of 3 and 4 dimensions"):
        metric(normal(20, 3), normal(20, 4))


def test_k_nearest_neighbours_need_more_points_than_k():
    with pytest.raises(ValueError, match=r"N ≥ 6, not \(5, 3\)"):
        precision_recall(normal(5, 3), normal(20, 3), k=5)
    with pytest.raises(ValueError, match=r"N ≥ 6, not \(5, 3\)"):
        precision_recall(normal(20, 3), normal(5, 3), k=5)
    assert precision_recall(normal(6, 3), normal(6, 3, 1), k=5) == (1, 1)


@pytest.mark.parametrize("k", [0, -1])
def test_a_k_below_one_is_refused(k):
    with pytest.raises(ValueError, match="k must be"):
        precision_recall(normal(20, 3), normal(20, 3, 1), k=k)


# ---------------------------------------------------------------- indices


def test_usage_and_perplexity_of_known_indices():
    equal = torch.arange(8).repeat(3).view(2, 3, 4)
    assert codebook_usage(equal, 8) == 1 and perplexity(equal, 8) == pytest.approx(8)
    assert codebook_usage(equal, 16) == 0.5 and perplexity(equal, 16) == pytest.approx(8)
    one = torch.full((5,), 3)
    assert codebook_usage(one, 4) == 0.25 and perplexity(one, 4) == pytest.approx(1)
    uneven = torch.tensor([0, 0, 0, 2])
    expected = math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    assert perplexity(uneven, 5) == pytest.approx(expected) and codebook_usage(uneven, 5) == 0.4


def test_perplexity_is_of_the_whole_set_and_not_a_mean_over_parts():
    parts = [torch.zeros(10, dtype=torch.int64), torch.ones(10, dtype=torch.int64)]
    assert [perplexity(part, 2) for part in parts] == pytest.approx([1, 1])
    assert perplexity(torch.cat(parts), 2) == pytest.approx(2)


@pytest.mark.parametrize("measure", [codebook_usage, perplexity])
@pytest.mark.parametrize("indices", [[0, 4], [-1, 2], []])
def test_indices_that_no_codebook_has_are_refused(measure, indices):
    with pytest.raises(ValueError, match="Indices must be 0 … 3, and at least one"):
        measure(torch.tensor(indices, dtype=torch.int64), 4)


# ---------------------------------------------------------------- PSNR


def test_psnr_is_of_each_picture_and_of_a_range_of_two():
    a = torch.zeros(3, 3, 4, 5)
    b = a.clone()
    b[0] += 0.2
    b[1, :, :2] += 0.2  # half of the pixels: half of the error
    b[2] += 2  # black against white
    expected = [10 * math.log10(4 / 0.04), 10 * math.log10(4 / 0.02), 0.0]
    assert psnr(a, b).tolist() == pytest.approx(expected, abs=1e-4)
    assert torch.equal(psnr(a, b), psnr(b, a))


def test_equal_pictures_have_a_finite_psnr_beyond_all_others():
    a = normal(2, 48).view(2, 3, 4, 4).float()
    assert psnr(a, a).isfinite().all() and (psnr(a, a) > 120).all()
    assert (psnr(a, a) > psnr(a, a + 1e-4)).all()


def test_pictures_of_different_shapes_are_refused(unchecked):
    with pytest.raises(ValueError, match=r"different shapes: \(2, 3, 4, 4\), \(1, 3, 4, 4\)"):
        psnr(torch.zeros(2, 3, 4, 4), torch.zeros(1, 3, 4, 4))


# ---------------------------------------------------------------- bootstrap


def mean_of(x):
    return x.mean().item()


def test_a_bootstrap_interval_covers_a_known_mean_as_often_as_it_says(generator):
    hits = 0
    for trial in range(200):
        interval = bootstrap(mean_of, normal(50, 1, trial) + 3, generator=generator, rounds=100)
        hits += interval.low <= 3 <= interval.high
    assert 0.88 <= hits / 200 <= 0.985  # 95 % for endless rounds and points


def test_a_bootstrap_interval_has_the_width_of_four_standard_errors(generator):
    for n in (100, 400):
        interval = bootstrap(mean_of, 2 * whitened(n, 1), generator=generator, rounds=2000)
        assert interval.value == pytest.approx(0, abs=1e-12)
        width = 2 * 1.96 * 2 / n**0.5
        assert interval.high - interval.low == pytest.approx(width, rel=0.1)
        assert interval.high == pytest.approx(-interval.low, rel=0.2)


def test_each_set_is_resampled_on_its_own_with_replacement(generator):
    seen = []

    def record(a, b):
        seen.append((a, b))
        return 0.1

    a, b = torch.arange(30), torch.arange(100, 120)
    interval = bootstrap(record, a, b, generator=generator, rounds=50)
    assert interval == pytest.approx((0.1, 0.1, 0.1), abs=1e-12)
    *drawn, whole = seen
    assert len(drawn) == 50 and torch.equal(whole[0], a) and torch.equal(whole[1], b)
    for x, y in drawn:
        assert len(x) == 30 and len(y) == 20 and set(y.tolist()) <= set(b.tolist())
        assert x.unique().numel() < 30  # all of them once has a probability of 10⁻¹²
    assert not torch.equal(drawn[0][0], drawn[1][0])


def test_a_bootstrap_repeats_with_its_seed_and_changes_nothing():
    x, y = normal(30, 3, 1), normal(30, 3, 2)
    before, state = x.clone(), torch.random.get_rng_state()
    a, b, c = (
        bootstrap(kernel_distance, x, y, generator=torch.Generator().manual_seed(s), rounds=20)
        for s in (1, 1, 2)
    )
    assert a == b and a != c and a.value == kernel_distance(x, y)
    assert torch.equal(x, before) and torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(
    "sets, rounds", [([], 20), ([(5, 3), (0, 3)], 20), ([(5, 3)], 1), ([(5, 3)], 0)]
)
def test_a_bootstrap_of_no_or_empty_sets_is_refused(sets, rounds, generator):
    sets = [torch.zeros(shape) for shape in sets]
    with pytest.raises(ValueError, match="at least one set, none of them empty, and two rounds"):
        bootstrap(lambda *_: 0.0, *sets, generator=generator, rounds=rounds)


@pytest.mark.parametrize("metric", [frechet_distance, kernel_distance])
def test_an_interval_holds_the_value_that_it_is_about(metric, generator):
    # Drawing points twice moves these two upwards, away from the value of the sets themselves.
    for seed in range(3):
        real, fake = normal(60, 6, seed), normal(60, 6, seed + 100) + 0.1
        interval = bootstrap(metric, real, fake, generator=generator, rounds=60)
        assert interval.low <= interval.value <= interval.high


def test_two_samples_of_one_distribution_are_not_called_different(generator):
    hits = 0
    for seed in range(20):
        real, fake = normal(60, 6, seed), normal(60, 6, seed + 100)
        interval = bootstrap(kernel_distance, real, fake, generator=generator, rounds=40)
        hits += interval.low <= 0 <= interval.high
    assert hits >= 17  # 95 % are 19 of 20


# ---------------------------------------------------------------- Inception


def test_without_weights_and_download_inception_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(RuntimeError, match="not at hand.*download=True.*judge's features"):
        inception_features()
    with pytest.raises(RuntimeError, match="not at hand.*internet"):  # the tests have none
        inception_features(download=True)


def test_inception_gets_pictures_in_the_range_it_was_trained_on(monkeypatch, tmp_path):
    import torchvision

    torch.manual_seed(0)
    weights = torchvision.models.inception_v3(weights=None, init_weights=False).state_dict()
    kind = torchvision.models.Inception_V3_Weights
    monkeypatch.setattr(kind, "get_state_dict", lambda self, *_, **__: weights)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    name = kind.IMAGENET1K_V1.url.rsplit("/", 1)[1]
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    (tmp_path / "hub" / "checkpoints" / name).touch()
    extractor = inception_features()
    assert not extractor.training
    seen = []
    first = next(m for m in extractor.modules() if isinstance(m, torch.nn.Conv2d))
    first.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    pictures = torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1).expand(2, 3, 32, 32)
    with torch.no_grad():
        features = extractor(pictures)
    assert features.shape == (2, 2048)
    # Its weights expect [−1, 1]. torchvision's own `transform_input` is for pictures that were
    # normalised by ImageNet's mean and deviation, and would make ours grey.
    assert seen[0].shape == (2, 3, 299, 299)
    assert seen[0].amin() == pytest.approx(-1, abs=1e-5)
    assert seen[0].amax() == pytest.approx(1, abs=1e-5)
