"""The system `dalle2`: trained, drawn, drawn again; variations, blends and turned embeddings."""

from dataclasses import replace

import pytest
import torch
from PIL import Image
from tiny_systems import QUIET, tiny_systems
from typer.testing import CliRunner

from t2ilearn import cli, weights
from t2ilearn.data.captions import CaptionError
from t2ilearn.drawing import blend, draw, draw_steps, redraw, vary
from t2ilearn.models.clip import unit_length
from t2ilearn.models.tokens import NULL
from t2ilearn.systems import STAGES, Prompt, Request, dalle2, dalle2_decoder, load, train_system
from t2ilearn.systems.dalle2 import DALLE2Options, DALLE2System
from t2ilearn.systems.diffusion import DiffusionOptions
from t2ilearn.weights import WeightsError

CAPTION = "a large red star"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of all four stages, a few steps each, once for all tests here."""
    folder = tmp_path_factory.mktemp("runs")
    with tiny_systems(n=8):
        train_system("dalle2", "tiny", folder, steps=4, **QUIET)
    return folder


@pytest.fixture(scope="module")
def folder(runs):
    """The last stage's folder, by which `draw` finds the system."""
    return str(runs / "dalle2-prior-tiny")


@pytest.fixture(scope="module")
def system(folder) -> DALLE2System:
    """With larger weights in the paths of the embedding, which hardly learn in four steps."""
    found = load(folder)
    torch.manual_seed(0)
    for parameter in found.decoder.conditioning.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    for parameter in found.prior.last.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return found


@pytest.fixture
def picture(generator):
    return torch.rand(3, 32, 32, generator=generator) * 2 - 1


def invoke(*arguments):
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


def drawn(system, captions, start=None, seed=0, **options):
    request = Request(captions, "dalle2", options=system.make_options(steps=2, **options))
    request = replace(request, start=start)
    return system.generate(request, torch.Generator().manual_seed(seed))


# --- from recipes to weights -------------------------------------------------------------------


def test_the_sizes_are_those_that_the_book_states():
    prior = STAGES["dalle2-prior"].presets["book"]
    decoder = STAGES["dalle2-decoder"].presets["book"]
    clip = STAGES["clip"].presets["book"]
    network = STAGES["diffusion"].presets["book"].model
    assert prior.model.embed_dim == decoder.model.embed_dim == clip.model.embed_dim
    assert decoder.model.dim == network.dim
    assert prior.model.text_length == clip.model.text_length == network.text_length
    for preset in ("tiny", "book"):
        settings = STAGES["dalle2-decoder"].presets[preset].settings
        assert settings == {"drop_captions": 0.5, "drop_embeddings": 0.1}
        assert STAGES["dalle2-prior"].presets[preset].settings == {"drop_captions": 0.1}


def test_each_stage_writes_weights_and_a_card(runs):
    prior = weights.load(runs / "dalle2-prior-tiny" / "dalle2-prior-tiny.safetensors").card
    decoder = weights.load(runs / "dalle2-decoder-tiny" / "dalle2-decoder-tiny.safetensors").card
    assert set(prior.parents) == {"clip", "diffusion", "dalle2-decoder"}
    assert set(decoder.parents) == {"clip", "diffusion"}
    cosines = [name for name in prior.metrics if "cosine to the true embedding" in name]
    assert len(cosines) == 4 * len({name.split(", ")[-1] for name in cosines})
    assert "test-full, as drawn" in prior.metrics and "test-full, variations" in decoder.metrics


def test_the_decoder_s_file_holds_its_own_paths_alone(runs):
    stored = weights.load(runs / "dalle2-decoder-tiny" / "dalle2-decoder-tiny.safetensors")
    assert {key.split(".")[0] for key in stored.state} == {"to_time", "to_tokens"}


def test_caption_and_text_embedding_are_left_out_together(monkeypatch, tmp_path, runs):
    seen, real = [], dalle2.diffusion_prior_loss

    def spy(model, embedding, text, ids, *rest, **how):
        seen.append((text, ids))
        return real(model, embedding, text, ids, *rest, **how)

    monkeypatch.setattr(dalle2, "diffusion_prior_loss", spy)
    monkeypatch.setattr(dalle2, "evaluate_prior", lambda *_: {})
    monkeypatch.setattr(dalle2, "evaluate_system", lambda *_, **__: {"test": 1.0})
    for name in ("clip-tiny", "diffusion-tiny", "dalle2-decoder-tiny"):
        (tmp_path / name).symlink_to(runs / name)
    with tiny_systems(n=8):
        train_system("dalle2", "tiny", tmp_path, stage="dalle2-prior", steps=30, **QUIET)
    text = torch.cat([each for each, _ in seen])
    ids = torch.cat([each for _, each in seen])
    without = ids[:, 0] == NULL
    assert torch.equal(without, ~text.any(1)) and 0.03 < without.double().mean() < 0.2


