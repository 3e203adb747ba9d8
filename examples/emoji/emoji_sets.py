"""Published emoji sets as drawings joined by code point: download, read, join. No rendering and no splits.

A drawing is one SVG of one emoji in one style. The key that joins styles is the emoji's code points in lower-case hex
joined by '-', without U+FE0F: whether that selector is written differs from set to set and never changes the picture.
"""

import json
import re
import shutil
import subprocess
import tarfile
import tempfile
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

VARIATION_SELECTOR = "fe0f"
MAN, WOMAN = "1f468", "1f469"
TONES = {1: "light", 2: "medium-light", 3: "medium", 4: "medium-dark", 5: "dark"}
GENDERS = {0: "female", 1: "male"}

# Code points that tell variants of one emoji apart: gender signs, hair components, the arrow "facing right".
VARIANT_SIGNS = {"2640", "2642", "1f9b0", "1f9b1", "1f9b2", "1f9b3", "27a1"}
# Emoji that are one person's forms by gender or hair and have code points of their own.
NEUTRAL_FORM = {
    MAN: "1f9d1", WOMAN: "1f9d1", "1f9d4": "1f9d1", "1f471": "1f9d1",  # beard and blond hair have genders in turn
    "1f466": "1f9d2", "1f467": "1f9d2",  # boy, girl: child
    "1f474": "1f9d3", "1f475": "1f9d3",  # old man, old woman: older person
    "1f934": "1fac5", "1f478": "1fac5",  # prince, princess: person with crown
    "1f930": "1fac4", "1fac3": "1fac4",  # pregnant woman, pregnant man: pregnant person
    "1f385": "1f9d1-200d-1f384", "1f936": "1f9d1-200d-1f384",  # Santa Claus, Mrs. Claus: Mx Claus
    "1f57a": "1f483",  # man dancing: woman dancing
    "1f46c": "1f46b", "1f46d": "1f46b",  # two men, two women holding hands: woman and man
    "1f9d1-200d-1f91d-200d-1f9d1": "1f46b",  # people holding hands
}  # fmt: skip
COUPLES = {"200d-2764-200d-1f48b-200d": "1f48f", "200d-2764-200d": "1f491"}  # kiss, couple with heart
FAMILY_MEMBERS = {MAN, WOMAN, "1f466", "1f467", "1f9d1", "1f9d2"}

# Icon names of the older sets that no other set and no label explains.
OLD_NAMES = {"dizzy-face": "1f635"}


class EmojiBuildError(RuntimeError):
    """The data set can't be built; the message is one line for the user."""


@dataclass(frozen=True)
class EmojiSet:
    """One npm package of drawings. `names_from` is the set that shares its icon names and knows their code points."""

    package: str
    version: str
    style: str
    names_from: str | None = None


# Versions are pinned: the splits are fixed by hashes, so the same packages give the same data set.
EMOJI_SETS = (
    EmojiSet("@iconify-json/noto", "1.2.9", "noto"),
    EmojiSet("@iconify-json/twemoji", "1.2.5", "twemoji"),
    EmojiSet("@iconify-json/fluent-emoji-flat", "1.2.6", "fluent flat"),
    EmojiSet("@iconify-json/fluent-emoji", "1.2.7", "fluent 3d", names_from="@iconify-json/fluent-emoji-flat"),
    EmojiSet("@iconify-json/fluent-emoji-high-contrast", "1.2.6", "high contrast"),
    EmojiSet("@iconify-json/noto-v1", "1.2.5", "blob"),
    EmojiSet("@iconify-json/emojione", "1.2.3", "emojione"),
)
TEXT_PACKAGE, TEXT_VERSION = "emojibase-data", "17.0.0"


@dataclass(frozen=True)
class Emoji:
    """The text of one emoji. `base` is the emoji without skin tone, `family` what gender and hair variants share."""

    codepoints: str
    base: str
    family: str
    name: str
    tags: tuple[str, ...]
    group: str
    subgroup: str
    tone: str
    gender: str
    order: int


@dataclass(frozen=True)
class Drawing:
    emoji: Emoji
    style: str
    svg: str


def tarball_path(cache: Path, package: str, version: str) -> Path:
    """Where `npm pack` puts a package: '@scope/name' becomes 'scope-name-version.tgz'."""
    return cache / f"{package.lstrip('@').replace('/', '-')}-{version}.tgz"


