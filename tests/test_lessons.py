"""Ledger, exercises, quizzes and budgets: right answers pass, wrong ones get the reason."""

import json
import math
import re
import time
from dataclasses import replace
from typing import NamedTuple

import nbformat
import pytest
import torch
import torch.nn.functional as F
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

import measure_budget
from t2ilearn import lessons, weights
from t2ilearn.data import TinyShapes
from t2ilearn.lessons import budget, check, exercise, ledger, quiz, show_quiz
from t2ilearn.lessons.exercises import FOLDER, Code, Exercise, exercises, judge
from t2ilearn.lessons.quizzes import Question
from t2ilearn.models.quantizers import VectorQuantizer
from t2ilearn.models.transformer import PriorConfig, TransformerPrior, prior_loss
from t2ilearn.models.vqvae import VQVAE, VQVAEConfig, VQVAELoss, vqvae_loss

CHAPTERS = (1, 2, 3, 4, 5)
TASKS = [task for chapter in CHAPTERS for task in exercises(chapter)]
ALL = [part for task in TASKS for part in (task.steps or (task,))]  # a build is graded by its steps
MISTAKES = [
    pytest.param(task, name, id=f"{task.id}-{name}") for task in ALL for name in task.mistakes
]
SMALL = VQVAEConfig(
    resolution=32, channels=(16, 32), blocks=1, codebook_size=64, code_dim=8, quantizer="gradient"
)
TRUE = {
    "reconstruction": "encoder decoder",
    "codebook_loss": "codebook",
    "commitment_loss": "encoder",
}


# ---------------------------------------------------------------- the gradient ledger


def book_of(**changes):
    torch.manual_seed(0)
    model = VQVAE.from_config(replace(SMALL, **changes))
    x = TinyShapes().sample(4, generator=torch.Generator().manual_seed(0)).pictures
    return ledger(model, vqvae_loss(x, model(x))), model, x


@pytest.mark.parametrize("cosine", [False, True])
def test_ledger_of_a_codebook_that_learns_by_gradient(cosine):
    book, *_ = book_of(cosine=cosine)
    assert book.terms == ("reconstruction", "codebook_loss", "commitment_loss")
    assert book.parts == ("encoder", "codebook", "decoder")
    assert {term: book.moved(term) for term in book.terms} == {
        "reconstruction": {"encoder", "decoder"},  # the encoder by straight through
        "codebook_loss": {"codebook"},
        "commitment_loss": {"encoder"},
    }
    assert book.matches(TRUE).right


@pytest.mark.parametrize("cosine", [False, True])
def test_ledger_of_a_codebook_that_learns_by_moving_averages(cosine):
    book, model, x = book_of(quantizer="ema", cosine=cosine)
    assert book.moved("reconstruction") == {"encoder", "decoder"}
    assert book.moved("codebook_loss") == set() and book.moved("commitment_loss") == {"encoder"}
    assert all(book[term, "codebook"].free for term in book.terms)
    assert "in the forward pass" in book.text()
    before = model.quantizer.codebook.clone()
    model(x)
    assert not torch.equal(model.quantizer.codebook, before), (
        "it changed in the forward pass: no term moved it"
    )


def test_ledger_of_no_codebook_at_all():
    book, *_ = book_of(quantizer="fsq", code_dim=3)
    assert book.moved("reconstruction") == {"encoder", "decoder"}
    assert book.moved("codebook_loss") == book.moved("commitment_loss") == set()


def test_norms_are_those_of_the_gradients():
    book, model, x = book_of()
    loss = vqvae_loss(x, model(x))
    gradients = torch.autograd.grad(loss.codebook_loss, [*model.quantizer.parameters()])
    assert math.isclose(book["codebook_loss", "codebook"].norm, gradients[0].norm(), rel_tol=1e-5)
    assert book["codebook_loss", "encoder"].norm == 0
    assert f"{gradients[0].norm():.2g}" in book.text(norms=True)


