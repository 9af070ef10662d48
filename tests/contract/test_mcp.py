"""`limner mcp` as the protocol's own client sees it: tools, resources, progress, cancellation and errors."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
from PIL import Image
from tests.support.lora_files import make_pairs, original
from tests.support.lora_files import write as write_lora
from tests.support.tiny import Gate, generators, picture

from limner import Pipeline
from limner.config import KnownWords
from limner.engine import Engine
from limner.images import encode, prepare_reference, read_metadata

mcp = pytest.importorskip("mcp", reason="the extra mcp is not installed")
from limner.mcp import AllowedFolder, Assistant, create_server  # noqa: E402

ROOT = Path(__file__).parents[2]
T = TypeVar("T")
MODES = ("auto", "legacy")
"""The protocol of 2026-07-28, called directly, and those before it, as JSON-RPC."""


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> Pipeline:
    return Pipeline.from_pretrained(tiny_folder)


@pytest.fixture
def assistant(model: Pipeline, tmp_path: Path) -> Iterator[Assistant]:
    (tmp_path / "pictures").mkdir()
    picture(96, 70).save(tmp_path / "pictures" / "a.png")
    picture(64, 80, seed=1).save(tmp_path / "pictures" / "b.png")
    folder, engine = AllowedFolder(tmp_path / "pictures"), Engine(model, previews=False)
    yield Assistant(engine=engine, folder=folder)
    engine.close()
    folder.close()


def talk(assistant: Assistant, conversation: Callable[[Any], Awaitable[T]], *, mode: str = "auto") -> T:
    async def main() -> T:
        async with mcp.Client(create_server(assistant), mode=mode) as client:
            return await conversation(client)

    return asyncio.run(main())


def call(assistant: Assistant, tool: str, /, **arguments: Any) -> Any:
    return talk(assistant, lambda client: client.call_tool(tool, arguments))


def pictures_of(result: Any) -> list[np.ndarray]:
    assert not result.is_error, result.content
    found = [base64.b64decode(one.data) for one in result.content if one.type == "image"]
    return [np.asarray(Image.open(io.BytesIO(data))) for data in found]


def drawn(model: Pipeline, prompt: str, *images: Any, seed: int, **options: Any) -> np.ndarray:
    out = model(prompt, image=list(images) or None, generator=generators(seed), **options)
    return np.asarray(out.images[0])


def refusal(result: Any) -> str:
    (content,) = result.content
    assert result.is_error
    assert "\n" not in content.text
    return str(content.text)


def test_loras_are_named_to_assistants_and_act_in_one_picture(
    assistant: Assistant, model: Pipeline, tmp_path: Path
) -> None:
    """Where there are none, there is no such argument."""

    async def conversation(client: Any) -> Any:
        return await client.list_tools()

    def schemas() -> list[Any]:
        tools = {tool.name: tool for tool in talk(assistant, conversation).tools}
        return [tools[name].input_schema["properties"] for name in ("generate", "edit")]

    assert not any("loras" in schema for schema in schemas())
    assert "'ink' not loaded; none is loaded" in refusal(call(assistant, "generate", prompt="a", loras={"ink": 1}))
    image = tmp_path / "pictures" / "a.png"
    plain = drawn(model, "a cat", image, seed=2)
    model.load_lora_weights(write_lora(tmp_path, original(make_pairs()), "ink.safetensors"), "ink")
    try:
        model.set_adapters("ink", 0.0)
        for schema in schemas():
            assert list(schema["loras"]["properties"]) == ["ink"]
            assert schema["loras"]["additionalProperties"] is False
        result = call(assistant, "edit", prompt="a cat", pictures=["a.png"], seed=2, loras={"ink": 0.5})
        (found,) = pictures_of(result)
        assert np.array_equal(found, drawn(model, "a cat", image, seed=2, loras={"ink": 0.5}))
        assert not np.array_equal(found, plain)
        assert [(one["name"], one["strength"]) for one in result.structured_content["loras"]] == [("ink", 0.5)]
        size = {"width": 64, "height": 64}
        (found,) = pictures_of(call(assistant, "generate", prompt="a cat", seed=2, loras={"ink": -1}, **size))
        assert np.array_equal(found, drawn(model, "a cat", seed=2, loras={"ink": -1.0}, **size))
        (found,) = pictures_of(call(assistant, "edit", prompt="a cat", pictures=["a.png"], seed=2))
        assert np.array_equal(found, plain)
        told = refusal(call(assistant, "generate", prompt="a", loras={"style": 1}))
        assert "'style' not loaded; loaded: ink" in told
    finally:
        model.unload_lora_weights()


@pytest.mark.parametrize("mode", MODES)
def test_tools_say_what_they_take(mode: str, assistant: Assistant) -> None:
    async def conversation(client: Any) -> Any:
        return await client.list_tools()

    tools = {tool.name: tool for tool in talk(assistant, conversation, mode=mode).tools}
    assert sorted(tools) == ["edit", "forget_references", "generate", "keep_references"]
    schema = tools["edit"].input_schema
    assert sorted(schema["required"]) == ["pictures", "prompt"]
    assert schema["additionalProperties"] is False
    assert all("description" in about for about in schema["properties"].values())


@pytest.mark.parametrize("mode", MODES)
def test_generate_draws_what_the_pipeline_draws_and_tells_each_step(
    mode: str, assistant: Assistant, model: Pipeline
) -> None:
    told: list[tuple[float, float | None, str | None]] = []

    async def conversation(client: Any) -> Any:
        async def progress(done: float, of: float | None, words: str | None) -> None:
            told.append((done, of, words))

        arguments = {"prompt": "a cat", "seed": 7, "steps": 3, "width": 96, "height": 64, "num_images": 2}
        return await client.call_tool("generate", arguments, progress_callback=progress)

    result = talk(assistant, conversation, mode=mode)
    found = pictures_of(result)
    for seed, one in zip((7, 8), found, strict=True):
        expected = drawn(model, "a cat", seed=seed, width=96, height=64, num_inference_steps=3)
        assert np.abs(one.astype(int) - expected).max() <= 1  # a batch of two sums in another order
    assert [done for done, _, _ in told] == [0, 1, 2, 3]
    assert told[-1] == (3, 3, "step 3 of 3")
    about = result.structured_content
    assert about["pictures"] == [{"seed": s, "width": 96, "height": 64} for s in (7, 8)]
    assert json.loads(result.content[0].text) == about


def test_every_way_to_name_a_picture_gives_the_same_edit(assistant: Assistant, model: Pipeline, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    data = (folder / "a.png").read_bytes()
    text = base64.b64encode(data).decode()
    assert not call(assistant, "keep_references", name="cat", pictures=["a.png"]).is_error
    ways = ["a.png", str(folder / "a.png"), (folder / "a.png").as_uri(), text, f"data:image/png;base64,{text}"]
    ways += ["limner://references/cat", "limner://references/cat/1.png"]
    expected = drawn(model, "red", folder / "a.png", folder / "b.png", seed=3, num_inference_steps=2)
    for way in ways:
        result = call(assistant, "edit", prompt="red", pictures=[way, "b.png"], seed=3, steps=2)
        assert np.array_equal(pictures_of(result)[0], expected), way[:40]
        assert [r["processed_size"] for r in result.structured_content["references"]] == [[96, 64], [64, 80]]
        # the drawn picture's own key names the pictures in their order: the pipeline's is at hand
        assert result.structured_content["reference_cache"] == "memory"


@pytest.mark.parametrize("mode", MODES)
def test_kept_references_are_resources_and_are_computed_once(mode: str, assistant: Assistant, model: Pipeline) -> None:
    model.store.remove(model.key_of([prepare(assistant, "a.png"), prepare(assistant, "b.png")]))
    changes: list[str] = []

    async def heard(message: Any) -> None:
        changes.append(getattr(message, "method", ""))

    async def conversation(client: Any) -> Any:
        kept = await client.call_tool("keep_references", {"name": "both", "pictures": ["a.png", "b.png"]})
        again = await client.call_tool("keep_references", {"name": "both", "pictures": ["a.png", "b.png"]})
        listed = await client.list_resources()
        about = await client.read_resource("limner://references/both")
        one = await client.read_resource("limner://references/both/2.png")
        edit = await client.call_tool("edit", {"prompt": "x", "pictures": ["limner://references/both"], "steps": 1})
        await client.call_tool("forget_references", {"name": "both"})
        return kept, again, listed, about, one, edit, await client.list_resources()

    async def main() -> Any:
        async with mcp.Client(create_server(assistant), mode=mode, message_handler=heard) as client:
            return await conversation(client)

    kept, again, listed, about, one, edit, left = asyncio.run(main())
    assert kept.structured_content["reference_cache"] == "miss"
    assert again.structured_content["reference_cache"] == "memory"
    assert edit.structured_content["reference_cache"] == "memory"
    assert [(r.uri, r.mime_type) for r in listed.resources] == [("limner://references/both", "application/json")]
    found = json.loads(about.contents[0].text)
    assert found["key"] == model.key_of([prepare(assistant, "a.png"), prepare(assistant, "b.png")])
    assert [r["uri"] for r in found["references"]] == [f"limner://references/both/{i}.png" for i in (1, 2)]
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(one.contents[0].blob))))
    expected = prepare(assistant, "b.png")
    assert shown.tobytes() == expected.data
    assert left.resources == []
    if mode == "legacy":
        assert changes.count("notifications/resources/list_changed") == 3


def save_mask(folder: Path, size: tuple[int, int], *, edge: int = 40) -> None:
    mask = Image.new("L", size)
    mask.paste(255, (0, 0, edge, size[1]))
    mask.save(folder / "mask.png")


def test_a_mask_and_other_controls(assistant: Assistant, model: Pipeline, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    save_mask(folder, (96, 70))
    files = [folder / "a.png", folder / "b.png"]
    asked: dict[str, Any] = {"prompt": "red", "pictures": ["a.png", "b.png"], "seed": 3, "steps": 2}
    control: dict[str, Any] = {"reference_weights": [1.0, 0.5], "mask_blur": 4}
    result = call(assistant, "edit", **asked, **control, mask="mask.png")
    (found,) = pictures_of(result)
    expected = drawn(model, "red", *files, seed=3, num_inference_steps=2, mask_image=folder / "mask.png", **control)
    assert np.array_equal(found, expected)
    assert "warnings" not in result.structured_content
    Image.new("L", (96, 70), 255).save(folder / "white.png")
    model.text_encoder.known, assistant.card = KnownWords(frozenset({"red"})), "/model/README.md"
    told = call(assistant, "edit", **asked | {"prompt": "blue image 3", "steps": 1}, mask="white.png")
    model.text_encoder.known = KnownWords()
    assert told.structured_content["warnings"] == [
        "mask: it is white everywhere, so nothing of the canvas is kept; black is kept",
        "prompt: mentions 'image 3', and 2 references are given; give image 3, or change the prompt",
        "prompt: the model was not trained on 'blue', 'image'; its card says what it understands: /model/README.md",
    ]
    kept = np.asarray(Image.open(folder / "a.png"))
    assert np.array_equal(found[:, 44:], kept[:, 44:])
    about = result.structured_content
    assert (about["canvas"]["size"], about["pictures"][0]["width"]) == ([96, 70], 96)
    (grown,) = pictures_of(call(assistant, "edit", **asked, expand=[0, 0, 32, 0], strength=0.5))
    assert grown.shape[1] == 128
    kept_result = call(assistant, "edit", **asked, preserve="auto")
    assert set(kept_result.structured_content["preserved"][0]) == {"drift_pixels", "drift_colour", "share_kept"}
    assert pictures_of(kept_result)[0].shape[:2] == (70, 96)

    call(assistant, "keep_references", name="both", pictures=["a.png", "b.png"])
    uri = asked | {"pictures": ["limner://references/both"]}
    result = call(assistant, "edit", **uri, canvas="a.png", mask="mask.png")  # another mask, and no prefill
    assert np.array_equal(pictures_of(result)[0][:, 48:], kept[:, 48:])
    assert result.structured_content["reference_cache"] == "memory"
    line = refusal(call(assistant, "edit", **uri, mask="mask.png"))
    assert line == "mask: it is 96x70 and the canvas 96x64; scale it to the canvas' size"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({"mask": "mask.png", "expand": [1, 0, 0, 0]}, "expand: mask and expand are both given"),
        ({"mask": "../mask.png"}, "mask: ../mask.png is outside of"),
        ({"mask": "limner://references/x"}, "mask: no masks are kept"),
        ({"mask": "black.png"}, "mask: no pixel is white"),
        ({"mask_blur": 3}, "mask_blur: needs mask or expand"),
        ({"canvas": "a.png"}, "canvas: says which picture is repainted"),
        ({"strength": 2}, "strength: 2 is not allowed"),
        ({"reference_weights": [1.0]}, "reference_weights: there are 1 for 2 references"),
        ({"maks": "mask.png"}, "maks: is not an argument of this tool; did you mean mask?"),
    ],
)
def test_controls_that_cannot_be_followed(
    assistant: Assistant, tmp_path: Path, arguments: dict[str, Any], line: str
) -> None:
    save_mask(tmp_path / "pictures", (96, 70))
    Image.new("L", (96, 70)).save(tmp_path / "pictures" / "black.png")
    found = refusal(call(assistant, "edit", prompt="red", pictures=["a.png", "b.png"], **arguments))
    assert found.startswith(line)


def prepare(assistant: Assistant, name: str) -> Any:
    assert assistant.folder is not None
    return prepare_reference(assistant.folder.path / name, policy=assistant.engine.model.reference_policy)


def test_a_name_never_gives_other_pictures(assistant: Assistant, model: Pipeline, tmp_path: Path) -> None:
    """A file that changed under its name, and a name that is taken."""
    folder = tmp_path / "pictures"
    call(assistant, "keep_references", name="cat", pictures=["a.png"])
    before = drawn(model, "x", folder / "a.png", seed=1, num_inference_steps=1)
    picture(96, 70, seed=9).save(folder / "a.png")
    after = drawn(model, "x", folder / "a.png", seed=1, num_inference_steps=1)
    assert not np.array_equal(before, after)
    line = refusal(call(assistant, "keep_references", name="cat", pictures=["a.png"]))
    assert line == "name: 'cat' holds other pictures; choose another name, or give replace: true"

    def edited(name: str) -> np.ndarray:
        return pictures_of(call(assistant, "edit", prompt="x", pictures=[name], seed=1, steps=1))[0]

    assert np.array_equal(edited("limner://references/cat"), before)
    assert np.array_equal(edited("a.png"), after)
    call(assistant, "keep_references", name="cat", pictures=["a.png"], replace=True)
    assert np.array_equal(edited("limner://references/cat"), after)


def test_pictures_are_saved_in_the_folder_and_say_how_they_were_made(assistant: Assistant, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    asked = {"prompt": "a cat", "seed": 5, "steps": 1, "num_images": 2, "save_as": "new.png", "answer": "none"}
    result = call(assistant, "generate", **asked)
    assert [one.type for one in result.content] == ["text"]
    assert [one["file"] for one in result.structured_content["pictures"]] == [
        str(folder / f"new-{i}.png") for i in (1, 2)
    ]
    assert [read_metadata(folder / f"new-{i}.png")["seed"] for i in (1, 2)] == [5, 6]
    assert refusal(call(assistant, "generate", **asked)) == (
        "save_as: new-1.png exists already, and is kept; give another name"
    )
    result = call(assistant, "generate", prompt="a cat", seed=5, steps=1, save_as=str(folder / "o.webp"), answer="jpeg")
    assert [one.mime_type for one in result.content[1:]] == ["image/jpeg"]
    assert read_metadata(folder / "o.webp")["prompt"] == "a cat"
    assert sorted(os.listdir(folder)) == ["a.png", "b.png", "new-1.png", "new-2.png", "o.webp"]


@pytest.mark.parametrize("mode", MODES)
def test_a_cancelled_call_stops_its_draw(
    mode: str, assistant: Assistant, model: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, steps = Gate(monkeypatch), [0]
    forward = type(model.transformer).forward

    def counted(*arguments: Any, **options: Any) -> Any:
        steps[0] += 1
        return forward(*arguments, **options)

    async def conversation(client: Any) -> Any:
        gate.shut()
        task = asyncio.create_task(client.call_tool("generate", {"prompt": "first", "steps": 60}))
        assert await asyncio.to_thread(gate.entered.wait, 60)
        monkeypatch.setattr(type(model.transformer), "forward", counted)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await client.list_tools()  # the server has read on, and so has heard of it
        gate.open()
        return await client.call_tool("generate", {"prompt": "second", "steps": 2})

    assert not talk(assistant, conversation, mode=mode).is_error
    assert steps[0] <= 1 + 2
    assert gate.calls == [["first"], ["second"]]


LINES = [
    ("draw", {}, "name: 'draw' is not a tool; they are: generate, edit"),
    ("generate", {}, "prompt: is missing"),
    ("generate", {"prompt": " "}, "prompt: ' ' is empty; say what to draw"),
    ("generate", {"prompt": "x", "step": 2}, "step: is not an argument of this tool; did you mean steps?"),
    ("generate", {"prompt": "x", "steps": 0}, "steps: 0 is not allowed: input should be greater than or equal to 1"),
    ("generate", {"prompt": "x", "steps": "4"}, "steps: '4' is not allowed: input should be a valid integer"),
    ("generate", {"prompt": "x", "width": 500}, "width: 500 is not a multiple of 16 of at least 64; use 496 or 512"),
    ("generate", {"prompt": "x", "seed": 2**53}, "seed: 9007199254740992 is not allowed"),
    ("generate", {"prompt": "x", "answer": "none"}, "answer: none would leave nothing"),
    ("generate", {"prompt": "x", "save_as": "../x.png"}, "save_as: ../x.png is outside of"),
    ("generate", {"prompt": "x", "save_as": "x.gif"}, "save_as: x.gif has to end in .png"),
    ("edit", {"prompt": "x", "pictures": []}, "pictures: [] is not allowed"),
    ("edit", {"prompt": "x", "pictures": ["a.png", "/etc/passwd"]}, "pictures 2: /etc/passwd is outside of"),
    (
        "edit",
        {"prompt": "x", "pictures": ["no.png"]},
        "pictures 1: no.png cannot be opened (No such file or directory)",
    ),
    ("edit", {"prompt": "x", "pictures": ["https://x.org/a.png"]}, "pictures 1: pictures by URL are not fetched"),
    ("edit", {"prompt": "x", "pictures": ["limner://references/dog"]}, "pictures 1: nothing is kept as 'dog'"),
    ("edit", {"prompt": "x", "pictures": ["data:text/plain,x"]}, "pictures 1: the data URL is not"),
    ("edit", {"prompt": "x", "pictures": ["a.png"] * 17}, "pictures: ["),
    ("keep_references", {"name": "a/b", "pictures": ["a.png"]}, "name: 'a/b' is not allowed"),
    ("forget_references", {"name": "dog"}, "name: nothing is kept as 'dog'"),
]


@pytest.mark.parametrize(("tool", "arguments", "start"), LINES)
def test_errors_are_one_line_with_a_remedy(
    tool: str, arguments: dict[str, Any], start: str, assistant: Assistant
) -> None:
    assert refusal(call(assistant, tool, **arguments)).startswith(start)


def test_without_a_folder_no_file_is_touched(assistant: Assistant) -> None:
    assistant = Assistant(engine=assistant.engine)
    line = refusal(call(assistant, "edit", prompt="x", pictures=["a.png"]))
    assert line.startswith("pictures 1: no folder is allowed; start limner mcp with --folder DIR")
    assert refusal(call(assistant, "generate", prompt="x", save_as="a.png")).startswith("save_as: no folder is allowed")


def test_a_resource_that_is_not_there_is_an_error_of_the_protocol(assistant: Assistant) -> None:
    async def conversation(client: Any) -> None:
        for uri in ("limner://references/dog", "limner://else", "limner://references/dog/1.png"):
            with pytest.raises(mcp.MCPError, match=r"nothing is kept as 'dog'|is not limner://references/NAME"):
                await client.read_resource(uri)

    talk(assistant, conversation)


def test_a_fault_of_ours_tells_the_caller_little(assistant: Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assistant.pictures, "read", lambda texts, **_: 1 / 0)
    assert refusal(call(assistant, "edit", prompt="x", pictures=["a.png"])) == (
        "edit failed (ZeroDivisionError); the log of limner mcp (stderr) says more"
    )


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def test_over_stdio_as_a_process(tiny_folder: Path, tmp_path: Path, model: Pipeline) -> None:
    """As assistants start it. What a library prints to stdout stays out of the protocol."""
    picture(96, 70).save(tmp_path / "a.png")
    arguments = ["-m", "limner", "mcp", "--model", str(tiny_folder), "--folder", str(tmp_path)]
    process = mcp.StdioServerParameters(command=sys.executable, args=arguments, env=environment(), cwd=str(ROOT))

    async def main() -> Any:
        async with mcp.Client(process) as client:
            return await client.call_tool("edit", {"prompt": "red", "pictures": ["a.png"], "seed": 3, "steps": 2})

    found = pictures_of(asyncio.run(main()))[0]
    expected = drawn(model, "red", tmp_path / "a.png", seed=3, num_inference_steps=2)
    assert np.abs(found.astype(int) - expected).max() <= 1  # another number of threads


def test_over_http_on_this_machine(tiny_folder: Path) -> None:
    """With a file of 5 MB, which is more than the package takes unless told otherwise."""
    command = [sys.executable, "-m", "limner", "mcp", "--model", str(tiny_folder), "--http", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment(), cwd=ROOT) as process:
        try:
            assert process.stderr is not None
            address = re.fullmatch(r"limner: tools at (http://127\.0\.0\.1:\d+/mcp)\n", process.stderr.readline())
            assert address is not None

            async def main() -> Any:
                async with mcp.Client(address[1]) as client:
                    file = encode(picture(64, 64), "png", metadata={"long": "x" * 5_000_000})
                    data = base64.b64encode(file).decode()
                    return await client.call_tool("edit", {"prompt": "red", "pictures": [data], "steps": 1})

            assert pictures_of(asyncio.run(main()))[0].shape == (64, 64, 3)
        finally:
            process.terminate()
