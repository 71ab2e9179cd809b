"""CLIP: two towers, the symmetric loss, the temperature."""

import dataclasses
import math
import os
import socket
import subprocess
import sys

import pytest
import torch

from t2ilearn.models import clip
from t2ilearn.models.clip import (
    CLIP,
    MAX_SCALE,
    START_SCALE,
    CLIPOutput,
    ImageTower,
    ImageTowerConfig,
    TextTower,
    TextTowerConfig,
    clip_loss,
    logits,
)
from t2ilearn.models.tokens import END, PAD

IMAGE = ImageTowerConfig(16, 8, 32, 2, 4, 24)
TEXT = TextTowerConfig(30, 8, 32, 2, 4, 24)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return CLIP(IMAGE, TEXT)


def pairs(n, generator):
    """Random pictures and captions of different lengths."""
    captions = torch.randint(3, 30, (n, 8), generator=generator)
    for row in range(n):
        end = 3 + row % 5
        captions[row, end], captions[row, end + 1 :] = END, PAD
    return 2 * torch.rand(n, 3, 16, 16, generator=generator) - 1, captions


# ---------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"dim": 30}, "dim 30 must be a multiple of num_heads 4"),
        ({"num_heads": 0}, "num_heads 0"),
        ({"num_layers": 0}, "num_layers 0"),
        ({"patch": 7}, "patch \\(7\\) must divide the resolution \\(16\\)"),
        ({"patch": 0}, "patch \\(0\\)"),
        ({"patch": 32}, "patch \\(32\\)"),
        ({"std": (1.0, 0.0, 1.0)}, "std must be above 0"),
    ],
)
def test_image_towers_that_do_not_fit_are_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(IMAGE, **wrong)


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"embed_dim": 0}, "embed_dim 0"),
        ({"vocabulary": 1}, "vocabulary must be at least 2"),
        ({"text_length": 0}, "text_length at least 1; they are 30 and 0"),
        ({"end_token": 30}, "end_token must be a token, 0 … 29, not 30"),
    ],
)
def test_text_towers_that_do_not_fit_are_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(TEXT, **wrong)


def test_towers_of_different_spaces_are_refused():
    with pytest.raises(ValueError, match="one embed_dim, not 24 and 20"):
        CLIP(IMAGE, dataclasses.replace(TEXT, embed_dim=20))


def test_configs_have_at_most_eight_fields():
    assert all(len(dataclasses.fields(kind)) <= 8 for kind in (ImageTowerConfig, TextTowerConfig))


# ---------------------------------------------------------------- towers


def test_embeddings_have_length_1_and_the_scale_is_1_over_tau(model, generator):
    out = model(*pairs(5, generator))
    for part in (out.image, out.text):
        assert part.shape == (5, 24)
        assert torch.allclose(part.norm(dim=1), torch.ones(5))
    assert out.scale.item() == pytest.approx(1 / 0.07)
    s = logits(*out)
    assert s.shape == (5, 5)
    assert torch.allclose(s[2, 3], out.scale * out.image[2].dot(out.text[3]), atol=1e-5)


def test_the_initial_loss_is_near_that_of_guessing(model, generator):
    loss = clip_loss(model(*pairs(8, generator)))
    assert 0.5 * math.log(8) < loss.total.item() < 2 * math.log(8)


def test_padding_and_what_follows_the_end_have_no_influence(model, generator):
    _, captions = pairs(4, generator)
    other = captions.clone()
    other[0, 4:] = torch.tensor([7, 8, END, 9])  # after the first end, another one too
    longest = int((captions == END).int().argmax(1).max()) + 1
    with torch.no_grad():
        out = model.encode_text(captions)
        assert torch.allclose(model.encode_text(other)[0], out[0], atol=1e-6)
        assert torch.allclose(model.encode_text(captions[:, :longest]), out, atol=1e-6)


def test_the_order_of_words_matters(model, generator):
    _, captions = pairs(1, generator)
    captions[0, 0], captions[0, 1] = 5, 6
    swapped = captions.clone()
    swapped[0, :2] = captions[0, [1, 0]]
    assert not torch.allclose(model.encode_text(captions), model.encode_text(swapped), atol=1e-3)


