"""The command line: `t2ilearn draw | redraw | vary | blend | train | systems | evaluate | weights`.

Imports of torch wait until a command needs them, so that `--help` answers at once.
"""

import io
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from torch import Tensor

    from t2ilearn.drawing import Drawing

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Pictures from words, by models small enough to read.",
)


@app.command(context_settings={"ignore_unknown_options": True})
def draw(
    caption: Annotated[
        list[str],
        typer.Argument(
            metavar="CAPTION",
            help="What to draw, as an English sentence in quotes; the system's own options.",
        ),
    ],
    system: Annotated[
        str | None,
        typer.Option("--with", help="One of `t2ilearn systems`, or a run's folder; else the best."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Same seed, same pictures.")] = 0,
    count: Annotated[int, typer.Option(help="How many pictures.")] = 4,
    best_of: Annotated[int, typer.Option(help="Draw so many for each one kept.")] = 1,
    scorer: Annotated[str | None, typer.Option(help="What chooses the best.")] = None,
    finish: Annotated[
        Path | None,
        typer.Option(help="A picture to finish: its upper part stays; the caption may be ''."),
    ] = None,
    rows: Annotated[int, typer.Option(help="With --finish: so many of 8 rows stay.")] = 4,
    out: Annotated[
        Path | None,
        typer.Option(help="Where to write the picture; else drawing.png, drawing-2.png, …"),
    ] = None,
) -> None:
    """Draw pictures for a caption and say how many show what it states.

    A system's own options are given by name, such as --guidance-scale 3; `t2ilearn systems` lists
    them.
    """
    from t2ilearn import drawing
    from t2ilearn.systems import registry

    drawing.check_png(out or "drawing.png")
    text, options = caption_and_options(caption)
    how: dict[str, Any] = {
        "system": system,
        "seed": seed,
        "count": count,
        "best_of": best_of,
        "scorer": scorer,
    }
    if clash := options.keys() & {*how, "caption", "picture", "rows"}:
        name = clash.pop().replace("_", "-")
        raise ValueError(f"There is no option --{name} here; `t2ilearn draw --help` lists them.")
    how |= options
    if finish is None:
        drawn = drawing.draw(text, **how)
    else:
        side = registry.load(system).resolution
        drawn = drawing.complete(picture_file(finish, side), text, rows=rows, **how)
    _report(drawn, out, "drawing.png")


def caption_and_options(arguments: list[str]) -> tuple[str, dict[str, str]]:
    """["a star", "--top-p", "0.9"] or ["--top-p=0.9", "a star"] → "a star", {"top_p": "0.9"}.

    Raises:
        ValueError: for a name without a value, or not exactly one argument without a name.
    """
    captions, found, rest = [], {}, list(arguments)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        if not name.startswith("--"):
            captions.append(word)
            continue
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise ValueError(f"The option {name} needs a value.")
            value = rest.pop(0)
        found[name.removeprefix("--").replace("-", "_")] = value
    if not captions:
        raise ValueError("There is no caption: say what to draw, in quotes.")
    if len(captions) > 1:
        raise ValueError(
            f"Unexpected argument {captions[1]!r}. A caption of several words is quoted."
        )
    return captions[0], found


def picture_file(path: Path, side: int) -> "Tensor":
    """A picture of any size as a tensor: its central square, (3, side, side) in [−1, 1].

    Raises:
        FolderError: if it is missing, or no picture that can be read.
    """
    from t2ilearn.data.picture_files import FolderError, read_picture, shrink
    from t2ilearn.data.pixels import pictures_from_bytes

    if not path.is_file():
        raise FolderError(f"There is no picture {path}.")
    try:
        return pictures_from_bytes(shrink(read_picture(path), side))
    except FolderError as error:
        raise FolderError(f"{path} {error}.") from None


@app.command()
def redraw(
    file: Annotated[Path, typer.Argument(help="A picture that `draw` wrote.")],
    out: Annotated[
        Path | None,
        typer.Option(help="Where to write the picture; else redrawn.png, redrawn-2.png, …"),
    ] = None,
) -> None:
    """Repeat a drawing from what its file remembers."""
    from t2ilearn import drawing

    drawing.check_png(out or "redrawn.png")
    _report(drawing.redraw(file), out, "redrawn.png")


_VARYING = typer.Option("--with", help="A system that embeds pictures, or a run's folder.")


@app.command(context_settings={"ignore_unknown_options": True})
def vary(
    file: Annotated[Path, typer.Argument(help="A picture; its central square is taken.")],
    more: Annotated[
        list[str] | None,
        typer.Argument(metavar="[OPTIONS]", help="The system's own options, by name."),
    ] = None,
    caption: Annotated[str, typer.Option(help="What the decoder reads besides.")] = "",
    less: Annotated[str, typer.Option("--from", help="A text that fits the picture.")] = "",
    to: Annotated[str, typer.Option(help="A text that shall fit instead: with --from.")] = "",
    system: Annotated[str | None, _VARYING] = None,
    seed: Annotated[int, typer.Option(help="Same seed, same pictures.")] = 0,
    count: Annotated[int, typer.Option(help="How many pictures.")] = 4,
    out: Annotated[
        Path | None, typer.Option(help="Where to write; else variations.png, variations-2.png, …")
    ] = None,
) -> None:
    """Draw variations of a picture: what its embedding keeps stays, the rest is drawn anew."""
    from t2ilearn import drawing
    from t2ilearn.systems import Prompt

    drawing.check_png(out or "variations.png")
    if bool(less) != bool(to) or (less and caption):
        raise ValueError("--from and --to go together, and without --caption.")
    words = (Prompt(less, -1.0), Prompt(to)) if less else caption
    side, options = drawing.resolution_of(system), _own_options(more)
    picture = picture_file(file, side)
    drawn = drawing.vary(picture, words, system=system, seed=seed, count=count, **options)
    _report(drawn, out, "variations.png")


@app.command(context_settings={"ignore_unknown_options": True})
def blend(
    first: Annotated[Path, typer.Argument(help="A picture; its central square is taken.")],
    second: Annotated[Path, typer.Argument(help="Another one.")],
    more: Annotated[
        list[str] | None,
        typer.Argument(metavar="[OPTIONS]", help="The system's own options, by name."),
    ] = None,
    system: Annotated[str | None, _VARYING] = None,
    seed: Annotated[int, typer.Option(help="Same seed, same pictures.")] = 0,
    count: Annotated[int, typer.Option(help="How many pictures, both ends included.")] = 5,
    out: Annotated[
        Path | None, typer.Option(help="Where to write; else blend.png, blend-2.png, …")
    ] = None,
) -> None:
    """Draw the way from one picture to another, between their embeddings."""
    from t2ilearn import drawing

    drawing.check_png(out or "blend.png")
    side, options = drawing.resolution_of(system), _own_options(more)
    one, other = (picture_file(file, side) for file in (first, second))
    drawn = drawing.blend(one, other, system=system, seed=seed, count=count, **options)
    _report(drawn, out, "blend.png")


def _own_options(arguments: list[str] | None) -> dict[str, str]:
    """A system's own options, as the command line gives them after the rest."""
    return caption_and_options(["", *(arguments or [])])[1]


def _report(drawing: "Drawing", out: Path | None, usual: str) -> None:
    """Save where the user says, else under the usual name or the next free one; say where."""
    out = drawing.save_new(usual) if out is None else drawing.save(out)
    if sys.stdout.isatty():
        typer.echo(terminal_picture(drawing))
    typer.echo(f"{out}: {drawing.verdict()}.")


def terminal_picture(drawing: "Drawing", width: int = 100) -> str:
    """The drawing in half blocks of 24-bit colour, at most `width` characters wide."""
    image = drawing.image()
    width = min(width, image.width)
    height = max(2, round(image.height * width / image.width / 2) * 2)
    image = image.resize((width, height))
    lines = []
    for y in range(0, height, 2):
        cells = []
        for x in range(width):
            upper, lower = image.getpixel((x, y)), image.getpixel((x, y + 1))
            assert isinstance(upper, tuple) and isinstance(lower, tuple)
            cells.append(
                f"\x1b[38;2;{upper[0]};{upper[1]};{upper[2]}m"
                f"\x1b[48;2;{lower[0]};{lower[1]};{lower[2]}m▀"
            )
        lines.append("".join(cells) + "\x1b[0m")
    return "\n".join(lines)


@app.command()
def train(
    system: Annotated[str, typer.Argument(help="A system of `t2ilearn systems`, readers, or all.")],
    preset: Annotated[str, typer.Option(help="tiny (a laptop) or book (what ships).")] = "tiny",
    stage: Annotated[str | None, typer.Option(help="This stage alone.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="Your own pictures: a folder with a caption table.")
    ] = None,
    runs: Annotated[
        Path | None, typer.Option(help="Folder for results; by default runs, or runs/DATA.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Instead of the preset's number.")] = None,
    precision: Annotated[str | None, typer.Option(help="no, bf16 or fp16.")] = None,
    dry_run: Annotated[bool, typer.Option(help="Say what would be trained, and stop.")] = False,
) -> None:
    """Train every stage of a system that is missing; a stage that was stopped goes on."""
    from t2ilearn.systems.plan import plan, train_system

    if dry_run:
        for step in plan(system, preset, runs, stage=stage, data=data, steps=steps):
            took = f"{step.minutes:g} min on {step.device}" if step.minutes else "not measured"
            state = "done" if step.done else "to train"
            typer.echo(f"{step.stage.name:24} {state:9} {took}")
        return
    path = train_system(
        system, preset, runs, stage=stage, data=data, steps=steps, precision=precision
    )
    typer.echo(f"Weights: {path}")


@app.command()
def systems() -> None:
    """List what can draw, what each system has learned, and its options."""
    from t2ilearn.systems import registry
    from t2ilearn.systems.base import options_text

    best = registry.best()
    for name in registry.names():
        system = registry.load(name)
        learned = ", ".join(system.worlds) or "no world of ours"
        mark = "  (the default)" if name == best else ""
        typer.echo(f"{name}  {registry.title(name)}{mark}")
        typer.echo(f"    learned: {learned}, {system.resolution}×{system.resolution} pixels")
        typer.echo(f"    options: {options_text(system.Options())}")
        typer.echo(f"    scorers: {', '.join(system.scorers()) or 'none'}")


@app.command()
def evaluate(
    system: Annotated[str, typer.Argument(help="One of `t2ilearn systems`, or a run's folder.")],
    n: Annotated[int, typer.Option("--n", help="Pictures of each test set.")] = 500,
    keep: Annotated[
        Path | None,
        typer.Option(help="A JSON file for the figures; an evaluation that stopped goes on there."),
    ] = None,
) -> None:
    """Measure a system on the test sets of the worlds that it learned."""
    from t2ilearn.systems import evaluate_system, registry
    from t2ilearn.weights import figure

    if n < 8:
        raise ValueError(f"An evaluation needs 8 pictures at least, not {n}.")
    for what, value in evaluate_system(registry.load(system), n=n, keep=keep).items():
        typer.echo(f"{what}: {figure(value)}")


@app.command()
def weights() -> None:
    """List the weights that ship, with their measured figures."""
    from t2ilearn.weights import available, figure, load

    for name in available():
        card = load(name).card
        made = f"{card.parameters / 1e6:.2f} M parameters, {card.minutes:g} min"
        typer.echo(f"{name}  {card.sha256[:8]}  {made} on {card.device}")
        for what, value in card.metrics.items():
            typer.echo(f"    {what}: {figure(value)}")


def main() -> None:
    """Run the command line; errors meant for people are printed without a traceback."""
    for stream in (sys.stdout, sys.stderr):  # a page without "é" or "±" gets "?" there
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        app(standalone_mode=False)
    except typer.Exit as stop:
        raise SystemExit(stop.exit_code) from None
    except typer.Abort:
        typer.echo("Stopped.", err=True)
        raise SystemExit(130) from None
    except (ValueError, OSError, RuntimeError) as error:
        typer.echo(f"{type(error).__name__}: {error}", err=True)
        raise SystemExit(2) from None
    except Exception as error:  # click's usage errors carry their own text and exit status
        show = getattr(error, "show", None)
        if show is None:
            raise
        show()
        raise SystemExit(getattr(error, "exit_code", 2)) from None
