"""The long exercises of chapter 2: a build in graded steps, a derivation, an experiment; and the
short trainings that chapters share."""

import json
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import run_notebooks
from t2ilearn.lessons import check, exercise, experiments, trials
from t2ilearn.lessons.answers import piece
from t2ilearn.lessons.builds import own_or_solution
from t2ilearn.lessons.chapter02 import copied_gradient, effects
from t2ilearn.lessons.exercises import exercises, judge
from t2ilearn.lessons.experiments import recorded
from t2ilearn.models.quantizers import VectorQuantizer

BUILD = exercise("2.5")
REFERENCE = BUILD.code.solution


def graded(answer: type) -> list[str]:
    """The message for each step of a reader's class."""
    return [judge(step, piece(answer, step.code)).message for step in BUILD.steps]


# ---------------------------------------------------------------- the build


def test_a_chapter_has_a_build_a_derivation_and_an_experiment():
    kinds = [task.kind for task in exercises(2)]
    assert [kinds.count(kind) for kind in ("build", "derivation", "experiment")] == [1, 1, 1]
    assert len(BUILD.steps) == 6 and sum(step.minutes for step in BUILD.steps) == BUILD.minutes


class Shared(nn.Module):
    """As a reader may write it: other layers, a helper method, no codebook as a matrix product."""

    def __init__(self, codebook_size, code_dim):
        super().__init__()
        self.encoder = nn.Conv2d(3, code_dim, 4, stride=4)
        self.decoder = nn.ConvTranspose2d(code_dim, 3, 4, stride=4)
        self.codebook = nn.Parameter(torch.rand(codebook_size, code_dim))

    def rows(self, z):
        return z.permute(0, 2, 3, 1).reshape(-1, z.shape[1])

    def nearest(self, z):
        return torch.cdist(self.rows(z), self.codebook).argmin(1).view(len(z), *z.shape[2:])

    def lookup(self, tokens):
        return F.embedding(tokens, self.codebook).permute(0, 3, 1, 2)

    def straight_through(self, z, e):
        return e.detach() + z - z.detach()

    def forward(self, x):
        z = self.encoder(x)
        e = self.lookup(self.nearest(z))
        return self.decoder(self.straight_through(z, e)), z, e

    def loss(self, x, beta=0.25):
        x_hat, z, e = self(x)
        pull, hold = ((e - z.detach()) ** 2).mean(), ((z - e.detach()) ** 2).mean()
        return ((x_hat - x) ** 2).mean() + pull + beta * hold


def test_a_class_written_in_another_way_passes_every_step(capsys):
    assert all(message.startswith("Right.") for message in graded(Shared))
    check("2.5", Shared)
    assert "6 of 6 steps are right." in capsys.readouterr().out
    assert own_or_solution("2.5", Shared) is Shared


@pytest.mark.parametrize("number", range(1, 7))
def test_each_step_passes_on_its_own(number):
    """With this one method of the reader's, while all others are missing or wait."""
    step = BUILD.steps[number - 1]
    only = type("Only", (nn.Module,), {"rows": Shared.rows, step.name: vars(Shared)[step.name]})
    if step.name == "__init__":  # `super()` without arguments needs its own class
        only = type(
            "Only", (Shared,), {"__init__": lambda self, *sizes: Shared.__init__(self, *sizes)}
        )
    assert judge(step, piece(only, step.code)).right


def test_the_first_wrong_step_is_reported_alone(capsys):
    class Late(Shared):
        __init__, nearest, lookup = Shared.__init__, Shared.nearest, Shared.lookup
        straight_through, forward = Shared.straight_through, Shared.forward

        def loss(self, x, beta=0.25):
            x_hat, z, e = self(x)
            z_q = self.straight_through(z, e)
            first = F.mse_loss(x_hat, x) + F.mse_loss(z_q, z.detach())
            return first + beta * F.mse_loss(z, e.detach())

    messages = graded(Late)
    assert all(m.startswith("Right.") for m in messages[:5]) and "z_q in place of e" in messages[5]
    assert own_or_solution("2.5", Late) is REFERENCE
    assert "does not pass step 6 yet" in capsys.readouterr().out
    check("2.5", Late, step=6)
    out = capsys.readouterr().out
    assert "step 6, loss" in out and "step 1" not in out and "5 of 6" in out


def test_what_is_no_class_or_has_no_such_step_is_refused(capsys):
    check("2.5", Shared(8, 4))
    assert "Give the class itself" in capsys.readouterr().out
    check("2.5", type("Empty", (), {}))
    assert "the class has no method `nearest` yet" in capsys.readouterr().out
    with pytest.raises(ValueError, match="steps 1 to 6"):
        check("2.5", Shared, step=7)


def test_the_page_of_a_build_shows_six_tasks_six_hints_and_the_solution():
    page = BUILD._repr_markdown_()
    for step in BUILD.steps:
        assert step.task.strip() in page and step.hint.strip() in page
    assert page.count("<details>") == page.count("</details>") == 2
    assert "return x_hat, z, e" in page and "45 min, build" in BUILD.head


def test_the_reference_solution_trains():
    torch.manual_seed(0)
    model, x = REFERENCE(16, 8), torch.rand(8, 3, 32, 32) * 2 - 1
    first = model.loss(x).item()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(20):
        optimizer.zero_grad()
        model.loss(x).backward()
        optimizer.step()
    assert model.loss(x).item() < first


# ---------------------------------------------------------------- the derivation


