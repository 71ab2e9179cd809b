"""Training on a folder of pictures: from captions.csv to a drawing, and what must be refused."""

import csv
import json
import shutil
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from t2ilearn import recipes, weights
from t2ilearn.data import CaptionError, CaptionTokenizer, FolderError, Shapes
from t2ilearn.drawing import draw, load_system, load_tokenizer, redraw
from t2ilearn.prior import PixelCNN, PriorConfig, TransformerPrior
from t2ilearn.recipes import RECIPES, train_system
from t2ilearn.tokens import PAD
from t2ilearn.training import TrainingError


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A folder called `zoo` with 24 pictures and captions no grammar of ours knows."""
    folder = tmp_path_factory.mktemp("own") / "zoo"
    folder.mkdir()
    pictures = Shapes(32).sample(24, generator=torch.Generator().manual_seed(0)).pictures
    rows = [("file", "caption")]
    for number, picture in enumerate(pictures):
        pixels = picture.add(1).mul(127.5).byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / f"{number}.png")
        rows.append((f"{number}.png", f"Kätzchen Nr. {number}, 猫 on the sofa"))
    with open(folder / "captions.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)
    return folder


@pytest.fixture(scope="module")
def runs(own, tmp_path_factory):
    """The folder of a finished VQ-VAE and prior, a few steps each."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(recipes.CODES_PER_WORLD, "folder", 64)
        small = replace(RECIPES["prior", "tiny"].model, width=32, depth=1, heads=2)
        patch.setitem(RECIPES, ("prior", "tiny"), replace(RECIPES["prior", "tiny"], model=small))
        for system in ("vqvae", "prior"):
            train_system(system, "tiny", folder, data=own, steps=8, progress=False)
    return folder


def test_cards_tell_of_the_folder(runs):
    vqvae = weights.load(runs / "vqvae-tiny" / "vqvae-tiny.safetensors").card
    prior = weights.load(runs / "prior-tiny" / "prior-tiny.safetensors").card
    assert vqvae["data"]["world"] == prior["data"]["world"] == "folder"
    assert prior["command"] == "t2ilearn train prior --preset tiny --data zoo --steps 8"
    assert vqvae["metrics"]["PSNR, dB"]["value"] > 0
    assert "judge on reconstructions" not in vqvae["metrics"]
    assert prior["metrics"]["nats a code"]["value"] > 0
    assert prior["metrics"]["vqvae"] == vqvae["sha256"]


def test_the_tokenizer_lies_beside_the_prior_and_is_the_one_it_learned_from(runs):
    path = runs / "prior-tiny" / "prior-tiny.safetensors"
    card = weights.load(path).card
    tokenizer = load_tokenizer(path)
    assert isinstance(tokenizer, CaptionTokenizer)
    assert tokenizer.vocabulary == card["config"]["vocabulary"]
    assert tokenizer.length == card["config"]["text_length"] == card["tokenizer"]["length"] == 32
    file = path.with_name("tokenizer.json")
    kept = file.read_bytes()
    try:
        file.write_bytes(kept.replace(b'"merges": [', b'"merges":  [', 1))
        with pytest.raises(weights.WeightsError, match="not the tokenizer"):
            load_tokenizer(path)
        file.unlink()
        with pytest.raises(weights.WeightsError, match="no tokenizer"):
            load_tokenizer(path)
    finally:
        file.write_bytes(kept)


def test_it_draws_from_any_caption_and_redraws(runs, tmp_path):
    system = str(runs / "prior-tiny")
    assert len(draw("a purple dog", system=system, count=1).pictures) == 1  # words it never met
    drawing = draw("Kätzchen 猫, on the sofa", system=system, count=2, seed=3)
    assert drawing.pictures.shape == (2, 3, 32, 32) and drawing.aligned == []
    assert "as stated" not in repr(drawing) + drawing._repr_html_()
    again = redraw(drawing.save(tmp_path / "d.png"))
    assert torch.equal(again.pictures, drawing.pictures)


def test_what_cannot_be_drawn_is_refused(runs, tmp_path):
    system = str(runs / "prior-tiny")
    with pytest.raises(CaptionError, match="empty"):
        draw("", system=system)
    with pytest.raises(CaptionError, match="at most"):
        draw("猫" * 200, system=system)
    for wrong in (str(runs), str(runs / "vqvae-tiny"), str(tmp_path / "prior-tiny"), "nonsense"):
        with pytest.raises(ValueError, match="Unknown system"):
            draw("a cat", system=wrong)


