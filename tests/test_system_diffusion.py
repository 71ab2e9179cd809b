"""The system `diffusion`: trained, drawn, drawn again, measured as any other; its own options."""

import json
import math
from dataclasses import replace

import pytest
import torch
from tiny_systems import QUIET, tiny_systems
from typer.testing import CliRunner

from t2ilearn import cli, weights
from t2ilearn.data import CaptionTokenizer, TinyShapes
from t2ilearn.data.captions import CaptionError
from t2ilearn.drawing import complete, draw, draw_steps, redraw
from t2ilearn.models.dit import DiT, DiTConfig
from t2ilearn.models.tokens import NULL
from t2ilearn.systems import STAGES, Request, diffusion, load, train_system
from t2ilearn.systems.diffusion import DiffusionSystem
from t2ilearn.systems.tokens import TokenOptions

CAPTION = "a large red star"


def nothing_measured(*_, **__):
    """Takes the place of an evaluation where a test is about something else."""
    return {"test-full, as drawn": {"value": 0.5, "low": 0.4, "high": 0.6}}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of four steps, once for all tests here, and what evaluation was asked."""
    folder = tmp_path_factory.mktemp("runs")
    with tiny_systems(n=8) as asked:
        path = train_system("diffusion", "tiny", folder, steps=4, **QUIET)
    return path, asked


@pytest.fixture(scope="module")
def folder(run):
    """The run's folder, by which `draw` finds the system."""
    return str(run[0].parent)


def small_system(**how) -> DiffusionSystem:
    torch.manual_seed(0)
    stage = STAGES["diffusion"].presets["tiny"]
    model = DiT(replace(stage.model, dim=32, num_layers=1, patch=8)).eval()
    torch.nn.init.normal_(model.last.weight, std=0.1)
    torch.nn.init.normal_(model.modulation.weight, std=0.1)
    return DiffusionSystem(model, stage.text_tokenizer(), "", ("tiny-shapes",), **how)


def drawn(system, caption=CAPTION, seed=0, **options):
    request = Request((caption,) * 2, "diffusion", options=system.make_options(**options))
    return list(system.steps(request, torch.Generator().manual_seed(seed)))


def invoke(*arguments):
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


# --- from a recipe to weights ------------------------------------------------------------------


def test_both_presets_have_the_sizes_that_the_book_states():
    sizes = {}
    for preset, recipe in STAGES["diffusion"].presets.items():
        sizes[preset] = sum(p.numel() for p in DiT(recipe.model).parameters())
        assert recipe.model.resolution == {"tiny": TinyShapes().resolution, "book": 64}[preset]
        assert recipe.model.vocabulary == recipe.text_tokenizer().vocabulary
        assert recipe.model.text_length == recipe.text_tokenizer().length
        assert recipe.split == "train" and recipe.settings == {"drop_captions": 0.1}
    assert sizes["tiny"] < 0.6e6 and 3e6 < sizes["book"] < 4e6


def test_a_run_writes_weights_a_card_and_curves(run):
    path, asked = run
    card = weights.load(path).card
    assert card.stage == "diffusion" and card.settings["drop_captions"] == 0.1
    assert path.name == "diffusion-tiny.safetensors"
    assert 0 <= card.metrics["test-full, as drawn"]["value"] <= 1
    assert {"as learned", "as drawn"} <= {name.split(", ")[-1] for name in card.metrics}
    assert not any("reconstructions" in name for name in card.metrics)  # it has no tokenizer
    flight = json.loads((path.parent / "flight.json").read_text(encoding="utf-8"))
    assert {"mse", "weight", "total", "gradient_norm"} <= set(flight["curves"])
    assert isinstance(asked[0][0], DiffusionSystem)


def test_the_loss_of_a_step_is_jit_s_with_the_stated_share_of_captions_left_out(
    monkeypatch, tmp_path
):
    seen, real = [], diffusion.jit_loss

    def spy(model, x, process, caption, **how):
        seen.append(caption)
        return real(model, x, process, caption, **how)

    monkeypatch.setattr(diffusion, "jit_loss", spy)
    with tiny_systems(n=8):
        monkeypatch.setattr(diffusion, "evaluate_system", nothing_measured)
        recipe = STAGES["diffusion"].presets["tiny"]
        batches = replace(recipe, train=replace(recipe.train, batch_size=64))
        monkeypatch.setitem(STAGES["diffusion"].presets, "tiny", batches)
        train_system("diffusion", "tiny", tmp_path, steps=8, **QUIET)
    captions = torch.cat(seen)
    share = (captions[:, 0] == NULL).float().mean().item()
    assert len(captions) == 8 * 64 and 0.06 < share < 0.14


