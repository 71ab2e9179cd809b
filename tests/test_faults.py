"""Faults that users of such tools report, each as a kind with several members.

Every test was seen to fail before its kind was cured.
"""

import csv
import hashlib
import io
import json
import os
import random
import re
import shutil
import sys
import zipfile
import zlib
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageDraw
from tiny_systems import tiny_systems
from typer.testing import CliRunner

import t2ilearn.studio as studio_module
from t2ilearn import cli, drawing, weights
from t2ilearn.data import (
    CaptionError,
    CaptionTokenizer,
    Folder,
    Shapes,
    WordTokenizer,
    parse,
)
from t2ilearn.data.folder import split_by_content
from t2ilearn.data.near_twins import thumbnail, twin_groups
from t2ilearn.data.picture_files import FolderError, read_picture
from t2ilearn.data.pixels import bytes_from_pictures
from t2ilearn.drawing import Drawing, complete, draw, redraw
from t2ilearn.judging.clip import retrieval
from t2ilearn.judging.counting import other_captions
from t2ilearn.judging.metrics import (
    frechet_distance,
    perplexity,
    precision_recall,
)
from t2ilearn.judging.report import evaluate_tokenizer
from t2ilearn.models.clip import CLIP, ImageTowerConfig, TextTowerConfig
from t2ilearn.models.dit import DiT, DiTConfig
from t2ilearn.models.dvae import gumbel_softmax
from t2ilearn.models.transformer import PriorConfig, TransformerPrior
from t2ilearn.models.vqvae import VQVAE, VQVAEConfig
from t2ilearn.pretrained.checkpoints import read_checkpoint
from t2ilearn.pretrained.taming import load_taming
from t2ilearn.systems import Prompt, Request, evaluate_system, evaluation, load, token_training
from t2ilearn.systems.diffusion import DiffusionSystem
from t2ilearn.systems.plan import train_system
from t2ilearn.systems.tokens import TokenOptions, TokenSystem
from t2ilearn.training import (
    RunFileError,
    TrainConfig,
    TrainingError,
    archive_run,
    read_record,
    restore_run,
    train,
)
from t2ilearn.weights import Weights, WeightsError, check_state, load_into

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


@pytest.fixture(scope="module")
def own_prior(tmp_path_factory):
    """The folder of a prior that learned own pictures for a step."""
    folder = own_pictures(tmp_path_factory.mktemp("own") / "pictures", lambda n: [f"Bild {n}"])
    with tiny_systems(n=8), pytest.MonkeyPatch.context() as patch:
        patch.setitem(token_training.PICTURES_PER_WORLD, "folder", 16)
        how = {"data": folder, "steps": 1, "progress": False}
        for stage in ("vqvae", "prior"):
            train_system("vqvae", "tiny", folder.parent / "runs", stage=stage, **how)
    return folder.parent / "runs" / "prior-tiny"


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


# --- pictures: one function reads them all -----------------------------------------------------


def test_one_function_opens_every_picture(root):
    calls = [
        (path.relative_to(root).as_posix(), line.strip())
        for path in sorted((root / "t2ilearn").rglob("*.py"))
        for line in path.read_text(encoding="utf-8").splitlines()
        if "Image.open(" in line or "imread(" in line or "read_image(" in line
    ]
    assert [path for path, _ in calls] == ["t2ilearn/data/picture_files.py"], calls


def png_chunk(name, data):
    return len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")


def png_of(chunks_before=(), chunks_after=(), **how):
    """A PNG with further chunks before or after its pixels."""
    buffer = io.BytesIO()
    image(0).save(buffer, format="PNG", **how)
    data = buffer.getvalue()
    before, after = (b"".join(png_chunk(*c) for c in cs) for cs in (chunks_before, chunks_after))
    return data[:33] + before + data[33:-12] + after + data[-12:]


def profile_of(megabytes, compressed):
    """A colour profile that deflates badly, or well."""
    filler = b"" if compressed else random.Random(0).randbytes(megabytes * 10**6)
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes() + (
        filler or bytes(megabytes * 10**6)
    )


def text_chunk(kind, text):
    """A text as PNG's three kinds of chunk hold it."""
    key, data = b"t2ilearn\0", text.encode("latin-1")
    if kind == b"zTXt":
        return kind, key + b"\0" + zlib.compress(data)
    return kind, key + (data if kind == b"tEXt" else b"\0\0\0\0" + data)


