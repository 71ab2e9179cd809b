"""What `t2ilearn train` runs and what it skips, and what it refuses to mix: runs that learned from
different things, weights that were trained anew in between, and files of the first edition."""

import hashlib
import json
import os
import shutil
from dataclasses import replace

import pytest
import torch
from PIL import Image
from tiny_systems import QUIET, tiny_systems
from typer.testing import CliRunner

from t2ilearn import cli, weights
from t2ilearn.data import Shapes
from t2ilearn.data.pixels import bytes_from_pictures
from t2ilearn.drawing import draw
from t2ilearn.judging import load_reader
from t2ilearn.systems import STAGES, load, token_training, train_system
from t2ilearn.systems import plan as steps_of
from t2ilearn.systems import vqvae as vqvae_system
from t2ilearn.systems.plan import parents_of
from t2ilearn.training import TrainingError
from t2ilearn.weights import WeightsError

STEPS = {"steps": 4, **QUIET}


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Small models and short evaluations."""
    with tiny_systems() as asked:
        yield asked


@pytest.fixture(scope="module")
def trained(quick, tmp_path_factory):
    """A folder with the runs of both stages of `vqvae`, and what `train_system` returned."""
    folder = tmp_path_factory.mktemp("runs")
    return folder, train_system("vqvae", "tiny", folder, **STEPS)


@pytest.fixture
def runs(trained, tmp_path):
    """A copy of these runs, to be changed."""
    return shutil.copytree(trained[0], tmp_path / "runs")


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """Two folders of pictures with captions."""
    return [pictures_in(tmp_path_factory.mktemp(name), seed) for seed, name in enumerate("ab")]


def pictures_in(folder, seed):
    pictures = Shapes(32).sample(12, generator=torch.Generator().manual_seed(seed)).pictures
    rows = ["file,caption"]
    for number, picture in enumerate(bytes_from_pictures(pictures)):
        Image.fromarray(picture.movedim(0, -1).numpy()).save(folder / f"{number}.png")
        rows.append(f"{number}.png,a picture with the number {number}")
    (folder / "captions.csv").write_text("\n".join(rows), encoding="utf-8")
    return folder


def card_in(runs, name):
    return weights.read_card(runs / name / f"{name}.json")


def stopped_at(monkeypatch, stage, step):
    """Trainings of a stage raise KeyboardInterrupt at a step, once."""
    real, first = token_training.train_prior, []
    if stage == "vqvae":
        real = token_training.train_with_codebook

    def interrupted(job, *args, **options):
        original = type(job).train

        def train(self, model, make_batch, *rest, **more):
            def make(number, generator):
                if number == step and not first:
                    first.append(number)
                    raise KeyboardInterrupt
                return make_batch(number, generator)

            return original(self, model, make, *rest, **more)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(job), "train", train)
            return real(job, *args, **options)

    monkeypatch.setattr(vqvae_system, real.__name__, interrupted)


def retrained(runs, stage="vqvae", seed=7):
    """The same stage, trained from another seed into the same folder."""
    shutil.rmtree(runs / f"{stage}-tiny")
    recipe = STAGES[stage].presets["tiny"]
    recipe = replace(recipe, train=replace(recipe.train, seed=seed))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(STAGES[stage].presets, "tiny", recipe)
        return train_system("vqvae", "tiny", runs, stage=stage, **STEPS)


# --- the stages of a system, in order ----------------------------------------------------------


def test_both_stages_are_trained_in_order_and_the_last_one_is_returned(trained):
    folder, path = trained
    assert path == folder / "prior-tiny" / "prior-tiny.safetensors"
    assert card_in(folder, "prior-tiny").parents == {"vqvae": card_in(folder, "vqvae-tiny").sha256}
    assert draw("a star", system=path.parent, count=1).pictures.shape == (1, 3, 32, 32)


def test_a_second_call_skips_what_is_done(trained, quick):
    folder, path = trained
    files = [folder / name / f"{name}.json" for name in ("vqvae-tiny", "prior-tiny")]
    before, asked = [file.stat().st_mtime_ns for file in files], len(quick)
    assert train_system("vqvae", "tiny", folder, **STEPS) == path
    assert [file.stat().st_mtime_ns for file in files] == before and len(quick) == asked


def test_a_single_stage_that_is_done_is_only_measured_anew(runs, quick):
    before, asked = card_in(runs, "vqvae-tiny"), len(quick)
    train_system("vqvae", "tiny", runs, stage="vqvae", **STEPS)
    assert card_in(runs, "vqvae-tiny").sha256 == before.sha256 and len(quick) == asked + 1


@pytest.mark.parametrize("stage", ["vqvae", "prior"])
def test_a_stopped_stage_goes_on_and_the_stages_after_it_wait(tmp_path, monkeypatch, stage, quick):
    stopped_at(monkeypatch, stage, 3)
    asked = len(quick)
    path = train_system("vqvae", "tiny", tmp_path, **STEPS)
    card = card_in(tmp_path, f"{stage}-tiny")
    assert path == tmp_path / f"{stage}-tiny" / f"{stage}-tiny.safetensors"
    assert card.steps == 3 and card.metrics == {} and card.bars == {}
    assert len(quick) == asked + (stage == "prior")
    if stage == "vqvae":
        assert not (tmp_path / "prior-tiny").exists()
    path = train_system("vqvae", "tiny", tmp_path, **STEPS)
    assert path.parent.name == "prior-tiny" and card_in(tmp_path, f"{stage}-tiny").steps == 4
    assert all(card_in(tmp_path, name).metrics for name in ("vqvae-tiny", "prior-tiny"))


def test_a_stage_trained_by_other_settings_is_not_taken_for_this_one(runs):
    with pytest.raises(TrainingError, match="steps|config"):
        train_system("vqvae", "tiny", runs, steps=5, **QUIET)


def test_a_prior_over_a_retrained_tokenizer_is_not_done(runs):
    retrained(runs)
    with pytest.raises(TrainingError, match=r"learned from something else \(vqvae\). Remove that"):
        train_system("vqvae", "tiny", runs, stage="prior", **STEPS)
    assert [s.done for s in steps_of("vqvae", "tiny", runs, steps=4)] == [False, False]


def test_a_single_stage_without_its_parents_is_refused_before_the_first_step(tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "available", lambda directory=None: ())
        with pytest.raises(TrainingError, match="prior is trained on top of vqvae, and there are"):
            train_system("vqvae", "tiny", tmp_path, stage="prior", **STEPS)
    assert not list(tmp_path.iterdir())


def test_a_single_stage_is_trained_on_top_of_weights_that_ship(tmp_path):
    found = parents_of(STAGES["prior"], "tiny", tmp_path)
    assert found == {"vqvae": weights.find("vqvae-tiny")}


# --- --dry-run ---------------------------------------------------------------------------------


def run(*arguments):
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


def test_a_dry_run_states_what_would_be_trained_and_trains_nothing(tmp_path):
    result = run("train", "vqvae", "--preset", "tiny", "--runs", tmp_path, "--dry-run")
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert [line.split()[0] for line in lines] == ["vqvae", "prior"]
    assert all("to train" in line and "min on" in line for line in lines)
    assert not list(tmp_path.iterdir())


def test_a_plan_and_a_training_agree_on_what_is_done(runs, trained):
    done = [step.done for step in steps_of("vqvae", "tiny", runs, steps=4)]
    assert done == [True, True]
    assert not any(s.done for s in steps_of("vqvae", "tiny", runs, stage="prior", steps=4))
    assert not any(step.done for step in steps_of("vqvae", "tiny", runs, steps=5))
    shutil.rmtree(runs / "prior-tiny")
    assert [s.done for s in steps_of("vqvae", "tiny", runs, steps=4)] == [True, False]
    shutil.copytree(trained[0] / "prior-tiny", runs / "prior-tiny")
    shutil.rmtree(runs / "vqvae-tiny")  # what the prior was trained on top of is to be trained
    assert [s.done for s in steps_of("vqvae", "tiny", runs, steps=4)] == [False, False]


def test_a_dry_run_of_everything_names_every_stage_once(tmp_path):
    result = run("train", "all", "--preset", "tiny", "--runs", tmp_path, "--dry-run")
    assert result.exit_code == 0, result.output
    named = [line.split()[0] for line in result.output.splitlines()]
    wanted = {"judge", "reader", "emoji-judge", "vqvae", "prior", "pixelcnn", "vqgan", "dvae"}
    assert wanted < set(named) and len(named) == len(set(named))
    for first, then in (("vqvae", "prior"), ("vqgan", "dalle"), ("dvae", "dalle-dvae")):
        assert named.index(first) < named.index(then)


def test_a_dry_run_with_own_pictures_looks_where_they_are_trained(own, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run("train", "vqvae", "--data", own[0], "--dry-run")
    assert result.exit_code == 0 and result.output.count("to train") == 2, result.output
    result = run("train", "vqvae", "--data", own[0], "--stage", "prior", "--dry-run")
    assert isinstance(result.exception, TrainingError)
    assert not list(tmp_path.iterdir())


# --- weights that were trained anew ------------------------------------------------------------


def test_a_prior_that_was_trained_on_draws_other_pictures_in_the_same_process(
    tmp_path, monkeypatch
):
    """Stop a prior, draw, train on, draw: what is kept in memory follows the weights."""
    stopped_at(monkeypatch, "prior", 2)
    run_folder = train_system("vqvae", "tiny", tmp_path, **STEPS).parent
    before = draw("a red star", system=run_folder, count=2, seed=1)
    same = draw("a red star", system=run_folder, count=2, seed=1)
    assert torch.equal(before.pictures, same.pictures)
    train_system("vqvae", "tiny", tmp_path, **STEPS)
    after = draw("a red star", system=run_folder, count=2, seed=1)
    assert after.weights_id != before.weights_id
    assert not torch.equal(after.pictures, before.pictures)


def test_a_retrained_system_draws_other_pictures_in_the_same_process(runs):
    """Tokenizer and prior both anew, under the same paths."""
    before = draw("a red star", system=runs / "prior-tiny", count=1)
    retrained(runs)
    retrained(runs, "prior")
    after = draw("a red star", system=runs / "prior-tiny", count=1)
    ids = zip(before.weights_id.split("-"), after.weights_id.split("-"), strict=True)
    assert all(old != new for old, new in ids)
    assert not torch.equal(before.pictures, after.pictures)


def test_a_retrained_reader_is_loaded_anew(tmp_path):
    """Also where both files were written in one tick of the clock."""
    stored = weights.load("reader")
    file = weights.save(tmp_path, stored.card, stored.state)
    before, stamp = load_reader(str(file)), file.stat()
    assert load_reader(str(file)) is before
    changed = {**stored.state, "heads.bias": stored.state["heads.bias"] + 1}
    weights.save(tmp_path, stored.card, changed)
    for path in (file, file.with_suffix(".json")):
        os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    after = load_reader(str(file))
    assert torch.allclose(after.heads.bias, before.heads.bias + 1, atol=1e-2)


def test_a_text_tokenizer_that_was_replaced_is_not_kept_in_memory(tmp_path, own):
    """The weights are the same, and the card names another tokenizer: it is checked anew."""
    folder = train_system("vqvae", "tiny", tmp_path, data=own[0], **STEPS).parent
    draw("a picture", system=folder, count=1)
    card = folder / "prior-tiny.json"
    facts = json.loads(card.read_text(encoding="utf-8"))
    facts["tokenizer"]["sha256"] = "0" * 64
    card.write_text(json.dumps(facts), encoding="utf-8")
    with pytest.raises(WeightsError, match="not the tokenizer that this model learned from"):
        draw("a picture", system=folder, count=1)


def test_a_prior_over_a_tokenizer_that_was_retrained_does_not_draw(runs):
    draw("a star", system=runs / "prior-tiny", count=1)  # what is in memory must not answer
    retrained(runs)
    with pytest.raises(WeightsError, match="was trained on top of .* are missing: .* is "):
        draw("a star", system=runs / "prior-tiny", count=1)


def test_a_stopped_prior_over_a_retrained_tokenizer_does_not_draw_either(tmp_path, monkeypatch):
    stopped_at(monkeypatch, "prior", 2)
    path = train_system("vqvae", "tiny", tmp_path, **STEPS)
    assert card_in(tmp_path, "prior-tiny").metrics == {}
    retrained(tmp_path)
    with pytest.raises(WeightsError, match="Train the last stage again"):
        load(path.parent)
    with pytest.raises(TrainingError, match="learned from something else"):
        train_system("vqvae", "tiny", tmp_path, stage="prior", **STEPS)


def test_a_tokenizer_retrained_while_a_prior_trains_is_noticed(runs, monkeypatch):
    """The prior's card would name a tokenizer that it never saw."""
    shutil.rmtree(runs / "prior-tiny")
    real = vqvae_system.train_prior

    def train_prior(*args):
        result = real(*args)
        retrained(runs)
        return result

    monkeypatch.setattr(vqvae_system, "train_prior", train_prior)
    before = card_in(runs, "vqvae-tiny").sha256
    with pytest.raises(TrainingError, match="was trained anew while prior-tiny was trained"):
        train_system("vqvae", "tiny", runs, stage="prior", **STEPS)
    partial = card_in(runs, "prior-tiny")
    assert partial.parents == {"vqvae": before} and partial.metrics == {}


