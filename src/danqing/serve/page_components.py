"""What the page shows: its fields, results and buttons, labelled in two languages."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Any

import gradio as gr

from danqing.request import MAX_SEED
from danqing.serve.bodies import MAX_PICTURES
from danqing.serve.page_words import word

if TYPE_CHECKING:
    from collections.abc import Mapping

    from danqing.runner import Spec
    from danqing.serve.limits import Limits
    from danqing.serve.uploads import Uploads

_DEFAULT_SIDE = 512
CSS = """
#title h1 { letter-spacing: .06em; margin: 0 }
#corner { text-align: right; font-size: .85em; opacity: .75 }
#state progress { width: 100%; height: .8em }
footer { display: none !important }
@media (max-width: 640px) {
  #top { flex-wrap: wrap }
  #top > * { flex: 1 1 100%; min-width: 100% !important }
  #corner { text-align: left }
  .gradio-container { padding: 8px !important }
}
"""
ICON = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32"><circle cx="22" cy="10" r="6" '
    'fill="#c0392b"/><path d="M2 28 L12 10 L22 28 Z" fill="#2c5f8a"/></svg>'
)
KEYS = """
<script>
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") document.querySelector("#cancel")?.click();
});
</script>
"""


def _files_alone(component: Any, uploads: Uploads) -> Any:
    """Let a component take uploaded files alone: gradio would fetch addresses, and copy files."""

    async def careful(place: Any) -> Any:
        if place not in uploads:
            message = "addresses, and files that are not in the upload folder, are not opened"
            raise gr.Error(message, print_exception=False)
        return str(place)

    component.async_move_resource_to_block_cache = careful
    return component


class Components:
    """The components of the page, whose labels change with the language.

    Attributes:
        named: components by the name of their label in `page_words`.
    """

    def __init__(self, specs: Mapping[str, Spec], limits: Limits, uploads: Uploads) -> None:
        """Keep what the fields depend on.

        Args:
            specs: of the models here, by name.
            limits: of the server.
            uploads: files that a client may name.
        """
        self._specs = specs
        self._limits = limits
        self._uploads = uploads
        self.named: dict[str, Any] = {}

    def results(self) -> dict[str, Any]:
        """Return what is seen of the work, and what can be done with it."""
        found: dict[str, Any] = {"state": gr.HTML(elem_id="state")}
        found["preview"] = gr.Image(
            interactive=False, height=320, visible=False, buttons=[], format="png",
            elem_id="preview",
        )  # fmt: skip
        found["pictures"] = gr.Gallery(
            columns=4, interactive=False, object_fit="contain", format="png", fit_columns=False,
            show_label=False, elem_id="gallery", buttons=["download", "fullscreen"],
        )  # fmt: skip
        with gr.Row():
            for name in ("again", "left", "right"):
                found[name] = self.button(name)
        found["compared"] = gr.ImageSlider(
            interactive=False, visible=False, buttons=[], elem_id="compared"
        )
        found["measures"] = gr.Markdown(elem_id="measures")
        found["record"] = gr.JSON(open=False, max_height=320, elem_id="record")
        for name in ("preview", "pictures", "compared", "record"):
            self._keep(name, found[name])
        return found

    def _keep(self, name: str, component: Any) -> Any:
        """Remember a component whose label is a word, and write it."""
        component.label = word("en", name)
        self.named[name] = component
        return component

    def button(self, name: str, **options: Any) -> Any:
        """Return a button that is labelled by its name."""
        button = gr.Button(word("en", name), elem_id=name, **options)
        self.named[name] = button
        return button

    def form(self) -> dict[str, Any]:
        """Return the fields: those that have an effect in a model here."""
        specs = list(self._specs.values())
        most, first = self._limits.side, specs[0]

        def useful(name: str) -> bool:
            return any(name in spec.takes for spec in specs)

        fields = {
            "prompt": gr.Textbox(
                lines=1, max_lines=8, submit_btn=False, autofocus=True, elem_id="prompt",
                placeholder=word("en", "prompt_hint"),
            ),
            "negative": gr.Textbox(visible=useful("negative_prompt"), elem_id="negative"),
            "images": _files_alone(gr.Gallery(
                type="filepath", interactive=True, visible=useful("image"), columns=3,
                file_types=["image"], sources=["upload", "clipboard"], elem_id="images",
            ), self._uploads),
            "model": gr.Dropdown(
                list(self._specs), value=next(iter(self._specs)),
                visible=len(specs) > 1,
            ),
        }  # fmt: skip
        step = max(spec.size_multiple for spec in specs)
        with gr.Row():
            for name in ("width", "height"):
                value = int(first.defaults.get(name, _DEFAULT_SIDE))
                fields[name] = gr.Slider(step, most, value=min(value, most), step=step)
        with gr.Row():
            steps = int(first.defaults.get("num_inference_steps", 4))
            fields["steps"] = gr.Slider(1, self._limits.steps, value=steps, step=1)
            fields["count"] = gr.Slider(
                1, min(MAX_PICTURES, self._limits.pictures), value=1, step=1
            )
        fields["guidance"] = gr.Slider(
            0, 20, value=float(first.defaults.get("guidance_scale", 0.0)), step=0.1,
            visible=useful("guidance_scale"),
        )  # fmt: skip
        with gr.Row():
            fields["seed"] = gr.Number(
                value=secrets.randbits(32), precision=0, minimum=0, maximum=MAX_SEED,
                elem_id="seed",
            )  # fmt: skip
            fields["lock"] = gr.Checkbox(value=False, elem_id="lock")
        for name, field in fields.items():
            self._keep(name, field)
        fields["dice"] = self.button("dice", size="sm")
        return fields

    def translate(self, language: str) -> list[Any]:
        """Return the language and the labels of all components in it."""
        updates: list[Any] = [language]
        for name, component in self.named.items():
            text = word(language, name)
            if isinstance(component, gr.Button):
                updates.append(gr.update(value=text))
            elif name == "prompt":
                hint = word(language, "prompt_hint")
                updates.append(gr.update(label=text, placeholder=hint))
            else:
                updates.append(gr.update(label=text))
        return updates


def theme() -> Any:
    """Return a theme of fonts that are on the visitor's machine: none is fetched."""
    words = ["system-ui", "-apple-system", "Segoe UI", "Noto Sans CJK SC", "sans-serif"]
    return gr.themes.Base(
        primary_hue="red", neutral_hue="stone", font=words, font_mono=["ui-monospace", "monospace"]
    )