@pytest.mark.parametrize(
    ("suffix", "data"),
    [
        ("png", lambda: png_of(icc_profile=profile_of(2, compressed=False))),
        ("png", lambda: png_of(icc_profile=profile_of(30, compressed=True))),
        ("png", lambda: png_of([text_chunk(b"zTXt", "a" * 3 * 10**6)])),
        ("png", lambda: png_of([text_chunk(b"iTXt", "workflow " * 10**6)])),
        ("png", lambda: png_of([], [text_chunk(b"zTXt", "a" * 3 * 10**6)])),
        ("jpg", lambda: saved("JPEG", icc_profile=profile_of(2, compressed=False))),
        ("webp", lambda: saved("WEBP", lossless=True, icc_profile=profile_of(2, False))),
    ],
)
def test_pictures_with_large_profiles_and_texts_are_read(suffix, data, tmp_path):
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(data())
    assert read_picture(path).size == (32, 32)


def test_a_text_that_would_fill_the_memory_is_refused_by_its_name(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(png_of([text_chunk(b"zTXt", "a" * 65 * 2**20)]))
    with pytest.raises(FolderError, match="text or a colour profile of more than 64 MiB"):
        read_picture(path)


def saved(kind, **how):
    buffer = io.BytesIO()
    image(0).save(buffer, format=kind, **how)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", [b"tEXt", b"zTXt", b"iTXt"])
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("profile", [False, True])
def test_metadata_are_found_wherever_a_legal_file_has_them(kind, after, profile, tmp_path):
    text = text_chunk(kind, json.dumps(fresh("ein Stern: ★").metadata()))
    how = {"icc_profile": profile_of(2, compressed=False)} if profile else {}
    path = tmp_path / "star.png"
    path.write_bytes(png_of(*([[], [text]] if after else [[text], []]), **how))
    assert drawing._read_metadata(path)["captions"] == ["ein Stern: ★"]


def header_of(kind, side):
    """The start of a picture file that claims a size; its pixels are missing."""
    if kind == "png":
        size = side.to_bytes(4, "big") * 2
        head = png_chunk(b"IHDR", size + b"\x08\x02\0\0\0")
        text = png_chunk(*text_chunk(b"tEXt", json.dumps(fresh().metadata())))
        return b"\x89PNG\r\n\x1a\n" + head + text + png_chunk(b"IDAT", zlib.compress(b""))
    if kind == "ppm":
        return f"P6 {side} {side} 255\n".encode() + bytes(64)
    data = bytearray(saved("GIF"))
    data[6:10] = side.to_bytes(2, "little") * 2
    return bytes(data)


@pytest.mark.parametrize("kind", ["png", "gif", "ppm"])
@pytest.mark.parametrize("side", [60_000, 15_000])
def test_a_file_that_claims_a_size_is_one_sentence_for_every_command(
    kind, side, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / f"a.{kind}"
    path.write_bytes(header_of(kind, side))
    write_table(tmp_path, [(path.name, "a star")])
    commands = (["redraw", path], ["draw", "a star", "--finish", path, "--with", "vqvae-tiny"])
    for command in (*commands, ["train", "vqvae", "--data", tmp_path]):
        with pytest.raises(SystemExit) as stop:
            monkeypatch.setattr("sys.argv", ["t2ilearn", *map(str, command)])
            cli.main()
        said = capsys.readouterr().err
        assert stop.value.code == 2 and "Error: " in said and len(said) < 400, said


def half_zeros(data):
    return data[: len(data) // 2] + bytes(len(data) - len(data) // 2)


def without_end(data):
    return data[:-2]


def photo():
    """A picture with something in every part, as a photo has."""
    noise = torch.rand(3, 200, 200, generator=torch.Generator().manual_seed(0)) * 255
    return Image.fromarray(noise.byte().permute(1, 2, 0).numpy()).resize((400, 400))


@pytest.mark.parametrize("damage", [half_zeros, without_end])
@pytest.mark.parametrize(
    ("kind", "how"),
    [
        ("JPEG", {"quality": 95}),
        ("JPEG", {"progressive": True}),
        ("JPEG", {"optimize": True, "quality": 50}),
        ("PNG", {}),
        ("PNG", {"compress_level": 0}),
        ("JPEG2000", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
    ],
)
def test_a_picture_that_ends_in_zeros_or_too_early_is_refused(kind, how, damage, tmp_path):
    buffer, path = io.BytesIO(), tmp_path / "a"
    photo().save(buffer, format=kind, **how)
    path.write_bytes(buffer.getvalue())
    assert read_picture(path).size == (400, 400)
    path.write_bytes(damage(buffer.getvalue()))
    with pytest.raises(FolderError, match="damaged|not a picture"):
        read_picture(path)


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "PNG"])
def test_a_whole_picture_may_have_zeros_behind_its_end(kind, tmp_path):
    path = tmp_path / "a"
    path.write_bytes(saved(kind) + bytes(4096))
    assert read_picture(path).size == (32, 32)
    Image.new("RGB", (3000, 3000), "white").save(path, format=kind)  # compresses to little
    assert read_picture(path).size == (3000, 3000)


def test_a_wrong_checksum_within_a_png_is_refused(tmp_path):
    data = bytearray(png_of())
    data[-13] ^= 1  # of the pixels
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(FolderError, match="checksum of its part 'IDAT'"):
        read_picture(tmp_path / "a.png")


# --- errors of other libraries: the cause and the cure in a sentence ---------------------------


class Terms(NamedTuple):
    total: torch.Tensor


def train_line(folder, steps=3, **how):
    """A run of a few steps."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    config = TrainConfig(**{"steps": steps, "batch_size": 4, "warmup_steps": 1, **how})
    return train(
        model,
        lambda step, generator: torch.randn(4, 3, generator=generator),
        lambda model, batch, generator: Terms(model(batch).square().mean()),
        config,
        folder,
        checkpoint_seconds=0.0,
        progress=False,
    )


CHECKPOINT_EDITS = {
    "empty": lambda facts: "",
    "null": lambda facts: "null",
    "list": lambda facts: "[]",
    "number": lambda facts: "3",
    "deep": lambda facts: "[" * 100_000,
    "cut": lambda facts: json.dumps(facts)[:-40],
    **{
        f"without {name}": lambda facts, name=name: json.dumps(
            {key: value for key, value in facts.items() if key != name}
        )
        for name in ("config", "curves", "frames", "seconds", "steps_done", "unplotted", "scaler")
    },
    **{
        f"{name} is {value}": lambda facts, name=name, value=value: json.dumps(
            {**facts, name: value}
        )
        for name in ("config", "curves", "frames", "steps_done", "unplotted", "file", "format")
        for value in (None, 7.5, "abc", [1])
    },
}


@pytest.fixture(scope="module")
def line_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("line")
    train_line(folder)
    return folder


@pytest.mark.parametrize("edit", CHECKPOINT_EDITS)
def test_a_damaged_checkpoint_is_a_sentence(edit, line_run, tmp_path):
    shutil.copytree(line_run, tmp_path, dirs_exist_ok=True)
    listing = tmp_path / "checkpoint.json"
    facts = json.loads(listing.read_text(encoding="utf-8"))
    listing.write_text(CHECKPOINT_EDITS[edit](facts), encoding="utf-8")
    with pytest.raises(TrainingError, match="damaged|another config"):
        train_line(tmp_path)


@pytest.mark.parametrize("text", ["", "null", "[]", "{}", "[" * 100_000, '{"frames": [1]}', "\0"])
def test_an_empty_or_damaged_record_of_a_run_is_a_sentence(text, tmp_path):
    run = tmp_path / "vqvae-tiny"
    run.mkdir()
    for name in ("inputs.json", "flight.json"):
        (run / name).write_text(text, encoding="utf-8")
    if text != '{"frames": [1]}':
        with pytest.raises(TrainingError, match="damaged.*Remove the folder"):
            train_system("vqvae", "tiny", tmp_path, stage="vqvae", steps=1, progress=False)
    with pytest.raises(TrainingError, match="flight record .* is damaged"):
        read_record(run)


@pytest.mark.parametrize(
    "edit", [lambda data: data[:20], lambda data: b"", lambda data: b"\0" * 999]
)
def test_a_damaged_frame_of_a_run_is_a_sentence(edit, tmp_path):
    (tmp_path / "frames").mkdir()
    facts = {"frames": [{"step": 1, "file": "frames/000001.webp"}]}
    (tmp_path / "flight.json").write_text(json.dumps(facts), encoding="utf-8")
    (tmp_path / "frames" / "000001.webp").write_bytes(edit(saved("WEBP")))
    with pytest.raises(TrainingError, match="frame .*000001.webp is"):
        read_record(tmp_path)


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": "300"},
        {"steps": 2.5},
        {"batch_size": None},
        {"learning_rate": "1e-3"},
        {"seed": 1.0},
        {"steps": True},
        {"weight_decay": [0.1]},
    ],
)
def test_a_config_of_other_types_is_a_sentence(wrong, tmp_path, unchecked):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be a"):
        train_line(tmp_path, **wrong)


WRAPPED = {
    "data-parallel": (lambda name: f"module.{name}", "model.module"),
    "compiled": (lambda name: f"_orig_mod.{name}", "model._orig_mod"),
    "both": (lambda name: f"module._orig_mod.{name}", "model.module"),
    "a part compiled": (lambda name: name.replace("encoder.", "encoder._orig_mod."), "_orig_mod"),
    "a larger model": (lambda name: f"first_stage_model.{name}", "begins with first_stage_model"),
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_names_with_a_prefix_are_explained(kind):
    rename, cure = WRAPPED[kind]
    plain = tiny_vqvae().state_dict()
    wrapped = {rename(name): tensor for name, tensor in plain.items()}
    with pytest.raises(WeightsError, match=cure):
        check_state(wrapped, plain, "VQVAE")
    if kind != "a larger model":
        with pytest.raises(WeightsError, match="is wrapped by DataParallel or torch.compile"):
            check_state(plain, wrapped, "this model")


@pytest.mark.parametrize("kind", ["data-parallel", "compiled", "both"])
def test_released_checkpoints_are_read_with_a_wrapper_s_prefix(kind, tmp_path):
    plain = tiny_vqvae().state_dict()
    wrapped = {WRAPPED[kind][0](name): tensor for name, tensor in plain.items()}
    torch.save({"state_dict": wrapped}, tmp_path / "last.ckpt")
    assert read_checkpoint(tmp_path / "last.ckpt").keys() == plain.keys()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_another_default_dtype_is_named_as_the_cause(dtype, tmp_path, monkeypatch):
    system = load("vqvae-tiny")
    stored = Weights(tiny_vqvae().state_dict(), None, tmp_path)
    model = tiny_vqvae()
    torch.set_default_dtype(dtype)
    try:
        for act in (
            lambda: draw("a red star", system="vqvae-tiny", count=1),
            lambda: evaluate_system(system, n=8),
            lambda: load_into(model, stored),
            lambda: load_taming(tmp_path / "none.ckpt"),
            lambda: train_line(tmp_path),
        ):
            with pytest.raises(
                (ValueError, WeightsError), match=f"default dtype is {dtype}.*set_default_dtype"
            ):
                act()
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("temperature", [1e-50, 1e-300, 5e-324, 1e-7])
def test_a_temperature_that_overflows_is_a_sentence(temperature, unchecked):
    with pytest.raises(ValueError, match="temperature"):
        draw("a red star", system="vqvae-tiny", temperature=temperature)
    with pytest.raises(ValueError, match="temperature"):
        gumbel_softmax(torch.rand(1, 4, 2), torch.rand(1, 4, 2), temperature)


# --- the Fréchet distance where features outnumber samples -------------------------------------

TOLERANCE = 1e-12  # of ‖μ − ν‖² + tr A + tr B, as the docstring states


def features(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def size_of(a, b):
    """‖μ − ν‖² + tr A + tr B."""
    return (a.mean(0) - b.mean(0)).square().sum() + a.var(0).sum() + b.var(0).sum()


@pytest.mark.parametrize(
    ("n", "d"), [(50, 512), (2, 64), (3, 2048), (128, 128), (129, 128), (400, 8)]
)
@pytest.mark.parametrize("scale", [1e-6, 1.0, 30.0, 1e6])
def test_the_frechet_distance_has_the_stated_error_and_is_never_below_0(n, d, scale):
    real = scale * features(n, d)
    shift = 0.3 * scale * features(1, d, seed=1)
    cases = [
        (real, torch.zeros(())),  # of a set and itself
        (real.flip(0), torch.zeros(())),
        (
            torch.cat([real, real]),
            (1 - (2 * (n - 1) / (2 * n - 1)) ** 0.5) ** 2 * real.var(0).sum(),
        ),
        (real + shift, shift.square().sum()),
        (1.5 * real, 0.25 * (real.mean(0).square().sum() + real.var(0).sum())),
        (-real, (2 * real.mean(0)).square().sum()),
        (torch.zeros(4, d, dtype=torch.float64), real.mean(0).square().sum() + real.var(0).sum()),
    ]
    for fake, expected in cases:
        for pair in ((real, fake), (fake, real)):
            found = frechet_distance(*pair)
            assert found >= 0
            assert abs(found - expected.item()) <= TOLERANCE * size_of(real, fake).item()


def test_the_frechet_distance_of_unrelated_sets_equals_its_value_in_100_digits():
    mpmath = pytest.importorskip("mpmath")
    a, b = features(4, 7), features(5, 7, seed=1) * 3 + 1
    with mpmath.workdps(100):
        x, y = (mpmath.matrix((f - f.mean(0)).tolist()) for f in (a, b))
        product = x * y.T / mpmath.sqrt((len(a) - 1) * (len(b) - 1))
        cross = sum(mpmath.sqrt(abs(v)) for v in mpmath.eigsy(product * product.T)[0])
        expected = size_of(a, b).item() - 2 * cross
    assert abs(frechet_distance(a, b) - float(expected)) <= TOLERANCE * size_of(a, b).item()


def test_other_measures_stay_in_their_ranges_too():
    for n, d in ((12, 512), (40, 3)):
        real = 30 * features(n, d)
        assert precision_recall(real, real) == (1, 1)
    for size in (3, 100, 1000, 4096):
        assert perplexity(torch.arange(size), size) <= size


# --- path-like and number-like arguments, and captions from other worlds -----------------------


class Somewhere:
    """A path as other libraries have it."""

    def __init__(self, path):
        self.path = path

    def __fspath__(self):
        return str(self.path)


@pytest.mark.parametrize(
    ("how", "stored"),
    [
        ({"system": Path("vqvae-tiny")}, {"system": "vqvae-tiny"}),
        ({"system": Somewhere("vqvae-tiny")}, {"system": "vqvae-tiny"}),
        ({"seed": np.int64(3)}, {"seed": 3}),
        ({"seed": torch.tensor(3), "count": np.uint8(1)}, {"seed": 3}),
        ({"best_of": np.int32(2)}, {"best_of": 2}),
        ({"guidance_scale": np.float32(1.5), "top_k": np.int64(7)}, {}),
        ({"guidance_scale": Fraction(3, 2), "temperature": Decimal("0.5")}, {}),
        ({"temperature": torch.tensor(0.5)}, {}),
        ({"caption": np.str_("a red star")}, {"captions": ["a red star"]}),
        ({"caption": [("a red star", 1)]}, {"captions": [[["a red star", 1.0]]]}),
    ],
)
def test_arguments_that_are_like_paths_and_numbers_are_saved_and_drawn_again(
    how, stored, tmp_path, unchecked
):
    drawn = draw(**{"caption": "a red star", "system": "vqvae-tiny", "count": 1, **how})
    again = redraw(drawn.save(Somewhere(tmp_path / "a.png")))
    assert torch.equal(again.pictures, drawn.pictures)
    assert stored.items() <= drawing._read_metadata(tmp_path / "a.png").items()


@pytest.mark.parametrize(
    "how",
    [
        {"system": 7},
        {"system": ["vqvae-tiny"]},
        {"seed": 1.0},
        {"seed": "1"},
        {"count": True},
        {"best_of": torch.tensor([1, 2])},
        {"temperature": "warm"},
        {"temperature": True},
        {"top_k": 2.5},
        {"scorer": Path("likelihood")},
        {"caption": None},
        {"caption": b"a red star"},
        {"caption": 7},
        {"caption": ()},
        {"caption": [("a red star", "much")]},
        {"caption": [("a red star", float("nan"))]},
        {"caption": {"a red star": 1}},
    ],
)
def test_other_arguments_are_refused_before_drawing(how, monkeypatch, unchecked):
    monkeypatch.setattr(TokenSystem, "steps", lambda *_, **__: pytest.fail("it was drawn"))
    monkeypatch.setattr(TokenSystem, "candidates", lambda *_, **__: pytest.fail("it was drawn"))
    with pytest.raises(ValueError, match=r"must be|is named|[Cc]aption|prompt"):
        draw(**{"caption": "a red star", "system": "vqvae-tiny", "count": 1, **how})


def test_what_is_finished_and_requests_made_by_hand_are_checked_at_the_start(
    tmp_path, unchecked, monkeypatch
):
    half = torch.zeros(3, 32, 32)
    drawn = complete(half, "a red star", rows=np.int64(4), system=Path("vqvae-tiny"), count=1)
    assert redraw(drawn.save(tmp_path / "a.png")).request.rows == 4
    for picture, rows in ((half.numpy(), 4), (half, 4.0), (half, "4"), (None, 4)):
        with pytest.raises(ValueError, match="A picture to begin from|whole number"):
            complete(picture, "a red star", rows=rows, system="vqvae-tiny")
    monkeypatch.setattr(TokenSystem, "candidates", lambda *_, **__: pytest.fail("it was drawn"))
    by_hand = Request(("a red star",), Path("vqvae-tiny"), options=TokenOptions())
    for request in (by_hand, replace(by_hand, system="vqvae-tiny", seed=np.int64(1))):
        with pytest.raises(ValueError, match="no file can store"):
            drawing.draw_request(request)


HALVES = ["a \udcff", "\ud83d", "a red star \udc00", "\udcff\udcfe"]


@pytest.mark.parametrize("caption", HALVES)
def test_a_byte_that_is_no_unicode_is_a_caption_error_everywhere(caption, own_prior, unchecked):
    words = CaptionTokenizer.train(["a red star"])
    for act in (
        lambda: draw(caption, system="vqvae-tiny"),
        lambda: draw(caption, system=own_prior),
        lambda: draw((Prompt(caption, 0.5),), system="vqvae-tiny"),
        lambda: next(drawing.draw_steps(caption, system=own_prior)),
        lambda: complete(torch.zeros(3, 32, 32), caption, system=own_prior),
        lambda: words.encode(["a star", caption]),
        lambda: words.pieces(caption),
        lambda: words.fitted([caption]),
        lambda: CaptionTokenizer.train([caption]),
        lambda: WordTokenizer().encode([caption]),
        lambda: parse(caption),
    ):
        with pytest.raises(CaptionError):
            act()


def on_a_page(monkeypatch, encoding, *arguments):
    """What a command writes where standard output and error have an encoding, and its status."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    monkeypatch.setattr(sys, "argv", ["t2ilearn", *(os.fsdecode(a) for a in arguments)])
    status = 0
    try:
        cli.main()
    except SystemExit as stop:
        status = stop.code
    for stream in streams:
        stream.flush()
    return status, *(stream.buffer.getvalue().decode(encoding) for stream in streams)


@pytest.mark.parametrize(
    "arguments",
    [
        ["draw", b"a \xff", "--with", "OWN"],
        ["draw", b"a \xff", "--with", "vqvae-tiny"],
        ["draw", "a star", "--with", b"\xff"],
        ["draw", "a red star", "--with", "vqvae-tiny", b"--temp\xff", "1"],
        ["draw", "a red star", "--with", "vqvae-tiny", "--scorer", b"\xff"],
        ["draw", "a red star", "--with", "vqvae-tiny", "--out", b"\xff/a.png"],
        ["redraw", b"\xff.png"],
        ["train", b"\xff"],
        ["train", "vqvae", "--data", b"\xff"],
        ["evaluate", b"\xff"],
    ],
)
def test_a_byte_that_is_no_unicode_is_a_sentence_on_the_command_line(
    arguments, own_prior, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    arguments = [own_prior if argument == "OWN" else argument for argument in arguments]
    status, _, said = on_a_page(monkeypatch, "utf-8", *arguments)
    assert status == 2 and "Error: " in said and "Traceback" not in said, said


# --- output in any code page -------------------------------------------------------------------

PAGES = ["cp932", "iso8859-2", "cp437", "koi8-r", "cp1252", "big5", "utf-8"]


@pytest.mark.parametrize("encoding", PAGES)
def test_every_line_is_printed_in_any_code_page(encoding, tmp_path, monkeypatch, own_prior):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(weights, "available", lambda directory=None: ("prior-tiny", "vqvae-tiny"))
    whole = {
        command: on_a_page(monkeypatch, "utf-8", *command)
        for command in (("weights",), ("systems",), ("train", "vqvae", "--dry-run"))
    }
    assert on_a_page(monkeypatch, encoding, "--help")[0] == 0  # with frames that suit the page
    for command, (status, out, err) in whole.items():
        found = on_a_page(monkeypatch, encoding, *command)
        expected = out.encode(encoding, errors="replace").decode(encoding)
        assert status == found[0] == 0 and found[1] == expected, err
    assert "Fréchet" in whole["weights",][1] and "±" in whole["weights",][1]


@pytest.mark.parametrize("encoding", PAGES)
def test_every_error_and_file_name_is_printed_in_any_code_page(
    encoding, quick, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for command, status, part in (
        (["draw", "a star", "--out", "Stern ★.png"], 0, "Stern "),
        (["draw", "ein Stern ★ ±", "zweites ★"], 2, "zweites "),
        (["redraw", "é★.jpg", "--out", "★.jpg"], 2, "saved as .png"),
        (["train", "★±é"], 2, "nothing to train"),
        (["train", "vqvae", "--data", "★±é"], 2, "no folder"),
        (["draw", "a star", "--seed", "★"], 2, "Invalid value"),
    ):
        found = on_a_page(monkeypatch, encoding, *command)
        text = found[1] + found[2]
        assert found[0] == status and part in text and "Traceback" not in text, text


# --- archives that other programs made anew ----------------------------------------------------


RUN = {"run/flight.json": "{}", "run/frames/000001.webp": "x", "run/card.json": "[]"}


def zipped(path, members, **how):
    with zipfile.ZipFile(path, "w", **how) as archive:
        for name, text in members.items():
            archive.writestr(name, text)
    return path


@pytest.mark.parametrize(
    "extra",
    [
        {"__MACOSX/run/._flight.json": "x", "__MACOSX/._run": "x", "run/.DS_Store": "x"},
        {"run/Thumbs.db": "x", "run/frames/desktop.ini": "x"},
        {".DS_Store": "x", "run/": "", "run/frames/": ""},
        {"._run": "x"},
    ],
)
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])
@pytest.mark.parametrize("rename", ["run", "backup/run", "run\\"])
def test_what_known_programs_add_to_an_archive_is_passed_over(extra, method, rename, tmp_path):
    members = {name.replace("run", "backup/run", 1): text for name, text in RUN.items()}
    if rename != "backup/run":
        members = RUN
    if rename == "run\\":
        members = {name.replace("/", "\\"): text for name, text in RUN.items()}
    file = zipped(tmp_path / "run.zip", {**extra, **members}, compression=method)
    folder = restore_run(file, tmp_path / "home")
    assert folder == tmp_path / "home" / "run"
    found = {f"run/{p.relative_to(folder).as_posix()}": p.read_text() for p in folder.rglob("*.*")}
    assert found == RUN


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"notes.txt": "x", **RUN}, "notes.txt is beside run"),
        ({**RUN, "other/flight.json": "{}"}, "run, other"),
        ({name.removeprefix("run/"): text for name, text in RUN.items()}, "zip the folder itself"),
        ({"__MACOSX/run/._flight.json": "x"}, "no flight.json is in it"),
        ({**RUN, "run/../../evil": "x"}, "outside the folder: 'run/../../evil'"),
        ({**RUN, "C:/evil": "x"}, "outside the folder: 'C:/evil'"),
        ({**RUN, "/evil": "x"}, "outside the folder: '/evil'"),
        ({**RUN, "run\\flight.json": "x"}, "twice"),
    ],
)
def test_other_oddities_of_an_archive_are_named(members, reason, tmp_path):
    file = zipped(tmp_path / "run.zip", members)
    with pytest.raises(RunFileError, match=re.escape(reason)):
        restore_run(file, tmp_path / "home")
    assert not (tmp_path / "home").exists() or not any((tmp_path / "home").iterdir())