def test_the_same_command_gives_the_same_weights(tmp_path, run):
    with tiny_systems(n=8), pytest.MonkeyPatch.context() as patch:
        patch.setattr(diffusion, "evaluate_system", nothing_measured)
        again = train_system("diffusion", "tiny", tmp_path, steps=4, **QUIET)
    a, b = weights.load(run[0]).state, weights.load(again).state
    assert all(torch.equal(a[key], b[key]) for key in a)


# --- drawing -----------------------------------------------------------------------------------


def test_it_draws_from_its_folder_and_its_file_can_be_drawn_again(folder, tmp_path):
    drawing = draw(CAPTION, system=folder, count=2, seed=3, steps=4, guidance_scale=3)
    assert drawing.pictures.shape == (2, 3, 32, 32) and drawing.pictures.abs().max() <= 1
    assert len(drawing.aligned) == 2
    again = redraw(drawing.save(tmp_path / "star.png"))
    assert torch.equal(again.pictures, drawing.pictures) and again.request == drawing.request
    other = draw(CAPTION, system=folder, count=2, seed=4, steps=4)
    assert not torch.equal(other.pictures, drawing.pictures)


def test_the_pictures_form_step_by_step(folder):
    steps = list(draw_steps(CAPTION, system=folder, count=2, steps=5))
    assert len(steps) == 5 and all(s.shape == (2, 3, 32, 32) for s in steps)
    assert torch.equal(steps[-1], draw(CAPTION, system=folder, count=2, steps=5).pictures)


def test_the_command_line_draws_and_plans(folder, tmp_path, unchecked):
    out = tmp_path / "a.png"
    done = invoke("draw", CAPTION, "--with", folder, "--steps", "2", "--sampler=heun", "--out", out)
    assert done.exit_code == 0 and out.exists(), done.output
    planned = invoke("train", "diffusion", "--dry-run", "--runs", tmp_path)
    assert planned.exit_code == 0 and "diffusion" in planned.output
    with pytest.raises(ValueError, match="number of steps must be 1 … 1000, not 0"):
        draw(CAPTION, system=folder, steps="0")  # as the command line gives it


def test_evaluation_measures_both_manners(folder):
    done = invoke("evaluate", folder, "--n", "8")
    assert done.exit_code == 0, done.output
    assert "test-full, as learned" in done.output and "best of 8 by the reader" in done.output


def test_the_best_of_many_is_chosen_by_the_reader(folder):
    drawing = draw(CAPTION, system=folder, count=1, best_of=3, steps=2)
    assert drawing.pictures.shape == (1, 3, 32, 32)


def test_it_cannot_begin_from_a_picture(folder):
    with pytest.raises(ValueError, match="cannot begin from a picture"):
        complete(torch.zeros(3, 32, 32), CAPTION, system=folder)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm", "euler", "heun"])
@pytest.mark.parametrize("threshold", ["none", "static", "dynamic"])
def test_every_sampler_and_threshold_draws_pictures_in_range(sampler, threshold):
    steps = drawn(small_system(), steps=3, sampler=sampler, threshold=threshold)
    assert len(steps) == 3 and all(s.abs().max() <= 1 and s.isfinite().all() for s in steps)


def test_options_change_the_picture_as_they_should():
    system = small_system()
    plain = drawn(system, steps=6)[-1]
    assert torch.equal(plain, drawn(system, steps=6)[-1])
    for changed in (
        {"guidance_scale": 5},
        {"guidance_from": 0.3},
        {"guidance_until": 0.3},
        {"shift": 3.0},
        {"sampler": "ddim", "eta": 1.0},
    ):
        assert not torch.equal(plain, drawn(system, steps=6, **changed)[-1]), changed
    off = drawn(system, steps=6, guidance_scale=1)[-1]
    assert torch.equal(off, drawn(system, steps=6, guidance_scale=1, guidance_until=0.5)[-1])
    assert not torch.equal(plain, drawn(system, "a small blue heart", steps=6)[-1])


