"""The tools and resources of an assistant: what they are called, and what their answers hold.

Tools draw with an engine, in whose thread all computing is done; kept references are resources. What goes wrong is one line
that names the field and the remedy, as an error of the tool. Knows no transports.
"""

from __future__ import annotations

import base64
import json
import logging
import secrets
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import mcp_types as types
from mcp.server.context import ServerRequestContext
from mcp.server.lowlevel import Server
from mcp.server.subscriptions import InMemorySubscriptionBus, ListenHandler, ResourcesListChanged
from mcp.shared.exceptions import MCPError
from PIL import Image

from limner.engine.events import EditResult, Finished, Prefilled
from limner.engine.protocol import Backend
from limner.errors import InvalidRequest, LimnerError
from limner.images import FORMATS, MEDIA_TYPES, PreparedReference, encode, numbered, picture_metadata
from limner.mcp.control import read_asked
from limner.mcp.folder import AllowedFolder
from limner.mcp.inputs import EditInputs, ForgetInputs, GenerateInputs, Inputs, KeepInputs, read_inputs
from limner.mcp.kept import Kept, KeptReferences
from limner.mcp.pictures import URI, PictureReader
from limner.mcp.work import run_request
from limner.mentions import at_card
from limner.outbound.client import OutboundClient
from limner.pipeline.adapters import AppliedLora
from limner.requests import EditRequest, PrefillRequest, warning_with_mask, with_mask
from limner.version import __version__

__all__ = ["Assistant", "create_server"]

_logger = logging.getLogger("limner")
_Request: TypeAlias = ServerRequestContext[Any, Any]
_INSTRUCTIONS = (
    "Draws and edits pictures. generate draws from text alone; edit changes or combines reference pictures, which the "
    "prompt calls image 1, image 2, ... To use the same references several times, keep_references first and name them by "
    "URI: then what is computed of them is kept, and each edit is faster."
)


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class _Tool:
    """A tool: the class of its arguments, what it does, and what assistants may know of its effects."""

    inputs: type[Inputs]
    description: str
    run: Callable[[_Request, Any], Awaitable[types.CallToolResult]]
    destructive: bool = False
    idempotent: bool = False

    def described(self, name: str, *, loras: Sequence[AppliedLora]) -> types.Tool:
        schema = self.inputs.model_json_schema()
        if "loras" in schema["properties"]:
            _name_loras(schema["properties"], loras)
        return types.Tool(
            name=name,
            description=self.description,
            input_schema=schema,
            annotations=types.ToolAnnotations(
                read_only_hint=False,
                destructive_hint=self.destructive,
                idempotent_hint=self.idempotent,
                open_world_hint=False,
            ),
        )


