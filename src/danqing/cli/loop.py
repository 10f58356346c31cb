"""`danqing generate --loop`: prompts from the terminal, with the model kept loaded."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from danqing.cli.options import flags, setting_names, setting_type
from danqing.cli.painting import Target, check_target_of, describe
from danqing.errors import DanqingError, RequestError
from danqing.pictures import fill_template
from danqing.request import Request

if TYPE_CHECKING:
    from collections.abc import Mapping

    from danqing.cli.jobs.generate import Painting
    from danqing.cli.painting import Painter

HELP = """type a prompt, or one of
  /seed 7           set a setting: /{names}
  /size 768x512     width and height
  /seed -           back to the default (a random seed)
  /output NAME      where pictures go: {{seed}}, {{index}}, {{model}}
  /show             the settings now
  /quit             leave (so does Ctrl-D)
an empty line paints the last prompt again"""


def converse(painter: Painter, job: Painting, settings: Mapping[str, Any]) -> None:
    """Read lines until /quit or the end; an error ends a picture, not the loop."""
    talk = _Talk(painter, job, dict(settings))
    terminal = sys.stdin.isatty()
    if terminal:
        print("a prompt, or /help", file=sys.stderr)
    while not talk.over:
        try:
            line = input("danqing> ") if terminal else next(sys.stdin).rstrip("\n")
        except (EOFError, StopIteration):
            return
        talk.guard(talk.answer, line)


class _Talk:
    def __init__(self, painter: Painter, job: Painting, settings: dict[str, Any]) -> None:
        self.over = False
        self._painter = painter
        self._runner = painter.runner
        self._settings = settings
        self._output = job.output
        self._batch = job.batch
        self._prompt = job.texts[-1] if job.texts else ""
        self._names = {
            flag.removeprefix("--"): name for name in setting_names() for flag in flags(name)
        }

    def guard(self, act: Any, text: str) -> None:
        """Do something; show its error and go on. Ctrl-C ends the picture under way."""
        try:
            act(text)
        except DanqingError as error:
            print(f"danqing: error: {error}", file=sys.stderr)
        except KeyboardInterrupt:
            print("danqing: interrupted; /quit leaves", file=sys.stderr)

    def answer(self, line: str) -> None:
        """Obey a command, or paint a prompt."""
        text = line.strip()
        if text.startswith("/"):
            word, _, value = text[1:].partition(" ")
            self._command(word.lower().replace("_", "-"), value.strip())
        elif text or self._prompt:
            self.paint(text or self._prompt)

    def paint(self, prompt: str) -> None:
        """Paint with the settings of now."""
        request = Request(prompt=prompt, **self._settings)
        target = Target(request=request, output=self._output, batch=self._batch)
        check_target_of(self._runner.spec, target)
        self._prompt = prompt
        for _ in self._painter.paint(target):
            pass

    def _command(self, word: str, value: str) -> None:
        if word in ("quit", "q", "exit"):
            self.over = True
        elif word in ("help", "h", "?"):
            print(HELP.format(names=", /".join(self._names)), file=sys.stderr)
        elif word == "show":
            self._show()
        elif word == "output" and value:
            fill_template(value, seed=0, index=0, model="")
            self._output = value
        elif word == "size":
            width, _, height = value.lower().partition("x")
            self._set({"width": self._read("width", width), "height": self._read("height", height)})
        elif word in self._names:
            name = self._names[word]
            self._set({name: None if value == "-" else self._read(name, value)})
        else:
            raise RequestError(
                "unknown command",
                seen=f"/{word}",
                allowed=", ".join(f"/{name}" for name in [*self._names, "size", "output", "show"]),
                hint="/help; a prompt that begins with / is typed with another letter before it",
            )

    def _read(self, name: str, text: str) -> Any:
        try:
            return setting_type(name)(text)
        except ValueError:
            raise RequestError(f"{name} cannot be read", seen=text or "nothing") from None

    def _set(self, changes: Mapping[str, Any]) -> None:
        """Take over changed settings if a request with them could be."""
        settings = {**self._settings, **changes}
        settings = {name: value for name, value in settings.items() if value is not None}
        self._runner.spec.resolve(Request(prompt="a prompt", **settings))
        self._settings = settings
        self._show()

    def _show(self) -> None:
        resolved = self._runner.spec.resolve(Request(prompt="a prompt", **self._settings))
        print(f"{describe(resolved.forecast)}, to {self._output}", file=sys.stderr)