def test_beta_on_the_wrong_term_shows_in_the_norms_alone():
    _, model, x = book_of()
    out = model(x)

    class Weighted(NamedTuple):
        codebook_loss: torch.Tensor
        commitment_loss: torch.Tensor

    terms = vqvae_loss(x, out)
    right = ledger(model, Weighted(terms.codebook_loss, 0.25 * terms.commitment_loss))
    wrong = ledger(model, Weighted(0.25 * terms.codebook_loss, terms.commitment_loss))
    assert repr(right) == repr(wrong)
    place = ("commitment_loss", "encoder")
    ratio = wrong[place].norm / right[place].norm
    assert math.isclose(ratio, 4, rel_tol=1e-5)


@pytest.mark.parametrize(
    ("prediction", "reason"),
    [
        ({"reconstruction": "encoder codebook decoder"}, "estimator bypasses the codebook"),
        ({"reconstruction": "decoder"}, "estimator copies the gradient"),
        ({"codebook_loss": "encoder codebook"}, "z is detached in this term"),
        ({"codebook_loss": ""}, "this term alone pulls code vectors"),
        ({"commitment_loss": ["encoder", "codebook"]}, "e is detached in this term"),
        ({"commitment_loss": {"encoder", "decoder"}}, "no pixel is in it"),
    ],
)
def test_a_wrong_prediction_gets_the_cell_and_the_reason(prediction, reason):
    book, *_ = book_of()
    answer = book.matches(TRUE | prediction)
    (term,) = prediction
    assert not answer.right and len(answer.wrong) == 1
    name = term.replace("_", " ") if term.endswith("_loss") else f"{term} term"
    assert reason in repr(answer) and f"The {name}" in repr(answer)
    assert repr(answer).startswith("8 of 9 cells right")


def test_with_ema_the_reason_is_that_the_codebook_has_no_parameters():
    book, *_ = book_of(quantizer="ema")
    (sentence,) = book.matches(TRUE).wrong
    assert "no parameters" in sentence and "forward pass" in sentence


def test_a_model_that_breaks_the_rule_gets_autograds_finding_as_reason():
    class Leaky(VectorQuantizer):
        def losses(self, z, e):
            return F.mse_loss(e, z), F.mse_loss(z, e.detach())  # forgot to detach z

    _, model, x = book_of()
    model.quantizer = Leaky(SMALL.codebook_size, SMALL.code_dim)
    book = ledger(model, vqvae_loss(x, model(x)))
    assert book.moved("codebook_loss") == {"encoder", "codebook"}
    (sentence,) = book.matches(TRUE).wrong
    assert sentence == "The codebook loss moves the encoder: a gradient arrives."


def test_a_prediction_with_wrong_names_lists_them():
    book, *_ = book_of()
    with pytest.raises(
        ValueError, match=r"unknown here: encodr.*without a prediction: commitment_loss"
    ):
        book.matches({"reconstruction": "encodr", "codebook_loss": "codebook"})


def test_a_ledger_of_any_model_and_of_chosen_parts():
    torch.manual_seed(0)
    prior = TransformerPrior(
        PriorConfig(codebook_size=16, side=2, dim=8, num_layers=1, num_heads=2)
    )
    indices = torch.randint(16, (3, 4))
    loss = prior_loss(prior(indices), indices)
    assert ledger(prior, loss).moved("cross_entropy") == {
        "image_embedding",
        "blocks",
        "norm",
        "own",
    }
    chosen = ledger(prior, loss, {"blocks": prior.blocks, "start": [prior.start]})
    assert chosen.parts == ("blocks", "start") and chosen["cross_entropy", "start"].moves


def test_ledger_raises_for_terms_that_are_no_scalars():
    _, model, x = book_of()
    pictures = VQVAELoss(x, x, x, x)
    with pytest.raises(ValueError, match="single number"):
        ledger(model, pictures)


def test_ledger_as_html_explains_its_marks():
    book, *_ = book_of()
    page = book._repr_html_()
    assert page.count("✓") == 4 + 1 and page.count('scope="row"') == 3
    assert "the term moves the part" in page and "<script" not in page


