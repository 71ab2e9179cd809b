"""Build the shards of the *emoji in styles* world from pinned npm packages.

    pip install resvg-py==0.5.0
    python tools/build_emoji.py                    # writes t2ilearn/assets/emoji/
    python tools/build_emoji.py --sheet sheet.png  # and a contact sheet to look at

Needs the network and the npm client once; the package itself never does. Each tarball is held
against the SHA-512 below before anything in it is read. The same inputs give the same bytes
(fixed order, no times, no user names), as far as zlib and libwebp are the same versions.

What is drawn. Emojibase lists every emoji once, with skin tones folded into it. Left out: the
groups of components, symbols (buttons, letters, arrows, zodiac, geometry) and flags; clock faces;
pictures that only turn another one to the right; families and couples that differ in who is who;
and the few names in `UNWANTED`. A concept needs four studios to be kept.

Twins. Two drawings of one style nearer than `SAME` are one drawing under two names: the later
name loses that style. Nearer than `TWIN` they are near twins, and then neither may be tested
while the other trains. So concepts that differ in sex or colour only form a family (by name); a
family's drawings in one style are held out together or not at all, and only where no other
drawing, of any style, is nearer than `TWIN` to any of them. Near twins stay in training, where
they do no harm, and out of the test. The price, stated: the held-out pairs hold few smiling
faces, for those are all near twins of each other.
"""

import argparse
import base64
import functools
import gzip
import hashlib
import io
import json
import re
import shutil
import subprocess
import tarfile
import tempfile
import unicodedata
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

ASSETS = Path(__file__).resolve().parent.parent / "t2ilearn" / "assets" / "emoji"
SIZE = 64
SAME, TWIN = 0.03, 0.30
LEAST_STYLES, LEAST_LEFT = 4, 3  # before and after the second name of a drawing loses it
HELD_PER_MILLE = 61  # of the family × style units that may be held out: about 5 % of all pairs


class BuildError(RuntimeError):
    """The shards cannot be built; the message says which input is not as expected."""


@dataclass(frozen=True)
class Source:
    """An npm package, pinned, and whom to thank for it."""

    package: str
    version: str
    integrity: str
    licence: str
    link: str
    style: str = ""
    studio: str = ""
    attribution: str = ""


SOURCES = (
    Source(
        "@iconify-json/noto",
        "1.2.9",
        "sha512-DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw==",
        "Apache-2.0",
        "https://github.com/googlefonts/noto-emoji",
        "soft",
        "Noto Emoji",
        "Noto Emoji, copyright Google Inc.",
    ),
    Source(
        "@iconify-json/twemoji",
        "1.2.5",
        "sha512-uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2uNNCxyXzAWU9yNLlj41WU6/mvgALsw==",
        "CC BY 4.0",
        "https://github.com/jdecked/twemoji",
        "flat",
        "Twemoji",
        "Twemoji graphics, copyright Twitter, Inc and other contributors",
    ),
    Source(
        "@iconify-json/fluent-emoji",
        "1.2.7",
        "sha512-D8G6bKAyIsyxP1rzZtIWr/gg/fO4Rg1+DyCWlfqKK4h8W+4Em/Y0P6QYgJUQTlUcagzJvSyg+9OBv4hz4Hc/QA==",
        "MIT",
        "https://github.com/microsoft/fluentui-emoji",
        "glossy",
        "Fluent Emoji",
        "Fluent Emoji, copyright (c) Microsoft Corporation",
    ),
    Source(
        "@iconify-json/openmoji",
        "1.2.29",
        "sha512-vXdhkqcXVSO6suy+m9LbcUM3OdVyuNOtpV8/als/WqfkQIRxevL5Geb/g+6GH/Qwnq1OqksEmaDGTCmZ5nFKJQ==",
        "CC BY-SA 4.0",
        "https://openmoji.org",
        "outline",
        "OpenMoji",
        "All emojis designed by OpenMoji, the open-source emoji and icon project",
    ),
    Source(
        "@iconify-json/emojione-monotone",
        "1.2.1",
        "sha512-cZSNcPsuiAD6HCzCh/2dYKGh3pNI0jJlxBxQWfC33cQsPtqYZqulGBvlkThXYNvDl8VxgVHT9u+izyX/yeEIkA==",
        "CC BY 4.0",
        "https://github.com/EmojiTwo/emojitwo",
        "ink",
        "EmojiOne (monotone)",
        "Emoji art by EmojiOne 2.2.7, kept by EmojiTwo",
    ),
)
WORDS = Source(
    "emojibase-data",
    "17.0.0",
    "sha512-Yvgb5AWoHViHV/gq1qr5ZAarcBip+B27/ZLRsUJkbgAEaLlZ/fof9g882LTpmEpyhBNEC0m2SEmItljHsTygjA==",
    "MIT",
    "https://github.com/milesj/emojibase",
    attribution="Names and synonyms from emojibase-data, copyright (c) 2017-2019 Miles Johnson",
)
STYLES = tuple(source.style for source in SOURCES)

