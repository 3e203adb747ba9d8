"""The real build on tiny packages in exactly npm's, iconify's and emojibase's formats. Nothing here reaches npm."""

import io
import json
import os
import re
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "emoji"))

import build_dataset  # noqa: E402
import emoji_sets  # noqa: E402
from build_dataset import assign_splits, fraction, load_emoji, to_uint8  # noqa: E402
from emoji_sets import EMOJI_SETS, Drawing, Emoji, family_key, join_key, svg_of, tarball_path  # noqa: E402

VERSIONS = {s.package: s.version for s in EMOJI_SETS} | {emoji_sets.TEXT_PACKAGE: emoji_sets.TEXT_VERSION}
RED, BLUE, GREEN = (255, 0, 0), (0, 0, 255), (0, 128, 0)


def left_half(colour):
    """A 16 x 16 icon whose left half is filled, so that a mirrored picture differs."""
    return {"body": f'<rect width="8" height="16" fill="rgb{colour}"/>'}


def entry(hexcode, label, group=3, **more):
    return {"hexcode": hexcode, "label": label, "tags": [label.lower()], "group": group, "subgroup": 34, **more}


EMOJIBASE = [
    entry("1F436", "dog face"),
    entry("1F448", "left hand", group=1),
    entry("1F449", "right hand", group=1),
    entry("2764-FE0F", "red heart", group=0),
    entry(
        "1F44B",
        "Waving Hand",
        group=1,
        skins=[
            {"hexcode": "1F44B-1F3FB", "label": "Waving Hand: light skin tone", "tone": 1, "group": 1, "subgroup": 34},
            {
                "hexcode": "1F44B-1F3FF",
                "label": "Waving Hand: dark skin tone",
                "tone": [5],
                "group": 1,
                "subgroup": 34,
            },
        ],
    ),
    entry("1F3C3", "person running", group=1),
    entry("1F3C3-200D-2642-FE0F", "man running", group=1, gender=1),
    entry("1F469-200D-1F3A4", "woman singer", group=1),
    {"hexcode": "1F1E6", "label": "regional indicator A", "tags": ["a"]},
]
GROUPS = {"groups": {"0": "smileys-emotion", "1": "people-body", "3": "animals-nature"}, "subgroups": {"34": "sub"}}

NOTO = {
    "icons": {
        "dog-face": left_half(RED),
        "heart": left_half(RED),
        "left-hand": left_half(BLUE),
        "wave": left_half(RED),
        "wave-light-skin-tone": left_half(BLUE),
        "wave-dark-skin-tone": left_half(GREEN),
        "running": left_half(GREEN),
        "running-man": left_half(GREEN),
        "singer": left_half(RED),
        "draft": left_half(RED),
        "letter-a": left_half(BLUE),
    },
    "aliases": {"right-hand": {"parent": "left-hand", "hFlip": True}, "old-dog": {"parent": "dog-face"}},
}
NOTO_CHARS = {
    "1f436": "dog-face",
    "2764": "heart",
    "1f448": "left-hand",
    "1f449": "right-hand",
    "1f44b": "wave",
    "1f44b-1f3fb": "wave-light-skin-tone",
    "1f44b-1f3ff": "wave-dark-skin-tone",
    "1f3c3": "running",
    "1f3c3-200d-2642": "running-man",
    "1f469-200d-1f3a4": "singer",
    "1faeb": "draft",  # no emojibase entry
    "1f1e6": "letter-a",
}
ICONS = {
    "@iconify-json/noto": (NOTO, NOTO_CHARS),
    "@iconify-json/twemoji": ({"icons": {"woof": left_half(BLUE)}}, {"1f436": "woof"}),
    "@iconify-json/fluent-emoji-flat": ({"icons": {"puppy": left_half(GREEN)}}, {"1f436": "puppy"}),
    "@iconify-json/fluent-emoji": ({"icons": {"puppy": {"body": "", "height": 17}}}, None),
    "@iconify-json/fluent-emoji-high-contrast": ({"icons": {"dog": left_half((0, 0, 0))}}, {"1f436-fe0f": "dog"}),
    # An alias of another set, a label, and a name that nothing explains.
    "@iconify-json/noto-v1": (
        {"icons": {"old-dog": left_half((1, 2, 3)), "red-heart": left_half(BLUE), "x": {"body": ""}}},
        None,
    ),
    "@iconify-json/emojione": ({"icons": {"flag-for-flag-x": left_half(RED), "dog-face": left_half((9, 9, 9))}}, None),
}
# Enough more emoji in two styles that no split is empty.
MANY = range(0x1F900, 0x1F950)
EMOJIBASE += [entry(f"{number:X}", f"thing {number}") for number in MANY]
for package, blue in (("@iconify-json/noto", 0), ("@iconify-json/twemoji", 255)):
    icons, chars = ICONS[package]
    icons["icons"] |= {f"thing-{number}": left_half((number % 256, 0, blue)) for number in MANY}
    chars |= {f"{number:x}": f"thing-{number}" for number in MANY}