# ---------------------------------------------------------------- exercises


def test_each_chapter_has_at_least_four_complete_exercises():
    for chapter in CHAPTERS:
        tasks = exercises(chapter)
        assert len(tasks) >= 4
        assert [task.id for task in tasks] == [f"{chapter}.{n + 1}" for n in range(len(tasks))]
        for task in tasks:
            assert task.chapter == chapter
            assert 1 <= task.minutes <= 15 if task.kind == "short" else 30 <= task.minutes <= 60
            for part in task.steps or (task,):
                assert min(map(len, (part.title, part.task, part.hint, part.moral))) > 3
                assert len(part.mistakes) >= (3 if task.steps else 4)
                assert min(map(len, part.mistakes.values())) > 20
    assert exercises(99) == ()


@pytest.mark.parametrize("task", ALL, ids=lambda task: task.id)
def test_every_solution_passes_its_check_in_five_seconds(task):
    judge(task, task.code.solution)  # autograd's first call costs seconds
    began = time.process_time()
    verdict = judge(task, task.code.solution)
    assert verdict.right and verdict.message.startswith("Right.")
    assert time.process_time() - began < 5


@pytest.mark.parametrize(("task", "name"), MISTAKES)
def test_every_known_wrong_answer_gets_its_own_message(task, name):
    verdict = judge(task, task.code.mistakes[name])
    assert not verdict.right and verdict.message == task.mistakes[name]


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.id)
def test_every_stub_runs_and_waits(task, capsys):
    exec(task.stub, {"check": check, "torch": torch})
    assert "It waits" in capsys.readouterr().out


# Wrong answers as readers write them: not the package's own, and found by what they do.
def top_p_without_the_last(p, top_p):
    kept, total = torch.zeros_like(p), 0.0
    for i in p.argsort(descending=True).tolist():
        if total + p[i] > top_p:
            break
        kept[i], total = p[i], total + p[i]
    return kept / kept.sum()


def attention_without_self(q, k, v):
    rows = [torch.full((v.shape[1],), math.nan)]
    rows += [((q[i] @ k[:i].T) / 2).softmax(0) @ v[:i] for i in range(1, len(q))]
    return torch.stack(rows)


def restart_without_averages(quantizer, k, place):
    quantizer.codebook[k].copy_(place)


def unused_bits_by_loop(counts):
    total = sum(counts.tolist())
    return math.log2(len(counts)) + sum(n / total * math.log(n / total) for n in counts if n)


@pytest.mark.parametrize(
    ("number", "answer", "message"),
    [
        ("1.1", lambda a, b: -10 * torch.log10(((a - b) ** 2).mean()), "6 dB too low"),
        ("1.3", lambda p, h: round(p * (1 - p) * (1.96 / h) ** 2), "Round up|Not yet"),
        ("1.6", lambda c, s: [(c[0], x) for x in s], "a word never met"),
        ("2.1", lambda side, bits: 1 << round(bits / side**2), "Not yet"),
        ("2.2", unused_bits_by_loop, "One part is in bits"),
        ("2.4", restart_without_averages, "next step undid the change"),
        ("2.6", lambda x, A, z, e, beta: (beta * (z - e), 2 / 3 * A.T @ A @ (e - z)), "true deriv"),
        ("3.2", attention_without_self, "Off by one"),
        ("3.3", lambda text, image: torch.ones(text + image, text + image).tril(), "triangle"),
        ("3.4", top_p_without_the_last, "crosses the threshold"),
        ("3.6", lambda nats, places: nats * places / math.log2(math.e), "divide by ln 2"),
        ("3.7", lambda text, drawn: drawn - 1, "start token too"),
    ],
)
def test_mistakes_are_recognised_by_what_they_compute(number, answer, message):
    verdict = judge(exercise(number), answer)
    assert not verdict.right and re.search(message, verdict.message), verdict.message


