"""The tasks of the bundled model: a grammar of prompts over pictures, each with its references and its true result.

Owns the wordings and their meaning. A prompt belongs to the evaluation when its hash says so (`is_evaluation`), and so
does a pair of sticker and scene (`is_evaluation_pair`). Training skips both: it never uses a prompt of the evaluation, with
or without "please", and never for such a pair by name, neither to draw nor as the new scene of an edit.
"""

from __future__ import annotations

import hashlib
import random
import re
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
TASKS = ("draw", "edit", "combine2", "combine3", "combine4")
NUM_VARIANTS = 9
EDITS = ("scene", "scene", "scene", "remove", "scale", "scale", "move", "move", "mirror", "grey")
"""The kinds of edits of one reference, as often as the evaluation asks for them."""
HARD_EDITS = ("scale", "scale", "scale", "size", "size", "size", "mirror")
"""Asked for oftener in training: form is what fails most. "size" are those of "scale" that name a size ("make it tiny"; of a
medium sticker, small in seven of ten)."""
SCALE_WORDS = {SMALL: ("small", "little", "tiny"), MEDIUM: ("",), LARGE: ("big", "large", "huge")}
COLUMN_WORDS = {"left": "on the left", "center": "", "right": "on the right"}
ROW_WORDS = {"top": "at the top", "middle": "", "bottom": "at the bottom"}
CELL_WORDS = {
    ("left", "top"): "in the top left corner",
    ("right", "top"): "in the top right corner",
    ("left", "bottom"): "in the bottom left corner",
    ("right", "bottom"): "in the bottom right corner",
}
CORNERS = (("left", "top"), ("right", "top"), ("left", "bottom"), ("right", "bottom"))
SCENE_WORDS = {
    "beach": ("on a beach", "at the beach"),
    "night sky": ("in the night sky", "at night"),
    "meadow": ("on a meadow", "in a green meadow"),
    "snow": ("in the snow", "in a snowy landscape"),
    "room": ("in a room", "inside a room"),
    "city": ("in the city", "in a city"),
    "desert": ("in the desert", "in a desert"),
    "forest": ("in the forest", "in a forest"),
    "sea": ("at sea", "on the sea"),
    "sunset": ("at sunset", "in the sunset"),
}


@dataclass(frozen=True, kw_only=True)
class Example:
    """One case: the prompt, what the references show, and what the result must show."""

    task: str
    prompt: str
    references: tuple[Picture, ...]
    result: Picture


def is_evaluation(prompt: str) -> bool:
    """Return True if a prompt, without "please" before or after it, is reserved for the evaluation (about one in twelve)."""
    return hashlib.sha256(prompt.encode()).digest()[0] < 21


def is_evaluation_pair(glyph: int, scene: str) -> bool:
    """Return True if this sticker on this scene, requested by name, is reserved for the evaluation (about one in eight)."""
    return hashlib.sha256(f"{glyph} {scene}".encode()).digest()[0] < 32


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


def vocabulary(num: int = 5000) -> list[str]:
    """The words of prompts; after a thousand of them no new one comes."""
    grammar, rng = Grammar(list(STICKERS.values())), random.Random("vocabulary")
    prompts = (grammar.draw(rng, TASKS[number % len(TASKS)]).prompt for number in range(num))
    return sorted({word for prompt in prompts for word in re.findall(r"[^\W\d_]+", prompt)})