def pack(path, files):
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            data = json.dumps(content).encode()
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


@pytest.fixture
def cache(tmp_path):
    """A cache that already holds every package."""
    folder = tmp_path / "cache"
    folder.mkdir()
    for package, (icons, chars) in ICONS.items():
        name = package.split("/")[1]
        info = {
            "name": name.title(),
            "author": {"name": f"Author of {name}", "url": f"https://example.org/{name}"},
            "license": {"spdx": "CC-BY-4.0", "url": "https://example.org/licence"},
        }
        files = {"package.json": {"name": package, "version": VERSIONS[package]}, "info.json": info}
        files["icons.json"] = {"prefix": name, "width": 16, "height": 16, **icons}
        pack(tarball_path(folder, package, VERSIONS[package]), files | ({"chars.json": chars} if chars else {}))
    package_json = {"name": "emojibase-data", "version": "17.0.0", "license": "MIT", "author": "Somebody"}
    package_json["repository"] = {"url": "git@github.com:somebody/emojibase.git"}
    text = {"package.json": package_json, "en/data.json": EMOJIBASE, "meta/groups.json": GROUPS}
    pack(tarball_path(folder, emoji_sets.TEXT_PACKAGE, emoji_sets.TEXT_VERSION), text)
    return folder


@pytest.fixture
def no_npm(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path / "no-programs-here"))


def build(cache, out):
    build_dataset.main(["--out", str(out), "--cache", str(cache), "--workers", "1"])
    return load_emoji(out)


def rows(dataset):
    """(codepoints, style) -> (row, pixels) over all splits."""
    found = {}
    for split in dataset.values():
        for row, pixels in zip(split.remove_columns("image"), to_uint8(split), strict=True):
            found[row["codepoints"], row["style"]] = row, pixels
    return found


def test_build_joins_renders_and_describes(cache, tmp_path, no_npm):
    found = rows(build(cache, tmp_path / "data" / "emoji"))

    dog_styles = {style for codepoints, style in found if codepoints == "1f436"}
    assert dog_styles == {s.style for s in EMOJI_SETS}  # by characters, by the sibling's names, by alias, by name
    assert ("2764", "noto") in found and ("2764", "blob") in found
    assert {codepoints for codepoints, _ in found}.isdisjoint({"1faeb", "1f3c3-200d-2642"})  # unknown; a duplicate

    row, pixels = found["1f44b-1f3ff", "noto"]
    assert pixels.shape == (64, 64, 3) and pixels.dtype == np.uint8
    assert (pixels[:, :32] == GREEN).all() and (pixels[:, 32:] == 255).all()
    assert row == {
        "name": "waving hand: dark skin tone",
        "style": "noto",
        "tags": ["waving hand"],
        "codepoints": "1f44b-1f3ff",
        "base": "1f44b",
        "group": "people-body",
        "subgroup": "sub",
        "tone": "dark",
        "gender": "none",
    }
    assert found["1f44b", "noto"][0]["tone"] == "none"
    assert found["1f469-200d-1f3a4", "noto"][0]["gender"] == "female"
    assert found["1f1e6", "noto"][0]["group"] == ""
    np.testing.assert_array_equal(found["1f449", "noto"][1], found["1f448", "noto"][1][:, ::-1])
    assert (found["1f436", "fluent 3d"][1] == 255).all()


