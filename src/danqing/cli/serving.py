"""`danqing serve`: from flags to a server."""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from danqing.cli.opening import open_engine, open_weights
from danqing.cli.progress import describe
from danqing.errors import InstallationError, RequestError
from danqing.files import expand
from danqing.models import identify
from danqing.request import Request
from danqing.weights import POCKET

if TYPE_CHECKING:
    from collections.abc import Callable

    from danqing.cli.jobs.serve import Serving
    from danqing.engine import Engine
    from danqing.generation import Progress
    from danqing.models.base import ModelSpec

_NEEDED = ("fastapi", "uvicorn", "multipart", "prometheus_client")


def run(job: Serving) -> None:
    """Serve until a signal ends it."""
    _check_installed()
    from danqing.serve import logs
    from danqing.serve.guards import Rules, is_loopback, read_keys
    from danqing.serve.journal import Journal
    from danqing.serve.limits import Limits
    from danqing.serve.privacy import hide
    from danqing.serve.server import Address, Server
    from danqing.serve.service import Service
    from danqing.serve.worker import Worker

    local = is_loopback(job.host)
    if not local and job.api_key_file is None and not job.no_auth:
        raise RequestError(
            "others can reach this address, and no API key is asked for",
            seen=job.host,
            allowed="--api-key-file FILE, or --no-auth",
            hint='python -c "import secrets; print(secrets.token_urlsafe())" > keys.txt',
        )
    if job.api_key_file is not None and job.no_auth:
        raise RequestError("--api-key-file and --no-auth contradict each other")
    keys = read_keys(Path(job.api_key_file)) if job.api_key_file else {}
    limits = Limits(
        queue=job.queue, per_client=job.per_client, side=job.max_side, steps=job.max_steps,
        deadline=job.deadline, grace=job.grace,
    )  # fmt: skip
    specs, openers = _openers(job)
    files = (job.journal, job.api_key_file, job.safety_checker, job.options.prompt_cache)
    hide(
        *(job.model_path or ()),
        *job.options.components.values(),
        *(file for file in files if file is not None),
    )
    page = _page() if job.page else None
    logs.set_up(prompts=job.log_prompts)
    service = Service(
        [Worker(device, openers(device)) for device in job.devices or ["auto"]],
        specs,
        limits=limits,
        journal=Journal(expand(job.journal)) if job.journal else None,
        checker=_checker(job.safety_checker),
    )
    hosts = frozenset({"localhost", "127.0.0.1", "[::1]", job.host}) if local else None
    server = Server(
        service=service,
        address=Address(host=job.host, port=job.port),
        rules=Rules(keys=keys, hosts=hosts),
        page=page,
    )
    server.run(on_ready=_say_ready(job), on_progress=_say_progress(quiet=job.quiet))


def _openers(
    job: Serving,
) -> tuple[dict[str, ModelSpec], Callable[[str], dict[str, Callable[[], Engine]]]]:
    """Return the models, and how they are opened on a device."""
    found: dict[str, tuple[Any, Request]] = {}
    specs: dict[str, ModelSpec] = {}
    for place in job.model_path or [POCKET]:
        checkpoint = open_weights(place, job.options)
        spec = identify(checkpoint)
        if spec.name in found:
            raise RequestError("two models have the same name", seen=f"{spec.name}: {place}")
        _check_defaults(spec, job)
        side = job.max_side // spec.size_multiple * spec.size_multiple
        largest = min(side, spec.limits.get("height", side))
        request = Request(prompt="a picture", height=largest, width=largest)
        specs[spec.name] = spec
        found[spec.name] = (checkpoint, spec.resolve(request).request)

    def on(device: str) -> dict[str, Callable[[], Engine]]:
        options = job.options.replace(device=device)
        return {
            name: lambda checkpoint=checkpoint, request=request: open_engine(  # type: ignore[misc]
                checkpoint, options, planned_for=request
            )
            for name, (checkpoint, request) in found.items()
        }

    return specs, on


def _check_defaults(spec: ModelSpec, job: Serving) -> None:
    """See that what a model takes when nothing is said is allowed here."""
    for name, most, flag in (
        ("height", job.max_side, "--max-side"),
        ("width", job.max_side, "--max-side"),
        ("num_inference_steps", job.max_steps, "--max-steps"),
    ):
        if spec.defaults.get(name, 0) > most:
            raise RequestError(
                f"{flag} is smaller than what {spec.title} takes when nothing is said",
                seen=most,
                allowed=f"at least {spec.defaults[name]}",
            )


def _say_ready(job: Serving) -> Callable[[str], None]:
    def say(address: str) -> None:
        if not job.quiet:
            print(f"danqing serves at {address}", file=sys.stderr, flush=True)

    return say


def _say_progress(*, quiet: bool) -> Callable[[str, Progress], None]:
    def say(model: str, progress: Progress) -> None:
        if not quiet and progress.done == progress.total:
            print(f"{model}: {describe(progress)}", file=sys.stderr, flush=True)

    return say


def _check_installed() -> None:
    from importlib.util import find_spec

    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise InstallationError(
            "the server's libraries are not installed",
            seen=f"missing: {', '.join(missing)}",
            hint="pip install 'danqing[serve,page]'",
        )


def _page() -> Callable[[Any, Any], Any] | None:
    from importlib.util import find_spec

    if find_spec("gradio") is None:
        print("danqing: no page: gradio is not installed", file=sys.stderr)
        return None
    # what is uploaded is nobody else's, and gone at exit; gradio reads this when it is imported
    home = tempfile.mkdtemp(prefix="danqing-uploads-")
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    os.environ["GRADIO_TEMP_DIR"] = home
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    from danqing.serve.page import mount

    return mount


def _checker(place: str | None) -> Any:
    if place is None:
        return None
    from danqing.models.safety import SafetyChecker

    return SafetyChecker(expand(place))