# --- own pictures ------------------------------------------------------------------------------


def test_a_system_learns_own_pictures_in_both_stages_and_draws(own, tmp_path):
    folder = train_system("vqvae", "tiny", tmp_path, data=own[0], **STEPS).parent
    assert folder.name == "prior-tiny"
    drawn = draw("a picture with the number 3", system=folder, count=2)
    assert drawn.pictures.shape == (2, 3, 32, 32) and drawn.aligned == []
    assert load(folder).worlds == ()


def test_a_prior_on_own_pictures_is_not_trained_on_top_of_shipped_tokenizers(own, tmp_path):
    with pytest.raises(TrainingError, match="there are no weights of it in .*vqvae-tiny"):
        train_system("vqvae", "tiny", tmp_path, data=own[0], stage="prior", **STEPS)
    assert not list(tmp_path.iterdir())


def test_a_prior_on_own_pictures_is_not_trained_on_tokens_of_another_world(own, runs):
    shutil.rmtree(runs / "prior-tiny")
    with pytest.raises(TrainingError, match="learned from the world tiny-shapes, and prior-tiny"):
        train_system("vqvae", "tiny", runs, data=own[0], stage="prior", **STEPS)
    with pytest.raises(TrainingError, match="learned from something else"):
        train_system("vqvae", "tiny", runs, data=own[0], **STEPS)
    assert not (runs / "prior-tiny").exists()


