"""Lessons of chapter 4: answers of all kinds to its exercises, and the ledger of a VQGAN.

What holds for the exercises of every chapter is in test_lessons.py.
"""

import re

import pytest
import torch

from t2ilearn.data import TinyShapes
from t2ilearn.lessons import exercise, ledger
from t2ilearn.lessons.exercises import judge
from t2ilearn.models.lpips import perceptual_distance
from t2ilearn.models.vqgan import (
    Discriminator,
    DiscriminatorConfig,
    VQGANLossConfig,
    VQGANWithDiscriminator,
    generator_loss,
    hinge_loss,
    vqgan_loss,
)
from t2ilearn.models.vqvae import VQVAE, VQVAEConfig

TRUE = {
    "pixels": "encoder decoder",
    "perceptual": "encoder decoder",
    "codebook_loss": "codebook",
    "commitment_loss": "encoder",
    "generator_loss": "encoder decoder",
    "discriminator_loss": "discriminator",
}


# ---------------------------------------------------------------- exercises


# Answers as readers write them: not the package's own, and found by what they do.
def mean_before_hinge(real, fake):
    return 0.5 * (torch.relu(1 - real.mean()) + torch.relu(1 + fake.mean()))


def other_gan(real, fake):
    likely = torch.sigmoid(real).log().mean() + (1 - torch.sigmoid(fake)).log().mean()
    return -likely / 2


def lambda_that_frees_the_graph(pictures, adversarial, decoder):
    weight = decoder[-1].weight
    a, b = (torch.autograd.grad(term, weight)[0].norm() for term in (pictures, adversarial))
    return a / (b + 1e-4)


def lambda_of_max(pictures, adversarial, decoder):
    a, b = (
        torch.autograd.grad(t, decoder[-1].weight, retain_graph=True)[0].square().sum().sqrt()
        for t in (pictures, adversarial)
    )
    return torch.minimum(a / max(b, 1e-4), torch.tensor(1e4))


def losses_with_no_cut(discriminator, x, drawn):
    fake = discriminator(drawn)
    return -fake.mean(), hinge_loss(discriminator(x), fake).total


@pytest.mark.parametrize(
    ("number", "answer", "message"),
    [
        ("4.1", mean_before_hinge, "comes before the mean"),
        ("4.1", other_gan, "first GAN's loss"),
        ("4.2", lambda fake: (1 - fake).mean(), "Not yet"),
        ("4.2", lambda fake: -torch.nn.functional.logsigmoid(fake).mean(), "non-saturating"),
        ("4.3", lambda levels: {1: 10, 2: 22, 3: 46}[levels], "46, and it is 70"),
        ("4.4", lambda p, start, warmup: 0 if p < start else 1, "factor is 1 at once"),
        ("4.5", lambda trunk, x, y: ((x - y) ** 2).mean((1, 2, 3)), "Those are pixels"),
        ("4.6", lambda_that_frees_the_graph, "stops with RuntimeError"),
        ("4.6", lambda_of_max, "Not yet"),
        ("4.7", losses_with_no_cut, "Each loss moves both networks"),
    ],
)
def test_mistakes_are_recognised_by_what_they_compute(number, answer, message):
    verdict = judge(exercise(number), answer)
    assert not verdict.right and re.search(message, verdict.message), verdict.message


@pytest.mark.parametrize(
    ("number", "answer"),
    [
        ("4.1", lambda real, fake: hinge_loss(real, fake).total),
        ("4.2", generator_loss),
        ("4.3", lambda levels: DiscriminatorConfig(4, levels).patch),
        (
            "4.4",
            lambda p, start, warmup: VQGANLossConfig(
                disc_start=start, disc_warmup=warmup
            ).disc_factor(float(p)),
        ),
        ("4.5", perceptual_distance),
        (
            "4.7",
            lambda D, x, y: (
                generator_loss(D.with_frozen_weights(y)),
                hinge_loss(D(x), D(y.detach())).total,
            ),
        ),
    ],
)
def test_the_packages_own_functions_are_right_answers(number, answer):
    verdict = judge(exercise(number), answer)
    assert verdict.right, verdict.message


# ---------------------------------------------------------------- the ledger of a VQGAN


