"""Pictures that prompts mention and calls do not have, and words that a model was not trained on."""

from __future__ import annotations

import pytest

from limner.config import KnownWords
from limner.mentions import at_card, missing_pictures, prompt_warnings, unknown_words


@pytest.mark.parametrize(
    ("prompt", "given", "missing"),
    [
        ("put image 1 into image 2", 1, ["image 2"]),
        ("put image 1 into Image 2 and image 3", 1, ["Image 2", "image 3"]),
        ("put image 1 into image 2", 2, []),
        ("use the background of image2", 1, ["image2"]),
        ("the hat of picture #3", 2, ["picture #3"]),
        ("blend images 1 and 2", 1, ["images 1 and 2"]),
        ("blend images 1, 2 and 3", 2, ["images 1, 2 and 3"]),
        ("the style of the second image", 1, ["second image"]),
        ("as in reference 2", 1, ["reference 2"]),
        ("make image 1 blue", 0, ["image 1"]),
        ("an image of 2 cats", 1, []),
        ("a 2 image collage", 1, []),
        ("an image 16:9", 0, []),
        ("image 2.5 times larger", 1, []),
        ("a photo 4x3", 1, []),
        ("photo 99, as in image 1900", 1, []),
        ("imagine 2 dogs", 1, []),
        ("the second dog", 1, []),
    ],
)
def test_missing_pictures(prompt: str, given: int, missing: list[str]) -> None:
    found = missing_pictures([prompt], num_references=given)
    assert [warning.split("'")[1] for warning in found] == missing


def test_what_is_said() -> None:
    assert missing_pictures(["image 3", "image 3 again", "image 4"], num_references=2) == (
        "prompt: mentions 'image 3', and 2 references are given; give image 3, or change the prompt",
        "prompt: mentions 'image 4', and 2 references are given; give image 4, or change the prompt",
    )


@pytest.mark.parametrize(
    ("prompt", "unknown"),
    [
        ("a cat, a dog", ["dog"]),
        ("A Cat", ["A", "Cat"]),
        ("cat2cat_cat-cat's", ["s"]),
        ("dog dog, dog", ["dog"]),
        ("Übergröße e\u0301 ²½Ⅳ 猫が", ["Übergröße", "e", "猫が"]),
        ("16:9 (4x3) !?", ["x"]),
        ("", []),
    ],
)
def test_unknown_words(prompt: str, unknown: list[str]) -> None:
    """`tests/contract/test_page_kept.py` asks the page for the same."""
    assert unknown_words([prompt], {"a", "cat"}) == unknown


def test_what_is_said_of_words() -> None:
    known = KnownWords(frozenset({"a", "cat", "image"}), "/model/README.md")
    prompts = ["Cat b c d e f", "image 2 g", "h " + "i" * 99]
    missing, words = prompt_warnings(prompts, num_references=1, known=known)
    assert "image 2" in missing
    assert words == (
        "prompt: the model was not trained on 'Cat' (write 'cat'), 'b', 'c', 'd', 'e', 'f' and 3 more words; its card says "
        "what it understands: /model/README.md"
    )
    (words,) = prompt_warnings(["i" * 99], num_references=0, known=KnownWords(known.words))
    assert words == f"prompt: the model was not trained on '{'i' * 40}...'; its card says what it understands"
    assert at_card(words, "GET /v1/model-card").endswith("understands: GET /v1/model-card")
    assert at_card(missing, "GET /v1/model-card") == missing
    assert prompt_warnings(prompts, num_references=2, known=KnownWords()) == ()