def fetch(package: str, version: str, cache: Path) -> Path:
    """Download one package with `npm pack` unless its tarball is in `cache` already.

    Raises:
        EmojiBuildError: npm is missing or the download fails; the message names the package.
    """
    target = tarball_path(cache, package, version)
    if target.exists():
        return target
    if shutil.which("npm") is None:
        raise EmojiBuildError(f"{package}@{version} can't be downloaded: npm is not installed (it comes with Node.js)")
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".partial-") as partial:
        command = ["npm", "pack", "--loglevel=error", "--pack-destination", partial, f"{package}@{version}"]
        run = subprocess.run(command, capture_output=True, text=True)
        packed = Path(partial, target.name)
        if run.returncode != 0 or not packed.exists():
            # npm's first lines hold the cause; a stack trace and the place of a log follow.
            lines = [line.removeprefix("npm error ").strip() for line in run.stderr.splitlines()[:4]]
            reason = "; ".join(lines) or f"npm ended with status {run.returncode} and no {target.name}"
            raise EmojiBuildError(f"{package}@{version} can't be downloaded: {reason}")
        packed.replace(target)
    return target


def read_json(tarball: Path, *names: str, optional: tuple[str, ...] = ()) -> list:
    """The JSON files `names`, then `optional`, of an npm tarball; None for an optional one that it does not hold."""
    wanted = {f"package/{name}" for name in (*names, *optional)}
    try:
        with tarfile.open(tarball) as archive:
            found = {m.name: json.load(archive.extractfile(m)) for m in archive if m.name in wanted}
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        raise EmojiBuildError(f"{tarball} is damaged ({error}): delete it and build again") from error
    missing = [name for name in names if f"package/{name}" not in found]
    if missing:
        raise EmojiBuildError(f"{tarball} does not hold {', '.join(missing)}")
    return [found.get(f"package/{name}") for name in (*names, *optional)]


def join_key(codepoints: str) -> str:
    """'263A-FE0F' -> '263a': what the same emoji is called in every set."""
    return "-".join(part for part in codepoints.lower().split("-") if part != VARIATION_SELECTOR)


def family_key(base: str) -> str:
    """What near-identical emoji share: `base` (no skin tone) without gender, hair and direction.

    'man running', 'woman running facing right' and 'person running' give one key, as do all couples with heart, all
    people holding hands and all families. A split by this key keeps such neighbours on one side.
    """
    for joint, couple in COUPLES.items():
        if f"-{joint}-" in base:
            return couple
    parts = base.split("-200d-")
    if len(parts) > 1 and set(parts) <= FAMILY_MEMBERS:
        return "1f46a"
    head = NEUTRAL_FORM.get(parts[0], parts[0])
    key = "-200d-".join([head, *(part for part in parts[1:] if part not in VARIANT_SIGNS)])
    return NEUTRAL_FORM.get(key, key)


def gender_of(entry: dict) -> str:
    """emojibase marks gender signs only, so 'man singer' (man, ZWJ, microphone) is told by its first code point."""
    if "gender" in entry:
        return GENDERS[entry["gender"]]
    people = {MAN, WOMAN} & set(join_key(entry["hexcode"]).split("-"))
    return {frozenset({MAN}): "male", frozenset({WOMAN}): "female"}.get(frozenset(people), "none")


def tone_of(entry: dict) -> str:
    """'none', 'light', ..., or for two people 'light and dark'."""
    tones = entry.get("tone", [])
    return " and ".join(TONES[tone] for tone in (tones if isinstance(tones, list) else [tones])) or "none"


def read_emoji(tarball: Path) -> dict[str, Emoji]:
    """All emoji of emojibase-data (English), skin tones included, by join key."""
    entries, meta = read_json(tarball, "en/data.json", "meta/groups.json")
    groups, subgroups = meta["groups"], meta["subgroups"]
    emoji = {}
    for base_entry in entries:
        base = join_key(base_entry["hexcode"])
        for entry in [base_entry, *base_entry.get("skins", [])]:
            emoji[join_key(entry["hexcode"])] = Emoji(
                codepoints=join_key(entry["hexcode"]),
                base=base,
                family=family_key(base),
                name=entry["label"].lower(),
                tags=tuple(base_entry.get("tags", [])),
                # Regional indicator letters belong to no group.
                group=groups[str(entry["group"])] if "group" in entry else "",
                subgroup=subgroups[str(entry["subgroup"])] if "subgroup" in entry else "",
                tone=tone_of(entry),
                gender=gender_of(base_entry),
                order=len(emoji),
            )
    return emoji


def slug(label: str) -> str:
    """An emojibase label as the icon sets write it: 'dog face' -> 'dog-face', 'St. Lucia' -> 'st-lucia'."""
    ascii_label = unicodedata.normalize("NFKD", label).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", ascii_label.replace("&", "and").replace("'", "")).strip("-")