def test_build_writes_licences_and_replaces_a_data_set_whole(cache, tmp_path, no_npm):
    out = tmp_path / "emoji"
    first = rows(build(cache, out))
    (out / "train" / "stale").touch()
    second = rows(build(cache, out))
    assert first.keys() == second.keys()
    assert not (out / "train" / "stale").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "emoji"]  # nothing is left beside it
    licences = (out / "LICENSES.md").read_text()
    for emoji_set in EMOJI_SETS:
        name = emoji_set.package.split("/")[1]
        origin = f"{emoji_set.package} | {emoji_set.version} | CC-BY-4.0 | https://example.org/licence"
        author = f"Author of {name} | https://example.org/{name}"
        assert f"| {emoji_set.style} | {name.title()} | {origin} | {author} |" in licences
    assert "| emojibase-data | 17.0.0 | MIT |" in licences and "https://github.com/somebody/emojibase |" in licences


def test_build_refuses_to_replace_something_else(cache, tmp_path, no_npm):
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(SystemExit, match="holds something else than a data set"):
        build(cache, tmp_path)
    assert (tmp_path / "thesis.txt").exists()


def test_missing_npm_is_one_line_that_names_the_package(tmp_path, no_npm):
    with pytest.raises(SystemExit, match="error: @iconify-json/noto@.* can't be downloaded: npm is not installed"):
        build(tmp_path / "cache", tmp_path / "emoji")
    assert not (tmp_path / "emoji").exists()


def install_npm(folder, monkeypatch, script):
    """Puts a program `npm` first on the PATH."""
    folder.mkdir()
    program = folder / "npm"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_failed_download_is_one_line_and_leaves_no_partial_file(cache, tmp_path, monkeypatch):
    # Like an npm that dies in the middle of writing: $4 is the destination.
    script = 'echo half > "$4/half.tgz"; echo "npm error code ECONNREFUSED" >&2; exit 1'
    install_npm(tmp_path / "bin", monkeypatch, script)
    lost = tarball_path(cache, "@iconify-json/twemoji", VERSIONS["@iconify-json/twemoji"])
    lost.unlink()
    before = sorted(os.listdir(cache))
    with pytest.raises(SystemExit) as error:
        build(cache, tmp_path / "emoji")
    assert str(error.value) == (
        f"error: @iconify-json/twemoji@{VERSIONS['@iconify-json/twemoji']} can't be downloaded: code ECONNREFUSED"
    )
    assert sorted(os.listdir(cache)) == before


def test_download_resumes_with_the_missing_package_only(cache, tmp_path, monkeypatch):
    store = tmp_path / "store"
    store.mkdir()
    lost = tarball_path(cache, "@iconify-json/emojione", VERSIONS["@iconify-json/emojione"])
    lost.rename(store / lost.name)
    install_npm(tmp_path / "bin", monkeypatch, f'echo "$5" >> "{tmp_path}/asked"; cp "{store}"/*.tgz "$4"')
    assert ("1f436", "emojione") in rows(build(cache, tmp_path / "emoji"))
    assert (tmp_path / "asked").read_text().split() == [f"@iconify-json/emojione@{VERSIONS['@iconify-json/emojione']}"]


def test_damaged_package_is_named(cache, tmp_path, no_npm):
    damaged = tarball_path(cache, "@iconify-json/noto", VERSIONS["@iconify-json/noto"])
    damaged.write_bytes(damaged.read_bytes()[:200])
    with pytest.raises(SystemExit, match=f"{re.escape(damaged.name)} is damaged .* delete it and build again"):
        build(cache, tmp_path / "emoji")


def test_load_emoji_names_the_command_that_builds(tmp_path):
    with pytest.raises(FileNotFoundError, match="python examples/emoji/build_dataset.py --out .*/nothing"):
        load_emoji(tmp_path / "nothing")


def test_join_key_drops_the_variation_selector():
    assert join_key("1F3F3-FE0F-200D-1F308") == "1f3f3-200d-1f308"


