"""The page for people: gradio on the same application, its jobs in the same queue."""

from __future__ import annotations

import asyncio
import contextlib
import html
import io
import logging
import secrets
import tempfile
import time
from dataclasses import dataclass
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import gradio as gr
from fastapi.exceptions import RequestValidationError
from gradio.utils import get_upload_folder
from PIL import Image
from starlette.responses import RedirectResponse, Response

from danqing.errors import DanqingError
from danqing.quantities import size as in_words
from danqing.request import MAX_IMAGES, Request
from danqing.serve.app import on_bug
from danqing.serve.bodies import MAX_PREVIEWS
from danqing.serve.guards import PAGE_PATH, bug_message
from danqing.serve.jobs import Ended, Finished, Moved, Order, Stepped
from danqing.serve.limits import plan_order
from danqing.serve.page_components import CSS, ICON, KEYS, Components, theme
from danqing.serve.page_door import Door, on_invalid
from danqing.serve.page_words import LANGUAGES, word
from danqing.serve.privacy import public_message
from danqing.serve.sent_images import read_images
from danqing.serve.uploads import KEPT_SECONDS, Uploads
from danqing.verify.metrics import compare

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from danqing.references import Reference
    from danqing.serve.intake import Intake
    from danqing.serve.jobs import Job
    from danqing.serve.service import Service

log = logging.getLogger("danqing.serve")
_P = ParamSpec("_P")
_T = TypeVar("_T")
_SECONDS_BETWEEN_LOOKS = 5
_SECONDS_BETWEEN_SWEEPS = 60.0


@dataclass(frozen=True)
class _Shown:
    """A picture in the gallery, as a file that carries its record."""

    path: str
    record: dict[str, Any]

    @property
    def caption(self) -> str:
        """Its seed, and how the prompt begins."""
        asked = self.record["request"]
        return f"{asked['seed']} · {asked['prompt'][:40]}"


def mount(app: Any, service: Service) -> Any:
    """Put the page on an application; the root leads there."""
    intake: Intake = app.state.intake
    page = _Page(service, intake)
    blocks = page.blocks()

    async def home() -> RedirectResponse:
        return RedirectResponse(f"{PAGE_PATH}/")

    async def icon() -> Response:
        return Response(ICON, media_type="image/svg+xml")

    app.get("/", include_in_schema=False)(home)
    app.get("/favicon.ico", include_in_schema=False)(icon)
    gr.mount_gradio_app(
        app, blocks, path=PAGE_PATH, allowed_paths=[str(page.folder)], footer_links=[],
        max_file_size="40mb", ssr_mode=False, theme=theme(), css=CSS, head=KEYS,
        show_error=True, run_history=False, pwa=False,
    )  # fmt: skip
    mounted = app.router.routes[-1]
    mounted.app.add_exception_handler(RequestValidationError, on_invalid)
    mounted.app.add_exception_handler(Exception, on_bug)
    mounted.app = Door(mounted.app, len(blocks.fns), intake, page.uploads)
    return app


