"""Options are declared once: the fields, what is derived from them, and no second declaration that could differ."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from dataclasses import FrozenInstanceError, dataclass, fields, is_dataclass
from pathlib import Path

import pytest

import limner
from limner import options
from limner.engine import Engine
from limner.errors import InvalidRequest
from limner.options import ModelOptions, ServeOptions, ServiceOptions, StoreOptions, option, options_of, select

KINDS = [kind for name in options.__all__ if is_dataclass(kind := getattr(options, name)) and name != "Option"]
SOURCE = Path(limner.__file__).parent


@dataclass(frozen=True, kw_only=True)
class Sample:
    number: int | None = option(None, help="a number", minimum=1)
    words: tuple[str, ...] = option((), help="words", flag="--word")
    hidden: bool = option(False, help="of no command", flag=None)


def test_an_option_is_its_field() -> None:
    number, words, hidden = options_of(Sample)
    assert (number.name, number.flag, number.default, number.value_type) == ("number", "--number", None, int)
    assert (number.minimum, number.choices, number.is_list) == (1, (), False)
    assert (words.flag, words.value_type, words.is_list) == ("--word", str, True)
    assert (hidden.flag, hidden.value_type) == (None, bool)
    assert next(o for o in options_of(ModelOptions) if o.name == "kv_cache_dtype").choices == ("int8", "fp8")
    assert [o.env for o in options_of(StoreOptions)] == ["LIMNER_STORE", None, None]


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_has_a_default_a_help_and_is_frozen(kind: type) -> None:
    made = kind()
    for one in options_of(kind):
        assert getattr(made, one.name) == one.default
        assert one.help
        assert one.default is None or isinstance(one.default, (str, int, float, bool, tuple))
    with pytest.raises(FrozenInstanceError):
        setattr(made, fields(kind)[0].name, "changed")  # type: ignore[arg-type]


def test_no_name_means_two_things() -> None:
    """A field is declared by one class; others inherit it."""
    homes: dict[str, set[type]] = {}
    for kind in KINDS:
        for name in inspect.get_annotations(kind):
            homes.setdefault(name, set()).add(kind)
    assert {name: found for name, found in homes.items() if len(found) > 1} == {}


def test_no_other_place_names_every_field() -> None:
    """A call that passes most fields by hand is a second list of them, which drifts."""
    names = {one.name for one in options_of(ServiceOptions)}
    for file in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call):
                given = {keyword.arg for keyword in node.keywords} & names
                assert len(given) < len(names) / 2, f"{file}:{node.lineno} passes {sorted(map(str, given))}"


def test_a_part_of_many_options() -> None:
    serving = ServeOptions(host="::1", port=1, max_batch=3)
    assert select(ServiceOptions, serving) == ServiceOptions(max_batch=3)
    assert select(ServiceOptions, serving, drain=2.0) == ServiceOptions(max_batch=3, drain=2.0)


def test_the_engine_has_the_defaults_of_the_service() -> None:
    defaults = Engine.__init__.__kwdefaults__ or {}
    assert (defaults["max_batch"], defaults["max_waiting"]) == (ServiceOptions.max_batch, ServiceOptions.max_waiting)
    assert ServiceOptions.max_batch == 10


def test_names_and_places(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (ModelOptions().model_name, ModelOptions(model="some/klein").model_name) == ("limner-stickers", "klein")
    monkeypatch.setenv("XDG_DATA_HOME", "/data")
    assert ServiceOptions().storage == options.default_data() == "/data/limner/serve"
    assert ServiceOptions(data="jobs").storage == "jobs"


def test_the_policy_of_references() -> None:
    policy = ModelOptions(background="white", max_pixels=4096).policy
    assert (policy.background, policy.max_pixels) == ("white", 4096)
    with pytest.raises(InvalidRequest, match="max_pixels: 1 is not allowed"):
        _ = ModelOptions(max_pixels=1).policy


def test_they_need_no_torch() -> None:
    program = "import sys, limner.options; print(sorted({'torch', 'numpy', 'pydantic', 'argparse'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