def with_byte(data, offset, value):
    """A zip of one member whose local and central headers say something else at an offset."""
    for mark, skip in ((b"PK\3\4", 0), (b"PK\1\2", 2)):
        at = data.index(mark) + offset + skip
        data[at] = value
    return bytes(data)


@pytest.mark.parametrize(
    ("offset", "value", "reason"),
    [(6, 1, "encrypted"), (8, 9, "cannot be read"), (8, 97, "cannot")],
)
def test_an_encrypted_or_unknown_member_is_named(offset, value, reason, tmp_path):
    file = zipped(tmp_path / "run.zip", {"run/flight.json": "{}"})
    file.write_bytes(with_byte(bytearray(file.read_bytes()), offset, value))
    with pytest.raises(RunFileError, match=reason):
        restore_run(file, tmp_path / "home")


# --- near twins stay on one side of the split --------------------------------------------------


def copies(picture):
    """A picture as other programs save it again."""
    width, height = picture.size
    yield "jpg", picture, {"format": "JPEG", "quality": 90}
    yield "jpg", picture, {"format": "JPEG", "quality": 75}
    yield "webp", picture, {"format": "WEBP", "quality": 80}
    yield "gif", picture, {"format": "GIF"}
    yield "png", picture.resize((width // 2, height // 2)), {"format": "PNG"}
    yield "bmp", picture.resize((2 * width, 2 * height)), {"format": "BMP"}


@pytest.mark.parametrize("kind", range(6))
def test_a_picture_and_its_copy_are_never_in_different_splits(kind, tmp_path, monkeypatch):
    monkeypatch.setattr("t2ilearn.data.folder.TEST_SHARE", 0.5)
    rows = []
    for number in range(24):
        original = image(number).resize((128, 128))
        suffix, copy, how = list(copies(original))[kind]
        original.save(tmp_path / f"{number}.png")
        copy.save(tmp_path / f"copy-{number}.{suffix}", **how)
        names = (f"{number}.png", f"copy-{number}.{suffix}")
        rows += [(name, f"picture {number}") for name in names]
    write_table(tmp_path, rows)
    folder = Folder(tmp_path, 32)
    train_captions, test_captions = set(folder.captions), set(folder.test_captions)
    assert not train_captions & test_captions and len(test_captions) >= 4
    assert len(train_captions) + len(test_captions) == 24


def test_pictures_that_are_no_twins_keep_their_split_and_twins_share_one():
    digests = [hashlib.sha256(bytes([number])).digest() for number in range(200)]
    train, test = split_by_content(digests)
    assert split_by_content(digests, list(range(200))) == (train, test) and 5 < len(test) < 40
    by_pairs = [number // 2 for number in range(200)]
    sides = [set(side) for side in split_by_content(digests, by_pairs)]
    pairs = [{2 * n, 2 * n + 1} for n in range(100)]
    assert all((pair <= sides[0]) != (pair <= sides[1]) for pair in pairs)
    assert 2 * 2 < len(sides[1]) < 2 * 20
    assert split_by_content(digests, [0] * 200)[1] == []


def test_sketches_on_white_and_pictures_of_one_scene_are_no_twins():
    dice, pictures = random.Random(0), []
    for _ in range(60):
        sketch = Image.new("RGB", (512, 512), "white")
        corners = [(dice.randint(0, 511), dice.randint(0, 511)) for _ in range(8)]
        ImageDraw.Draw(sketch).line(corners, fill="black", width=2)
        pictures.append(sketch)
    groups = twin_groups([thumbnail(picture) for picture in pictures])
    assert len(set(groups)) == 60


def test_twins_are_found_among_more_pictures_than_one_block():
    generator = torch.Generator().manual_seed(0)
    colours = torch.rand(1300, 192, generator=generator) * 255
    rows = torch.cat([colours, torch.full((1300, 1), 0.1)], 1)
    rows = torch.cat([rows, rows + torch.tensor([2.0] * 192 + [0.0])])  # each a little lighter
    groups = twin_groups(list(rows))
    assert groups[:1300] == groups[1300:] and len(set(groups)) == 1300


# --- long commands -----------------------------------------------------------------------------


def test_an_evaluation_that_was_stopped_goes_on(tmp_path, monkeypatch):
    file, asked = tmp_path / "figures.json", []

    def part(name):
        def measured(*arguments):
            asked.append(name)
            if asked == ["ceiling", "drawn"]:
                raise KeyboardInterrupt
            return {f"{name} {len(asked)}": 1.0}

        return measured

    for name in ("ceiling", "drawn"):
        monkeypatch.setattr(evaluation, f"_{name}", part(name))
    monkeypatch.setattr(evaluation, "best_of", part("best"))
    system = load("vqvae-tiny")
    with pytest.raises(KeyboardInterrupt):
        evaluate_system(system, n=8, keep=file)
    figures = evaluate_system(system, n=8, keep=file)
    assert asked == ["ceiling", "drawn", "drawn", "drawn", "best"] and len(figures) == 4
    assert evaluate_system(system, n=8, keep=file) == figures and len(asked) == 5
    with pytest.raises(ValueError, match="holds figures of .*name another"):
        evaluate_system(system, n=9, keep=file)
    for text in ("", "[]", "{}", '{"parts": 3}'):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match="no file of figures"):
            evaluate_system(system, n=8, keep=file)


def test_training_writes_nothing_outside_its_folder(tmp_path, monkeypatch):
    elsewhere = {name: tmp_path / name for name in ("HOME", "TMPDIR", "XDG_CACHE_HOME", "HF_HOME")}
    for name, folder in elsewhere.items():
        folder.mkdir()
        monkeypatch.setenv(name, str(folder))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr("tempfile.tempdir", None)
    with tiny_systems(n=8):
        train_system("vqvae", "tiny", tmp_path / "runs", steps=1, progress=False)
    found = {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*") if path.is_file()}
    assert found == {"runs"}