def test_the_derived_gradient_is_the_one_that_autograd_computes():
    generator = torch.Generator().manual_seed(0)
    x, A, z, codebook = (
        torch.randn(*s, generator=generator, dtype=torch.float64)
        for s in ((3,), (3, 2), (2,), (5, 2))
    )
    quantizer = VectorQuantizer(5, 2).double()
    quantizer.codebook.data = codebook
    leaf = z.clone().requires_grad_()
    out = quantizer(leaf.view(1, 2, 1, 1))
    loss = F.mse_loss(A @ out.z_q.flatten(), x) + out.codebook_loss + 0.5 * out.commitment_loss
    (expected,) = torch.autograd.grad(loss, leaf)
    e = codebook[out.indices.item()]
    gradient, error = copied_gradient(x, A, z, e, 0.5)
    assert torch.allclose(gradient, expected)
    leaf = z.clone().requires_grad_()
    (at_z,) = torch.autograd.grad(F.mse_loss(A @ leaf, x), leaf)
    assert torch.allclose(error, gradient - (z - e) * 0.5 - at_z)


def test_the_numbers_of_the_worked_solution_are_right():
    task = exercise("2.6")
    A, x = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.ones(2)
    z, e = torch.tensor([0.4, 0.2]), torch.zeros(2)
    for value in copied_gradient(x, A, z, e, 0.5):
        pair = "({:.1f}, {:.1f})".format(*value.tolist())
        assert pair in task.worked and pair.replace("-", "−") in task.moral


# ---------------------------------------------------------------- the experiment


def test_the_record_holds_what_the_worked_solution_says():
    """Usage: higher with k-means in every pair; PSNR: no reason to train slowly."""
    rows = recorded("2.7").rows
    assert len(rows) == 4 * 2 * 3
    mean, least, by_rate = effects(rows)
    assert mean > least > 0 > by_rate
    means = {
        (s["learning_rate"], s["initialisation"]): {k: v[0] for k, v in found.items()}
        for s, found in recorded("2.7").means()
    }
    for start in ("random", "k-means"):
        quality = [means[rate, start]["psnr"] for rate in experiments.LEARNING_RATES]
        assert sorted(quality).index(quality[0]) <= 1 and max(quality) > quality[0] + 2
    assert max(means[rate, "random"]["perplexity"] for rate in experiments.LEARNING_RATES) < 20


def test_a_record_is_shown_as_text_and_as_a_table():
    found = recorded("2.7")
    assert repr(found).count("\n") == 9 and "mean of 3 seeds" in repr(found)
    page = found._repr_html_()
    assert page.count("<tr>") == 9 and "<caption>" in page
    with pytest.raises(ValueError, match=r"No recorded experiment '9.9'.*2.7"):
        recorded("9.9")


def test_the_experiment_can_be_repeated(tmp_path, monkeypatch):
    path = tmp_path / "experiments.json"
    monkeypatch.setattr(experiments, "RECORD", path)
    asked = []
    monkeypatch.setattr(
        trials, "usage_trial", lambda *how: asked.append(how) or trials.Trial(0.5, 9.0, 20.0)
    )
    assert experiments.main(["2.7"]) == 0
    assert len(set(asked)) == 24
    stored = json.loads(path.read_text(encoding="utf-8"))["2.7"]
    assert [row["usage"] for row in stored["rows"]] == [0.5] * 24


# ---------------------------------------------------------------- short trainings


def test_a_rehearsal_takes_a_tenth_of_the_steps(monkeypatch):
    monkeypatch.setenv(trials.REHEARSAL, "1")
    assert trials.rehearsing() and [trials.steps(n) for n in (900, 300, 5)] == [90, 30, 1]
    monkeypatch.setenv(trials.REHEARSAL, "")
    assert not trials.rehearsing() and trials.steps(900) == 900


def test_chapters_are_stored_after_whole_trainings():
    assert run_notebooks.PINNED[trials.REHEARSAL] == ""


def test_the_loop_of_the_chapters_reduces_a_loss_and_is_repeatable():
    pictures = torch.rand(32, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1

    class Terms:
        def __init__(self, total):
            self.total = total

    seen, ends = [], []
    for _ in range(2):
        torch.manual_seed(0)
        model = nn.Conv2d(3, 3, 1)

        def loss(model, x, _):
            return Terms(F.mse_loss(model(x), x))

        before = loss(model, pictures, None).total.item()
        trials.fit(model, loss, pictures, 30, after_step=lambda *facts: seen.append(facts[2]))
        assert loss(model, pictures, None).total.item() < before and not model.training
        ends.append(model.weight.detach().clone())
    assert torch.equal(*ends) and seen == [*range(30)] * 2


def test_a_trial_measures_a_codebook_and_refuses_other_initialisations():
    found = trials.usage_trial(steps=2, channels=(16, 16), codebook_size=16)
    assert 0 < found.usage <= 1 and 1 <= found.perplexity <= 16 and found.psnr > 0
    with pytest.raises(ValueError, match="initialisation is one of"):
        trials.usage_trial(initialisation="zeros")


def test_the_lab_prints_a_stub_for_every_exercise():
    path = run_notebooks.ASSETS.parent.parent / "notebooks" / "02_vqvae_lab.ipynb"
    cells = ["".join(c["source"]) for c in json.loads(path.read_text(encoding="utf-8"))["cells"]]
    for task in exercises(2):
        (answer,) = [c for c in cells if re.search(rf'^check\("{task.id}"', c, re.MULTILINE)]
        assert answer == task.stub
