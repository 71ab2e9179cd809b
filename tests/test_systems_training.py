"""From a recipe to weights and a card: written is what was trained, and what was measured."""

import json
import shutil
import signal
from dataclasses import asdict, replace

import pytest
import torch
from tiny_systems import QUIET, tiny_systems

from t2ilearn import training, weights
from t2ilearn.data import Emoji, Shapes, TinyShapes
from t2ilearn.data.bpe import SHARED_LENGTH
from t2ilearn.drawing import complete, draw
from t2ilearn.judging.reader import Reader
from t2ilearn.judging.report import against_bars
from t2ilearn.models.dalle import DALLE
from t2ilearn.models.dvae import DVAE, kl_weight_at, temperature_at
from t2ilearn.models.pixelcnn import PixelCNN
from t2ilearn.models.transformer import TransformerPrior
from t2ilearn.models.vqgan import Discriminator, VQGANWithDiscriminator
from t2ilearn.models.vqvae import VQVAE
from t2ilearn.systems import STAGES, dalle, load, load_part, readers, token_training, train_system
from t2ilearn.systems import vqgan as vqgan_system
from t2ilearn.systems.readers import degrade
from t2ilearn.systems.stage import encode_world

RECIPES = {(s.name, p): recipe for s in STAGES.values() for p, recipe in s.presets.items()}
MODELS = {
    "vqvae": VQVAE.from_config,
    "vqgan": VQVAE.from_config,
    "pixelcnn": PixelCNN,
    "prior": TransformerPrior,
    "vqgan-prior": TransformerPrior,
    "dvae": DVAE,
    "dalle": DALLE,
    "dalle-dvae": DALLE,
}


@pytest.fixture
def quick():
    """Small models and short evaluations; returns what evaluation was asked."""
    with tiny_systems() as asked:
        yield asked


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A VQ-VAE of 12 steps with its prior, a VQGAN and a dVAE of 4, once for all tests here; and
    what evaluation was asked."""
    folder = tmp_path_factory.mktemp("runs")
    with tiny_systems() as asked:
        train_system("vqvae", "tiny", folder, steps=12, **QUIET)
        for stage in ("vqgan", "dvae"):
            train_system("dalle", "tiny", folder, stage=stage, steps=4, **QUIET)
    return folder, asked


def weights_in(runs, name):
    """A run's weights with their card."""
    return weights.load(runs / name / f"{name}.safetensors")


def curves_of(runs, name):
    """A run's curves by the name of their term."""
    return json.loads((runs / name / "flight.json").read_text(encoding="utf-8"))["curves"]


def assert_same_weights(mine, theirs):
    for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)


# --- recipes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", MODELS)
def test_each_stage_has_both_presets_within_their_budgets(stage):
    """0.2 M of a prior's parameters embed text tokens; a VQGAN's discriminator does not draw, and
    is counted apart. A dVAE's encoder gives a logit for each code vector."""
    most = dict.fromkeys(MODELS, 2.7e6) | {"vqvae": 1.6e6, "vqgan": 1.6e6, "dvae": 1.8e6}
    sizes = {
        preset: sum(p.numel() for p in MODELS[stage](RECIPES[stage, preset].model).parameters())
        for preset in ("tiny", "book")
    }
    assert sizes["tiny"] < 0.5e6 and sizes["tiny"] < sizes["book"] <= most[stage]


def test_no_stage_but_the_judges_trains_on_held_out_pairs():
    held_out_too = {key for key, recipe in RECIPES.items() if recipe.split != "train"}
    assert held_out_too == {("judge", "book"), ("emoji-judge", "book")}


def test_a_vqgan_has_the_sizes_of_the_vqvae_so_that_bits_are_equal():
    for preset in ("tiny", "book"):
        assert RECIPES["vqgan", preset].model == RECIPES["vqvae", preset].model
        (config,) = RECIPES["vqgan", preset].other_configs
        assert sum(p.numel() for p in Discriminator(config).parameters()) < 0.3e6


def test_each_ablation_trains_without_one_part_of_the_loss(tmp_path, quick):
    whole = RECIPES["vqgan", "tiny"]
    lacking = {name: RECIPES[name, "tiny"].settings["loss"] for name in vqgan_system.ABLATIONS}
    assert lacking["vqgan-no-discriminator"].disc_weight == 0
    assert lacking["vqgan-no-perceptual"].perceptual_weight == 0
    assert lacking["vqgan-fixed-weight"].adaptive is False
    assert all(RECIPES[name, "tiny"].train == whole.train for name in lacking)
    name = "vqgan-no-discriminator"
    path = train_system("vqgan", "tiny", tmp_path, stage=name, steps=4, **QUIET)
    assert path.parent.name == f"{name}-tiny"
    assert weights.load(path).card.settings["loss"]["disc_weight"] == 0