class Grammar:
    """Draws examples. `glyphs` are the stickers that a reference may show; those with a name may be called by it."""

    def __init__(self, glyphs: list[int], *, evaluation: bool = False, pool: int | None = None, seed: int = 0) -> None:
        """`pool`, if given, is the number of different reference pictures that examples share (they are encoded once)."""
        self._glyphs = glyphs
        self._named = [g for g in glyphs if NAMES.get(g) in STICKERS]
        self._evaluation = evaluation
        self._pairs = [
            (g, name) for g in self._named for name in scene_names() if is_evaluation_pair(g, name) == evaluation
        ]
        self._pool: dict[tuple[tuple[int, int], bool], list[Picture]] = {}
        if pool:
            rng = random.Random(f"{seed}/pool")
            for _ in range(pool):
                picture = self._new_reference(rng, self._size(rng), SCALES)
                for modest in {False, picture.stickers[0].scale != LARGE}:
                    self._pool.setdefault((picture.size, modest), []).append(picture)

    def draw(self, rng: random.Random, task: str) -> Example:
        """One example of a task, with a prompt of the right side of the split."""
        return self.sitting(rng, task, 1)[0]

    def sitting(self, rng: random.Random, task: str, num: int) -> list[Example]:
        """`num` different examples of a task that share their references (of `draw`: the size)."""
        if task not in TASKS:
            raise ValueError(f"task {task!r} is not one of {', '.join(TASKS)}")
        size = self._size(rng)
        references = self._references(rng, task, size)
        ask = {"draw": self._draw, "edit": self._edit, "combine2": self._combine2}.get(task, self._combine_many)
        found: list[Example] = []
        while len(found) < num:
            prompt, result = ask(rng, size, references)
            kept = is_evaluation(" ".join(prompt.split()))
            if len(references) < 3 and rng.random() < 0.15:
                prompt = rng.choice((f"please {prompt}", f"{prompt}, please", f"{prompt} please"))
            example = Example(task=task, prompt=" ".join(prompt.split()), references=references, result=result)
            if kept == self._evaluation and example not in found:
                found.append(example)
        return found

    # the parts

    def _glyph(self, rng: random.Random, named: float = 0.5) -> int:
        return rng.choice(self._named) if self._named and rng.random() < named else rng.choice(self._glyphs)

    def _references(self, rng: random.Random, task: str, size: tuple[int, int]) -> tuple[Picture, ...]:
        """Image 1 has the size of the result; the others of a sitting share one size, which may be another."""
        if task == "draw":
            return ()
        if task == "edit":
            return (self._reference(rng, size),)
        other_size = size if rng.random() < 0.6 else self._size(rng)
        first = self._reference(rng, size)
        if task == "combine2":
            first = replace(first, stickers=()) if rng.random() < 0.2 else first
            return (first, self._reference(rng, other_size))
        stickers = (Sticker(glyph=self._glyph(rng), scale=SMALL),) if rng.random() < 0.3 else ()
        others = [self._reference(rng, other_size, modest=True) for _ in range(int(task[-1]) - 1)]
        return (replace(first, stickers=stickers), *others)

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
        """Return how a prompt refers to a sticker in a reference: by name, if it has one that training knows, or not."""
        name = NAMES.get(sticker.glyph)
        return f"the {name}" if name in STICKERS and rng.random() < 0.6 else "the sticker"

    def _size(self, rng: random.Random) -> tuple[int, int]:
        return rng.choices(SIZES, (0.7, 0.15, 0.15))[0]

    # the tasks: prompt and result for references

    def _draw(self, rng: random.Random, size: tuple[int, int], references: tuple[Picture, ...]) -> tuple[str, Picture]:
        column, row = rng.choice(
            [(c, r) for c in COLUMNS for r in ROWS if "center" in (c,) or "middle" in (r,) or rng.random() < 0.5]
        )
        glyph, name = rng.choice(self._pairs)
        sticker = Sticker(glyph=glyph, scale=rng.choice(SCALES), column=column, row=row)
        scene = Scene(name=name)
        noun = NAMES[sticker.glyph]
        what = article(f"{rng.choice(SCALE_WORDS[sticker.scale])} {noun}".strip())
        where, place = scene_words(rng, scene.name), place_words(rng, column, row)
        prompt = rng.choice(
            (
                f"{what} {where} {place}",
                f"{what} {place} {where}",
                f"{where}, {what} {place}",
                f"{where} {place}: {what}",
                f"a picture of {what} {place} {where}",
                f"draw {what} {where} {place}",
            )
        )
        return prompt, Picture(scene=scene, stickers=(sticker,), size=size)

    def _edit(self, rng: random.Random, size: tuple[int, int], references: tuple[Picture, ...]) -> tuple[str, Picture]:
        (before,) = references
        sticker = before.stickers[0]
        it = self._call(rng, sticker)
        kind = rng.choice(EDITS if self._evaluation else (*EDITS, *HARD_EDITS))
        if kind == "scene":
            others = [n for n in scene_names() if n != before.scene.name]
            if not self._evaluation:
                others = [n for n in others if not is_evaluation_pair(sticker.glyph, n)]
            scene = Scene(name=rng.choice(others))
            where = scene_words(rng, scene.name)
            prompt = rng.choice(
                (
                    f"put {it} {where}",
                    f"change the background: {it} {where}",
                    f"{it} should be {where}",
                    f"move {it} to a new scene, {where}",
                    f"{where} instead",
                )
            )
            return prompt, replace(before, scene=scene)
        if kind == "remove":
            prompt = rng.choice(
                (f"remove {it}", f"take {it} away", f"erase {it}", f"only the background, without {it}")
            )
            return prompt, replace(before, stickers=())
        named = kind == "size"  # a size by its name, and not a step
        if (
            kind in ("scale", "size")
            and sticker.scale != LARGE
            and (rng.random() < 0.3 or (named and sticker.scale == SMALL))
        ):
            word = rng.choice(SCALE_WORDS[LARGE])
            return rng.choice((f"make {it} {word}", f"{it} should be {word}")), before.with_sticker(0, scale=LARGE)
        if kind in ("scale", "size") and sticker.scale != SMALL and (rng.random() < 0.3 or named):
            word = rng.choice(SCALE_WORDS[SMALL])
            return rng.choice((f"make {it} {word}", f"{it} should be {word}")), before.with_sticker(0, scale=SMALL)
        if kind == "scale":
            at = SCALES.index(sticker.scale)
            step = rng.choice([s for s in (at - 1, at + 1) if 0 <= s < len(SCALES)])
            word = "bigger" if step > at else "smaller"
            prompt = rng.choice((f"make {it} {word}", f"{it} should be {word}", f"{word} please: {it}"))
            return prompt, before.with_sticker(0, scale=SCALES[step])
        if kind == "move":
            moves: list[tuple[str, dict[str, str]]] = []
            x, y = COLUMNS.index(sticker.column), ROWS.index(sticker.row)
            moves += [("left", {"column": COLUMNS[x - 1]})] if x > 0 else []
            moves += [("right", {"column": COLUMNS[x + 1]})] if x < 2 else []
            moves += [("up", {"row": ROWS[y - 1]})] if y > 0 else []
            moves += [("down", {"row": ROWS[y + 1]})] if y < 2 else []
            word, change = rng.choice(moves)
            prompt = rng.choice((f"move {it} {word}", f"shift {it} {word}", f"{it} a step {word}"))
            return prompt, before.with_sticker(0, **change)
        if kind == "mirror":
            prompt = rng.choice((f"mirror {it}", f"flip {it}", f"turn {it} around"))
            return prompt, before.with_sticker(0, mirrored=not sticker.mirrored)
        prompt = rng.choice((f"turn {it} grey", f"make {it} grey", f"{it} without colour"))
        return prompt, before.with_sticker(0, grey=True)

    def _combine2(
        self, rng: random.Random, size: tuple[int, int], references: tuple[Picture, ...]
    ) -> tuple[str, Picture]:
        first, second = references
        if first.stickers and rng.random() < 0.4:
            it = self._call(rng, first.stickers[0])
            prompt = rng.choice(
                (
                    "use the background of image 2",
                    f"put {it} into the scene of image 2",
                    f"{it} of image 1 with the background of image 2",
                    "change the background to image 2",
                    f"the background of image 2 behind {it}",
                )
            )
            return prompt, replace(first, scene=second.scene)
        it, added = self._call(rng, second.stickers[0]), second.stickers[0]
        taken = [(s.column, s.row) for s in first.stickers]
        if first.stickers and rng.random() < 0.3:  # the sticker of image 1 goes, that of image 2 comes in its place
            old = self._call(rng, first.stickers[0])
            prompt = rng.choice(
                (
                    f"replace {old} with {it} from image 2",
                    f"{it} of image 2 instead of {old}",
                    f"swap {old} for {it} from image 2",
                )
            )
            column, row = taken[0]
            return prompt, replace(first, stickers=(replace(added, column=column, row=row),))
        column, row = rng.choice([c for c in (*CORNERS, ("left", "middle"), ("right", "middle")) if c not in taken])
        place = place_words(rng, column, row)
        if (
            added.column,
            added.row,
        ) not in taken and rng.random() < 0.3:  # no word of a place: where it stands in image 2
            column, row, place = added.column, added.row, ""
        prompt = rng.choice(
            (
                f"put {it} from image 2 into image 1 {place}",
                f"add {it} of image 2 {place + ' of image 1' if place else 'to image 1'}",
                f"{place + ', ' if place else ''}place {it} from image 2 in image 1",
            )
        )
        return prompt, replace(first, stickers=(*first.stickers, replace(added, column=column, row=row)))

    def _combine_many(
        self, rng: random.Random, size: tuple[int, int], references: tuple[Picture, ...]
    ) -> tuple[str, Picture]:
        """Image 1 gives the scene; the sticker of each other image goes to a corner of its own."""
        first, *others = references
        corners = rng.sample(CORNERS, len(others))
        parts = []
        numbered = list(enumerate(zip(others, corners, strict=True), start=2))
        for number, (picture, (column, row)) in rng.sample(numbered, len(numbered)):
            it = self._call(rng, picture.stickers[0])
            where = place_words(rng, column, row).removeprefix("in the ").removesuffix(" corner")
            parts.append(rng.choice((f"{it} of image {number} {where}", f"{where} {it} of image {number}")))
        added = [
            replace(picture.stickers[0], column=column, row=row)
            for picture, (column, row) in zip(others, corners, strict=True)
        ]
        lead = rng.choice(("put into image 1: ", "into image 1: ", "add "))
        prompt = lead + rng.choice((", ", " and ")).join(parts)
        return prompt, replace(first, stickers=(*first.stickers, *added))