def test_scale_zero_and_an_empty_caption_are_the_unconditional_model():
    system = small_system()
    zero = drawn(system, steps=4, guidance_scale=0)[-1]
    assert torch.equal(zero, drawn(system, "a small blue heart", steps=4, guidance_scale=0)[-1])
    assert torch.allclose(zero, drawn(system, "", steps=4, guidance_scale=1)[-1], atol=1e-6)


# --- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"steps": 0}, "number of steps must be 1 … 1000, not 0"),
        ({"steps": -5}, "number of steps must be 1 … 1000, not -5"),
        ({"steps": "many"}, "steps must be a whole number"),
        ({"sampler": "plms"}, "sampler is ddpm, ddim, dpm, euler, heun, not 'plms'"),
        ({"threshold": "soft"}, "threshold is none, static, dynamic, not 'soft'"),
        ({"guidance_scale": -1}, "guidance scale must be 0 … 20"),
        ({"guidance_scale": math.nan}, "guidance scale must be 0 … 20"),
        ({"guidance_from": 0.8, "guidance_until": 0.5}, "guidance until must be 0.8 … 1"),
        ({"eta": 0.5}, "eta is an option of ddim"),
        ({"eta": 2, "sampler": "ddim"}, "eta must be 0 … 1"),
        ({"shift": 0}, "shift must be 0.1 … 10"),
        ({"top_p": 0.9}, "has no option 'top_p'; its options are: steps"),
    ],
)
def test_senseless_options_are_refused(wrong, says):
    with pytest.raises(ValueError, match=says):
        DiffusionSystem.make_options(**wrong)


def test_guidance_needs_a_model_that_was_trained_without_captions_too():
    system = small_system(knows_null=False)
    for caption, scale in ((CAPTION, 2.0), (CAPTION, 0.0), ("", 1.0)):
        with pytest.raises(ValueError, match="trained with every caption"):
            drawn(system, caption, guidance_scale=scale, steps=2)
    assert len(drawn(system, guidance_scale=1.0, steps=2)) == 2


def test_whether_captions_were_left_out_is_read_from_the_card(tmp_path):
    with tiny_systems(n=8), pytest.MonkeyPatch.context() as patch:
        recipe = STAGES["diffusion"].presets["tiny"]
        patch.setitem(
            STAGES["diffusion"].presets, "tiny", replace(recipe, settings={"drop_captions": 0.0})
        )
        patch.setattr(diffusion, "evaluate_system", nothing_measured)
        path = train_system("diffusion", "tiny", tmp_path, steps=1, **QUIET)
    system = load(str(path.parent))
    assert not system.knows_null
    with pytest.raises(ValueError, match="Set the guidance scale to 1"):
        draw(CAPTION, system=str(path.parent), steps=2)


def test_options_of_another_system_are_refused():
    system = small_system()
    request = Request((CAPTION,), "diffusion", options=TokenOptions())
    with pytest.raises(ValueError, match="takes DiffusionOptions, not TokenOptions"):
        list(system.steps(request, torch.Generator()))


def test_a_model_that_diverged_is_an_error_that_says_so():
    system = small_system()
    torch.nn.init.constant_(system.network.last.weight, math.nan)
    with pytest.raises(ValueError, match="predicts NaN or infinity"):
        drawn(system, steps=2)


def test_captions_that_the_world_cannot_read_are_refused(folder):
    with pytest.raises(CaptionError):
        draw("a large red teapot", system=folder, steps=2)


# --- pictures of your own ----------------------------------------------------------------------


def test_without_a_judge_the_error_of_the_prediction_is_reported():
    system = small_system()
    metrics = system.likelihood(TinyShapes(), 12)
    assert metrics["test pictures"] == 12 and len(metrics) == 4
    assert all(value["value"] > 0 for name, value in metrics.items() if "error" in name)
    system = small_system(knows_null=False)
    assert "squared error of x̂, no caption" not in system.likelihood(TinyShapes(), 12)


def test_own_pictures_take_any_caption_but_none():
    config = DiTConfig(resolution=16, patch=8, dim=32, num_layers=1, text_length=28)
    system = DiffusionSystem(DiT(config), CaptionTokenizer.shared(), "", ())
    assert system.read("anything at all") is None
    with pytest.raises(CaptionError, match="empty"):
        system.read("  ")