# --- stage one ---------------------------------------------------------------------------------


def test_a_run_writes_weights_that_load_and_a_card_that_was_measured_on_them(runs):
    folder, asked = runs
    path = folder / "vqvae-tiny" / "vqvae-tiny.safetensors"
    card = weights.load(path).card
    assert card.steps == 12 and card.precision == "no" and len(card.legs) == 1
    assert card.command == "t2ilearn train vqvae --preset tiny --stage vqvae --steps 12"
    assert {"python", "torch", "t2ilearn"} <= set(card.legs[0].versions)
    assert card.metrics["judge on real pictures"]["value"] > 0.9
    # float16 on disk: what was measured is what comes back, not what was trained.
    (measured, _), loaded = asked[0], load_part(path)
    assert_same_weights(measured, loaded)
    assert sum(p.numel() for p in loaded.parameters()) == card.parameters


def test_a_card_states_everything_that_decided_the_run(runs):
    """Settings, data, parents and the legs with what ran them."""
    folder, _ = runs
    tokenizer, prior = weights_in(folder, "vqvae-tiny").card, weights_in(folder, "prior-tiny").card
    config = replace(RECIPES["prior", "tiny"].train, steps=12, batch_size=8)
    assert prior.settings == json.loads(json.dumps(asdict(config)))
    assert prior.data == {"world": "tiny-shapes", "split": "train", "seed": 0}
    assert prior.parents == {"vqvae": tokenizer.sha256} and tokenizer.parents == {}
    assert [leg.started_from for leg in prior.legs] == [None]
    assert prior.legs[0].steps == 12 and prior.legs[0].device and prior.legs[0].minutes >= 0
    assert prior.configs["PriorConfig"]["dim"] == 16
    gan = weights_in(folder, "vqgan-tiny").card
    assert gan.parents == {"reader": weights.load("reader").card.sha256}
    assert set(gan.configs) == {"VQVAEConfig", "DiscriminatorConfig"}


def test_a_vqgan_and_its_discriminator_come_back_from_one_file(tmp_path, quick):
    path = train_system("vqgan", "tiny", tmp_path, stage="vqgan", steps=12, **QUIET)
    card = weights.load(path).card
    assert list(card.parents) == ["reader"]  # never a judge
    assert card.configs["DiscriminatorConfig"]["channels"] == 16
    assert card.settings["loss"]["disc_start"] == 0.4
    assert card.metrics["judge on real pictures"]["value"] > 0.9
    (measured, _), discriminator = quick[0], load_part(path, "discriminator")
    assert isinstance(discriminator, Discriminator) and not discriminator.training
    generator = load_part(path)
    assert isinstance(generator, VQVAE) and not generator.training
    assert_same_weights(measured, generator)
    curves = curves_of(tmp_path, "vqgan-tiny")
    wanted = {"adaptive_weight", "discriminator_loss", "logits_real", "logits_fake"}
    assert wanted <= set(curves)
    trained = [loss != 0 for loss in curves["discriminator_loss"]]
    assert not any(trained[:4]) and all(trained[5:])  # it starts after 0.4 of 12 steps