COMPONENTS, SYMBOLS, FLAGS = 2, 8, 9  # Emojibase's group numbers
UNWANTED = re.compile(
    r".* o'clock|.*-thirty|.*: facing right|family: .*|kiss: .*|couple with heart: .*"
    r"|middle finger"  # a book for classrooms
    r"|zzz|hundred points"  # letters and digits
)
# EmojiOne's set is of 2016 (Emoji 4.0). Younger concepts cannot be in it, whatever the name says:
# its "cricket" is the game, not the insect.
LAST_VERSION = {"ink": 4}
# Seen on the contact sheet: another thing under the same code point (here a real revolver).
WRONG = {("water pistol", "ink")}
# Names that Fluent spells in its own way.
FLUENT = {
    "black bird": "blackbird",
    "phoenix": "phoenix-bird",
    "piñata": "piata",
    "merman": "man-merpeople",
    "mermaid": "woman-merpeople",
    "merperson": "person-merpeople",
    **{name: f"person-{name}" for name in ("elf", "fairy", "genie", "mage", "vampire", "zombie")},
    **{name: f"person-{name}" for name in ("superhero", "supervillain")},
}
FLUENT_RULES = (
    (r"deaf (man|person|woman)", r"\1 deaf"),
    (r"(man|person|woman): blond hair", r"\1 blonde hair"),
    (r"people (with bunny ears|wrestling)", r"person \1"),
    (r"men (with bunny ears|wrestling)", r"man \1"),
    (r"women (with bunny ears|wrestling)", r"woman \1"),
)
# Emojibase's names that are no noun to put into a sentence.
RENAMED = {
    "building construction": "building site",
    "construction": "construction barrier",
    "cooking": "frying pan with egg",
    "dashing away": "puff of air",
    "dizzy": "dizzy star",
    "foggy": "foggy bridge",
    "high voltage": "lightning bolt",
    "hourglass done": "finished hourglass",
    "hourglass not done": "running hourglass",
    "locked": "closed lock",
    "locked with key": "closed lock with key",
    "locked with pen": "closed lock with pen",
    "mate": "mate drink",
    "rolling on the floor laughing": "face rolling on the floor laughing",
    "star-struck": "star-struck face",
    "unlocked": "open lock",
}
# Plurals, stuffs and proper names take no article.
BARE = frozenset(
    name.strip()
    for name in """
    admission tickets, badminton, bacon, ballet shoes, beans, blueberries, bookmark tabs, books,
    bowling, bread, breast-feeding, briefs, broccoli, bubble tea, bubbles, butter, camping, candy,
    canned food, card index dividers, chains, cherries, chopsticks, clapping hands,
    clinking beer mugs, clinking glasses, control knobs, cooked rice, coral, cricket game,
    crossed fingers, crossed swords, curry rice, dango, dna, eyes, field hockey, film frames, fire,
    fireworks, flexed biceps, flower playing cards, fog, folded hands, footprints, french fries,
    garlic, ginger root, glasses, gloves, goggles, grapes, heart hands, horse racing, hot springs,
    houses, ice, ice cream, ice hockey, japanese dolls, jeans, lacrosse, linked paperclips, lungs,
    maracas, men holding hands, men with bunny ears, men wrestling, money with wings, mount fuji,
    mrs claus, musical notes, mx claus, nesting dolls, oden, open hands, palms up together,
    pancakes, paw prints, peanuts, people hugging, people with bunny ears,
    people wrestling, performing arts, pinched fingers, ping pong, popcorn, pouring liquid,
    prayer beads, raising hands, revolving hearts, sake, salt, santa claus, scissors,
    shaved ice, shopping bags, shorts, skis, soap, socks, soft ice cream, spaghetti, sparkles,
    sunglasses, sushi, sweat droplets, tennis, tokyo tower, two hearts, woman and man holding hands,
    woman's clothes, women holding hands, women with bunny ears, women wrestling, wood, yarn,
    boba, busts in silhouette, coffee, cutlery, dice, dracula, dung, dynamite, edamame, eyeglasses,
    fries, kaaba, lettuce, light rail, luggage, maize, meat on bone, milky way, nail polish, pasta,
    porridge, ramen, saturn, scales, statue of liberty, sunshine, tea, tempura, timber, trousers,
    whiskey, wine
    """.replace("\n", " ").split(",")
    if name.strip()
)
# Emojibase's tags are loose ("animal", "extinct"): these, chosen by hand, really name the picture,
# and each names one concept only.
SYNONYMS = """
airplane: jet; articulated lorry: semi; automobile: car; axe: hatchet; backpack: rucksack, satchel;
balance scale: scales; bear: grizzly; beer mug: pint; bell pepper: capsicum; bicycle: bike;
birthday cake: cake; bison: wisent; black bird: crow, raven;
bowl with spoon: porridge; bread: loaf; bubble tea: boba;
bullseye: target; camel: dromedary; card index: rolodex; cat face: kitten, kitty;
chipmunk: squirrel; clamp: vice; closed book: book;
cloud with lightning and rain: thunderstorm; clutch bag: pouch; cockroach: roach;
cocktail glass: martini; computer disk: minidisk; couch and lamp: couch;
cucumber: pickle; cup with straw: soda; cut of meat: steak; cyclone: hurricane, typhoon;
desktop computer: monitor; dog face: puppy; donkey: burro, mule; doughnut: donut; dumpling: jiaozi;
ear of corn: maize; eggplant: aubergine; evergreen tree: pine;
fire: flame; firecracker: dynamite; flashlight: torch; flat shoe: slipper; flatbread: naan;
flying saucer: ufo; fork and knife: cutlery; four leaf clover: clover; french fries: fries;
fried shrimp: tempura; game die: dice; gear: cog, cogwheel; gem stone: diamond, jewel;
glasses: eyeglasses; goose: gander; hair pick: comb; hamburger: burger;
headphone: earbud; headstone: tombstone; helicopter: copter;
high-heeled shoe: stiletto; hippopotamus: hippo; honeybee: bee, bumblebee; hot beverage: coffee;
hot dog: frankfurter; finished hourglass: hourglass; house: home; jack-o-lantern: pumpkin;
jeans: trousers; kick scooter: scooter; kitchen knife: knife; label: tag; lady beetle: ladybird,
ladybug; laptop: pc; leafy green: lettuce; lightning bolt: thunderbolt;
llama: alpaca; long drum: conga; luggage: suitcase; man's shoe: shoe; mantelpiece clock: clock;
manual wheelchair: wheelchair; melon: cantaloupe; metro: subway; microbe: amoeba; microphone: mic;
minibus: van; money bag: moneybag;
moose: elk; motorway: highway; mouse trap: mousetrap; mushroom: toadstool;
musical keyboard: piano; necktie: tie; nerd face: geek; nesting dolls: matryoshka;
old man: grandfather, grandpa; old woman: grandma, grandmother, granny; older person: grandparent;
one-piece swimsuit: swimsuit; package: parcel; pea pod: edamame; pen: ballpoint; phoenix: firebird;
pig: sow; pile of poo: dung, turd; pot of food: stew; puzzle piece: jigsaw;
rabbit: bunny; receipt: invoice; red apple: apple; ring buoy: lifesaver; ringed planet: saturn;
rock: boulder; running shoe: sneaker; sailboat: yacht;
sauropod: brachiosaurus, brontosaurus, diplodocus; saxophone: sax; seedling: sprout;
shallow pan of food: paella; sled: sleigh, toboggan; snail: escargot; snake: serpent;
spaghetti: pasta; spiral shell: conch; steaming bowl: ramen; sun with face: sunshine;
t-rex: tyrannosaurus; t-shirt: shirt; taxi: cab; teacup without handle: tea; television: tv;
tornado: whirlwind; tumbler glass: whiskey; turtle: terrapin, tortoise; vampire: dracula;
video camera: camcorder; wheel: tire; wine glass: wine;
woman superhero: heroine; woman with veil: bride; woman's boot: boot; woman's clothes: blouse;
wood: timber; world map: map; worm: earthworm; wrapped gift: present
"""
# Words that make two names one family: who is drawn, and in which colour.
_SEX = r"\b(?:man|woman|person|men|women|people|boy|girl|child|prince|princess|mrs|mx|santa|old)\b"
_COLOUR = r"\b(?:light blue|red|pink|orange|yellow|green|blue|purple|brown|black|grey|white)\b"