def test_codes_of_another_vqvae_are_refused(runs, tmp_path):
    for name in ("vqvae-tiny", "prior-tiny"):
        (tmp_path / name).mkdir()
        for file in (runs / name).glob("*.*"):
            if file.is_file():
                (tmp_path / name / file.name).write_bytes(file.read_bytes())
    card = tmp_path / "prior-tiny" / "prior-tiny.json"
    facts = json.loads(card.read_text(encoding="utf-8"))
    facts["metrics"]["vqvae"] = "0" * 64
    card.write_text(json.dumps(facts), encoding="utf-8")
    with pytest.raises(weights.WeightsError, match="another VQ-VAE"):
        load_system(str(tmp_path / "prior-tiny"))


def test_runs_go_to_a_folder_of_their_own(own, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = train_system("vqvae", "tiny", data=own, steps=2, progress=False)
    assert path.parent.parent.resolve() == tmp_path / "runs" / "zoo"


@pytest.mark.parametrize("kind", [TransformerPrior, PixelCNN])
def test_room_for_longer_captions_changes_no_answer(kind, generator):
    """What a fitted tokenizer leaves free is padding, and nobody looks at padding."""
    sizes = PriorConfig(codes=16, side=3, width=16, depth=2, heads=2, vocabulary=20, text_length=6)
    tight, roomy = kind(sizes).eval(), kind(replace(sizes, text_length=12)).eval()
    state, own = tight.state_dict(), roomy.state_dict()["position"]
    at = 6  # the places of codes, where they follow, come after those of words
    state["position"] = torch.cat([state["position"][:at], own[at:12], state["position"][at:]])
    roomy.load_state_dict(state)
    codes = torch.randint(16, (3, 9), generator=generator)
    caption = torch.randint(3, 20, (3, 6), generator=generator)
    caption[0, 4:] = PAD
    with torch.no_grad():
        expected = tight(codes, caption)
        found = roomy(codes, F.pad(caption, (0, 6), value=PAD))
    torch.testing.assert_close(found, expected)


def test_a_run_goes_on_only_with_what_it_began_with(own, tmp_path):
    """New pictures, or a new VQ-VAE, under an old checkpoint would be mixed in silence."""
    zoo = tmp_path / "zoo"
    shutil.copytree(own, zoo)
    train_system("vqvae", "tiny", tmp_path / "runs", data=zoo, steps=2, progress=False)
    train_system("vqvae", "tiny", tmp_path / "runs", data=zoo, steps=2, progress=False)
    with open(zoo / "captions.csv", "a", encoding="utf-8") as file:
        file.write("0.png,one more caption\n")
    with pytest.raises(TrainingError, match="learned from something else .pictures and captions"):
        train_system("vqvae", "tiny", tmp_path / "runs", data=zoo, steps=2, progress=False)


def test_a_prior_is_not_resumed_over_another_vqvae(runs, own, tmp_path):
    shutil.copytree(runs, tmp_path / "runs")
    path = tmp_path / "runs" / "prior-tiny" / "learns_from.json"
    facts = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**facts, "vqvae": "0" * 64}), encoding="utf-8")
    with pytest.raises(TrainingError, match="something else .vqvae"):
        train_system("prior", "tiny", tmp_path / "runs", data=own, steps=8, progress=False)


def test_a_folder_out_of_order_and_readers_are_refused(own, tmp_path):
    with pytest.raises(FolderError, match="no captions.csv"):
        train_system("vqvae", "tiny", tmp_path, data=tmp_path)
    with pytest.raises(ValueError, match="Readers learn the shapes world alone"):
        train_system("judge", "book", tmp_path, data=own)
    assert not (tmp_path / "judge").exists()


def test_a_caption_too_long_to_learn_is_refused_before_the_first_step(own, tmp_path):
    zoo = tmp_path / "zoo"
    shutil.copytree(own, zoo)
    with open(zoo / "captions.csv", "a", encoding="utf-8") as file:
        file.write(f"0.png,once upon a time {'猫' * 99}\n")
    with pytest.raises(CaptionError, match=r"shorter:\n  \d+ tokens: 'once upon a time"):
        train_system("vqvae", "tiny", tmp_path / "runs", data=zoo, steps=2, progress=False)
    assert not (tmp_path / "runs").exists()