def pair(quantizer: str) -> VQGANWithDiscriminator:
    torch.manual_seed(0)
    sizes = VQVAEConfig(
        resolution=32,
        channels=(16, 32),
        blocks=1,
        codebook_size=64,
        code_dim=8,
        quantizer=quantizer,
    )

    def distance(x, y):
        return perceptual_distance(lambda z: [z, z[..., ::2, ::2]], x, y)

    return VQGANWithDiscriminator(
        VQVAE.from_config(sizes),
        Discriminator(DiscriminatorConfig(4, 1)),
        VQGANLossConfig(),
        distance,
    )


@pytest.fixture(scope="module")
def x():
    return TinyShapes().sample(4, generator=torch.Generator().manual_seed(0)).pictures


@pytest.mark.parametrize("quantizer", ["gradient", "ema"])
def test_the_whole_ledger_of_a_vqgan(quantizer, x):
    both = pair(quantizer)
    book = ledger(both, both(x, 1.0))
    assert book.terms == tuple(TRUE)
    assert book.parts == ("encoder", "codebook", "decoder", "discriminator")
    wanted = {term: set(parts.split()) for term, parts in TRUE.items()}
    if quantizer == "ema":
        wanted["codebook_loss"] = set()
        assert all(book[term, "codebook"].free for term in TRUE)
        assert "in the forward pass" in book.text()
    assert {term: book.moved(term) for term in book.terms} == wanted
    assert book.matches(wanted).right and len(book.cells) == 24


def test_the_discriminator_starts_late_and_the_generator_loss_later(x):
    both = pair("gradient")
    early, alone = (ledger(both, both(x, at)) for at in (0.1, 0.42))
    assert early.moved("discriminator_loss") == early.moved("generator_loss") == set()
    assert alone.moved("discriminator_loss") == {"discriminator"}
    assert alone.moved("generator_loss") == set()
    (sentence,) = alone.matches(TRUE | {"generator_loss": "decoder"}).wrong
    assert "generator loss does not move the decoder: the term is a constant here" in sentence


@pytest.mark.parametrize("term", TRUE)
@pytest.mark.parametrize("part", ["encoder", "codebook", "decoder", "discriminator"])
def test_every_wrong_cell_gets_a_reason(term, part, x):
    both = pair("gradient")
    book = ledger(both, both(x, 1.0))
    predicted = set(TRUE[term].split()) ^ {part}
    (sentence,) = book.matches(TRUE | {term: predicted}).wrong
    name = term.replace("_", " ") if term.endswith("_loss") else f"{term} term"
    assert sentence.startswith(f"The {name} ") and sentence.count(": ") == 1
    assert "a gradient arrives" not in sentence and "no path" not in sentence


def test_a_missing_detach_shows_in_the_ledger(x):
    both = pair("gradient")
    step, drawn = both(x, 1.0), both.generator(x).reconstruction
    leaky = hinge_loss(both.discriminator(x), both.discriminator(drawn)).total
    book = ledger(both, step._replace(discriminator_loss=leaky))
    wrong = book.matches(TRUE).wrong
    assert wrong == [
        f"The discriminator loss moves the {part}: a gradient arrives."
        for part in ("encoder", "decoder")
    ]
    not_frozen = ledger(
        both, step._replace(generator_loss=generator_loss(both.discriminator(drawn)))
    )
    assert not_frozen.matches(TRUE).wrong == [
        "The generator loss moves the discriminator: a gradient arrives."
    ]


def test_the_models_own_loss_has_the_same_reasons(x):
    both = pair("gradient")
    G, D = both.generator, both.discriminator
    output = G(x)
    seen = both.distance(x, output.reconstruction)
    terms = vqgan_loss(
        x,
        output,
        seen,
        generator_loss(D.with_frozen_weights(output.reconstruction)),
        0.5,
        VQGANLossConfig(),
    )
    book = ledger(G, terms)
    assert book.parts == ("encoder", "codebook", "decoder")
    truth = {term: TRUE[term] for term in book.terms}
    assert book.matches(truth).right
    (sentence,) = book.matches(truth | {"pixels": "encoder codebook decoder"}).wrong
    assert "estimator bypasses the codebook" in sentence