def test_pictures_are_normalised_with_mean_and_standard_deviation(generator):
    torch.manual_seed(0)
    plain = ImageTower(IMAGE)
    config = dataclasses.replace(IMAGE, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
    tower = ImageTower(config)
    tower.load_state_dict(plain.state_dict())
    x = 2 * torch.rand(2, 3, 16, 16, generator=generator) - 1
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (config.mean, config.std))
    assert torch.allclose(tower(x), plain(((x + 1) / 2 - mean) / std), atol=1e-5)
    assert torch.allclose(plain._normalise(x), x, atol=1e-6)


def test_nothing_changes_its_arguments(model, generator):
    pictures, captions = pairs(3, generator)
    before = pictures.clone(), captions.clone()
    clip_loss(model(pictures, captions)).total.backward()
    assert torch.equal(pictures, before[0]) and torch.equal(captions, before[1])


def test_bad_pictures_and_captions_are_refused(model, generator, unchecked):
    pictures, captions = pairs(2, generator)
    for wrong, said in [
        (pictures[:, :, :8], r"shape \(B, 3, 16, 16\)"),
        (2 * pictures, "Pixels go from −1 to 1"),
        (pictures * math.nan, "Pixels go"),
        (pictures.byte(), "float tensors"),
    ]:
        with pytest.raises(ValueError, match=said):
            model.encode_image(wrong)
    with pytest.raises(ValueError, match=r"shape \(B, 3, 16, 16\), not .*Resize"):
        model.image_tower(pictures[:, :, :8])
    for wrong, said in [
        (captions + 30, "from 0 to 29"),
        (torch.full((2, 9), END), r"1 … 8 tokens: \(B, T ≤ 8\), not \(2, 9\)"),
        (captions[0], "tokens"),
        (captions[:, :0], "tokens"),
        (captions.where(captions != END, 5), r"Caption 0 has no end token \(1\)"),
    ]:
        with pytest.raises(ValueError, match=said):
            model.encode_text(wrong)
    assert model.image_tower(2 * pictures).shape == (2, 24)  # noise may leave the range


# ---------------------------------------------------------------- loss


def test_the_loss_is_the_mean_of_both_cross_entropies():
    image = torch.eye(3, 4)
    text = torch.tensor([[0.6, 0.8, 0, 0], [0, 1, 0, 0], [0.8, 0, 0.6, 0.0]])
    s = 2 * image @ text.T
    loss = clip_loss(CLIPOutput(image, text, torch.tensor(2.0)))
    rows = -s.log_softmax(1).diagonal().mean()
    columns = -s.log_softmax(0).diagonal().mean()
    assert loss.image_to_text.item() == pytest.approx(rows.item())
    assert loss.text_to_image.item() == pytest.approx(columns.item())
    assert rows != pytest.approx(columns)
    assert loss.total.item() == pytest.approx((rows + columns).item() / 2)
    assert clip.CLIPLoss._fields == ("image_to_text", "text_to_image", "total")


def test_pairs_must_be_pairs(model, generator):
    pictures, captions = pairs(3, generator)
    out = model(pictures, captions[:2])
    assert logits(*out).shape == (3, 2)
    with pytest.raises(ValueError, match="3 pictures but 2 captions: they are pairs"):
        clip_loss(out)


def test_equal_embeddings_give_ln_of_the_batch():
    same = torch.nn.functional.normalize(torch.ones(6, 4), dim=1)
    assert clip_loss(CLIPOutput(same, same, torch.tensor(5.0))).total.item() == pytest.approx(
        math.log(6), abs=1e-5
    )


def test_every_parameter_receives_a_gradient(model, generator):
    clip_loss(model(*pairs(6, generator))).total.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_each_term_trains_both_towers(model, generator):
    batch = pairs(4, generator)
    for term in ("image_to_text", "text_to_image"):
        loss = getattr(clip_loss(model(*batch)), term)
        for tower in (model.image_tower, model.text_tower):
            (grad,) = torch.autograd.grad(loss, tower.projection.weight, retain_graph=True)
            assert grad.abs().max() > 0


def test_similarities_stay_in_float32_under_autocast(model, generator):
    batch = pairs(4, generator)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(*batch)
        s = logits(*out)
        loss = clip_loss(out)
    for tensor in (*out, s, *loss):
        assert tensor.dtype == torch.float32
    assert torch.equal(s, out.scale * out.image @ out.text.T)


# ---------------------------------------------------------------- temperature


