"""What a report says, as data. Its JSON schema is in `docs/reference/report.schema.json`."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from danqing.errors import OutputError
from danqing.files import read_regular
from danqing.validation import explain
from danqing.verify.metrics import METRICS

if TYPE_CHECKING:
    from pathlib import Path

    from danqing.verify.metrics import Difference as Measured
    from danqing.verify.metrics import Metric

SCHEMA = 1
MAX_BYTES = 16_000_000
"""Of a report's JSON; a module's trace of a large model makes a tenth of it."""


def _escaped(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, dict):
        return {_escaped(key): _escaped(row) for key, row in value.items()}
    return [_escaped(row) for row in value] if isinstance(value, list) else value


class Part(BaseModel):
    """A part of a report."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="null")

    @model_validator(mode="before")
    @classmethod
    def _printable(cls, values: Any) -> Any:
        """Escape bytes of file names that are not UTF-8, which no file of text can hold."""
        return _escaped(values) if isinstance(values, dict) else values


class Environment(Part):
    """Where it ran.

    Attributes:
        system: operating system and its release.
        machine: the processor's architecture.
        processor: model name of the host's processor.
        device: as a user names it.
        chip: as the driver names it.
        simulated: the device is a simulation: it proves neither numerics nor speed of hardware.
        memory_bytes: of the device, in all.
        threads: that compute, on a CPU.
        software: what lies below torch: driver, toolkit.
        libraries: Python and its libraries, with versions.
    """

    system: str
    machine: str
    processor: str
    device: str
    chip: str
    simulated: bool
    memory_bytes: int | None
    threads: int | None
    software: dict[str, str]
    libraries: dict[str, str]


class Component(Part):
    """One component's weights.

    Attributes:
        name: of the component.
        stored: dtype in the file.
        dtype: what it computes in.
        why: why in that.
        bytes: of the weights in memory.
        mapped: they are used where they lie on disk.
        load_seconds: it took to read them.
    """

    name: str
    stored: str
    dtype: str
    why: str
    bytes: int
    mapped: bool
    load_seconds: float | None


class Model(Part):
    """What ran, and how it was set up."""

    name: str
    title: str
    layout: str
    path: str
    fingerprint: str
    sha256: dict[str, str]
    dtype: str
    dtype_reason: str
    attention: str
    attention_reason: str
    placement: str
    placement_reason: str
    device_reason: str
    components: list[Component]


class Parameter(Part):
    """One setting: its flag, the model's default, what it means."""

    name: str
    flag: str
    default: str
    meaning: str


class PictureFile(Part):
    """A picture beside the report."""

    file: str
    width: int
    height: int
    bytes: int
    pixels_sha256: str


def _with_metrics(schema: dict[str, Any]) -> None:
    """Add a property for each of `METRICS`; a report may lack those that were added later."""
    first, *last = schema["properties"].items()
    schema["properties"] = dict([first, *((row.name, _schema_of(row)) for row in METRICS), *last])
    later = {row.name for row in METRICS if row.added}
    schema["required"] = [name for name in schema["properties"] if name not in later]
    schema["additionalProperties"] = False


def _schema_of(row: Metric) -> dict[str, Any]:
    kind = "integer" if row.whole else "number"
    return {"type": [kind, "null"] if row.nullable else kind, "description": row.meaning}


class Difference(Part):
    """Two images: whether they are identical, and a number for each of `METRICS`.

    Attributes:
        identical: every pixel is equal.
        histogram: how many values differ by 0, 1, ... levels.
    """

    model_config = ConfigDict(extra="allow", json_schema_extra=_with_metrics)
    __pydantic_extra__: dict[str, int | float | None]

    identical: bool
    histogram: list[int]

    @classmethod
    def of(cls, measured: Measured, *, histogram: list[int]) -> Difference:
        """Return the numbers of two images as the report keeps them."""
        values = {
            name: value if math.isfinite(value) else None for name, value in measured.values.items()
        }
        return cls.model_validate(
            {"identical": measured.identical, **values, "histogram": histogram}
        )

    @model_validator(mode="after")
    def _follow_the_table(self) -> Difference:
        rows = {row.name: row for row in METRICS}
        values = self.values
        unknown = values.keys() - rows
        missing = {name for name, row in rows.items() if not row.added} - values.keys()
        if unknown or missing:
            msg = f"metrics unknown: {sorted(unknown)}, missing: {sorted(missing)}"
            raise ValueError(msg)
        for name, value in values.items():
            if value is None and not rows[name].nullable:
                msg = f"{name} must not be null"
                raise ValueError(msg)
            if rows[name].whole and not isinstance(value, int):
                msg = f"{name} must be a whole number"
                raise ValueError(msg)
        return self

    @property
    def values(self) -> dict[str, int | float | None]:
        """The metrics' numbers by name; null for one that is infinite or was not measured."""
        return self.__pydantic_extra__


