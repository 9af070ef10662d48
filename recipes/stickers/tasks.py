"""The tasks of the bundled model: a grammar of prompts over pictures, each with its references and its true result.

Owns wording and what a wording means. A prompt belongs to the evaluation when its hash says so (`is_evaluation`); the
training draws skip those, so every evaluation prompt is one that training never saw.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass, replace

from world import (
    COLUMNS,
    HELD_OUT,
    LARGE,
    MEDIUM,
    ROWS,
    SCALES,
    SIZES,
    SMALL,
    STICKERS,
    Picture,
    Scene,
    Sticker,
    scene_names,
)

NAMES = {glyph: name for name, glyph in {**STICKERS, **HELD_OUT}.items()}
NUM_VARIANTS = 9
SCALE_WORDS = {SMALL: ("small", "little", "tiny"), MEDIUM: ("",), LARGE: ("big", "large", "huge")}
COLUMN_WORDS = {"left": "on the left", "center": "", "right": "on the right"}
ROW_WORDS = {"top": "at the top", "middle": "", "bottom": "at the bottom"}
CELL_WORDS = {
    ("left", "top"): "in the top left corner", ("right", "top"): "in the top right corner",
    ("left", "bottom"): "in the bottom left corner", ("right", "bottom"): "in the bottom right corner",
}  # fmt: skip
CORNERS = (("left", "top"), ("right", "top"), ("left", "bottom"), ("right", "bottom"))
SCENE_WORDS = {
    "beach": ("on a beach", "at the beach"), "night sky": ("in the night sky", "at night"),
    "meadow": ("on a meadow", "in a green meadow"), "snow": ("in the snow", "in a snowy landscape"),
    "room": ("in a room", "inside a room"), "city": ("in the city", "in a city"),
    "desert": ("in the desert", "in a desert"), "forest": ("in the forest", "in a forest"),
    "sea": ("at sea", "on the sea"), "sunset": ("at sunset", "in the sunset"),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Example:
    """One case: the prompt, what the references show, and what the result must show."""

    task: str
    prompt: str
    references: tuple[Picture, ...]
    result: Picture


def is_evaluation(prompt: str) -> bool:
    """Whether a prompt is kept for the evaluation (about one in twelve)."""
    return hashlib.sha256(prompt.encode()).digest()[0] < 21


def scene_words(rng: random.Random, name: str) -> str:
    if name in SCENE_WORDS:
        return rng.choice(SCENE_WORDS[name])
    if " to " in name:
        return rng.choice((f"on a {name} gradient", f"over a gradient from {name}"))
    return rng.choice((f"on a {name} background", f"on plain {name}"))


def article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def place_words(rng: random.Random, column: str, row: str) -> str:
    if (column, row) in CELL_WORDS:
        return CELL_WORDS[column, row]
    if (column, row) == ("center", "middle"):
        return rng.choice(("in the middle", "in the center", ""))
    return COLUMN_WORDS[column] or ROW_WORDS[row]


class Grammar:
    """Draws examples. `glyphs` are the stickers that a reference may show; those with a name may be called by it."""

    def __init__(self, glyphs: list[int], *, evaluation: bool = False, pool: int | None = None, seed: int = 0) -> None:
        """`pool`, if given, is the number of different reference pictures that examples share (they are encoded once)."""
        self._glyphs = glyphs
        self._named = [g for g in glyphs if NAMES.get(g) in STICKERS]
        self._evaluation = evaluation
        self._tasks: dict[str, Callable[[random.Random], Example]] = {
            "draw": self._draw,
            "edit": self._edit,
            "combine2": self._combine2,
            "combine3": lambda rng: self._combine_many(rng, 3),
            "combine4": lambda rng: self._combine_many(rng, 4),
        }
        self._pool: dict[tuple[tuple[int, int], bool], list[Picture]] = {}
        if pool:
            rng = random.Random(f"{seed}/pool")
            for _ in range(pool):
                picture = self._new_reference(rng, self._size(rng), SCALES)
                for modest in {False, picture.stickers[0].scale != LARGE}:
                    self._pool.setdefault((picture.size, modest), []).append(picture)

    def draw(self, rng: random.Random, task: str) -> Example:
        """One example of a task, with a prompt of the right side of the split."""
        while True:
            example = self._tasks[task](rng)
            if is_evaluation(example.prompt) == self._evaluation:
                return example

    # the parts

    def _glyph(self, rng: random.Random, named: float = 0.5) -> int:
        return rng.choice(self._named) if self._named and rng.random() < named else rng.choice(self._glyphs)

    def _reference(self, rng: random.Random, size: tuple[int, int], *, modest: bool = False) -> Picture:
        """A reference with one sticker; a `modest` one is not large."""
        if self._pool:
            return rng.choice(self._pool[size, modest])
        return self._new_reference(rng, size, (SMALL, MEDIUM) if modest else SCALES)

    def _new_reference(self, rng: random.Random, size: tuple[int, int], scales: tuple[int, ...]) -> Picture:
        scene = Scene(name=rng.choice(scene_names()), variant=rng.randrange(NUM_VARIANTS))
        column, row = rng.choice([(c, r) for c in COLUMNS for r in ROWS])
        sticker = Sticker(
            glyph=self._glyph(rng), scale=rng.choice(scales), column=column, row=row, mirrored=rng.random() < 0.15
        )
        return Picture(scene=scene, stickers=(sticker,), size=size)

    def _call(self, rng: random.Random, sticker: Sticker) -> str:
        """How a prompt speaks of a sticker in a reference: by name, where it has one that training knows, or not."""
        name = NAMES.get(sticker.glyph)
        return f"the {name}" if name in STICKERS and rng.random() < 0.6 else "the sticker"

    def _size(self, rng: random.Random) -> tuple[int, int]:
        return rng.choices(SIZES, (0.7, 0.15, 0.15))[0]

    # the tasks

    def _draw(self, rng: random.Random) -> Example:
        size = self._size(rng)
        column, row = rng.choice(
            [(c, r) for c in COLUMNS for r in ROWS if "center" in (c,) or "middle" in (r,) or rng.random() < 0.5]
        )
        sticker = Sticker(glyph=rng.choice(self._named), scale=rng.choice(SCALES), column=column, row=row)
        scene = Scene(name=rng.choice(scene_names()))
        noun = NAMES[sticker.glyph]
        what = article(f"{rng.choice(SCALE_WORDS[sticker.scale])} {noun}".strip())
        where, place = scene_words(rng, scene.name), place_words(rng, column, row)
        prompt = rng.choice(
            (
                f"{what} {where} {place}",
                f"{what} {place} {where}",
                f"{where}, {what} {place}",
                f"a picture of {what} {place} {where}",
                f"draw {what} {where} {place}",
            )
        )
        return Example(
            task="draw",
            prompt=" ".join(prompt.split()),
            references=(),
            result=Picture(scene=scene, stickers=(sticker,), size=size),
        )

    def _edit(self, rng: random.Random) -> Example:
        size = self._size(rng)
        before = self._reference(rng, size)
        sticker = before.stickers[0]
        it = self._call(rng, sticker)
        kind = rng.choice(("scene", "scene", "scene", "remove", "scale", "scale", "move", "move", "mirror", "grey"))
        if kind == "scene":
            scene = Scene(name=rng.choice([n for n in scene_names() if n != before.scene.name]))
            where = scene_words(rng, scene.name)
            prompt = rng.choice(
                (
                    f"put {it} {where}",
                    f"change the background: {it} {where}",
                    f"{it} should be {where}",
                    f"move {it} to a new scene, {where}",
                )
            )
            after = replace(before, scene=scene)
        elif kind == "remove":
            prompt = rng.choice(
                (f"remove {it}", f"take {it} away", f"erase {it}", f"only the background, without {it}")
            )
            after = replace(before, stickers=())
        elif kind == "scale":
            steps = [
                s for s in (SCALES.index(sticker.scale) - 1, SCALES.index(sticker.scale) + 1) if 0 <= s < len(SCALES)
            ]
            step = rng.choice(steps)
            word = "bigger" if step > SCALES.index(sticker.scale) else "smaller"
            prompt = rng.choice((f"make {it} {word}", f"{it} should be {word}", f"{word} please: {it}"))
            after = before.with_sticker(0, scale=SCALES[step])
        elif kind == "move":
            moves = []
            x, y = COLUMNS.index(sticker.column), ROWS.index(sticker.row)
            moves += [("left", {"column": COLUMNS[x - 1]})] if x > 0 else []
            moves += [("right", {"column": COLUMNS[x + 1]})] if x < 2 else []
            moves += [("up", {"row": ROWS[y - 1]})] if y > 0 else []
            moves += [("down", {"row": ROWS[y + 1]})] if y < 2 else []
            word, change = rng.choice(moves)
            prompt = rng.choice((f"move {it} {word}", f"shift {it} {word}", f"{it} a step {word}"))
            after = before.with_sticker(0, **change)
        elif kind == "mirror":
            prompt = rng.choice((f"mirror {it}", f"flip {it}", f"turn {it} around"))
            after = before.with_sticker(0, mirrored=not sticker.mirrored)
        else:
            prompt = rng.choice((f"turn {it} grey", f"make {it} grey", f"{it} without colour"))
            after = before.with_sticker(0, grey=True)
        return Example(task="edit", prompt=prompt, references=(before,), result=after)

    def _combine2(self, rng: random.Random) -> Example:
        size = self._size(rng)
        other_size = size if rng.random() < 0.6 else self._size(rng)
        first, second = self._reference(rng, size), self._reference(rng, other_size)
        if rng.random() < 0.4:
            it = self._call(rng, first.stickers[0])
            prompt = rng.choice(
                (
                    "use the background of image 2",
                    f"put {it} into the scene of image 2",
                    f"{it} of image 1 with the background of image 2",
                    "change the background to image 2",
                )
            )
            return Example(
                task="combine2", prompt=prompt, references=(first, second), result=replace(first, scene=second.scene)
            )
        it = self._call(rng, second.stickers[0])
        first = replace(first, stickers=()) if rng.random() < 0.3 else first
        taken = [(s.column, s.row) for s in first.stickers]
        column, row = rng.choice([c for c in (*CORNERS, ("left", "middle"), ("right", "middle")) if c not in taken])
        place = place_words(rng, column, row)
        prompt = rng.choice(
            (
                f"put {it} from image 2 into image 1 {place}",
                f"add {it} of image 2 {place} of image 1",
                f"{place}, place {it} from image 2",
            )
        )
        added = replace(second.stickers[0], column=column, row=row)
        return Example(
            task="combine2",
            prompt=prompt,
            references=(first, second),
            result=replace(first, stickers=(*first.stickers, added)),
        )

    def _combine_many(self, rng: random.Random, count: int) -> Example:
        """Image 1 gives the scene; the sticker of each other image goes to a corner of its own."""
        size = self._size(rng)
        other_size = size if rng.random() < 0.6 else self._size(rng)
        first = replace(self._reference(rng, size), stickers=())
        if rng.random() < 0.3:
            first = replace(first, stickers=(Sticker(glyph=self._glyph(rng), scale=SMALL),))
        others = [self._reference(rng, other_size, modest=True) for _ in range(count - 1)]
        corners = rng.sample(CORNERS, count - 1)
        parts, stickers = [], list(first.stickers)
        numbered = list(enumerate(zip(others, corners, strict=True), start=2))
        for number, (picture, (column, row)) in rng.sample(numbered, len(numbered)):
            sticker = picture.stickers[0]
            it = self._call(rng, sticker)
            where = place_words(rng, column, row).removeprefix("in the ").removesuffix(" corner")
            parts.append(f"{it} of image {number} {where}")
        for picture, (column, row) in zip(others, corners, strict=True):
            stickers.append(replace(picture.stickers[0], column=column, row=row))
        lead = rng.choice(("put into image 1: ", "into image 1: ", "add "))
        prompt = lead + rng.choice((", ", " and ")).join(parts)
        return Example(
            task=f"combine{count}",
            prompt=prompt,
            references=(first, *others),
            result=replace(first, stickers=tuple(stickers)),
        )