# --- fetching ---


def fetch(source: Source, folder: Path) -> tarfile.TarFile:
    """A package's tarball, checked against its pinned SHA-512: from the folder if it lies there,
    else through the npm client.

    Raises:
        BuildError: if npm is missing or fails, or the tarball is another one.
    """
    name = f"{source.package}@{source.version}"
    path = folder / f"{source.package.lstrip('@').replace('/', '-')}-{source.version}.tgz"
    if not path.exists():
        npm = shutil.which("npm")
        if npm is None:
            raise BuildError("The npm client is not installed; it comes with Node.js.")
        command = [npm, "pack", "--silent", name]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            raise BuildError(f"npm pack {name} failed: {done.stderr.strip()}")
    data = path.read_bytes()
    digest = "sha512-" + base64.b64encode(hashlib.sha512(data).digest()).decode()
    if digest != source.integrity:
        raise BuildError(f"{path} is not the pinned tarball of {name}: it has {digest}.")
    return tarfile.open(fileobj=io.BytesIO(data), mode="r:gz")


def read(archive: tarfile.TarFile, member: str) -> Any:
    """A JSON file of an npm tarball, read in memory: nothing is unpacked to disk."""
    file = archive.extractfile(f"package/{member}")
    if file is None:
        raise BuildError(f"{member} is no file in its package.")
    return json.loads(file.read().decode("utf-8"))