def test_the_decoder_leaves_out_captions_and_embeddings_apart(monkeypatch, tmp_path, runs):
    seen, real = [], dalle2_decoder.jit_loss

    def spy(model, x, process, embedding, ids, **how):
        seen.append((embedding, ids))
        return real(model, x, process, embedding, ids, **how)

    monkeypatch.setattr(dalle2_decoder, "jit_loss", spy)
    monkeypatch.setattr(dalle2_decoder, "evaluate_variations", lambda *_: {"test": 1.0})
    for name in ("clip-tiny", "diffusion-tiny"):
        (tmp_path / name).symlink_to(runs / name)
    with tiny_systems(n=8):
        train_system("dalle2", "tiny", tmp_path, stage="dalle2-decoder", steps=40, **QUIET)
    no_embedding = ~torch.cat([each for each, _ in seen]).any(1)
    no_caption = torch.cat([each for _, each in seen])[:, 0] == NULL
    assert 0.4 < no_caption.double().mean() < 0.6 and 0.04 < no_embedding.double().mean() < 0.16
    assert (no_caption & ~no_embedding).any() and (no_embedding & ~no_caption).any()


def test_weights_on_top_of_another_clip_are_refused(runs, tmp_path):
    for run in runs.iterdir():
        if run.is_dir() and run.name != "clip-tiny":
            (tmp_path / run.name).symlink_to(run)
    with tiny_systems(n=8):
        train_system("clip", "tiny", tmp_path, stage="clip", steps=3, **QUIET)
    files = {
        stage.name: stage.file_in(tmp_path, "tiny") for stage in DALLE2System.stages
    }  # fmt: skip
    with pytest.raises(WeightsError, match="trained on top of another clip"):
        DALLE2System.load(files)


# --- drawing -----------------------------------------------------------------------------------


def test_it_draws_from_its_folder_and_its_file_can_be_drawn_again(folder, tmp_path):
    drawing = draw(CAPTION, system=folder, count=2, seed=3, steps=3, prior_steps=3)
    assert drawing.pictures.shape == (2, 3, 32, 32) and drawing.pictures.abs().max() <= 1
    assert len(drawing.aligned) == 2
    again = redraw(drawing.save(tmp_path / "star.png"))
    assert torch.equal(again.pictures, drawing.pictures) and again.request == drawing.request
    steps = list(draw_steps(CAPTION, system=folder, count=2, seed=3, steps=3, prior_steps=3))
    assert len(steps) == 3 and torch.equal(steps[-1], drawing.pictures)


def test_each_ablation_gives_the_decoder_what_it_says(system):
    texts = [CAPTION, "a small blue ring"]

    def given(name):
        options = system.make_options(embedding=name, prior_steps=3)
        return system.predict(texts, options, torch.Generator().manual_seed(0))

    ids = system.ids(texts)
    assert torch.equal(given("text"), system.clip.model.encode_text(ids))
    assert not given("none").any()
    predicted = given("predicted")
    assert torch.allclose(predicted.norm(dim=1), torch.ones(2), atol=1e-5)
    assert (predicted - given("text")).abs().max() > 0.01


def test_without_embedding_it_draws_what_chapter_9_draws(system, folder, runs):
    other = load(str(runs / "diffusion-tiny"))
    ours = drawn(system, (CAPTION,), embedding="none")
    request = Request((CAPTION,), "diffusion", options=other.make_options(steps=2))
    theirs = other.generate(request, torch.Generator().manual_seed(0))
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_the_caption_reaches_the_decoder_unless_it_is_left_out(system, monkeypatch):
    seen, real = [], dalle2.decode

    def spy(decoder, embeddings, ids, *rest):
        seen.append(ids)
        return real(decoder, embeddings, ids, *rest)

    monkeypatch.setattr(dalle2, "decode", spy)
    drawn(system, (CAPTION,), embedding="text")
    drawn(system, (CAPTION,), embedding="text", use_caption=False)
    assert torch.equal(seen[0], system.ids([CAPTION]))
    assert seen[1][0, 0] == NULL


# --- variations, blends, differences -----------------------------------------------------------


def test_a_variation_is_decoded_from_the_picture_s_embedding(folder, picture, tmp_path):
    drawing = vary(picture, system=folder, count=3, steps=2)
    assert drawing.pictures.shape == (3, 3, 32, 32) and drawing.aligned == []
    again = redraw(drawing.save(tmp_path / "variations.png"))
    assert torch.equal(again.pictures, drawing.pictures)


def test_variations_differ_by_noise_and_follow_the_picture(system, picture, generator):
    def start(x):
        return ((x[None] + 1) * 127.5).round().to(torch.uint8)

    one = drawn(system, ("",) * 2, start(picture))
    assert not torch.equal(one[0], one[1])
    other = drawn(system, ("",) * 2, start(-picture))
    assert (one - other).abs().max() > 1e-3