class _Page:
    """Makes the page, and answers what is done on it."""

    def __init__(self, service: Service, intake: Intake) -> None:
        self._service = service
        self._intake = intake
        self.uploads = Uploads(Path(get_upload_folder()))
        self._swept = 0.0
        self._home = tempfile.TemporaryDirectory(prefix="danqing-page-")  # gone at exit
        self.folder = Path(self._home.name)
        self._jobs: dict[tuple[str, str], Job] = {}
        self._components = Components(service.specs, service.limits, self.uploads)

    # --- what there is -------------------------------------------------------------------------

    def blocks(self) -> gr.Blocks:
        """Return the page."""
        with gr.Blocks(
            title="danqing", analytics_enabled=False, delete_cache=(600, int(KEPT_SECONDS))
        ) as found:
            language, shown, chosen = gr.State("en"), gr.State([]), gr.State(None)
            sides = gr.State([None, None])
            with gr.Row(elem_id="top"):
                gr.Markdown("# danqing · 丹青", elem_id="title")
                switch = gr.Radio(
                    [(text, name) for name, text in LANGUAGES.items()], value="en",
                    show_label=False, container=False, elem_id="language",
                )  # fmt: skip
                corner = gr.HTML(elem_id="corner")
            with gr.Row():
                with gr.Column(scale=2, min_width=300):
                    fields = self._components.form()
                    with gr.Row():
                        paint = self._components.button("paint", variant="primary")
                        cancel = self._components.button("cancel", variant="stop")
                with gr.Column(scale=3, min_width=300):
                    seen = self._components.results()
            gallery = seen["pictures"]
            outputs = [seen["state"], seen["preview"], gallery, shown, fields["seed"], paint]
            inputs = {language, shown, *fields.values()} - {fields["dice"]}  # a dict comes of it

            async def on_paint(
                given: dict[Any, Any], request: gr.Request
            ) -> AsyncIterator[list[Any]]:
                asked = {name: given[field] for name, field in fields.items() if field in given}
                with _hidden_causes():
                    async for update in self._paint(given[language], given[shown], asked, request):
                        yield update

            # gradio looks for this class there, and could not resolve the others' names
            on_paint.__annotations__ = {"request": gr.Request}
            quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
            gr.on(
                [paint.click, fields["prompt"].submit], on_paint, inputs, outputs,
                concurrency_limit=None, trigger_mode="once", **quiet,
            )  # fmt: skip
            cancel.click(_careful(self._cancel), None, None, queue=False, **quiet)
            fields["dice"].click(lambda: secrets.randbits(32), None, fields["seed"], **quiet)
            gallery.select(_careful(self._choose), [shown], [chosen, seen["record"]], **quiet)
            seen["again"].click(
                _careful(self._again), [language, shown, chosen], list(fields.values()), **quiet
            )
            for number, side in enumerate(("left", "right")):
                seen[side].click(
                    _careful(partial(self._compare, number)),
                    [language, shown, chosen, sides],
                    [sides, seen["compared"], seen["measures"]], **quiet,
                )  # fmt: skip
            switch.change(
                _careful(self._components.translate),
                switch,
                [language, *self._components.named.values()],
                **quiet,
            )
            timer = gr.Timer(_SECONDS_BETWEEN_LOOKS)
            timer.tick(_careful(self._corner), language, corner, **quiet)
            found.load(_careful(self._greet), None, [switch, corner], **quiet)
            found.unload(self._leave)
        found.queue(default_concurrency_limit=None, api_open=False, max_size=1000)
        return found

    # --- painting ------------------------------------------------------------------------------

    async def _paint(
        self, language: str, shown: list[_Shown], asked: dict[str, Any], request: gr.Request
    ) -> AsyncIterator[list[Any]]:
        name = client, _ = _name(request)
        try:
            images = await self._read_images(asked, client)
            job = await asyncio.to_thread(self._submit, asked, images, client)
        except DanqingError as error:
            yield [_failed(language, error, ""), *[gr.skip()] * 5]
            return
        self._jobs[name] = job
        start = time.monotonic()
        try:
            yield [_line(word(language, "begun")), *[gr.skip()] * 5]
            async for event in job.follow():
                update = self._show(language, job, event, shown)
                if update is not None:
                    yield update
        finally:
            if self._jobs.get(name) is job:
                del self._jobs[name]
            self._service.leave(job)
        if job.error is not None:
            text = _failed(language, job.error, job.id)
            if job.state == "cancelled":
                text = _line(word(language, "cancelled"))
        else:
            took = time.monotonic() - start
            text = _line(word(language, "done", count=len(job.pictures), seconds=took))
        seed = gr.skip() if asked["lock"] else secrets.randbits(32)
        yield [text, gr.update(visible=False), gr.skip(), shown, seed, gr.skip()]

    async def _read_images(self, asked: dict[str, Any], client: str) -> list[Reference]:
        """Return the images to edit, if the model edits."""
        _, runner = self._service.runner(asked["model"])
        if not asked["images"] or "image" not in runner.spec.takes:
            return []
        files = [self.uploads.read(path, client) for path, _ in asked["images"][: MAX_IMAGES + 1]]
        images = await self._intake.run(read_images, files)
        self._intake.hold(client, images)
        return images

    def _submit(self, asked: dict[str, Any], images: list[Reference], client: str) -> Job:
        """Turn the fields into an order, as far as they have an effect in the model."""
        name, runner = self._service.runner(asked["model"])
        takes = runner.spec.takes
        settings: dict[str, Any] = {
            "height": int(asked["height"]),
            "width": int(asked["width"]),
            "num_inference_steps": int(asked["steps"]),
            "num_images_per_prompt": int(asked["count"]),
            "seed": int(asked["seed"] or 0),
        }
        if "guidance_scale" in takes:
            settings["guidance_scale"] = float(asked["guidance"])
        if asked["negative"] and "negative_prompt" in takes:
            settings["negative_prompt"] = asked["negative"]
        if images:
            settings["image"] = images
        order = Order(
            model=name,
            request=Request(prompt=asked["prompt"] or "", **settings),
            previews=MAX_PREVIEWS + 5,
            edits="image" in settings,
        )
        order = plan_order(runner, order, self._service.limits)
        return self._service.submit(order, client)

    def _show(self, language: str, job: Job, event: Any, shown: list[_Shown]) -> list[Any] | None:
        """Return what an event changes: state, preview, gallery, what is shown, seed, button."""
        skip = gr.skip()
        if isinstance(event, Moved):
            text = _line(word(language, "waiting", count=event.position))
            return [text, skip, skip, skip, skip, skip]
        if isinstance(event, Stepped):
            seen = event.progress.preview
            preview = skip if seen is None else gr.update(value=seen, visible=True)
            return [_progress(language, job, event), preview, skip, skip, skip, skip]
        if isinstance(event, Finished):
            self._sweep()
            path = self.folder / f"{job.id[4:]}-{event.index}.png"
            path.write_bytes(event.picture.data)
            shown.insert(0, _Shown(str(path), dict(event.picture.record)))
            return [skip, skip, [(one.path, one.caption) for one in shown], shown, skip, skip]
        assert isinstance(event, Ended)  # noqa: S101
        return None

    def _sweep(self) -> None:
        """Drop files that are old."""
        if time.monotonic() - self._swept < _SECONDS_BETWEEN_SWEEPS:
            return
        self._swept = time.monotonic()
        self.uploads.sweep()
        for path in self.folder.iterdir():
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > KEPT_SECONDS:
                    path.unlink()

    def _cancel(self, request: gr.Request) -> None:
        job = self._jobs.get(_name(request))
        if job is not None:
            self._service.cancel(job)

    def _leave(self, request: gr.Request) -> None:
        """The page was closed."""
        self._cancel(request)

    # --- looking -------------------------------------------------------------------------------

    @staticmethod
    def _choose(shown: list[_Shown], event: gr.SelectData) -> tuple[int, dict[str, Any]]:
        number = int(event.index)
        return number, shown[number].record

    def _again(self, language: str, shown: list[_Shown], chosen: int | None) -> list[Any]:
        """Put a picture's settings into the fields."""
        if chosen is None or chosen >= len(shown):
            gr.Info(word(language, "choose"))
            return [gr.skip()] * 12
        asked = shown[chosen].record["request"]
        found = {
            "prompt": asked["prompt"],
            "negative": asked["negative_prompt"] or "",
            "images": gr.skip(),
            "model": gr.skip(),
            "width": asked["width"],
            "height": asked["height"],
            "steps": asked["num_inference_steps"],
            "count": 1,
            "guidance": gr.skip() if asked["guidance_scale"] is None else asked["guidance_scale"],
            "seed": asked["seed"],
            "lock": True,
            "dice": gr.skip(),
        }
        return list(found.values())

    @staticmethod
    def _compare(
        number: int, language: str, shown: list[_Shown], chosen: int | None, sides: list[Any]
    ) -> tuple[list[Any], Any, Any]:
        """Put the chosen picture on one side; with both there, measure."""
        if chosen is None or chosen >= len(shown):
            gr.Info(word(language, "choose"))
            return sides, gr.skip(), gr.skip()
        sides[number] = shown[chosen].path
        if None in sides:
            return sides, gr.skip(), gr.skip()
        both = [Image.open(io.BytesIO(Path(path).read_bytes())).convert("RGB") for path in sides]
        if both[0].size != both[1].size:
            text = word(language, "sizes_differ")
        else:
            found = compare(both[0], both[1])
            text = (
                word(language, "same")
                if not found.largest
                else word(
                    language,
                    "measures",
                    psnr=found.psnr,
                    ssim=found["ssim"],
                    largest=found.largest,
                )
            )
        return sides, gr.update(value=tuple(sides), visible=True), text

    # --- words ---------------------------------------------------------------------------------

    def _greet(self, request: gr.Request) -> tuple[str, str]:
        """Choose the language that the browser asks for first."""
        asked = request.headers.get("accept-language", "").strip().lower()
        language = "zh" if asked.startswith("zh") else "en"
        return language, self._corner(language)

    def _corner(self, language: str) -> str:
        """Name devices and memory."""
        self._sweep()  # also where nobody paints
        lines = []
        for runner in filter(None, (worker.first for worker in self._service.workers)):
            memory = runner.memory
            line = f"{runner.plan.device} · {runner.plan.chip} · {runner.plan.dtype}"
            if "free" in memory:
                line += " · " + word(
                    language, "free", free=in_words(memory["free"]), total=in_words(memory["total"])
                )
            lines.append(html.escape(line))
        return "<br>".join(lines)


