"""Widgets that compute in the page: codebook, straight-through, attention, logits."""

import random
from collections.abc import Sequence
from typing import Any

import traitlets

from t2ilearn.widgets.base import Widget, joined, listed, numbers, points

# The toy world of chapter 2: six code vectors, and the centres of the encodings.
CODE_VECTORS = ((-0.7, 0.1), (-1.5, 1.3), (0.5, 0.6), (1.5, 1.1), (1.9, -1.5), (0.3, -0.5))
CENTRES = ((-1.1, 0.6), (1.0, 0.9), (0.1, -1.0))
PLANE = 2.4  # what the codebook lab shows: −2.4 … 2.4, both ways
ATTENTION_PLANE = 2.5
WORDS = ("small", "red", "star", "above", "ring")


def _around(centres: Any, count: int, spread: float, seed: int) -> list[tuple[float, float]]:
    """Points about centres in turn, none outside the plane."""
    source = random.Random(seed)
    places = [centres[i % len(centres)] for i in range(count)]
    near = [[source.gauss(v, spread) for v in place] for place in places]
    return [(max(-PLANE, min(PLANE, x)), max(-PLANE, min(PLANE, y))) for x, y in near]


class CodebookLab(Widget):
    """A codebook in the plane: three loss terms at work, or collapse and its cures.

    Args:
        code_vectors: K points (K, 2) in −2.4 … 2.4; by default the six of chapter 2.
        encodings: z, (n, 2), which are also the decoder's targets; 18 by default.
        beta: β to begin with.
        mode: what it is about, "terms" or "collapse".
        seed: of the encodings and code vectors of "collapse".

    Raises:
        ValueError: for points outside the plane, a negative β, or another mode.
    """

    _esm = joined(
        *("shared", "plane", "codebook_maths", "codebook_terms", "codebook_collapse", "codebook")
    )
    code_vectors = listed()
    encodings = listed()
    beta = traitlets.Float().tag(sync=True)
    mode = traitlets.Unicode().tag(sync=True)
    cloud = listed()
    random_code_vectors = listed()
    seed = traitlets.Int().tag(sync=True)

    def __init__(
        self,
        code_vectors: Any = CODE_VECTORS,
        encodings: Any = None,
        beta: float = 0.25,
        mode: str = "terms",
        seed: int = 0,
    ) -> None:
        super().__init__(
            code_vectors=points(code_vectors, "code_vectors", PLANE, 2),
            encodings=points(
                _around(CENTRES, 18, 0.4, 1) if encodings is None else encodings, "encodings", PLANE
            ),
            beta=beta,
            mode=mode,
            seed=seed,
            # Encodings begin in one corner; random code vectors lie all over the plane.
            cloud=points(_around(((0.5, 1.5), (1.1, 0.9), (1.6, 1.7)), 96, 0.3, seed), "", PLANE),
            random_code_vectors=points(_around(((0.0, 0.0),), 32, 0.9, seed + 1), "", PLANE),
            fallback=(
                "Codebook lab: drag code vectors and encodings, and see which loss term moves "
                "which of them."
            ),
        )

    @traitlets.validate("code_vectors", "encodings")
    def _check_points(self, proposal: Any) -> list[list[float]]:
        name = proposal["trait"].name
        return points(proposal["value"], name, PLANE, 2 if name == "code_vectors" else 1)

    @traitlets.validate("beta")
    def _check_beta(self, proposal: Any) -> float:
        return numbers([proposal["value"]], "beta", 0.0, 8.0)[0]

    @traitlets.validate("mode")
    def _check_mode(self, proposal: Any) -> str:
        if proposal["value"] not in ("terms", "collapse"):
            raise ValueError(f'mode is "terms" or "collapse", not {proposal["value"]!r}.')
        return proposal["value"]


class StraightThrough(Widget):
    """A step function of codebook entries: its true gradient, the copied one, and a soft one.

    Args:
        code_vectors: two or more different numbers, the steps.
        z: the encoding at the start.
        target: the z_q at which the reconstruction loss is 0.

    Raises:
        ValueError: for fewer code vectors, or numbers beyond ± 100.
    """

    _esm = joined("shared", "plane", "straight_through")
    code_vectors = listed()
    z = traitlets.Float().tag(sync=True)
    target = traitlets.Float().tag(sync=True)

    def __init__(
        self, code_vectors: Any = (-2, -1, 0, 1, 2), z: float = -1.3, target: float = 0.4
    ) -> None:
        fallback = "Straight-through estimator: a step function's gradient, true, copied or soft."
        super().__init__(code_vectors=list(code_vectors), z=z, target=target, fallback=fallback)

    @traitlets.validate("code_vectors")
    def _check_code_vectors(self, proposal: Any) -> list[float]:
        given = numbers(proposal["value"], "code_vectors", -100.0, 100.0)
        if len(set(given)) < max(2, len(given)):
            raise ValueError(f"code_vectors must be two or more different numbers, not {given}.")
        return given

    @traitlets.validate("z", "target")
    def _check_number(self, proposal: Any) -> float:
        return numbers([proposal["value"]], proposal["trait"].name, -100.0, 100.0)[0]