def unambiguous(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """`pairs` as a dict, without the names that mean different code points in different sets."""
    meanings: dict[str, set[str]] = {}
    for name, key in pairs:
        meanings.setdefault(name, set()).add(key)
    return {name: keys.pop() for name, keys in meanings.items() if len(keys) == 1}


class NameTable:
    """Icon names -> join keys, for the sets that don't tell the code points of their icons.

    Names of the sets that do are trusted first, then emojibase's labels, then other sets' aliases.
    """

    def __init__(self, sources: list[tuple[dict, dict]], emoji: dict[str, Emoji]):
        names, aliases = [], []
        for icons, chars in sources:
            key_of = {name: join_key(char) for char, name in chars.items()}
            names += key_of.items()
            aliases += [
                (alias, key_of[entry["parent"]])
                for alias, entry in icons.get("aliases", {}).items()
                if entry["parent"] in key_of and len(entry) == 1  # a mirrored picture is another emoji
            ]
        labels = [(slug(entry.name), key) for key, entry in emoji.items()]
        self.levels = [unambiguous(names), unambiguous(labels), unambiguous(aliases), OLD_NAMES]

    def key_of(self, name: str) -> str | None:
        flag = re.sub("^flag-for-(flag-)?", "flag-", name)
        return next((level[flag] for level in self.levels if flag in level), None)


def svg_of(icons: dict, name: str, size: int) -> str:
    """The icon `name` of an iconify JSON as an SVG document of `size` pixels, centred when it isn't square."""
    chain = [icons.get("aliases", {}).get(name) or icons["icons"][name]]
    while "parent" in chain[-1]:
        parent = chain[-1]["parent"]
        chain.append(icons.get("aliases", {}).get(parent) or icons["icons"][parent])
    if any("rotate" in entry for entry in chain):
        raise EmojiBuildError(f"icon {name!r} of {icons['prefix']} is rotated, which no emoji set is known to do")
    # The nearest entry decides each length; flips along the chain cancel in pairs.
    left, top, width, height = (
        next((entry[key] for entry in [*chain, icons] if key in entry), default)
        for key, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
    )
    body = chain[-1]["body"]
    if sum(entry.get("hFlip", False) for entry in chain) % 2:
        body = f'<g transform="translate({2 * left + width} 0) scale(-1 1)">{body}</g>'
    if sum(entry.get("vFlip", False) for entry in chain) % 2:
        body = f'<g transform="translate(0 {2 * top + height}) scale(1 -1)">{body}</g>'
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{size}" height="{size}" viewBox="{left} {top} {width} {height}">{body}</svg>'
    )


def read_drawings(tarballs: dict[str, Path], emoji: dict[str, Emoji], size: int) -> list[Drawing]:
    """Every drawing of every set whose emoji emojibase knows, in the order of emojibase, then of `EMOJI_SETS`.

    Args:
        tarballs: package name -> tarball, for all of `EMOJI_SETS`.
        size: side of the SVG documents in pixels.
    """
    content = {s.package: read_json(tarballs[s.package], "icons.json", optional=("chars.json",)) for s in EMOJI_SETS}
    table = NameTable([(icons, chars) for icons, chars in content.values() if chars], emoji)
    drawings = []
    for emoji_set in EMOJI_SETS:
        icons, chars = content[emoji_set.package]
        chars = chars or (content[emoji_set.names_from][1] if emoji_set.names_from else None)
        names = {**icons["icons"], **icons.get("aliases", {})}
        if chars:
            keyed = [(join_key(char), name) for char, name in chars.items() if name in names]
        else:
            keyed = [(table.key_of(name), name) for name in icons["icons"]]
        drawn = {key: name for key, name in reversed(keyed) if key in emoji}
        drawings += [Drawing(emoji[key], emoji_set.style, svg_of(icons, name, size)) for key, name in drawn.items()]
    styles = [s.style for s in EMOJI_SETS]
    return sorted(drawings, key=lambda d: (d.emoji.order, styles.index(d.style)))


def licence_table(tarballs: dict[str, Path]) -> str:
    """Markdown that names each package's version, SPDX licence, author and address, from its own metadata."""
    lines = [
        "# Where the pictures and their text come from",
        "",
        "Every picture is a small rendering on white of a drawing of one of these sets; its `style` says which. Keep",
        "this file with the data and with what is derived from it: the CC-BY sets ask for attribution.",
        "",
        "| style | set | npm package | version | licence (SPDX) | licence text | author | URL |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for emoji_set in EMOJI_SETS:
        package, info = read_json(tarballs[emoji_set.package], "package.json", "info.json")
        author, licence = info["author"], info["license"]
        cells = (emoji_set.style, info["name"], package["name"], package["version"], licence["spdx"], licence["url"])
        lines.append(f"| {' | '.join(cells)} | {author['name']} | {author['url']} |")
    (package,) = read_json(tarballs[TEXT_PACKAGE], "package.json")
    url = package["repository"]["url"].replace("git@github.com:", "https://github.com/").removesuffix(".git")
    cells = ("(text)", "Emojibase", package["name"], package["version"], package["license"])
    lines.append(f"| {' | '.join(cells)} | {url}/blob/master/LICENSE | {package['author']} | {url} |")
    return "\n".join(lines) + "\n"
