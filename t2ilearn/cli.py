"""The command line: `t2ilearn draw | redraw | train | weights`.

Imports of torch wait until a command needs them, so that `--help` answers at once.
"""

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


@app.command()
def draw(
    caption: Annotated[str, typer.Argument(help="What to draw, as an English sentence.")],
    system: Annotated[
        str, typer.Option("--with", help="vqvae, vqgan, dalle …, or a prior's run folder.")
    ] = "vqvae",
    seed: Annotated[int, typer.Option(help="Same seed, same pictures.")] = 0,
    count: Annotated[int, typer.Option(help="How many pictures.")] = 4,
    guidance_scale: Annotated[
        float, typer.Option(help="1: as learned; more: insist on the caption.")
    ] = 2.0,
    best_of: Annotated[int, typer.Option(help="Draw so many for each one kept.")] = 1,
    temperature: Annotated[float, typer.Option(help="Below 1: safer; 0: greedy.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="Keep the likeliest share of codes; 1: all.")] = 0.9,
    top_k: Annotated[int | None, typer.Option(help="Keep so many likeliest codes.")] = None,
    scorer: Annotated[
        str | None, typer.Option(help="Who chooses the best: reader or likelihood.")
    ] = None,
    finish: Annotated[
        Path | None,
        typer.Option(help="A picture to finish: its upper part stays; the caption may be ''."),
    ] = None,
    rows: Annotated[int, typer.Option(help="With --finish: so many of 8 rows stay.")] = 4,
    out: Annotated[Path, typer.Option(help="Where to write the picture.")] = Path("drawing.png"),
) -> None:
    """Draw pictures for a caption and say how many show what it states."""
    from t2ilearn import drawing

    how: dict[str, Any] = {
        "system": system,
        "seed": seed,
        "count": count,
        "guidance_scale": guidance_scale,
        "best_of": best_of,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "scorer": scorer,
    }
    if finish is None:
        drawn = drawing.draw(caption, **how)
    else:
        side = drawing.load_system(system).vqvae.config.resolution
        drawn = drawing.complete(picture_file(finish, side), caption, rows=rows, **how)
    _report(drawn, out)


def picture_file(path: Path, side: int) -> "Tensor":
    """A picture of any size as a tensor: its central square, (3, side, side) in [−1, 1].

    Raises:
        FolderError: if it is missing, or no picture that can be read.
    """
    from t2ilearn.data.picture_files import FolderError, read_picture, shrink

    if not path.is_file():
        raise FolderError(f"There is no picture {path}.")
    try:
        return shrink(read_picture(path), side).float().div(127.5).sub(1)
    except FolderError as error:
        raise FolderError(f"{path} {error}.") from None


@app.command()
def redraw(
    file: Annotated[Path, typer.Argument(help="A picture that `draw` wrote.")],
    out: Annotated[Path, typer.Option(help="Where to write the picture.")] = Path("redrawn.png"),
) -> None:
    """Repeat a drawing from what its file remembers."""
    from t2ilearn.drawing import redraw as redraw_file

    _report(redraw_file(file), out)


def _report(drawing: "Drawing", out: Path) -> None:
    drawing.save(out)
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
    system: Annotated[
        str, typer.Argument(help="judge, reader, emoji-judge, vqvae, prior, pixelcnn, vqgan …")
    ],
    preset: Annotated[str, typer.Option(help="tiny (a laptop) or book (a GPU).")] = "tiny",
    data: Annotated[
        Path | None, typer.Option(help="Your own pictures: a folder with a captions.csv.")
    ] = None,
    runs: Annotated[
        Path | None, typer.Option(help="Folder for results; by default runs, or runs/DATA.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Instead of the preset's number.")] = None,
    precision: Annotated[str | None, typer.Option(help="no, bf16 or fp16.")] = None,
) -> None:
    """Train a part of a system; an interrupted run goes on where it stopped."""
    from t2ilearn.recipes import train_system

    path = train_system(system, preset, runs, data=data, steps=steps, precision=precision)
    typer.echo(f"Weights: {path}")


@app.command()
def weights() -> None:
    """List the weights that ship, with their measured figures."""
    from t2ilearn.weights import available, figure, load

    for name in available():
        card = load(name).card
        made = f"{card['parameters'] / 1e6:.2f} M parameters, {card['minutes']:g} min"
        typer.echo(f"{name}  {card['sha256'][:8]}  {made} on {card['device']}")
        for what, value in card["metrics"].items():
            typer.echo(f"    {what}: {figure(value)}")


def main() -> None:
    """Run the command line; errors meant for people are printed without a traceback."""
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