@pytest.mark.parametrize(
    ("number", "answer"),
    [
        ("2.1", lambda side, bits: 1 << (bits // (side * side))),
        ("2.2", lambda n: math.log2(len(n)) - torch.special.entr(n / n.sum()).sum() / math.log(2)),
        ("2.3", lambda n, decay, least: next(t for t in range(999) if n * decay**t < least)),
        ("3.2", lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)),
        ("3.4", lambda p, t: [0, 0.625, 0, 0.375, 0] if t > 0.5 else [0, 1.0, 0, 0, 0]),
    ],
)  # fmt: skip
def test_right_answers_may_be_written_in_other_ways(number, answer):
    assert judge(exercise(number), answer).right


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (None, "Give the function itself"),
        (lambda p, top_p: 1 / 0, "stops with ZeroDivisionError"),
        (lambda p: p, "stops with TypeError"),
        (lambda p, top_p: "0.625", "(str) is not what"),
        (lambda p, top_p: p[:2], "its shape is (2,), and should be (5,)"),
        (lambda p, top_p: (p, p), "returns 4 things, and 2"),
        (lambda p, top_p: p * torch.nan, "NaN"),
        (lambda p, top_p: p.mul_(2), "in place"),
        (lambda p, top_p: p, "Not yet: the check finds"),
    ],
)
def test_an_unknown_mistake_gets_a_general_message(answer, message):
    verdict = judge(exercise("3.4"), answer)
    assert not verdict.right and message in verdict.message


def test_an_exercise_shows_its_task_with_hint_and_solution_folded():
    task = exercise("2.1")
    assert repr(task).startswith("Exercise 2.1: The largest codebook within a budget ★ (5 min)")
    page = task._repr_markdown_()
    assert page.count("<details>") == page.count("</details>") == 2
    assert "return 2**bits_per_token" in page and task.hint in page


def test_unknown_exercises_list_the_known_ones():
    with pytest.raises(ValueError, match=r"no exercise '2.99'.*2.1, 2.2"):
        exercise("2.99")
    for odd in ("two", "99.1", ""):
        with pytest.raises(ValueError, match="none in that chapter"):
            exercise(odd)


def test_an_exercise_needs_a_message_for_every_mistake():
    code = Code(abs, abs, {"a": abs})
    with pytest.raises(ValueError, match="words for: a"):
        Exercise("9.1", "t", 1, 1, "task", "hint", "moral", {}, code)


# ---------------------------------------------------------------- quizzes


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_a_chapter_has_five_questions_with_a_reason_for_each_choice(chapter):
    questions = quiz(chapter)
    assert len(questions) == 5
    for question in questions:
        plain = question.as_dict()
        assert json.loads(json.dumps(plain)) == plain
        assert set(plain) == {"ask", "choices", "right"} and len(plain["choices"]) >= 3
        assert Question.from_dict(plain) == question
    assert len({question.right for question in questions}) > 1, "not always the same letter"


def test_the_quiz_widget_holds_the_questions():
    pytest.importorskip("t2ilearn.widgets.quiz")
    for chapter in CHAPTERS:
        shown = show_quiz(chapter)
        assert shown.questions == [question.as_dict() for question in quiz(chapter)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"right": "C"}, "right is one of A, B, not 'C'"),
        ({"right": ""}, "right is one of A, B"),
        ({"right": "AB"}, "right is one of A, B"),
        ({"choices": {"a": "so"}}, "1 choices, not 2 … 8"),
        ({"choices": {"a": "so", "b": " "}}, "a choice has no reason"),
        ({"choices": {"a": "so", "": "not so"}}, "a text is empty"),
        ({"choices": {"a": "so", "$b$": "not so"}}, "plain letters"),
    ],
)
def test_an_inconsistent_question_raises(change, message):
    good = Question("q?", {"a": "yes", "b": "no"}, "A")
    with pytest.raises(ValueError, match=re.escape("'q?': ") + ".*" + re.escape(message)):
        replace(good, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"choices": [["a", "yes"], ["a", "no"]]}, "stands there twice"),
        ({"choices": [["a"], ["b", "no"]]}, "choices with reasons"),
        ({"choices": None}, "choices with reasons"),
        ({"right": 2}, "right is one of A, B"),
        ({"right": 9}, "right is one of A, B"),
        ({"right": "A"}, None),
    ],
)
def test_a_question_from_a_page_is_checked_as_well(change, message):
    plain = {"ask": "q?", "choices": [["a", "yes"], ["b", "no"]], "right": 0} | change
    if message is None:
        assert Question.from_dict(plain).as_dict()["right"] == 0
        return
    with pytest.raises(ValueError, match=message):
        Question.from_dict(plain)