@pytest.mark.parametrize(
    "variants",
    [
        ["1f3c3", "1f3c3-200d-2642", "1f3c3-200d-2640", "1f3c3-200d-2640-200d-27a1"],  # running
        ["1f9d1", "1f468", "1f469", "1f468-200d-1f9b0", "1f9d4-200d-2642", "1f471-200d-2640"],  # hair
        ["1f9d1-200d-1f3a4", "1f468-200d-1f3a4", "1f469-200d-1f3a4"],  # singer
        ["1f46b", "1f46c", "1f9d1-200d-1f91d-200d-1f9d1"],  # holding hands
        ["1f46a", "1f468-200d-1f469-200d-1f466", "1f9d1-200d-1f9d2", "1f469-200d-1f467"],  # family
        ["1f491", "1f468-200d-2764-200d-1f468"],
        ["1f48f", "1f469-200d-2764-200d-1f48b-200d-1f468"],
        ["1f9d1-200d-1f384", "1f385", "1f936"],  # Santa Claus
    ],
)
def test_family_is_shared_by_variants(variants):
    assert len({family_key(base) for base in variants}) == 1


def test_family_tells_emoji_apart():
    bases = ["1f9d1", "1f3c3", "1f9d1-200d-1f3a4", "1f46a", "1f491", "1f48f", "1f46b", "2764-200d-1f525", "2764"]
    assert len({family_key(base) for base in bases}) == len(bases)


def test_svg_follows_alias_chains_and_centres_oblong_icons():
    icons = {
        "prefix": "tiny",
        "width": 32,
        "height": 32,
        "icons": {"bus": {"body": "<b/>", "height": 33}},
        "aliases": {"sub": {"parent": "bus", "hFlip": True}, "undo": {"parent": "sub", "hFlip": True}},
    }
    assert 'viewBox="0 0 32 33"' in svg_of(icons, "bus", 64)
    assert '<g transform="translate(32 0) scale(-1 1)"><b/></g>' in svg_of(icons, "sub", 64)
    assert "transform" not in svg_of(icons, "undo", 64)
    icons["aliases"]["turned"] = {"parent": "bus", "rotate": 1}
    with pytest.raises(emoji_sets.EmojiBuildError, match="'turned' of tiny is rotated"):
        svg_of(icons, "turned", 64)


def drawing(base, style, number=0):
    emoji = Emoji(f"{base}-{number}", base, family_key(base), base, (), "", "", "none", "none", 0)
    return Drawing(emoji, style, "")


def test_splits_hold_out_whole_families_and_known_pairs():
    styles = [s.style for s in EMOJI_SETS]
    bases = [f"{number:x}" for number in range(0x1F600, 0x1F600 + 1000)]
    bases += [f"{base}-200d-2642" for base in bases[:200]]
    made = [(drawing(base, style), f"{base} {style}".encode()) for base in bases for style in styles]
    # One concept that only a single held-out pair would show, and two whose picture is the same in one style.
    lonely = next(f"{n:x}" for n in range(0x30000, 0x31000) if fraction("pair", f"{n:x}", "noto") < 0.05)
    twins = [f"{n:x}" for n in range(0x40000, 0x40020)]
    made += [(drawing(lonely, "noto"), b"lonely"), *((drawing(twin, "noto"), b"same") for twin in twins)]

    splits = assign_splits(made)
    of = {name: [d.emoji for (d, _), split in zip(made, splits, strict=True) if split == name] for name in set(splits)}
    base_of = {name: {emoji.base for emoji in found} for name, found in of.items()}
    families = {name: {emoji.family for emoji in found} for name, found in of.items()}
    assert families["heldout_concept"].isdisjoint(families["train"] | families["heldout_pair"])
    assert base_of["heldout_pair"] <= base_of["train"]
    assert 0.07 < len(base_of["heldout_concept"]) / len(bases) < 0.13
    assert 0.03 < len(of["heldout_pair"]) / len(made) < 0.07
    assert lonely not in base_of["heldout_pair"]
    assert len({split for (_, picture), split in zip(made, splits, strict=True) if picture == b"same"}) == 1
    # A family's pictures in one style stay together.
    pair_split = {}
    for (d, _), split in zip(made, splits, strict=True):
        assert pair_split.setdefault((d.emoji.family, d.style), split) == split
    # The order of rows does not matter.
    assert assign_splits(made[::-1])[::-1] == splits