class Timing(Part):
    """Seconds of one picture, medians; the first picture, which also warms up, is not counted.

    Attributes:
        repeats: pictures timed.
        load_seconds: to read all weights, once.
        encode_seconds: prompt to conditioning.
        denoise_seconds: all steps.
        decode_seconds: latents to pixels.
        total_seconds: the three together.
        steps: denoising steps.
        seconds_per_step: of denoising.
        steps_per_second: the inverse: it/s.
        step_flops: floating-point operations of a step.
        achieved_flops: of them, a second.
        peak_flops: the chip's, from its maker, in this dtype; null if it is not known.
        share_of_peak: the ratio of the last two.
        peak_bytes: the most memory in use, by stage; of a CPU, resident memory of the process.
    """

    repeats: int
    load_seconds: float
    encode_seconds: float
    denoise_seconds: float
    decode_seconds: float
    total_seconds: float
    steps: int
    seconds_per_step: float
    steps_per_second: float
    step_flops: int | None
    achieved_flops: float | None
    peak_flops: float | None
    share_of_peak: float | None
    peak_bytes: dict[str, int | None]


class Repeat(Part):
    """One more run of the same request, against the first."""

    way: str
    identical: bool
    tensors: int
    first_divergence: str | None


class Batch(Part):
    """What computing pictures together did to the first of them."""

    size: int
    identical: bool
    first_divergence: str | None
    largest: int


class Cost(Part):
    """Seconds of a picture with and without deterministic kernels."""

    seconds: float
    deterministic_seconds: float
    identical: bool


class Determinism(Part):
    """Whether the same request gives the same bits."""

    passed: bool
    repeats: list[Repeat]
    pictures: Difference
    batch: Batch | None
    cost: Cost | None


class Joint(Part):
    """One joint of the run; relative L2 errors.

    Attributes:
        name: of the joint.
        port: the candidate's own error, given the reference's input; null if it is not finite.
        precision: the noise floor.
        limit: what the port may be.
        drift: how far the free run has gone; null if it is not finite.
        passed: the port is within its limit.
    """

    name: str
    port: float | None
    precision: float
    limit: float
    drift: float | None
    passed: bool


class Parity(Part):
    """The device against a reference.

    Attributes:
        reference: device, chip, dtype and libraries of the reference.
        from_trace: the reference is a trace, of another machine perhaps.
        required: the rung asked for.
        rung: the rung reached; null if none.
        passed: whether it is enough.
        joints: in order.
        worst: the joint nearest its limit, or farthest beyond it.
        picture: the free picture against the reference's.
        precision: what the dtype alone costs the picture: the reference against float32.
        culprit: first layer beyond its limit, if a joint failed.
        inputs: what it was given.
        search: how it was found.
        reference_file: the reference's picture.
        difference_file: the difference of both, times `difference_factor`.
        difference_factor: see there.
    """

    reference: dict[str, Any]
    from_trace: bool
    required: str
    rung: str | None
    passed: bool
    factor: float
    joints: list[Joint]
    worst: str
    picture: Difference
    precision: Difference
    culprit: str | None
    inputs: dict[str, dict[str, Any]]
    search: list[str]
    reference_file: PictureFile
    difference_file: PictureFile
    difference_factor: int


class Sanity(Part):
    """Whether it looks like a picture at all."""

    looks: Literal["picture", "black", "flat", "noise"]
    passed: bool
    mean: float
    deviation: float


class Switch(Part):
    """What one switch of memory or speed does to the picture."""

    name: str
    rung: str | None
    note: str
    psnr_db: float | None
    seconds: float | None
    peak_bytes: int | None


class Case(Part):
    """One task: a request, its picture, and everything measured on it."""

    name: Literal["text to image", "edit"]
    command: str
    request: dict[str, Any]
    notes: list[str]
    picture: PictureFile
    timing: Timing
    sanity: Sanity
    determinism: Determinism
    parity: Parity | None
    switches: list[Switch]


class Report(Part):
    """All of it.

    Attributes:
        report_schema: version of this schema.
        made_at: UTC, ISO 8601.
        command: that made the report.
        passed: no verdict failed.
        harmless_warnings: text to why it means nothing.
    """

    report_schema: Literal[1] = 1
    made_at: str
    command: str
    passed: bool
    environment: Environment
    model: Model
    parameters: list[Parameter]
    cases: list[Case]
    harmless_warnings: dict[str, str]


def read_report(path: Path) -> Report:
    """Read a report's JSON.

    Raises:
        OutputError: it cannot be read, or is none, or of another schema.
    """
    data: Any = None
    try:
        data = json.loads(read_regular(path, MAX_BYTES))
        return Report.model_validate(data)
    except OSError as error:
        raise OutputError(
            "the report cannot be read", seen=f"{path}: {error.strerror or error}"
        ) from error
    except ValidationError as error:
        raise _invalid(path, explain(error, Report, noun="field"), data) from error
    except (ValueError, RecursionError) as error:
        raise _invalid(path, error, data) from error


def _invalid(path: Path, error: Exception, data: Any) -> OutputError:
    schema = str(data.get("report_schema"))[:20] if isinstance(data, dict) else None
    return OutputError(
        "invalid or damaged report",
        seen=f"{path}: schema {schema}, {str(error).splitlines()[0][:120]}",
        allowed=f"report.json of schema {SCHEMA}",
    )