def test_a_vqgan_stopped_by_ctrl_c_goes_on_bit_for_bit(tmp_path, quick, monkeypatch):
    """A checkpoint holds generator and discriminator, their optimiser and running statistics."""
    how = {"stage": "vqgan", "steps": 12, **QUIET}
    whole = train_system("vqgan", "tiny", tmp_path / "whole", **how)
    real, calls = VQGANWithDiscriminator.forward, []

    def stop_once(self, *args):
        calls.append(args)
        if len(calls) == 8:
            signal.raise_signal(signal.SIGINT)
        return real(self, *args)

    monkeypatch.setattr(VQGANWithDiscriminator, "forward", stop_once)
    partial = weights.load(train_system("vqgan", "tiny", tmp_path / "parts", **how)).card
    assert partial.steps == 8 and partial.metrics == {}
    again = train_system("vqgan", "tiny", tmp_path / "parts", **how)
    before, after = weights.load(whole).state, weights.load(again).state
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_a_dvae_is_trained_by_its_schedules_and_comes_back(tmp_path, quick, monkeypatch):
    """Temperature and KL weight follow the share of the training that is done."""
    temperatures, kl_weights = [], []
    monkeypatch.setattr(
        dalle, "temperature_at", lambda done: temperatures.append(done) or temperature_at(done)
    )
    monkeypatch.setattr(
        dalle,
        "kl_weight_at",
        lambda done, top: kl_weights.append((done, top)) or kl_weight_at(done, top),
    )
    path = train_system("dalle-dvae", "tiny", tmp_path, stage="dvae", steps=8, **QUIET)
    card = weights.load(path).card
    top = RECIPES["dvae", "tiny"].settings["kl_weight"]
    assert temperatures == [i / 8 for i in range(8)]
    assert kl_weights == [(i / 8, top) for i in range(8)] and card.settings["kl_weight"] == top
    assert card.stage == "dvae" and card.steps == 8 and card.bars == {}
    assert card.metrics["judge on real pictures"]["value"] > 0.9
    (measured, _), loaded = quick[0], load_part(path)
    assert isinstance(loaded, DVAE) and not loaded.training
    assert_same_weights(measured, loaded)
    assert sum(p.numel() for p in loaded.parameters()) == card.parameters
    curves = curves_of(tmp_path, "dvae-tiny")
    first = [curves[term][0] for term in ("reconstruction", "kl", "total")]
    assert first[0] == first[2] and first[1] > 0  # β is 0 at first


def test_the_codebook_starts_after_the_warm_up_and_not_before(tmp_path, quick, monkeypatch):
    """Of 40 steps ten do not quantize; k-means is called once, just before the others."""
    calls, quantized = [], []
    forward = VQVAE.forward
    monkeypatch.setattr(
        VQVAE, "kmeans_init", lambda self, x, generator: calls.append((len(quantized), len(x)))
    )
    monkeypatch.setattr(
        VQVAE, "forward", lambda self, x, q=True: quantized.append(q) or forward(self, x, q)
    )
    train_system("vqvae", "tiny", tmp_path, stage="vqvae", steps=40, **QUIET)
    assert quantized[:40] == [False] * 10 + [True] * 30 and calls == [(10, 256)]


# --- stage two ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "stage, kind", [("prior", TransformerPrior), ("pixelcnn", PixelCNN), ("vqgan-prior", None)]
)
def test_a_prior_is_trained_on_the_tokens_of_this_folder_and_draws(runs, quick, stage, kind):
    folder, _ = runs
    first = "vqgan" if stage == "vqgan-prior" else "vqvae"
    if stage != "prior":  # which the fixture trained
        train_system("all", "tiny", folder, stage=stage, steps=2, **QUIET)
    stored = weights_in(folder, f"{stage}-tiny")
    assert stored.card.parents == {first: weights_in(folder, f"{first}-tiny").card.sha256}
    assert isinstance(load_part(stored.path), kind or TransformerPrior)
    shares = [v for k, v in stored.card.metrics.items() if k.startswith("test-full, as")]
    assert len(shares) == 2 and all(0 <= s["value"] <= 1 for s in shares)
    system = load(stored.path.parent)
    assert isinstance(system.parts["tokenizer"], VQVAE)
    assert draw("a star", system=stored.path.parent, count=2).pictures.shape == (2, 3, 32, 32)


@pytest.mark.parametrize("stage", ["dalle", "dalle-dvae"])
def test_dalle_is_trained_on_tokens_of_either_kind_and_draws(runs, quick, monkeypatch, stage):
    folder, _ = runs
    first = {"dalle": "vqgan", "dalle-dvae": "dvae"}[stage]
    seen, real = [], dalle.dalle_loss
    monkeypatch.setattr(dalle, "dalle_loss", lambda *args: seen.append(args) or real(*args))
    path = train_system(stage, "tiny", folder, stage=stage, steps=3, **QUIET)
    card = weights.load(path).card
    assert path.parent.name == f"{stage}-tiny" and card.stage == stage
    assert card.parents == {first: weights_in(folder, f"{first}-tiny").card.sha256}
    for count in (1, 2, 4, 8):
        chosen = card.metrics[f"test-full, best of {count} by the reader"]
        assert 0 <= chosen["value"] <= 1 and chosen["low"] <= chosen["value"] <= chosen["high"]
    assert len([k for k in card.metrics if k.startswith("test-full, as")]) == 2
    curves = curves_of(folder, f"{stage}-tiny")
    text, image, total = (curves[term][0] for term in ("text", "image", "total"))
    assert total == pytest.approx(text / 8 + 7 * image / 8, rel=1e-6)
    _, captions, tokens = seen[0]
    assert captions.shape == (8, 24) and tokens.shape == (8, 64)
    system = load(path.parent)
    assert isinstance(system.parts["prior"], DALLE)
    assert isinstance(system.parts["tokenizer"], {"vqgan": VQVAE, "dvae": DVAE}[first])
    drawn = draw("a star", system=path.parent, count=2, best_of=2, top_k=9)
    assert drawn.pictures.shape == (2, 3, 32, 32)
    done = complete(drawn.pictures[0], system=path.parent, count=2, rows=5)
    assert done.pictures.shape == (2, 3, 32, 32)