@dataclass(kw_only=True, eq=False)
class Assistant:
    """What the tools work with: an engine, the folder whose files may be named (None: no files), and what is kept.

    `card` is the file that says what the model understands, if there is one.
    """

    engine: Backend
    folder: AllowedFolder | None = None
    outbound: OutboundClient | None = None
    kept: KeptReferences = field(default_factory=KeptReferences)
    card: str = ""
    bus: InMemorySubscriptionBus = field(default_factory=InMemorySubscriptionBus)

    def __post_init__(self) -> None:
        self.pictures = PictureReader(
            policy=self.engine.model.reference_policy, kept=self.kept, folder=self.folder, outbound=self.outbound
        )
        self.tools = {
            "generate": _Tool(inputs=GenerateInputs, description="Draw pictures from text alone.", run=self._generate),
            "edit": _Tool(
                inputs=EditInputs,
                description="Edit, or combine, reference pictures as the prompt says: all of image 1, or what a mask "
                "marks. Or continue image 1 beyond its edges.",
                run=self._edit,
            ),
            "keep_references": _Tool(
                inputs=KeepInputs,
                description="Keep reference pictures, in order, under a name, and compute what edits need of them. The "
                "answer has their URI, which edit takes in place of the pictures.",
                run=self._keep,
                idempotent=True,
            ),
            "forget_references": _Tool(
                inputs=ForgetInputs,
                description="Forget the references that are kept under a name.",
                run=self._forget,
                destructive=True,
            ),
        }

    async def call(self, request: _Request, params: types.CallToolRequestParams) -> types.CallToolResult:
        """Run a tool. What goes wrong is in the result, as one line."""
        try:
            tool = self.tools.get(params.name)
            if tool is None:
                raise InvalidRequest("name", f"{params.name!r} is not a tool; they are: {', '.join(self.tools)}")
            return await tool.run(request, read_inputs(tool.inputs, params.arguments or {}))
        except LimnerError as error:
            text = " ".join(str(error).split())
        except Exception as error:
            _logger.exception("tool %s failed", params.name)
            text = f"{params.name} failed ({type(error).__name__}); the log of limner mcp (stderr) says more"
        return types.CallToolResult(content=[types.TextContent(text=text)], is_error=True)

    # tools

    async def _generate(self, request: _Request, inputs: GenerateInputs) -> types.CallToolResult:
        return await self._draw(request, inputs)

    async def _edit(self, request: _Request, inputs: EditInputs) -> types.CallToolResult:
        return await self._draw(request, inputs)

    async def _draw(self, request: _Request, inputs: GenerateInputs | EditInputs) -> types.CallToolResult:
        files = await self.pictures.in_thread(self._new_files, inputs)
        asked = await read_asked(self.pictures, inputs)
        first = secrets.randbelow(2**31) if inputs.seed is None else inputs.seed
        drawn = EditRequest(
            prompt=inputs.prompt,
            seeds=tuple(range(first, first + inputs.num_images)),
            references=asked.references,
            width=inputs.width,
            height=inputs.height,
            num_inference_steps=inputs.steps,
            guidance_scale=inputs.guidance,
            negative_prompt=inputs.negative_prompt,
            control=asked.control,
            canvas=asked.canvas,
        )
        try:
            drawn = await self.pictures.in_thread(self.engine.opened, drawn)
        except InvalidRequest as error:
            raise with_mask(error) from None
        event = await run_request(self.engine, drawn, report=request.session.report_progress)
        assert isinstance(event, Finished)
        return await self.pictures.in_thread(self._answer, inputs, event.result, files)

    def _new_files(self, inputs: GenerateInputs | EditInputs) -> list[str]:
        """Return the names of the files to write, none if none was asked. Raises `InvalidRequest`."""
        if inputs.save_as is None:
            if inputs.answer == "none":
                raise InvalidRequest("answer", "none would leave nothing of the picture; give save_as as well")
            return []
        if self.folder is None:
            raise InvalidRequest(
                "save_as", "no folder is allowed; start limner mcp with --folder DIR, or leave save_as out"
            )
        self.folder.check_new(inputs.save_as, field="save_as")
        named = numbered(Path(inputs.save_as), inputs.num_images)
        return [self.folder.check_new(str(path), field="save_as") for path in named]

    def _answer(
        self, inputs: GenerateInputs | EditInputs, result: EditResult, files: Sequence[str]
    ) -> types.CallToolResult:
        """Write the files, encode the pictures, and say how they were made."""
        metadata = [
            picture_metadata(
                prompt=inputs.prompt, seed=seed, model=self.engine.model.digest, more=result.metadata_of(number)
            )
            for number, seed in enumerate(result.seeds)
        ]
        if self.folder is not None:
            for file, picture, about in zip(files, result.images, metadata, strict=False):
                data = encode(picture, FORMATS[Path(file).suffix.lower()], metadata=about)
                self.folder.write_new(file, data, field="save_as")
        pictures: list[dict[str, Any]] = []
        for i, (seed, picture) in enumerate(zip(result.seeds, result.images, strict=True)):
            pictures.append({"seed": seed, "width": picture.width, "height": picture.height})
            if self.folder is not None and files:
                pictures[i]["file"] = str(self.folder.path / files[i])
        about_all = {
            "pictures": pictures,
            "prompt": asdict(result.prompt),
            "references": [report.as_json() for report in result.references],
            "reference_cache": result.reference_cache,
            "seconds_saved": round(result.seconds_saved, 4),
            "seconds": round(result.timings.total, 4),
        }
        if result.canvas:
            about_all["canvas"] = asdict(result.canvas[0])
        if loras := result.metadata.get("loras"):
            about_all["loras"] = loras
        if result.preserved:
            about_all["preserved"] = [one.as_json() for one in result.preserved]
        if result.warnings:
            about_all["warnings"] = [at_card(warning_with_mask(text), self.card) for text in result.warnings]
        shown = [] if inputs.answer == "none" else zip(result.images, metadata, strict=True)
        content = [_picture(encode(p, inputs.answer, metadata=m), inputs.answer) for p, m in shown]
        return _result(about_all, *content)

    async def _keep(self, request: _Request, inputs: KeepInputs) -> types.CallToolResult:
        pictures = await self.pictures.read(inputs.pictures)
        self.kept.check(inputs.name, pictures, replace=inputs.replace)
        event = await run_request(
            self.engine, PrefillRequest(references=pictures), report=request.session.report_progress
        )
        assert isinstance(event, Prefilled)
        self.kept.check(inputs.name, pictures, replace=inputs.replace)  # another call may have taken the name
        kept = Kept(name=inputs.name, key=event.key, pictures=pictures)
        self.kept.put(kept)
        await self._tell_change(request)
        found = {
            "nbytes": event.nbytes,
            "prefill_seconds": round(event.prefill_seconds, 4),
            "reference_cache": event.source,
        }
        return _result({**_about(kept), **found})

    async def _forget(self, request: _Request, inputs: ForgetInputs) -> types.CallToolResult:
        kept = self.kept.remove(inputs.name)
        await self._tell_change(request)
        return _result({"name": kept.name, "forgotten": True})

    async def _tell_change(self, request: _Request) -> None:
        await self.bus.publish(ResourcesListChanged())
        await request.session.send_resource_list_changed()

    # resources

    async def list_resources(self, request: _Request, params: object) -> types.ListResourcesResult:
        return types.ListResourcesResult(
            resources=[
                types.Resource(
                    uri=_uri(kept.name),
                    name=kept.name,
                    description="; ".join(picture.report.describe() for picture in kept.pictures),
                    mime_type="application/json",
                )
                for kept in self.kept
            ]
        )

    async def list_templates(self, request: _Request, params: object) -> types.ListResourceTemplatesResult:
        return types.ListResourceTemplatesResult(
            resource_templates=[
                types.ResourceTemplate(
                    uri_template="limner://references/{name}",
                    name="references",
                    description="References that are kept: sizes, and what was done to each picture.",
                    mime_type="application/json",
                ),
                types.ResourceTemplate(
                    uri_template="limner://references/{name}/{number}.png",
                    name="reference",
                    description="A kept picture as the model reads it.",
                    mime_type="image/png",
                ),
            ]
        )

    async def read_resource(
        self, request: _Request, params: types.ReadResourceRequestParams
    ) -> types.ReadResourceResult:
        """Raises `MCPError` where there is no such resource."""
        uri = str(params.uri)
        try:
            match = URI.fullmatch(uri)
            if match is None:
                raise InvalidRequest(
                    "uri", f"{uri!r} is not limner://references/NAME or limner://references/NAME/1.png"
                )
            if match[2] is None:
                text = json.dumps(_about(self.kept.get(match[1], field="uri")))
                return types.ReadResourceResult(
                    contents=[types.TextResourceContents(uri=uri, text=text, mime_type="application/json")]
                )
            (picture,) = await self.pictures.read([uri], field="uri")
        except InvalidRequest as error:
            raise MCPError(types.INVALID_PARAMS, str(error), {"uri": uri}) from None
        data = await self.pictures.in_thread(_png, picture)
        return types.ReadResourceResult(
            contents=[types.BlobResourceContents(uri=uri, blob=_base64(data), mime_type="image/png")]
        )


