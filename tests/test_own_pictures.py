"""Training on a folder of pictures, from the table of captions to a drawing, and what is refused.

The models are a few thousand parameters: what is tested is the path, not what they learn.
"""

import csv
import json
import shutil
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from t2ilearn import weights
from t2ilearn.data import CaptionError, CaptionTokenizer, FolderError, Shapes
from t2ilearn.data.pixels import bytes_from_pictures
from t2ilearn.drawing import draw, redraw
from t2ilearn.models.pixelcnn import PixelCNN
from t2ilearn.models.tokens import PAD
from t2ilearn.models.transformer import PriorConfig, TransformerPrior
from t2ilearn.systems import registry, token_training
from t2ilearn.systems.plan import train_system
from t2ilearn.systems.registry import STAGES
from t2ilearn.systems.tokens import load_text_tokenizer
from t2ilearn.training import TrainingError

QUIET = {"steps": 2, "progress": False}
TINY_SIZES = {
    "vqvae": {"channels": (8, 8), "codebook_size": 32, "code_dim": 4},
    "prior": {"codebook_size": 32, "dim": 16, "num_layers": 1, "num_heads": 2},
}


@pytest.fixture(scope="module", autouse=True)
def tiny_models():
    """The preset "tiny" with smaller models and batches, and few pictures encoded for a prior."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(token_training.PICTURES_PER_WORLD, "folder", 64)
        for name, sizes in TINY_SIZES.items():
            recipe = STAGES[name].presets["tiny"]
            recipe = replace(
                recipe,
                model=replace(recipe.model, **sizes),
                train=replace(recipe.train, batch_size=8),
            )
            patch.setitem(STAGES[name].presets, "tiny", recipe)
        yield


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A folder called `zoo` with 24 pictures and captions that none of our grammars reads."""
    folder = tmp_path_factory.mktemp("own") / "zoo"
    folder.mkdir()
    pictures = Shapes(32).sample(24, generator=torch.Generator().manual_seed(0)).pictures
    rows = [("file", "caption")]
    for number, picture in enumerate(bytes_from_pictures(pictures)):
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(folder / f"{number}.png")
        rows.append((f"{number}.png", f"Kätzchen Nr. {number}, 猫 on the sofa"))
    with open(folder / "captions.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)
    return folder


@pytest.fixture(scope="module")
def runs(own, tmp_path_factory):
    """The folder of a finished VQ-VAE and prior, a few steps each."""
    folder = tmp_path_factory.mktemp("runs")
    train_system("vqvae", "tiny", folder, data=own, steps=4, progress=False)
    return folder


@pytest.fixture
def copied_runs(runs, tmp_path):
    """The same without checkpoints, to be changed."""
    for name in ("vqvae-tiny", "prior-tiny"):
        (tmp_path / name).mkdir()
        for file in (runs / name).glob("*.*"):
            if file.is_file():
                shutil.copy(file, tmp_path / name)
    return tmp_path


@pytest.fixture
def zoo(own, tmp_path):
    """A copy of the folder of pictures, to be changed."""
    return shutil.copytree(own, tmp_path / "zoo")


def add_caption(folder, caption):
    with open(folder / "captions.csv", "a", encoding="utf-8") as file:
        file.write(f"0.png,{caption}\n")


def test_cards_describe_the_run_on_a_folder(runs):
    vqvae = weights.load(runs / "vqvae-tiny" / "vqvae-tiny.safetensors").card
    prior = weights.load(runs / "prior-tiny" / "prior-tiny.safetensors").card
    assert vqvae.data["world"] == prior.data["world"] == "folder"
    command = "t2ilearn train vqvae --preset tiny --stage prior --data zoo --steps 4"
    assert prior.command == command
    assert vqvae.metrics["PSNR, dB"]["value"] > 0
    assert "judge on reconstructions" not in vqvae.metrics
    assert prior.metrics["nats a token"]["value"] > 0
    assert prior.parents == {"vqvae": vqvae.sha256}


def test_the_tokenizer_is_saved_beside_the_prior_and_checked(copied_runs):
    path = copied_runs / "prior-tiny" / "prior-tiny.safetensors"
    card = weights.load(path).card
    tokenizer = load_text_tokenizer(path, card)
    assert isinstance(tokenizer, CaptionTokenizer)
    sizes = weights.make_config(PriorConfig, weights.load(path))
    assert tokenizer.vocabulary == sizes.vocabulary
    assert tokenizer.length == sizes.text_length == card.tokenizer["length"] == 32
    file = path.with_name("tokenizer.json")
    file.write_bytes(file.read_bytes().replace(b'"merges": [', b'"merges":  [', 1))
    with pytest.raises(weights.WeightsError, match="not the tokenizer"):
        load_text_tokenizer(path, card)
    file.unlink()
    with pytest.raises(weights.WeightsError, match="no tokenizer"):
        load_text_tokenizer(path, card)


def test_any_caption_can_be_drawn_and_redrawn(runs, tmp_path):
    system = str(runs / "prior-tiny")
    assert len(draw("a purple dog", system=system, count=1).pictures) == 1  # unknown words
    drawing = draw("Kätzchen 猫, on the sofa", system=system, count=2, seed=3)
    assert drawing.pictures.shape == (2, 3, 32, 32) and drawing.aligned == []
    assert "as stated" not in repr(drawing) + drawing._repr_html_()
    again = redraw(drawing.save(tmp_path / "d.png"))
    assert torch.equal(again.pictures, drawing.pictures)


def test_captions_and_folders_that_cannot_be_drawn_are_refused(runs, tmp_path):
    system = str(runs / "prior-tiny")
    with pytest.raises(CaptionError, match="empty"):
        draw("", system=system)
    with pytest.raises(CaptionError, match="at most"):
        draw("猫" * 200, system=system)
    for wrong in (str(runs), str(runs / "vqvae-tiny"), str(tmp_path / "prior-tiny"), "nonsense"):
        with pytest.raises(ValueError, match="Unknown system"):
            draw("a cat", system=wrong)


def test_a_prior_over_the_tokens_of_another_vqvae_is_refused(copied_runs):
    card = copied_runs / "prior-tiny" / "prior-tiny.json"
    facts = json.loads(card.read_text(encoding="utf-8"))
    facts["parents"]["vqvae"] = "0" * 64
    card.write_text(json.dumps(facts), encoding="utf-8")
    with pytest.raises(weights.WeightsError, match="trained on top of"):
        registry.load(copied_runs / "prior-tiny")


def test_runs_on_a_folder_are_kept_under_its_name(own, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = train_system("vqvae", "tiny", stage="vqvae", data=own, **QUIET)
    assert path.parent.parent.resolve() == tmp_path / "runs" / "zoo"


@pytest.mark.parametrize("kind", [TransformerPrior, PixelCNN])
def test_padding_to_a_longer_text_length_does_not_change_the_logits(kind, generator):
    """A tokenizer pads captions to its length, and padding is masked."""
    sizes = PriorConfig(16, 3, dim=16, num_layers=2, num_heads=2, vocabulary=20, text_length=6)
    tight, roomy = kind(sizes).eval(), kind(replace(sizes, text_length=12)).eval()
    state, own = tight.state_dict(), roomy.state_dict()["position"]
    at = 6  # positions of image tokens, where there are any, follow those of text tokens
    state["position"] = torch.cat([state["position"][:at], own[at:12], state["position"][at:]])
    roomy.load_state_dict(state)
    tokens = torch.randint(16, (3, 9), generator=generator)
    caption = torch.randint(3, 20, (3, 6), generator=generator)
    caption[0, 4:] = PAD
    with torch.no_grad():
        expected = tight(tokens, caption)
        found = roomy(tokens, F.pad(caption, (0, 6), value=PAD))
    torch.testing.assert_close(found, expected)


def test_a_run_is_not_resumed_with_other_pictures(zoo, tmp_path):
    """To go on under an old checkpoint would mix two sets of pictures silently."""
    options = {"stage": "vqvae", "data": zoo, **QUIET}
    train_system("vqvae", "tiny", tmp_path / "runs", **options)
    train_system("vqvae", "tiny", tmp_path / "runs", **options)
    add_caption(zoo, "one more caption")
    with pytest.raises(TrainingError, match="learned from something else .pictures and captions"):
        train_system("vqvae", "tiny", tmp_path / "runs", **options)


def test_a_run_is_resumed_after_captions_csv_became_metadata_csv(zoo, tmp_path):
    """The pictures and captions are the same, whatever their table is called."""
    options = {"stage": "vqvae", "data": zoo, **QUIET}
    train_system("vqvae", "tiny", tmp_path / "runs", **options)
    table = (zoo / "captions.csv").read_text(encoding="utf-8")
    (zoo / "captions.csv").unlink()
    table = table.replace("file,caption", "file_name,text", 1)
    (zoo / "metadata.csv").write_text(table, encoding="utf-8")
    train_system("vqvae", "tiny", tmp_path / "runs", **options)


def test_a_prior_is_not_resumed_with_another_vqvae(copied_runs, own):
    path = copied_runs / "prior-tiny" / "inputs.json"
    facts = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**facts, "vqvae": "0" * 64}), encoding="utf-8")
    with pytest.raises(TrainingError, match="something else .vqvae"):
        train_system("vqvae", "tiny", copied_runs, stage="prior", data=own, **QUIET)


def test_bad_folders_and_stages_that_read_attributes_are_refused(own, tmp_path):
    with pytest.raises(FolderError, match="no captions.csv"):
        train_system("vqvae", "tiny", tmp_path, data=tmp_path, **QUIET)
    with pytest.raises(ValueError, match="judge learns from our own worlds alone"):
        train_system("readers", "book", tmp_path, stage="judge", data=own, **QUIET)
    assert not list(tmp_path.iterdir())


def test_captions_with_too_many_tokens_are_refused_before_the_first_step(zoo, tmp_path):
    unlike = "".join(chr(0x4E00 + number) for number in range(99))  # nothing that BPE could merge
    add_caption(zoo, f"once upon a time {unlike}")
    with pytest.raises(CaptionError, match=r"shorter:\n  \d+ tokens: 'once upon a time"):
        train_system("vqvae", "tiny", tmp_path / "runs", data=zoo, **QUIET)
    assert not (tmp_path / "runs").exists()