def test_a_prior_is_not_trained_on_tokens_of_other_own_pictures(own, tmp_path):
    train_system("vqvae", "tiny", tmp_path, data=own[0], stage="vqvae", **STEPS)
    how = {"stage": "prior", **STEPS}
    with pytest.raises(TrainingError, match=r"learned from own pictures \(\w{8}\), and prior-tiny"):
        train_system("vqvae", "tiny", tmp_path, data=own[1], **how)
    with pytest.raises(TrainingError, match="is to learn from the world tiny-shapes"):
        train_system("vqvae", "tiny", tmp_path, **how)
    assert not (tmp_path / "prior-tiny").exists()


def test_a_run_on_pictures_that_changed_since_is_not_taken_for_done(own, tmp_path):
    pictures = shutil.copytree(own[0], tmp_path / "pictures")
    how = {"data": pictures, "stage": "vqvae", **STEPS}
    train_system("vqvae", "tiny", tmp_path / "runs", **how)
    with open(pictures / "captions.csv", "a", encoding="utf-8") as file:
        file.write("\n0.png,one caption more")
    with pytest.raises(TrainingError, match="something else .pictures and captions"):
        train_system("vqvae", "tiny", tmp_path / "runs", data=pictures, **STEPS)


# --- runs of the first edition -----------------------------------------------------------------