def create_server(assistant: Assistant) -> Server[Any]:
    """Return the server of the protocol, for any transport."""

    async def list_tools(request: _Request, params: object) -> types.ListToolsResult:
        loras = assistant.engine.model.loras
        return types.ListToolsResult(
            tools=[tool.described(name, loras=loras) for name, tool in assistant.tools.items()]
        )

    return Server(
        "limner",
        version=__version__,
        instructions=_INSTRUCTIONS,
        on_list_tools=list_tools,
        on_call_tool=assistant.call,
        on_list_resources=assistant.list_resources,
        on_list_resource_templates=assistant.list_templates,
        on_read_resource=assistant.read_resource,
        on_subscriptions_listen=ListenHandler(assistant.bus),
    )


def _name_loras(properties: dict[str, Any], loras: Sequence[AppliedLora]) -> None:
    """Say in a schema which LoRAs there are; where there are none, leave them out."""
    if not loras:
        del properties["loras"]
        return
    properties["loras"] = {
        "type": "object",
        "description": properties["loras"]["description"],
        "properties": {
            one.name: {"type": "number", "description": f"{one.strength} where loras is left out."} for one in loras
        },
        "additionalProperties": False,
    }


def _result(about: dict[str, Any], *more: types.ImageContent) -> types.CallToolResult:
    """An answer: what is known as JSON, for programs and for assistants, and pictures."""
    text = types.TextContent(text=json.dumps(about))
    return types.CallToolResult(content=[text, *more], structured_content=json.loads(text.text))


def _picture(data: bytes, name: str) -> types.ImageContent:
    return types.ImageContent(data=_base64(data), mime_type=MEDIA_TYPES[name])


def _about(kept: Kept) -> dict[str, Any]:
    return {
        "uri": _uri(kept.name),
        "name": kept.name,
        "key": kept.key,
        "references": [
            {**p.report.as_json(), "uri": f"{_uri(kept.name)}/{i}.png"} for i, p in enumerate(kept.pictures, 1)
        ],
    }


def _uri(name: str) -> str:
    return f"limner://references/{name}"


def _png(picture: PreparedReference) -> bytes:
    return encode(Image.frombytes("RGB", picture.report.processed_size, picture.data), "png")


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