def test_dalle_gets_corrupted_tokens_and_predicts_the_right_ones(
    runs, quick, monkeypatch, tmp_path
):
    noisy = {name for (name, _), r in RECIPES.items() if r.settings.get("token_noise")}
    assert noisy == {"dalle", "dalle-dvae"}
    given, wanted, real = [], [], dalle.dalle_loss

    def all_zero(tokens, size, max_share, generator):
        given.append(tokens)
        assert size == 32 and max_share == 0.4
        return torch.zeros_like(tokens)

    monkeypatch.setattr(token_training, "corrupt_tokens", all_zero)
    monkeypatch.setattr(dalle, "dalle_loss", lambda s, c, q: wanted.append(q) or real(s, c, q))
    monkeypatch.setattr(dalle, "measure_prior", lambda *_: {"test-full, as drawn": 0.0})
    shutil.copytree(runs[0] / "vqgan-tiny", tmp_path / "vqgan-tiny")
    train_system("dalle", "tiny", tmp_path, stage="dalle", steps=2, **QUIET)
    assert len(given) == 2 and all(torch.equal(a, b) for a, b in zip(given, wanted, strict=True))


def test_pictures_of_a_world_are_encoded_once_and_in_order():
    model, world = VQVAE.from_config(RECIPES["vqvae", "tiny"].model).eval(), TinyShapes()
    scenes, tokens = encode_world(model, world, 30, seed=5)
    again, same = encode_world(model, world, 30, seed=5)
    assert tokens.shape == (30, 64) and torch.equal(scenes, again) and torch.equal(tokens, same)


@pytest.mark.slow
def test_one_model_learns_both_worlds(tmp_path, quick, monkeypatch):
    """VQ-VAE and prior of `book`, small and for a few steps: their cards have figures of both."""
    sizes = {
        "vqvae": {"channels": (8, 8, 8), "codebook_size": 64},
        "prior": {"codebook_size": 64, "dim": 16, "num_layers": 1, "num_heads": 2},
    }
    for name, small in sizes.items():
        recipe = RECIPES[name, "book"]
        recipe = replace(recipe, model=replace(recipe.model, **small))
        monkeypatch.setitem(STAGES[name].presets, "book", recipe)
    monkeypatch.setitem(token_training.PICTURES_PER_WORLD, "shapes + emoji", 60)
    run = train_system("vqvae", "book", tmp_path, steps=3, **QUIET).parent
    cards = [weights_in(tmp_path, name).card for name in ("vqvae-book", "prior-book")]
    assert [card.data["world"] for card in cards] == ["shapes + emoji"] * 2
    assert {"PSNR, dB", "emoji, PSNR, dB, held-out"} <= set(cards[0].metrics)
    assert {"test-full, as drawn", "emoji, style, seen, as drawn"} <= set(cards[1].metrics)
    assert not any(bar["met"] for bar in cards[1].bars.values())
    system = load(run)
    assert system.worlds == ("shapes", "emoji") and system.text_tokenizer.length == SHARED_LENGTH
    for caption in ("a small red star", "a puppy, flat"):
        assert len(draw(caption, system=run, count=2, best_of=2).aligned) == 2


# --- readers -----------------------------------------------------------------------------------


def small_reader(monkeypatch, name, **train):
    """A reader's recipe with a network of a few thousand parameters, for two steps."""
    recipe = RECIPES[name, "book"]
    model = replace(recipe.model, channels=(16, 16), features=32)
    recipe = replace(recipe, model=model, train=replace(recipe.train, steps=2, **train))
    monkeypatch.setitem(STAGES[name].presets, "book", recipe)
    return recipe