def test_a_run_of_the_first_edition_does_not_go_on(tmp_path):
    run_folder = tmp_path / "vqvae-tiny"
    run_folder.mkdir()
    (run_folder / "learns_from.json").write_text('{"world": "tiny-shapes"}', encoding="utf-8")
    with pytest.raises(TrainingError, match="holds a run of the first edition.*Remove that folder"):
        train_system("vqvae", "tiny", tmp_path, **STEPS)
    assert [path.name for path in run_folder.iterdir()] == ["learns_from.json"]


@pytest.mark.parametrize("name", ["vqvae-tiny", "prior-tiny"])
def test_finished_runs_of_the_first_edition_are_named_as_such(runs, name):
    """Its weights have no facts in their header, and its cards have no schema."""
    file = runs / name / f"{name}.safetensors"
    old = {"system": name.partition("-")[0], "preset": "tiny", "config": {}, "metrics": {}}
    file.with_suffix(".json").write_text(json.dumps(old), encoding="utf-8")
    with pytest.raises(WeightsError, match="first edition"):
        train_system("vqvae", "tiny", runs, **STEPS)
    with pytest.raises(WeightsError, match="first edition"):
        draw("a star", system=runs / "prior-tiny", count=1)


def test_weights_without_facts_in_their_header_are_named_as_such(runs):
    """A card that was edited to look like today's does not help."""
    file = runs / "prior-tiny" / "prior-tiny.safetensors"
    file.write_bytes(weights.to_bytes(weights.load(file).state))
    card = file.with_suffix(".json")
    facts = json.loads(card.read_text(encoding="utf-8"))
    facts["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    card.write_text(json.dumps(facts), encoding="utf-8")
    with pytest.raises(WeightsError, match="first edition"):
        load(runs / "prior-tiny")