def test_a_blend_begins_and_ends_at_the_two_pictures(system, generator):
    start = (torch.rand(2, 3, 32, 32, generator=generator) * 255).round().to(torch.uint8)
    request = Request(("",) * 5, start=start, options=system.make_options(blend=True))
    found = system.image_embeddings(request, ("",) * 5, request.options, generator)
    own = system.image_embeddings(
        replace(request, captions=("",) * 2, options=system.make_options()),
        ("",) * 2,
        system.make_options(),
        generator,
    )
    assert torch.allclose(found[0], own[0], atol=1e-5)
    assert torch.allclose(found[-1], own[1], atol=1e-5)
    angles = (found[1:] * found[:-1]).sum(1).clamp(-1, 1).acos()
    assert torch.allclose(angles, angles.mean().expand(4), atol=1e-3)


def test_prompts_with_weights_turn_the_embedding(system, generator):
    captions = ((Prompt(CAPTION), Prompt("red", -1.0), Prompt("blue")),)
    request = Request(captions)
    options = system.make_options(embedding="text", difference=0.3)
    turned = system.image_embeddings(request, captions, options, generator)
    plain, red, blue = system.clip.model.encode_text(system.ids([CAPTION, "red", "blue"])).split(1)
    direction = unit_length(blue - red)
    angle = (plain * direction).sum().acos()
    assert torch.allclose((turned * direction).sum().acos(), 0.7 * angle, atol=1e-4)
    still = system.make_options(embedding="text", difference=0.0)
    assert torch.allclose(
        system.image_embeddings(request, captions, still, generator), plain, atol=1e-5
    )


def test_the_command_line_varies_and_blends(folder, tmp_path, unchecked):
    one, other = tmp_path / "one.png", tmp_path / "other.jpg"
    Image.new("RGB", (50, 40), "red").save(one)
    Image.new("L", (33, 70), 90).save(other)
    out = tmp_path / "v.png"
    done = invoke("vary", one, "--with", folder, "--count", 2, "--steps", "2", "--out", out)
    assert done.exit_code == 0 and Image.open(out).size == (64, 32), done.output
    done = invoke(
        "vary", one, "--with", folder, "--from", "red", "--to", "blue", "--steps=2", "--out", out
    )
    assert done.exit_code == 0, done.output
    out = tmp_path / "b.png"
    done = invoke("blend", one, other, "--with", folder, "--count", 3, "--steps", "2", "--out", out)
    assert done.exit_code == 0 and Image.open(out).size == (96, 32), done.output


# --- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given, said",
    [
        ({"steps": 0}, "number of steps"),
        ({"prior_steps": 0}, "number of prior steps"),
        ({"prior_guidance": -1}, "prior guidance"),
        ({"candidates": 0}, "number of candidates"),
        ({"difference": 1.5}, "difference must be"),
        ({"embedding": "image"}, "predicted, text, none"),
        ({"blend": "perhaps"}, "true or false"),
        ({"upsample": 2}, "no option 'upsample'"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_options_out_of_range_are_named(given, said):
    with pytest.raises(ValueError, match=said):
        DALLE2System.make_options(**given)


def test_requests_that_make_no_sense_are_refused(system, folder, picture):
    start = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    with pytest.raises(ValueError, match="takes two start pictures, not 1"):
        drawn(system, ("",) * 3, start[:1], blend=True)
    with pytest.raises(ValueError, match="takes two start pictures"):
        drawn(system, (CAPTION,), blend=True)
    with pytest.raises(ValueError, match="set blend"):
        drawn(system, ("",) * 4, start)
    with pytest.raises(ValueError, match="rows of it cannot stay"):
        request = Request((CAPTION,), start=start[:1], rows=3, options=system.make_options())
        list(system.steps(request, torch.Generator()))
    with pytest.raises(ValueError, match="takes DALLE2Options"):
        list(system.steps(Request((CAPTION,), options=DiffusionOptions()), torch.Generator()))
    with pytest.raises(ValueError, match="its weight must be 1"):
        drawn(system, ((Prompt(CAPTION, -1.0), Prompt("red")),), embedding="text")
    with pytest.raises(ValueError, match="same embedding"):
        drawn(system, ((Prompt(CAPTION), Prompt("red"), Prompt("red", -1.0)),), embedding="text")
    with pytest.raises(CaptionError):
        draw("", system=folder)
    with pytest.raises(ValueError, match="two pictures or more"):
        blend(picture, picture, system=folder, count=1)
    with pytest.raises(ValueError, match="cannot begin from a picture"):
        vary(picture, system=folder.replace("dalle2-prior", "diffusion"))


def test_pictures_of_another_kind_are_refused(folder, picture, unchecked):
    for wrong, said in (
        (picture[:, :16], "float tensor of shape"),
        (picture.mul(9), "go from"),
        (picture / 0, "go from"),
        (picture[None], "One picture is of shape"),
        ("star.png", "not a str"),
    ):
        with pytest.raises(ValueError, match=said):
            vary(wrong, system=folder)


def test_without_weights_it_is_said_how_to_get_them(picture):
    with pytest.raises(WeightsError, match="t2ilearn train dalle2"):
        vary(picture)


def test_the_options_are_those_of_diffusion_and_more():
    assert issubclass(DALLE2Options, DiffusionOptions)
    assert DALLE2System.Options().embedding == "predicted"