def test_readers_are_trained_on_damaged_pictures_and_junk(tmp_path, quick, monkeypatch):
    small_reader(monkeypatch, "reader", batch_size=24)
    path = train_system("readers", "book", tmp_path, stage="reader", **QUIET)
    card = weights.load(path).card
    assert path.parent.name == "reader"  # of one size, and called after nothing else
    assert card.data["split"] == "train" and card.data["seed"] == 1
    assert {"real", "jpeg 50", "floor (captions shuffled)"} <= set(card.metrics)


def test_the_emoji_judge_is_trained_on_all_drawings_and_on_junk(tmp_path, quick, monkeypatch):
    concepts = readers.CONCEPTS
    assert len(Emoji().concepts) == concepts
    config = RECIPES["emoji-judge", "book"].model
    assert config.answers == (concepts + 1, 5, 4)
    assert sum(p.numel() for p in Reader(config).parameters()) <= 0.8e6
    small_reader(monkeypatch, "emoji-judge")
    every = Emoji.each_once
    monkeypatch.setattr(Emoji, "each_once", lambda self, g: every(self, g)[::40])
    seen, loss = [], readers.reader_loss
    monkeypatch.setattr(readers, "reader_loss", lambda a, b: seen.append(b) or loss(a, b))
    path = train_system("readers", "book", tmp_path, stage="emoji-judge", **QUIET)
    card = weights.load(path).card
    assert card.data == {"world": "emoji", "split": "all", "seed": 0}
    assert {"concept, real", "style, real", "concept, jpeg 50"} <= set(card.metrics)
    assert not card.bars["concept, real"]["met"]
    junk, real = seen[0][:10], seen[0][10:]
    assert (junk[:, 0] == concepts).all() and (junk[:, 1:] == -1).all()
    assert (real[:, 0] < concepts).all() and (real >= 0).all()


def test_degrade_keeps_the_range_and_some_pictures_as_they_are(generator):
    pictures = Shapes().sample(60, generator=generator).pictures
    before = pictures.clone()
    damaged = degrade(pictures, generator)
    same = (damaged == pictures).flatten(1).all(1).float().mean()
    assert torch.equal(pictures, before) and damaged.abs().max() <= 1
    assert 0.05 < same < 0.35


# --- cards and errors --------------------------------------------------------------------------


def test_cards_state_which_bars_are_missed():
    metrics = {"a": 0.5, "b": {"value": 0.9, "half_width": 0.1}, "c": 3.0}
    bars = against_bars(metrics, {"a": 0.6, "b": 0.9})
    assert bars == {
        "a": {"bar": 0.6, "measured": 0.5, "met": False},
        "b": {"bar": 0.9, "measured": 0.9, "met": True},
    }


@pytest.mark.parametrize(
    "system, preset, stage, message",
    [
        ("vqave", "tiny", None, "nothing to train under the name 'vqave'. There are: readers, vqv"),
        ("vqvae", "huge", None, "vqvae has no preset 'huge'. There are: tiny, book"),
        ("vqvae", "tiny", "priro", "Unknown stage 'priro'. There are: judge, .*prior"),
        ("vqgan", "book", "vqgan-no-perceptual", "no preset 'book'. There are: tiny"),
    ],
)
def test_unknown_systems_stages_and_presets_list_what_there_is(
    tmp_path, system, preset, stage, message
):
    with pytest.raises(ValueError, match=message):
        train_system(system, preset, tmp_path, stage=stage)
    assert not list(tmp_path.iterdir())


def test_a_reader_of_one_size_is_trained_by_any_preset(tmp_path, quick, monkeypatch):
    small_reader(monkeypatch, "reader", batch_size=24)
    path = train_system("readers", "tiny", tmp_path, stage="reader", **QUIET)
    assert weights.load(path).card.preset == "book"


def test_a_run_without_a_single_step_writes_no_weights(tmp_path, quick, monkeypatch):
    def interrupted(step, generator):
        raise KeyboardInterrupt

    real = training.loop.batches
    monkeypatch.setattr(
        training.loop, "batches", lambda make, run, progress: real(interrupted, run, progress)
    )
    with pytest.raises(training.TrainingError, match="stopped before its first step"):
        train_system("vqvae", "tiny", tmp_path, steps=6, **QUIET)
    assert not (tmp_path / "vqvae-tiny" / "vqvae-tiny.safetensors").exists()