def test_the_temperature_is_clamped_after_the_step_and_only_from_above(model):
    assert model.logit_scale.item() == pytest.approx(START_SCALE) == math.log(1 / 0.07)
    for value, kept in ((9.0, MAX_SCALE), (3.0, 3.0), (-2.0, -2.0)):
        model.logit_scale.data.fill_(value)
        model.clamp_logit_scale()
        assert model.logit_scale.item() == pytest.approx(kept)
    assert MAX_SCALE == math.log(100) and model.logit_scale.requires_grad


def test_the_gradient_of_the_temperature_is_that_of_the_paper(generator):
    """dL/dt = exp(t) Σ (p − y) u·v, averaged over rows and over columns."""
    u, v = (
        torch.nn.functional.normalize(torch.randn(5, 4, generator=generator), dim=1) for _ in "uv"
    )
    t = torch.tensor(1.5, requires_grad=True)
    clip_loss(CLIPOutput(u, v, t.exp())).total.backward()
    cosine = u @ v.T
    s, target = math.exp(1.5) * cosine, torch.eye(5)
    rows, columns = (s.softmax(1) - target), (s.softmax(0) - target)
    expected = math.exp(1.5) * ((rows + columns) * cosine).sum() / 10
    assert t.grad.item() == pytest.approx(expected.item(), rel=1e-4)


def test_it_overfits_eight_pairs(model, generator):
    batch = pairs(8, generator)
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(60):
        loss = clip_loss(model(*batch))
        optimiser.zero_grad()
        loss.total.backward()
        optimiser.step()
        model.clamp_logit_scale()
    assert loss.total.item() < 0.02
    assert torch.equal(logits(*model(*batch)).argmax(1), torch.arange(8))


def test_the_text_tower_alone_maps_captions(generator):
    tower = TextTower(TEXT)
    assert tower(pairs(3, generator)[1]).shape == (3, 24)


# ---------------------------------------------------------------- several processes

# Children of one process that has imported everything: two that train together, one alone.
PROGRAM = """
import os, sys, traceback
from pathlib import Path

import torch

from t2ilearn import training
from t2ilearn.models import clip

torch.set_num_threads(1)
out, port = Path(sys.argv[1]), sys.argv[2]


def learn(who):
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    torch.manual_seed(0)
    towers = clip.ImageTowerConfig(16, 8, 8, 1, 2, 6), clip.TextTowerConfig(11, 6, 8, 1, 2, 6)
    model = clip.CLIP(*towers).double()
    first = []

    def make_batch(step, _):
        generator = torch.Generator().manual_seed(step)
        pictures = 2 * torch.rand(8, 3, 16, 16, generator=generator, dtype=torch.float64) - 1
        captions = torch.randint(2, 11, (8, 6), generator=generator)
        captions[:, 5] = 1
        return pictures.chunk(world)[rank], captions.chunk(world)[rank]

    def compute_loss(model, batch, generator):
        return clip.clip_loss(model(*batch))

    def after_step(model, batch, step, generator):
        if step == 0:
            first.extend(p.grad.clone() for p in model.parameters())
        model.clamp_logit_scale()

    config = training.TrainConfig(3, 4, 1e-2, warmup_steps=0, gradient_clip=1e9)
    result = training.train(
        model, make_batch, compute_loss, config, out / who, after_step=after_step, progress=False
    )
    torch.save([result.model.state_dict(), first, result.curves], out / f"{who}.pt")


children = []
for who in ("0", "1", "alone"):
    child = os.fork()
    if child == 0:
        status = 1
        try:
            if who != "alone":
                os.environ |= {"RANK": who, "LOCAL_RANK": who, "WORLD_SIZE": "2"}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            learn(who)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    children.append(child)
sys.exit(any(os.waitpid(child, 0)[1] for child in children))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="fork and the loopback's name are Linux's")
def test_two_processes_with_half_a_batch_learn_what_one_learns_from_all_of_it(tmp_path, root):
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    settings = {"CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path), port],
        env={**environment, **settings, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    runs = [torch.load(tmp_path / f"{who}.pt") for who in ("0", "1", "alone")]
    (first, first_grads, curves), (second, _, _), (alone, grads, alone_curves) = runs
    for key, value in alone.items():
        assert torch.equal(first[key], second[key]), key
        assert (first[key] - value).abs().max() <= 1e-9, key
    for mine, wanted in zip(first_grads, grads, strict=True):
        assert wanted.any() and (mine - wanted).abs().max() <= 1e-9
    for term in ("image_to_text", "text_to_image", "total"):
        assert curves[term] == pytest.approx(alone_curves[term], rel=0, abs=1e-9)