def test_a_missing_quiz_raises():
    with pytest.raises(ValueError, match="no quiz for chapter 99"):
        quiz(99)


# ---------------------------------------------------------------- budgets


@pytest.mark.parametrize("lab", [False, True], ids=["reading", "lab"])
@pytest.mark.parametrize("chapter", CHAPTERS)
def test_recorded_budgets_fit_the_notebooks(chapter, lab):
    shown = lessons.card(chapter, lab=lab)
    path = measure_budget.chapters()[f"{chapter}-lab" if lab else str(chapter)]
    words = measure_budget.count_words(nbformat.read(path, as_version=4).cells)
    assert abs(shown.words - words) <= 0.15 * words, "run python tools/measure_budget.py"
    assert re.fullmatch("[0-9a-f]{64}", shown.cells)
    assert shown.machine_minutes and shown.machine and "not measured" not in repr(shown)
    assert shown.exercises == tuple(task.minutes for task in exercises(chapter))
    assert shown.reading_minutes <= 75, "at most about an hour's reading"


def test_a_card_shows_what_was_not_measured():
    unknown = budget.Card("chapter 2", (5, 7), 5000, None, None, None, "")
    assert repr(unknown).count("not measured") == 2 and "25 min (5,000 words)" in repr(unknown)
    assert "about 12 min (2, in the lab)" in repr(unknown)
    known = budget.Card("chapter 2", (), 5000, 1.25, 1.5, "x86_64 CPU, 1 thread", "")
    assert "1.2 min (x86_64 CPU, 1 thread)" in repr(known) and "1.5 GB" in known._repr_html_()
    assert "<code>" not in known._repr_html_() and "trained" not in known._repr_html_()
    with pytest.raises(ValueError, match="No budget of chapter 99"):
        lessons.card(99)


def test_a_card_shows_the_commands_that_trained_the_weights():
    shown = lessons.card(2, weights=["judge", "vqvae-tiny"])
    for name in ("judge", "vqvae-tiny"):
        command = weights.load(name).card.command
        assert command.startswith("t2ilearn train ")
        assert re.search(f"^{name} +{re.escape(command)}$", repr(shown), re.MULTILINE)
        assert f"<code>{command}</code>" in shown._repr_html_()
    assert "what trained its weights" in shown._repr_html_()
    with pytest.raises(weights.WeightsError, match="Did you mean"):
        lessons.card(2, weights=["vqvae-tyni"])


def test_words_are_counted_without_code_and_formulas():
    text = "Two words.\n\n```python\nnot = these\n```\n\nAnd $x^2 + y$ too <br/> $$a = b$$ end."
    cells = [new_markdown_cell(text), new_code_cell("no = 'words here'")]
    assert measure_budget.count_words(cells) == len("Two words. And F too F end.".split())


@pytest.mark.slow
def test_the_tool_measures_an_execution_and_does_not_change_the_notebook(tmp_path):
    path = tmp_path / "toy.ipynb"
    cells = [new_markdown_cell("one two"), new_code_cell("import time\ntime.sleep(1)\nprint(1)")]
    path.write_text(nbformat.writes(new_notebook(cells=cells)), encoding="utf-8")
    before = path.read_bytes()
    measured = measure_budget.measure(path, execute=True)
    assert path.read_bytes() == before
    assert measured["words"] == 2 and measured["machine_minutes"] > 1 / 60
    assert 0.02 < measured["memory_gb"] < 2 and "CPU" in measured["machine"]
    assert measured["cells"] == measure_budget.fingerprint(cells)


