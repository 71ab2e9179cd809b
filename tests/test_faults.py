"""Faults that users of such tools report, each as a kind with several members.

Every test was seen to fail before its kind was cured.
"""

import csv
import os

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import t2ilearn.studio as studio_module
from t2ilearn import cli, drawing
from t2ilearn.data import CaptionTokenizer, Folder, Shapes
from t2ilearn.data.pixels import bytes_from_pictures
from t2ilearn.drawing import Drawing
from t2ilearn.judging.clip import retrieval
from t2ilearn.judging.counting import other_captions
from t2ilearn.judging.report import evaluate_tokenizer
from t2ilearn.models.clip import CLIP, ImageTowerConfig, TextTowerConfig
from t2ilearn.models.dit import DiT, DiTConfig
from t2ilearn.models.transformer import PriorConfig, TransformerPrior
from t2ilearn.models.vqvae import VQVAE, VQVAEConfig
from t2ilearn.systems import Request
from t2ilearn.systems.diffusion import DiffusionSystem
from t2ilearn.systems.plan import train_system
from t2ilearn.systems.tokens import TokenOptions, TokenSystem
from t2ilearn.training import TrainingError, archive_run

PICTURES = bytes_from_pictures(
    Shapes(32).sample(24, generator=torch.Generator().manual_seed(0)).pictures
)


def image(number):
    """One of 24 pictures of 32 × 32 pixels."""
    return Image.fromarray(PICTURES[number].permute(1, 2, 0).numpy())


def write_table(folder, rows):
    with open(folder / "captions.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("file", "caption"), *rows])


def own_pictures(folder, captions_of):
    """A folder of 24 pictures, each with the captions that `captions_of(number)` lists."""
    folder.mkdir(exist_ok=True)
    for number in range(24):
        image(number).save(folder / f"{number}.png")
    write_table(folder, [(f"{n}.png", text) for n in range(24) for text in captions_of(n)])
    return folder


def tiny_vqvae():
    torch.manual_seed(0)
    return VQVAE.from_config(VQVAEConfig(32, (8, 8), codebook_size=32, code_dim=4)).eval()


# --- figures count pictures --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("captions", "pictures"),
    [
        ([f"view {i}" for i in range(20)] + ["b", "c"], [0] * 20 + [1, 2]),
        (["a", "a", "a", "b"], [0, 1, 2, 3]),
        (["a", "b", "a", "b", "c"], [0, 0, 1, 1, 2]),
        (["a"] * 5, [0, 1, 2, 3, 4]),
        (["a", "b"], [0, 0]),
        (["a"], [0]),
        ([], []),
    ],
)
def test_a_shuffled_caption_is_none_of_the_picture_s_own(captions, pictures):
    own = {p: {c for c, q in zip(captions, pictures, strict=True) if q == p} for p in pictures}
    possible = [row for row, p in enumerate(pictures) if set(captions) - own[p]]
    found = other_captions(captions, torch.tensor(pictures, dtype=torch.int64))
    assert list(found) == possible
    assert all(captions[other] not in own[pictures[row]] for row, other in found.items())


def measured_figures(world):
    """What is measured on own pictures, with models of random weights."""
    words = CaptionTokenizer.train(["a picture number 0 1 2 3 4 5 6 7 8 9"])
    sizes = {"vocabulary": words.vocabulary, "text_length": words.length, "dim": 16}
    vqvae = tiny_vqvae()
    prior = PriorConfig(codebook_size=32, side=8, num_layers=1, num_heads=2, **sizes)
    network = DiT(DiTConfig(32, 8, num_layers=1, **{**sizes, "dim": 32}))
    towers = (ImageTowerConfig(32, 16, 16, 1, 2, 16), TextTowerConfig(*sizes.values(), 1, 2, 16))
    for parameter in network.parameters():  # the last layer begins as zeros
        torch.nn.init.normal_(parameter, std=0.1)
    clip = CLIP(*towers).eval()
    return {
        **evaluate_tokenizer(vqvae, world),
        **TokenSystem(vqvae, TransformerPrior(prior).eval(), words, "", ()).likelihood(world),
        **DiffusionSystem(network.eval(), words, "", ()).likelihood(world),
        **retrieval(clip, words.encode, world, "test", 100),
    }