# --- names ---


def slug(text: str) -> str:
    """A name as the icon sets spell it: 'T-Rex' → 't-rex', 'man’s shoe' → 'mans-shoe'."""
    plain = unicodedata.normalize("NFKD", text.replace("’", "")).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]+", "-", plain.lower()).strip("-")


def canonical(label: str) -> str:
    """A label as a clean lower-case English name: 'man: red hair' → 'man with red hair'."""
    plain = unicodedata.normalize("NFKD", label.replace("’", "'"))
    text = plain.encode("ascii", "ignore").decode().lower().replace(".", "")
    text = re.sub(r"^(\w+): bald$", r"bald \1", text)
    text = re.sub(r"^(\w+): beard$", r"\1 with a beard", text)
    text = re.sub(r"^(\w+): (\w+ hair)$", r"\1 with \2", text)
    return RENAMED.get(text, text)


def family(concept: str) -> str:
    """What a concept shares with others that differ in sex or colour only."""
    text = re.sub(r"\b(?:merman|mermaid)\b", "merperson", concept)
    text = re.sub(rf"{_SEX}|{_COLOUR}|\b(?:a|and)\b", " ", text)
    return " ".join(text.split()) or "person"


def phrase(name: str) -> str:
    """A name with the article it takes in a sentence."""
    if name in BARE:
        return name
    vowel = name[0] in "aeiou" and not re.match(r"uni|euro|one-|ewe|ufo", name)
    return f"{'an' if vowel or name.startswith(('hourglass', 'x-ray')) else 'a'} {name}"


def synonyms() -> dict[str, list[str]]:
    """The hand-picked synonyms of each concept."""
    pairs = [entry.split(":") for entry in SYNONYMS.replace("\n", " ").split(";")]
    return {name.strip(): [word.strip() for word in words.split(",")] for name, words in pairs}


# --- joining the sets ---


def fluent_name(label: str) -> str:
    """Fluent's own spelling of a label, where it has one."""
    for pattern, name in FLUENT_RULES:
        if re.fullmatch(pattern, label):
            return slug(re.sub(pattern, name, label))
    return FLUENT.get(label, "")


def find_icon(
    entry: dict[str, Any], style: str, sets: dict[str, tuple[Any, Any]], names: list[str]
) -> str | None:
    """The icon of an emoji in one set: by code point where the set lists those, else by name."""
    icons, chars = sets[style]
    if entry["version"] > LAST_VERSION.get(style, 99) or (entry["label"], style) in WRONG:
        return None
    code = entry["hexcode"].lower()
    by_code = chars.get(code.replace("-fe0f", "")) or chars.get(code)
    known = icons["icons"].keys() | icons.get("aliases", {}).keys()
    if style == "glossy":
        names = [fluent_name(entry["label"]), *names]
    return by_code or next((name for name in names if name in known), None)