# ---------------------------------------------------------------- pages with measurements


def page(name: str) -> str:
    return (measure_budget.ROOT / "book" / name).read_text(encoding="utf-8")


def blocks(name: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", page(name), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("number", range(12))
def test_the_code_of_every_refresher_runs(number):
    assert len(blocks("start.md")) == 12
    exec(blocks("start.md")[number], {})


def test_the_self_test_has_twelve_questions_of_three_choices_and_a_right_one():
    questions = re.findall(r'<fieldset class="check">.*?</fieldset>', page("start.md"), re.DOTALL)
    assert len(questions) == 12
    for number, question in enumerate(questions, 1):
        assert question.count('class="right"') == 1 and question.count('class="wrong"') == 2
        ids = re.findall(r' id="(\w+)"', question)
        assert ids == [f"check{number}{letter}" for letter in "abc"]
        assert re.findall(r'<label for="(\w+)"', question) == ids
        assert question.count('class="yes"') == question.count('class="refresher"') == 1
        words = re.sub(r"<[^>]+>", " ", question.partition('class="refresher"')[2]).split()
        assert 40 < len(words) < 180, "one screen"


def test_the_training_figures_of_the_trouble_page_were_measured():
    text = page("trouble.md")
    for name in ("vqvae-tiny", "prior-tiny"):
        card = weights.load(name).card
        facts = (f"{card.steps:,}", card.minutes, card.device, card.precision)
        assert f"| `{name}` | {' | '.join(map(str, facts))} |" in text, "mend book/trouble.md"
    losses = []
    for name, term, digits in (("vqvae-tiny", "reconstruction", 4), ("prior-tiny", "total", 2)):
        path = weights.ASSETS / "flights" / name / "flight.json"
        values = json.loads(path.read_text(encoding="utf-8"))["curves"][term]
        n, width = len(values), len(values) // 50
        ends = [int(n * share) for share in (0.1, 0.25, 0.5, 1)]
        losses.append([f"{sum(values[e - width : e]) / width:.{digits}f}" for e in ends])
    for share, *row in zip(("a tenth", "a quarter", "half", "all"), *losses, strict=True):
        assert f"| {share} | {' | '.join(row)} |" in text, "mend book/trouble.md"


def test_the_drawing_figures_of_the_trouble_page_were_measured():
    folder = measure_budget.ROOT / "tests" / "benchmarks"
    rows = json.loads((folder / "results.json").read_text(encoding="utf-8"))["rows"]
    found = {row["what"]: row["value"] for row in rows}
    assert f"{found['draw, peak memory of the process']:.1f} GB" in page("trouble.md")
    assert found["sampling, 6.6 M, without / with cache"] > 3
    assert re.search(r"more than\s+three times", page("trouble.md"))
    assert found["draw --with vqvae, four pictures"] < 0.5
    settings = json.loads((folder / "sampling.json").read_text(encoding="utf-8"))["vqvae-tiny"]
    right = {(r["guidance_scale"], r["top_p"]): r["alignment"] for r in settings["rows"]}
    for top_p in (1.0, 0.95, 0.9, 0.8):
        assert 0.4 < right[3.0, top_p] / right[1.5, top_p] < 0.6


def test_glossary_terms_are_used_by_the_chapters():
    terms = re.findall(r"^(\w.*)\n  \S", page("glossary.md"), re.MULTILINE)
    assert len(terms) > 50 and len(set(terms)) == len(terms)
    text = " ".join(path.read_text(encoding="utf-8") for path in FOLDER.glob("chapter*.toml"))
    for path in measure_budget.chapters().values():
        cells = nbformat.read(path, as_version=4).cells
        text = " ".join((text, *(cell.source for cell in cells)))  # not pictures in base64
    for term in terms:
        heads = re.split(r", | and ", term)
        known = [
            re.search(rf"\b{re.escape(head.split()[0][:6])}", text, re.IGNORECASE) for head in heads
        ]
        assert all(known), f"no chapter uses {term!r}"