def _line(text: str) -> str:
    return f"<p>{html.escape(text)}</p>"


@contextlib.contextmanager
def _hidden_causes() -> Iterator[None]:
    """Write an unknown failure to the log, and let people read that alone: it may name files."""
    try:
        yield
    except (gr.Error, GeneratorExit, asyncio.CancelledError):
        raise
    except Exception as error:
        about = f"page_{secrets.token_hex(8)}"
        log.exception("the page failed", extra={"row": {"request": about}})
        raise gr.Error(bug_message(about), print_exception=False) from error


def _careful(work: Callable[_P, _T]) -> Callable[_P, _T]:
    """Return what the page calls, its unknown failures hidden."""

    @wraps(work)
    def careful(*given: _P.args, **named: _P.kwargs) -> _T:
        with _hidden_causes():
            return work(*given, **named)

    return careful


def _name(request: gr.Request) -> tuple[str, str]:
    """Return whose a request is, and of which session; the browser chooses the latter alone."""
    assert request.request is not None  # noqa: S101
    return str(request.request.scope["state"]["client"]), str(request.session_hash)


def _failed(language: str, error: DanqingError, about: str) -> str:
    text = word(language, "failed", what=public_message(error, about))
    return f'<pre role="alert" style="white-space: pre-wrap">{html.escape(text)}</pre>'


def _progress(language: str, job: Job, event: Stepped) -> str:
    now = event.progress
    if now.unit == "bytes":
        text = word(language, "loading", item=now.item)
    elif now.unit == "requests":  # of other threads that use the device
        text = word(language, "waiting", count=now.total - now.done)
    else:
        count = job.order.request.num_images_per_prompt
        text = word(
            language, "step", picture=event.index + 1, count=count, done=now.done, total=now.total
        )
    return f'{_line(text)}<progress value="{now.done}" max="{now.total}"></progress>'
