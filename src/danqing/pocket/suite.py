"""The pocket suite: ten pictures that tell whether a device paints the right picture.

Each case has a prompt, a seed, what a program must find in the picture (`danqing.pocket.judge`),
and a reference picture in this package, painted on a CPU in float32. How far a picture may be from
its reference follows from the noise floor: what the same dtype cost on the CPU when the references
were made (`references/floor.json`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from danqing.pocket.judge import Wanted, judge, view
from danqing.verify.metrics import compare

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from PIL.Image import Image

    from danqing.generation import Picture
    from danqing.runner import Runner
    from danqing.verify.metrics import Difference

REFERENCES = Path(__file__).parent / "references"
FLOOR_FILE = REFERENCES / "floor.json"
MARGIN_DB = 3.0
"""Twice the squared error of the noise floor is still the same picture."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One picture of the suite.

    Attributes:
        name: of the case and its reference file.
        prompt: what is asked.
        shows: what must be found: a geometric scene, or some attributes of a landscape.
        seed: of the noise.
    """

    name: str
    prompt: str
    shows: Wanted | Mapping[str, object]
    seed: int = 1


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a case.

    Attributes:
        case: which.
        picture: as painted.
        difference: from the reference.
        shown: whether the picture shows what the prompt says.
        least_psnr: the limit, in dB.
    """

    case: Case
    picture: Picture
    difference: Difference
    shown: bool
    least_psnr: float

    @property
    def passed(self) -> bool:
        """Whether it shows what it should and is close enough to the reference."""
        return self.shown and self.difference.psnr >= self.least_psnr

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON types."""
        psnr = self.difference.psnr
        return {
            "name": self.case.name,
            "prompt": self.case.prompt,
            "seed": self.case.seed,
            "passed": self.passed,
            "shown": self.shown,
            "psnr_db": None if psnr == float("inf") else round(psnr, 3),
            "least_psnr_db": round(self.least_psnr, 3),
            "ssim": round(self.difference["ssim"], 6),
            "mse": round(self.difference["mse"], 6),
            "mean_difference": round(self.difference["mean"], 6),
            "largest_difference": self.difference.largest,
            "identical": self.difference.identical,
        }


def _wanted(ground: str, word: str, *things: str) -> Wanted:
    pairs = (thing.split() for thing in things)
    return Wanted(
        things=tuple((shape, colour) for colour, shape in pairs), word=word, ground=ground
    )


# English only: CLIP's tokenizer divides Chinese in another way in transformers 4 than in 5
CASES = (
    Case(
        name="circle-above-square",
        prompt="a red circle above a blue square on a white ground",
        shows=_wanted("white", "above", "red circle", "blue square"),
    ),
    Case(
        name="three-triangles",
        prompt="three green triangles on a cream ground",
        shows=_wanted("cream", "", *["green triangle"] * 3),
    ),
    Case(
        name="four-rings",
        prompt="four blue rings on white paper",
        shows=_wanted("white", "", *["blue ring"] * 4),
    ),
    Case(
        name="cross-upper-right",
        prompt="an orange cross in the upper right corner on a grey ground",
        shows=_wanted("grey", "upper right", "orange cross"),
    ),
    Case(
        name="red-sun",
        prompt="three blue mountains under a red sun, a boat on the water",
        shows={"time": "day", "body_colour": "red", "mountains": 3, "boats": 1},
        seed=2,
    ),
    Case(
        name="night",
        prompt="two green mountains at night under a white moon, a lake",
        shows={"time": "night", "body_colour": "white", "mountains": 2, "boats": 0},
    ),
    Case(
        name="winter",
        prompt="four grey mountains in winter under a golden sun",
        shows={"time": "day", "body_colour": "golden", "mountains": 4},
    ),
    Case(
        name="dusk",
        prompt="a red mountain at dusk, two boats on the lake, a flock of birds",
        shows={"time": "dusk", "mountains": 1, "boats": 2},
    ),
    Case(
        name="pine",
        prompt="two purple mountains and an orange sun, a pine on the left, a pavilion",
        shows={"time": "day", "body_colour": "orange", "mountains": 2},
    ),
    Case(
        name="star-left-of-ring",
        prompt="a yellow star to the left of a purple ring on a black ground",
        shows=_wanted("black", "left of", "yellow star", "purple ring"),
    ),
)


def paint(runner: Runner, cases: Iterable[Case] = CASES) -> Iterator[Outcome]:
    """Paint the cases with a runner that has the pocket model, and compare each."""
    for case in cases:
        picture = runner.generate(case.prompt, seed=case.seed).pictures[0]
        yield Outcome(
            case=case,
            picture=picture,
            difference=compare(picture.image, reference(case)),
            shown=is_shown(picture.image, case.shows),
            least_psnr=least_psnr(picture.provenance.dtype),
        )


def is_shown(image: Image, shows: Wanted | Mapping[str, object]) -> bool:
    """Say whether a picture shows what it should."""
    if isinstance(shows, Mapping):
        seen = view(image)
        return all(getattr(seen, name) == value for name, value in shows.items())
    verdict = judge(image, shows)
    return verdict.colour and verdict.shape and verdict.relation is not False


def reference(case: Case) -> Image:
    """Return the reference picture of a case."""
    from PIL import Image as Images

    with Images.open(REFERENCES / f"{case.name}.png", formats=["PNG"]) as image:
        found: Image = image.convert("RGB")
    return found


def least_psnr(dtype: str) -> float:
    """Return the limit for a dtype: the noise floor on the CPU, less a margin, in dB."""
    floor = json.loads(FLOOR_FILE.read_text("utf-8"))
    return float(floor["least_psnr_db"][dtype]) - MARGIN_DB