def test_figures_count_pictures_and_not_their_captions(tmp_path):
    once = own_pictures(tmp_path / "once", lambda n: [f"picture number {n}"])
    figures = measured_figures(Folder(once, 32))
    for often in ([3] * 24, [1 + 19 * (n % 2) for n in range(24)], range(1, 25)):
        many = own_pictures(tmp_path / "many", lambda n: [f"picture number {n}"] * often[n])  # noqa: B023
        again = measured_figures(Folder(many, 32))
        assert again["test pictures"] == len(Folder(once, 32).test_captions)
        assert again.keys() == figures.keys()
        for name, figure in figures.items():
            assert again[name] == pytest.approx(figure, abs=2e-4), name


def test_a_figure_that_one_picture_cannot_give_is_left_out_with_a_reason(tmp_path):
    same = own_pictures(tmp_path, lambda n: ["my cat", "my cat again"])
    figures = measured_figures(Folder(same, 32))
    assert "left out" in figures["nats a token, captions shuffled"]
    assert "left out" in figures["squared error of x̂, captions shuffled"]
    write_table(same, [("0.png", "my cat"), ("1.png", "my dog")])
    alone = measured_figures(Folder(same, 32))
    assert alone["test pictures"] == 1 and "low" not in alone["PSNR, dB"]
    assert "left out" in alone["R@1, caption of a picture, test"]
    assert "left out" in alone["nats a token"]["interval"]


# --- nothing that a user saved is overwritten unasked ------------------------------------------


def fresh(caption="a star"):
    """A drawing of eight grey pixels, as no model made it."""
    request = Request((caption,), "vqvae", options=TokenOptions())
    return Drawing(torch.rand(1, 3, 8, 8) * 2 - 1, request, "none")


@pytest.fixture
def quick(monkeypatch):
    """`draw` and `redraw` without a model."""
    monkeypatch.setattr(drawing, "draw", lambda caption, **how: fresh(caption))
    monkeypatch.setattr(drawing, "redraw", lambda file: fresh())


def invoke(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


@pytest.mark.parametrize("command", [("draw", "a star"), ("redraw", "drawing.png")])
def test_a_command_without_out_takes_a_free_name(command, quick, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fresh().save("drawing.png")
    (tmp_path / "redrawn.png").mkdir()
    taken = {path.name: path.is_file() and path.read_bytes() for path in tmp_path.iterdir()}
    said = [invoke(*command).output for _ in range(3)]
    made = sorted(path.name for path in tmp_path.iterdir() if path.name not in taken)
    assert len(made) == 3 and all(name in text for name, text in zip(made, said, strict=True))
    for name, content in taken.items():
        assert not content or (tmp_path / name).read_bytes() == content


def test_the_studio_overwrites_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(studio_module, "draw", lambda caption, **how: fresh(caption))
    studio = studio_module.Studio(tmp_path)
    for _ in range(3):
        studio.draw_button.click()
        studio.save_button.click()
        studio.save_button.click()
    assert len(list(tmp_path.iterdir())) == 6
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 3


def test_a_drawing_that_cannot_be_saved_leaves_no_empty_file(tmp_path, monkeypatch):
    def full(number):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        fresh().save_new(tmp_path / "star.png")
    assert not list(tmp_path.iterdir())


def test_an_archive_overwrites_none(tmp_path):
    run = tmp_path / "prior-tiny"
    run.mkdir()
    files = []
    for text in ("{}", "[]", "0"):
        (run / "flight.json").write_text(text, encoding="utf-8")
        files.append(archive_run(run))
    assert [f.name for f in files] == ["prior-tiny.zip", "prior-tiny-2.zip", "prior-tiny-3.zip"]
    assert len({file.read_bytes() for file in files}) == 3


def test_a_run_does_not_overwrite_weights_without_a_checkpoint(tmp_path):
    run = tmp_path / "vqvae-tiny"
    run.mkdir()
    (run / "vqvae-tiny.safetensors").write_bytes(b"weights of somebody")
    with pytest.raises(TrainingError, match="would be overwritten"):
        train_system("vqvae", "tiny", tmp_path, stage="vqvae", steps=1, progress=False)
    assert [path.read_bytes() for path in run.iterdir()] == [b"weights of somebody"]


@pytest.mark.parametrize("out", ["picture.jpg", "missing/picture.png", "picture"])
def test_a_name_that_cannot_be_saved_is_refused_before_drawing(out, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(drawing, "draw", lambda *_, **__: pytest.fail("drawn before the check"))
    done = invoke("draw", "a star", "--out", out)
    assert isinstance(done.exception, (ValueError, OSError)), done.exception