def concepts(emojibase: list[Any], sets: dict[str, tuple[Any, Any]]) -> list[dict[str, Any]]:
    """Every concept that at least four studios drew: its name, phrases, and icon by style."""
    also = synonyms()
    found = []
    for entry in emojibase:
        label = entry["label"].replace("’", "'").lower()
        if entry.get("group") in (None, COMPONENTS, SYMBOLS, FLAGS) or UNWANTED.fullmatch(label):
            continue
        code = entry["hexcode"].lower()
        names = [slug(entry["label"])]
        for _, chars in sets.values():
            names += [chars[c] for c in (code.replace("-fe0f", ""), code) if c in chars]
        for icons, _ in sets.values():
            for alias, target in icons.get("aliases", {}).items():
                if set(target) == {"parent"} and {alias, target["parent"]} & set(names):
                    names += [alias, target["parent"]]
        drawn = {style: find_icon(entry, style, sets, names) for style in STYLES}
        icons = {style: icon for style, icon in drawn.items() if icon}
        if len(icons) >= LEAST_STYLES:
            name = canonical(entry["label"])
            tags = {tag.lower() for tag in entry.get("tags", [])}
            words = also.pop(name, [])
            if not set(words) <= tags:
                raise BuildError(f"Emojibase does not list {set(words) - tags} for {name!r}.")
            found.append({"name": name, "code": code, "icons": icons, "words": words})
    phrases = {phrase(word) for concept in found for word in (concept["name"], *concept["words"])}
    if idle := BARE - phrases:
        raise BuildError(f"Listed without an article, but no name: {', '.join(sorted(idle))}.")
    if also:
        raise BuildError(f"Synonyms of concepts that are not kept: {', '.join(also)}.")
    every = [word for concept in found for word in (concept["name"], *concept["words"])]
    if twice := {word for word in every if every.count(word) > 1}:
        raise BuildError(f"Names of two concepts: {', '.join(sorted(twice))}.")
    return found


# --- drawing ---


def rasterise(icons: Any, name: str) -> np.ndarray:
    """An icon as (64, 64, 4) uint8 RGBA, aliases followed.

    Raises:
        BuildError: for an alias that does more than mirror its parent.
    """
    import resvg_py  # of the extra `dev` alone

    mirrored = False
    while name not in icons["icons"]:
        alias = icons["aliases"][name]
        if not set(alias) <= {"parent", "hFlip"}:
            raise BuildError(f"The alias {name} changes its parent by {sorted(alias)}.")
        mirrored ^= alias.get("hFlip", False)
        name = alias["parent"]
    icon = {"left": 0, "top": 0, "width": icons["width"], "height": icons["height"]}
    icon |= icons["icons"][name]
    box = " ".join(str(icon[side]) for side in ("left", "top", "width", "height"))
    text = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{SIZE}" height="{SIZE}" viewBox="{box}">{icon["body"]}</svg>'
    )
    png = resvg_py.svg_to_bytes(svg_string=text, skip_system_fonts=True)
    picture = np.array(Image.open(io.BytesIO(png)).convert("RGBA"))
    if picture.shape != (SIZE, SIZE, 4) or (picture[..., 3] > 127).sum() < 60:
        raise BuildError(f"{icons['prefix']}:{name} is empty or has shape {picture.shape}.")
    return picture[:, ::-1] if mirrored else picture


# --- twins ---


