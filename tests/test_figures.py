"""Figures show their data, raise for wrong arguments, and are readable on any background."""

import matplotlib.pyplot as plt
import pytest
import torch
from matplotlib.colors import to_rgb

from t2ilearn import figures
from t2ilearn.figures import bars, captioned, curves, grid, matrix, show_source, usage
from t2ilearn.models.sampling import check_options, sample_from_logits
from t2ilearn.models.transformer import TransformerPrior


def pictures_of(figure):
    """The arrays that a figure shows, in order."""
    return [image.get_array() for axes in figure.axes for image in axes.get_images()]


def texts_of(axes):
    return [text.get_text() for text in axes.texts]


def contrast(one, other):
    """WCAG's ratio of two colours' luminances."""

    def luminance(colour):
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
        return sum(a * b for a, b in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted((luminance(to_rgb(one)), luminance(to_rgb(other))))
    return (high + 0.05) / (low + 0.05)


def test_grid_shows_each_picture_unsmoothed_under_its_title():
    pictures = torch.linspace(-1, 1, 5 * 3 * 4 * 4).view(5, 3, 4, 4)
    titles = ["a star", "", "a small solid red star above a large blue ring", "b", "c"]
    figure = grid(pictures, titles, columns=2, caption="five")
    shown = pictures_of(figure)
    assert len(shown) == 5
    for array, picture in zip(shown, pictures, strict=True):
        assert torch.allclose(torch.tensor(array), (picture.permute(1, 2, 0) + 1) / 2)
    assert figure.axes[2].get_title().replace("\n", " ") == titles[2]
    assert "\n" in figure.axes[2].get_title()
    assert all(i.get_interpolation() == "nearest" for a in figure.axes for i in a.get_images())
    assert [text.get_text() for text in figure.texts] == ["five"]


def test_grid_places_no_picture_over_another():
    figure = grid(torch.zeros(7, 3, 4, 4), ["x" * 60] * 7, columns=3)
    boxes = [axes.get_position() for axes in figure.axes]
    for i, one in enumerate(boxes):
        assert 0 <= one.x0 < one.x1 <= 1 and 0 <= one.y0 < one.y1 <= 1
        assert not any(one.overlaps(other) for other in boxes[i + 1 :])
    assert boxes[0].y0 > boxes[3].y1  # the second row is below


def test_grid_takes_values_out_of_range_without_changing_them():
    pictures = torch.full((1, 3, 2, 2), 7.0)
    assert pictures_of(grid(pictures))[0].max() == 1
    assert pictures.max() == 7


def test_grid_raises_for_wrong_arguments():
    with pytest.raises(ValueError, match="2 pictures but 1 titles"):
        grid(torch.zeros(2, 3, 4, 4), ["one"])
    with pytest.raises(ValueError, match="columns"):
        grid(torch.zeros(2, 3, 4, 4), columns=0)
    with pytest.raises(ValueError, match="shape"):
        grid(torch.zeros(0, 3, 4, 4))


CURVES = {
    "step": [10, 20, 30],
    "reconstruction": [3.0, 2.0, 1.0],
    "total": [3.1, 2.1, 1.01],
    "gradient_norm": [9.0, 9.0, 9.0],
    "learning_rate": [1.0, 1.0, 1.0],
}


def test_curves_draw_the_loss_terms_and_label_each_at_its_end():
    (axes,) = curves(CURVES).axes
    assert [list(line.get_ydata()) for line in axes.get_lines()] == [
        CURVES["reconstruction"],
        CURVES["total"],
    ]
    assert sorted(texts_of(axes)) == ["reconstruction", "total"]
    for text, line in zip(axes.texts, axes.get_lines(), strict=True):
        assert text.get_color() == line.get_color()
    heights = [text.get_position()[1] for text in axes.texts]
    assert abs(heights[0] - heights[1]) > 0.07  # though the lines end close together


def test_curves_take_names_a_logarithm_and_another_axis():
    (axes,) = curves({"n": [1, 2], "distance": [4.0, 1.0]}, x="n", log=True).axes
    assert axes.get_yscale() == "log" and axes.get_xlabel() == "n"
    (axes,) = curves(CURVES, ["gradient_norm"]).axes
    assert texts_of(axes) == ["gradient_norm"]
    with pytest.raises(ValueError, match="no 'loss' among .*total"):
        curves(CURVES, ["loss"])


def test_bars_stand_between_floor_and_ceiling():
    (axes,) = bars({"real": 99.1, "drawn": 71.25}, floor=2, ceiling=99.1, digits=1).axes
    assert [patch.get_width() for patch in axes.patches] == [99.1, 71.25]
    assert axes.patches[0].get_y() > axes.patches[1].get_y()  # the first on top
    assert texts_of(axes) == ["99.1", "71.2", "floor", "ceiling"]


def test_usage_sorts_the_indices_and_states_how_many_are_used():
    (axes,) = usage(torch.tensor([[3, 3, 3], [1, 1, 0]]), 8).axes
    assert texts_of(axes) == ["38% of 8 codes used, perplexity 3"]
    heights = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert heights.max() == 3
    with pytest.raises(ValueError, match="0 … 7"):
        usage(torch.tensor([8]), 8)


def test_matrix_draws_row_i_as_line_i():
    values = torch.tensor([[1.0, 0.0], [0.5, 0.5]])
    figure = matrix(values, ["a", "b"], ["c", "d"], digits=1)
    assert pictures_of(figure)[0].tolist() == values.tolist()
    assert texts_of(figure.axes[0]) == ["1.0", "0.0", "0.5", "0.5"]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["a", "b"]
    assert pictures_of(matrix(torch.eye(3, dtype=torch.bool)))[0].max() == 1


def test_figures_are_shown_once_and_on_any_ground():
    before = plt.get_fignums()
    figure = curves(CURVES)
    assert plt.get_fignums() == before
    assert figure.patch.get_alpha() == 0 and figure.axes[0].patch.get_alpha() == 0
    assert contrast(figures.GREY, "white") > 4.5 and contrast(figures.GREY, "#121212") > 4
    assert all(contrast(c, g) > 3 for c in figures.COLOURS for g in ("white", "#121212"))


def test_source_is_shown_as_it_runs():
    text = show_source(sample_from_logits, TransformerPrior._mask).data
    assert text.startswith("```python\n# t2ilearn/models/sampling.py\ndef sample_from_logits(")
    assert text.endswith("\n```") and text.count("```") == 2
    assert "Sample one token a row" in text and "\ndef _mask(self" in text


def test_source_without_docstrings_still_runs():
    text = show_source(sample_from_logits, docstrings=False).data
    assert '"""' not in text and "torch.multinomial" in text and "temperature: float" in text
    code = "from __future__ import annotations\nimport math, torch\n"
    names: dict = {"check_options": check_options}  # the module's own, which it calls
    exec(code + text.removeprefix("```python\n").removesuffix("```"), names)
    assert names["sample_from_logits"](torch.tensor([[0.0, 9.0]]), temperature=0.0).tolist() == [1]
    whole = show_source(TransformerPrior, docstrings=False).data
    assert '"""' not in whole and "def next_logits" in whole and "\n\n\n" not in whole


def test_source_says_what_has_none():
    with pytest.raises(ValueError, match="no Python source"):
        show_source(len)


def test_a_caption_stands_below_everything_else():
    figure = curves({"step": [1, 2], "loss": [2.0, 1.0]}, ylabel="nats")
    before, texts = figure.get_tightbbox(), len(figure.texts)
    assert captioned(figure, "It falls.") is figure
    assert len(figure.texts) == texts + 1 and figure.texts[-1].get_text() == "It falls."
    drawn = figure.texts[-1].get_window_extent()
    assert drawn.y1 / figure.dpi <= before.y0 and figure.get_tightbbox().y0 < before.y0


def test_a_caption_stands_below_what_a_layout_has_moved():
    figure, panels = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
    for panel in panels:
        panel.set(xticks=[], yticks=[], aspect="equal")
    plt.close(figure)
    captioned(figure, "Two squares.")
    figure.draw_without_rendering()
    lowest = min(panel.get_window_extent().y0 for panel in panels)
    assert figure.texts[-1].get_window_extent().y1 <= lowest


def test_a_long_caption_is_written_in_lines_that_its_figure_has_room_for():
    words = "a caption of many words that says what to see, and then says a little more of it. " * 2
    for figure in (grid(torch.zeros(3, 3, 4, 4), caption=words), captioned(curves(CURVES), words)):
        (text,) = figure.texts
        assert text.get_text().count("\n") >= 1 and text.get_text().split() == words.split()
        box = text.get_window_extent()
        assert box.width < 1.1 * figure.get_tightbbox().width * figure.dpi
    above = grid(torch.zeros(3, 3, 4, 4), caption=words)
    (text,) = above.texts
    lowest = min(axes.get_window_extent().y0 for axes in above.axes)
    assert 0 <= text.get_window_extent().y0 and text.get_window_extent().y1 <= lowest


@pytest.mark.parametrize("plain", [False, True])
def test_a_notebook_keeps_a_caption_beside_its_picture(plain):
    from IPython.core.interactiveshell import InteractiveShell
    from matplotlib_inline.backend_inline import select_figure_formats

    shell = InteractiveShell.instance()
    try:
        select_figure_formats(shell, {"png"})
        figure = curves(CURVES) if plain else captioned(curves(CURVES), "It falls.")
        data, metadata = shell.display_formatter.format(figure)
    finally:
        InteractiveShell.clear_instance()
    assert len(data["image/png"]) > 1000
    if plain:
        assert data["text/plain"].startswith("<Figure size") and not metadata
    else:
        assert data["text/plain"] == "Figure: It falls."
        assert metadata == {"image/png": {"alt": "It falls."}}