class AttentionLab(Widget):
    """Tokens with queries, keys and values in the plane; one query gets a weighted average.

    Args:
        words: the tokens, at most six.
        queries, keys, values: q, k and v, one point a token, (T, 2), in −2.5 … 2.5.
        asks: the token whose query is shown first, from 0; by default the third, or second of two.

    Raises:
        ValueError: if these are not as many points as words, or one lies outside.
    """

    _esm = joined("shared", "plane", "attention")
    words = traitlets.List(traitlets.Unicode()).tag(sync=True)
    q = listed()  # not `keys`: that is every widget's own list of its traits
    k = listed()
    v = listed()
    asks = traitlets.Int().tag(sync=True)

    def __init__(
        self,
        words: Sequence[str] = WORDS,
        queries: Any = ((0.6, 1.6), (1.4, 0.8), (-1.6, 1.2), (-0.6, -1.6), (-1.2, 1.0)),
        keys: Any = ((-1.9, 0.3), (-1.2, 1.7), (1.5, 1.3), (0.3, -1.8), (1.9, -0.6)),
        values: Any = ((-1.6, -1.2), (1.5, 1.6), (-0.4, 1.7), (0.2, -1.7), (1.7, -0.5)),
        asks: int | None = None,
    ) -> None:
        asks = min(2, len(words) - 1) if asks is None else asks
        places = {"q": queries, "k": keys, "v": values}
        fallback = "Attention: scores, softmax, and a weighted average of values."
        traits = {name: points(value, name, ATTENTION_PLANE) for name, value in places.items()}
        super().__init__(words=list(words), asks=asks, fallback=fallback, **traits)

    @traitlets.validate("q", "k", "v")
    def _check_points(self, proposal: Any) -> list[list[float]]:
        name, count = proposal["trait"].name, len(self.words)
        rows = points(proposal["value"], name, ATTENTION_PLANE)
        if len(rows) != count or not 2 <= count <= 6:
            raise ValueError(f"{name} are {len(rows)} for {count} words; two to six of each.")
        return rows

    @traitlets.validate("asks")
    def _check_asks(self, proposal: Any) -> int:
        if not 0 <= proposal["value"] < len(self.words):
            raise ValueError(f"asks must be 0 … {len(self.words) - 1}, not {proposal['value']}.")
        return proposal["value"]


class LogitViewer(Widget):
    """One row of logits: guidance, temperature, top-k and top-p as in `sample_from_logits`.

    Args:
        logits: K of them, of a model that knows the caption.
        unconditional: K of the same model without caption; without them there is no guidance.
        names: what each is called; by default its number.
        what: the column's head, such as "token".
        seed: of the samples.

    Raises:
        ValueError: if the lists differ in length, or a number is not finite.
    """

    _esm = joined("shared", "logits")
    logits = listed()
    unconditional = listed()
    names = traitlets.List(traitlets.Unicode()).tag(sync=True)
    what = traitlets.Unicode().tag(sync=True)
    seed = traitlets.Int().tag(sync=True)

    def __init__(
        self,
        logits: Any = (2.6, 2.1, 1.4, 1.2, 0.7, 0.2, -0.4, -1.1),
        unconditional: Any = (),
        names: Sequence[str] | None = None,
        what: str = "token",
        seed: int = 0,
    ) -> None:
        row = numbers(logits, "logits")
        super().__init__(
            logits=row,
            unconditional=[float(v) for v in unconditional],
            names=[str(i) for i in range(len(row))] if names is None else list(names),
            what=what,
            seed=seed,
            fallback=f"Logit viewer: {len(row)} logits under temperature, top-k and top-p.",
        )

    @traitlets.validate("logits", "unconditional", "names")
    def _check_lists(self, proposal: Any) -> list:
        name, value, count = proposal["trait"].name, proposal["value"], len(self.logits)
        if len(value) != count and (value or name != "unconditional"):
            raise ValueError(f"{name} are {len(value)} for {count} logits.")
        return value if name == "names" or not value else numbers(value, name)