def _small(picture: np.ndarray, framed: bool) -> np.ndarray:
    """A drawing as 32 × 32 × 4 numbers, alpha multiplied in; framed: cut to its own extent."""
    flat = picture.astype(np.float32) / 255
    flat[..., :3] *= flat[..., 3:]
    if framed:
        rows, columns = np.nonzero(picture[..., 3] > 8)
        flat = flat[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        side = max(flat.shape[:2])
        square = np.zeros((side, side, 4), np.float32)
        top, left = ((side - length) // 2 for length in flat.shape[:2])
        square[top : top + flat.shape[0], left : left + flat.shape[1]] = flat
        flat = square
    planes = [
        Image.fromarray(flat[..., i]).resize((32, 32), Image.Resampling.BOX) for i in range(4)
    ]
    return np.stack([np.asarray(plane) for plane in planes], -1).ravel()


def distances(pictures: list[np.ndarray], framed: bool) -> np.ndarray:
    """|a − b| / √((|a|² + |b|²) / 2) between all drawings: 0 for the same, √2 for strangers."""
    vectors = np.stack([_small(picture, framed) for picture in pictures])
    products = vectors @ vectors.T
    power = np.diag(products)
    mean = (power[:, None] + power[None]) / 2
    apart = np.sqrt(np.maximum(2 - 2 * products / mean, 0))
    np.fill_diagonal(apart, 9)
    return apart


def drop_same(found: list[dict[str, Any]], drawn: dict[tuple[int, str], np.ndarray]) -> list[str]:
    """Take from `drawn`, in place, a style's second drawing of the same thing; says which.

    A concept left with too few styles goes altogether.
    """
    lost = []
    for style in STYLES:
        numbers = [n for n in range(len(found)) if (n, style) in drawn]
        apart = distances([drawn[n, style] for n in numbers], framed=False)
        for row, number in enumerate(numbers):
            same = [n for n, d in zip(numbers, apart[row], strict=True) if d < SAME and n > number]
            for other in (n for n in same if (number, style) in drawn and (n, style) in drawn):
                del drawn[other, style]
                lost.append(f"{style}: {found[other]['name']} = {found[number]['name']}")
    for number, styles in styles_of(drawn).items():
        if len(styles) < LEAST_LEFT:
            lost.append(f"gone: {found[number]['name']}, left with {', '.join(styles)}")
            for style in styles:
                del drawn[number, style]
    return lost


def styles_of(drawn: Iterable[tuple[int, str]]) -> dict[int, list[str]]:
    """Which styles each concept was drawn in."""
    styles: dict[int, list[str]] = defaultdict(list)
    for number, style in drawn:
        styles[number].append(style)
    return styles


def hold_out(
    found: list[dict[str, Any]], drawn: dict[tuple[int, str], np.ndarray]
) -> tuple[set[tuple[int, str]], dict[str, int]]:
    """The concept × style pairs that no generative model may see, and how they were found."""
    keys = list(drawn)
    pictures = list(drawn.values())
    apart = np.minimum(distances(pictures, False), distances(pictures, True))
    units: dict[tuple[str, str], list[int]] = defaultdict(list)
    for row, (number, style) in enumerate(keys):
        units[family(found[number]["name"]), style].append(row)
    styles_left = {number: len(styles) for number, styles in styles_of(keys).items()}
    held: set[tuple[int, str]] = set()
    fit = 0
    order = {unit: hashlib.sha256("|".join(unit).encode()).digest() for unit in units}
    for unit in sorted(units, key=order.__getitem__):
        rows = units[unit]
        outside = np.ones(len(keys), bool)
        outside[rows] = False
        if (apart[rows][:, outside] < TWIN).any():
            continue
        fit += len(rows)
        lucky = int.from_bytes(order[unit][:4], "big") % 1000 < HELD_PER_MILLE
        if lucky and all(styles_left[keys[row][0]] > 2 for row in rows):
            held |= {keys[row] for row in rows}
            for row in rows:
                styles_left[keys[row][0]] -= 1
    near = {f"twin_below_{limit}": int((apart.min(1) < limit).sum()) for limit in (0.1, 0.2, TWIN)}
    return held, {"may_be_held_out": fit, "held_out": len(held), **near}


# --- writing ---


def webp(picture: np.ndarray) -> bytes:
    """Lossless WebP with alpha, invisible pixels kept as they are (they are all zero)."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "WEBP", lossless=True, exact=True)
    return buffer.getvalue()


def shard(members: list[tuple[str, bytes]]) -> bytes:
    """A .tar.gz whose bytes depend on its members alone."""
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(data), 0o644
            archive.addfile(info, io.BytesIO(data))
    return gzip.compress(plain.getvalue(), 9, mtime=0)


to_json = functools.partial(json.dumps, ensure_ascii=True, sort_keys=True)


def write_shards(
    found: list[dict[str, Any]],
    drawn: dict[tuple[int, str], np.ndarray],
    held: set[tuple[int, str]],
    folder: Path,
) -> list[dict[str, Any]]:
    """One archive a style, and the rows that describe them in the index."""
    rows = []
    for source in SOURCES:
        # A reader of WebDataset skips names that begin and end in two underscores.
        licence = (ASSETS / f"LICENCE-{source.style}.txt").read_bytes()
        members = [("__licence__", licence)]
        for number, concept in enumerate(found):
            key = (number, source.style)
            if key not in drawn:
                continue
            facts = {
                "concept": concept["name"],
                "style": source.style,
                "phrases": concept["phrases"],
                "code": concept["code"],
                "split": "held-out" if key in held else "train",
            }
            members.append((f"{number:06d}.json", to_json(facts).encode()))
            members.append((f"{number:06d}.webp", webp(drawn[key])))
        data = shard(members)
        path = folder / f"{source.style}.tar.gz"
        path.write_bytes(data)
        rows.append(
            {
                "file": path.name,
                "sha256": hashlib.sha256(data).hexdigest(),
                "bytes": len(data),
                "count": len(members) // 2,
                "style": source.style,
                "studio": source.studio,
                "package": f"{source.package}@{source.version}",
                "integrity": source.integrity,
                "licence": source.licence,
                "attribution": source.attribution,
                "link": source.link,
            }
        )
    return rows


def contact_sheet(
    found: list[dict[str, Any]], drawn: dict[tuple[int, str], np.ndarray], path: Path
) -> None:
    """Every concept in every style on white, eight concepts a row, for a person to look at."""
    wide, high, across = 5 * 44 + 10, 58, 8
    sheet = Image.new("RGB", (across * wide, -(-len(found) // across) * high), "white")
    pen = ImageDraw.Draw(sheet)
    for number, concept in enumerate(found):
        left, top = number % across * wide, number // across * high
        for column, style in enumerate(STYLES):
            if (number, style) in drawn:
                tile = Image.fromarray(drawn[number, style]).resize((42, 42))
                sheet.paste(tile, (left + column * 44, top), tile)
        pen.text((left, top + 44), f"{number} {concept['name'][:36]}", fill="black")
    sheet.save(path)


def main() -> None:
    """Fetch, join, draw, part and write; prints what was counted."""
    parser = argparse.ArgumentParser(description="Build the emoji world's shards.")
    parser.add_argument("--out", type=Path, default=ASSETS, help="where the shards go")
    parser.add_argument("--sheet", type=Path, help="also write a contact sheet here")
    parser.add_argument("--packages", type=Path, help="keep the packages here, to go on later")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.packages or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        sets = {}
        for source in tqdm(SOURCES, desc="packages", unit="package"):
            archive = fetch(source, folder)
            sets[source.style] = (read(archive, "icons.json"), read(archive, "chars.json"))
        emojibase = read(fetch(WORDS, folder), "en/data.json")
    found = concepts(emojibase, sets)
    for concept in found:
        concept["phrases"] = [phrase(name) for name in (concept["name"], *concept["words"])]
    icons = {
        (number, style): icon
        for style in STYLES
        for number, concept in enumerate(found)
        if (icon := concept["icons"].get(style))
    }
    drawn = {
        key: rasterise(sets[key[1]][0], icon)
        for key, icon in tqdm(icons.items(), desc="drawings", unit="drawing")
    }
    lost = drop_same(found, drawn)
    held, twins = hold_out(found, drawn)
    kept = styles_of(drawn)
    counts = {
        "concepts": len(kept),
        "concepts_of_four_studios": sum(len(styles) >= LEAST_STYLES for styles in kept.values()),
        "concepts_of_five_studios": sum(len(styles) == len(STYLES) for styles in kept.values()),
        "pairs": len(drawn),
        **twins,
    }
    rows = write_shards(found, drawn, held, options.out)
    index = {
        "concepts": {found[n]["name"]: found[n]["phrases"] for n in sorted(kept)},
        "counts": counts,
        "shards": rows,
        "twin": TWIN,
        "words": {
            "package": f"{WORDS.package}@{WORDS.version}",
            "integrity": WORDS.integrity,
            "licence": WORDS.licence,
            "attribution": WORDS.attribution,
            "link": WORDS.link,
        },
    }
    text = json.dumps(index, indent=1, ensure_ascii=True) + "\n"
    (options.out / "index.json").write_text(text, encoding="utf-8", newline="\n")
    if options.sheet:
        contact_sheet(found, drawn, options.sheet)
    print("\n".join(lost), counts, sep="\n")
    print(f"{sum(row['bytes'] for row in rows) / 2**20:.2f} MiB")


if __name__ == "__main__":
    main()
